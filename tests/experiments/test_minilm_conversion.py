"""What a conversion keeps of a pretrained model, and gives back, is what the numbers say."""

import json

import pytest

from performers.reproduction.protocol import EXPERIMENTS

FOLDER = EXPERIMENTS / "minilm-conversion"
NEAR = "sharp, calibrated, window 64"


@pytest.fixture(scope="module")
def record():
    return json.loads((FOLDER / "reduced.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def before(record):
    """Scores at m = 256 by the title of a conversion, untrained."""
    index = record["config"]["num_projections"].index(256)
    return {title: points[index] for title, points in record["results"]["converted"].items()}


@pytest.fixture(scope="module")
def after(record):
    """The same after recovery."""
    index = record["config"]["recovered_projections"].index(256)
    return {title: points[index] for title, points in record["results"]["recovered"].items()}


def test_sharp_features_and_a_window_keep_more_than_plain_features(before, record):
    unrelated = record["results"]["unrelated"]
    cosine = {title: scores["cosine"] for title, scores in before.items()}
    assert unrelated < cosine["FAVOR+"] < cosine["sharp, calibrated"] < cosine["sharp"]
    assert cosine["FAVOR+, window 64"] < cosine[NEAR]
    assert cosine["sharp"] >= 0.84
    assert cosine["sharp, calibrated"] >= 0.80
    assert cosine["sharp, window 64"] >= 0.94
    assert cosine[NEAR] >= 0.92


def test_recovery_gives_back_embeddings_and_ranks_of_texts_not_trained_on(before, after):
    for title, scores in after.items():
        assert all(scores[name] > before[title][name] for name in ("cosine", "rank"))
    assert after[NEAR]["cosine"] >= 0.97
    assert after[NEAR]["cpu_seconds"] < 15 * 60
