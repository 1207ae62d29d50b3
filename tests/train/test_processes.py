"""A run of several processes is a run of one: the same losses, also where their number changes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import yaml
from ranks import on_ranks
from transformers import TrainerControl, TrainerState, TrainingArguments

from performers.train import LostProcessError, has_finished, load_config
from performers.train.checkpoints import last_whole_checkpoint
from performers.train.lost import naming_lost_processes
from performers.train.redraw import RedrawFeatures
from performers.train.shares import Shares, check_shares
from performers.train.tasks import build_model

# `performers`, of which one process kills itself with signal 9 after a step.
KILLED = """
import os, signal, sys
from performers.cli import main
from performers.train.checkpoints import SealCheckpoints

def kill(self, args, state, control, **kwargs):
    if state.global_step == 13 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

SealCheckpoints.on_step_end = kill
main()
"""


def test_steps_may_be_shared_out_anew_where_they_stay_the_same():
    before = Shares(processes=2, devices_per_process=1, batch=6, accumulation=1)
    none = {"model.hidden_dropout_prob": 0.0}
    check_shares(before, Shares(1, 1, 12, 1), none, sequences=72)
    check_shares(before, Shares(1, 1, 4, 3), none, sequences=72)
    check_shares(before, Shares(3, 1, 4, 1), none, sequences=71)
    check_shares(before, before, {"model.hidden_dropout_prob": 0.1}, sequences=71)


@pytest.mark.parametrize(
    ("now", "dropout", "words"),
    [
        (Shares(3, 1, 6, 1), 0.0, "a step would be of 18 sequences, and was of 12"),
        (Shares(1, 1, 12, 1), 0.1, "each process draws by itself for model.hidden_dropout_prob"),
        (Shares(1, 1, 12, 1), 0.0, "it would be of 71, and was of 72"),
        (Shares(2, 1, 3, 2), 0.0, "fill up the last batch of an epoch of 62 sequences"),
    ],
)
def test_what_would_change_the_numbers_is_said(now, dropout, words):
    before = Shares(processes=2, devices_per_process=1, batch=6, accumulation=1)
    sequences = 62 if "62" in words else 71
    with pytest.raises(ValueError, match=words):
        check_shares(before, now, {"model.hidden_dropout_prob": dropout}, sequences)


def test_a_lost_process_is_told_from_other_errors():
    with pytest.raises(LostProcessError, match="has ended or cannot"), naming_lost_processes():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    with pytest.raises(RuntimeError, match="mat1 and mat2"), naming_lost_processes():
        torch.ones(2, 3) @ torch.ones(2, 3)


def redrawn(model):
    arguments, control = TrainingArguments("unused", use_cpu=True), TrainerControl()
    RedrawFeatures(3).on_step_end(arguments, TrainerState(global_step=3), control, model=model)


def test_ranks_whose_features_differ_after_a_redraw_say_so_on_every_rank(config_file):
    config = load_config(config_file)

    def run():
        redrawn(build_model(config))  # the same
        other = build_model(dataclasses.replace(config, seed=dist.get_rank()))
        with pytest.raises(ValueError, match="must have the same random features after a redraw"):
            redrawn(other)

    on_ranks(2, run)


@pytest.fixture(scope="module")
def config(config_file):
    """72 sequences in an epoch, 12 in a step."""
    tree = yaml.safe_load(config_file.read_text())
    tree["model"]["hidden_dropout_prob"] = 0.0
    tree["compare"] = []
    tree["data"]["test_fraction"] = 0.09
    return tree


def started(config, processes, folder, *options, accumulation=1, script=("-m", "performers.cli")):
    """torchrun with gloo, each process with its share of 12 sequences; what it came to."""
    config = {**config, "trainer": {**config["trainer"]}}
    config["trainer"]["per_device_train_batch_size"] = 12 // processes // accumulation
    config["trainer"]["gradient_accumulation_steps"] = accumulation
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(config))
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [*script, "train", str(path), "--output", str(folder), *options]
    return subprocess.run(
        [sys.executable, *launcher, *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def losses(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    return torch.tensor([e["loss"] for e in metrics["models"][0]["history"] if "loss" in e])


@pytest.fixture(scope="module")
def whole_and_killed(config, tmp_path_factory):
    """A run of one process, and the same of two, of which one was killed after 13 of 17 steps."""
    folder = tmp_path_factory.mktemp("runs")
    done = started(config, 1, folder / "whole")
    assert done.returncode == 0, done.stderr
    script = folder / "killed.py"
    script.write_text(KILLED)
    done = started(config, 2, folder / "killed", script=[str(script)])
    assert done.returncode != 0
    return folder / "whole", folder / "killed", done.stderr


@pytest.mark.slow
def test_a_run_of_which_one_process_is_killed_says_how_to_go_on(whole_and_killed):
    _, killed, words = whole_and_killed
    assert "Every whole checkpoint is kept" in words
    assert "go on with" in words
    assert last_whole_checkpoint(killed / "checkpoints").name == "checkpoint-10"
    assert not has_finished(killed)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 1, 2])
def test_it_ends_on_another_number_of_processes_with_the_losses_of_one(
    whole_and_killed, config, tmp_path, processes
):
    whole, killed, _ = whole_and_killed
    folder = shutil.copytree(killed, tmp_path / "resumed")
    done = started(config, processes, folder, "--resume")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(folder), losses(whole), rtol=1e-5, atol=1e-5)
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["processes"] == processes


@pytest.mark.slow
def test_a_run_of_which_a_piece_is_lost_says_so_and_ends_on_one_process(
    whole_and_killed, config, tmp_path
):
    whole, _, _ = whole_and_killed
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    keys = ("split_sequences=2", "trainer.per_device_train_batch_size=12")
    done = started(config, 2, tmp_path / "run", *keys, script=[str(script)])
    assert done.returncode != 0
    assert "Every whole checkpoint is kept" in done.stderr
    done = started(config, 1, tmp_path / "run", "--resume")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(tmp_path / "run"), losses(whole), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def sharded(config, tmp_path_factory):
    """A run of two processes, each of which had a share of the weights."""
    folder = tmp_path_factory.mktemp("sharded") / "run"
    done = started(config, 2, folder, "shard_weights=true")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_shares_of_the_weights_train_to_the_numbers_of_one_process(sharded, whole_and_killed):
    whole, _, _ = whole_and_killed
    torch.testing.assert_close(losses(sharded), losses(whole), rtol=1e-5, atol=1e-5)
    ends = [json.loads((x / "metrics.json").read_text())["models"][0] for x in (sharded, whole)]
    assert ends[0]["metrics"]["valid"] == pytest.approx(ends[1]["metrics"]["valid"], rel=1e-5)
    assert ends[0]["parameters"] == ends[1]["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "accumulation", "is_sharded"), [(3, 1, "true"), (2, 2, "true"), (1, 1, "false")]
)
def test_a_sharded_run_goes_on_on_other_processes_and_without_shares(
    sharded, config, tmp_path, processes, accumulation, is_sharded
):
    folder = shutil.copytree(sharded, tmp_path / "resumed")
    for name in ("metrics.json", "result.json"):
        (folder / name).unlink()
    shutil.rmtree(last_whole_checkpoint(folder / "checkpoints"))
    assert last_whole_checkpoint(folder / "checkpoints").name == "checkpoint-15"
    option = f"shard_weights={is_sharded}"
    done = started(config, processes, folder, "--resume", option, accumulation=accumulation)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(losses(folder), losses(sharded), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_stream_gives_two_processes_the_losses_of_one(config, fasta, tmp_path):
    records = [">" + record for record in fasta.read_text().split(">")[1:]]
    for name, part in (("train", records), ("valid", records[:11])):
        (tmp_path / f"{name}.fasta").write_text("".join(part))
    stream = {"valid": str(tmp_path / "valid.fasta"), "shuffle_buffer": 400}
    data = {"source": str(tmp_path / "train.fasta"), "length": 31, "stream": stream}
    for processes in (1, 2):
        done = started(config | {"data": data}, processes, tmp_path / f"on-{processes}")
        assert done.returncode == 0, done.stderr
    torch.testing.assert_close(
        losses(tmp_path / "on-2"), losses(tmp_path / "on-1"), rtol=1e-5, atol=1e-5
    )
