"""The Synthesizer against its equations."""

import pytest
import torch
from cases import inputs

from performers.baselines import SynthesizerAttention, SynthesizerOptions

every_kind = pytest.mark.parametrize("kind", ["dense", "random", "factorized"])
every_random_kind = pytest.mark.parametrize("kind", ["random", "factorized"])


def made(kind: str, num_heads: int = 6, **options) -> SynthesizerAttention:
    options = SynthesizerOptions(kind, hidden_size=11, rank=2, **options)
    mechanism = SynthesizerAttention(options, dim=5, num_heads=num_heads, max_length=29)
    for tensor in mechanism.parameters():  # biases begin at 0, which hides mistakes
        tensor.data += 0.1
    return mechanism


def scores(mechanism: SynthesizerAttention, query: torch.Tensor) -> torch.Tensor:
    length = query.shape[2]
    if mechanism.options.kind == "random":
        return mechanism.scores[:, :length, :length]
    if mechanism.options.kind == "factorized":
        return (mechanism.left @ mechanism.right.mT)[:, :length, :length]
    hidden = torch.relu(query @ mechanism.up + mechanism.up_bias)
    return (hidden @ mechanism.down + mechanism.down_bias)[..., :length]


@every_kind
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_heads", [1, 6])
def test_the_synthesizer_is_a_softmax_of_scores_without_keys(kind, is_causal, num_heads):
    mechanism = made(kind, num_heads)
    query, key, value = inputs(23)
    expected = scores(mechanism, query)
    if is_causal:
        expected = expected.masked_fill(torch.ones(23, 23).triu(1).bool(), -torch.inf)
    expected = expected.softmax(dim=-1) @ value.repeat_interleave(2, dim=1)
    out = mechanism(query, key, value, is_causal=is_causal)
    torch.testing.assert_close(out, expected)
    assert torch.equal(mechanism(query, -key, value, is_causal=is_causal), out)


@every_random_kind
def test_fixed_scores_are_no_weights_and_are_redrawn(kind):
    fixed, learned = (made(kind, is_learned=is_learned) for is_learned in (False, True))
    assert not list(fixed.parameters())
    assert len(list(learned.parameters())) == len(fixed.own)
    for mechanism in (fixed, learned):
        before = getattr(mechanism, mechanism.own[0]).clone()
        mechanism.redraw()
        assert torch.equal(before, getattr(mechanism, mechanism.own[0])) == (mechanism is learned)


@every_kind
def test_scores_begin_at_size_1(kind):
    options = SynthesizerOptions(kind, hidden_size=101, rank=17)
    mechanism = SynthesizerAttention(options, dim=53, num_heads=3, max_length=211)
    query = torch.randn(2, 3, 211, 53, generator=torch.Generator().manual_seed(1))
    # Half of what a relu lets pass has half the square.
    expected = 0.5**0.5 if kind == "dense" else 1.0
    assert scores(mechanism, query).std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.usefixtures("without_shape_checks")
def test_what_the_synthesizer_cannot_do_is_refused():
    with pytest.raises(ValueError, match=r"scores for 29 positions, got 31\. .*max_position_emb"):
        made("random")(*inputs(31))
    with pytest.raises(ValueError, match=r"scores for 6 heads, got 2\. "):
        made("random")(*inputs(7, heads=2, key_heads=2))
    with pytest.raises(ValueError, match=r"those of a perceptron\. Take kind='random'"):
        SynthesizerOptions(is_learned=False)
    with pytest.raises(ValueError, match=r"unknown kind 'randon'.*Did you mean 'random'"):
        SynthesizerOptions("randon")
