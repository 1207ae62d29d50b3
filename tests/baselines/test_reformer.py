"""The Reformer against its definition, and against the model that transformers ships."""

import pytest
import torch
from cases import inputs
from torch import Tensor
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from performers.baselines import ReformerAttention, ReformerOptions, groups


def by_pairs(mechanism: ReformerAttention, query: Tensor, value: Tensor) -> Tensor:
    """Causal LSH attention, pair by pair: a chunk is of one bucket, and sees the one before."""
    size = mechanism.options.chunk_size
    length = query.shape[2]
    i, j = torch.arange(length)[:, None], torch.arange(length)
    scores = query @ torch.nn.functional.normalize(query, dim=-1).mT
    weights = torch.zeros_like(scores)
    for bucket in mechanism.buckets(query).unbind(dim=2):
        same = bucket[..., :, None] == bucket[..., None, :]
        rank = (same & (j < i)).sum(dim=-1) // size
        near = (rank[..., :, None] - rank[..., None, :]).clamp(min=-1)
        sees = same & (j < i) & (near >= 0) & (near <= 1)
        weights += scores.exp() * sees
    total = weights.sum(dim=-1, keepdim=True)
    return torch.where(total == 0, value, weights @ value / total)


@pytest.mark.parametrize("length", [1, 7, 23, 24])
@pytest.mark.parametrize("num_hashes", [1, 3])
@pytest.mark.parametrize(("chunk_size", "smallest"), [(3, 3), (4, 2), (4, 1), (6, 2)])
def test_causal_lsh_attention_is_that_of_pairs_in_one_bucket(
    length, num_hashes, chunk_size, smallest, monkeypatch
):
    monkeypatch.setattr(groups, "SMALLEST", smallest)  # positions of a block of a chunk
    options = ReformerOptions(num_hashes, 4, chunk_size)
    mechanism = ReformerAttention(options, dim=5, num_heads=6)
    query, _, value = inputs(length, key_heads=6)
    out = mechanism(query, query, value, is_causal=True)
    torch.testing.assert_close(out, by_pairs(mechanism, query, value))


def their_layer(is_decoder: bool, num_hashes: int = 2) -> LSHSelfAttention:
    config = ReformerConfig(
        hidden_size=28,
        num_attention_heads=4,
        attention_head_size=7,
        num_hashes=num_hashes,
        num_buckets=6,
        lsh_attn_chunk_length=4,
        lsh_num_chunks_before=1,
        lsh_num_chunks_after=0,
        lsh_attention_probs_dropout_prob=0.0,
        is_decoder=is_decoder,
        hash_seed=5,
    )
    layer = LSHSelfAttention(config).eval()
    for linear in (layer.query_key, layer.value):
        linear.weight.data *= 5
    return layer


def our_output(layer: LSHSelfAttention, hidden: Tensor, buckets: Tensor, **masks) -> Tensor:
    """Our attention with the weights and the hashes of theirs."""
    options = ReformerOptions(layer.num_hashes, layer.num_buckets, layer.chunk_length)
    ours = ReformerAttention(options, dim=7, num_heads=4)
    ours.buckets = lambda query: buckets
    query, value = (
        linear(hidden).unflatten(-1, (4, 7)).transpose(1, 2)
        for linear in (layer.query_key, layer.value)
    )
    return ours(query, torch.full_like(query, torch.nan), value, **masks).transpose(1, 2).flatten(2)


@torch.no_grad()
@pytest.mark.parametrize("num_hashes", [1, 2, 3])
def test_reformer_attention_is_that_of_transformers_for_equal_weights_and_hashes(num_hashes):
    layer, hidden = their_layer(is_decoder=False, num_hashes=num_hashes), torch.randn(2, 24, 28)
    theirs = layer(hidden)
    assert theirs.buckets.shape == (2, 4, num_hashes, 24)
    buckets = theirs.buckets % layer.num_buckets  # theirs are counted on from round to round
    assert len(buckets.unique()) == 6
    out = our_output(layer, hidden, buckets)
    torch.testing.assert_close(out, theirs.hidden_states, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_causal_reformer_attention_is_that_of_transformers_where_buckets_fill_their_chunks():
    # One bucket of the whole length: its chunks are those of the sequence itself.
    layer, hidden = their_layer(is_decoder=True, num_hashes=1), torch.randn(2, 24, 28)
    buckets = torch.zeros(2, 4, 1, 24, dtype=torch.long)
    theirs = layer(hidden, buckets=buckets)
    out = our_output(layer, hidden, buckets, is_causal=True)
    torch.testing.assert_close(out, theirs.hidden_states, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_hashes_are_the_largest_coordinates_of_rotations_and_their_negatives():
    mechanism = ReformerAttention(ReformerOptions(3, 10, 4), dim=5, num_heads=2)
    query = torch.randn(2, 2, 13, 5)
    rotated = torch.einsum("bhld,hrdk->bhrlk", query, mechanism.rotations)
    buckets = mechanism.buckets(query)
    assert torch.equal(buckets % 5, rotated.abs().argmax(dim=-1))
    largest = rotated.gather(-1, (buckets % 5).unsqueeze(-1)).squeeze(-1)
    assert torch.equal(buckets < 5, largest > 0)
    assert torch.equal(mechanism.buckets(7 * query), buckets)


def test_padded_sequences_attend_as_each_alone():
    mechanism = ReformerAttention(ReformerOptions(2, 4, 3), dim=5, num_heads=6)
    query, key, value = inputs(23)
    mask = torch.rand(2, 23) < 0.6
    for is_causal in (False, True):
        out = mechanism(query, key, value, is_causal=is_causal, key_padding_mask=mask)
        for row, real in enumerate(mask):
            alone = (x[row : row + 1, :, real] for x in (query, key, value))
            expected = mechanism(*alone, is_causal=is_causal)
            torch.testing.assert_close(out[row : row + 1, :, real], expected)


def test_an_odd_number_of_buckets_is_refused():
    with pytest.raises(ValueError, match=r"num_buckets must be even, .* got 7\."):
        ReformerOptions(num_buckets=7)
