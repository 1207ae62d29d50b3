"""The affine maps of sharp features: one pass over queries, or keys, and one over their gradients.

    y      = (x − shift / root) matrix            number = (root · x − shift)·linear
    dx     = dy matrixᵀ + dnumber · root · linear

Statistics, which the maps are made of, are constants.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from performers.backends.derivatives import refuse_second_derivative
from performers.backends.triton.config import OPERANDS, cdiv, halves, width
from performers.backends.triton.maps import for_heads
from performers.backends.triton.tiles import load_rows, product_options, store_rows
from performers.typing import LogLinearSide

__all__ = ["mapped"]

ROWS = 64


def mapped(
    side: LogLinearSide, x: Float[Tensor, "batch heads length dim"], root: float
) -> tuple[Float[Tensor, "batch heads length dim"], Float[Tensor, "batch heads length"] | None]:
    """y / root of root · x, in the dtype of x, and (root · x − shift)·linear; None for 0.

    With −‖root · y‖²/2 the latter is what all features of a row share, less the constant. The
    kernels compute the former, rounding included.
    """
    if side.shift is None and side.matrix is None and side.linear is None:
        return x, None
    batch, heads, _, dim = x.shape
    like = torch.zeros(1, dim, dtype=torch.float32, device=x.device)
    shift = like if side.shift is None else side.shift.to(torch.float32)
    linear = like if side.linear is None else side.linear.to(torch.float32)
    identity = torch.eye(dim, dtype=torch.float32, device=x.device)
    matrix = identity if side.matrix is None else side.matrix.to(torch.float32)
    parts = (
        matrix,
        -(shift / root) @ matrix,
        root * linear,
        -(shift * linear).sum(dim=-1, keepdim=True),
    )
    y, number = _affine(x, *(for_heads(part.detach(), batch, heads).contiguous() for part in parts))
    return y, None if side.linear is None else number


@triton.jit
@no_type_check
def transform(
    x, high, low, offset, linear, constant, out, numbers, x_batch, x_head, x_row,
    heads, length, dim, OFFSETS: tl.constexpr, LINEARS: tl.constexpr, MATRICES: tl.constexpr,
    IS_GRADIENT: tl.constexpr, OPERAND: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """y and numbers of a tile of one head, or of their gradients that of x.

    OFFSETS, LINEARS, MATRICES: whether heads have their own.
    """
    start = tl.program_id(0) * ROWS
    index = tl.program_id(1).to(tl.int64)
    position = start + tl.arange(0, ROWS)
    columns = tl.arange(0, DIM)
    x += index // heads * x_batch + index % heads * x_head
    tile = load_rows(x, x_row, start, length, dim, ROWS, DIM)
    matrix = index * MATRICES * dim * dim
    product = tl.dot(
        tile.to(OPERAND), load_rows(high + matrix, dim, 0, dim, dim, DIM, DIM),
        input_precision=PRECISION,
    )  # fmt: skip
    if SPLIT:
        rest = load_rows(low + matrix, dim, 0, dim, dim, DIM, DIM)
        product = tl.dot(tile.to(OPERAND), rest, product, input_precision=PRECISION)
    along = tl.load(linear + index * LINEARS * dim + columns, mask=columns < dim, other=0.0)
    numbers += index * length + position
    if IS_GRADIENT:
        number = tl.load(numbers, mask=position < length, other=0.0)
        product += number[:, None] * along[None, :]
    else:
        moved = tl.load(offset + index * OFFSETS * dim + columns, mask=columns < dim, other=0.0)
        product += moved[None, :]
        number = tl.sum(tile.to(tl.float32) * along[None, :], axis=1)
        number += tl.load(constant + index * LINEARS)
        tl.store(numbers, number, mask=position < length)
    store_rows(out + index * length * dim, dim, product, start, length, dim, ROWS, DIM)


@torch.library.custom_op(
    "performers::triton_affine",
    mutates_args=(),
    schema="(Tensor x, Tensor matrix, Tensor offset, Tensor linear, Tensor constant) "
    "-> (Tensor, Tensor)",
)
def _affine(
    x: Tensor, matrix: Tensor, offset: Tensor, linear: Tensor, constant: Tensor
) -> tuple[Tensor, Tensor]:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    numbers = torch.empty(x.shape[:3], dtype=torch.float32, device=x.device)
    _launch(x, matrix, offset, linear, constant, out, numbers, is_gradient=False)
    return out, numbers


@_affine.register_fake
def _(x: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "performers::triton_affine_backward",
    mutates_args=(),
    schema="(Tensor d_out, Tensor d_numbers, Tensor matrix, Tensor linear) -> Tensor",
)
def _affine_backward(d_out: Tensor, d_numbers: Tensor, matrix: Tensor, linear: Tensor) -> Tensor:
    gradient = torch.empty(d_out.shape, dtype=d_out.dtype, device=d_out.device)
    turned, numbers = matrix.mT.contiguous(), d_numbers.contiguous()
    _launch(d_out, turned, linear, linear, linear, gradient, numbers, is_gradient=True)
    return gradient


@_affine_backward.register_fake
def _(d_out: Tensor, *_: Tensor) -> Tensor:
    return d_out.new_empty(d_out.shape)


def _launch(
    x: Tensor,
    matrix: Tensor,
    offset: Tensor,
    linear: Tensor,
    constant: Tensor,
    out: Tensor,
    numbers: Tensor,
    is_gradient: bool,
) -> None:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, length, dim = x.shape
    high, low = halves(matrix, OPERANDS[x.dtype].dtype)
    transform[cdiv(length, ROWS), batch * heads](
        x, high, low, offset, linear, constant, out, numbers, *x.stride()[:3],
        heads, length, dim, OFFSETS=int(len(offset) > 1), LINEARS=int(len(linear) > 1),
        MATRICES=int(len(matrix) > 1), IS_GRADIENT=is_gradient,
        ROWS=ROWS, DIM=width(dim), num_warps=4 if dim <= 128 else 8, num_stages=1,
        **product_options(x.dtype),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    _, matrix, _, linear, _ = inputs
    ctx.save_for_backward(matrix, linear)


def _differentiate(ctx: Any, d_out: Tensor, d_numbers: Tensor) -> tuple[Tensor | None, ...]:
    return _affine_backward(d_out, d_numbers, *ctx.saved_tensors), None, None, None, None


_affine.register_autograd(_differentiate, setup_context=_save)
_affine_backward.register_autograd(refuse_second_derivative("the Triton backend"))
