"""Softmax attention of many short rows that says its normalizers, for others to merge with.

On a CPU, PyTorch's own fused kernel does the work, forward and backward. It is that of
`F.scaled_dot_product_attention`, which keeps the normalizers to itself. Elsewhere it is a formula.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["attend", "attend_back"]


def attend(
    query: Float[Tensor, "problems rows width"],
    key: Float[Tensor, "problems keys width"],
    value: Float[Tensor, "problems keys width"],
    mask: Float[Tensor, "#problems rows keys"] | None = None,
) -> tuple[Float[Tensor, "problems rows width"], Float[Tensor, "problems rows"]]:
    """softmax(query·keyᵀ + mask) value, and the logarithms of what it divided by.

    A row must see a key. Any strides will do, 0 and those of rows that overlap included.
    """
    if query.device.type != "cpu":
        return _attend(query, key, value, mask)
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.unsqueeze(1) for x in (query, key, value)), attn_mask=_of_heads(mask, query), scale=1.0
    )
    return out.squeeze(1), log_sum.squeeze(1)


def attend_back(
    of_out: Float[Tensor, "problems rows width"],
    query: Float[Tensor, "problems rows width"],
    key: Float[Tensor, "problems keys width"],
    value: Float[Tensor, "problems keys width"],
    mask: Float[Tensor, "#problems rows keys"] | None,
    out: Float[Tensor, "problems rows width"],
    log_sum: Float[Tensor, "problems rows"],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value.

    That of a logit is w (of_out·value − of_out·out), w = e^(logit − log_sum) its weight. Whoever
    wants other weights, or to take another number from all logits of a row, says so by another
    `log_sum` or `out`.
    """
    if query.device.type != "cpu":
        return _attend_back(of_out, query, key, value, mask, out, log_sum)
    tensors = (x.unsqueeze(1) for x in (of_out, query, key, value, out, log_sum))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, 0.0, False, attn_mask=_of_heads(mask, query), scale=1.0
    )
    of_query, of_key, of_value = (x.squeeze(1) for x in found)
    return of_query, of_key, of_value


def _of_heads(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(len(query), -1, -1).unsqueeze(1)


def _logits(query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor:
    return query @ key.mT if mask is None else query @ key.mT + mask


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits = _logits(query, key, mask)
    log_sum = logits.logsumexp(dim=-1)
    return (logits - log_sum.unsqueeze(-1)).exp_() @ value, log_sum


def _attend_back(
    of_out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
    out: Tensor, log_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # ≤ 0, but for the rounding of very large logits
    weights = (_logits(query, key, mask) - log_sum.unsqueeze(-1)).clamp_(max=0).exp_()
    of_logits = of_out @ value.mT - (of_out * out).sum(dim=-1, keepdim=True)
    of_logits *= weights
    return of_logits @ key, of_logits.mT @ query, weights.mT @ of_out
