"""The backward kernels. They compute the features again; nothing of that size is stored.

With weights u_im of queries, divided by the row's normalizer, and weights w_jm of keys, the share
of key j in row i is P_ij = Σ_m u_im w_jm, and its gradient G_ij = dO_i·v_j − δ_i. Then

    d log u_im = u_im Σ_j w_jm G_ij = u_im (dO_i·S_m − δ_i Z_m),   S_m = Σ_j w_jm v_j,  Z_m = Σ_j w_jm
    d log w_jm = w_jm Σ_i u_im G_ij = w_jm (v_j·R_m − T_m),        R_m = Σ_i u_im dO_i, T_m = Σ_i u_im δ_i
    dv_j       = Σ_i P_ij dO_i      = Σ_m w_jm R_m

So keys read a state (R, T), which sums over queries, in the same way as queries read the state (S,
Z), which sums over keys. In causal attention the sums over j end at i and those over i start at j.
Within the row's own chunk they are products of tiles, or sums term by term after a key that rises
too far above the frame (the running maximum, as in an online softmax; see `tiles.chunk_frame`).
"""  # noqa: E501  # aligned formulas

from typing import no_type_check

import triton
import triton.language as tl

from performers.backends.triton.tiles import (
    at_most,
    column_of,
    exponents_of_norms,
    first_rise,
    key_weights_of,
    load_omega,
    load_row_factors,
    load_rows,
    load_state,
    product,
    projected,
    row_of,
    slopes_of,
    store_rows,
    weights_of,
)


@triton.jit
@no_type_check
def query_gradient(
    query, key, value, out_gradient, query_rows, key_rows, shares, high, low, tilts,
    frames, normalizers, values, gradient, risen,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    value_batch, value_head, value_row, out_batch, out_head, out_row,
    gradient_batch, gradient_head, gradient_row,
    heads, group, length, states, num_features, dim, value_dim, epsilon, norm,
    IS_CAUSAL: tl.constexpr, REPAIRS: tl.constexpr, KIND: tl.constexpr, PER_HEAD: tl.constexpr,
    OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """dq_i = Σ_m du_im ω_m. A program has one tile of queries of one head.

    `risen`, REPAIRS: as in `reading.read`.
    """
    tile = tl.program_id(0)
    start = tile * ROWS
    index = tl.program_id(1).to(tl.int64)
    batch, head = index // heads, index % heads
    own_key_head, key_heads = head // group, heads // group
    state = batch * key_heads + own_key_head
    own = state * PER_HEAD
    position = tl.arange(0, ROWS)
    inside_length = start + position < length
    query += batch * query_batch + head * query_head
    queries = load_rows(query, query_row, start, length, dim, ROWS, DIM).to(OPERAND)
    out_gradient += batch * out_batch + head * out_head
    d_out = load_rows(out_gradient, out_row, start, length, value_dim, ROWS, VALUE_DIM)
    share = tl.load(shares + index * length + start + position, mask=inside_length, other=0.0)
    rows = load_row_factors(query_rows + index * length, start, length, ROWS, KIND)
    if IS_CAUSAL:
        key += batch * key_batch + own_key_head * key_head
        keys = load_rows(key, key_row, start, length, dim, ROWS, DIM).to(OPERAND)
        factors = load_row_factors(key_rows + state * length, start, length, ROWS, KIND)
        if KIND == "exp":
            factors += exponents_of_norms(keys, norm)
        value += batch * value_batch + own_key_head * value_head
        chunk = load_rows(value, value_row, start, length, value_dim, ROWS, VALUE_DIM)
        pairs = product(d_out, tl.trans(chunk), OPERAND, PRECISION) - share[:, None]  # G
        pairs = tl.where(position[:, None] >= position[None, :], pairs, 0.0)
        state = state * states + tile
    first_row = 0
    if REPAIRS:
        first_row = tl.load(risen + state)
        if first_row == ROWS:
            return

    d_query = tl.zeros([ROWS, DIM], tl.float32)
    for first_feature in range(0, num_features, FEATURES):
        inside = first_feature + tl.arange(0, FEATURES) < num_features
        omega, rest, tilt = load_omega(
            high, low, tilts, own, first_feature, num_features, dim, SPLIT, FEATURES, DIM
        )
        frame, state_normalizer, state_sums = load_state(
            frames, normalizers, values, state, first_feature, num_features, value_dim,
            FEATURES, VALUE_DIM,
        )  # fmt: skip
        logits = projected(queries, omega, rest, tilt, SPLIT, PRECISION)
        if IS_CAUSAL:
            key_logits = projected(keys, omega, rest, tilt, SPLIT, PRECISION)
        found = product(d_out, tl.trans(state_sums), OPERAND, PRECISION)
        found -= share[:, None] * state_normalizer[None, :]  # [R, M]
        slopes = slopes_of(logits, rows, frame, inside, epsilon, KIND)
        if IS_CAUSAL:
            key_weights = key_weights_of(key_logits, factors, frame, inside, epsilon, KIND)
            by_products = pairs
            if REPAIRS:
                exponents = key_logits + factors[:, None]
                rise = first_rise(tl.trans(exponents), frame, inside, ROWS)
                by_products = tl.where(position[:, None] < rise, pairs, 0.0)
            found += product(by_products, key_weights, OPERAND, PRECISION)
            d_logits = slopes * found
            if REPAIRS:
                shown = tl.where(inside[None, :], logits + rows[:, None], -float("inf"))
                for number in range(ROWS):
                    sees = (position >= rise) & (position >= number)
                    exponent = row_of(exponents, number, ROWS)[None, :] + shown
                    exponent = tl.where(sees[:, None], exponent, -float("inf"))
                    terms = tl.exp(at_most(exponent, 0.0))
                    d_logits += terms * column_of(pairs, number, ROWS)[:, None]
        else:
            d_logits = slopes * found
        d_query += product(d_logits, omega, OPERAND, PRECISION)
    gradient += batch * gradient_batch + head * gradient_head
    store_rows(gradient, gradient_row, d_query, start, length, dim, ROWS, DIM, first_row)


@triton.jit
@no_type_check
def key_gradient(
    query, key, value, out_gradient, query_rows, key_rows, shares, high, low, tilts,
    frames, later_frames, later_shares, later_values, d_key, d_key_rows, d_value, risen,
    query_batch, query_head, query_row, key_batch, key_head, key_row,
    value_batch, value_head, value_row, out_batch, out_head, out_row,
    d_key_batch, d_key_head, d_key_row, d_value_batch, d_value_head, d_value_row,
    heads, group, length, states, num_features, dim, value_dim, epsilon, norm,
    IS_CAUSAL: tl.constexpr, REPAIRS: tl.constexpr, KIND: tl.constexpr, PER_HEAD: tl.constexpr,
    OPERAND: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """dk_j = Σ_m dw_jm (ω_m − norm k_j), Σ_m dw_jm, dv_j. A program has a tile of a key head.

    `risen`, REPAIRS: as in `reading.read`, but what is computed again is a whole tile.
    """
    tile = tl.program_id(0)
    start = tile * ROWS
    index = tl.program_id(1).to(tl.int64)
    key_heads = heads // group
    batch, own_key_head = index // key_heads, index % key_heads
    position = tl.arange(0, ROWS)
    key += batch * key_batch + own_key_head * key_head
    keys = load_rows(key, key_row, start, length, dim, ROWS, DIM).to(OPERAND)
    value += batch * value_batch + own_key_head * value_head
    chunk = load_rows(value, value_row, start, length, value_dim, ROWS, VALUE_DIM)
    factors = load_row_factors(key_rows + index * length, start, length, ROWS, KIND)
    if KIND == "exp":
        factors += exponents_of_norms(keys, norm)
    state, own = index, index * PER_HEAD
    if IS_CAUSAL:
        state = index * states + tile
    if REPAIRS:  # noqa: SIM102  # known when the kernel is compiled
        if tl.load(risen + state) == ROWS:
            return

    gradient = tl.zeros([ROWS, DIM], tl.float32)
    of_rows = tl.zeros([ROWS], tl.float32)  # Σ_m dw_jm
    value_gradient = tl.zeros([ROWS, VALUE_DIM], tl.float32)
    for first_feature in range(0, num_features, FEATURES):
        inside = first_feature + tl.arange(0, FEATURES) < num_features
        omega, rest, tilt = load_omega(
            high, low, tilts, own, first_feature, num_features, dim, SPLIT, FEATURES, DIM
        )
        frame, share, sums = load_state(
            later_frames, later_shares, later_values, state, first_feature, num_features,
            value_dim, FEATURES, VALUE_DIM,
        )  # fmt: skip
        logits = projected(keys, omega, rest, tilt, SPLIT, PRECISION)
        found = product(chunk, tl.trans(sums), OPERAND, PRECISION) - share[None, :]
        d_logits = found * slopes_of(logits, factors, frame, inside, epsilon, KIND)
        weights = weights_of(logits, factors, frame, inside, epsilon, KIND)
        value_gradient += product(weights, sums, OPERAND, PRECISION)
        gradient += product(d_logits, omega, OPERAND, PRECISION)
        of_rows += tl.sum(d_logits, axis=1)

    if IS_CAUSAL:
        for member in range(group):
            head = own_key_head * group + member
            vectors = (batch * heads + head) * length
            query_start = query + batch * query_batch + head * query_head
            queries = load_rows(query_start, query_row, start, length, dim, ROWS, DIM).to(OPERAND)
            out_start = out_gradient + batch * out_batch + head * out_head
            d_out = load_rows(out_start, out_row, start, length, value_dim, ROWS, VALUE_DIM)
            rows = load_row_factors(query_rows + vectors, start, length, ROWS, KIND)
            share = tl.load(
                shares + vectors + start + position, mask=start + position < length, other=0.0
            )
            # Transposed, keys by queries: G and P.
            pairs = product(chunk, tl.trans(d_out), OPERAND, PRECISION) - share[None, :]
            pairs = tl.where(position[:, None] <= position[None, :], pairs, 0.0)
            parts = tl.zeros([ROWS, ROWS], tl.float32)
            for first_feature in range(0, num_features, FEATURES):
                features = first_feature + tl.arange(0, FEATURES)
                inside = features < num_features
                omega, rest, tilt = load_omega(
                    high, low, tilts, own, first_feature, num_features, dim, SPLIT, FEATURES, DIM
                )
                frame = tl.load(
                    frames + state * num_features + features, mask=inside, other=-float("inf")
                )
                key_logits = projected(keys, omega, rest, tilt, SPLIT, PRECISION)
                query_logits = projected(queries, omega, rest, tilt, SPLIT, PRECISION)
                weights = weights_of(query_logits, rows, frame, inside, epsilon, KIND)
                key_weights = key_weights_of(key_logits, factors, frame, inside, epsilon, KIND)
                by_products = weights
                if REPAIRS:
                    exponents = key_logits + factors[:, None]
                    rise = first_rise(tl.trans(exponents), frame, inside, ROWS)
                    by_products = tl.where(position[:, None] < rise, weights, 0.0)
                slopes = key_weights
                if KIND != "exp":
                    slopes = slopes_of(key_logits, factors, frame, inside, epsilon, KIND)
                d_logits = slopes * product(pairs, by_products, OPERAND, PRECISION)
                parts += product(key_weights, tl.trans(by_products), OPERAND, PRECISION)
                if REPAIRS:
                    shown = tl.where(inside[None, :], exponents, -float("inf"))
                    for number in range(ROWS):
                        seen = (number >= rise) & (position <= number)
                        exponent = row_of(query_logits + rows[:, None], number, ROWS)
                        exponent = exponent[None, :] + shown
                        exponent = tl.where(seen[:, None], exponent, -float("inf"))
                        terms = tl.exp(at_most(exponent, 0.0))
                        d_logits += terms * column_of(pairs, number, ROWS)[:, None]
                        here = position[None, :] == number
                        parts += tl.where(here, tl.sum(terms, axis=1)[:, None], 0.0)
                gradient += product(d_logits, omega, OPERAND, PRECISION)
                of_rows += tl.sum(d_logits, axis=1)
            parts = tl.where(position[:, None] <= position[None, :], parts, 0.0)
            value_gradient += product(parts, d_out, OPERAND, PRECISION)

    if KIND == "exp":
        gradient -= norm * of_rows[:, None] * keys.to(tl.float32)
    tl.store(
        d_key_rows + index * length + start + position, of_rows, mask=start + position < length
    )
    d_key += batch * d_key_batch + own_key_head * d_key_head
    store_rows(d_key, d_key_row, gradient, start, length, dim, ROWS, DIM)
    d_value += batch * d_value_batch + own_key_head * d_value_head
    store_rows(d_value, d_value_row, value_gradient, start, length, value_dim, ROWS, VALUE_DIM)
