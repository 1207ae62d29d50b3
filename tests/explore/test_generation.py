"""The tab of generation writes what the model writes, and counts what it remembers."""

import pytest
import torch

from performers import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM
from performers.data.vocabulary import EOS_TOKEN_ID, VOCAB_SIZE, decode
from performers.explore import Subject
from performers.explore.generation import shown, write
from performers.explore.practice import train
from performers.explore.subject import Vocabulary

# Reading the sample costs a second.
VOCABULARY = Vocabulary.of_proteins()


def subject(model_class=PerformerForCausalLM, **options):
    config = PerformerConfig(
        vocab_size=VOCAB_SIZE, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=13, num_projections=7, eos_token_id=EOS_TOKEN_ID, **options,
    )  # fmt: skip
    return Subject(model_class(config), VOCABULARY, "tiny")


def test_the_likeliest_tokens_are_those_of_generate():
    tiny = subject()
    never = list(tiny.vocabulary.never)
    given = tiny.vocabulary.begin("MKV")[None]
    expected = tiny.model.generate(given, max_new_tokens=11, do_sample=False, suppress_tokens=never)
    *_, last = write(tiny, "MKV", 11, 0.0, 0)
    written = decode(expected[0, 4:], skip_special_tokens=True)
    assert "".join(last.words) == written
    assert last.read == 4 + len(written) - 1  # the last token is written and not read yet


def test_the_state_keeps_its_size_and_keys_and_values_grow_by_the_token():
    steps = list(write(subject(attention="performer-relu"), "MKV", 9, 1.0, 3))
    assert len({step.remembered for step in steps}) == 1
    # [layers, keys and values, heads, dim, bytes of float32]
    assert [step.exact for step in steps] == [2 * 2 * 3 * 4 * 4 * step.read for step in steps]


@pytest.mark.parametrize("attention", ["exact", {"exact": 3}])
def test_exact_attention_remembers_the_keys_and_values_that_are_counted(attention):
    for step in write(subject(attention=attention), "MKVL", 5, 1.0, 0):
        assert step.remembered == step.exact > 0


def test_heads_side_by_side_remember_the_sum():
    mixed = {"exact": 1, "performer-relu": 2}
    sizes = {}
    for name, attention in {"exact": "exact", "relu": "performer-relu", "both": mixed}.items():
        *_, last = write(subject(attention=attention), "MKV", 4, 1.0, 0)
        sizes[name] = last.remembered
    assert sizes["both"] == pytest.approx(sizes["exact"] / 3 + sizes["relu"] * 2 / 3)


def test_the_same_seed_writes_the_same_text_and_another_seed_another():
    tiny = subject()
    texts = [[x.words for x in write(tiny, "M", 5, 1.0, seed)][-1] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_the_page_shows_every_token_and_ends_with_a_picture():
    steps = list(shown(subject(), "MKV", 6, 1.0, 2))
    lengths = [len(text) for _, text, _ in steps[:-1]]
    assert lengths == sorted(lengths)
    bar, text, drawn = steps[-1]
    assert "done: " in bar
    assert "MKV<b>" in text
    assert drawn.count("<img") == 1


def test_training_changes_the_model_and_makes_the_page_read_again():
    tiny = subject()
    before = tiny.layers("MKVLAA")
    *_, bar = train(tiny, 0.001)
    assert "step 1" in bar
    after = tiny.layers("MKVLAA")
    assert not torch.equal(before[0].captured.query, after[0].captured.query)


@pytest.mark.usefixtures("without_shape_checks")
def test_a_model_that_is_not_causal_does_not_write():
    masked = subject(PerformerForMaskedLM)
    with pytest.raises(ValueError, match="must be causal, and PerformerForMaskedLM is not"):
        next(write(masked, "MKV", 3, 1.0, 0))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("temperature", [-0.5, float("nan"), float("inf")])
def test_a_temperature_is_finite_and_not_negative(temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number of at least 0"):
        next(write(subject(), "MKV", 3, temperature, 0))
