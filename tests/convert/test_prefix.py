"""Converted models whose prompts, or images, see themselves whole."""

import pytest
import torch
from tiny_models import llama
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from performers import FavorCache, FavorOptions, linearize
from performers.convert import interface

IMAGE, WORDS = 96, 97
VISION = SiglipVisionConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8,
    patch_size=4, vision_use_head=False,
).to_dict()  # fmt: skip
TEXT = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip


def paligemma():
    text = GemmaConfig(**TEXT).to_dict()
    sizes = {"image_token_index": IMAGE, "projection_dim": 32, "hidden_size": 32}
    config = PaliGemmaConfig(vision_config=VISION, text_config=text, **sizes)
    return PaliGemmaForConditionalGeneration(config).eval()


def gemma3():
    kinds = ["sliding_attention", "full_attention"]
    text = Gemma3TextConfig(**TEXT, sliding_window=5, layer_types=kinds).to_dict()
    sizes = {"image_token_index": IMAGE, "mm_tokens_per_image": 4}
    config = Gemma3Config(vision_config=VISION, text_config=text, **sizes)
    return Gemma3ForConditionalGeneration(config).eval()


def prompt(length=13):
    """Two images, with prefixes of 7 and 9 tokens; the first row is padded on the left, where
    processors put the number of the prefix too, the second on the right.
    """
    ids = torch.randint(1, 90, (2, length))
    types = torch.ones_like(ids)
    types[0, :9], types[1, :9], types[1, -2:] = 0, 0, 0
    mask = torch.ones_like(ids)
    mask[0, :2], mask[1, -2:] = 0, 0
    ids[0, 2:6] = ids[1, :4] = IMAGE
    return {
        "input_ids": ids, "attention_mask": mask, "token_type_ids": types,
        "pixel_values": torch.randn(2, 3, 8, 8),
    }  # fmt: skip


def two_images():
    ids = torch.randint(1, 90, (2, 17))
    ids[:, 2:6] = ids[:, 9:13] = IMAGE
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids),
        "token_type_ids": (ids == IMAGE).long(), "pixel_values": torch.randn(4, 3, 8, 8),
    }  # fmt: skip


@pytest.fixture
def seen(monkeypatch):
    """What the layers of a model saw."""
    found = []

    def keys_seen(*arguments, **options):
        found.append(original(*arguments, **options))
        return found[-1]

    original = interface.keys_seen
    monkeypatch.setattr(interface, "keys_seen", keys_seen)
    return found


@pytest.mark.parametrize("parts", [None, {"language_model": None}])
def test_a_window_of_the_whole_length_is_the_exact_prefix_model(parts, seen):
    model, given = paligemma(), prompt()
    is_real = given["attention_mask"].bool()
    expected = model(**given, use_cache=False).logits[is_real]
    linearize(model, FavorOptions(window_size=32, layers=parts))
    found = model(**given, use_cache=False).logits[is_real]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [9, 9] in [one.prefix_lengths.tolist() for one in seen if one.prefix_lengths is not None]


def test_a_prefix_is_estimated_as_one():
    """Whatever comes after the prefix leaves it alone, and within it all see each other."""
    model, given = linearize(paligemma(), FavorOptions(17, "relu", window_size=0)), prompt()
    before = model(**given, use_cache=False).logits
    given["input_ids"][:, 9:11] = 5
    after = model(**given, use_cache=False).logits
    assert torch.equal(before[:, :9], after[:, :9])
    given["input_ids"][:, 8] = 5
    changed = (model(**given, use_cache=False).logits != after).any(dim=-1)
    assert changed[given["attention_mask"].bool()].all()


@pytest.mark.parametrize("parts", [None, {"language_model": None}])
@pytest.mark.parametrize("with_image", [False, True])
def test_generation_continues_from_the_state_of_the_prefix(parts, with_image):
    model, given = paligemma(), prompt()
    given = {name: x[:1, 2:9] if x.ndim == 2 else x[:1] for name, x in given.items()}
    if not with_image:
        given.pop("pixel_values")
        given["input_ids"] = given["input_ids"].clamp(max=80)
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**given, **settings)
    linearize(model, FavorOptions(window_size=32, layers=parts))
    assert torch.equal(model.generate(**given, **settings), expected)
    linear = linearize(paligemma(), FavorOptions(17, window_size=2, layers=parts))
    found = linear.generate(**given, **settings)
    # Without a cache a prompt that is all there is attends as an encoder where parts are converted.
    if parts is None:
        assert torch.equal(linear.generate(**given, **settings, use_cache=False), found)


def test_images_that_see_themselves_are_a_staircase(seen):
    model, given = gemma3(), two_images()
    with pytest.raises(ValueError, match="window_size=0"):
        linearize(gemma3(), FavorOptions(window_size=3))(**given, use_cache=False)
    linearize(model, FavorOptions(17, "positive", window_size=0))
    before = model(**given, use_cache=False).logits
    lengths = [1, 2, 6, 6, 6, 6, 7, 8, 9, 13, 13, 13, 13, 14, 15, 16, 17]
    assert seen[-1].seen_lengths.tolist() == [lengths, lengths]
    given["input_ids"][:, 7] = 5
    after = model(**given, use_cache=False).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before != after).any(dim=-1)[:, 7:].all()


def test_generation_continues_after_images_that_see_themselves():
    model, given = linearize(gemma3(), FavorOptions(17, "positive", window_size=0)), two_images()
    cache = FavorCache(model.config)
    settings = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(**given, **settings, past_key_values=cache)
    assert torch.equal(found, model.generate(**given, **settings, use_cache=False))


def test_layers_that_stay_exact_see_prefixes_and_images_too(monkeypatch):
    monkeypatch.setattr(interface, "_layer", lambda module: None)  # all of them
    for build, given in ((paligemma, prompt()), (gemma3, two_images())):
        model, is_real = build(), given["attention_mask"].bool()
        expected = model(**given, use_cache=False).logits[is_real]
        model.set_attn_implementation("favor")
        found = model(**given, use_cache=False).logits[is_real]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["bool", "float"])
def test_a_mask_of_pairs_says_prefixes_and_chunks(form):
    model = linearize(llama(), FavorOptions(window_size=0))
    ids = torch.randint(5, 90, (2, 13))
    own, prefixes = torch.arange(1, 14), torch.tensor([[4], [9]])
    for lengths in (torch.maximum(own, prefixes), ((own + 2) // 3 * 3).expand(2, -1)):
        visible = (torch.arange(13) < lengths[:, :, None])[:, None]
        mask = visible if form == "bool" else torch.where(visible, 0.0, -torch.inf)
        before = model(ids, attention_mask=mask, use_cache=False).logits
        for row in (0, 1):
            first = int(lengths[row, 0])  # keys of the first query, which the next one is not
            changed = ids.clone()
            changed[row, first] += 1
            after = model(changed, attention_mask=mask, use_cache=False).logits
            is_before = lengths[row] <= first
            assert torch.equal(before[row, is_before], after[row, is_before])
            assert (before != after)[row, ~is_before].any(dim=-1).all()


# In a fresh process, because jaxtyping's import hook leaves traces that cannot be compiled.
COMPILED = """
import torch
from transformers import HrmTextConfig
from transformers.masking_utils import create_causal_mask
import performers.convert

config = HrmTextConfig(vocab_size=31, hidden_size=16, num_attention_heads=2)
config._attn_implementation = "favor"

def mask(x, blocks):
    return create_causal_mask(config, x, None, None, block_sequence_ids=blocks)

x, blocks = torch.zeros(1, 7, 16), torch.tensor([[0, 0, 0, -1, -1, -1, -1]])
print(mask(x, blocks)[0, 1].tolist())
try:
    torch.compile(mask, fullgraph=True, backend="eager")(x, blocks)
except Exception as error:
    print("unless compiled" in str(error))
print(torch.compile(mask, fullgraph=True, backend="eager")(x, None))
"""


@pytest.mark.slow
def test_a_compiled_graph_refuses_blocks(fresh_python):
    assert fresh_python(COMPILED).splitlines()[-3:] == ["[3, 3, 3, 4, 5, 6, 7]", "True", "None"]
