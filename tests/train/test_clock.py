"""A run of so many seconds ends when its clock says so, interrupted or not."""

import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from performers.train import Run, load_config
from performers.train import clock as clock_module
from performers.train.checkpoints import last_whole_checkpoint, seconds_until
from performers.train.clock import SCHEDULES, TrainingClock, learning_rate_factor, time_on


def count_seconds(patch):
    readings = itertools.count(start=1000, step=2)
    for name in ("perf_counter", "process_time"):
        patch.setattr(clock_module, name, lambda: float(next(readings)))


@pytest.fixture
def fake_time(monkeypatch):
    """A clock that shows two seconds more each time it is read: every step takes two seconds."""
    count_seconds(monkeypatch)


@pytest.fixture(scope="module")
def timed(config_file):
    """The tiny run for 13 seconds, which is seven steps of two seconds."""
    tree = [
        "max_seconds=13",
        "trainer.lr_scheduler_type=linear",
        "trainer.warmup_steps=0.25",
        "trainer.eval_steps=0.5",
        "trainer.save_steps=0.25",
    ]
    path = config_file.with_name("timed.yaml")
    config = load_config(config_file, ["trainer.max_steps=1"])
    trainer = {key: value for key, value in config.trainer.items() if key != "max_steps"}
    path.write_text(json.dumps({**config.to_dict(), "trainer": trainer}))
    return load_config(path, tree)


@pytest.fixture(scope="module")
def whole(timed, tmp_path_factory):
    """The folder and the metrics of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("timed") / "run"
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        count_seconds(patch)
        return folder, Run.prepare(timed, folder).train()


def copy_without_results(whole, folder):
    """The run as if it had been killed when it was about to write what it found."""
    shutil.copytree(whole[0], folder)
    for name in ("result.json", "metrics.json"):
        (folder / name).unlink()
    return folder


def steps_of(history, key):
    return [entry["step"] for entry in history if key in entry]


def test_every_model_trains_until_its_own_seconds_are_used(whole):
    folder, metrics = whole
    assert [model["attention"] for model in metrics["models"]] == ["performer-relu", "exact"]
    for model in metrics["models"]:
        assert (model["steps"], model["seconds"]) == (7, 14.0)
        assert model["tokens_per_second"] == model["tokens"] / 14.0
        assert steps_of(model["history"], "eval_loss") == [4, 7]  # half of the time, and its end
        seconds = [entry["seconds"] for entry in model["history"] if "loss" in entry]
        assert seconds == [2.0 * step for step in range(1, 8)]
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["checkpoint-5", "checkpoint-7"]  # three quarters, and the end


def test_the_learning_rate_follows_the_clock(whole):
    history = whole[1]["models"][0]["history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    expected = [1e-3 * learning_rate_factor("linear", 0.25, 2 * step / 13) for step in range(7)]
    assert rates == pytest.approx(expected)


def test_a_resumed_run_uses_the_seconds_that_are_left(whole, timed, fake_time, tmp_path):
    folder = copy_without_results(whole, tmp_path / "killed")
    shutil.rmtree(folder / "compare")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-7")
    assert seconds_until(last_whole_checkpoint(folder / "checkpoints")) == 10.0

    resumed = Run.prepare(timed, folder, resume=True).train()
    # The fake clock makes steps repeatable, and with them the numbers.
    for model, again in zip(whole[1]["models"], resumed["models"], strict=True):
        assert again["metrics"] == model["metrics"]
        assert (again["steps"], again["seconds"]) == (7, 14.0)
        losses = [
            [(entry["seconds"], entry["learning_rate"], entry["loss"]) for entry in history]
            for history in (
                [entry for entry in one["history"] if "loss" in entry] for one in (model, again)
            )
        ]
        assert losses[0] == losses[1]


def test_a_run_killed_after_its_time_takes_no_further_step(whole, timed, fake_time, tmp_path):
    folder = copy_without_results(whole, tmp_path / "run")
    resumed = Run.prepare(timed, folder, resume=True).train()
    assert resumed["models"][0]["steps"] == 7
    assert resumed["models"][0]["metrics"] == whole[1]["models"][0]["metrics"]


def test_evaluation_and_saving_are_not_training(fake_time, tmp_path):
    arguments, state, control = TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl()
    clock = TrainingClock(seconds=5.0, limit=100.0)
    clock.on_step_begin(arguments, state, control)
    clock.on_optimizer_step(arguments, state, control)
    for _ in range(3):
        clock_module.perf_counter()  # what happens between two steps
    clock.on_step_begin(arguments, state, control)
    clock.on_optimizer_step(arguments, state, control)
    assert clock.seconds == 9.0
    assert clock.share == 0.09


@pytest.mark.parametrize(("threads", "processes", "clock"), [(1, 1, 5.0), (2, 1, 7.0), (1, 2, 7.0)])
def test_only_one_thread_of_one_process_has_the_time_of_the_processor(
    monkeypatch, threads, processes, clock
):
    monkeypatch.setattr(clock_module, "process_time", lambda: 5.0)
    monkeypatch.setattr(clock_module, "perf_counter", lambda: 7.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(
        clock_module, "PartialState", lambda: SimpleNamespace(num_processes=processes)
    )
    assert time_on(torch.device("cpu")) == clock


def test_without_a_limit_a_clock_only_counts(fake_time, tmp_path):
    arguments, state, control = TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl()
    clock = TrainingClock()
    for _ in range(1000):
        clock.on_step_begin(arguments, state, control)
        clock.on_optimizer_step(arguments, state, control)
        clock.on_step_end(arguments, state, control)
    assert clock.seconds == 2000.0
    assert not control.should_training_stop


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_learning_rate_rises_to_its_peak_and_never_above(schedule):
    shares = [number / 64 for number in range(65)]
    factors = [learning_rate_factor(schedule, 0.25, share) for share in shares]
    rising, falling = factors[:17], factors[16:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert factors[16] == max(factors) == 1.0
    assert factors[-1] == pytest.approx(1.0 if schedule.startswith("constant") else 0.0)
    assert learning_rate_factor(schedule, 0.0, 0.0) == 1.0


def test_a_mask_that_hides_nothing_is_not_handed_to_the_model(config_file, tmp_path, monkeypatch):
    config = load_config(config_file, ["data.concatenate=true", "compare=[]"])
    run = Run.prepare(config, tmp_path / "run")
    names = []
    monkeypatch.setattr(Trainer, "compute_loss", recording(Trainer.compute_loss, names))
    metrics = run.train()
    assert names
    assert all("attention_mask" not in inputs for inputs in names)
    assert metrics["models"][0]["tokens"] % 31 == 0 < metrics["models"][0]["tokens"]


def recording(compute_loss, names):
    def recorded(self, model, inputs, *args, **kwargs):
        names.append(set(inputs))
        return compute_loss(self, model, inputs, *args, **kwargs)

    return recorded


@pytest.mark.usefixtures("without_shape_checks")
def test_the_clock_waits_for_an_accelerator_each_time_it_is_read(monkeypatch):
    """What it still computes after a step would else be done, uncounted, while data are loaded."""
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    accelerator = torch.device("cuda", 1)
    for device, expected in ((torch.device("cpu"), []), (accelerator, [accelerator] * 2)):
        arguments = SimpleNamespace(device=device)
        clock = TrainingClock(limit=1000.0)
        clock.on_step_begin(arguments, TrainerState(), TrainerControl())
        clock.on_optimizer_step(arguments, TrainerState(), TrainerControl())
        assert waits == expected
