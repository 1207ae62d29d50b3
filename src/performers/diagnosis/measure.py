"""Is m enough? The error of linear attention on given queries, keys and values, and its causes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.checks import check_attention_inputs, check_count, check_number
from performers.diagnosis.heads import Diagnosis, HeadDiagnosis
from performers.diagnosis.sequence import Sequence
from performers.nn.feature_maps import SoftmaxFeatures
from performers.nn.sharp import SharpFeatures

__all__ = ["diagnose"]


@torch.no_grad()
def diagnose(
    query: Float[Tensor, "batch heads query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    phi: SoftmaxFeatures | SharpFeatures,
    is_causal: bool = False,
    key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    window_size: int | None = None,
    target_error: float | None = None,
    max_projections: int = 8192,
) -> Diagnosis:
    """How well `favor_attention` with these arguments estimates softmax attention, head by head.

    `target_error`: find the smallest m for this relative error as well: from the closed form, and
    by trying m = 8, 11, 16, 23, … with new draws up to `max_projections`.

    Raises ValueError or TypeError for what attention refuses, for inputs that are not finite, and
    for feature maps of other kernels, which have no exact output to compare with.
    Cost: quadratic in the length, as exact attention is: O(length²) memory per head.

    >>> from performers import SoftmaxFeatures
    >>> query, key, value = torch.randn(3, 1, 2, 64, 16).unbind()
    >>> len(diagnose(query, key, value, SoftmaxFeatures(dim=16)).heads)
    2
    """
    if not isinstance(phi, SoftmaxFeatures | SharpFeatures):
        raise TypeError(
            "diagnose compares with softmax attention, so phi must be SoftmaxFeatures or "
            f"SharpFeatures, got {type(phi).__name__}."
        )
    scale = phi.default_scale if scale is None else scale
    check_attention_inputs(
        query,
        key,
        value,
        is_causal=is_causal,
        key_padding_mask=key_padding_mask,
        enable_gqa=enable_gqa,
        scale=scale,
    )
    if target_error is not None:
        check_number("target_error", target_error)
    if window_size is not None:
        check_count("window_size", window_size)
    check_count("max_projections", max_projections)
    sequences = (
        Sequence.of(query, key, value, is_causal, key_padding_mask, scale, window_size, row)
        for row in range(len(query))
    )
    cases = [sequence for sequence in sequences if sequence.visible.any()]
    if not cases:
        raise ValueError(
            "there must be a query that sees a key to diagnose attention: query is "
            f"{tuple(query.shape)}, key is {tuple(key.shape)}, and key_padding_mask must not hide "
            "every key."
        )

    def over_batch(numbers: list[Tensor]) -> list[float]:
        return torch.stack(numbers).mean(dim=0).tolist()

    by_sequence = [case.numbers(phi) for case in cases]
    per_head: dict[str, list[Any]] = {
        name: over_batch([numbers[name] for numbers in by_sequence]) for name in by_sequence[0]
    }
    per_head.setdefault("expected_error", [None] * query.shape[1])
    if target_error is not None:
        per_head["predicted_projections"] = [
            None if error is None else phi.num_projections * (error / target_error) ** 2
            for error in per_head["expected_error"]
        ]
        found: list[int | None] = [None] * query.shape[1]
        for m in _ladder(max_projections):
            wider = _with_projections(phi, m)
            errors = over_batch([case.observed_error(wider) for case in cases])
            for head, error in enumerate(errors):
                if found[head] is None and error <= target_error:
                    found[head] = m
            if None not in found:
                break
        per_head["smallest_projections"] = found
    heads = (dict(zip(per_head, row, strict=True)) for row in zip(*per_head.values(), strict=True))
    return Diagnosis(
        tuple(HeadDiagnosis(**head) for head in heads),
        phi.num_projections,
        target_error,
        None if target_error is None else max_projections,
    )


def _with_projections(
    phi: SoftmaxFeatures | SharpFeatures, num_projections: int
) -> SoftmaxFeatures | SharpFeatures:
    """The same features, calibration included, with another number of projections, newly drawn."""
    other = copy.deepcopy(phi)
    other.num_projections = num_projections
    other.omega = phi.num_redraws.new_empty(num_projections, phi.dim, dtype=torch.float32)
    other.redraw()
    return other


def _ladder(largest: int) -> Iterator[int]:
    """8, 11, 16, 23, …: each √2 times the one before."""
    return (
        round(2 ** (step / 2))
        for step in itertools.takewhile(lambda step: 2 ** (step / 2) <= largest, itertools.count(6))
    )
