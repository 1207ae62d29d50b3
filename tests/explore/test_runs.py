"""Runs beside each other: found, named, and compared only where they can be."""

import json

import pytest

from performers.explore.runs import combined, found_runs, show


def scores(loss):
    return {
        "accuracy": 0.1, "loss": loss, "perplexity": 8.0, "bits_per_character": loss,
        "num_scored": 1013,
    }  # fmt: skip


def model(attention, loss):
    return {
        "attention": attention, "parameters": 1234, "steps": 2, "tokens": 62037, "seconds": 61.0,
        "tokens_per_second": 1017.0, "peak_memory": None, "metrics": {"valid": scores(loss)},
        "history": [
            {"seconds": 30.0, "num_input_tokens_seen": 31018, "loss": 3.0},
            {"seconds": 61.0, "num_input_tokens_seen": 62037, "eval_loss": loss},
        ],
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """Two runs on the same data, one on other data, and a folder that is no run."""
    for name, baseline, models in (
        ("a", 2.9, [model("performer-relu", 2.1), model("exact", 2.2)]),
        ("b", 2.9, [model("performer-relu", 2.3)]),
        ("other", 2.8, [model("performer-relu", 2.4)]),
    ):
        metrics = {
            "models": models,
            "config": {"task": "masked-lm", "data": {}},
            "baseline": {"valid": scores(baseline)},
            "data": {"splits": {"valid": {"title": "Validation", "sequences": 7}}},
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "none").mkdir()
    return tmp_path


def test_the_runs_in_a_folder_are_found_and_a_run_finds_itself(runs):
    assert found_runs(runs) == [str(runs / name) for name in ("a", "b", "other")]
    assert found_runs(runs / "b") == [str(runs / "b")]
    assert found_runs(runs / "none") == []


def test_models_of_several_runs_are_named_by_their_run(runs):
    both = combined([str(runs / "a"), str(runs / "b")])
    names = [model["attention"] for model in both["models"]]
    assert names == ["a: performer-relu", "a: exact", "b: performer-relu"]
    alone = combined([str(runs / "b")])
    assert [model["attention"] for model in alone["models"]] == ["performer-relu"]


def test_curves_scores_and_cost_of_all_are_shown(runs):
    curves, tables = show([str(runs / "a"), str(runs / "b")])
    assert "Bits per character of a: performer-relu, a: exact, b: performer-relu" in curves
    for text in ("2.100", "2.200", "2.300", "61 s", "empirical baseline"):
        assert text in tables


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "there must be a run to show"),
        (["a", "other"], "other has another baseline than a"),
        (["a", "a", "a"], "at most 5 models .* these runs have 6"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(runs, names, words):
    with pytest.raises(ValueError, match=words):
        combined([str(runs / name) for name in names])
