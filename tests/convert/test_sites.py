"""A model is searched for its attention once, and what is found is passed along."""

import pytest
from tiny_models import MODELS, bert, inputs_for, llama

from performers import FavorOptions, linearize, load_linearized, restore
from performers.convert.attention_transfer import exact_copy, layer_errors, transfer_attention
from performers.convert.sites import Sites

SMALL = FavorOptions(num_projections=11, window_size=0)


@pytest.fixture
def searched(monkeypatch):
    """The models that were searched, one entry for each time."""
    models = []
    find = Sites.of.__func__

    def of(cls, model):
        models.append(model)
        return find(cls, model)

    monkeypatch.setattr(Sites, "of", classmethod(of))
    return models


def walks(model):
    """Counts walks over all modules of this model, whoever takes them."""
    counted = []
    walk = model.named_modules

    def named_modules(*arguments, **options):
        counted.append(True)
        return walk(*arguments, **options)

    model.named_modules = named_modules
    return counted


@pytest.mark.parametrize("name", MODELS)
def test_converting_and_restoring_walk_over_the_modules_once_each(name):
    model = MODELS[name]()
    counted = walks(model)
    model.set_attn_implementation("eager")
    switching = len(counted)  # what transformers needs for it
    counted.clear()
    linearize(model, SMALL)
    assert len(counted) == switching + 1
    counted.clear()
    linearize(model, SMALL)
    assert len(counted) == 1
    counted.clear()
    restore(model)
    assert len(counted) == 1


def test_loading_and_saving_search_a_model_once_each(tmp_path, searched):
    model = linearize(llama(), SMALL)
    searched.clear()
    model.save_pretrained(tmp_path)
    loaded = load_linearized(type(model), tmp_path)
    assert searched == [model, loaded]


def test_the_number_of_batches_searches_no_model_again(searched):
    model = linearize(bert(), SMALL)
    teacher = exact_copy(model)
    batches = [inputs_for(model) for _ in range(3)]
    searched.clear()
    transfer_attention(model, teacher, batches)
    layer_errors(model, teacher, batches)
    assert searched == [model, model]


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_the_same_before_and_after_a_conversion(name):
    model = MODELS[name]()
    before = Sites.of(model)
    assert before.found
    assert not before.layers
    linearize(model, SMALL)
    after = Sites.of(model)
    assert after == before
    assert list(after.layers) == list(before)
    assert list(before.layers) == list(before)
