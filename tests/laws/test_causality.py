"""Strict causality: not even rounding depends on what comes later."""

import pytest
import torch
from cases import FEATURE_MAPS, MASKS, NORMS, backends, inputs

from performers import SoftmaxFeatures, favor_attention

every_backend = pytest.mark.parametrize("backend", backends(is_causal=True))


@every_backend
@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.parametrize("norms", ["growing", "huge then tiny"])
def test_later_keys_and_values_leave_earlier_outputs_bit_identical(norms, name, backend):
    phi = FEATURE_MAPS[name](5, 11)
    query, key, value = inputs(norms=norms)
    before = favor_attention(query, key, value, phi, True, enable_gqa=True, backend=backend)
    for position in (1, 7, 8, 22):
        for factor in (0.0, 1e4):
            later = [x.clone() for x in (query, key, value)]
            for x in later:
                x[:, :, position:] = factor * torch.randn_like(x[:, :, position:])
            after = favor_attention(*later, phi, True, enable_gqa=True, backend=backend)
            assert torch.equal(before[:, :, :position], after[:, :, :position])


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("positive", torch.nan), ("positive", torch.inf), ("relu", torch.nan),
        ("exp", torch.nan), ("near field", torch.inf),
    ],
)  # fmt: skip
def test_a_later_value_that_is_not_finite_stays_in_its_chunk_and_column(name, number):
    """Its weight is 0 for earlier rows of the chunk, and 0 · NaN is NaN."""
    window = {"window_size": 32, "num_sinks": 2} if name == "near field" else {}
    chunk = window.get("window_size", 128)
    phi = FEATURE_MAPS["positive" if window else name](5, 11)
    query, key, value = inputs(300)
    before = favor_attention(query, key, value, phi, True, enable_gqa=True, **window)
    position, column = 270, 3
    first = position // chunk * chunk
    for x in (key, value):
        kept, x[0, 1, position, column] = x[0, 1, position, column].clone(), number
        after = favor_attention(query, key, value, phi, True, enable_gqa=True, **window)
        changed = after != before
        x[0, 1, position, column] = kept
        assert changed[0, 2:4, position].any(dim=-1).all()
        changed[0, 2:4, position:] = False
        if x is value:
            changed[0, 2:4, first:, column] = False
        assert not changed.any()
    value[0, 1, position, column] = number
    state, last = None, []
    for start, stop in ((0, first), *((i, i + 1) for i in range(first, position))):
        rows = (x[:, :, start:stop] for x in (query, key, value))
        out, state = favor_attention(
            *rows, phi, True, enable_gqa=True, initial_state=state, return_state=True, **window
        )
        last.append(out)
    assert torch.cat(last, dim=2).isfinite().all()


@every_backend
def test_a_longer_sequence_begins_as_the_shorter_one(backend):
    phi = SoftmaxFeatures(5, 11)
    for norms in ("1", "10"):
        query, key, value = inputs(norms=norms)
        whole = favor_attention(query, key, value, phi, True, enable_gqa=True, backend=backend)
        start = [x[:, :, :16] for x in (query, key, value)]
        part = favor_attention(*start, phi, True, enable_gqa=True, backend=backend)
        torch.testing.assert_close(whole[:, :, :16], part, rtol=1e-5, atol=1e-6)


@every_backend
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_no_gradient_flows_back_to_later_positions(name, backend):
    tensors = [x.requires_grad_() for x in inputs()]
    out = favor_attention(
        *tensors, FEATURE_MAPS[name](5, 11), True, enable_gqa=True, backend=backend
    )
    position = 11
    out[:, :, : position + 1].sum().backward()
    for x in tensors:
        assert x.grad[:, :, position + 1 :].eq(0).all()
        assert x.grad[:, :, : position + 1].ne(0).any()


@every_backend
def test_neighbors_in_the_batch_do_not_matter(backend):
    # Heads go through a chunk at their own pace; one that needs many passes must not touch others.
    phi = SoftmaxFeatures(5, 11)
    query, key, value = inputs(batch=3, norms="1")
    query[1], key[1] = query[1] * 1e3, key[1] * 1e3
    mask = MASKS["holes"](23)[[0, 1, 0]]
    out = favor_attention(query, key, value, phi, True, mask, enable_gqa=True, backend=backend)
    for row in range(3):
        alone = [x[row : row + 1] for x in (query, key, value)]
        one = favor_attention(
            *alone, phi, True, mask[row : row + 1], enable_gqa=True, backend=backend
        )
        torch.testing.assert_close(one, out[row : row + 1], rtol=1e-6, atol=1e-6)


@every_backend
def test_the_first_position_returns_its_own_value(backend):
    for norms in NORMS:
        query, key, value = inputs(norms=norms, key_heads=6)
        out = favor_attention(query, key, value, SoftmaxFeatures(5, 11), True, backend=backend)
        torch.testing.assert_close(out[:, :, 0], value[:, :, 0], rtol=1e-6, atol=0)
