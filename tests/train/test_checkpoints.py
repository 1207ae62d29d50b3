"""A checkpoint counts only when it is whole, and only for the model that it fits."""

import json

import pytest
import torch
from safetensors import SafetensorError

from performers.models import PerformerConfig, PerformerForMaskedLM
from performers.train.checkpoints import (
    SEAL,
    UnsavedError,
    check_weights,
    is_whole,
    last_whole_checkpoint,
    load_model,
    remove_fragments,
    saving,
    write_atomically,
)

SIZE = {
    "vocab_size": 29,
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 13,
    "num_projections": 7,
}


def checkpoint(folder, step, sealed=True):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"weights")
    if sealed:
        seal = {"seconds": 1.5, "files": {"weights": 7}}
        (path / SEAL).write_text(json.dumps(seal))
    return path


def test_a_half_written_checkpoint_is_not_the_last(tmp_path):
    whole = checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 10, sealed=False)
    assert last_whole_checkpoint(tmp_path) == whole


def test_a_truncated_file_breaks_the_seal(tmp_path):
    path = checkpoint(tmp_path, 5)
    assert is_whole(path)
    (path / "weights").write_bytes(b"weigh")
    assert not is_whole(path)


def test_a_file_that_is_gone_breaks_the_seal(tmp_path):
    path = checkpoint(tmp_path, 5)
    (path / "weights").unlink()
    assert last_whole_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "seal",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 99999,
        b'{"seconds": 1}',
        b'{"files": {}, "seconds": null}',
        b'{"files": 3, "seconds": 1}',
    ],
)
def test_a_damaged_seal_leaves_the_checkpoint_before_it_the_last(tmp_path, seal):
    whole, broken = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    (broken / SEAL).write_bytes(seal)
    assert last_whole_checkpoint(tmp_path) == whole


def test_steps_are_compared_as_numbers(tmp_path):
    checkpoint(tmp_path, 95)
    last = checkpoint(tmp_path, 100)
    assert last_whole_checkpoint(tmp_path) == last


def test_only_fragments_are_removed(tmp_path):
    whole = checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 10, sealed=False)
    (tmp_path / "checkpoint-notes").mkdir()
    assert remove_fragments(tmp_path) == ["checkpoint-10"]
    assert sorted(tmp_path.iterdir()) == [whole, tmp_path / "checkpoint-notes"]


def test_no_folder_means_no_checkpoint(tmp_path):
    assert last_whole_checkpoint(tmp_path / "absent") is None


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", lambda number: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_atomically(path, "new")
    assert path.read_text() == "old"


@pytest.fixture
def saved(tmp_path):
    PerformerForMaskedLM(PerformerConfig(**SIZE)).save_pretrained(tmp_path / "model")
    return tmp_path


def test_a_saved_model_loads_from_its_run_and_from_its_folder(saved):
    for folder in (saved, saved / "model"):
        model, task = load_model(folder)
        assert isinstance(model, PerformerForMaskedLM)
        assert task == "masked-lm"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"hidden_size": 16}, "embed_tokens.weight is .29, 12. in the checkpoint and .29, 16."),
        ({"num_hidden_layers": 2}, "absent in the checkpoint"),
        ({"attention": "exact"}, "feature_map.* in the checkpoint and absent in the model"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(saved, change, name):
    with torch.device("meta"):
        other = PerformerForMaskedLM(PerformerConfig(**{**SIZE, **change}))
    with pytest.raises(ValueError, match=f"does not match its config: .*{name}"):
        check_weights(saved / "model", other)


def test_a_config_edited_after_training_is_refused(saved):
    path = saved / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_projections": 11}))
    with pytest.raises(ValueError, match=r"does not match its config: .*omega"):
        load_model(saved)


def test_damaged_weights_are_refused_by_name(saved):
    (saved / "model" / "model.safetensors").write_bytes(b"\0" * 99)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load_model(saved)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a run with a finished model"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be a JSON file, and is damaged"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "must hold one of .*but holds nothing"),
        ('{"architectures": 3}', "must hold one of .*but holds nothing"),
        (
            '{"architectures": ["PerformerForMaskedLM"], "hidden_size": "wide"}',
            "describes no Performer: .*hidden_size",
        ),
    ],
)
def test_a_damaged_config_is_refused_by_name(saved, text, words):
    (saved / "model" / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{saved}/model.*{words}"):
        load_model(saved)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("iostream error"),
        OSError(28, "No space left on device"),
        SafetensorError("I/O error"),
    ],
)
def test_what_cannot_be_written_is_said_with_its_place_and_how_to_go_on(tmp_path, error):
    words = rf"checkpoint-5 could not be written: .*{error.args[-1]}.* MiB free: .*--resume"
    with pytest.raises(UnsavedError, match=words), saving(tmp_path / "checkpoint-5"):
        raise error
