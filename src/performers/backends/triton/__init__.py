"""Fused kernels for NVIDIA GPUs, written in Triton: features never reach the GPU's memory.

Triton is imported when a call first comes here. On a CPU the kernels run in Triton's interpreter,
slowly, to be checked: with the variable TRITON_INTERPRET=1 set before Python starts.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.backends.call import Call
from performers.backends.derivatives import is_transformed
from performers.backends.near import attend as attend_near
from performers.backends.triton.config import MAX_DIM, MAX_HEADS, OPERANDS
from performers.backends.triton.maps import SUPPORTED, KernelMap, kernel_map
from performers.state import LinearState

__all__ = ["attend", "is_proven", "refusal"]

IS_INSTALLED = importlib.util.find_spec("triton") is not None
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def refusal(call: Call, query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Why this backend cannot serve a call; None if it can."""
    if not IS_INSTALLED:
        return "Triton is not installed (pip install 'performers[triton]')"
    if query.device.type != "cuda" and not IS_INTERPRETED:
        return "it needs a GPU (on a CPU, set TRITON_INTERPRET=1 to check the kernels, slowly)"
    dim = max(query.shape[-1], value.shape[-1])
    if query.device.type == "cuda":
        capability = _capability(query.device)
        if capability < (8, 0):
            return "it needs a GPU of compute capability 8.0 or more (sm_80)"
        if capability < (9, 0) and query.dtype == torch.bfloat16 and dim > 128:
            return "in bfloat16 a GPU before sm_90 has too little shared memory for dims above 128"
    if is_transformed():
        return "it has a first derivative only, by backward(), and no rule for torch.func"
    plan = kernel_map(call.phi, query)
    if plan is None and (call.near is None or call.near.far):
        return f"it computes {SUPPORTED}, and {type(call.phi).__name__} is none of these"
    if call.near is not None and call.near.num_heavy:
        return "its kernels score keys near a block and sinks, and no others one by one (num_heavy)"
    if call.far_limit is not None:
        return "its kernels keep near and far keys in one sum, and far_limit needs two"
    if query.dtype not in OPERANDS:
        return f"it takes float32, bfloat16 and float16, not {query.dtype}"
    if dim > MAX_DIM:
        return f"it takes head dims up to {MAX_DIM}, not {dim}"
    heads = query.shape[0] * query.shape[1]
    if heads > MAX_HEADS:
        return f"it takes up to {MAX_HEADS} heads of all sequences together, not {heads}"
    if plan is not None and torch.is_grad_enabled() and _is_learned(plan):
        return "it has no gradient of omega, nor of what else a feature map is made of"
    if not (query.numel() and key.numel() and value.numel()):
        return "it needs at least one query, one key and one column of values"
    return None


def is_proven(device: torch.device) -> bool:
    """Whether the tests of the kernels have run on such a GPU: an H200 it was, of sm_90."""
    return device.type == "cuda" and _capability(device)[0] == 9


def _is_learned(plan: KernelMap) -> bool:
    parts = (*plan.query, *plan.key)
    return any(isinstance(part, Tensor) and part.requires_grad for part in parts)


def attend(
    call: Call,
    query: Float[Tensor, "batch key_heads group query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    key_mask: Bool[Tensor, "batch key_length"] | None,
    state: LinearState,
) -> tuple[Float[Tensor, "batch key_heads group query_length value_dim"], LinearState]:
    """What `reference.attend` computes, up to rounding, and the state after it."""
    if call.near is not None:
        from performers.backends.triton.near import block_attention

        return attend_near(call, query, key, value, key_mask, state, operator=block_attention)
    plan = kernel_map(call.phi, query)
    assert plan is not None, "`refusal` lets only its own feature maps in"
    from performers.backends.triton.attention import contract

    return contract(call, plan, query, key, value, key_mask, state)
