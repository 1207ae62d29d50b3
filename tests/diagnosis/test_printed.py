"""The tables of a diagnosis: under each heading stands the number that it names."""

import dataclasses

import pytest
from columns import by_heading, columns

from performers.diagnosis import Diagnosis, Frontier, HeadDiagnosis, Setting, recommendation
from performers.diagnosis.heads import short

HEAD = HeadDiagnosis(
    observed_error=0.101,
    expected_error=0.202,
    uniform_error=0.303,
    effective_features=4.04,
    query_norm=5.05,
    largest_query_norm=6.06,
    key_norm=7.07,
    largest_key_norm=8.08,
    mean_square_sum=9.09,
    predicted_projections=11.5,
    smallest_projections=16,
)


def test_the_numbers_of_a_head_stand_under_their_headings():
    none = dataclasses.replace(
        HEAD, expected_error=None, predicted_projections=None, smallest_projections=None
    )
    found = Diagnosis((HEAD, none), num_projections=32, target_error=0.5, max_projections=640)
    *table, legend = str(found).splitlines()
    common = ["5.050", "6.060", "7.070", "8.080", "9.090"]
    assert columns("\n".join(table)) == [
        [
            "head", "observed", "expected", "uniform", "of 32", "|q|", "max", "|k|", "max",
            "E|q+k|²", "m predicted", "m found",
        ],
        ["0", "0.101", "0.202", "0.303", "4.040", *common, "12", "16"],
        ["1", "0.101", "–", "0.303", "4.040", *common, "–", "> 640"],
    ]  # fmt: skip
    assert "of 32: features that carry the estimate" in legend
    assert "m predicted, found: for an error of 0.5" in legend
    without_target = Diagnosis((HEAD,), num_projections=32)
    assert columns(str(without_target))[1] == ["0", "0.101", "0.202", "0.303", "4.040", *common]


def setting(features, window_size, num_projections, error, operations, seconds=None):
    return Setting(
        features, window_size, num_projections, 0, error, operations, seconds is not None, seconds
    )


FRONTIER = Frontier(
    settings=(
        setting("positive", None, 16, 0.81, 10.0, seconds=0.4),
        setting("sharp", None, 16, 0.71, 20.0),
        setting("sharp", 64, 0, 0.51, 30.0, seconds=0.2),
        setting("sharp", 64, 16, 0.41, 60.0, seconds=0.6),
        setting("sharp", 128, 0, 0.31, 200.0),
    ),
    length=640,
    statistics=None,
    averaging_error=0.91,
    exact_operations=80.0,
    exact_seconds=0.8,
)


def test_the_errors_of_a_frontier_stand_at_their_near_field_and_their_m():
    grid, _ = str(FRONTIER).split("\n\n")
    *table, averaging = grid.splitlines()
    assert by_heading("\n".join(table)) == [
        {"error": "positive", "near alone": "–", "m = 16": "0.810"},
        {"error": "sharp", "near alone": "–", "m = 16": "0.710"},
        {"error": "sharp, blocks of 64", "near alone": "0.510", "m = 16": "0.410"},
        {"error": "sharp, blocks of 128", "near alone": "0.310", "m = 16": "–"},
    ]
    assert averaging == "averaging: 0.910"


def test_the_costs_of_a_frontier_are_shares_of_exact_attention():
    _, frontier = str(FRONTIER).split("\n\n")
    *table, last = frontier.splitlines()
    name, operations, time = "cheapest for its error", "operations ÷ exact", "time ÷ exact"
    assert by_heading("\n".join(table)) == [
        {name: "positive, m = 16", "error": "0.810", operations: "0.12", time: "0.50"},
        {name: "blocks of 64 alone", "error": "0.510", operations: "0.38", time: "0.25"},
        {name: "blocks of 64, sharp, m = 16", "error": "0.410", operations: "0.75", time: "0.75"},
    ]
    assert last.startswith("Below an error of 0.410 no setting is cheaper")
    found = FRONTIER.cost(FRONTIER.settings[0])
    assert found == "0.12 of the operations of exact attention at length 640"
    assert FRONTIER.cost(FRONTIER.settings[-1]).startswith("2.50 times the operations")


def test_a_recommendation_gives_each_kind_its_own_mean_over_layers():
    errors = {"positive": (0.9, 0.5), "sharp": (0.2, 0.3), "sharp + window": (0.6, 0.2)}
    layers = {
        name: {
            kind: Diagnosis(
                (dataclasses.replace(HEAD, observed_error=of[index], uniform_error=uniform),), 8
            )
            for kind, of in errors.items()
        }
        for index, (name, uniform) in enumerate([("first", 0.25), ("second", 0.3)])
    }
    means, best, hopeless = recommendation(layers).splitlines()
    assert means == "Mean error: positive 0.700, sharp 0.250, sharp + window 0.400"
    assert best == "Lowest with sharp features."
    assert "averaging the values in second: keep exact" in hopeless


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "–"), (9.9994, "9.999"), (10.0, "10"), (99999.0, "99999"), (2.5e5, "2e+05")],
)
def test_numbers_are_short(number, text):
    assert short(number) == text
