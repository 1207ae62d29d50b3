"""Queries, keys and values of real models, as their attention layers get them.

A model of transformers passes them to the attention function that its configuration names. Here
this is a function that keeps them and then attends as usual. So any architecture that asks
transformers' AttentionInterface can be read, and none is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from performers.checks import check_tensor
from performers.convert.modes import evaluating
from performers.convert.plain_attention import other_attention
from performers.convert.sequences import Sequences
from performers.convert.source import (
    check_source_weights,
    read_tensors,
    source_config,
    source_tokenizer,
)
from performers.data.files import Record
from performers.diagnosis.captured import Captured

__all__ = ["capture_attention", "capture_text", "read_captured"]

# The name of the function below among transformers' attention functions.
CAPTURE = "performers_capture"


def capture_attention(model: PreTrainedModel, **inputs: Tensor) -> list[Captured]:
    """Run the model on these inputs and return what each attention layer got, in order.

    Inputs must not be padded: give no attention_mask. The tensors stay on the device of the model.

    Raises ValueError for models that do not ask the AttentionInterface, and for layers whose
    attention is not softmax(scale · QKᵀ) V: position biases, soft caps, windows, packed sequences.
    """
    before = model.config._attn_implementation
    names = {module: name for name, module in model.named_modules()}
    calls: list[Captured] = []
    token = _calls.set((names, calls))
    try:
        model.set_attn_implementation(CAPTURE)
        with torch.no_grad(), evaluating(model):
            model(**inputs)
    finally:
        model.set_attn_implementation(before)
        _calls.reset(token)
    if not calls:
        raise ValueError(
            f"{type(model).__name__} computes attention without transformers' AttentionInterface, "
            "so its queries and keys cannot be captured. Save them to a safetensors file as query, "
            "key and value instead."
        )
    return calls


def capture_text(
    folder: str | Path, text: str | Sequence[Record], length: int = 256, sequences: int = 4
) -> list[Captured]:
    """Load a model and its tokenizer, and capture its attention on windows of a text.

    The text becomes at most `sequences` windows of exactly `length` tokens each, special tokens
    included. Of records (`performers.data.read_texts`) the first `length` tokens of so many that
    are long enough are read, because what is captured has no padding.

    Raises ValueError where the model, the text or all records are too short for `length`, OSError
    where there is no model.
    """
    config = source_config(folder)
    longest = getattr(config, "max_position_embeddings", None) or length
    if length > longest:
        raise ValueError(f"length must be at most {longest} for this model, got {length}.")
    read = Sequences.of(source_tokenizer(folder), text, length)
    windows = read.inputs["input_ids"][read.lengths >= length][:sequences]
    if not len(windows):
        raise ValueError(
            f"some record must have at least {length} tokens, and the longest has "
            f"{int(read.lengths.max())}. Give longer ones or a smaller length."
        )
    inputs = {"input_ids": windows}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = windows
    check_source_weights(folder)
    return capture_attention(AutoModel.from_pretrained(folder), **inputs)


def read_captured(path: str | Path, is_causal: bool = False) -> list[Captured]:
    """Queries, keys and values from a safetensors file.

    Tensors are named query, key and value, or LAYER.query, LAYER.key and LAYER.value, and have the
    layout (batch, heads, length, dim).

    Raises ValueError where one of the three is missing or anything else is in the file.
    """
    tensors = read_tensors(
        path, "Save queries, keys and values with safetensors.torch.save_file, or give a model."
    )
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, role = name.rpartition(".")
        layers.setdefault(layer, {})[role] = tensor
    for layer, parts in layers.items():
        if parts.keys() != {"query", "key", "value"}:
            raise ValueError(
                f"{path} must hold query, key and value of every layer: "
                f"{layer or 'the file'} has {', '.join(sorted(parts))}."
            )
        for role, tensor in parts.items():
            check_tensor(f"{role} in {path}", tensor, "batch, heads, length, dim")
    return [
        Captured(layer or "attention", **layers[layer], scale=None, is_causal=is_causal)
        for layer in sorted(layers, key=_natural)
    ]


_calls: ContextVar[tuple[dict[nn.Module, str], list[Captured]]] = ContextVar("calls")


def _capture(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    names, calls = _calls.get()
    name = names.get(module, type(module).__name__)
    given = other_attention(options)
    given += [
        f"packed sequences ({word}=)"
        for word in ("cu_seq_lens_q", "seq_idx")
        if options.get(word) is not None
    ]
    if attention_mask is not None:
        given.append("a mask (of padding, a window shorter than the input, or packed sequences)")
    if given:
        raise ValueError(
            f"{name} attends with {', '.join(given)}, which is not softmax(scale · QKᵀ) V and "
            "cannot be diagnosed."
        )
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    causal = bool(causal) and query.shape[2] == key.shape[2]  # cross-attention never is
    calls.append(Captured(name, query, key, value, scaling, causal))
    options = {"scaling": scaling, "is_causal": is_causal, **options}
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)


AttentionInterface.register(CAPTURE, _capture)
AttentionMaskInterface.register(CAPTURE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer.2 before layer.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
