"""Packed sequences are the sequences, one by one: bit for bit, forward and backward."""

import pytest
import torch
from cases import FEATURE_MAPS, backends, inputs

from performers import SharpFeatures, attention_matrix, favor_attention, softmax_attention
from performers.functional import segments

LENGTHS = (7, 1, 13, 2)
IDS = (4, 9, 4, 0)  # not in order, and the first number comes again
TOTAL = sum(LENGTHS)


def packed_ids(rows=1):
    row = torch.repeat_interleave(torch.tensor(IDS), torch.tensor(LENGTHS))
    return torch.stack([row.roll(5 * i) for i in range(rows)])


def pieces_of(ids):
    """Row, begin and end of every segment."""
    found = []
    for row, numbers in enumerate(ids.tolist()):
        begins = [i for i in range(len(numbers)) if i == 0 or numbers[i] != numbers[i - 1]]
        ends = [*begins[1:], len(numbers)]
        found += [(row, begin, end) for begin, end in zip(begins, ends, strict=True)]
    return found


def gradients(attend, query, key, value, weights):
    """The output, and the gradients of its weighted sum."""
    query, key, value = (x.detach().clone().requires_grad_() for x in (query, key, value))
    out = attend(query, key, value)
    return out.detach(), *torch.autograd.grad(out, (query, key, value), weights)


def assert_one_call_per_sequence(attend, query, key, value, ids, mask=None, equal=torch.equal):
    """`attend` takes query, key, value, mask and segment ids."""
    weights = torch.randn(*query.shape[:3], value.shape[-1]).to(query.dtype)
    packed = gradients(lambda *x: attend(*x, mask, ids), query, key, value, weights)
    for row, begin, end in pieces_of(ids):
        at = (slice(row, row + 1), slice(None), slice(begin, end))
        piece = None if mask is None else mask[row : row + 1, begin:end]
        alone = gradients(
            lambda *x, mask=piece: attend(*x, mask, None),
            *(x[at] for x in (query, key, value)),
            weights[at].contiguous(),
        )
        for found, expected in zip(packed, alone, strict=True):
            assert equal(found[at], expected)


def favor(phi, **options):
    def attend(query, key, value, mask, ids):
        return favor_attention(
            query, key, value, phi, key_padding_mask=mask, segment_ids=ids, enable_gqa=True,
            **options,
        )  # fmt: skip

    return attend


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["positive", "hyperbolic", "sharp", "relu"])
def test_packed_sequences_are_one_call_per_sequence_on_every_backend(name, is_causal):
    phi = FEATURE_MAPS[name](5, 11)
    for backend in backends(name, is_causal):
        attend = favor(phi, is_causal=is_causal, backend=backend)
        assert_one_call_per_sequence(attend, *inputs(TOTAL, batch=1), packed_ids())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences_are_one_call_per_sequence_in_every_dtype(dtype, is_causal):
    attend = favor(FEATURE_MAPS["positive"](5, 11), is_causal=is_causal)
    assert_one_call_per_sequence(attend, *inputs(TOTAL, batch=1, dtype=dtype), packed_ids())


@pytest.mark.parametrize("far", [True, False])
@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_and_sinks_begin_anew_with_each_sequence(is_causal, far):
    for backend in backends("sharp", is_causal, has_near_field=True):
        attend = favor(
            FEATURE_MAPS["sharp"](5, 11), is_causal=is_causal, window_size=3, num_sinks=2, far=far,
            backend=backend,
        )  # fmt: skip
        assert_one_call_per_sequence(attend, *inputs(TOTAL, batch=1), packed_ids())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window_size", [None, 3])
def test_padding_within_packed_sequences_is_that_of_each(is_causal, window_size):
    attend = favor(FEATURE_MAPS["positive"](5, 11), is_causal=is_causal, window_size=window_size)
    mask = torch.arange(TOTAL) % torch.tensor([[3], [5]]) != 1
    assert_one_call_per_sequence(attend, *inputs(TOTAL), packed_ids(2), mask)


def test_statistics_of_the_call_are_those_of_each_sequence():
    phi = SharpFeatures(5, 11, num_heads=3, statistics="call")
    assert_one_call_per_sequence(favor(phi), *inputs(TOTAL), packed_ids(2))


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_exact_attention_is_one_call_per_sequence(is_causal):
    def attend(query, key, value, mask, ids):
        return softmax_attention(
            query, key, value, is_causal, mask, enable_gqa=True, segment_ids=ids
        )

    assert_one_call_per_sequence(attend, *inputs(TOTAL), packed_ids(2))


@pytest.mark.parametrize("is_causal", [False, True])
def test_nothing_leaks_from_one_sequence_to_another(is_causal):
    phi = FEATURE_MAPS["positive"](5, 11)
    query, key, value = inputs(TOTAL)
    ids = packed_ids(2)

    def attend(*x):
        return favor_attention(
            *x, phi, is_causal, enable_gqa=True, window_size=3, num_sinks=1, segment_ids=ids
        )

    before = attend(query, key, value)
    begin, end = 8, 21  # the third sequence of the first row
    for x in (query, key, value):
        x[0, :, begin:end] = torch.nan
    after = attend(query, key, value)
    assert after[0, :, begin:end].isnan().all()
    for part in (slice(begin), slice(end, None)):
        assert torch.equal(before[0, :, part], after[0, :, part])
    assert torch.equal(before[1], after[1])


def test_the_implied_matrix_of_packed_sequences_is_block_diagonal():
    query, key, _ = inputs(TOTAL, key_heads=6)
    ids = packed_ids(2)
    matrix = attention_matrix(query, key, FEATURE_MAPS["positive"](5, 11), segment_ids=ids)
    is_together = torch.zeros(2, TOTAL, TOTAL, dtype=torch.bool)
    for row, begin, end in pieces_of(ids):
        is_together[row, begin:end, begin:end] = True
    assert torch.equal(matrix > 0, is_together[:, None].expand_as(matrix))


@pytest.mark.parametrize("is_causal", [False, True])
def test_very_many_sequences_share_calls_and_are_equal_up_to_rounding(is_causal, monkeypatch):
    monkeypatch.setattr(segments, "MOST_CALLS", 3)
    calls = []
    phi = FEATURE_MAPS["relu"](5, 11)
    attend = favor(phi, is_causal=is_causal)

    def counted(query, key, value, key_padding_mask):
        calls.append(len(query))
        return attend(query, key, value, key_padding_mask, None)

    segments.attend_by_segment(counted, packed_ids(2), *inputs(TOTAL), None)
    lengths = sorted(end - begin for _, begin, end in pieces_of(packed_ids(2)))
    assert sorted(calls) == sorted(lengths.count(length) for length in set(lengths))

    def equal(found, expected):
        torch.testing.assert_close(found, expected)
        return True

    mask = torch.arange(TOTAL) % torch.tensor([[3], [5]]) != 1
    assert_one_call_per_sequence(attend, *inputs(TOTAL), packed_ids(2), mask, equal)


def test_ten_thousand_sequences_are_few_calls():
    lengths = torch.arange(1, 200).tolist() * 2 + [1] * 10_000
    assert len(segments._calls(lengths)) <= (2 * sum(lengths)) ** 0.5


def test_no_tokens_are_no_sequences():
    query, key, value = inputs(0)
    ids = torch.zeros(2, 0, dtype=torch.int64)
    phi = FEATURE_MAPS["positive"](5, 11)
    out = favor_attention(query, key, value, phi, enable_gqa=True, segment_ids=ids)
    assert out.shape == (2, 6, 0, 7)


def test_second_derivatives_and_per_sample_gradients_pass_through():
    phi = FEATURE_MAPS["positive"](5, 11)
    query, key, value = inputs(9, batch=1, key_heads=6, dtype=torch.float64)
    ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2]])

    def loss(query, ids=ids):
        out = favor_attention(query, key, value, phi, is_causal=True, segment_ids=ids)
        return out.square().sum()

    def alone(query):
        bounds = (slice(4), slice(4, 7), slice(7, 9))
        return sum(
            favor_attention(*(x[:, :, at] for x in (query, key, value)), phi, is_causal=True)
            .square()
            .sum()
            for at in bounds
        )

    tangent = torch.randn_like(query)
    torch.testing.assert_close(
        torch.func.jvp(loss, (query,), (tangent,)), torch.func.jvp(alone, (query,), (tangent,))
    )
    samples = torch.randn(2, *query.shape, dtype=torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(loss))(samples)
    expected = torch.stack([torch.func.grad(alone)(sample) for sample in samples])
    torch.testing.assert_close(per_sample, expected)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"segment_ids": torch.zeros(2, 8)}, TypeError, "must be whole numbers, one for each"),
        (
            {"segment_ids": torch.tensor([0, 3, 8])},
            ValueError,
            r"\(batch, length\) = \(2, 8\), got \(3,\).*repeat_interleave",
        ),
        ({"query": torch.randn(2, 3, 5, 4)}, ValueError, "query length is 5, key length is 8"),
        ({"return_state": True}, ValueError, "a state belongs to one sequence"),
    ],
)
def test_segment_ids_that_fit_nothing_are_refused(changes, error, words):
    phi = FEATURE_MAPS["positive"](4, 11)
    query, key, value = torch.randn(3, 2, 3, 8, 4).unbind()
    arguments = {"query": query, "segment_ids": torch.zeros(2, 8, dtype=torch.int64)} | changes
    with pytest.raises(error, match=words):
        favor_attention(key=key, value=value, phi=phi, **arguments)


@pytest.mark.usefixtures("without_shape_checks")
def test_a_compiled_graph_breaks_at_packed_sequences_and_a_full_one_is_refused_by_name():
    phi = FEATURE_MAPS["positive"](5, 11)
    query, key, value = inputs(TOTAL, key_heads=6)
    ids = packed_ids(2)

    def attend(query):
        return 2 * favor_attention(2 * query, key, value, phi, is_causal=True, segment_ids=ids)

    broken = torch.compile(attend, backend="eager")
    assert torch.equal(broken(query), attend(query))
    whole = torch.compile(lambda x: attend(x), backend="eager", fullgraph=True)  # its own code
    with pytest.raises(Exception, match="depends on the numbers in segment_ids"):
        whole(query)
