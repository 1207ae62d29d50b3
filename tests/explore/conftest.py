"""Runs as `performers train` leaves them, small and made up."""

import json

import pytest


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
