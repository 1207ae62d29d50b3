"""The kernel of one decoding step: a state absorbs one key and is read by its queries."""

from typing import no_type_check

import triton
import triton.language as tl

from performers.backends.triton.tiles import finite, load_rows, load_state, store_rows, value_of


@triton.jit
@no_type_check
def step(
    query, key, value, key_rows, omega, tilts, frames, normalizers, values,
    next_frames, next_normalizers, next_values, out, totals,
    query_batch, query_head, key_batch, key_head, value_batch, value_head, out_batch, out_head,
    heads, group, num_features, dim, value_dim, epsilon, norm,
    KIND: tl.constexpr, PER_HEAD: tl.constexpr,
    FEATURES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """The state with this token, and this token's output from it, all in float32.

    A program has one head of one stream. Heads that share a key head each compute the state again;
    the first of them stores it.
    """
    index = tl.program_id(0).to(tl.int64)
    batch, head = index // heads, index % heads
    own_key_head, key_heads = head // group, heads // group
    state = batch * key_heads + own_key_head
    own = state * PER_HEAD * num_features
    columns, value_columns = tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    query += batch * query_batch + head * query_head
    key += batch * key_batch + own_key_head * key_head
    value += batch * value_batch + own_key_head * value_head
    out += batch * out_batch + head * out_head
    q = tl.load(query + columns, mask=columns < dim, other=0.0).to(tl.float32)
    k = tl.load(key + columns, mask=columns < dim, other=0.0).to(tl.float32)
    v = tl.load(value + value_columns, mask=value_columns < value_dim, other=0.0).to(tl.float32)
    factor = tl.load(key_rows + state)
    if KIND == "exp":
        factor -= 0.5 * norm * tl.sum(k * k, axis=0)

    row_frame = tl.full([], -float("inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    result = tl.zeros([VALUE_DIM], tl.float32)
    for first_feature in range(0, num_features, FEATURES):
        features = first_feature + tl.arange(0, FEATURES)
        inside = features < num_features
        directions = load_rows(
            omega + own * dim, dim, first_feature, num_features, dim, FEATURES, DIM
        )
        tilt = tl.load(tilts + own + features, mask=inside, other=0.0)
        frame, normalizer, sums = load_state(
            frames, normalizers, values, state, first_feature, num_features, value_dim,
            FEATURES, VALUE_DIM,
        )  # fmt: skip
        key_logits = tl.sum(directions * k[None, :], axis=1) + tilt
        logits = tl.sum(directions * q[None, :], axis=1) + tilt
        if KIND == "exp":
            exponent = tl.where(inside, key_logits + factor, -float("inf"))
            grown = tl.maximum(frame, exponent)
            decay = tl.exp(frame - finite(grown))
            weight = tl.exp(exponent - finite(grown))
            frame = grown
            normalizer *= decay
            sums *= decay[:, None]
        else:
            weight = tl.where(inside, value_of(key_logits, epsilon, KIND) * factor, 0.0)
        normalizer += weight
        sums += weight[:, None] * v[None, :]
        if head % group == 0:
            start = state * num_features
            tl.store(next_frames + start + features, frame, mask=inside)
            tl.store(next_normalizers + start + features, normalizer, mask=inside)
            store_rows(
                next_values + start * value_dim, value_dim, sums, first_feature, num_features,
                value_dim, FEATURES, VALUE_DIM,
            )  # fmt: skip
        if KIND == "exp":
            exponent = logits + frame
            grown_row = tl.maximum(row_frame, tl.max(exponent, axis=0))
            row_decay = tl.exp(row_frame - finite(grown_row))
            total *= row_decay
            result *= row_decay
            row_frame = grown_row
            weight = tl.exp(exponent - finite(row_frame))
        else:
            weight = value_of(logits, epsilon, KIND)
        total += tl.sum(weight * normalizer, axis=0)
        result += tl.sum(weight[:, None] * sums, axis=0)
    result /= tl.where(total == 0, 1.0, total)
    tl.store(out + value_columns, result.to(out.dtype.element_ty), mask=value_columns < value_dim)
    if KIND == "exp":
        total = tl.where(total == 0, -float("inf"), tl.log(total) + row_frame)
    tl.store(totals + index, total)
