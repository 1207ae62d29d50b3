"""Bidirectional attention as two calls of a fused softmax kernel, with the projections as
landmarks.

Where log φ_m(x) = x·ω_m + (a number of the row), FAVOR+ is softmax attention twice:

    landmark m attends to the keys       S_m, s_m = softmax_j(ω_m·k_j + row_j) v_j,  its log-sum-exp
    query i attends to the landmarks     out_i = softmax_m(q_i·ω_m + s_m) S_m

so the kernel that PyTorch has for exact attention does the work, forward and backward, at its speed
and without storing a feature. Its numbers are added to the logits by a column of their own: 1 on
one side, the number on the other.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from performers.backends.tiles import key_tiles, rows_of_a_piece
from performers.typing import FeatureMap, LinearState, LogLinearMap

__all__ = ["attend", "refusal"]

# What stands for −∞ in a logit: the kernel multiplies it, and 0 · ∞ is NaN. Far below any real
# logit.
HIDDEN = -1e30


def refusal(
    query: Tensor,
    key: Tensor,
    phi: FeatureMap,
    *,
    is_causal: bool,
    window_size: int | None,
    has_state: bool,
) -> str | None:
    """Why this backend cannot serve a call; None if it can."""
    if query.device.type != "cpu":
        return "its fused kernel is used on the CPU only"
    if is_causal or window_size is not None:
        return "it serves bidirectional attention without a window only"
    if has_state:
        return "it neither takes nor gives a LinearState"
    if not (isinstance(phi, LogLinearMap) and phi.is_softmax and phi.is_nonnegative):
        return "it needs positive features of the softmax kernel"
    if query.numel() == 0 or key.numel() == 0:  # which would stop the process
        return "its fused kernel needs at least one query and one key"
    return None


def attend(
    query: Float[Tensor, "batch key_heads group query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    phi: LogLinearMap,
    *,
    root: float,
    key_mask: Bool[Tensor, "batch key_length"] | None,
    is_causal: bool,
    normalize: bool,
    window_size: int | None,
    state: LinearState,
) -> tuple[Float[Tensor, "batch key_heads group query_length value_dim"], LinearState]:
    """What `reference.attend` computes, up to rounding. The state, empty and unused, comes back."""
    assert not is_causal, "`refusal` lets only bidirectional calls in"
    assert window_size is None, "`refusal` lets no window in"
    # float16 cannot hold exponents, and bfloat16 would round ω: the kernel works in float32
    wide = torch.promote_types(query.dtype, torch.float32)
    rows = rows_of_a_piece(key, wide)

    parts, log_sums = [], []
    for part, values, mask in key_tiles(rows, key, value, key_mask):
        keys = phi.log_linear_keys(part.to(wide) * root)
        bias = keys.log_rows
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, :, None], HIDDEN)
        directions = keys.directions.expand(*key.shape[:2], -1, -1)
        found, log_sum = _FusedSoftmax.apply(directions, keys.inputs, bias, values.to(wide))
        parts.append(found)
        log_sums.append(log_sum)
    log_sum = torch.stack(log_sums).logsumexp(dim=0)
    shares = (torch.stack(log_sums) - log_sum).exp().unsqueeze(-1)
    found = sum(part * share for part, share in zip(parts, shares, strict=True))

    outputs = []
    for part in query.flatten(2, 3).split(rows, dim=2):
        queries = phi.log_linear_queries(part.to(wide) * root)
        bias = sum((t for t in (keys.tilt, queries.tilt) if t is not None), log_sum).unsqueeze(-1)
        directions = queries.directions.expand(*key.shape[:2], -1, -1)
        out, log_weight = _FusedSoftmax.apply(queries.inputs, directions, bias, found)
        if not normalize:
            out = out * (log_weight.unsqueeze(-1) + queries.log_rows).exp()
        outputs.append(out)
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
    if key_mask is not None:
        out = out * key_mask.any(dim=1)[:, None, None, None]
    return out.unflatten(2, query.shape[2:4]), state


class _FusedSoftmax(torch.autograd.Function):
    """softmax_j(q_i·k_j + bias_j) v_j and the log-sum-exp of its logits, both differentiable, by
    PyTorch's fused CPU kernel.

        query                                      key                      bias
        [batch, heads, query_length, dim]          [·, ·, key_length, dim]  [·, ·, key_length, 1]
        value [·, ·, key_length, value_dim]

    The kernel's backward knows no gradient of the log-sum-exp. That gradient, g_i, adds g_i P_ij to
    the gradient of the logits P_ij (dO_i·v_j − dO_i·O_i), so it may as well be taken from dO_i·O_i:
    in a last column of V, which is 0, O is set to 1 and dO to −g.

    Columns are added in both passes, and not kept between them.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, bias: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = kernel(*_widened(query, key, bias, value), scale=1.0)
        ctx.save_for_backward(query, key, bias, value, out, log_sum)
        return out[..., : value.shape[-1]], log_sum

    @staticmethod
    def backward(
        ctx: Any, out_gradient: Tensor, log_sum_gradient: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        query, key, bias, value, out, log_sum = ctx.saved_tensors
        dim, value_dim = key.shape[-1], value.shape[-1]
        out = out.clone()
        out[..., -1] = 1
        out_gradient = F.pad(out_gradient, (0, out.shape[-1] - value_dim))
        out_gradient[..., -1] = -log_sum_gradient
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        of_query, of_key, of_value = kernel(
            out_gradient, *_widened(query, key, bias, value), out, log_sum, 0.0, False, scale=1.0
        )
        of_bias = of_key[..., dim : dim + 1]
        return of_query[..., :dim], of_key[..., :dim], of_bias, of_value[..., :value_dim]


def _widened(query: Tensor, key: Tensor, bias: Tensor, value: Tensor) -> list[Tensor]:
    """Queries, keys and values of one width, which the kernel wants, with room for the bias.

    The last column of the values is 0.
    """
    width = max(key.shape[-1], value.shape[-1]) + 1
    wide = [torch.cat([query, torch.ones_like(query[..., :1])], dim=-1)]
    wide += [torch.cat([key, bias], dim=-1), value]
    return [F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in wide]
