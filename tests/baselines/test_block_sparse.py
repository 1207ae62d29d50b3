"""Sparse mechanisms against a matrix of all pairs, and against the models of transformers."""

import copy
import math

import numpy as np
import pytest
import torch
from cases import inputs
from torch import Tensor
from torch.nn.attention import flex_attention
from transformers import BigBirdConfig, LongformerConfig
from transformers.models.big_bird.modeling_big_bird import (
    BigBirdBlockSparseAttention,
    BigBirdModel,
)
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from performers.baselines import (
    BigBirdAttention,
    BigBirdOptions,
    LocalAttention,
    LocalOptions,
    LongformerAttention,
    LongformerOptions,
    ReformerAttention,
    ReformerOptions,
    RoutingAttention,
    RoutingOptions,
    SparseOptions,
    SparseTransformerAttention,
    block_sparse,
)


def big_bird_sees(mechanism: BigBirdAttention, length: int, is_causal: bool) -> Tensor:
    size = mechanism.options.block_size
    number = math.ceil(length / size)
    drawn = mechanism.random_blocks(number, torch.tensor([[number]]), is_causal)[0, 0]
    block = torch.arange(length) // size
    i, j = block[:, None], block
    sees = ((i - j).abs() <= 1) | (j == 0) | (drawn[block][:, :, None] == j).any(dim=1)
    return sees if is_causal else sees | (j == number - 1) | (i == 0) | (i == number - 1)


# A mechanism, and which pairs it scores, for positions i and j of queries and keys.
PATTERNS = {
    "local": (
        LocalAttention(LocalOptions(3)),
        lambda i, j: (i - j).abs() <= 3,
    ),
    "strided": (
        SparseTransformerAttention(SparseOptions("strided", stride=4)),
        lambda i, j: ((i - j).abs() <= 4) | ((i - j) % 4 == 0),
    ),
    "fixed": (
        SparseTransformerAttention(SparseOptions("fixed", stride=4, num_summaries=2)),
        lambda i, j: (i // 4 == j // 4) | (j % 4 >= 2),
    ),
    "Longformer": (
        LongformerAttention(LongformerOptions(window_size=3, num_global=5)),
        lambda i, j: ((i - j).abs() <= 3) | (j < 5) | (i < 5),
    ),
    "Big Bird": (BigBirdAttention(BigBirdOptions(3, num_random_blocks=2), max_length=12), None),
}
every_pattern = pytest.mark.parametrize(("mechanism", "pattern"), PATTERNS.values(), ids=PATTERNS)


def by_all_pairs(query: Tensor, key: Tensor, value: Tensor, sees: Tensor) -> Tensor:
    """softmax over the pairs that are seen, with a matrix of all of them."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.masked_fill(~sees, -torch.inf).softmax(dim=-1) @ value


@every_pattern
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 23, 24])
def test_a_gather_of_blocks_is_the_softmax_over_the_pairs_of_the_pattern(
    mechanism, pattern, is_causal, length
):
    query, key, value = inputs(length)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    sees = pattern(i, j) if pattern else big_bird_sees(mechanism, length, is_causal)
    if is_causal:
        sees = sees & (j <= i)
    out = mechanism(query, key, value, is_causal=is_causal)
    torch.testing.assert_close(out, by_all_pairs(query, key, value, sees))


@every_pattern
@pytest.mark.parametrize("is_causal", [False, True])
def test_sparse_attention_of_padded_sequences_is_that_of_each_alone(mechanism, pattern, is_causal):
    query, key, value = inputs(23)
    mask = torch.rand(2, 23) < 0.6
    out = mechanism(query, key, value, is_causal=is_causal, key_padding_mask=mask)
    for row, real in enumerate(mask):
        alone = (x[row : row + 1, :, real] for x in (query, key, value))
        torch.testing.assert_close(
            out[row : row + 1, :, real], mechanism(*alone, is_causal=is_causal)
        )
        assert out[row, :, ~real].eq(0).all()


@every_pattern
def test_gradients_of_sparse_attention_are_those_of_all_pairs(mechanism, pattern):
    tensors = [x.double().requires_grad_() for x in inputs(13, batch=1)]
    i, j = torch.arange(13)[:, None], torch.arange(13)
    sees = pattern(i, j) if pattern else big_bird_sees(mechanism, 13, False)
    weights = torch.randn(1, 6, 13, 7, dtype=torch.double)
    gradients, expected = (
        torch.autograd.grad((out * weights).sum(), tensors)
        for out in (mechanism(*tensors), by_all_pairs(*tensors, sees))
    )
    torch.testing.assert_close(gradients, expected)


# More of what attends to blocks: blocks of each head's own, in an order of its own.
IN_GROUPS = {
    "Reformer": ReformerAttention(ReformerOptions(chunk_size=4, num_buckets=4), dim=5, num_heads=6),
    "routing": RoutingAttention(RoutingOptions(num_clusters=3, chunk_size=4), dim=5, num_heads=3),
}
WITH_BLOCKS = {name: mechanism for name, (mechanism, _) in PATTERNS.items()} | IN_GROUPS


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("tile", [1, 12, 24])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mechanism", WITH_BLOCKS.values(), ids=WITH_BLOCKS)
def test_flex_attention_and_its_gradients_are_those_of_gathered_blocks(
    mechanism, is_causal, tile, monkeypatch
):
    tensors = [x.double().requires_grad_() for x in inputs(23)]
    mask = torch.rand(2, 23) < 0.7
    weights = torch.randn(2, 6, 23, 7, dtype=torch.double)

    def found() -> list[Tensor]:
        out = mechanism(*tensors, is_causal=is_causal, key_padding_mask=mask)
        gradients = torch.autograd.grad((out * weights).sum(), tensors, allow_unused=True)
        return [out, *(x for x in gradients if x is not None)]

    expected = found()
    masks = []

    def uncompiled(query, *arguments, **options):
        masks.append(options["block_mask"])
        return flex_attention.flex_attention(query, *arguments, **options)

    # What is here runs on CUDA devices, where it is compiled. Uncompiled it is PyTorch's own
    # reference, with gradients on every device once nothing asks for the device.
    monkeypatch.setattr(block_sparse, "_has_flex_attention", lambda *call: True)
    monkeypatch.setattr(block_sparse, "compiled_flex_attention", lambda: uncompiled)
    monkeypatch.setattr(block_sparse, "TILE", tile)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    # torch 2.8 has no such switch: there the reference is traced, as it is where it is compiled.
    switch = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    monkeypatch.setattr(flex_attention, switch, True, raising=False)
    torch.testing.assert_close(found(), expected)
    assert masks
    for blocks in masks:  # which the reference does not read
        (batch, heads), length = blocks.kv_indices.shape[:2], blocks.seq_lengths[0]
        every = (torch.arange(size) for size in (batch, heads, length, length))
        sees = blocks.mask_mod(*torch.meshgrid(*every, indexing="ij"))
        listed = blocks.to_dense().bool().repeat_interleave(tile, 2).repeat_interleave(tile, 3)
        assert not (sees & ~listed[:, :, :length, :length]).any()
        assert tile > 1 or not listed.all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flex_attention trains on CUDA devices")
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "mechanism",
    [
        LocalAttention(LocalOptions(64)),
        LongformerAttention(LongformerOptions(window_size=32, num_global=3)),
        BigBirdAttention(BigBirdOptions(block_size=128), max_length=1024),
        ReformerAttention(ReformerOptions(chunk_size=64, num_buckets=4), dim=20, num_heads=6),
    ],
)
def test_on_a_gpu_blocks_are_read_where_they_lie_to_the_same_output_and_gradients(
    mechanism, is_causal
):
    mask = torch.rand(2, 700) < 0.9
    weights = torch.randn(2, 6, 700, 24)
    drawn = inputs(700, dim=20, value_dim=24)

    def found(device: str) -> list[Tensor]:
        tensors = [x.to(device).requires_grad_() for x in drawn]
        on_device = copy.deepcopy(mechanism).to(device)
        out = on_device(*tensors, is_causal=is_causal, key_padding_mask=mask.to(device))
        loss = (out * weights.to(device)).sum()
        gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        return [out.cpu(), *(x.cpu() for x in gradients if x is not None)]

    torch.testing.assert_close(found("cuda"), found("cpu"), rtol=1e-4, atol=1e-4)


def heads_of(layer: torch.nn.Module, hidden: Tensor, *names: str) -> list[Tensor]:
    """What its projections make of hidden states, [batch, heads, length, dim], for four heads."""
    return [getattr(layer, name)(hidden).unflatten(-1, (4, -1)).transpose(1, 2) for name in names]


@torch.no_grad()
def test_longformer_attention_is_that_of_transformers_for_equal_weights():
    config = LongformerConfig(
        hidden_size=28, num_attention_heads=4, attention_window=[6], num_hidden_layers=1
    )
    theirs = LongformerSelfAttention(config, 0).eval()
    for name in ("query", "key", "value"):
        getattr(theirs, name).weight.mul_(5)
        getattr(theirs, f"{name}_global").load_state_dict(getattr(theirs, name).state_dict())
    hidden, mask = torch.randn(2, 24, 28), torch.ones(2, 24, dtype=torch.bool)
    mask[1, 19:] = False
    is_global = torch.arange(24) < 2
    expected, *_ = theirs(
        hidden,
        attention_mask=torch.where(is_global, 10000.0, torch.where(mask, 0.0, -10000.0)),
        is_index_masked=~mask,
        is_index_global_attn=is_global.expand(2, -1),
        is_global_attn=True,
    )
    ours = LongformerAttention(LongformerOptions(window_size=3, num_global=2))
    out = ours(*heads_of(theirs, hidden, "query", "key", "value"), key_padding_mask=mask)
    out = out.transpose(1, 2).flatten(2)
    torch.testing.assert_close(out[mask], expected[mask], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_big_bird_attention_is_that_of_transformers_for_equal_weights(monkeypatch):
    config = BigBirdConfig(
        hidden_size=28,
        num_attention_heads=4,
        block_size=4,
        num_random_blocks=2,
        max_position_embeddings=64,
        attention_probs_dropout_prob=0.0,
    )
    theirs = BigBirdBlockSparseAttention(config, seed=3)  # in training, where it draws blocks
    for name in ("query", "key", "value"):
        getattr(theirs, name).weight.mul_(5)
    drawn = []

    def remember(*arguments, **options):
        blocks = BigBirdBlockSparseAttention._bigbird_block_rand_mask_with_head(
            theirs, *arguments, **options
        )
        drawn.append(torch.tensor(np.stack(blocks)))
        return blocks

    monkeypatch.setattr(theirs, "_bigbird_block_rand_mask_with_head", remember)
    hidden, mask = torch.randn(2, 48, 28), torch.ones(2, 48)
    mask[1, 46:] = 0  # in the last block, which stays the last with a real token
    blocked, band, of_query, of_key = BigBirdModel.create_masks_for_block_sparse_attn(mask, 4)
    expected, *_ = theirs(hidden, band, of_query, of_key, blocked, blocked)

    ours = BigBirdAttention(BigBirdOptions(block_size=4, num_random_blocks=2), num_heads=4)

    def same_blocks(num_blocks, number, is_causal):
        # Theirs are of the blocks between the first and the last, which see everything.
        return torch.nn.functional.pad(drawn[0], (0, 0, 1, 1)).expand(2, -1, -1, -1)

    monkeypatch.setattr(ours, "random_blocks", same_blocks)
    out = ours(
        *heads_of(theirs, hidden, "query", "key", "value"), key_padding_mask=mask.bool()
    ).transpose(1, 2)
    real = mask.bool()
    torch.testing.assert_close(out.flatten(2)[real], expected[real], rtol=1e-4, atol=1e-4)


def test_big_bird_draws_by_seed_layer_and_head_and_again_when_asked():
    def draws(**words) -> Tensor:
        return BigBirdAttention(num_heads=3, **words).draws

    assert torch.equal(draws(seed=1, layer=2), draws(seed=1, layer=2))
    assert not torch.equal(draws(seed=1, layer=2), draws(seed=1, layer=3))
    assert not torch.equal(draws()[0], draws()[1])
    mechanism = BigBirdAttention(num_heads=3)
    mechanism.redraw()
    assert not torch.equal(mechanism.draws, draws())
    mechanism.reset_parameters()
    assert torch.equal(mechanism.draws, draws())


def test_random_blocks_of_a_causal_query_are_earlier_ones():
    mechanism = BigBirdAttention(BigBirdOptions(1, num_random_blocks=5), max_length=97)
    blocks = mechanism.random_blocks(97, torch.tensor([[97]]), is_causal=True)[0, 0]
    assert (blocks[1:] < torch.arange(1, 97)[:, None]).all()
    both_ways = mechanism.random_blocks(97, torch.tensor([[41]]), is_causal=False)
    assert both_ways.max() == 40


@pytest.mark.parametrize("mechanism", [mechanism for mechanism, _ in PATTERNS.values()])
def test_sparse_mechanisms_refuse_cross_attention(mechanism):
    query, key, value = inputs(5, 7)
    with pytest.raises(ValueError, match=r"one query per key: query length is 5, key length is 7"):
        mechanism(query, key, value)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (lambda: LocalOptions(0), "window_size must be a whole number of at least 1, got 0"),
        (
            lambda: LongformerOptions(num_global=-1),
            "num_global must be a whole number of at least 0",
        ),
        (lambda: BigBirdOptions(block_size=2.5), "block_size must be a whole number"),
        (lambda: SparseOptions("stridden"), "unknown pattern 'stridden'.*Did you mean 'strided'"),
        (lambda: SparseOptions("fixed", 4, 5), "block of stride=4: at most so many, got 5"),
    ],
)
def test_options_that_no_pattern_has_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        options()
