"""Runs beside each other: found, named, and compared only where they can be."""

import pytest

from performers.explore.runs import combined, found_runs, show


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
