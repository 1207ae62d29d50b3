"""Tables for the terminal: each number in its column, by the definition of its heading."""

import math
import re

from performers.train import results_table, scores_table


def scores(accuracy, loss):
    return {
        "accuracy": accuracy,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_character": loss / math.log(2),
        "num_scored": 1013,
    }


def cells(line):
    return re.split(r"\s{2,}", line.strip())


def test_results_are_in_their_columns_split_by_split():
    losses = {"valid": 2.5, "test": 2.25}
    metrics = {
        "baseline": {"valid": scores(0.09, 2.75), "test": scores(0.08, 3.0)},
        "data": {"splits": {"valid": {"title": "Validation"}, "test": {"title": "Test"}}},
        "models": [
            {
                "attention": "performer-relu",
                "tokens": 62037,
                "seconds": 61.4,
                "peak_memory": 3 * 2**20,
                "metrics": {split: scores(0.125, loss) for split, loss in losses.items()},
            },
            {
                "attention": "exact",
                "tokens": 517,
                "seconds": 7.0,
                "peak_memory": None,
                "metrics": {split: scores(0.25, loss / 2) for split, loss in losses.items()},
            },
        ],
    }
    assert [cells(line) for line in results_table(metrics).splitlines()] == [
        ["Validation"],
        ["accuracy", "perplexity", "bits per character"],
        ["empirical baseline", "9.00%", "15.643", "3.967"],
        ["performer-relu", "12.50%", "12.182", "3.607"],
        ["exact", "25.00%", "3.490", "1.803"],
        [""],
        ["Test"],
        ["accuracy", "perplexity", "bits per character"],
        ["empirical baseline", "8.00%", "20.086", "4.328"],
        ["performer-relu", "12.50%", "9.488", "3.246"],
        ["exact", "25.00%", "3.080", "1.623"],
        [""],
        ["Cost of training"],
        ["tokens seen", "training time", "peak memory"],
        ["performer-relu", "62,037", "61 s", "3 MiB"],
        ["exact", "517", "7 s", "not known"],
    ]


def test_scores_of_an_evaluation_are_beside_their_names():
    assert [cells(line) for line in scores_table(scores(0.125, 2.5)).splitlines()] == [
        ["accuracy", "0.1250"],
        ["loss", "2.5000"],
        ["perplexity", "12.1825"],
        ["bits per character", "3.6067"],
        ["num scored", "1013"],
    ]
