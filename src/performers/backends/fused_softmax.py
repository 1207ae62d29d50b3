"""Softmax attention with numbers added to its logits, a tile at a time, differentiated by hand.

    out_i = Σ_j w_ij v_j      w_ij = 2^(t_ij − lse_i)      lse_i = log₂ Σ_j 2^t_ij
    t_ij  = q_i·k_j + bias_j − curvature ‖k_j‖²

Base 2, because exp2 costs a CPU a quarter of what exp does. A tile of weights stays in the cache,
and none is kept: the backward pass computes them again.

What is added to the products q_i·k_j goes through the matrix product, in columns of its own:

    [q  1  −shift] · [k  number  1] = t − shift

A product in bfloat16 is summed in float32 and rounded in the end. So what is rounded is t − shift,
which is small where the weight is large. The shift has to be near the largest logit of its row, but
need not be exactly that. It is guessed from some of the keys, and raised where the sum of the
weights shows that the guess was far too low.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from performers.backends.buffers import CAPABILITIES, buffers, slices
from performers.backends.derivatives import is_differentiated, needs_formula, plain_gradients

__all__ = ["HAS_BFLOAT16", "HIDDEN", "fused_softmax"]

# What stands for −∞ in a logit, since 0 · ∞ is NaN. A power of 2, which bfloat16 holds exactly, and
# below every logit that is not about to overflow: it must not be taken for one of those.
HIDDEN = -(2.0**125)

HEADS = 8  # in one matrix product; more where all weights of more fit into a tile
SHORT_SIDE = 1024  # as many queries, or keys, are not split

HAS_BFLOAT16 = any(CAPABILITIES.get(name) for name in ("avx512_bf16", "amx_bf16"))

# Of a tile of weights. Twice the second-level cache, but assign what suits your processor.
TILE_BYTES = 2 * (CAPABILITIES.get("l2_cache_size") or 2**20)
SAMPLE = 32  # keys that a shift is guessed from
MARGIN = 4.0  # by which the largest of all logits is taken to exceed that of the sample

# How large a row's sum of weights may become. A weight 2^x in bfloat16 is off by up to x / 360 of
# itself; in float32 it must not overflow.
MAX_SUM = {torch.bfloat16: 2.0**12, torch.float32: 2.0**60, torch.float64: 2.0**60}


def fused_softmax(
    query: Float[Tensor, "batch heads rows dim"],
    key: Float[Tensor, "batch heads keys dim"],
    bias: Float[Tensor, "batch heads keys 1"],
    value: Float[Tensor, "batch heads keys value_dim"],
    curvature: float = 0.0,
) -> tuple[Float[Tensor, "batch heads rows value_dim"], Float[Tensor, "batch heads rows 1"]]:
    """out, in the precision of `query`, and lse, in that of `bias`; both differentiable.

    Products are in bfloat16 where query or key is, with sums, shifts and numbers in float32.
    """
    operator = _plain if needs_formula() else _fused_softmax
    flat_query, flat_key, flat_bias, flat_value = (
        x.flatten(0, 1) for x in (query, key, bias, value)
    )
    out, log_sum = operator(flat_query, flat_key, flat_bias, flat_value, curvature)
    return out.unflatten(0, query.shape[:2]), log_sum.unflatten(0, query.shape[:2])


# In what follows: heads = batch · heads.


def _number_parts(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """A number per row: in bfloat16 as three columns, which hold all bits of a float32."""
    parts = [x.to(dtype)]
    while len(parts) < _columns(dtype):
        # Each further part holds the rounding error of those before it.
        x = x - parts[-1]
        parts.append(x.to(dtype))
    return parts


def _columns(dtype: torch.dtype) -> int:
    return 3 if dtype == torch.bfloat16 else 1


def _ones(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What the columns of a number meet on the other side."""
    return x.new_ones(*x.shape[:-1], _columns(dtype), dtype=dtype)


class _Keys(NamedTuple):
    """A tile of keys, as columns of a product and as what those were made of."""

    tile: slice
    columns: Float[Tensor, "heads keys wider"]
    key: Float[Tensor, "heads keys dim"]
    number: Float[Tensor, "heads keys 1"]
    value: Float[Tensor, "heads keys value_dim"]


class _Product:
    """Logits of some heads, a tile at a time."""

    def __init__(
        self, query: Tensor, key: Tensor, bias: Tensor, value: Tensor, curvature: float
    ) -> None:
        self.dtype = query.dtype if query.dtype == torch.bfloat16 else key.dtype
        self.query, self.key, self.bias, self.value = query, key, bias, value
        self.curvature = curvature
        sizes = _tile_sizes(len(query), query.shape[1], key.shape[1], self.dtype)
        self.row_tile, self.key_tile = sizes
        of_head = query.shape[1] * key.shape[1] * self.dtype.itemsize
        self.at_once = max(HEADS, TILE_BYTES // of_head)

    def heads(self) -> Iterator[tuple[slice, list[_Keys] | None]]:
        """Groups of heads, with their keys where those are one tile."""
        for heads in slices(len(self.query), self.at_once):
            yield heads, list(self.keys(heads)) if self.key.shape[1] <= self.key_tile else None

    def keys(self, heads: slice) -> Iterator[_Keys]:
        for tile in slices(self.key.shape[1], self.key_tile):
            key, number = self.key[heads, tile], self.bias[heads, tile]
            if self.curvature:
                square = buffers.copied("wide", key, number).square_()
                square = square.sum(dim=-1, keepdim=True)
                number = number - self.curvature * square
            numbers = [*_number_parts(number, self.dtype), _ones(key, self.dtype)]
            # [k number 1], the right factor of [q 1 −shift] · [k number 1].
            columns = buffers.joined("keys", [key.to(self.dtype), *numbers])
            yield _Keys(tile, columns, key, number, self.value[heads, tile].to(self.dtype))

    def query_columns(self, query: Tensor, shift: Tensor) -> Tensor:
        numbers = [_ones(query, self.dtype), *_number_parts(-shift, self.dtype)]
        return buffers.joined("queries", [query.to(self.dtype), *numbers])

    def logits(self, query_columns: Tensor, keys: _Keys) -> Tensor:
        """t − shift."""
        return buffers.product("logits", query_columns, keys.columns.mT)

    def guess(self, query: Tensor, keys: _Keys) -> Tensor:
        """About the largest logit of each row: that of some keys, and MARGIN for the others."""
        stride = max(1, keys.key.shape[1] // SAMPLE)
        key, number = keys.key[:, ::stride], keys.number[:, ::stride]
        logits = query.to(self.dtype) @ key.to(self.dtype).mT + number.mT
        return logits.amax(dim=-1, keepdim=True) + (MARGIN if stride > 1 else 0.0)

    def weights(self, query_columns: Tensor, keys: _Keys) -> tuple[Tensor, Tensor]:
        """2^(t − shift), and its sum over the keys."""
        weights = self.logits(query_columns, keys).exp2_()
        return weights, weights.sum(dim=-1, keepdim=True).to(keys.number.dtype)

    def attend(self, query: Tensor, tiles: Iterable[_Keys]) -> tuple[Tensor, Tensor]:
        """out and lse of a tile of queries."""
        shift = query.new_full((*query.shape[:2], 1), -torch.inf, dtype=self.bias.dtype)
        sums = totals = torch.zeros_like(shift)
        for index, keys in enumerate(tiles):
            old = shift
            if index == 0:
                shift = self.guess(query, keys)
                columns = self.query_columns(query, shift)
            weights, total = self.weights(columns, keys)
            if self.is_off(total, has_moved=shift > old):
                # Once something has been summed, the shift of a row moves up only.
                shift = torch.maximum(self.better(shift, total, query, keys), old)
                columns = self.query_columns(query, shift)
                weights, total = self.weights(columns, keys)
                if self.is_off(total, has_moved=shift > old):
                    # numbers so large that rounding hides the shift: the rest by subtraction
                    logits = self.logits(columns, keys)
                    rest = torch.maximum(logits.amax(dim=-1, keepdim=True), old - shift)
                    weights, shift = logits.sub_(rest).exp2_(), shift + rest
                    total = weights.sum(dim=-1, keepdim=True).to(shift.dtype)
                    columns = self.query_columns(query, shift)
                if index > 0:
                    # What earlier tiles summed is brought to the new shift, as in an online
                    # softmax.
                    decay = (old - shift).exp2()
                    sums, totals = sums.mul_(decay), totals * decay
            found = buffers.product("found", weights, keys.value)
            sums = sums.add_(found) if index > 0 else buffers.copied("sums", found, shift)
            totals = totals + total
        return sums.div_(totals), shift + totals.log2()

    def is_off(self, total: Tensor, has_moved: Tensor) -> bool:
        """Whether the shift is far from the largest logit of some row, given its sum of weights.

        The sum of a tile may be small where the shift is that of an earlier key.
        """
        most = MAX_SUM[self.dtype]
        return bool(((total > most) | (has_moved & (total < 1 / most))).any())

    def better(self, shift: Tensor, total: Tensor, query: Tensor, keys: _Keys) -> Tensor:
        """A shift near the largest logit of each row, given the sum of weights under another."""
        better = shift + total.log2()
        if not better.isfinite().all():  # so far off that nothing can be told from the sum
            wide = (x.to(shift.dtype) for x in (query, keys.key.mT))
            largest = torch.baddbmm(keys.number.mT, *wide).amax(dim=-1, keepdim=True)
            better = better.where(better.isfinite(), largest)
        return better


def _tile_sizes(heads: int, rows: int, keys: int, dtype: torch.dtype) -> tuple[int, int]:
    """Queries and keys of a tile: the shorter side whole, of the longer what TILE_BYTES hold."""
    short = min(rows, keys, SHORT_SIDE)
    longer = TILE_BYTES // (min(heads, HEADS) * short * dtype.itemsize)
    longer = max(64, longer // 64 * 64)
    return (longer, short) if rows > keys else (short, longer)


def _plain(
    query: Tensor, key: Tensor, bias: Tensor, value: Tensor, curvature: float
) -> tuple[Tensor, Tensor]:
    """The operator as a formula, all weights at once."""
    dtype = bias.dtype
    key, number = key.to(dtype), bias
    if curvature:
        square = key.square().sum(dim=-1, keepdim=True)
        number = bias - curvature * square
    logits = query.to(dtype) @ key.mT + number.mT
    log_sum = (logits * math.log(2)).logsumexp(dim=-1, keepdim=True) / math.log(2)
    weights = (logits - log_sum).exp2()
    return (weights @ value.to(dtype)).to(query.dtype), log_sum


def _add(whole: Tensor, part: Tensor, is_first: bool) -> None:
    if is_first:
        whole.copy_(part)
    else:
        whole.add_(part)


@torch.library.custom_op(
    "performers::fused_softmax",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor bias, Tensor value, float curvature) "
    "-> (Tensor, Tensor)",
)
def _fused_softmax(
    query: Tensor, key: Tensor, bias: Tensor, value: Tensor, curvature: float
) -> tuple[Tensor, Tensor]:
    product = _Product(query, key, bias, value, curvature)
    out = query.new_empty(*query.shape[:2], value.shape[-1])
    log_sum = bias.new_empty(*query.shape[:2], 1)
    for heads, tiles in product.heads():
        for rows in slices(query.shape[1], product.row_tile):
            found = product.attend(query[heads, rows], tiles or product.keys(heads))
            out[heads, rows], log_sum[heads, rows] = found
    return out, log_sum


@_fused_softmax.register_fake
def _(
    query: Tensor, key: Tensor, bias: Tensor, value: Tensor, curvature: float
) -> tuple[Tensor, Tensor]:
    shape = query.shape[:2]
    return query.new_empty(*shape, value.shape[-1]), bias.new_empty(*shape, 1)


@torch.library.custom_op(
    "performers::fused_softmax_backward",
    mutates_args=(),
    schema="(Tensor out_gradient, Tensor log_sum_gradient, Tensor query, Tensor key, Tensor bias, "
    "Tensor value, Tensor out, Tensor log_sum, float curvature, bool with_query, bool with_key) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _fused_softmax_backward(
    out_gradient: Tensor,
    log_sum_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    curvature: float,
    with_query: bool,
    with_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, bias and value; the first two are empty unless asked for.

    That of t_ij is w_ij (ln 2 (dO_i·v_j − dO_i·O_i) + dlse_i).
    """
    product = _Product(query, key, bias, value, curvature)
    dtype = product.dtype
    query_gradient = torch.empty_like(query) if with_query else query.new_empty(0)
    key_gradient = torch.empty_like(key) if with_key else key.new_empty(0)
    bias_gradient, value_gradient = torch.empty_like(bias), torch.empty_like(value)
    for heads, tiles in product.heads():
        for rows in slices(query.shape[1], product.row_tile):
            queries, gradient = query[heads, rows], out_gradient[heads, rows]
            # With lse as the shift, 2^(t − shift) is the normalized weight w_ij itself.
            query_columns = product.query_columns(queries, log_sum[heads, rows])
            wide = buffers.copied("wide", gradient, bias).mul_(math.log(2))
            scaled = wide.to(dtype, copy=True)  # before the buffer serves for the products with O
            # `wide` already has the factor ln 2.
            along_out = wide.mul_(out[heads, rows]).sum(dim=-1, keepdim=True)
            numbers = _number_parts(log_sum_gradient[heads, rows] - along_out, dtype)
            # [ln 2 dO, dlse − ln 2 dO·O] · [V 1]: the gradient of t_ij but for the factor w_ij, in
            # one product.
            gradient_columns = buffers.joined("gradients", [scaled, *numbers])
            queries, gradient = queries.to(dtype), gradient.to(dtype)
            for keys in tiles or product.keys(heads):
                tile, is_first = keys.tile, rows.start == 0
                # ≤ 0, but for the rounding of very large numbers
                weights = product.logits(query_columns, keys).clamp_(max=0).exp2_()
                part = buffers.product("of value", weights.mT, gradient)
                _add(value_gradient[heads, tile], part, is_first)

                value_columns = buffers.joined("values", [keys.value, _ones(keys.value, dtype)])
                of_logits = buffers.product("logits gradient", gradient_columns, value_columns.mT)
                of_logits *= weights
                # Every query adds the bias of a key to its logit, so the gradient is a sum over
                # queries.
                of_bias = of_logits.sum(dim=1).unsqueeze(-1)
                _add(bias_gradient[heads, tile], of_bias, is_first)
                if with_key:
                    part = buffers.product("of key", of_logits.mT, queries)
                    if curvature:
                        # The derivative of −curvature ‖k‖² is −2 curvature k.
                        part.addcmul_(of_bias, keys.key, value=-2 * curvature)
                    _add(key_gradient[heads, tile], part, is_first)
                if with_query:
                    part = buffers.product("of query", of_logits, keys.key.to(dtype))
                    _add(query_gradient[heads, rows], part, tile.start == 0)
    return query_gradient, key_gradient, bias_gradient, value_gradient


@_fused_softmax_backward.register_fake
def _(
    out_gradient: Tensor,
    log_sum_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    bias: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    curvature: float,
    with_query: bool,
    with_key: bool,
) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(query) if with_query else query.new_empty(0),
        torch.empty_like(key) if with_key else key.new_empty(0),
        torch.empty_like(bias),
        torch.empty_like(value),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.curvature = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(
    ctx: Any, out_gradient: Tensor | None, log_sum_gradient: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing unpacks them a single time
    if is_differentiated():
        arguments, gradients = (*saved[:4], ctx.curvature), (out_gradient, log_sum_gradient)
        return plain_gradients(_plain, arguments, ctx.needs_input_grad, gradients)
    out, log_sum = saved[4:]
    if out_gradient is None:
        out_gradient = torch.zeros_like(out)
    if log_sum_gradient is None:
        log_sum_gradient = torch.zeros_like(log_sum)
    with_query, with_key = ctx.needs_input_grad[:2]
    query, key, bias, value = _fused_softmax_backward(
        out_gradient, log_sum_gradient, *saved, ctx.curvature, with_query, with_key
    )
    return query if with_query else None, key if with_key else None, bias, value, None


_fused_softmax.register_autograd(_differentiate, setup_context=_keep)
