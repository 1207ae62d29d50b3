"""Prefixes, chunks and other masks by which each query sees the first so many keys."""

import pytest
import torch
from cases import FEATURE_MAPS, MASKS, NONNEGATIVE, backends, inputs
from oracle import attended

from performers import SharpFeatures, attention_matrix, favor_attention, softmax_attention

LENGTH = 23
PREFIXES = torch.tensor([11, 2])
OWN = torch.arange(1, LENGTH + 1)
PREFIX = torch.maximum(OWN, PREFIXES[:, None])


def chunks(query_length, key_length, size, look_ahead=0):
    """How many keys are seen by the end of each query's chunk, for two sequences."""
    chunk = torch.arange(query_length) // size + 1
    seen = chunk * size * key_length // query_length + look_ahead
    return seen.clamp(max=key_length).expand(2, -1)


# What each query sees, and the number of keys.
STAIRCASES = {
    "chunks": (chunks(LENGTH, LENGTH, 5), LENGTH),
    "chunks that look ahead": (chunks(LENGTH, LENGTH, 5, 3), LENGTH),
    "twice as many keys": (chunks(7, 14, 3), 14),
    "fewer keys": (chunks(LENGTH, 9, 4), 9),
    "any": (torch.randint(0, 14, (2, 11), generator=torch.Generator().manual_seed(1)), 13),
    "no queries": (torch.zeros(2, 0, dtype=torch.int64), 3),
    "no keys": (torch.zeros(2, 3, dtype=torch.int64), 0),
}


def close(found, expected):
    """Equal up to the rounding of float32, also where terms of both signs cancel."""
    error = (found.double() - expected.out).abs() / expected.condition.unsqueeze(-1)
    assert (error <= 3e-5 * expected.out.abs().clamp(min=1)).all()


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.filterwarnings("ignore:features of the kernel", "ignore:trigonometric")
def test_a_prefix_is_seen_whole_and_what_follows_is_causal(name):
    query, key, value = inputs(LENGTH)
    phi = FEATURE_MAPS[name](5, 16)
    for masked in ("no mask", "left", "holes") if name == "positive" else ("left",):
        mask = MASKS[masked](LENGTH)
        expected = attended(query, key, value, phi, False, mask, seen_lengths=PREFIX)
        found = favor_attention(
            query, key, value, phi, True, mask, enable_gqa=True, prefix_lengths=PREFIXES
        )
        close(found, expected)


@pytest.mark.parametrize("name", FEATURE_MAPS)
@pytest.mark.filterwarnings("ignore:features of the kernel", "ignore:trigonometric")
def test_each_query_sees_the_first_so_many_keys(name):
    phi = FEATURE_MAPS[name](5, 16)
    for staircase in STAIRCASES if name == "positive" else ["any"]:
        seen, key_length = STAIRCASES[staircase]
        query, key, value = inputs(seen.shape[1], key_length)
        for masked in ("no mask", "holes"):
            mask = MASKS[masked](key_length)
            expected = attended(query, key, value, phi, False, mask, seen_lengths=seen)
            found = favor_attention(
                query, key, value, phi, False, mask, enable_gqa=True, seen_lengths=seen
            )
            close(found, expected)


@pytest.mark.parametrize("backend", backends("positive", is_causal=True))
def test_every_backend_serves_prefixes_and_staircases(backend):
    phi = FEATURE_MAPS["positive"](5, 16)
    query, key, value = inputs(11)
    seen = chunks(11, 11, 3, 1)
    for is_causal, order in ((True, {"prefix_lengths": PREFIXES}), (False, {"seen_lengths": seen})):
        found, expected = (
            favor_attention(query, key, value, phi, is_causal, enable_gqa=True, backend=by, **order)
            for by in (backend, "chunked")
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("near", [{}, {"num_sinks": 2}, {"far": False}, {"far_limit": 0.3}])
@pytest.mark.parametrize("name", ["positive", "sharp"])
def test_a_prefix_has_a_near_field(name, near):
    query, key, value = inputs(LENGTH)
    phi = FEATURE_MAPS[name](5, 16)
    for masked in ("no mask", "left", "holes"):
        mask = MASKS[masked](LENGTH)
        options = {"window_size": 3, **near}
        expected = attended(query, key, value, phi, False, mask, seen_lengths=PREFIX, **options).out
        found = favor_attention(
            query, key, value, phi, True, mask, enable_gqa=True, prefix_lengths=PREFIXES, **options
        ).double()
        torch.testing.assert_close(found, expected, rtol=3e-5, atol=3e-5)


@pytest.mark.parametrize("masked", ["no mask", "left", "holes", "full"])
def test_exact_attention_sees_the_same(masked):
    mask = MASKS[masked](LENGTH)
    query, key, value = inputs(LENGTH, dtype=torch.float64)
    rows = torch.arange(LENGTH)

    def expected(seen):
        visible = rows < seen[:, None, :, None]
        visible = visible if mask is None else visible & mask[:, None, None]
        weights = (query @ key.repeat_interleave(2, 1).mT / 5**0.5).masked_fill(~visible, -1e300)
        out = weights.softmax(dim=-1) @ value.repeat_interleave(2, 1)
        return out.masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)

    seen = chunks(LENGTH, LENGTH, 5, 3)
    found = softmax_attention(query, key, value, False, mask, enable_gqa=True, seen_lengths=seen)
    torch.testing.assert_close(found, expected(seen))
    found = softmax_attention(
        query, key, value, True, mask, enable_gqa=True, prefix_lengths=PREFIXES
    )
    torch.testing.assert_close(found, expected(PREFIX))


@pytest.mark.parametrize("window_size", [None, 3])
@pytest.mark.parametrize("name", ["positive", "relu", "sharp"])
def test_what_comes_after_the_prefix_changes_no_bit_before_it(name, window_size):
    if window_size and name == "relu":
        pytest.skip("near fields are beside estimates of softmax")
    query, key, value = inputs(LENGTH)
    phi = FEATURE_MAPS[name](5, 16)

    def attend():
        return favor_attention(
            query, key, value, phi, True, enable_gqa=True, window_size=window_size,
            prefix_lengths=PREFIXES,
        )  # fmt: skip

    before = attend()
    for x in (key, value):
        x[0, :, 15:], x[1, :, 6:] = 1e3, -1e3
    after = attend()
    assert torch.equal(before[0, :, :15], after[0, :, :15])
    assert torch.equal(before[1, :, :6], after[1, :, :6])
    value[0, :, 10] += 1  # the last of a prefix, which its first sees
    assert (attend()[0, :, :15] != after[0, :, :15]).any(dim=2).all()


@pytest.mark.parametrize("name", ["positive", "relu", "sharp"])
@pytest.mark.parametrize("staircase", ["chunks that look ahead", "twice as many keys", "any"])
def test_keys_that_a_query_does_not_see_change_no_bit_of_it(name, staircase):
    seen, key_length = STAIRCASES[staircase]
    query, key, value = inputs(seen.shape[1], key_length)
    phi = FEATURE_MAPS[name](5, 16)

    def attend():
        return favor_attention(query, key, value, phi, enable_gqa=True, seen_lengths=seen)

    before, first = attend(), key_length // 2
    for x in (key, value):
        x[:, :, first:] = 1e3
    after = attend()
    is_before = (seen <= first)[:, None].expand(-1, 6, -1)
    assert torch.equal(before[is_before], after[is_before])
    assert (before[~is_before] != after[~is_before]).any(dim=-1).all()


@pytest.mark.parametrize("window_size", [None, 3])
def test_a_sequence_continues_after_its_prefix(window_size):
    query, key, value = inputs(LENGTH)
    phi = FEATURE_MAPS["positive"](5, 16)
    options = {"enable_gqa": True, "window_size": window_size}
    whole = favor_attention(query, key, value, phi, True, prefix_lengths=PREFIXES, **options)
    outputs, state = [], None
    for part in (slice(0, 13), slice(13, 14), slice(14, LENGTH)):
        out, state = favor_attention(
            *(x[:, :, part] for x in (query, key, value)), phi, True, initial_state=state,
            return_state=True, prefix_lengths=PREFIXES if part.start == 0 else None, **options,
        )  # fmt: skip
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=2), whole, rtol=1e-4, atol=1e-5)


def test_chunks_that_arrive_one_by_one_are_the_staircase():
    query, key, value = inputs(LENGTH)
    phi = FEATURE_MAPS["positive"](5, 16)
    seen = chunks(LENGTH, LENGTH, 5)
    whole, last = favor_attention(
        query, key, value, phi, enable_gqa=True, seen_lengths=seen, return_state=True
    )
    outputs, state = [], None
    for part in torch.arange(LENGTH).split(5):
        out, state = favor_attention(
            *(x[:, :, part] for x in (query, key, value)), phi, enable_gqa=True,
            initial_state=state, return_state=True,
            seen_lengths=torch.full((2, len(part)), len(part)),
        )  # fmt: skip
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=2), whole, rtol=1e-4, atol=1e-5)
    for name, part in last.parts().items():
        torch.testing.assert_close(state.parts()[name], part, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["positive", "relu", "sharp"])
@pytest.mark.parametrize("words", ["prefix_lengths", "seen_lengths"])
def test_gradients_are_those_of_the_definition(name, words):
    arguments = [x.requires_grad_() for x in inputs(LENGTH, dtype=torch.float64)]
    phi = FEATURE_MAPS[name](5, 16)
    seen = PREFIX if words == "prefix_lengths" else chunks(LENGTH, LENGTH, 5, 3)
    lengths = PREFIXES if words == "prefix_lengths" else seen
    mask = MASKS["holes"](LENGTH)
    found = favor_attention(
        *arguments, phi, words == "prefix_lengths", mask, enable_gqa=True, **{words: lengths}
    )
    expected = attended(*arguments, phi, False, mask, seen_lengths=seen).out
    direction = torch.randn(found.shape, dtype=found.dtype)
    pairs = (torch.autograd.grad((out * direction).sum(), arguments) for out in (found, expected))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NONNEGATIVE[:2])
def test_the_matrix_that_is_implied_is_0_where_nothing_is_seen(name):
    query, key, _ = inputs(LENGTH)
    phi = FEATURE_MAPS[name](5, 16)
    prefix = attention_matrix(query, key, phi, True, enable_gqa=True, prefix_lengths=PREFIXES)
    seen = torch.arange(LENGTH) < PREFIX[:, None, :, None]
    assert torch.equal(prefix != 0, seen.expand(-1, 6, -1, -1))
    torch.testing.assert_close(prefix.sum(dim=-1), torch.ones(2, 6, LENGTH))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefix_lengths": PREFIXES, "is_causal": False}, "belongs to causal attention"),
        ({"seen_lengths": PREFIX, "is_causal": True}, "pass seen_lengths with is_causal=False"),
        ({"seen_lengths": PREFIX, "prefix_lengths": PREFIXES}, "pass seen_lengths with is_causal"),
        ({"seen_lengths": PREFIX, "window_size": 3}, "a query belongs to no key"),
        ({"seen_lengths": PREFIX + 1}, "from 0 to the number of keys, 23, got 24"),
        ({"seen_lengths": -PREFIX}, "from 0 to the number of keys, 23, got -"),
        ({"seen_lengths": PREFIXES}, r"must be \(batch, query_length\) = \(2, 23\)"),
        ({"seen_lengths": PREFIX.float()}, "of int32 or int64, got torch.float32"),
        ({"seen_lengths": [3]}, "seen_lengths must be a torch.Tensor"),
        ({"seen_lengths": PREFIX.to("meta")}, "must be on the device of key"),
        ({"seen_lengths": PREFIX, "segment_ids": PREFIX}, "packed sequences have no prefixes"),
        ({"prefix_lengths": PREFIX, "is_causal": True}, r"must be \(batch,\) = \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(options, words):
    query, key, value = inputs(LENGTH)
    with pytest.raises((ValueError, TypeError), match=words):
        favor_attention(
            query, key, value, FEATURE_MAPS["positive"](5, 16), enable_gqa=True, **options
        )


@pytest.mark.usefixtures("without_shape_checks")
def test_a_prefix_begins_a_sequence_and_learns_nothing_from_what_follows():
    query, key, value = inputs(LENGTH)
    phi = FEATURE_MAPS["positive"](5, 16)
    call = {"enable_gqa": True, "prefix_lengths": PREFIXES}
    _, state = favor_attention(query, key, value, phi, True, return_state=True, **call)
    with pytest.raises(ValueError, match="a prefix begins a sequence"):
        favor_attention(query, key, value, phi, True, initial_state=state, **call)
    sharp = SharpFeatures(5, 16, num_heads=3, statistics="call")
    for options in ({"is_causal": True, **call}, {"enable_gqa": True, "seen_lengths": PREFIX}):
        with pytest.raises(ValueError, match="statistics"):
            favor_attention(query, key, value, sharp, **options)
