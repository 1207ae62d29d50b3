"""Softmax attention of many short rows that says its normalizers, for others to merge with.

On a CPU, PyTorch's own fused kernel does the work, forward and backward; `F.scaled_dot_product_attention`
is the same kernel, and keeps the normalizers to itself. Elsewhere it is a formula.
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
        logits = query @ key.mT if mask is None else query @ key.mT + mask
        log_sum = logits.logsumexp(dim=-1)
        return (logits - log_sum.unsqueeze(-1)).exp_() @ value, log_sum
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.unsqueeze(1) for x in (query, key, value)), attn_mask=_of_heads(mask, query), scale=1.0
    )
    return out.squeeze(1), log_sum.squeeze(1)


def attend_back(
    of_out: Float[Tensor, "problems rows width"],
    query: Float[Tensor, "problems rows width"],
    key: Float[Tensor, "problems keys width"],
    value: Float[Tensor, "problems keys width"],
    out: Float[Tensor, "problems rows width"],
    log_sum: Float[Tensor, "problems rows"],
    mask: Float[Tensor, "#problems rows keys"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value.

    That of a logit is w (of_out·value − of_out·out), w its weight: whoever wants to take another
    number than of_out·out from all logits of a row says so by another `out`.
    """
    if query.device.type != "cpu":
        logits = query @ key.mT if mask is None else query @ key.mT + mask
        weights = (logits - log_sum.unsqueeze(-1)).clamp_(max=0).exp_()
        of_logits = of_out @ value.mT - (of_out * out).sum(dim=-1, keepdim=True)
        of_logits *= weights
        return of_logits @ key, of_logits.mT @ query, weights.mT @ of_out
    tensors = (x.unsqueeze(1) for x in (of_out, query, key, value, out, log_sum))
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *tensors, 0.0, False, attn_mask=_of_heads(mask, query), scale=1.0
    )
    of_query, of_key, of_value = (x.squeeze(1) for x in found)
    return of_query, of_key, of_value


def _of_heads(mask: Tensor | None, query: Tensor) -> Tensor | None:
    return None if mask is None else mask.expand(len(query), -1, -1).unsqueeze(1)
