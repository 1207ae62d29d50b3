"""Time per token and size of the cache, of a Llama that attends exactly and by FAVOR+.

python benchmarks/generation.py                      # writes generation.json
python benchmarks/generation.py --write-table        # puts its table into docs/conversion.md

The model has random weights, and the caches are filled with random keys and values instead of a
prompt: neither time nor size depends on them. What is timed is the model's forward call for one
token with the mask that generate() gives it: CPU time, the smallest of all calls, models in turn.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from performers import FavorCache, FavorOptions, linearize
from performers.convert.cache import FavorMemory
from performers.convert.linearize import converted_layers
from performers.records import markdown_table, write_block

RESULTS = Path(__file__).with_name("generation.json")
DOCUMENT = Path(__file__).parents[1] / "docs" / "conversion.md"
BLOCK = "results:generation"
CONTEXTS = (256, 1024, 4096, 32768)
WORDS, HEADS, DIM, LAYERS = 997, 8, 64, 4
TOKENS = 5  # that a model writes before the next one takes its turn


def build_model(num_projections: int | None) -> LlamaForCausalLM:
    """The same weights each time; exact without `num_projections`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HEADS * DIM,
        intermediate_size=1376,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=2 * max(CONTEXTS),
    )
    model = LlamaForCausalLM(config).eval()
    if num_projections is not None:
        linearize(model, FavorOptions(num_projections=num_projections, window_size=0))
    return model


def filled_cache(model: PreTrainedModel, context: int) -> Cache:
    """A cache that has seen this many random keys and values."""
    is_exact = model.config._attn_implementation != "favor"
    cache = DynamicCache(config=model.config) if is_exact else FavorCache(model.config)
    layers = list(converted_layers(model).values())
    generator = torch.Generator().manual_seed(0)
    for number, memory in enumerate(cache.layers):
        key, value = torch.randn(2, 1, HEADS, context, DIM, generator=generator)
        key, value = cache.update(key, value, number)
        if isinstance(memory, FavorMemory):
            memory.attend(layers[number], key, key, value, None, None)
    return cache


def num_bytes(cache: Cache) -> int:
    def parts(layer: Any) -> list[Tensor]:
        if isinstance(layer, FavorMemory):
            return [] if layer.state is None else list(layer.state.parts().values())
        return [layer.keys, layer.values]

    return sum(
        part.numel() * part.element_size() for layer in cache.layers for part in parts(layer)
    )


def one_token(model: PreTrainedModel, cache: Cache) -> Callable[[], None]:
    """Each call takes the sequence one token further."""

    def call() -> None:
        length = cache.get_seq_length() + 1
        model(
            input_ids=torch.tensor([[length % WORDS]]),
            attention_mask=torch.ones(1, length, dtype=torch.int64),
            past_key_values=cache,
        )

    return call


def measure(contexts: list[int], projections: list[int], repeats: int) -> list[dict[str, Any]]:
    models = {"exact": build_model(None)}
    models |= {f"favor, m = {count}": build_model(count) for count in projections}
    rows = []
    for context in contexts:
        caches = {name: filled_cache(model, context) for name, model in models.items()}
        calls = {name: one_token(model, caches[name]) for name, model in models.items()}
        sizes = {name: num_bytes(cache) for name, cache in caches.items()}
        seconds = dict.fromkeys(models, float("inf"))
        for _ in range(repeats):
            for name, call in calls.items():
                for _ in range(TOKENS):
                    start = time.process_time()
                    call()
                    seconds[name] = min(seconds[name], time.process_time() - start)
        rows.append({"context": context, "seconds_per_token": seconds, "cache_bytes": sizes})
        print(context, {name: f"{1e3 * s:.2f} ms" for name, s in seconds.items()}, sizes)
    return rows


def table(results: dict[str, Any]) -> str:
    """Milliseconds per token and MiB of the cache, a row per context."""
    names = list(results["rows"][0]["seconds_per_token"])
    lines = [["context", *names]]
    for row in results["rows"]:
        seconds, sizes = row["seconds_per_token"], row["cache_bytes"]
        cells = [f"{1e3 * seconds[name]:.1f} ms, {sizes[name] / 2**20:.1f} MiB" for name in names]
        lines.append([f"{row['context']:,}", *cells])
    made = (
        f"Time per token and size of the cache. {results['model']}; {results['threads']} thread, "
        f"CPU time, smallest of {results['calls']} calls; {results['machine']}, "
        f"{results['capability']}, torch {results['torch']}. Caches are filled with random keys "
        "and values."
    )
    return f"{markdown_table(lines)}\n\n{made}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--projections", type=int, nargs="+", default=(128, 256))
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--write-table", action="store_true")
    arguments = parser.parse_args()
    if arguments.write_table:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
        write_block(DOCUMENT, BLOCK, table(results))
        return
    torch.set_num_threads(1)
    results = {
        "model": f"Llama, {LAYERS} layers, {HEADS} heads of dim {DIM}, float32, random weights",
        "threads": 1,
        "clock": "process_time, smallest of all calls",
        "calls": arguments.repeats * TOKENS,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {platform.system()}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "rows": measure(arguments.contexts, arguments.projections, arguments.repeats),
    }
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
