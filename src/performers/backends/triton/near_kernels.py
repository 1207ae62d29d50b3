"""The kernels of a near field: rows of near keys, sinks and features, under one softmax.

What is far of a block of queries is a state, as everywhere: `states.absorb` makes those of blocks,
`states.scan` adds them up. Here [H, G, …] are the key heads of all sequences and the query heads of
each. The gradient of a logit is w (dO·v − δ), w its weight; keys read a state (R, T) of the queries
that they are far of (see `gradients`).
"""

from typing import no_type_check

import triton
import triton.language as tl

from performers.backends.triton.tiles import (
    exponents_of_norms,
    feature_logits,
    joined,
    load_omega,
    load_row_factors,
    load_rows,
    load_state,
    near_logits,
    product,
    projected,
    shares_of,
    sink_logits,
    store_rows,
    tile_of,
)


@triton.jit
@no_type_check
def read(
    query, key, value, near_rows, y, numbers, sink_key, sink_value, sink_start,
    high, low, tilts, frames, normalizers, values, out, totals,
    group, length, window, blocks, num_sinks, num_features, dim, value_dim, scale,
    IS_CAUSAL: tl.constexpr, SINKS: tl.constexpr, KIND: tl.constexpr, PER_HEAD: tl.constexpr,
    OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Outputs and the logs of their normalizers, for a tile of a block's queries of one head."""
    block, start, stop = tile_of(window, length, ROWS)
    index = tl.program_id(1).to(tl.int64)
    head = index // group
    position = start + tl.arange(0, ROWS)
    row = index * length
    queries = load_rows(query + row * dim, dim, start, stop, dim, ROWS, DIM).to(OPERAND)
    frame = tl.full([ROWS], -float("inf"), tl.float32)
    normalizer = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_DIM], tl.float32)

    first_key = tl.maximum(block - 1, 0) * window
    last_key = tl.minimum((block + 2) * window, length)
    if IS_CAUSAL:
        last_key = tl.minimum(start + ROWS, stop)
    own = head * length
    for key_start in range(first_key, last_key, ROWS):
        keys = load_rows(key + own * dim, dim, key_start, last_key, dim, ROWS, DIM).to(OPERAND)
        chunk = load_rows(
            value + own * value_dim, value_dim, key_start, last_key, value_dim, ROWS, VALUE_DIM
        )
        shown = load_row_factors(near_rows + own, key_start, last_key, ROWS, "exp")
        key_position = key_start + tl.arange(0, ROWS)
        logits = near_logits(
            queries, keys, shown, position, key_position, scale, IS_CAUSAL, PRECISION
        )
        ones = tl.full([ROWS], 1.0, tl.float32)
        frame, normalizer, sums = joined(
            logits, ones, chunk, frame, normalizer, sums, OPERAND, PRECISION
        )
    own = head * num_sinks
    for first in range(0, num_sinks, SINKS):
        sinks = load_rows(sink_key + own * dim, dim, first, num_sinks, dim, SINKS, DIM)
        chunk = load_rows(
            sink_value + own * value_dim, value_dim, first, num_sinks, value_dim, SINKS, VALUE_DIM
        )
        logits = sink_logits(
            queries, sinks.to(OPERAND), sink_start + own, first, num_sinks, position, scale,
            SINKS, PRECISION,
        )  # fmt: skip
        ones = tl.full([SINKS], 1.0, tl.float32)
        frame, normalizer, sums = joined(
            logits, ones, chunk, frame, normalizer, sums, OPERAND, PRECISION
        )
    images = load_rows(y + row * dim, dim, start, stop, dim, ROWS, DIM).to(OPERAND)
    number = tl.load(numbers + row + position, mask=position < stop, other=0.0)
    number += exponents_of_norms(images, scale)
    for first_feature in range(0, num_features, FEATURES):
        inside = first_feature + tl.arange(0, FEATURES) < num_features
        omega, rest, tilt = load_omega(
            high, low, tilts, head * PER_HEAD, first_feature, num_features, dim,
            SPLIT, FEATURES, DIM,
        )  # fmt: skip
        state_frame, mass, averages = load_state(
            frames, normalizers, values, head * blocks + block, first_feature, num_features,
            value_dim, FEATURES, VALUE_DIM,
        )  # fmt: skip
        logits = feature_logits(
            images, number, omega, rest, tilt, state_frame, inside, SPLIT, PRECISION
        )
        frame, normalizer, sums = joined(
            logits, mass, averages, frame, normalizer, sums, OPERAND, PRECISION
        )

    sums /= tl.where(normalizer == 0, 1.0, normalizer)[:, None]
    store_rows(out + row * value_dim, value_dim, sums, start, stop, value_dim, ROWS, VALUE_DIM)
    total = tl.where(normalizer == 0, -float("inf"), tl.log(normalizer) + frame)
    tl.store(totals + row + position, total, mask=position < stop)


@triton.jit
@no_type_check
def query_gradient(
    query, key, value, near_rows, y, numbers, sink_key, sink_value, sink_start,
    high, low, tilts, frames, normalizers, values, out_gradient, query_rows, shares,
    d_query, d_y, d_numbers,
    group, length, window, blocks, num_sinks, num_features, dim, value_dim, scale,
    IS_CAUSAL: tl.constexpr, SINKS: tl.constexpr, KIND: tl.constexpr, PER_HEAD: tl.constexpr,
    OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, of their images y and numbers: a program has what `read` gives one."""
    block, start, stop = tile_of(window, length, ROWS)
    index = tl.program_id(1).to(tl.int64)
    head = index // group
    position = start + tl.arange(0, ROWS)
    row = index * length
    queries = load_rows(query + row * dim, dim, start, stop, dim, ROWS, DIM).to(OPERAND)
    d_out = load_rows(
        out_gradient + row * value_dim, value_dim, start, stop, value_dim, ROWS, VALUE_DIM
    )
    rows = load_row_factors(query_rows + row, start, stop, ROWS, "exp")
    share = tl.load(shares + row + position, mask=position < stop, other=0.0)
    gradient = tl.zeros([ROWS, DIM], tl.float32)

    first_key = tl.maximum(block - 1, 0) * window
    last_key = tl.minimum((block + 2) * window, length)
    if IS_CAUSAL:
        last_key = tl.minimum(start + ROWS, stop)
    own = head * length
    for key_start in range(first_key, last_key, ROWS):
        keys = load_rows(key + own * dim, dim, key_start, last_key, dim, ROWS, DIM).to(OPERAND)
        chunk = load_rows(
            value + own * value_dim, value_dim, key_start, last_key, value_dim, ROWS, VALUE_DIM
        )
        shown = load_row_factors(near_rows + own, key_start, last_key, ROWS, "exp")
        key_position = key_start + tl.arange(0, ROWS)
        logits = near_logits(
            queries, keys, shown, position, key_position, scale, IS_CAUSAL, PRECISION
        )
        found = product(d_out, tl.trans(chunk), OPERAND, PRECISION) - share[:, None]
        gradient += product(shares_of(logits, rows) * found, keys, OPERAND, PRECISION)
    own = head * num_sinks
    for first in range(0, num_sinks, SINKS):
        sinks = load_rows(sink_key + own * dim, dim, first, num_sinks, dim, SINKS, DIM)
        sinks = sinks.to(OPERAND)
        chunk = load_rows(
            sink_value + own * value_dim, value_dim, first, num_sinks, value_dim, SINKS, VALUE_DIM
        )
        logits = sink_logits(
            queries, sinks, sink_start + own, first, num_sinks, position, scale, SINKS, PRECISION
        )
        found = product(d_out, tl.trans(chunk), OPERAND, PRECISION) - share[:, None]
        gradient += product(shares_of(logits, rows) * found, sinks, OPERAND, PRECISION)
    store_rows(d_query + row * dim, dim, gradient * scale, start, stop, dim, ROWS, DIM)

    images = load_rows(y + row * dim, dim, start, stop, dim, ROWS, DIM).to(OPERAND)
    number = tl.load(numbers + row + position, mask=position < stop, other=0.0)
    number += exponents_of_norms(images, scale)
    gradient = tl.zeros([ROWS, DIM], tl.float32)
    of_numbers = tl.zeros([ROWS], tl.float32)
    for first_feature in range(0, num_features, FEATURES):
        inside = first_feature + tl.arange(0, FEATURES) < num_features
        omega, rest, tilt = load_omega(
            high, low, tilts, head * PER_HEAD, first_feature, num_features, dim,
            SPLIT, FEATURES, DIM,
        )  # fmt: skip
        frame, mass, averages = load_state(
            frames, normalizers, values, head * blocks + block, first_feature, num_features,
            value_dim, FEATURES, VALUE_DIM,
        )  # fmt: skip
        logits = feature_logits(images, number, omega, rest, tilt, frame, inside, SPLIT, PRECISION)
        found = product(d_out, tl.trans(averages), OPERAND, PRECISION)
        d_logits = shares_of(logits, rows) * (found - share[:, None] * mass[None, :])
        gradient += product(d_logits, omega, OPERAND, PRECISION)
        of_numbers += tl.sum(d_logits, axis=1)
    gradient -= scale * of_numbers[:, None] * images.to(tl.float32)
    store_rows(d_y + row * dim, dim, gradient, start, stop, dim, ROWS, DIM)
    tl.store(d_numbers + row + position, of_numbers, mask=position < stop)


@triton.jit
@no_type_check
def key_gradient(
    query, key, value, near_rows, y, numbers, high, low, tilts,
    later_frames, later_shares, later_values, out_gradient, query_rows, shares,
    d_key, d_y, d_numbers, d_value,
    group, length, window, blocks, num_features, dim, value_dim, scale,
    IS_CAUSAL: tl.constexpr, KIND: tl.constexpr, PER_HEAD: tl.constexpr,
    OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Gradients of keys, of their images y and numbers, and of values.

    A program has a tile of a block's keys, and goes over all queries that they are near of.
    """
    block, start, stop = tile_of(window, length, ROWS)
    head = tl.program_id(1).to(tl.int64)
    position = start + tl.arange(0, ROWS)
    row = head * length
    keys = load_rows(key + row * dim, dim, start, stop, dim, ROWS, DIM).to(OPERAND)
    chunk = load_rows(value + row * value_dim, value_dim, start, stop, value_dim, ROWS, VALUE_DIM)
    shown = load_row_factors(near_rows + row, start, stop, ROWS, "exp")
    gradient = tl.zeros([ROWS, DIM], tl.float32)
    value_gradient = tl.zeros([ROWS, VALUE_DIM], tl.float32)

    first_query = tl.maximum(block - 1, 0) * window
    if IS_CAUSAL:
        first_query = start
    last_query = tl.minimum((block + 2) * window, length)
    for member in range(group):
        own = (head * group + member) * length
        for query_start in range(first_query, last_query, ROWS):
            queries = load_rows(query + own * dim, dim, query_start, last_query, dim, ROWS, DIM)
            queries = queries.to(OPERAND)
            d_out = load_rows(
                out_gradient + own * value_dim, value_dim, query_start, last_query, value_dim,
                ROWS, VALUE_DIM,
            )  # fmt: skip
            rows = load_row_factors(query_rows + own, query_start, last_query, ROWS, "exp")
            query_position = query_start + tl.arange(0, ROWS)
            share = tl.load(
                shares + own + query_position, mask=query_position < last_query, other=0.0
            )
            logits = near_logits(
                queries, keys, shown, query_position, position, scale, IS_CAUSAL, PRECISION
            )
            weights = shares_of(logits, rows)
            value_gradient += product(tl.trans(weights), d_out, OPERAND, PRECISION)
            found = product(d_out, tl.trans(chunk), OPERAND, PRECISION) - share[:, None]
            gradient += product(tl.trans(weights * found), queries, OPERAND, PRECISION)
    store_rows(d_key + row * dim, dim, gradient * scale, start, stop, dim, ROWS, DIM)

    images = load_rows(y + row * dim, dim, start, stop, dim, ROWS, DIM).to(OPERAND)
    number = load_row_factors(numbers + row, start, stop, ROWS, "exp")
    number += exponents_of_norms(images, scale)
    gradient = tl.zeros([ROWS, DIM], tl.float32)
    of_numbers = tl.zeros([ROWS], tl.float32)
    for first_feature in range(0, num_features, FEATURES):
        inside = first_feature + tl.arange(0, FEATURES) < num_features
        omega, rest, tilt = load_omega(
            high, low, tilts, head * PER_HEAD, first_feature, num_features, dim,
            SPLIT, FEATURES, DIM,
        )  # fmt: skip
        frame, share, sums = load_state(
            later_frames, later_shares, later_values, head * blocks + block, first_feature,
            num_features, value_dim, FEATURES, VALUE_DIM,
        )  # fmt: skip
        logits = projected(images, omega, rest, tilt, SPLIT, PRECISION)
        logits += tl.where(inside, frame, -float("inf"))[None, :]
        weights = shares_of(logits, number)
        found = product(chunk, tl.trans(sums), OPERAND, PRECISION) - share[None, :]
        d_logits = weights * found
        value_gradient += product(weights, sums, OPERAND, PRECISION)
        gradient += product(d_logits, omega, OPERAND, PRECISION)
        of_numbers += tl.sum(d_logits, axis=1)
    gradient -= scale * of_numbers[:, None] * images.to(tl.float32)
    store_rows(d_y + row * dim, dim, gradient, start, stop, dim, ROWS, DIM)
    tl.store(d_numbers + row + position, of_numbers, mask=position < stop)
    store_rows(
        d_value + row * value_dim, value_dim, value_gradient, start, stop, value_dim,
        ROWS, VALUE_DIM,
    )  # fmt: skip
