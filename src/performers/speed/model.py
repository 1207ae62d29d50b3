"""One training step of a whole model, as in the paper's Figures 3, 20 and 21."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM
from performers.speed.timing import PARTS, interleaved, limited_memory, peak_bytes

__all__ = ["peak_of_step", "seconds_of_step"]


def seconds_of_step(
    configs: Mapping[str, dict[str, Any]], length: int, batch: int, repeats: int,
    device: torch.device,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Seconds of the forward pass, and of forward and backward, of each model.

    `configs`: by a name of the caller's the arguments of `PerformerConfig`; with `is_decoder` it is
    a causal model.
    """
    calls = {}
    for name, config in configs.items():
        model = _model(config, device)
        tokens = torch.randint(config["vocab_size"], (batch, length), device=device)
        calls[f"{name}/forward"] = partial(torch.no_grad()(model), tokens)
        calls[f"{name}/forward_backward"] = partial(_step, model, tokens)
    with limited_memory(device):
        measured = interleaved(calls, repeats, device)
    return {name: {part: measured[f"{name}/{part}"] for part in PARTS} for name in configs}


def peak_of_step(
    config: dict[str, Any], length: int, batch: int, device: torch.device
) -> int | str:
    """Bytes of weights, their gradients and all that a training step needs, or "out of memory"."""
    return peak_bytes(_fresh_step, config, length, batch, device, device=device)


def _fresh_step(config: dict[str, Any], length: int, batch: int, device: torch.device) -> None:
    model = _model(config, device)
    _step(model, torch.randint(config["vocab_size"], (batch, length), device=device))


def _model(config: dict[str, Any], device: torch.device) -> torch.nn.Module:
    torch.manual_seed(0)
    whole = PerformerConfig(**config)
    kind = PerformerForCausalLM if whole.is_decoder else PerformerForMaskedLM
    return kind(whole).to(device)


def _step(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    model.zero_grad(set_to_none=True)
    model(tokens, labels=tokens).loss.backward()
