"""Each model of a run is a run of the trackers that the config names."""

import sys

import pytest

from performers.train import Run, load_config


@pytest.fixture
def run(config_file, tmp_path):
    """Train a model and one that it is compared with, told to a tracker."""

    def train(tracker):
        config = load_config(config_file, [f"trainer.report_to={tracker}", "compare=[identity]"])
        return Run.prepare(config, tmp_path / "run").train()

    return train


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(run, tmp_path, monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(ValueError, match=rf"needs the package {tracker}.*pip install {tracker}"):
        run(tracker)
    assert not (tmp_path / "run").exists()


def test_mlflow_has_the_losses_of_each_model(run, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    models = run("mlflow")["models"]
    found = mlflow.search_runs(output_format="list", search_all_experiments=True)
    assert {one.info.status for one in found} == {"FINISHED"}
    losses = {one.info.run_name: one.data.metrics["eval_loss"] for one in found}
    folders = [tmp_path / "run", tmp_path / "run" / "compare" / "identity"]
    assert losses == {
        str(folder): [entry["eval_loss"] for entry in model["history"] if "eval_loss" in entry][-1]
        for folder, model in zip(folders, models, strict=True)
    }


def test_wandb_has_a_run_for_each_model_without_a_network(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run("wandb")
    written = [path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/*.wandb")]
    assert len(written) == 2
    assert all(b"eval/loss" in log for log in written)
