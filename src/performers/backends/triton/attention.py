"""Linear attention by the fused kernels, and its gradients.

    forward    absorb, scan   keys → one state; causal: the state before every chunk
               read           queries → outputs
    backward   absorb, scan   keys → states, as before (causal; else the one state was saved)
               row_products   δ_i = dO_i·O_i
               absorb, scan   queries → states that keys read
               query_gradient, key_gradient

What features of a row share, and the affine maps of sharp features, are made outside by torch.
A call of one token is a decoding step: one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.backends.call import Call
from performers.backends.derivatives import refuse_second_derivative
from performers.backends.triton import decoding, gradients, reading, states
from performers.backends.triton.affine import mapped
from performers.backends.triton.config import (
    OPERANDS,
    Config,
    Tile,
    cdiv,
    config_for,
    halves,
    width,
)
from performers.backends.triton.maps import KernelMap, for_heads
from performers.backends.triton.tiles import product_options
from performers.state import LinearState
from performers.typing import LogLinearSide

__all__ = ["contract"]

PROGRAMS_PER_PROCESSOR = 4  # of a GPU, to hide latency
# A segment of causal attention: longer ones need fewer launches, shorter ones less memory.
SEGMENT_WAVES = 4
MIN_CHUNKS = 16
SCAN_FEATURES = 16
STEP_FEATURES = 16

Sums = tuple[Tensor, Tensor, Tensor]  # frames, normalizers, values: a state as the kernels hold it


def contract(
    call: Call,
    plan: KernelMap,
    query: Float[Tensor, "batch key_heads group query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    key_mask: Bool[Tensor, "batch key_length"] | None,
    state: LinearState,
) -> tuple[Float[Tensor, "batch key_heads group query_length value_dim"], LinearState]:
    """What `reference.attend` computes, up to rounding, and the state after it.

    The kernels leave out the constants of both sides of φ, which cancel in the output; the state
    and the normalizer get them here.
    """
    is_exponential, root = plan.kind == "exp", call.root
    batch, heads, dtype = *key.shape[:2], torch.float32
    visible = torch.ones_like(key[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
    visible = visible[:, None].expand(key.shape[:3])
    rows, keys = query.flatten(2, 3), key
    key_rows = visible.to(dtype)
    if is_exponential:
        rows, query_numbers = mapped(plan.query, rows, root)
        keys, key_numbers = mapped(plan.key, key, root)
        key_rows = key_rows.log()
        key_rows = key_rows if key_numbers is None else key_rows + key_numbers
    directions, tilt = plan.key.directions, plan.key.tilt
    if tilt is None:
        tilt = directions.new_zeros(directions.shape[:-1])
    key_constant = _constant(plan.key)
    if is_exponential:
        first = (state.log_scale - key_constant, state.normalizer, state.values)
    else:
        scale = (state.log_scale - key_constant).exp()
        first = (state.log_scale, state.normalizer * scale, state.values * scale.unsqueeze(-1))
    out, total, frames, normalizers, values = _contraction(
        rows.unflatten(2, query.shape[2:4]).flatten(1, 2),
        keys,
        value,
        for_heads(directions.detach().to(dtype), batch, heads) * root,
        for_heads(tilt.detach().to(dtype).unsqueeze(-2), batch, heads),
        *first,
        key_rows,
        plan.kind,
        plan.epsilon,
        root**2 if is_exponential else 0.0,
        call.is_causal,
    )
    out = out.unflatten(1, query.shape[1:3])
    total = total.unflatten(1, query.shape[1:3]).unsqueeze(-1)
    if not call.normalize:
        constant = _constant(plan.query) + key_constant
        if is_exponential:
            if isinstance(constant, Tensor):
                constant = constant[..., None, None]
            norms = torch.linalg.vector_norm(rows, dim=-1, dtype=dtype)
            of_rows = norms.square() * (-(root**2) / 2)
            of_rows = of_rows if query_numbers is None else of_rows + query_numbers
            of_rows = of_rows.unflatten(2, query.shape[2:4]).unsqueeze(-1)
            out = out * (total + of_rows + constant).exp()
        else:
            out = out * total * math.exp(constant)
    if is_exponential:
        return out, LinearState(frames + key_constant, normalizers, values)
    # the exponent of features without one is 0, that of no feature −∞
    is_empty = (state.log_scale == -math.inf) & ~visible.any(dim=2, keepdim=True)
    frames = torch.zeros_like(state.log_scale).masked_fill(is_empty, -math.inf)
    shrink = math.exp(key_constant)
    return out, LinearState(frames, normalizers * shrink, values * shrink)


def _constant(side: LogLinearSide) -> Float[Tensor, "*heads 1"] | float:
    """As states have their features: in the last dimension."""
    return side.constant if isinstance(side.constant, float) else side.constant.squeeze(-1)


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor omega, Tensor tilt, "
    "Tensor frames, Tensor normalizers, Tensor values, Tensor key_rows"
)
_OPTIONS = "str kind, float epsilon, float norm, bool is_causal"


@torch.library.custom_op(
    "performers::triton_contraction",
    mutates_args=(),
    schema=f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _contraction(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    omega: Tensor,
    tilt: Tensor,
    frames: Tensor,
    normalizers: Tensor,
    values: Tensor,
    key_rows: Tensor,
    kind: str,
    epsilon: float,
    norm: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output, normalizers of its rows, last state; (frames, normalizers, values) is the first
    state.

    The normalizers are logarithms for `kind` "exp". Frames, the running maxima of the exponents as
    in an online softmax, are not differentiated. One operator, so that
    torch.compile(fullgraph=True) need not look inside.
    """
    query, key, value = (_with_dense_rows(x) for x in (query, key, value))
    first = (frames.contiguous(), normalizers.contiguous(), values.contiguous())
    work = Contraction.of(query, value, omega, tilt, first, kind, epsilon, norm, is_causal)
    key_rows = key_rows.contiguous()
    if is_causal and query.shape[2] == 1:
        return _step(work, query, key, value, key_rows, first)
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    total = query.new_empty(query.shape[:3], dtype=torch.float32)
    if not is_causal:
        _, last = _states(work, key, value, key_rows, None, first, _split(work, key))
        _read(work, query, key, value, key_rows, last, None, out, total)
        return out, total, *last
    last = first
    for part in _segments(work, key):
        keys, of_keys = key[:, :, part], key_rows[:, :, part].contiguous()
        before, last, risen = _unfolded(work, keys, value[:, :, part], of_keys, None, last)
        of_rows = total[:, :, part].contiguous()
        _read(
            work, query[:, :, part], keys, value[:, :, part], of_keys, before, risen,
            out[:, :, part], of_rows,
        )  # fmt: skip
        total[:, :, part] = of_rows
    return out, total, *last


@_contraction.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, _: Tensor, __: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    total = query.new_empty(query.shape[:3], dtype=torch.float32)
    return out, total, *(part.new_empty(part.shape) for part in rest[:3])


@torch.library.custom_op(
    "performers::triton_contraction_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor out, Tensor total, "
    "Tensor last_frames, Tensor last_normalizers, Tensor last_values, "
    "Tensor out_gradient, Tensor total_gradient, Tensor normalizer_gradient, "
    f"Tensor values_gradient, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _contraction_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    omega: Tensor,
    tilt: Tensor,
    frames: Tensor,
    normalizers: Tensor,
    values: Tensor,
    key_rows: Tensor,
    out: Tensor,
    total: Tensor,
    last_frames: Tensor,
    last_normalizers: Tensor,
    last_values: Tensor,
    out_gradient: Tensor,
    total_gradient: Tensor,
    normalizer_gradient: Tensor,
    values_gradient: Tensor,
    kind: str,
    epsilon: float,
    norm: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, of the first state's normalizers and values, of key_rows.

    The last is right for `kind` "exp" alone; others have no use for it.
    """
    query, key, value, out_gradient = (
        _with_dense_rows(x) for x in (query, key, value, out_gradient)
    )
    first = (frames.contiguous(), normalizers.contiguous(), values.contiguous())
    work = Contraction.of(query, value, omega, tilt, first, kind, epsilon, norm, is_causal)
    key_rows = key_rows.contiguous()
    shares = row_products(work, out, out_gradient)
    if work.is_exponential:
        shares -= total_gradient
        query_rows = (-total).masked_fill(total == -math.inf, -math.inf)
    else:
        shares -= total_gradient * total
        query_rows = torch.where(total == 0, 0.0, 1 / total)
    # The gradient of the last state is itself a state of queries, which keys read.
    end_frames = (-last_frames).masked_fill(last_frames == -math.inf, -math.inf)
    end = (end_frames, -normalizer_gradient, values_gradient.contiguous())
    whole_rows = Rows(query, key, value, out_gradient, query_rows, key_rows, shares)
    d_query, d_key, d_value, d_key_rows = (
        torch.empty_like(x) for x in (query, key, value, key_rows)
    )
    if is_causal:
        parts = _segments(work, key)
        starts, _ = _states(work, key, value, key_rows, None, first, parts[0].stop)
        whole = end
        for index, part in reversed(list(enumerate(parts))):
            rows = whole_rows.cut(part)
            start = _state_number(index, starts)
            before, _, risen = _unfolded(work, rows.key, rows.value, rows.key_rows, None, start)
            after, whole, _ = _unfolded(
                work, rows.query, rows.out_gradient, rows.query_rows, rows.shares, whole,
                is_reverse=True,
            )  # fmt: skip
            d_key_rows[:, :, part] = _gradients(
                work, rows, before, after, risen,
                d_query[:, :, part], d_key[:, :, part], d_value[:, :, part],
            )  # fmt: skip
    else:
        _, whole = _states(
            work, query, out_gradient, query_rows, shares, end, _split(work, query),
            is_reverse=True,
        )  # fmt: skip
        last = (last_frames, last_normalizers, last_values)
        d_key_rows = _gradients(work, whole_rows, last, whole, None, d_query, d_key, d_value)
    decay = torch.ones_like(frames)
    if work.is_exponential:
        decay = (frames + whole[0]).exp()
    d_values = whole[2] * decay.unsqueeze(-1)
    return d_query, d_key, d_value, -whole[1] * decay, d_values, d_key_rows


@_contraction_backward.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, _: Tensor, __: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    inputs = (torch.empty_like(_with_dense_rows(x)) for x in (query, key, value))
    return *inputs, *(part.new_empty(part.shape) for part in rest[1:4])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:9], inputs[9:]
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    out, total, _, normalizers, values = gradients
    *of_rows, d_normalizers, d_values, d_key_rows = _contraction_backward(
        *ctx.saved_tensors, out, total, normalizers, values, *ctx.options
    )
    return *of_rows, *(None,) * 3, d_normalizers, d_values, d_key_rows, *(None,) * 4


_contraction.register_autograd(_differentiate, setup_context=_save)
_contraction_backward.register_autograd(refuse_second_derivative("the Triton backend"))


@dataclass(frozen=True)
class Contraction:
    """What all kernels of one call share: ω as the matrix units take it, and the sizes of tiles."""

    omega: Tensor  # √scale · ω, float32, [1 or all key heads, num_features, dim]
    high: Tensor
    low: Tensor
    tilt: Tensor
    kind: str
    epsilon: float
    norm: float  # of keys: see `tiles`
    group: int
    is_causal: bool
    dtype: torch.dtype  # of the inputs
    value_dim: int

    @classmethod
    def of(
        cls,
        query: Tensor,
        value: Tensor,
        omega: Tensor,
        tilt: Tensor,
        state: Sums,
        kind: str,
        epsilon: float,
        norm: float,
        is_causal: bool,
    ) -> Contraction:
        omega = omega.contiguous()
        high, low = halves(omega, OPERANDS[query.dtype].dtype)
        return cls(
            omega=omega,
            high=high,
            low=low,
            tilt=tilt.contiguous(),
            kind=kind,
            epsilon=epsilon,
            norm=norm,
            group=query.shape[1] // state[0].shape[1],
            is_causal=is_causal,
            dtype=query.dtype,
            value_dim=value.shape[-1],
        )

    def norm_of(self, are_queries: bool) -> float:
        """Of rows that are summed into a state: that of queries cancels in their outputs."""
        return 0.0 if are_queries else self.norm

    @property
    def is_exponential(self) -> bool:
        return self.kind == "exp"

    @property
    def num_features(self) -> int:
        return self.omega.shape[1]

    @property
    def dim(self) -> int:
        return self.omega.shape[2]

    @cached_property
    def config(self) -> Config:
        return config_for(self.high.dtype, max(self.dim, self.value_dim))

    @property
    def rows(self) -> int:
        """Of a tile; of a chunk of causal attention."""
        return self.config.rows

    def shared(self) -> dict[str, Any]:
        """The compile-time arguments of all kernels that compute features."""
        return {
            "KIND": self.kind,
            "PER_HEAD": int(len(self.omega) > 1),
            "DIM": width(self.dim),
            "VALUE_DIM": width(self.value_dim),
        }

    def scan(
        self,
        each: Sums,
        first: Sums,
        is_reverse: bool,
        skips: bool = False,
        add_to: Sums | None = None,
    ) -> tuple[Sums, Sums]:
        """The sum before every chunk, and that of all; `is_reverse`: after it, from the end.

        `skips`: without the chunk just before. `add_to`: what the former is added to, in place.
        """
        chunks, blocks = each[0].shape[2], cdiv(self.num_features, SCAN_FEATURES)
        before = _empty_states(first, chunks) if add_to is None else add_to
        last = (torch.empty_like(first[0]), torch.empty_like(first[1]), torch.empty_like(first[2]))
        if blocks:
            states.scan[blocks, first[0].shape[0] * first[0].shape[1]](
                *each, *first, *before, *last, chunks, self.num_features, self.value_dim,
                KIND=self.kind, REVERSE=is_reverse, SKIPS=skips, ADDS=add_to is not None,
                FEATURES=SCAN_FEATURES,
                VALUE_DIM=width(self.value_dim),
            )  # fmt: skip
        return before, last

    def options(self, tile: Tile) -> dict[str, Any]:
        """The compile-time arguments of a kernel that multiplies tiles."""
        return {
            **product_options(self.dtype),
            "ROWS": self.rows,
            "FEATURES": tile.features,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
            **self.shared(),
        }

    def launches(self, tile: Tile) -> Iterator[dict[str, Any]]:
        """The compile-time arguments of a kernel's launch, and of the one that repairs tiles."""
        yield {"REPAIRS": False, **self.options(tile)}
        if self.is_causal and self.is_exponential:
            yield {"REPAIRS": True, **self.options(tile._replace(num_stages=1))}


class Rows(NamedTuple):
    """All that the backward pass reads of each position.

    (batch, heads, length, dim) and, in float32, (batch, heads, length): the kernels take any
    strides of the former and none of the latter.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out_gradient: Tensor
    query_rows: Tensor
    key_rows: Tensor
    shares: Tensor

    def cut(self, part: slice) -> Rows:
        cuts = (x[:, :, part] for x in self)
        return Rows(*(x if x.ndim == 4 else x.contiguous() for x in cuts))


def _states(
    work: Contraction,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    shares: Tensor | None,
    first: Sums,
    chunk: int,
    is_reverse: bool = False,
) -> tuple[Sums, Sums]:
    """The state before every chunk of rows x with values y, and that of all.

    `is_reverse`: of queries, with the gradients of outputs as values, after every chunk.
    """
    norm = work.norm_of(is_reverse)
    each = states_of_chunks(work, x, y, rows, shares, first, chunk, norm)
    return work.scan(each, first, is_reverse)


def _unfolded(
    work: Contraction,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    shares: Tensor | None,
    first: Sums,
    is_reverse: bool = False,
) -> tuple[Sums, Sums, Tensor]:
    """As `_states` for chunks of a tile, in the precision of products, by few long runs.

    The last result is the first row of each chunk that products of tiles cannot compute.
    """
    batch, heads, length = x.shape[:3]
    key_heads = first[0].shape[1]
    blocks = cdiv(work.num_features, work.config.absorb.features)
    chunks = cdiv(length, work.rows)
    frames, normalizers, values = _empty_states(first, chunks, work.high.dtype)
    last = (torch.empty_like(first[0]), torch.empty_like(first[1]), torch.empty_like(first[2]))
    risen = torch.full_like(frames[..., 0], work.rows, dtype=torch.int32)
    if not blocks:
        return (frames, normalizers, values), last, risen
    run = cdiv(chunks, _runs(x.device, batch * key_heads * blocks))
    start = first
    if run < chunks:
        start, _ = _states(work, x, y, rows, shares, first, run * work.rows, is_reverse)
    states.unfold[cdiv(chunks, run), blocks, batch * key_heads](
        x, y, rows, rows if shares is None else shares, work.high, work.low, work.tilt,
        *start, frames, normalizers, values, *last, risen,
        *x.stride()[:3], *y.stride()[:3], heads, heads // key_heads,
        length, run, work.num_features, work.dim, work.value_dim, work.epsilon,
        work.norm_of(is_reverse), REVERSE=is_reverse, HAS_SHARES=shares is not None,
        **work.options(work.config.absorb),
    )  # fmt: skip
    return (frames, normalizers, values), last, risen


def states_of_chunks(
    work: Contraction,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    shares: Tensor | None,
    like: Sums,
    chunk: int,
    norm: float,
) -> Sums:
    """The state of every chunk of rows x with values y, [batch, key_heads, chunks, …] each."""
    batch, heads, length = x.shape[:3]
    key_heads = like[0].shape[1]
    blocks = cdiv(work.num_features, work.config.absorb.features)
    chunks = cdiv(length, chunk)
    each = _empty_states(like, chunks)
    if not blocks:
        return each
    states.absorb[chunks, blocks, batch * key_heads](
        x, y, rows, rows if shares is None else shares, work.high, work.low, work.tilt, *each,
        *x.stride()[:3], *y.stride()[:3], heads, heads // key_heads,
        length, chunk, work.num_features, work.dim, work.value_dim, work.epsilon, norm,
        HAS_SHARES=shares is not None, **work.options(work.config.absorb),
    )  # fmt: skip
    return each


def _read(
    work: Contraction,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_rows: Tensor,
    read_from: Sums,
    risen: Tensor | None,
    out: Tensor,
    total: Tensor,
) -> None:
    batch, heads, length = query.shape[:3]
    chunks = cdiv(length, work.rows)
    for launch in work.launches(work.config.read):
        reading.read[chunks, batch * heads](
            query, key, value, key_rows, work.high, work.low, work.tilt, *read_from, out, total,
            key_rows if risen is None else risen,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
            heads, work.group, length, chunks, work.num_features, work.dim, work.value_dim,
            work.epsilon, work.norm, IS_CAUSAL=work.is_causal, **launch,
        )  # fmt: skip


def _gradients(
    work: Contraction,
    rows: Rows,
    before: Sums,
    later: Sums,
    risen: Tensor | None,
    d_query: Tensor,
    d_key: Tensor,
    d_value: Tensor,
) -> Tensor:
    """Write the gradients of a part of the rows; that of key_rows is returned."""
    batch, heads, query_length = rows.query.shape[:3]
    key_heads, key_length = rows.key.shape[1:3]
    strides = [s for x in rows[:4] for s in x.stride()[:3]]
    sizes = (work.num_features, work.dim, work.value_dim, work.epsilon, work.norm)
    risen = rows.key_rows if risen is None else risen
    chunks = cdiv(query_length, work.rows)
    for launch in work.launches(work.config.query_gradient):
        gradients.query_gradient[chunks, batch * heads](
            *rows, work.high, work.low, work.tilt, *before, d_query, risen,
            *strides, *d_query.stride()[:3], heads, work.group, query_length, chunks, *sizes,
            IS_CAUSAL=work.is_causal, **launch,
        )  # fmt: skip
    chunks = cdiv(key_length, work.rows)
    d_key_rows = torch.empty_like(rows.key_rows)
    for launch in work.launches(work.config.key_gradient):
        gradients.key_gradient[chunks, batch * key_heads](
            *rows, work.high, work.low, work.tilt, before[0], *later, d_key, d_key_rows, d_value,
            risen, *strides, *d_key.stride()[:3], *d_value.stride()[:3],
            heads, work.group, key_length, chunks, *sizes,
            IS_CAUSAL=work.is_causal, **launch,
        )  # fmt: skip
    return d_key_rows


def _step(
    work: Contraction, query: Tensor, key: Tensor, value: Tensor, key_rows: Tensor, first: Sums
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One token of every stream: its output, its normalizer, the next state."""
    batch, heads = query.shape[:2]
    frames, normalizers, values = (torch.empty_like(part) for part in first)
    out = query.new_empty(batch, heads, 1, work.value_dim)
    total = query.new_empty(batch, heads, 1, dtype=torch.float32)
    decoding.step[(batch * heads,)](
        query, key, value, key_rows, work.omega, work.tilt, *first,
        frames, normalizers, values, out, total,
        *(s for x in (query, key, value, out) for s in x.stride()[:2]),
        heads, work.group, work.num_features, work.dim, work.value_dim, work.epsilon, work.norm,
        FEATURES=STEP_FEATURES, **work.shared(),
    )  # fmt: skip
    return out, total, frames, normalizers, values


def row_products(work: Contraction, x: Tensor, y: Tensor) -> Tensor:
    """x_i·y_i of every row in float32, [batch, heads, length]."""
    batch, heads, length, dim = x.shape
    out = x.new_empty(batch, heads, length, dtype=torch.float32)
    states.row_products[cdiv(length, work.rows), batch * heads](
        x, y, out, *x.stride()[:3], *y.stride()[:3], heads, length, dim,
        ROWS=work.rows, WIDTH=width(dim),
    )  # fmt: skip
    return out


def _empty_states(like: Sums, count: int, dtype: torch.dtype = torch.float32) -> Sums:
    """Memory for `count` states of each key head, with values of this dtype."""
    frames, normalizers = (
        part.new_empty(*part.shape[:2], count, part.shape[2]) for part in like[:2]
    )
    shape = *like[2].shape[:2], count, *like[2].shape[2:]
    return frames, normalizers, like[2].new_empty(shape, dtype=dtype)


def _state_number(index: int, sums: Sums) -> Sums:
    """One of the states of each key head."""
    frames, normalizers, values = (part[:, :, index].contiguous() for part in sums)
    return frames, normalizers, values


def _with_dense_rows(x: Tensor) -> Tensor:
    """The kernels take any strides but that of the last dimension, which must be 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _split(work: Contraction, x: Tensor) -> int:
    """How many rows go into one state, so that their states fill the device. Multiple of a tile."""
    tiles = cdiv(x.shape[2], work.rows)
    programs = x.shape[0] * x.shape[1] * cdiv(work.num_features, work.config.absorb.features)
    return work.rows * cdiv(tiles, min(tiles, _waves(x.device, 1, programs)))


def _segments(work: Contraction, key: Tensor) -> list[slice]:
    """The parts that causal attention works on one after the other, each with enough chunks to keep
    the device busy. Besides inputs and outputs, only the states of one segment's chunks are in
    memory, so their number does not depend on the length.
    """
    length = key.shape[2]
    chunks = max(MIN_CHUNKS, _waves(key.device, SEGMENT_WAVES, key.shape[0] * key.shape[1]))
    size = work.rows * chunks
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _waves(device: torch.device, waves: int, programs: int) -> int:
    """How often so many programs must be started to occupy every processor of the device."""
    return cdiv(waves * PROGRAMS_PER_PROCESSOR * _processors(device), programs)


def _runs(device: torch.device, programs: int) -> int:
    """Into how many runs a sequence is cut: one where its programs occupy every processor, since
    more have to be summed up first.
    """
    processors = _processors(device)
    return 1 if programs >= processors else cdiv(2 * processors, programs)


def _processors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1
