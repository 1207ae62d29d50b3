"""A run can be left at any moment: what it ends with is what it would have ended with."""

import errno
import json
import os
import shutil
import signal
from multiprocessing import get_context

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers import trainer as transformers_trainer

from performers.data.masking import NOT_SCORED, MaskedCollator
from performers.data.vocabulary import MASK_TOKEN_ID
from performers.train import Run, UnsavedError, has_finished, load_config
from performers.train.checkpoints import SealCheckpoints, is_whole, last_whole_checkpoint
from performers.train.redraw import RedrawFeatures
from performers.train.tasks import build_model
from performers.train.trainer import ProgressLine, SetMaskingEpoch, TokenTrainer


def train_until_killed(moment, step, config_file, folder):
    """A run in a process of its own, which kills itself with signal 9 at a moment of a step."""
    method = getattr(SealCheckpoints, moment)

    def killing(self, args, state, control, **kwargs):
        if state.global_step == step and "compare" not in args.output_dir:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, args, state, control, **kwargs)

    setattr(SealCheckpoints, moment, killing)
    Run.prepare(load_config(config_file), folder).train()


@pytest.fixture(scope="module")
def whole_run(config_file, tmp_path_factory):
    """The folder and the metrics of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    torch.set_num_threads(1)
    return folder, Run.prepare(load_config(config_file), folder).train()


def comparable(metrics):
    """What must not depend on when a run was interrupted: all but times and memory."""
    timings = ("_runtime", "_per_second", "_preparation_time", "total_flos", "seconds")
    return [
        {
            "attention": model["attention"],
            "metrics": model["metrics"],
            "tokens": model["tokens"],
            "history": [
                {key: value for key, value in entry.items() if not key.endswith(timings)}
                for entry in model["history"]
            ],
        }
        for model in metrics["models"]
    ]


@pytest.mark.parametrize(
    ("moment", "step", "last"),
    [
        ("on_step_end", 13, "checkpoint-10"),  # between two checkpoints
        ("on_save", 10, "checkpoint-5"),  # all files of a checkpoint are there but the seal
    ],
)
def test_a_run_killed_with_signal_9_ends_with_the_same_numbers(
    moment, step, last, whole_run, config_file, tmp_path
):
    folder = tmp_path / "killed"
    arguments = (moment, step, config_file, folder)
    process = get_context("fork").Process(target=train_until_killed, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert last_whole_checkpoint(folder / "checkpoints").name == last
    assert not has_finished(folder)

    resumed = Run.prepare(load_config(config_file), folder, resume=True).train()
    assert comparable(resumed) == comparable(whole_run[1])
    for name in ("model", "compare/exact/model"):
        weights = load_file(whole_run[0] / name / "model.safetensors")
        again = load_file(folder / name / "model.safetensors")
        assert weights.keys() == again.keys()
        assert all(torch.equal(weights[key], again[key]) for key in weights)


def test_a_run_killed_after_its_last_step_takes_no_further_step(whole_run, config_file, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").parent.mkdir()
    for name in ("config.yaml", "environment.json"):
        (folder / name).write_bytes((whole_run[0] / name).read_bytes())
    last = last_whole_checkpoint(whole_run[0] / "checkpoints")
    (folder / "checkpoints" / last.name).mkdir(parents=True)
    for path in last.iterdir():
        (folder / "checkpoints" / last.name / path.name).write_bytes(path.read_bytes())
    resumed = Run.prepare(load_config(config_file), folder, resume=True).train()
    assert comparable(resumed) == comparable(whole_run[1])


def test_every_checkpoint_of_a_run_is_whole_and_holds_the_redrawn_features(whole_run):
    folder, _ = whole_run
    checkpoints = sorted((folder / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["checkpoint-15", "checkpoint-17"]
    assert all(is_whole(path) for path in checkpoints)
    for path in checkpoints:
        weights = load_file(path / "model.safetensors")
        redraws = [int(value) for name, value in weights.items() if name.endswith("num_redraws")]
        assert redraws == [5, 5]  # every 3 steps; the checkpoint of step 15 is after the fifth


def test_the_metrics_say_what_the_models_reached(whole_run):
    folder, metrics = whole_run
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert [model["attention"] for model in metrics["models"]] == ["performer-relu", "exact"]
    assert set(metrics["baseline"]) == {"valid", "test", "ood"}
    for model in metrics["models"]:
        assert model["steps"] == 17
        assert model["seconds"] > 0
        for split, scores in model["metrics"].items():
            # Models and baseline answer the same questions.
            assert scores["num_scored"] == metrics["baseline"][split]["num_scored"]
        (last,) = [e for e in model["history"] if e["step"] == 17 and "eval_loss" in e]
        assert last["eval_loss"] == model["metrics"]["valid"]["loss"]
    performer, exact = metrics["models"]
    assert performer["tokens"] == exact["tokens"]
    assert performer["parameters"] == exact["parameters"]


def test_the_models_of_a_run_start_from_the_same_weights(config_file):
    config = load_config(config_file)
    torch.manual_seed(0)
    performer = build_model(config).state_dict()
    torch.manual_seed(0)
    exact = build_model(config.with_attention("exact")).state_dict()
    assert exact.keys() <= performer.keys()
    assert all(torch.equal(performer[name], weight) for name, weight in exact.items())


def test_a_run_shows_one_line_of_progress_in_a_notebook_too(config_file, tmp_path, monkeypatch):
    """There the Trainer's own callback is another one, which draws a table."""

    class Table(TrainerCallback):
        pass

    monkeypatch.setattr(transformers_trainer, "DEFAULT_PROGRESS_CALLBACK", Table)
    config = load_config(config_file, ["trainer.disable_tqdm=false"])
    run = Run.prepare(config, tmp_path / "run")
    model = build_model(config)
    trainer = TokenTrainer(config, tmp_path / "run", model, run.data.train, run.data.valid)
    shown = [
        type(callback)
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, Table | ProgressCallback | PrinterCallback)
    ]
    assert shown == [ProgressLine]


def test_masks_change_with_the_epoch_and_not_between_evaluations(config_file, tmp_path):
    config = load_config(config_file)
    run = Run.prepare(config, tmp_path / "run")
    model = build_model(config)
    trainer = TokenTrainer(config, tmp_path / "run", model, run.data.train, run.data.valid)

    def labels(loader):
        return torch.cat([batch["labels"].flatten() for batch in loader])

    before = labels(trainer.get_eval_dataloader())
    trainer.data_collator.set_epoch(1)
    assert torch.equal(labels(trainer.get_eval_dataloader()), before)
    for batch in trainer.get_eval_dataloader():  # no answer can be copied
        assert batch["input_ids"][batch["labels"] != NOT_SCORED].eq(MASK_TOKEN_ID).all()
    first = [run.data.train[0]]
    masks = []
    for epoch in (0, 1):
        trainer.data_collator.set_epoch(epoch)
        masks.append(trainer.data_collator(first)["labels"])
    assert not torch.equal(*masks)


def test_features_are_redrawn_every_so_many_steps(config_file, tmp_path):
    model, redraw = build_model(load_config(config_file)), RedrawFeatures(3)
    arguments, control = TrainingArguments(str(tmp_path)), TrainerControl()
    counts = []
    for step in range(1, 8):
        redraw.on_step_end(arguments, TrainerState(global_step=step), control, model=model)
        counts.append(int(model.performer.layers[0].attention.mechanism.feature_map.num_redraws))
    assert counts == [0, 0, 1, 1, 1, 2, 2]


def test_the_collator_learns_which_epoch_begins(tmp_path):
    collator = MaskedCollator()
    callback = SetMaskingEpoch(collator)
    arguments, control = TrainingArguments(str(tmp_path)), TrainerControl()
    epochs = []
    for epoch in (None, 0.0, 1.0, 2.0):
        callback.on_epoch_begin(arguments, TrainerState(epoch=epoch), control)
        epochs.append(collator.epoch)
    assert epochs == [0, 0, 1, 2]


def test_a_diverged_run_ends_before_such_weights_are_saved(config_file, tmp_path):
    config = load_config(config_file, ["trainer.learning_rate=1e30", "compare=[]"])
    run = Run.prepare(config, tmp_path / "run")
    with pytest.raises(FloatingPointError, match=r"diverged: the loss is nan at step \d"):
        run.train()
    assert not (tmp_path / "run" / "model").exists()
    assert last_whole_checkpoint(tmp_path / "run" / "checkpoints") is None


def test_a_folder_that_holds_a_run_is_refused(whole_run, config_file):
    folder, _ = whole_run
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(FileExistsError, match=r"already holds a run. Add --resume"):
        Run.prepare(load_config(config_file), folder)
    assert sorted(path.name for path in folder.rglob("*")) == before


def test_a_folder_that_holds_something_else_is_refused(config_file, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="holds something that is not a run"):
        Run.prepare(load_config(config_file), tmp_path)


def test_resuming_with_another_config_is_refused_by_key(whole_run, config_file):
    config = load_config(config_file, ["model.intermediate_size=19"])
    with pytest.raises(ValueError, match=r"model.intermediate_size was 17 and is 19"):
        Run.prepare(config, whole_run[0], resume=True)


def test_a_checkpoint_that_does_not_fit_is_refused_before_work(whole_run, config_file, tmp_path):
    folder = tmp_path / "run"
    last = last_whole_checkpoint(whole_run[0] / "checkpoints")
    (folder / "checkpoints" / last.name).mkdir(parents=True)
    for path in last.iterdir():
        (folder / "checkpoints" / last.name / path.name).write_bytes(path.read_bytes())
    config = load_config(config_file, ["model.intermediate_size=19"])
    (folder / "config.yaml").write_text(config.to_yaml())
    with pytest.raises(ValueError, match=r"does not match its config: .*17.* in the checkpoint"):
        Run.prepare(config, folder, resume=True)


def copy_of(run, folder):
    """The run without its data sets' largest files: what `prepare` looks at."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("tensorboard", "model"))
    return folder


@pytest.mark.parametrize("name", ["processes", "devices_per_process"])
def test_resuming_with_other_steps_on_other_processes_is_refused_by_name(
    whole_run, config_file, tmp_path, name
):
    folder = copy_of(whole_run[0], tmp_path / "run")
    path = folder / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: 2}))
    with pytest.raises(ValueError, match="a step would be of 11 sequences, and was of 22"):
        Run.prepare(load_config(config_file), folder, resume=True)
    # Steps are as before, but not what dropout draws.
    as_before = load_config(config_file, ["trainer.gradient_accumulation_steps=2"])
    with pytest.raises(ValueError, match=r"each process draws .* for model.hidden_dropout_prob"):
        Run.prepare(as_before, folder, resume=True)
    path.write_text(json.dumps({**json.loads(path.read_text()), name: 1}))
    assert Run.prepare(load_config(config_file), folder, resume=True).environment[name] == 1


@pytest.mark.parametrize(
    "name",
    [
        "environment.json",
        "config.yaml",
        "result.json",
        "compare/exact/result.json",
        "checkpoints/checkpoint-17/trainer_state.json",
    ],
)
@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_file_of_a_run_is_named_before_work(whole_run, config_file, tmp_path, name, text):
    folder = copy_of(whole_run[0], tmp_path / "run")
    path = folder / name
    if "checkpoint-17" in name:  # of the size that is sealed
        text = text.ljust(path.stat().st_size)
    path.write_text(text)
    with pytest.raises(ValueError, match=str(path)):
        Run.prepare(load_config(config_file), folder, resume=True)


@pytest.mark.parametrize("written", [{}, {"processes": 1}, {"processes": "one"}, {"processes": 0}])
def test_an_environment_without_its_processes_is_not_taken_for_that_of_one(
    whole_run, config_file, tmp_path, written
):
    folder = copy_of(whole_run[0], tmp_path / "run")
    (folder / "environment.json").write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"environment.json must hold how many processes and dev"):
        Run.prepare(load_config(config_file), folder, resume=True)


@pytest.mark.parametrize("scores", [{}, {"metrics": 3}, {"metrics": {"valid": {}}}])
def test_a_result_without_its_numbers_is_named_before_work(
    whole_run, config_file, tmp_path, scores
):
    folder = copy_of(whole_run[0], tmp_path / "run")
    path = folder / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **scores} if scores else {}))
    with pytest.raises(ValueError, match=rf"{path} must hold what a model reached"):
        Run.prepare(load_config(config_file), folder, resume=True)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_damaged_state_of_a_checkpoint_is_named_with_what_to_do(
    whole_run, config_file, tmp_path, name
):
    folder = copy_of(whole_run[0], tmp_path / "run")
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-17")
    path = folder / "checkpoints" / "checkpoint-15" / name
    path.write_bytes(b"x" * path.stat().st_size)
    run = Run.prepare(load_config(config_file), folder, resume=True)
    with pytest.raises(ValueError, match=r"checkpoint-15 must hold .* Delete this folder, and go"):
        run.train()


def test_a_run_whose_disk_is_full_keeps_its_last_checkpoint(config_file, tmp_path, monkeypatch):
    config, folder = load_config(config_file, ["compare=[]"]), tmp_path / "run"
    run, save = Run.prepare(config, folder), torch.save

    def full(tree, path, *args):
        if "checkpoint-10" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:659] . iostream error")
        save(tree, path, *args)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UnsavedError, match=r"run/checkpoints/checkpoint-10 could not be written"):
        run.train()
    monkeypatch.undo()
    assert last_whole_checkpoint(folder / "checkpoints").name == "checkpoint-5"
    Run.prepare(config, folder, resume=True)


def test_a_full_disk_is_said_whoever_writes(config_file, tmp_path, monkeypatch):
    """TensorBoard's events are written on the way, by a library."""
    config, folder = load_config(config_file, ["compare=[]"]), tmp_path / "run"
    run = Run.prepare(config, folder)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with pytest.raises(UnsavedError, match=r"run could not be written: .*go on with --resume"):
        run.train()
    monkeypatch.undo()
    Run.prepare(config, folder, resume=True)


def test_nothing_is_created_when_the_data_is_wrong(config_file, tmp_path):
    wrong = tmp_path / "wrong.fasta"
    wrong.write_text(">p1\nMK1V\n")
    config = load_config(config_file, [f"data.source=[{wrong}]"])
    with pytest.raises(ValueError, match=r"wrong.fasta, line 2: '1'"):
        Run.prepare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
