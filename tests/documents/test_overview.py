"""The README's first screen says and draws what the committed benchmark measured."""

import importlib.util
import json
from pathlib import Path

import pytest

from performers.speed import wins_from

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location(
        "draw_overview", ROOT / "docs" / "draw_overview.py"
    )
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def results(script):
    return json.loads(script.RESULTS.read_text(encoding="utf-8"))


def test_the_picture_draws_the_committed_benchmark(script, results):
    """matplotlib writes each text of an SVG as a comment beside the outlines of its letters."""
    picture = script.PICTURE.read_text(encoding="utf-8")
    figure = script.overview_figure(results)
    words = [
        line
        for axes in figure.axes
        for text in [axes.title, *axes.texts]
        for line in text.get_text().splitlines()
    ]
    assert any(line.endswith(" ms") for line in words)
    assert any(line.endswith(" MiB") for line in words)
    assert [line for line in words if line not in picture] == []


def test_the_picture_goes_through_the_medians(script, results):
    training, decoding = script.overview_figure(results).axes[1:]
    rows = [row for row in results["time"] if row["causal"] and row["dtype"] == "float32"]
    for line, name in zip(training.lines, script.TRAINING, strict=True):
        milliseconds = [row["seconds"][name]["forward_backward"]["median"] * 1e3 for row in rows]
        assert list(line.get_xdata()) == [row["length"] for row in rows]
        assert list(line.get_ydata()) == milliseconds
    for line, name in zip(decoding.lines, script.DECODING, strict=True):
        milliseconds = [row["seconds"][name]["median"] * 1e3 for row in results["decoding"]]
        assert list(line.get_ydata()) == milliseconds


def test_the_readme_says_from_which_length_on_a_near_field_is_faster(results):
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    lengths = {
        causal: wins_from(results["time"], "near-field", "float32", causal, "forward_backward")
        for causal in (True, False)
    }
    words = {
        causal: f"{length[2:]} or less" if length.startswith("≤") else f"about {length}"
        for causal, length in lengths.items()
    }
    assert (
        f"from a length of {words[True]} on if it is causal, "
        f"and from {words[False]} on if it is bidirectional" in readme
    )
