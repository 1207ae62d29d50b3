"""Padding on the left moves a converted model no more than the exact one, without position_ids."""

import copy

import pytest
import torch
from tiny_models import WORDS, bart, bert, gpt2, llama
from transformers import (
    DynamicCache,
    ModernBertConfig,
    ModernBertModel,
    Qwen2VLTextConfig,
    Qwen2VLTextModel,
)

from performers import FavorCache, FavorOptions, calibrate, linearize
from performers.convert.sites import is_unmoved_by_shifts
from performers.models.naming import CACHE

PADDING = 11


def modernbert():
    tokens = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "num_attention_heads": 4}
    kinds = ["full_attention", "full_attention"]
    layers = {"num_hidden_layers": 2, "layer_types": kinds, "intermediate_size": 48}
    return ModernBertModel(ModernBertConfig(**sizes, **layers, **tokens)).eval()


@torch.no_grad()
def movement(model, **options):
    """How far padding on the left moves the outputs at the real tokens, relative to these."""
    ids = torch.randint(5, WORDS, (2, 37), generator=torch.Generator().manual_seed(3))
    padding = ids.new_zeros(2, PADDING)
    mask = torch.cat([padding, torch.ones_like(ids)], dim=1)
    alone = model(ids)[0]
    padded = model(torch.cat([padding, ids], dim=1), attention_mask=mask, **options)[0]
    return float((padded[:, PADDING:] - alone).norm() / alone.norm())


@pytest.mark.parametrize("window_size", [0, 5])
@pytest.mark.parametrize("build", [llama, modernbert])
def test_padding_on_the_left_moves_no_rotary_model(build, window_size):
    model = build()
    assert movement(model) < 1e-5
    linearize(model, FavorOptions(17, window_size=window_size))
    calibrate(model, [{"input_ids": torch.randint(5, WORDS, (3, 41))}])
    assert movement(model) < 1e-5


def test_learned_positions_are_counted_as_the_exact_model_counts_them():
    model = gpt2()
    position = torch.arange(37 + PADDING)[None]  # what transformers counts without position_ids
    linearize(model, FavorOptions(17, window_size=0))
    assert movement(model) == movement(model, position_ids=position) > 0.1


def test_positions_that_are_given_are_kept():
    model = linearize(llama(), FavorOptions(17, window_size=0))
    ids, mask = torch.randint(5, WORDS, (1, 13)), torch.ones(1, 13, dtype=torch.long)
    mask[0, :3] = 0
    shifted = model(ids, attention_mask=mask, position_ids=torch.arange(13)[None] + 7).logits
    counted = model(ids, attention_mask=mask, position_ids=torch.arange(13)[None] - 3).logits
    assert torch.equal(model(ids, attention_mask=mask).logits[:, 3:], counted[:, 3:])
    assert not torch.allclose(shifted[:, 3:], counted[:, 3:], atol=1e-3)
    assert torch.equal(model(ids, mask, None).logits, model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("make_cache", [FavorCache, lambda config: DynamicCache(config=config)])
@torch.no_grad()
def test_positions_go_on_where_a_cache_ends(make_cache):
    model = linearize(llama(), FavorOptions(17, window_size=0))
    ids = torch.randint(5, WORDS, (2, 13))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    whole = model(ids, attention_mask=mask).logits[:, 3:]
    cache = make_cache(model.config)
    parts = [
        model(ids[:, a:b], attention_mask=mask[:, :b], **{CACHE: cache}).logits
        for a, b in ((0, 7), (7, 8), (8, 13))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1)[:, 3:], whole, rtol=1e-4, atol=1e-4)


def test_a_copy_counts_positions_too():
    model = copy.deepcopy(linearize(llama(), FavorOptions(17, window_size=0)))
    assert movement(model) < 1e-5


def test_only_rotations_by_fixed_angles_are_unmoved_by_shifts():
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    several = Qwen2VLTextModel(Qwen2VLTextConfig(**sizes, **layers, rope_parameters=sections))
    longer = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert [
        is_unmoved_by_shifts(model.base_model)
        for model in (llama(), modernbert(), bert(), gpt2(), bart(), several)
    ] == [True, True, False, False, False, False]
    assert not is_unmoved_by_shifts(llama(rope_parameters=longer).model)
