"""The report is one page that needs nothing else, and says what the numbers say."""

import json
import math
import re

import numpy as np
import pytest

from performers.viz import attention_figure, curves_figure, write_report

ENVIRONMENT = {
    "python": "3.11",
    "packages": {"torch": "2.13"},
    "processor": "A <processor>",
    "cores": 2,
    "threads": 1,
    "accelerators": [],
}


def scores(accuracy, loss=2.0):
    return {
        "accuracy": accuracy,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_character": loss / math.log(2),
        "num_scored": 1013,
    }


def model(attention, accuracy, loss=2.0, tokens=62037, memory=3):
    return {
        "attention": attention,
        "parameters": 1234,
        "device": "cpu",
        "steps": 2,
        "tokens": tokens,
        "seconds": 61.0,
        "tokens_per_second": tokens / 61.0,
        "peak_memory": memory * 2**20,
        "resident_memory": 2 * memory * 2**20,
        "metrics": {"valid": scores(accuracy, loss)},
        "history": [
            {"step": 1, "seconds": 30.0, "num_input_tokens_seen": tokens // 2, "loss": 3.0},
            {"step": 2, "seconds": 61.0, "num_input_tokens_seen": tokens, "eval_loss": loss},
        ],
    }


@pytest.fixture
def run(tmp_path):
    """A finished run: its metrics and the attention matrices of its first model."""
    performer = model("performer-relu", 0.123)
    performer["attention_maps"] = {"file": "attention.npz", "protein": "BPT1_BOVIN"}
    matrices = np.random.default_rng(0).random((2, 3, 11, 11)).astype(np.float16)
    np.savez_compressed(tmp_path / "attention.npz", attention=matrices, layers=np.array([0, 5]))
    metrics = {
        "created": "2026-01-01",
        "config": {
            "task": "causal-lm",
            "seed": 3,
            "max_seconds": None,
            "data": {"split_by": "cluster", "length": 8192, "concatenate": True},
        },
        "environment": ENVIRONMENT,
        "data": {
            "description": "some proteins",
            "splits": {"valid": {"title": "Validation", "sequences": 17}},
        },
        "baseline": {"valid": scores(0.0907)},
        "models": [
            performer,
            model("exact", 0.131, 2.125, tokens=15511, memory=5),
            model("identity", 0.117, 2.25, tokens=131009, memory=2),
        ],
    }
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path


def test_the_report_asks_no_network_for_anything(run):
    page = write_report(run).read_text()
    outside = page.replace("data:image/png;base64,", "")
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r'src="[A-Za-z0-9+/=]+"', "", outside))
    assert not re.search(r"<(script|link|iframe)|@import|url\(", page)
    sources = re.findall(r'src="([^"]{0,22})', page)
    assert sources == ["data:image/png;base64,"] * 2  # curves and one attention picture


def test_the_report_shows_every_number_beside_the_baseline(run):
    page = write_report(run).read_text()
    for text in ("12.30%", "13.10%", "9.07%", "7.389", "2.885", "1,013", "61 s", "3 MiB", "1,234"):
        assert text in page
    assert "predicts 12.3% of the next residues" in page
    assert "more than the 9.1%" in page
    assert "BPT1_BOVIN" in page
    assert "performers train config.yaml" in page


def test_the_report_opens_with_what_each_model_saw_reached_and_took(run):
    """Cell by cell, from metrics.json."""
    page = write_report(run).read_text()
    first = re.search("<table>.*?</table>", page)[0]
    header, *rows = [
        re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr.*?</tr>", first)
    ]
    assert header[1:] == ["tokens seen", "validation accuracy", "bits per character", "peak memory"]
    metrics = json.loads((run / "metrics.json").read_text())
    for model, row in zip(metrics["models"], rows, strict=False):
        reached = model["metrics"]["valid"]
        assert row == [
            model["attention"],
            f"{model['tokens']:,}",
            f"{reached['accuracy']:.2%}",
            f"{reached['bits_per_character']:.3f}",
            f"{model['peak_memory'] // 2**20} MiB",
        ]
    assert [row[0] for row in rows] == ["performer-relu", "exact", "identity", "empirical baseline"]
    assert page.index(first) < page.index("<h2>")


def test_every_table_has_each_number_in_its_column(run):
    """From the accuracy and the loss that each model has, by the definitions."""
    found = re.findall("<table>.*?</table>", write_report(run).read_text())
    _, validation, cost = (
        [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr.*?</tr>", table)]
        for table in found
    )
    assert "Validation: 17 sequences, 1,013 scored positions" in found[1]
    reached = {
        "empirical baseline": (0.0907, 2.0),
        "performer-relu": (0.123, 2.0),
        "exact": (0.131, 2.125),
        "identity": (0.117, 2.25),
    }
    assert validation == [
        ["", "accuracy", "perplexity", "bits per character"],
        *(
            [name, f"{accuracy:.2%}", f"{math.exp(loss):.3f}", f"{loss / math.log(2):.3f}"]
            for name, (accuracy, loss) in reached.items()
        ),
    ]
    assert cost == [
        [
            "",
            "optimizer steps",
            "training time",
            "tokens per second",
            "parameters",
            "resident memory",
        ],
        ["performer-relu", "2", "61 s", "1,017", "1,234", "6 MiB"],
        ["exact", "2", "61 s", "254", "1,234", "10 MiB"],
        ["identity", "2", "61 s", "2,148", "1,234", "4 MiB"],
    ]


def test_without_resident_memory_there_is_no_column_of_it(run):
    metrics = json.loads((run / "metrics.json").read_text())
    for one in metrics["models"]:
        one["resident_memory"] = None
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert "resident memory" not in write_report(run).read_text().lower()


def test_the_headline_of_equal_time_gives_the_figures_of_all_models(run):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["config"]["max_seconds"] = 60.0
    (run / "metrics.json").write_text(json.dumps(metrics))
    headline = re.search("<h1>(.*?)</h1>", write_report(run).read_text())[1]
    assert headline == (
        "In 60 s of training each, performer-relu saw 4 times the tokens of exact and 0.474 times "
        "the tokens of identity, and reached 2.885 bits per character against 3.066 and 3.246."
    )


def test_the_curves_are_in_bits_against_seconds_and_against_tokens():
    histories = {one["attention"]: one["history"] for one in (model("exact", 0.1, loss=1.5),)}
    for axes, (half, end) in zip(
        curves_figure(histories, scores(0.1)).axes,
        ((30.0, 61.0), (0.031018, 0.062037)),
        strict=True,
    ):
        training, validation, _ = axes.lines
        np.testing.assert_allclose(training.get_xydata(), [[half, 3.0 / math.log(2)]])
        np.testing.assert_allclose(validation.get_xydata(), [[end, 1.5 / math.log(2)]])


def test_the_headline_does_not_claim_what_was_not_reached(run):
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["models"][0]["metrics"]["valid"]["accuracy"] = 0.05
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert "no more than the 9.1%" in write_report(run).read_text()


def test_the_future_of_a_causal_matrix_is_left_out():
    even = np.tril(np.ones((1, 1, 7, 7))) / np.arange(1, 8)[:, None]
    panel, _ = attention_figure(even, [0]).axes
    shown = panel.images[0].get_array()
    assert np.array_equal(shown.mask, np.triu(np.ones((7, 7), bool), 1))
    np.testing.assert_allclose(shown.compressed(), 1.0, rtol=1e-6)


def test_even_attention_has_the_ratio_one():
    panel, _ = attention_figure(np.full((1, 1, 5, 5), 0.2), [0]).axes
    np.testing.assert_allclose(panel.images[0].get_array(), 1.0, rtol=1e-6)


def test_words_from_outside_are_escaped(run):
    assert "A &lt;processor&gt;" in write_report(run).read_text()


def test_the_pictures_are_files_as_well(run):
    write_report(run)
    for name in ("curves.png", "attention-performer-relu.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("damage", [{"models": []}, {"config": {}}, {"baseline": {"valid": 3}}])
def test_metrics_of_another_shape_are_refused_by_the_name_of_their_file(run, damage):
    path = run / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    with pytest.raises(ValueError, match=r"metrics\.json must hold the numbers of a run, and has"):
        write_report(run)
