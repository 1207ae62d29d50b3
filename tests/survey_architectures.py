"""Try the conversion on every architecture of transformers, tiny and with random weights.

python tests/survey_architectures.py            # all of them
python tests/survey_architectures.py bert vit   # some; the others stay as they are

A model works if all of this holds, on padded inputs where it takes text:

    with exact attention in the place of the estimate, it is the model that it was: masks, scale,
    heads and causality arrive
    with FAVOR+ it runs forward and backward, and every gradient is finite
    saved and loaded with attn_implementation="favor", it gives the same numbers, bit by bit; or, if
    it cannot be loaded so, it does when it is switched after loading, and the page says so

What does not run, or does not come back from disk, with exact attention is not tried. What comes of
it goes to architectures.json, and from there into docs/conversion.md.
"""

import json
import re
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils import logging

from performers.convert.layer import FavorLayer
from performers.convert.sites import Sites
from performers.functional import softmax_attention
from performers.records import write_block

DOCUMENT = Path(__file__).parents[1] / "docs" / "conversion.md"
RESULTS = Path(__file__).with_name("architectures.json")
BLOCK = "architectures"

AFTER_LOADING = "when switched after loading, not by from_pretrained"
OWN = "attention of its own, not the AttentionInterface"

# The architectures that the tests run, besides this survey.
NAMED = (
    "albert", "bart", "bert", "bloom", "clip", "deepseek_v32", "deit", "distilbert", "doge",
    "electra", "esm", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "hubert",
    "llama", "mistral", "mixtral", "modernbert", "mpt", "phi3", "qwen2", "qwen3", "roberta",
    "siglip", "t5", "vit", "wav2vec2", "whisper",
)  # fmt: skip

WORDS = 97
LENGTH = 13
SECONDS = 40
MOST_PARAMETERS = 100_000_000

# Sizes under the many names that configurations have for them.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "text_vocab_size", "vocab_size_or_config_json_file"], WORDS),
    **dict.fromkeys(
        ["hidden_size", "d_model", "n_embd", "dim", "embedding_size", "embed_dim", "n_embed",
         "projection_dim", "conv_dim_size", "text_embed_dim", "proj_codevector_dim"], 32,
    ),
    **dict.fromkeys(
        ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers",
         "decoder_layers", "num_decoder_layers", "num_encoder_layers", "depth"], 2,
    ),
    **dict.fromkeys(
        ["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
         "decoder_attention_heads"], 4,
    ),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "d_kv", "attention_head_size"], 8),
    **dict.fromkeys(
        ["intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim",
         "moe_intermediate_size", "hidden_dim", "shared_expert_intermediate_size"], 48,
    ),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"], 1),
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "qk_head_dim": 16,
    "image_size": 16, "patch_size": 4, "max_source_positions": 20, "num_mel_bins": 16,
    "max_position_embeddings": 128, "max_target_positions": 64, "n_positions": 128,
    "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
    "partial_rotary_factor": 1.0, "rotary_pct": 0.5, "mamba_d_state": 8, "mamba_expand": 2,
    "mamba_n_heads": 8, "mamba_d_head": 8,
    # Large weights, so that attention is far from uniform and a wrong mask shows.
    "initializer_range": 0.2, "init_std": 0.2,
    # Nothing at random but dropout, so that two runs are one.
    "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
    "mask_time_prob": 0.0, "apply_spec_augment": False, "drop_path_rate": 0.0,
}  # fmt: skip

# What single architectures need besides.
SPECIAL: dict[str, dict[str, Any]] = {
    "esm": {"vocab_size": WORDS, "pad_token_id": 1, "mask_token_id": 4},
    "yolos": {"image_size": [16, 16]},
}


# Sizes that do not fit an architecture are changed in turn, None for its own, until it runs.
ATTEMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": None},
    {"num_hidden_layers": 4},
    {"num_hidden_layers": 4, "head_dim": None},
    {"num_key_value_heads": 4, "head_dim": None},
    {"hidden_size": 512, "head_dim": None},  # heads of 128, as default rotary sections want
)


def run(name: str) -> dict[str, str]:
    """What comes of converting one architecture: a `result` and, unless it works, a `reason`."""
    for changes in ATTEMPTS:
        try:
            with at_most(SECONDS):
                torch.manual_seed(0)
                model = tiny_model(name, SIZES | changes | SPECIAL.get(name, {}))
                inputs = inputs_for(model)
                expected = outputs(model, inputs)
                for once, again in zip(expected, outputs(model, inputs), strict=True):
                    assert torch.equal(once, again), "two runs of the exact model differ"
                saved_and_loaded(model)
            break
        except Exception as error:  # noqa: BLE001  # a model that does not run says nothing
            failed = {"result": "not tried", "reason": one_line(error)}
    else:
        return failed
    if not Sites.of(model).found:  # transformers only warns, and the model stays as it is
        return {"result": "refused", "reason": OWN}
    try:
        with at_most(SECONDS):
            return check(model, inputs, expected)
    except AssertionError as error:
        return {"result": "wrong", "reason": str(error)[:200]}
    except ValueError as error:
        return {"result": "refused", "reason": reason(str(error))}
    except Exception as error:  # noqa: BLE001  # one of hundreds: the survey goes on
        return {"result": "fails", "reason": one_line(error)}


def check(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], expected: list[torch.Tensor]
) -> dict[str, str]:
    """Whether the model works, and with what reservation.

    Raises AssertionError where the model is not what it was, ValueError where it is refused.
    """
    model.set_attn_implementation("favor")
    with exact_estimates() as calls:
        found = outputs(model, inputs)
    if not calls:
        return {"result": "not tried", "reason": "no layer of so small a model attends"}
    for ours, theirs in zip(found, expected, strict=True):
        error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-6))
        assert error < 1e-3, f"with exact attention in its place the output differs by {error:.1e}"
    model.train()
    sum(x.square().mean() for x in outputs(model, inputs)).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is None or weight.grad.isfinite().all(), f"gradient of {name}"
    model.eval()
    found = outputs(model, inputs)
    works = {"result": "works"}
    try:
        loaded = saved_and_loaded(model, attn_implementation="favor")
    except KeyError:  # of parts that look for their class under the name of the attention
        loaded = saved_and_loaded(model)
        loaded.set_attn_implementation("favor")
        works["reason"] = AFTER_LOADING
    for ours, theirs in zip(outputs(loaded, inputs), found, strict=True):
        assert torch.equal(ours, theirs), "the reloaded model gives other numbers"
    return works


def saved_and_loaded(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, **options).eval()


def tiny_model(name: str, sizes: dict[str, Any]) -> PreTrainedModel:
    config_class = type(AutoConfig.for_model(name))
    config = config_class(**tiny_options(config_class, sizes))
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModel.from_config(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters with the sizes known here")
    return AutoModel.from_config(config).eval()


def tiny_options(config_class: type[PreTrainedConfig], sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes that this configuration has, and its parts have."""
    default = config_class()
    options: dict[str, Any] = {}
    for name, value in vars(default).items():
        if name == "head_dim" and hasattr(default, "qk_rope_head_dim"):
            continue  # follows from the parts
        size = sizes.get(name)
        if size is not None and (value is not None or name in SPECIAL.get(default.model_type, {})):
            if _is_list(value) == _is_list(size):
                options[name] = size
        elif name.endswith("token_id") and value is not None:
            options[name] = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}.get(name, 4)
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            options[name] = {"model_type": part.model_type} | tiny_options(type(part), sizes)
    return options


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def inputs_for(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two inputs; of text, the first is padded on the left and the second on the right."""
    config = model.config
    ids = torch.randint(5, WORDS - 5, (2, LENGTH))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    text = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
    name = model.main_input_name
    inputs: dict[str, torch.Tensor] = {}
    vision = getattr(config, "vision_config", config)
    if name == "input_ids":
        inputs = text
        if config.model_type in {"clip", "siglip", "siglip2"} or hasattr(model, "logit_scale"):
            inputs = inputs | {"pixel_values": _image(vision)}
    elif name == "pixel_values":
        inputs = {"pixel_values": _image(vision)}
    elif name == "input_values":
        inputs = {"input_values": torch.randn(2, 1000)}
    elif name == "input_features":
        inputs = {
            "input_features": torch.randn(2, config.num_mel_bins, 2 * SIZES["max_source_positions"])
        }
    else:
        raise ValueError(f"no inputs are known here for {name}")
    if config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids[:, :11], "decoder_attention_mask": mask[:, :11]}
    return inputs


def _image(config: PreTrainedConfig) -> torch.Tensor:
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(2, getattr(config, "num_channels", 3), height, width)


def outputs(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The tensors that a model gives, without the rows of padding."""
    masks = [inputs[name].bool() for name in inputs if name.endswith("attention_mask")]
    found = []
    for name, x in model(**inputs).items():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 1:
            is_decoder = model.config.is_encoder_decoder and "encoder" not in name
            of_text = [mask for mask in masks if mask.shape == x.shape[:2]]
            found.append(x[of_text[-1 if is_decoder else 0]] if of_text else x)
    assert found, "a model gives at least one tensor"
    return found


@contextmanager
def exact_estimates() -> Iterator[list[bool]]:
    """Exact attention in the place of the estimate, with the arguments of the estimate."""
    calls: list[bool] = []
    estimate = FavorLayer.attend

    def attend(query: Any, key: Any, value: Any, phi: Any, **options: Any) -> Any:
        calls.append(True)
        for word in ("window_size", "num_sinks", "far", "far_limit", "num_heavy"):
            options.pop(word, None)
        return softmax_attention(query, key, value, **options)

    FavorLayer.attend = staticmethod(attend)
    try:
        yield calls
    finally:
        FavorLayer.attend = staticmethod(estimate)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def reason(message: str) -> str:
    """An error message without the names of a model's parts."""
    for words in ("attends with", "attends to a window", "got a mask of pairs"):
        if words in message:
            tail = message[message.index(words) :]
            return re.split(r", which|: FAVOR\+|, torch|, and there", tail)[0]
    return OWN if "by itself" in message else message.split(". ")[0][:200]


def table(record: dict[str, Any]) -> str:
    """Counts, then the architectures by what came out."""
    results = record["architectures"]
    counts = Counter(found["result"] for found in results.values())
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, found in results.items():
        kind = found["result"]
        if kind != "fails" and "reason" in found:
            kind += f": {re.sub(r'[0-9]+', 'N', found['reason'])}"
        by_reason[kind].append(name)
    rows = [["result", "architectures", "which"], ["---", "---:", "---"]]
    for result in ("works", "refused", "fails"):
        kinds = [kind for kind in by_reason if kind.startswith(result)]
        for kind in sorted(kinds, key=lambda kind: -len(by_reason[kind])):
            rows.append([kind, str(len(by_reason[kind])), ", ".join(by_reason[kind])])
    tried = len(results) - counts["not tried"]
    return "\n".join(
        [
            f"Of the {len(results)} model types of transformers {record['transformers']}, "
            f"{tried} could be built small and run by the script; {counts['works']} of these work, "
            f"{counts['refused']} are refused with the reason, {counts['fails']} fail in another "
            f"way, {counts['wrong']} give a wrong result.",
            "",
            *("| " + " | ".join(row) + " |" for row in rows),
        ]
    )


def main(names: list[str]) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    results = {}
    if names:
        results = json.loads(RESULTS.read_text(encoding="utf-8"))["architectures"]
    for name in names or sorted(MODEL_MAPPING_NAMES):
        results[name] = run(name)
        print(name, *results[name].values(), sep="\t", flush=True)
    record = {
        "transformers": transformers.__version__,
        "architectures": {name: results[name] for name in sorted(results)},
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    write_block(DOCUMENT, BLOCK, table(record))


if __name__ == "__main__":
    main(sys.argv[1:])
