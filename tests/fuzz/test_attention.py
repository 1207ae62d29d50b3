"""Tensors and masks of any size are attended to by the definition, or refused."""

import torch
from cases import FEATURE_MAPS, NONNEGATIVE
from hypothesis import given
from hypothesis import strategies as st
from oracle import attended
from refusals import Refusal, few, outcome

from performers import favor_attention

DIM = 3
MAPS = {name: FEATURE_MAPS[name](DIM, 5) for name in NONNEGATIVE}
# A relative error of the output, where logits are as large as these norms make them.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}

sizes = st.sampled_from([1, 2, 3, 5, 7, 8, 11, 0])


@st.composite
def calls(draw):
    """The arguments of a call, most of which fit each other."""
    batch, key_heads, group = (
        draw(st.integers(0, 2)),
        draw(st.integers(0, 2)),
        draw(st.integers(1, 2)),
    )
    query_length = draw(sizes)
    key_length = query_length if draw(st.integers(0, 3)) else draw(sizes)
    value_dim, dtype = draw(st.integers(0, 3)), draw(st.sampled_from(sorted(CLOSE, key=str)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    norm = draw(st.sampled_from([0.0, 0.3, 1.0, 5.0]))

    def normal(heads, length, dim):
        return torch.randn(batch, heads, length, dim, generator=generator, dtype=dtype)

    mask = None
    if draw(st.booleans()):
        mask = torch.rand(batch, key_length, generator=generator) < draw(
            st.sampled_from([0, 0.6, 1])
        )
    near = {}
    if draw(st.booleans()):
        near = {
            "window_size": draw(st.integers(0, 13)),
            "num_sinks": draw(st.integers(0, 3)),
            "far": draw(st.booleans()),
        }
    return {
        "query": normal(key_heads * group, query_length, DIM) * norm,
        "key": normal(key_heads, key_length, DIM) * norm,
        "value": normal(key_heads, key_length, value_dim),
        "phi": MAPS[draw(st.sampled_from(NONNEGATIVE))],
        "is_causal": draw(st.booleans()),
        "key_padding_mask": mask,
        "scale": draw(st.sampled_from([None, None, 0.5, 2.0])),
        "enable_gqa": draw(st.booleans()) or group == 1,
        "backend": draw(st.sampled_from([None, None, "reference", "chunked", "landmarks"])),
        **near,
    }


@few
@given(calls())
def test_attention_is_that_of_the_definition_or_refused(call):
    found = outcome(lambda: favor_attention(**call))
    if isinstance(found, Refusal):
        return
    words = {name: value for name, value in call.items() if name not in ("enable_gqa", "backend")}
    expected = attended(**words).out
    # A padded query has no place among the blocks of a window, and its output means nothing.
    mask = call["key_padding_mask"]
    real = torch.ones_like(expected, dtype=torch.bool)
    if mask is not None and found.shape[2] == mask.shape[1]:
        real = real & mask[:, None, :, None]
    assert found.shape == expected.shape
    assert found.dtype == call["query"].dtype
    close = CLOSE[found.dtype]
    torch.testing.assert_close(found.double()[real], expected[real], rtol=close, atol=close)


@few
@given(calls(), st.integers(0, 11))
def test_a_sequence_in_two_parts_is_the_whole_or_refused(call, cut):
    call = {**call, "is_causal": True}
    whole = outcome(lambda: favor_attention(**call, return_state=True))
    if isinstance(whole, Refusal):
        return
    sequences = ("query", "key", "value")
    state, parts = None, []
    for part in (slice(None, cut), slice(cut, None)):
        words = {**call, **{name: call[name][:, :, part] for name in sequences}}
        if call["key_padding_mask"] is not None:
            words["key_padding_mask"] = call["key_padding_mask"][:, part]
        out, state = favor_attention(**words, initial_state=state, return_state=True)
        parts.append(out)
    close = CLOSE[whole[0].dtype]
    torch.testing.assert_close(torch.cat(parts, dim=2), whole[0], rtol=close, atol=close)


@few
@given(calls(), st.sampled_from([1e4, 1e17, 1e30, float("inf"), float("nan")]), st.data())
def test_numbers_of_any_size_are_attended_to_and_stay_in_their_sequence(call, number, data):
    """What one sequence holds reaches no other; finite numbers up to 1e4 give finite outputs."""
    name = data.draw(st.sampled_from(["query", "key", "value"]))
    before = outcome(lambda: favor_attention(**call))
    if isinstance(before, Refusal) or not call[name].numel():
        return
    changed = call[name].clone()
    changed[0].flatten()[data.draw(st.integers(0, changed[0].numel() - 1))] = number
    after = favor_attention(**{**call, name: changed})
    assert torch.equal(after[1:], before[1:])
    if number <= 1e4:
        assert after.isfinite().all()
