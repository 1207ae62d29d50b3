"""A run on a stream is a run: it ends, is resumed, and says what it cannot be."""

import shutil

import pytest
import yaml

from performers.train import Run, StreamConfig, load_config
from performers.train.checkpoints import last_whole_checkpoint
from performers.train.shares import Shares, check_shares


@pytest.fixture(scope="module")
def streamed(config_file, fasta, tmp_path_factory):
    """17 steps of 11 proteins on a stream of 90, and 11 others to evaluate on."""
    folder = tmp_path_factory.mktemp("stream")
    records = [">" + record for record in fasta.read_text().split(">")[1:]]
    for name, part in (("train", records), ("valid", records[:11])):
        (folder / f"{name}.fasta").write_text("".join(part))
    tree = yaml.safe_load(config_file.read_text())
    tree["compare"] = []
    tree["data"] = {
        "source": str(folder / "train.fasta"),
        "length": 31,
        "stream": {"valid": str(folder / "valid.fasta"), "shuffle_buffer": 400},
    }
    path = folder / "streamed.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def numbers(metrics):
    """What a run ends with, and the losses on its way."""
    model = metrics["models"][0]
    losses = [entry["loss"] for entry in model["history"] if "loss" in entry]
    return model["metrics"], model["tokens"], losses


def test_a_run_on_a_stream_is_resumed_in_its_second_pass_and_ends_with_the_same_numbers(
    streamed, tmp_path
):
    whole = Run.prepare(load_config(streamed), tmp_path / "whole").train()
    assert whole["data"]["train_bytes"] > 0
    assert whole["models"][0]["metrics"]["valid"]["num_scored"] > 0
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "left")
    for name in ("metrics.json", "result.json"):
        (folder / name).unlink()
    last = last_whole_checkpoint(folder / "checkpoints")
    shutil.rmtree(last)
    assert last_whole_checkpoint(folder / "checkpoints").name == "checkpoint-15"
    resumed = Run.prepare(load_config(streamed), folder, resume=True).train()
    assert numbers(resumed) == numbers(whole)


def test_what_is_held_out_of_a_stream_is_not_trained_on(streamed, tmp_path):
    data = Run.prepare(load_config(streamed), tmp_path / "run").data
    trained = {tuple(item["input_ids"].tolist()) for item in data.train.one_pass(0)}
    assert len(trained) == 90
    assert not trained & {tuple(item["input_ids"].tolist()) for item in data.valid}


def test_a_config_with_a_stream_survives_being_written_and_read(streamed, tmp_path):
    config = load_config(streamed)
    assert isinstance(config.data.stream, StreamConfig)
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config


def test_a_stream_has_no_last_batch_that_processes_would_fill_up():
    before = Shares(processes=2, devices_per_process=1, batch=6, accumulation=1)
    check_shares(before, Shares(1, 1, 12, 1), {}, sequences=None)
    with pytest.raises(ValueError, match="a step would be of 18 sequences"):
        check_shares(before, Shares(3, 1, 6, 1), {}, sequences=None)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.valid_fraction=0.2", "data.valid_fraction says how sets are split off, which takes"),
        ("data.source=sample", "data.stream needs files to read"),
        ("data.stream.valid=''", "data.stream.valid must be a file"),
        ("data.stream.shuffle_buffer=-1", "data.stream.shuffle_buffer must be .*got -1"),
        ("data.stream.buffer=3", "unknown key 'data.stream.buffer'.*'shuffle_buffer'"),
        ("data.stream=true", "data.stream .* must be a mapping of keys, got True"),
    ],
)
def test_what_a_stream_cannot_be_is_refused_by_key(streamed, override, words):
    with pytest.raises(ValueError, match=words):
        load_config(streamed, [override])


def test_a_run_on_a_stream_must_say_how_long_it_is(streamed, tmp_path):
    tree = yaml.safe_load(streamed.read_text())
    del tree["trainer"]["max_steps"]
    path = tmp_path / "endless.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"set trainer\.max_steps, or max_seconds"):
        load_config(path, ["trainer.num_train_epochs=3"])
    assert load_config(path, ["max_seconds=3"]).max_seconds == 3


def test_more_workers_than_pieces_are_refused(streamed, tmp_path):
    config = load_config(streamed, ["trainer.dataloader_num_workers=2"])
    with pytest.raises(ValueError, match="dataloader_num_workers must be at most 1"):
        Run.prepare(config, tmp_path / "run")
