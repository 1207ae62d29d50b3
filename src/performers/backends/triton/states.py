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
    added,
    chunk_frame,
    exponents_of_norms,
    finite,
    first_rise,
    load_omega,
    load_row_factors,
    load_rows,
    load_shares,
    load_state,
    logits_of,
    store_state,
    store_sum,
    with_rows,
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
    heads, group, length, chunk, num_features, dim, value_dim, epsilon, norm,
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
    omega, rest, tilt = load_omega(
        high, low, tilts, index * PER_HEAD, first_feature, num_features, dim, SPLIT, FEATURES, DIM
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
            if KIND == "exp":
                factors += exponents_of_norms(x_tile, norm)
            share = load_shares(shares + vectors, start, stop, HAS_SHARES, ROWS)
            logits = logits_of(x_tile, omega, rest, tilt, SPLIT, PRECISION)
            frame, normalizer, sums = with_rows(
                frame, normalizer, sums, logits, factors, share, y_tile, epsilon,
                KIND, OPERAND, PRECISION,
            )  # fmt: skip
    state = index * tl.num_programs(0) + number
    store_state(
        frames, normalizers, values, state, frame, normalizer, sums, first_feature, num_features,
        value_dim, FEATURES, VALUE_DIM,
    )  # fmt: skip


@triton.jit
@no_type_check
def unfold(
    x, y, rows, shares, high, low, tilts, first_frames, first_normalizers, first_values,
    frames, normalizers, values, last_frame, last_normalizer, last_values, risen,
    x_batch, x_head, x_row, y_batch, y_head, y_row,
    heads, group, length, run, num_features, dim, value_dim, epsilon, norm,
    REVERSE: tl.constexpr, HAS_SHARES: tl.constexpr, KIND: tl.constexpr, PER_HEAD: tl.constexpr,
    OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """The state before every chunk of ROWS rows; with REVERSE that after it, from the end.

    A program has a run of chunks, and the state before it. States of keys are stored in the frame
    of the chunk that reads them (`tiles.chunk_frame`), with the first row of the chunk that rises
    too far above that for products of tiles: `risen`, ROWS where there is none.
    """
    number = tl.program_id(0)
    first_feature = tl.program_id(1) * FEATURES
    index = tl.program_id(2).to(tl.int64)
    key_heads = heads // group
    batch, key_head = index // key_heads, index % key_heads
    inside = first_feature + tl.arange(0, FEATURES) < num_features
    omega, rest, tilt = load_omega(
        high, low, tilts, index * PER_HEAD, first_feature, num_features, dim, SPLIT, FEATURES, DIM
    )
    frame, normalizer, sums = load_state(
        first_frames, first_normalizers, first_values, index * tl.num_programs(0) + number,
        first_feature, num_features, value_dim, FEATURES, VALUE_DIM,
    )  # fmt: skip
    chunks = tl.cdiv(length, ROWS)
    first_chunk = number * run
    last_chunk = tl.minimum(first_chunk + run, chunks)
    for step in range(first_chunk, last_chunk):
        chunk = step
        if REVERSE:
            chunk = first_chunk + last_chunk - 1 - step
            store_state(
                frames, normalizers, values, index * chunks + chunk, frame, normalizer, sums,
                first_feature, num_features, value_dim, FEATURES, VALUE_DIM,
            )  # fmt: skip
        start = chunk * ROWS
        for member in range(group):
            head = key_head * group + member
            vectors = (batch * heads + head) * length
            x_start = x + batch * x_batch + head * x_head
            y_start = y + batch * y_batch + head * y_head
            x_tile = load_rows(x_start, x_row, start, length, dim, ROWS, DIM).to(OPERAND)
            y_tile = load_rows(y_start, y_row, start, length, value_dim, ROWS, VALUE_DIM)
            factors = load_row_factors(rows + vectors, start, length, ROWS, KIND)
            if KIND == "exp":
                factors += exponents_of_norms(x_tile, norm)
            share = load_shares(shares + vectors, start, length, HAS_SHARES, ROWS)
            logits = logits_of(x_tile, omega, rest, tilt, SPLIT, PRECISION)
            if not REVERSE:
                read_frame, decay = frame, tl.full([FEATURES], 1.0, tl.float32)
                if KIND == "exp":
                    exponents = logits + factors[None, :]
                    read_frame = chunk_frame(frame, exponents, factors, ROWS)
                    decay = tl.exp(frame - finite(read_frame))
                    rise = first_rise(exponents, read_frame, inside, ROWS)
                    if rise < ROWS:
                        tl.atomic_min(risen + index * chunks + chunk, rise)
                store_state(
                    frames, normalizers, values, index * chunks + chunk, read_frame,
                    normalizer * decay, sums * decay[:, None], first_feature, num_features,
                    value_dim, FEATURES, VALUE_DIM,
                )  # fmt: skip
            frame, normalizer, sums = with_rows(
                frame, normalizer, sums, logits, factors, share, y_tile, epsilon,
                KIND, OPERAND, PRECISION,
            )  # fmt: skip
    last_run = tl.num_programs(0) - 1
    if REVERSE:
        last_run = 0
    if number == last_run:
        store_state(
            last_frame, last_normalizer, last_values, index, frame, normalizer, sums,
            first_feature, num_features, value_dim, FEATURES, VALUE_DIM,
        )  # fmt: skip


@triton.jit
@no_type_check
def scan(
    frames, normalizers, values, first_frame, first_normalizer, first_values,
    before_frames, before_normalizers, before_values,
    last_frame, last_normalizer, last_values, states, num_features, value_dim,
    KIND: tl.constexpr, REVERSE: tl.constexpr, SKIPS: tl.constexpr, ADDS: tl.constexpr,
    FEATURES: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """`before`: of each chunk, the sum of the first state and those of the chunks before it.

    `last`: the sum of all. With REVERSE the chunks count from the end. SKIPS leaves out the chunk
    just before, too. With ADDS the sum is added to what is in `before`. That is not the memory of
    the chunks' states, so that their loads can run ahead of the stores.
    """
    first_feature = tl.program_id(0) * FEATURES
    index = tl.program_id(1).to(tl.int64)
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
        if SKIPS:
            if step == 0:
                store_sum(
                    before_frames, before_normalizers, before_values, number,
                    frame, normalizer, sums, first_feature, num_features, value_dim,
                    KIND, ADDS, FEATURES, VALUE_DIM,
                )  # fmt: skip
            reader = number + 1
            if REVERSE:
                reader = number - 1
            if step < states - 1:
                store_sum(
                    before_frames, before_normalizers, before_values, reader,
                    frame, normalizer, sums, first_feature, num_features, value_dim,
                    KIND, ADDS, FEATURES, VALUE_DIM,
                )  # fmt: skip
        else:
            store_sum(
                before_frames, before_normalizers, before_values, number,
                frame, normalizer, sums, first_feature, num_features, value_dim,
                KIND, ADDS, FEATURES, VALUE_DIM,
            )  # fmt: skip
        frame, normalizer, sums = added(
            frame, normalizer, sums, new_frame, new_normalizer, new_sums, KIND
        )
    store_state(
        last_frame, last_normalizer, last_values, index, frame, normalizer, sums, first_feature,
        num_features, value_dim, FEATURES, VALUE_DIM,
    )  # fmt: skip
