"""Kernels that sum rows into states, and add states up.

Keys with their values are summed into the states that queries read. In the backward pass the roles
are exchanged: queries, with the gradients of their outputs in the place of values, are summed into
states that keys read. The sums of a feature are kept relative to a frame: the largest exponent in
them, as the running maximum of an online softmax. States are added in the larger frame.
"""

from typing import no_type_check

import triton
import triton.language as tl

from performers.backends.triton.tiles import (
    finite,
    load_omega,
    load_row_factors,
    load_rows,
    load_state,
    product,
    store_rows,
    value_of,
)


@triton.jit
@no_type_check
def row_products(
    x, y, out, x_batch, x_head, x_row, y_batch, y_head, y_row, heads, length, width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """out_i = x_i·y_i in float32: dO_i·O_i."""
    start = tl.program_id(0) * ROWS
    index = tl.program_id(1).to(tl.int64)
    batch, head = index // heads, index % heads
    x += batch * x_batch + head * x_head
    y += batch * y_batch + head * y_head
    left = load_rows(x, x_row, start, length, width, ROWS, WIDTH).to(tl.float32)
    right = load_rows(y, y_row, start, length, width, ROWS, WIDTH).to(tl.float32)
    rows = start + tl.arange(0, ROWS)
    products = tl.sum(left * right, axis=1)
    tl.store(out + index * length + rows, products, mask=rows < length)


@triton.jit
@no_type_check
def absorb(
    x, y, rows, shares, high, low, tilts, frames, normalizers, values,
    x_batch, x_head, x_row, y_batch, y_head, y_row,
    heads, group, length, chunk, num_features, dim, value_dim, epsilon,
    KIND: tl.constexpr, HAS_SHARES: tl.constexpr, PER_HEAD: tl.constexpr,
    OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """One state per chunk of rows: frame_m, Σ_i w_im share_i and Σ_i w_im y_i, w_im = φ_m(x_i).

    A program has one chunk of one key head and one block of features; the rows of all heads of the
    key head's group go into one state. Shares are 1 unless given.
    """
    number = tl.program_id(0).to(tl.int64)
    first_feature = tl.program_id(1) * FEATURES
    index = tl.program_id(2).to(tl.int64)
    key_heads = heads // group
    batch, key_head = index // key_heads, index % key_heads
    own = index * PER_HEAD
    omega, rest, tilt = load_omega(
        high, low, tilts, own, first_feature, num_features, dim, SPLIT, FEATURES, DIM
    )

    frame = tl.full([FEATURES], 0.0, tl.float32)
    if KIND == "exp":
        frame = tl.full([FEATURES], -float("inf"), tl.float32)
    normalizer = tl.zeros([FEATURES], tl.float32)
    sums = tl.zeros([FEATURES, VALUE_DIM], tl.float32)
    stop = tl.minimum((number + 1) * chunk, length)
    for member in range(group):
        head = key_head * group + member
        x_start = x + batch * x_batch + head * x_head
        y_start = y + batch * y_batch + head * y_head
        vectors = (batch * heads + head) * length
        for start in range(number * chunk, stop, ROWS):
            x_tile = load_rows(x_start, x_row, start, stop, dim, ROWS, DIM).to(OPERAND)
            y_tile = load_rows(y_start, y_row, start, stop, value_dim, ROWS, VALUE_DIM)
            factors = load_row_factors(rows + vectors, start, stop, ROWS, KIND)
            logits = tl.dot(omega, tl.trans(x_tile), input_precision=PRECISION)  # [M, R]
            if SPLIT:
                logits = tl.dot(rest, tl.trans(x_tile), logits, input_precision=PRECISION)
            logits += tilt[:, None]
            if KIND == "exp":
                exponents = logits + factors[None, :]
                grown = tl.maximum(frame, tl.max(exponents, axis=1))
                weights = tl.exp(exponents - finite(grown)[:, None])
                decay = tl.exp(frame - finite(grown))
                normalizer *= decay
                sums *= decay[:, None]
                frame = grown
            else:
                weights = value_of(logits, epsilon, KIND) * factors[None, :]
            # The normalizer sums what the product sums, rounded as it is: attention over 1 is 1.
            weights = weights.to(OPERAND)
            if HAS_SHARES:
                position = start + tl.arange(0, ROWS)
                share = tl.load(shares + vectors + position, mask=position < stop, other=0.0)
                normalizer += tl.sum(weights.to(tl.float32) * share[None, :], axis=1)
            else:
                normalizer += tl.sum(weights.to(tl.float32), axis=1)
            sums += product(weights, y_tile, OPERAND, PRECISION)

    features = first_feature + tl.arange(0, FEATURES)
    state = (index * tl.num_programs(0) + number) * num_features
    tl.store(frames + state + features, frame, mask=features < num_features)
    tl.store(normalizers + state + features, normalizer, mask=features < num_features)
    store_rows(
        values + state * value_dim, value_dim, sums, first_feature, num_features, value_dim,
        FEATURES, VALUE_DIM,
    )  # fmt: skip


@triton.jit
@no_type_check
def scan(
    frames, normalizers, values, first_frame, first_normalizer, first_values,
    before_frames, before_normalizers, before_values,
    last_frame, last_normalizer, last_values, states, num_features, value_dim,
    KIND: tl.constexpr, REVERSE: tl.constexpr, FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """`before`: of each chunk, the sum of the first state and those of the chunks before it.

    `last`: the sum of all. With REVERSE the chunks count from the end. `before` is not the memory
    of the chunks' states, so that their loads can run ahead of the stores.
    """
    first_feature = tl.program_id(0) * FEATURES
    index = tl.program_id(1).to(tl.int64)
    features = first_feature + tl.arange(0, FEATURES)
    inside = features < num_features
    frame, normalizer, sums = load_state(
        first_frame, first_normalizer, first_values, index, first_feature, num_features,
        value_dim, FEATURES, VALUE_DIM,
    )  # fmt: skip
    for step in tl.range(0, states, num_stages=4):
        number = index * states + step
        if REVERSE:
            number = index * states + states - 1 - step
        new_frame, new_normalizer, new_sums = load_state(
            frames, normalizers, values, number, first_feature, num_features, value_dim,
            FEATURES, VALUE_DIM,
        )  # fmt: skip
        start = number * num_features
        tl.store(before_frames + start + features, frame, mask=inside)
        tl.store(before_normalizers + start + features, normalizer, mask=inside)
        store_rows(
            before_values + start * value_dim, value_dim, sums, first_feature, num_features,
            value_dim, FEATURES, VALUE_DIM,
        )  # fmt: skip
        if KIND == "exp":
            grown = tl.maximum(frame, new_frame)
            decay, new_decay = tl.exp(frame - finite(grown)), tl.exp(new_frame - finite(grown))
            normalizer = normalizer * decay + new_normalizer * new_decay
            sums = sums * decay[:, None] + new_sums * new_decay[:, None]
            frame = grown
        else:
            normalizer += new_normalizer
            sums += new_sums

    start = index * num_features
    tl.store(last_frame + start + features, frame, mask=inside)
    tl.store(last_normalizer + start + features, normalizer, mask=inside)
    store_rows(
        last_values + start * value_dim, value_dim, sums, first_feature, num_features, value_dim,
        FEATURES, VALUE_DIM,
    )  # fmt: skip
