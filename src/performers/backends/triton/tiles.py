"""What the kernels do with one tile. Shapes are those of the tile: R rows by M features.

The weight of feature m in row i is the factor that i has in Σ_m φ_m(q_i) φ_m(k_j):

    KIND "exp":            exp(x_i·ω_m + tilt_m + row_i + frame_m)
                           row: what features of a key share (−norm · ‖x_i‖²/2 is added to what
                           is given), or −log of the normalizer
    KIND "relu", "elu+1":  (f(x_i·ω_m) + ε) · row_i          row: 1, or 1 / normalizer

A row that does not exist, or a masked key, has row −∞ or 0. Features past the last have no weight.
A frame is the exponent relative to which the sums of a feature are kept, as the running maximum of
an online softmax. It cancels in the output.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl

from performers.backends.triton.config import OPERANDS

# As in `performers.backends.tiles`: exp(60) leaves float32 room for the sums over a chunk.
MAX_RISE = tl.constexpr(60.0)


def product_options(dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments of products in kernels whose inputs have this dtype."""
    operand = OPERANDS[dtype]
    return {
        "OPERAND": {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}[operand.dtype],
        "SPLIT": operand.is_split,
        "PRECISION": operand.precision,
    }


@triton.jit
@no_type_check
def load_rows(pointer, stride, start, length, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows start, start + 1, … of a matrix [length, width]; 0 outside it."""
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    inside = (rows < length)[:, None] & (columns < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointer + offsets, mask=inside, other=0.0)


@triton.jit
@no_type_check
def store_rows(
    pointer, stride, tile, start, length, width, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    first_row=0,
):  # fmt: skip
    """The rows of the tile from `first_row` on that are inside the matrix."""
    rows = start + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    shown = (rows < length) & (rows >= start + first_row)
    inside = shown[:, None] & (columns < width)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def load_row_factors(pointer, start, length, ROWS: tl.constexpr, KIND: tl.constexpr):
    """row_i of the weights; of a row outside the sequence that of a row that is not there."""
    rows = start + tl.arange(0, ROWS)
    if KIND == "exp":
        return tl.load(pointer + rows, mask=rows < length, other=-float("inf"))
    else:
        return tl.load(pointer + rows, mask=rows < length, other=0.0)


@triton.jit
@no_type_check
def exponents_of_norms(x, norm):
    """[R]: −norm · ‖x_i‖²/2."""
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, axis=1) * (-0.5 * norm)


@triton.jit
@no_type_check
def load_state(
    frames, normalizers, values, index, first_feature, num_features, value_dim,
    FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """[M], [M], [M, V]: these features of state number `index`; frame −∞ past the last one."""
    features = first_feature + tl.arange(0, FEATURES)
    inside = features < num_features
    start = index * num_features
    frame = tl.load(frames + start + features, mask=inside, other=-float("inf"))
    normalizer = tl.load(normalizers + start + features, mask=inside, other=0.0)
    sums = load_rows(
        values + start * value_dim, value_dim, first_feature, num_features, value_dim,
        FEATURES, VALUE_DIM,
    )  # fmt: skip
    return frame, normalizer, sums


@triton.jit
@no_type_check
def load_omega(
    high, low, tilts, own, first_feature, num_features, dim,
    SPLIT: tl.constexpr, FEATURES: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """[M, D] twice, [M]: these rows of ω, what is left of them where ω is split, and the tilts.

    `own`: which ω, where heads have their own.
    """
    start = own.to(tl.int64) * num_features
    omega = load_rows(high + start * dim, dim, first_feature, num_features, dim, FEATURES, DIM)
    rest = omega
    if SPLIT:
        rest = load_rows(low + start * dim, dim, first_feature, num_features, dim, FEATURES, DIM)
    features = first_feature + tl.arange(0, FEATURES)
    tilt = tl.load(tilts + start + features, mask=features < num_features, other=0.0)
    return omega, rest, tilt


@triton.jit
@no_type_check
def projected(x, high, low, tilt, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """[R, M]: x·ω_m + tilt_m, with ω = high + low where it is split."""
    logits = tl.dot(x, tl.trans(high), input_precision=PRECISION)
    if SPLIT:
        logits = tl.dot(x, tl.trans(low), logits, input_precision=PRECISION)
    return logits + tilt[None, :]


@triton.jit
@no_type_check
def product(a, b, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b by the matrix units, summed in float32."""
    return tl.dot(a.to(OPERAND), b.to(OPERAND), input_precision=PRECISION)


@triton.jit
@no_type_check
def finite(frame):
    """The frame; 0 for that of nothing, −∞, from which nothing but −∞ is ever subtracted."""
    return tl.where(frame == -float("inf"), 0.0, frame)


@triton.jit
@no_type_check
def at_most(x, most):
    """The smaller of both, and NaN for NaN, which `tl.minimum` by itself takes for no number."""
    return tl.minimum(x, most, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
@no_type_check
def value_of(logits, epsilon, KIND: tl.constexpr):
    """f + ε of kernels without an exponent."""
    if KIND == "relu":
        return tl.where(logits < 0, 0.0, logits) + epsilon
    else:
        return tl.where(logits > 0, logits + 1, tl.exp(at_most(logits, 0.0))) + epsilon


@triton.jit
@no_type_check
def slope_of(logits, KIND: tl.constexpr):
    """f′ of kernels without an exponent."""
    if KIND == "relu":
        return tl.where(logits > 0, 1.0, 0.0)
    else:
        return tl.where(logits > 0, 1.0, tl.exp(at_most(logits, 0.0)))


@triton.jit
@no_type_check
def weights_of(logits, rows, frame, inside, epsilon, KIND: tl.constexpr):
    """[R, M]: the weights.

    Their products are shares, so that no exponent is above 0 but by the rounding of large logits.
    """
    if KIND == "exp":
        exponents = logits + rows[:, None] + tl.where(inside, frame, -float("inf"))[None, :]
        return tl.exp(at_most(exponents, 0.0))
    else:
        return tl.where(inside[None, :], value_of(logits, epsilon, KIND) * rows[:, None], 0.0)


@triton.jit
@no_type_check
def slopes_of(logits, rows, frame, inside, epsilon, KIND: tl.constexpr):
    """[R, M]: the derivatives of the weights by the logits."""
    if KIND == "exp":
        return weights_of(logits, rows, frame, inside, epsilon, KIND)
    else:
        return tl.where(inside[None, :], slope_of(logits, KIND) * rows[:, None], 0.0)


@triton.jit
@no_type_check
def chunk_frame(state_frame, exponents, rows, ROWS: tl.constexpr):
    """[M]: the frame for the products within a causal chunk, from its exponents [M, R].

    It is the maximum of the state's frame and the exponent of the first key, which every row sees.
    A chunk that starts with masked keys and has no state takes the exponent of its first real key,
    because the rows before that key see nothing at all.
    """
    position = tl.arange(0, ROWS)
    first = tl.min(tl.where(rows > -float("inf"), position, ROWS), axis=0)
    frame = tl.sum(tl.where(position[None, :] == first, exponents, 0.0), axis=1)
    frame = tl.where(first < ROWS, frame, -float("inf"))
    joined = tl.where(first == 0, tl.maximum(state_frame, frame), state_frame)
    return tl.where(state_frame == -float("inf"), frame, joined)


@triton.jit
@no_type_check
def first_rise(exponents, frame, inside, ROWS: tl.constexpr):
    """The first row with an exponent [M, R] too far above the frame for products; R if none is.

    Rows before it depend on no key after it, and those from it on are summed term by term.
    """
    above = tl.where(inside[:, None], exponents - finite(frame)[:, None], -float("inf"))
    position = tl.arange(0, ROWS)
    return tl.min(tl.where(tl.max(above, axis=0) > MAX_RISE, position, ROWS), axis=0)


@triton.jit
@no_type_check
def key_weights_of(logits, rows, frame, inside, epsilon, KIND: tl.constexpr):
    """[R, M]: weights of a chunk's keys below its frame. Past a rise they are not used."""
    if KIND == "exp":
        above = logits + rows[:, None] - finite(frame)[None, :]
        return tl.where(inside[None, :], tl.exp(at_most(above, MAX_RISE)), 0.0)
    else:
        return weights_of(logits, rows, frame, inside, epsilon, KIND)


@triton.jit
@no_type_check
def row_of(tile, index, ROWS: tl.constexpr):
    """One row of a tile, by its number at run time."""
    return tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == index, tile, 0.0), axis=0)


@triton.jit
@no_type_check
def column_of(tile, index, COLUMNS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == index, tile, 0.0), axis=1)


@triton.jit
@no_type_check
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
@no_type_check
def store_state(
    frames, normalizers, values, index, frame, normalizer, sums, first_feature, num_features,
    value_dim, FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """These features of state number `index`."""
    features = first_feature + tl.arange(0, FEATURES)
    start = index * num_features
    tl.store(frames + start + features, frame, mask=features < num_features)
    tl.store(normalizers + start + features, normalizer, mask=features < num_features)
    store_rows(
        values + start * value_dim, value_dim, sums, first_feature, num_features, value_dim,
        FEATURES, VALUE_DIM,
    )  # fmt: skip


@triton.jit
@no_type_check
def load_shares(shares, start, stop, HAS_SHARES: tl.constexpr, ROWS: tl.constexpr):
    """[R]: shares of rows; 1 where there are none."""
    if HAS_SHARES:
        position = start + tl.arange(0, ROWS)
        return tl.load(shares + position, mask=position < stop, other=0.0)
    else:
        return tl.full([ROWS], 1.0, tl.float32)


@triton.jit
@no_type_check
def logits_of(x_tile, omega, rest, tilt, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """[M, R]: ω_m·x_i + tilt_m."""
    logits = tl.dot(omega, tl.trans(x_tile), input_precision=PRECISION)
    if SPLIT:
        logits = tl.dot(rest, tl.trans(x_tile), logits, input_precision=PRECISION)
    return logits + tilt[:, None]


@triton.jit
@no_type_check
def with_rows(
    frame, normalizer, sums, logits, rows, shares, y_tile, epsilon,
    KIND: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state [M], [M], [M, V] and these rows, with their logits [M, R]."""
    if KIND == "exp":
        exponents = logits + rows[None, :]
        grown = tl.maximum(frame, tl.max(exponents, axis=1))
        weights = tl.exp(exponents - finite(grown)[:, None])
        decay = tl.exp(frame - finite(grown))
        normalizer *= decay
        sums *= decay[:, None]
        frame = grown
    else:
        weights = value_of(logits, epsilon, KIND) * rows[None, :]
    # The normalizer sums what the product sums, rounded as it is: attention over 1 is 1.
    weights = weights.to(OPERAND)
    normalizer += tl.sum(weights.to(tl.float32) * shares[None, :], axis=1)
    sums += product(weights, y_tile, OPERAND, PRECISION)
    return frame, normalizer, sums


@triton.jit
@no_type_check
def added(
    frame, normalizer, sums, new_frame, new_normalizer, new_sums, KIND: tl.constexpr
):  # fmt: skip
    """The sum of two states, in the larger frame."""
    if KIND == "exp":
        grown = tl.maximum(frame, new_frame)
        decay, new_decay = tl.exp(frame - finite(grown)), tl.exp(new_frame - finite(grown))
        normalizer = normalizer * decay + new_normalizer * new_decay
        sums = sums * decay[:, None] + new_sums * new_decay[:, None]
        frame = grown
    else:
        normalizer += new_normalizer
        sums += new_sums
    return frame, normalizer, sums


@triton.jit
@no_type_check
def store_sum(
    frames, normalizers, values, index, frame, normalizer, sums, first_feature, num_features,
    value_dim, KIND: tl.constexpr, ADDS: tl.constexpr, FEATURES: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Store a state; with ADDS its sum with what is there."""
    if ADDS:
        old_frame, old_normalizer, old_sums = load_state(
            frames, normalizers, values, index, first_feature, num_features, value_dim,
            FEATURES, VALUE_DIM,
        )  # fmt: skip
        frame, normalizer, sums = added(
            old_frame, old_normalizer, old_sums, frame, normalizer, sums, KIND
        )
    store_state(
        frames, normalizers, values, index, frame, normalizer, sums, first_feature, num_features,
        value_dim, FEATURES, VALUE_DIM,
    )  # fmt: skip


# What is left is for near fields.


@triton.jit
@no_type_check
def tile_of(window, length, ROWS: tl.constexpr):
    """The block of this program's tile, its first row, and the end of the block."""
    parts = tl.cdiv(window, ROWS)
    block = tl.program_id(0) // parts
    start = block * window + tl.program_id(0) % parts * ROWS
    return block, start, tl.minimum((block + 1) * window, length)


@triton.jit
@no_type_check
def near_logits(
    queries, keys, shown, position, key_position, scale,
    IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[R, K]: scale · q_i·k_j; −∞ for keys that are not shown, and causal for later ones."""
    logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale + shown[None, :]
    if IS_CAUSAL:
        later = position[:, None] < key_position[None, :]
        logits = tl.where(later, -float("inf"), logits)
    return logits


@triton.jit
@no_type_check
def sink_logits(
    queries, sinks, starts, first, num_sinks, position, scale,
    SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[R, S]: as `near_logits`, for sinks that a query sees from their start on."""
    numbers = first + tl.arange(0, SINKS)
    inside = numbers < num_sinks
    start = tl.load(starts + numbers, mask=inside, other=0)
    logits = tl.dot(queries, tl.trans(sinks), input_precision=PRECISION) * scale
    seen = inside[None, :] & (position[:, None] >= start[None, :])
    return tl.where(seen, logits, -float("inf"))


@triton.jit
@no_type_check
def feature_logits(
    y, numbers, omega, rest, tilt, frame, inside, SPLIT: tl.constexpr, PRECISION: tl.constexpr
):
    """[R, M]: log φ_m plus the frame of the feature's sums."""
    logits = projected(y, omega, rest, tilt, SPLIT, PRECISION) + numbers[:, None]
    return logits + tl.where(inside, frame, -float("inf"))[None, :]


@triton.jit
@no_type_check
def joined(
    logits, mass, values, frame, normalizer, sums, OPERAND: tl.constexpr, PRECISION: tl.constexpr
):
    """The softmax of rows so far, with more columns: e^logit stands for a mass, with a value."""
    grown = tl.maximum(frame, tl.max(logits, axis=1))
    decay = tl.exp(frame - finite(grown))
    weights = tl.exp(logits - finite(grown)[:, None]).to(OPERAND)
    # Rounded as the values are in their product: attention over 1 is 1.
    mass = mass.to(OPERAND).to(tl.float32)
    normalizer = normalizer * decay + tl.sum(weights.to(tl.float32) * mass[None, :], axis=1)
    sums = sums * decay[:, None] + product(weights, values, OPERAND, PRECISION)
    return grown, normalizer, sums


@triton.jit
@no_type_check
def shares_of(logits, rows):
    """e^(logit + row), a share: no exponent is above 0 but by rounding."""
    return tl.exp(at_most(logits + rows[:, None], 0.0))
