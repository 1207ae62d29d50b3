"""FAVOR+, Fast Attention Via positive Orthogonal Random features, on one page."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from performers.checks import (
    check_attention_inputs,
    check_feature_map_parts,
    check_flags,
    check_not_traced,
)
from performers.functional.autocast import autocast_inputs, without_autocast
from performers.functional.linear import linear_attention
from performers.functional.segments import attend_by_segment
from performers.functional.staircase import Order, check_staircase, with_prefix
from performers.state import LinearState
from performers.typing import FeatureMap

__all__ = ["favor_attention", "without_sinks"]

Output = Float[Tensor, "batch heads query_length value_dim"]


@overload
def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi: FeatureMap,
    is_causal: bool = ...,
    key_padding_mask: Tensor | None = ...,
    scale: float | None = ...,
    normalize: bool = ...,
    enable_gqa: bool = ...,
    window_size: int | None = ...,
    num_sinks: int = ...,
    far: bool = ...,
    far_limit: float | None = ...,
    num_heavy: int = ...,
    initial_state: LinearState | None = ...,
    return_state: Literal[False] = ...,
    backend: str | None = ...,
    segment_ids: Tensor | None = ...,
    prefix_lengths: Tensor | None = ...,
    seen_lengths: Tensor | None = ...,
) -> Tensor: ...


@overload
def favor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi: FeatureMap,
    is_causal: bool = ...,
    key_padding_mask: Tensor | None = ...,
    scale: float | None = ...,
    normalize: bool = ...,
    enable_gqa: bool = ...,
    window_size: int | None = ...,
    num_sinks: int = ...,
    far: bool = ...,
    far_limit: float | None = ...,
    num_heavy: int = ...,
    initial_state: LinearState | None = ...,
    *,
    return_state: Literal[True],
    backend: str | None = ...,
    segment_ids: Tensor | None = ...,
    prefix_lengths: Tensor | None = ...,
    seen_lengths: Tensor | None = ...,
) -> tuple[Tensor, LinearState]: ...


def favor_attention(
    query: Float[Tensor, "batch heads query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    phi: FeatureMap,
    is_causal: bool = False,
    key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    scale: float | None = None,
    normalize: bool = True,
    enable_gqa: bool = False,
    window_size: int | None = None,
    num_sinks: int = 0,
    far: bool = True,
    far_limit: float | None = None,
    num_heavy: int = 0,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    backend: str | None = None,
    segment_ids: Int[Tensor, "batch key_length"] | None = None,
    prefix_lengths: Int[Tensor, " batch"] | None = None,
    seen_lengths: Int[Tensor, "batch query_length"] | None = None,
) -> Output | tuple[Output, LinearState]:
    """softmax(scale · QKᵀ) V, or any kernel in place of exp, at a cost linear in the length.

        out = D⁻¹ Q′ (K′ᵀ V),    Q′ = φ(√scale · Q),   K′ = φ(√scale · K),   D = diag(Q′ K′ᵀ 1)

    `phi`: the feature map, e.g. `performers.SoftmaxFeatures(dim)`; only `phi.redraw()` changes it.
    `is_causal`: position i attends to j ≤ i; nothing it sees depends on later keys or values, as
    long as these are finite: 0 · NaN is NaN, in the same chunk of at most 128 positions, or block.
    `key_padding_mask`: True = a real key. Masked keys count neither in the numerator nor in the
    normalizer; a query that sees no key returns zeros. Outputs of padded queries mean nothing:
    ignore them.
    `scale`: 1/√dim for softmax features, 1 for generalized kernels, unless given. Must be positive.
    `normalize`: False leaves out D⁻¹ (Appendix D.3); the output then is as large as φ makes it.
    `enable_gqa`: key heads may divide query heads; each key head serves a group of neighbors.
    `window_size`: real tokens are cut into blocks of this size. A query scores the keys of its own
    block and of the neighboring ones exactly (causal: of the one before, and its own up to itself),
    so at least the window_size nearest on each side, and all others by φ, under one normalizer. A
    window of the whole length is exact attention. For positive features of softmax only.
    `num_sinks`: the first real tokens, this many, are scored exactly by every query that sees them.
    `far`: False leaves out all keys that are neither near nor sinks; φ is then not used.
    `far_limit`: the far keys of a query together weigh at most this multiple of what its near keys
    and sinks weigh. Estimates have a heavy tail, which does a trained model more harm than what a
    limit takes away; 0.2 is a good one (docs/conversion.md). None: no limit, estimates unbiased.
    `num_heavy`: with far=False, this many of the far keys stay exact, those that near queries
    attended to most: for each block of queries and each key head the heaviest so far, in causal
    attention; in bidirectional attention the heaviest of both sides.
    `initial_state`, `return_state`: continue a sequence. Prefill, chunked prefill and one-token
    decoding are this same call. With `return_state=True` the result is `(out, LinearState)`.
    `backend`: None chooses; "reference", "chunked", "landmarks" or "triton" is obeyed or refused.
    `segment_ids`: of packed sequences. A new one begins where the number changes, and each attends
    to itself alone: same bits as one call per sequence, blocks and sinks included (with more than
    256 of them, same up to rounding). A compiled graph breaks here.
    `prefix_lengths`: causal attention in which the first so many positions, padding counted, see
    each other, as in prefix language models. The state is that of causal attention, so what follows
    continues it. Cost: the prefix once more.
    `seen_lengths`: query i sees the first seen_lengths[i] keys, and all of an initial state. Chunks
    of c positions that see themselves and what came before: (i // c + 1) · c, with a look-ahead
    more; keys may be those of another sequence. Not with a window, nor with features that learn
    from the call. Cost: as causal attention of query_length + key_length positions at most.

    Under torch.autocast the inputs are cast as those of torch's `scaled_dot_product_attention` are,
    and all sums stay float32.

    Dropout of attention weights has no linear-time form: drop the output instead.

    Differentiable in all ways of PyTorch, in query, key, value, ω and the sums of a state: by a
    backward pass, forward mode, `torch.func` (`jvp`, `jacrev`, `vmap(grad(…))`) and twice. All but
    a plain backward pass goes through slower formulas, which keep features; "triton", the default
    on GPUs of sm_90, refuses it.

    Raises ValueError or TypeError for shapes, dtypes, devices and words that do not fit.
    Cost: O(length · num_features · dim) time, O(length · dim) memory.
    Source: Choromanski et al. 2021, Algorithm 1.

    >>> import torch
    >>> from performers import SoftmaxFeatures
    >>> query, key, value = torch.randn(3, 2, 4, 1000, 64).unbind()
    >>> favor_attention(query, key, value, SoftmaxFeatures(dim=64), is_causal=True).shape
    torch.Size([2, 4, 1000, 64])
    """
    check_not_traced()
    check_feature_map_parts(phi)
    scale = phi.default_scale if scale is None else scale
    query, key, value = autocast_inputs(query, key, value)
    # φ looks at the tensors before they come to where they are checked with all else.
    check_attention_inputs(
        query, key, value, is_causal=is_causal, key_padding_mask=key_padding_mask,
        enable_gqa=enable_gqa, scale=scale,
    )  # fmt: skip
    check_flags(far=far, return_state=return_state)
    if segment_ids is not None or prefix_lengths is not None or seen_lengths is not None:
        check_staircase(
            seen_lengths, prefix_lengths, query, key, is_causal=is_causal, segment_ids=segment_ids,
            window_size=window_size, has_state=initial_state is not None,
        )  # fmt: skip
        attend = partial(
            favor_attention, phi=phi, scale=scale, normalize=normalize, enable_gqa=enable_gqa,
            window_size=window_size, num_sinks=num_sinks, far=far, far_limit=far_limit,
            num_heavy=num_heavy, backend=backend,
        )  # fmt: skip
        if segment_ids is not None:
            if return_state or initial_state is not None:
                raise ValueError(
                    "a state belongs to one sequence, and segment_ids pack several: pass each by "
                    "itself, or initial_state=None and return_state=False."
                )
            attend = partial(attend, is_causal=is_causal)
            return attend_by_segment(attend, segment_ids, query, key, value, key_padding_mask)
        inputs = query, key, value, key_padding_mask
        order = None if seen_lengths is None else Order.of(seen_lengths, key.shape[2])
        *rows, mask = inputs if order is None else order.laid_out(*inputs)
        found = attend(
            *rows, key_padding_mask=mask, is_causal=True, initial_state=initial_state,
            return_state=return_state,
        )  # fmt: skip
        out, *after = found if return_state else (found,)
        if order is not None:
            out = order.of_queries(out)
        if prefix_lengths is not None:
            out = with_prefix(attend, prefix_lengths, *inputs, out)
        return (out, *after) if return_state else out
    if far:
        is_streaming = is_causal or return_state or initial_state is not None
        estimated = key_padding_mask
        # What streams learns nothing from the call. Other numbers are refused below.
        if not is_streaming and isinstance(num_sinks, int) and num_sinks > 0:
            estimated = without_sinks(key, key_padding_mask, num_sinks)
        with without_autocast(query):  # φ learns from sums, too
            phi = phi.fitted(query, key, estimated, scale=scale, is_streaming=is_streaming)
    out, state = linear_attention(
        query,
        key,
        value,
        phi,
        is_causal=is_causal,
        key_padding_mask=key_padding_mask,
        scale=scale,
        normalize=normalize,
        enable_gqa=enable_gqa,
        window_size=window_size,
        num_sinks=num_sinks,
        far=far,
        far_limit=far_limit,
        num_heavy=num_heavy,
        initial_state=initial_state,
        return_state=return_state,
        backend=backend,
    )
    return out if state is None else (out, state)


def without_sinks(
    key: Tensor, key_padding_mask: Tensor | None, num_sinks: int
) -> Bool[Tensor, "batch key_length"]:
    """The mask of the keys that φ has to estimate, the only ones that sharp features learn from."""
    num_sinks = min(num_sinks, key.shape[2])  # for a number that a tensor could not hold
    if key_padding_mask is None:
        is_later = torch.arange(key.shape[2], device=key.device) >= num_sinks
        return is_later.expand(key.shape[0], -1)
    return key_padding_mask & (key_padding_mask.cumsum(dim=1) > num_sinks)
