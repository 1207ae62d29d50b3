"""The softmax normalizer by itself, log Σ_j exp(q·k_j), and the cross entropy that is built on it.

    Σ_j exp(q·k_j) = E[φ(q) · Σ_j φ(k_j)]

The sum over the keys is taken once and is a `LinearState` without values. Each query then costs
O(m), however many keys there are:

    state = absorb_keys(key, phi)
    log_normalizer(query, phi, state)

The estimate of the normalizer is unbiased; its logarithm is not (Jensen):

    E[log Ẑ] ≈ log Z − Var(Ẑ) / (2 Z²)

So log Ẑ is too small on average: by half the squared relative error of Ẑ, while that error is well
below 1. If it is larger, the rare ω that dominate the mean of Ẑ are rarely drawn, and log Ẑ is
nearly always too small. The error grows like exp(‖q + k‖²) / m, so keep the norms small or use
`performers.SharpFeatures`; docs/kernels.md has the numbers.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from performers.backends.reference import read, read_weights
from performers.backends.tiles import recomputed
from performers.checks import (
    LEARNED_SCALE,
    MOST,
    check_choice,
    check_feature_map_parts,
    check_instance,
    check_made_by,
    check_number,
    check_rows,
    check_tensor,
    check_whole_number,
)
from performers.functional.autocast import without_autocast
from performers.functional.favor import favor_attention
from performers.state import LinearState, Maker, exp_difference
from performers.typing import FeatureMap

__all__ = ["absorb_keys", "approximate_cross_entropy", "log_normalizer"]

QUERY_TILE = 512
REDUCTIONS = ("mean", "sum", "none")


def absorb_keys(
    key: Float[Tensor, "batch heads key_length dim"],
    phi: FeatureMap,
    key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    scale: float | None = None,
) -> LinearState:
    """Σ_j φ(√scale · k_j), with one log-scale per feature: all that a normalizer needs of the keys.

    States of several key sets merge: `state.merge(other)`. `scale` is 1/√dim unless given.

    Raises ValueError unless φ is a nonnegative estimate of the softmax kernel.
    Cost: O(key_length · num_features · dim) time, O(num_features) memory beside the keys.
    """
    _check_log_is_defined(phi)
    check_tensor("key", key, "batch, heads, length, dim")
    no_query, no_value = key[:, :, :0], key[..., :0]
    with without_autocast(key):  # which keeps logarithms of sums exact
        _, state = favor_attention(
            no_query,
            key,
            no_value,
            phi,
            key_padding_mask=key_padding_mask,
            scale=scale,
            return_state=True,
        )
    return state


def log_normalizer(
    query: Float[Tensor, "batch heads query_length dim"],
    phi: FeatureMap,
    state: LinearState,
    scale: float | None = None,
) -> Float[Tensor, "batch heads query_length"]:
    """log Σ_j exp(scale · q·k_j), estimated from the keys that `absorb_keys` has put into a state.

        log Ẑ_i = log Σ_m φ_m(√scale · q_i) Σ_j φ_m(√scale · k_j)

    A state of batch size 1 serves queries of any batch size. It is −∞ for a state without keys. The
    result is float32, or float64 for float64 states. Bias: see the head of this file.

    Raises ValueError unless φ is a nonnegative estimate of the softmax kernel.
    Cost: O(query_length · num_features · dim), whatever the number of keys.

    >>> from performers import SoftmaxFeatures
    >>> phi = SoftmaxFeatures(dim=8, num_projections=4096)
    >>> query, key = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 1000, 8)
    >>> estimate = log_normalizer(query, phi, absorb_keys(key, phi))
    >>> exact = (query @ key.mT / 8**0.5).logsumexp(dim=-1)
    >>> bool((estimate - exact).abs().max() < 0.2)
    True
    """
    _check_log_is_defined(phi)
    check_tensor("query", query, "batch, heads, length, dim")
    check_instance("state", state, LinearState, "the LinearState that absorb_keys returns")
    scale = phi.default_scale if scale is None else scale
    check_number("scale", scale, otherwise=LEARNED_SCALE)
    # The keys are in the state already, so this call has none. Statistics of the call are refused.
    phi = phi.fitted(query, query[:, :, :0], None, scale=scale, is_streaming=True)
    if not torch.compiler.is_compiling():
        check_made_by("state", state.made_by, Maker.of(phi, scale))
    _check_sums(state, query, phi.num_features)
    state = state.map(lambda part: part.expand(query.shape[0], *part.shape[1:]))

    def read_tile(rows: Tensor, state: LinearState) -> Tensor:
        partial = read(state, phi.query_features(rows * math.sqrt(scale)))
        # The sum is kept relative to a frame, a running maximum of exponents: log Ẑ adds it again.
        return (partial.normalizer.log() + partial.frame).squeeze(-1)

    with without_autocast(query):
        rows = query.to(state.normalizer.dtype)
        parts = [recomputed(read_tile, tile, state) for tile in rows.split(QUERY_TILE, dim=2)]
    return torch.cat(parts, dim=2)


def approximate_cross_entropy(
    hidden: Float[Tensor, "*batch dim"],
    output_embeddings: Float[Tensor, "vocabulary dim"],
    targets: Int[Tensor, "*batch"],
    phi: FeatureMap,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Float[Tensor, "*reduced"]:
    """Cross entropy of softmax(h Eᵀ) over a large vocabulary without its logits.

        loss = log(1 + exp(log Ẑ_others − h·e_target)),    Ẑ_others = φ(h) · Σ_{j ≠ target} φ(e_j)

    The target's own term is exact in the numerator and in the normalizer, and only the sum over the
    other tokens is estimated. So the loss is never negative. If the target were a part of the
    estimate, which typically is too small, the loss would have no lower bound, and training would
    exploit that.

    The estimate is differentiable in `hidden` and `output_embeddings`. It is too small on average
    (see the head of this file): train with it, but report the exact cross entropy, and redraw φ
    during training, because the weights would else adapt to the errors of one ω.
    `SharpFeatures(statistics="call")` measures hidden states and embeddings at every call and is
    the sharpest choice.

    `targets`: indices of rows of `output_embeddings`; those equal to `ignore_index` are left out.
    `reduction`: "mean" over the targets that count (NaN if there is none, as in torch), "sum", or
    "none". The loss is float32, or float64 for float64 inputs.

    Raises ValueError or TypeError for shapes, targets and words that do not fit, and for a φ that
    is not a nonnegative estimate of the softmax kernel.
    Cost: O((N + V) · num_features · dim) for N targets and V tokens, where exact logits cost
    O(N · V · dim): it pays if num_features ≪ N·V/(N + V). Memory O((N + V) · dim), not N · V.
    """
    _check_log_is_defined(phi)
    check_choice("reduction", reduction, REDUCTIONS)
    _check_tokens(hidden, output_embeddings, targets, ignore_index)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    counts = targets != ignore_index

    def losses_of(rows: Tensor, own_key: Tensor, state: LinearState) -> Tensor:
        frame = state.log_scale.unsqueeze(2)
        # Everything is relative to the frames of the state, one per feature, and of the rows.
        weights, row_frame = read_weights(frame, phi.query_features(rows))
        own_features = phi.key_features(own_key)
        own = exp_difference(own_features.exponent(), frame)
        if own_features.values is not None:
            own = own * own_features.values
        # The state holds the target's own key, so no difference is below 0 except by rounding.
        others = (weights * (state.normalizer.unsqueeze(2) - own).clamp(min=0)).sum(
            -1, keepdim=True
        )
        # With a vocabulary of one token, or after underflow, the loss is log(1 + 0). NaN is not 0,
        # and has to reach the loss.
        has_none = others == 0
        log_others = others.masked_fill(has_none, 1.0).log() + row_frame
        # log(1 + exp(x)) as softplus(x), which overflows nowhere.
        losses = F.softplus(log_others - (rows * own_key).sum(-1, keepdim=True))
        return losses.masked_fill(has_none, 0.0).flatten()

    with without_autocast(hidden):
        query = hidden[counts].to(dtype)[None, None]
        key = output_embeddings.to(dtype)[None, None]
        phi = phi.fitted(query, key, None, scale=1.0, is_streaming=False)
        state = absorb_keys(key, phi, scale=1.0)
        # With indices of shape [counted] this gathers one key for each counted target.
        own_key = key[:, :, targets[counts]]
        rows, own_keys = query.split(QUERY_TILE, dim=2), own_key.split(QUERY_TILE, dim=2)
        parts = [recomputed(losses_of, *tile, state) for tile in zip(rows, own_keys, strict=True)]
    losses = torch.cat(parts)
    if reduction == "none":
        return hidden.new_zeros(targets.shape, dtype=dtype).masked_scatter(counts, losses)
    return losses.mean() if reduction == "mean" else losses.sum()


def _check_log_is_defined(phi: FeatureMap) -> None:
    check_feature_map_parts(phi)
    if not (phi.is_softmax and phi.is_nonnegative):
        raise ValueError(
            "the logarithm of a normalizer needs a nonnegative estimate of the softmax kernel, and "
            f"{type(phi).__name__} gives none as it is set. Use SharpFeatures, or SoftmaxFeatures "
            'with a nonnegative estimator, such as "positive".'
        )


def _check_sums(state: LinearState, query: Tensor, num_features: int) -> None:
    (batch, heads), of = query.shape[:2], state.normalizer.shape
    if of[1:] != (heads, num_features) or of[0] not in (1, batch) or state.near is not None:
        raise ValueError(
            f"state must hold sums of {num_features} features for {heads} heads, without a near "
            f"field, of a batch of 1 or {batch}: got (batch, heads, features) = {tuple(of)}. Make "
            "it with absorb_keys(key, phi), of keys with as many heads as query."
        )


def _check_tokens(
    hidden: Tensor, output_embeddings: Tensor, targets: Tensor, ignore_index: int
) -> None:
    check_rows("hidden", hidden)
    check_rows("output_embeddings", output_embeddings)
    check_tensor("targets", targets)
    check_whole_number("ignore_index", ignore_index)
    if abs(ignore_index) > MOST:
        raise ValueError(
            "ignore_index must be a number that int64 holds, "
            f"got one of {ignore_index.bit_length()} bits."
        )
    if output_embeddings.ndim != 2 or hidden.shape[-1:] != output_embeddings.shape[1:]:
        raise ValueError(
            "output_embeddings must be (vocabulary, dim) with the dim of hidden: hidden is "
            f"{tuple(hidden.shape)}, output_embeddings is {tuple(output_embeddings.shape)}."
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            "there must be one target per hidden vector: hidden is "
            f"{tuple(hidden.shape)}, targets is {tuple(targets.shape)}."
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64 indices, got {targets.dtype}. Use .long().")
    vocabulary = len(output_embeddings)
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if outside.any():
        raise ValueError(
            f"targets must be in 0 … {vocabulary - 1} or ignore_index={ignore_index}, got "
            f"{int(targets[outside][0])}."
        )
