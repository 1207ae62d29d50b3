"""A damaged file is read as what it now says, or refused by its name."""

import json
import random
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import Refusal, few, outcome
from safetensors.torch import load_file, save_file

from performers import PerformerConfig, PerformerForMaskedLM
from performers.convert import read_captured
from performers.data import VOCAB_SIZE
from performers.records import read_json
from performers.train.checkpoints import is_whole, load_model, steps_of

TOKENS = torch.arange(4, 11).unsqueeze(0)


@st.composite
def damages(draw):
    """A function of a file's bytes: cut short, a bit flipped, two parts swapped, a part deleted."""
    kind = draw(st.sampled_from(["truncate", "flip", "swap", "delete", "empty", "other"]))
    seed = draw(st.integers(0, 2**16))

    def damaged(data):
        generator = random.Random(seed)
        # The head of a file says what the rest means.
        size = len(data) if seed % 2 else min(len(data), 64)
        first, second = sorted(generator.randrange(size) for _ in range(2))
        flipped = bytes([data[first] ^ 1 << generator.randrange(8)])
        return {
            "truncate": data[:first],
            "flip": data[:first] + flipped + data[first + 1 :],
            "swap": data[second:] + data[first:second] + data[:first],
            "delete": data[:first] + data[second:],
            "empty": b"",
            "other": b"[1]" if seed % 3 else b'{"a": [null, {}]}',
        }[kind]

    return damaged


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PerformerConfig(**sizes, vocab_size=VOCAB_SIZE, intermediate_size=8, num_projections=4)
    folder = tmp_path_factory.mktemp("saved") / "model"
    PerformerForMaskedLM(config).save_pretrained(folder)
    (folder / "trainer_state.json").write_text('{"global_step": 3, "max_steps": 5}')
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    (folder / "whole.json").write_text(json.dumps({"seconds": 1.5, "files": sizes}))
    return folder


@pytest.fixture(scope="module")
def damaged_copy(saved, tmp_path_factory):
    """A function that copies the saved folder anew, with one file damaged."""
    folder = tmp_path_factory.mktemp("damaged") / "copy"

    def copy(name, damage):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        path = folder / name
        path.write_bytes(damage(path.read_bytes()))
        return folder

    return copy


@few
@given(damage=damages())
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_is_that_of_its_files_or_refused(damaged_copy, saved, name, damage):
    folder = damaged_copy(name, damage)
    found = outcome(lambda: load_model(folder))
    if isinstance(found, Refusal):
        assert str(folder) in found.words
        return
    model, task = found
    assert task == "masked-lm"
    expected, _ = load_model(saved)
    weights = load_file(folder / "model.safetensors")
    assert expected.load_state_dict(weights, strict=False).unexpected_keys == []
    if name == "model.safetensors":
        assert torch.equal(model(TOKENS).logits.nan_to_num(), expected(TOKENS).logits.nan_to_num())


@few
@given(damage=damages())
@pytest.mark.parametrize("name", ["whole.json", "trainer_state.json"])
def test_a_checkpoint_is_whole_and_tells_its_steps_or_is_refused(damaged_copy, name, damage):
    folder = damaged_copy(name, damage)
    if not is_whole(folder):
        return
    steps = outcome(lambda: steps_of(folder))
    if isinstance(steps, Refusal):
        assert "trainer_state.json" in steps.words
    else:
        state = read_json(folder / "trainer_state.json", remedy="")
        assert steps == (state["global_step"], state["max_steps"])


@few
@given(damage=damages())
def test_captured_tensors_are_those_of_the_file_or_refused(tmp_path_factory, damage):
    path = tmp_path_factory.mktemp("captured") / "attention.safetensors"
    names = ("query", "key", "value")
    save_file({name: torch.randn(1, 2, 3, 4) for name in names}, path)
    path.write_bytes(damage(path.read_bytes()))
    found = outcome(lambda: read_captured(path))
    if isinstance(found, Refusal):
        assert str(path) in found.words
        return
    tensors = load_file(path)
    for layer in found:
        for name in names:
            assert torch.equal(getattr(layer, name).nan_to_num(), tensors[name].nan_to_num())
