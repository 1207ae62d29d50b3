"""Clusters, how they are learned, and attention within them."""

import pytest
import torch
from cases import inputs
from torch import Tensor
from torch.nn import functional as F

from performers import SoftmaxFeatures, favor_attention
from performers.baselines import (
    ClusteredFavor,
    ClusteredFavorOptions,
    RoutingAttention,
    RoutingOptions,
    groups,
)
from performers.baselines.clusters import ClusterOptions, Clusters
from performers.models import PerformerConfig, PerformerForMaskedLM


def nearest(clusters: Clusters, key: Tensor) -> Tensor:
    return torch.einsum("bhld,hcd->bhlc", key, clusters.centroids).argmax(dim=-1)


def by_pairs(query: Tensor, key: Tensor, value: Tensor, sees: Tensor) -> Tensor:
    """softmax over the pairs that are seen, [batch, key_heads, length, length]."""
    key, value, sees = (x.repeat_interleave(2, dim=1) for x in (key, value, sees))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.masked_fill(~sees, -torch.inf).softmax(dim=-1) @ value


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("chunk_size", "smallest"), [(1, 1), (3, 3), (4, 1), (6, 2), (29, 29)])
def test_routing_attends_to_the_chunks_beside_in_the_own_cluster(
    is_causal, chunk_size, smallest, monkeypatch
):
    monkeypatch.setattr(groups, "SMALLEST", smallest)  # positions of a block of a chunk
    mechanism = RoutingAttention(RoutingOptions(4, chunk_size=chunk_size), dim=5, num_heads=3)
    query, key, value = inputs(23)
    cluster = nearest(mechanism.clusters, key)
    same = cluster[..., :, None] == cluster[..., None, :]
    i, j = torch.arange(23)[:, None], torch.arange(23)
    chunk = (same & (j < i)).sum(dim=-1) // chunk_size
    sees = same & ((chunk[..., :, None] - chunk[..., None, :]).abs() <= 1)
    if is_causal:
        sees = sees & (j <= i)
    out = mechanism(query, key, value, is_causal=is_causal)
    torch.testing.assert_close(out, by_pairs(query, key, value, sees))


@pytest.mark.parametrize(("chunk_size", "block_size"), [(64, 32), (96, 48), (80, 40), (40, 40)])
def test_each_group_leaves_less_than_a_block_empty(chunk_size, block_size):
    group = torch.randint(5, (2, 3, 499))
    places, blocks = groups.group_by_group(group, 5, chunk_size, before=1, after=0)
    assert blocks.size == block_size
    at = places.place // block_size
    for of_sequence, number in zip(group.flatten(0, 1), at.flatten(0, 1), strict=True):
        used = {int(block): int(member) for block, member in zip(number, of_sequence, strict=True)}
        assert [used[int(n)] for n in number] == of_sequence.tolist()  # one group in a block
        members = torch.bincount(of_sequence, minlength=5)
        assert len(used) == sum(-(-int(count) // block_size) for count in members)


@pytest.mark.parametrize("is_causal", [False, True])
def test_clustered_favor_is_favor_over_the_pairs_of_one_cluster(is_causal):
    phi = SoftmaxFeatures(5, 11)
    mechanism = ClusteredFavor(phi, ClusteredFavorOptions(4), dim=5, num_heads=3)
    query, key, value = inputs(23)
    cluster = nearest(mechanism.clusters, key)
    sees = cluster[..., :, None] == cluster[..., None, :]
    if is_causal:
        sees = sees.tril()
    of_query, of_key = (phi.query_features(x * 5**-0.25).dense() for x in (query, key))
    of_key, value_, sees = (x.repeat_interleave(2, dim=1) for x in (of_key, value, sees))
    weights = (of_query @ of_key.mT) * sees
    expected = weights @ value_ / weights.sum(dim=-1, keepdim=True)
    out = mechanism(query, key, value, is_causal=is_causal)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_one_cluster_is_favor_itself():
    phi = SoftmaxFeatures(5, 11)
    query, key, value = inputs(23)
    mask = torch.rand(2, 23) < 0.7
    out = ClusteredFavor(phi, ClusteredFavorOptions(1), dim=5)(
        query, key, value, key_padding_mask=mask
    )
    expected = favor_attention(query, key, value, phi, key_padding_mask=mask, enable_gqa=True)
    real = mask[:, None, :, None].expand_as(out)
    torch.testing.assert_close(out[real], expected[real])


def test_centroids_follow_the_mean_of_their_keys_once_per_backward_pass():
    mechanism = RoutingAttention(RoutingOptions(4, decay=0.7), dim=5, num_heads=3)
    clusters = mechanism.clusters
    before = clusters.centroids.clone()
    query, key, value = (x.requires_grad_() for x in inputs(23))
    mask = torch.rand(2, 23) < 0.7
    out = mechanism(query, key, value, key_padding_mask=mask)
    assert torch.equal(clusters.centroids, before)
    cluster = nearest(clusters, key)
    out.sum().backward()
    for head in range(3):
        for number in range(4):
            members = key[:, head][(cluster[:, head] == number) & mask]
            expected = before[head, number]
            if len(members):
                mean = F.normalize(members, dim=-1).mean(dim=0)
                expected = F.normalize(0.7 * expected + 0.3 * mean, dim=-1)
            torch.testing.assert_close(clusters.centroids[head, number], expected)


def test_evaluation_leaves_centroids_alone():
    mechanism = RoutingAttention(RoutingOptions(4, decay=0.5), dim=5, num_heads=3)
    before = mechanism.clusters.centroids.clone()
    query, key, value = (x.requires_grad_() for x in inputs(23))
    mechanism.eval()(query, key, value).sum().backward()
    with torch.no_grad():
        mechanism.train()(query, key, value)
    assert torch.equal(mechanism.clusters.centroids, before)


def test_centroids_find_the_directions_that_keys_have():
    torch.manual_seed(5)
    directions = F.normalize(torch.randn(3, 7), dim=-1)
    clusters = Clusters(ClusterOptions(3, decay=0.5), dim=7).train()
    clusters.centroids.copy_(F.normalize(directions + 0.3 * torch.randn(3, 7), dim=-1))
    count = torch.tensor([[64]])
    for _ in range(20):
        key = directions[torch.randint(3, (64,))] * torch.rand(64, 1) + 0.02 * torch.randn(64, 7)
        key = key[None, None].requires_grad_()
        cluster = clusters.of(key, count)
        out = key.sum(dim=-1)
        clusters.follow(out, key, cluster)
        out.sum().backward()
    assert ((clusters.centroids[0] * directions).sum(dim=-1) > 0.98).all()


def centroids(model: PerformerForMaskedLM) -> list[Tensor]:
    return [layer.attention.mechanism.clusters.centroids for layer in model.performer.layers]


@pytest.mark.parametrize("attention", ["routing-transformer", "clustered-favor"])
def test_learned_centroids_are_saved_and_checkpointing_moves_them_once(tmp_path, attention):
    moved = []
    for is_checkpointing in (False, True):
        torch.manual_seed(3)
        config = PerformerConfig(
            attention=attention,
            attention_options={"num_clusters": 2, "decay": 0.5},
            hidden_size=24,
            num_attention_heads=3,
            num_hidden_layers=2,
            hidden_dropout_prob=0.0,
        )
        model = PerformerForMaskedLM(config).train()
        drawn = [x.clone() for x in centroids(model)]
        if is_checkpointing:
            model.activation_checkpointing_enable()
        tokens = torch.randint(31, (2, 11), generator=torch.Generator().manual_seed(1))
        model(tokens, labels=tokens).loss.backward()
        assert not any(map(torch.equal, centroids(model), drawn))
        moved.append(centroids(model))
    assert all(map(torch.equal, *moved))
    model.redraw_features()
    assert all(map(torch.equal, *moved))
    model.save_pretrained(tmp_path)
    again = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, centroids(again), moved[1]))


@pytest.mark.usefixtures("without_shape_checks")
def test_clusters_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="num_clusters must be a whole number of at least 1"):
        RoutingOptions(0)
    with pytest.raises(ValueError, match="chunk_size must be a whole number of at least 1"):
        RoutingOptions(chunk_size=0)
    with pytest.raises(ValueError, match=r"decay must be from 0 to 1, got 1\.5"):
        ClusterOptions(decay=1.5)
    for features, words in (("sharp", "do not depend on the sequence"), ("posi", "Did you mean")):
        with pytest.raises(ValueError, match=words):
            PerformerConfig(attention="clustered-favor", attention_options={"features": features})
