"""The forward kernel: queries read a state and, in causal attention, the keys of their chunk."""

from typing import no_type_check

import triton
import triton.language as tl

from performers.backends.triton.tiles import (
    exponents_of_norms,
    finite,
    first_rise,
    key_weights_of,
    larger,
    load_omega,
    load_row_factors,
    load_rows,
    load_state,
    product,
    projected,
    row_of,
    store_rows,
    value_of,
)


@triton.jit
@no_type_check
def read(
    query, key, value, key_rows, high, low, tilts, frames, normalizers, values, out, totals, risen,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    value_batch, value_head, value_row, out_batch, out_head, out_row,
    heads, group, length, states, num_features, dim, value_dim, epsilon, norm,
    IS_CAUSAL: tl.constexpr, REPAIRS: tl.constexpr, KIND: tl.constexpr, PER_HEAD: tl.constexpr,
    OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """out_i = Σ_m w_im S_m / Σ_m w_im Z_m, and the denominator (its logarithm for KIND "exp").

    A program has one tile of queries of one head and goes over all features. The frame of a row is
    the largest exponent so far, the running maximum of an online softmax. In causal attention the
    state is that of the keys before the chunk, and Σ_m φ_m(q_i) φ_m(k_j) for the keys of the chunk
    is summed along, in the same frame.

    Where a key of the chunk rises too far above the frame of a feature, rows from there on cannot
    be products of tiles. They are rare: `risen` has the first such row of each chunk, and a second
    launch, which REPAIRS, computes these chunks again and stores the rows from there on.
    """
    tile = tl.program_id(0)
    start = tile * ROWS
    index = tl.program_id(1).to(tl.int64)
    batch, head = index // heads, index % heads
    own_key_head, key_heads = head // group, heads // group
    state = batch * key_heads + own_key_head
    own = state * PER_HEAD
    position = tl.arange(0, ROWS)
    query += batch * query_batch + head * query_head
    queries = load_rows(query, query_row, start, length, dim, ROWS, DIM).to(OPERAND)
    if IS_CAUSAL:
        key += batch * key_batch + own_key_head * key_head
        keys = load_rows(key, key_row, start, length, dim, ROWS, DIM).to(OPERAND)
        factors = load_row_factors(key_rows + state * length, start, length, ROWS, KIND)
        if KIND == "exp":
            factors += exponents_of_norms(keys, norm)
        scores = tl.zeros([ROWS, ROWS], tl.float32)
        state = state * states + tile
    first_row = 0
    if REPAIRS:
        first_row = tl.load(risen + state)
        if first_row == ROWS:
            return

    frame = tl.full([ROWS], -float("inf"), tl.float32)  # of the rows, where KIND is "exp"
    normalizer = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_DIM], tl.float32)
    for first_feature in range(0, num_features, FEATURES):
        inside = first_feature + tl.arange(0, FEATURES) < num_features
        omega, rest, tilt = load_omega(
            high, low, tilts, own, first_feature, num_features, dim, SPLIT, FEATURES, DIM
        )
        feature_frame, state_normalizer, state_sums = load_state(
            frames, normalizers, values, state, first_feature, num_features, value_dim,
            FEATURES, VALUE_DIM,
        )  # fmt: skip
        logits = projected(queries, omega, rest, tilt, SPLIT, PRECISION)
        if IS_CAUSAL:
            key_logits = projected(keys, omega, rest, tilt, SPLIT, PRECISION)
        if KIND == "exp":
            logits = tl.where(inside[None, :], logits, -float("inf"))
            top = logits + feature_frame[None, :]
            if REPAIRS:
                exponents = key_logits + factors[:, None]  # b_jm
                rise = first_rise(tl.trans(exponents), feature_frame, inside, ROWS)
                # Rows from the rise on need a frame that no key up to them exceeds: a running
                # maximum over keys.
                highest = tl.associative_scan(exponents, 0, larger)
                highest = tl.maximum(highest, feature_frame[None, :])
                top = tl.where(position[:, None] >= rise, logits + highest, top)
            grown = tl.maximum(frame, tl.max(top, axis=1))
            decay = tl.exp(frame - finite(grown))
            normalizer *= decay
            sums *= decay[:, None]
            frame = grown
            weights = tl.exp(logits + feature_frame[None, :] - finite(frame)[:, None])
        else:
            weights = tl.where(inside[None, :], value_of(logits, epsilon, KIND), 0.0)
        weights = weights.to(OPERAND)
        # Rounded as the sums are in their product: attention over 1 is 1.
        rounded = state_normalizer.to(OPERAND).to(tl.float32)
        normalizer += tl.sum(weights.to(tl.float32) * rounded[None, :], axis=1)
        sums += product(weights, state_sums, OPERAND, PRECISION)
        if IS_CAUSAL:
            key_weights = key_weights_of(key_logits, factors, feature_frame, inside, epsilon, KIND)
            new_scores = product(weights, tl.trans(key_weights), OPERAND, PRECISION)
            if KIND == "exp":
                scores *= decay[:, None]
                if REPAIRS:
                    new_scores = tl.where(position[:, None] >= rise, 0.0, new_scores)
                    # Term by term, where products of tiles would overflow: one key at a time, with
                    # its own exponents.
                    for number in range(ROWS):
                        exponent = row_of(exponents, number, ROWS)[None, :] + logits
                        terms = tl.exp(exponent - finite(frame)[:, None])
                        column = tl.sum(terms, axis=1)[:, None]
                        sees = (position[:, None] >= rise) & (position[:, None] >= number)
                        here = sees & (position[None, :] == number)
                        new_scores = tl.where(here, column, new_scores)
            scores += new_scores

    if IS_CAUSAL:
        value += batch * value_batch + own_key_head * value_head
        chunk = load_rows(value, value_row, start, length, value_dim, ROWS, VALUE_DIM)
        scores = tl.where(position[:, None] >= position[None, :], scores, 0.0).to(OPERAND)
        normalizer += tl.sum(scores.to(tl.float32), axis=1)
        sums += product(scores, chunk, OPERAND, PRECISION)
    sums /= tl.where(normalizer == 0, 1.0, normalizer)[:, None]
    out += batch * out_batch + head * out_head
    store_rows(out, out_row, sums, start, length, value_dim, ROWS, VALUE_DIM, first_row)
    total = normalizer
    if KIND == "exp":
        total = tl.where(normalizer == 0, -float("inf"), tl.log(normalizer) + frame)
    shown = (start + position < length) & (position >= first_row)
    tl.store(totals + index * length + start + position, total, mask=shown)
