"""report.html: one self-contained page about a training run, made from its metrics.json."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from performers.records import holding, read_json, replace_text, writing
from performers.viz.figures import attention_figure, curves_figure

__all__ = ["comparison_tables", "write_report"]

TEMPLATE = Path(__file__).with_name("report.html")

TASKS = {
    "masked-lm": (
        "15 % of the residues are hidden; the model predicts them from the rest of the protein.",
        "hidden residues",
    ),
    "causal-lm": ("The model predicts each residue from those before it.", "next residues"),
}

TASKS_OF_TEXT = {
    "masked-lm": (
        "15 % of the tokens are hidden; the model predicts them from the rest of the sequence.",
        "hidden tokens",
    ),
    "causal-lm": ("The model predicts each token from those before it.", "next tokens"),
}

SPLITS = {
    "cluster": "Whole clusters of similar sequences are held out, so that no close relative of a "
    "training protein is among those tested.",
    "sequence": "Proteins are held out at random, as in the paper, so that relatives of training "
    "proteins are among those tested.",
}


def write_report(run: Path) -> Path:
    """Write report.html and its PNGs into the run folder; returns the path of the page.

    Reads metrics.json and, where a model left one, its attention.npz. The page contains its images
    and styles, and loads nothing from a network.

    Raises FileNotFoundError, DamagedFileError and UnsavedError.
    """
    source, remedy = run / "metrics.json", "Delete it, and train --resume writes it anew."
    metrics = read_json(source, remedy)
    with holding(source, "the numbers of a run", remedy):
        page = _page(run, metrics)
    path = run / "report.html"
    replace_text(path, page, _again(run))
    return path


def _again(run: Path) -> str:
    """What is left to do where the report could not be written."""
    return f"draw the report with: performers report {run}"


def comparison_tables(metrics: Mapping[str, Any]) -> str:
    """HTML of the models of a run: an overview, the scores on each split, and the cost."""
    scores = [_metrics_table(metrics, split) for split in metrics["baseline"]]
    return "\n".join([_overview(metrics), *scores, _cost_table(metrics["models"])])


def _page(run: Path, metrics: Mapping[str, Any]) -> str:
    """The page, and the pictures that are saved beside it."""
    models = metrics["models"]
    curves = curves_figure(
        {model["attention"]: model["history"] for model in models},
        metrics["baseline"]["valid"],
        _bits(metrics),
    )
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(
            f"{models[0]['attention']} on {'text' if _is_of_text(metrics) else 'proteins'}"
        ),
        bits=_bits(metrics).capitalize(),
        headline=html.escape(_headline(metrics)),
        subtitle=html.escape(_subtitle(metrics)),
        overview=_overview(metrics),
        explanation=html.escape(_explanation(metrics)),
        tables="".join(_metrics_table(metrics, split) for split in metrics["baseline"]),
        cost_explanation=html.escape(_cost_explanation(metrics)),
        cost=_cost_table(models),
        curves=_save_and_embed(curves, run / "curves.png", _again(run)),
        attention="".join(_attention(run, metrics)),
        facts=_facts(metrics),
        config=html.escape(yaml.safe_dump(metrics["config"], sort_keys=False).rstrip()),
    )


def _is_of_text(metrics: Mapping[str, Any]) -> bool:
    return metrics["config"]["data"].get("text") is not None


def _bits(metrics: Mapping[str, Any]) -> str:
    return "bits per token" if _is_of_text(metrics) else "bits per character"


def _task(metrics: Mapping[str, Any]) -> tuple[str, str]:
    return (TASKS_OF_TEXT if _is_of_text(metrics) else TASKS)[metrics["config"]["task"]]


def _headline(metrics: Mapping[str, Any]) -> str:
    model, *others = metrics["models"]
    if metrics["config"]["max_seconds"] is not None and others:
        return _headline_for_equal_time(
            metrics["config"]["max_seconds"], model, others, _bits(metrics)
        )
    accuracy = model["metrics"]["valid"]["accuracy"]
    baseline = metrics["baseline"]["valid"]["accuracy"]
    what = _task(metrics)[1]
    of, commonest = ("text", "token") if _is_of_text(metrics) else ("proteins", "amino acid")
    verdict = "more" if accuracy > baseline else "no more"
    return (
        f"{model['attention']} predicts {accuracy:.1%} of the {what} of {of} it has not seen, "
        f"{verdict} than the {baseline:.1%} that the commonest {commonest} gets."
    )


def _headline_for_equal_time(
    seconds: float, model: Mapping[str, Any], others: Sequence[Mapping[str, Any]], unit: str
) -> str:
    tokens = [
        f"{model['tokens'] / other['tokens']:.3g} times the tokens of {other['attention']}"
        for other in others
    ]
    bits = [f"{one['metrics']['valid']['bits_per_character']:.3f}" for one in (model, *others)]
    return (
        f"In {_duration(seconds)} of training each, {model['attention']} saw "
        f"{' and '.join(tokens)}, and reached {bits[0]} {unit} against "
        f"{' and '.join(bits[1:])}."
    )


def _subtitle(metrics: Mapping[str, Any]) -> str:
    data = metrics["config"]["data"]
    kind = "proteins joined to windows of" if data["concatenate"] else "proteins of at most"
    if _is_of_text(metrics):
        kind = "sequences of at most"
    return (
        f"{kind.capitalize()} {data['length']:,} tokens, models of "
        f"{metrics['models'][0]['parameters']:,} parameters, {metrics['created']}."
    )


def _explanation(metrics: Mapping[str, Any]) -> str:
    held_out = SPLITS[metrics["config"]["data"]["split_by"]]
    kind = "amino acid"
    if _is_of_text(metrics):
        held_out, kind = "The end of a text is held out, or records at random.", "token"
    return (
        f"{_task(metrics)[0]} {held_out} "
        f"The empirical baseline knows only how frequent each {kind} is in the training set. "
        "All models saw the same batches in the same order, from the same seed"
        + ("." if metrics["config"]["max_seconds"] is None else ", as many as fit into the time.")
    )


def _cost_explanation(metrics: Mapping[str, Any]) -> str:
    limit = metrics["config"]["max_seconds"]
    budget = (
        ""
        if limit is None
        else (f" Each model had {_duration(limit)} and finished the step that it was in.")
    )
    resident = (
        " Resident memory is what the process took while it trained, with the gaps that the C "
        "library leaves between tensors of many sizes; it varies from run to run."
        if _has_resident(metrics["models"])
        else ""
    )
    return (
        f"Time is that of the optimizer steps alone.{budget} Peak memory is the most that weights, "
        f"gradients, optimizer state and activations took at a time.{resident}"
    )


def _has_resident(models: Sequence[Mapping[str, Any]]) -> bool:
    """Not on an accelerator, nor of runs that did not measure it."""
    return any(model.get("resident_memory") for model in models)


def _overview(metrics: Mapping[str, Any]) -> str:
    rows = []
    for index, model in enumerate(metrics["models"]):
        scores = model["metrics"]["valid"]
        cells = [
            model["attention"],
            f"{model['tokens']:,}",
            f"{scores['accuracy']:.2%}",
            f"{scores['bits_per_character']:.3f}",
            _bytes(model["peak_memory"]),
        ]
        rows.append(("" if index else "main", cells))
    scores = metrics["baseline"]["valid"]
    cells = [f"{scores['accuracy']:.2%}", f"{scores['bits_per_character']:.3f}"]
    rows.append(("baseline", ["empirical baseline", "", *cells, ""]))
    header = ["", "tokens seen", "validation accuracy", _bits(metrics), "peak memory"]
    return _table("", header, rows)


def _metrics_table(metrics: Mapping[str, Any], split: str) -> str:
    rows = [("empirical baseline", metrics["baseline"][split], "baseline")]
    for index, model in enumerate(metrics["models"]):
        rows.append((model["attention"], model["metrics"][split], "" if index else "main"))
    first = rows[0][1]
    description = metrics["data"]["splits"][split]
    return _table(
        f"{description['title']}: {description['sequences']:,} sequences, "
        f"{first['num_scored']:,} scored positions",
        ["", "accuracy", "perplexity", _bits(metrics)],
        [
            (
                kind,
                [
                    name,
                    f"{scores['accuracy']:.2%}",
                    f"{scores['perplexity']:.3f}",
                    f"{scores['bits_per_character']:.3f}",
                ],
            )
            for name, scores, kind in rows
        ],
    )


def _cost_table(models: Sequence[Mapping[str, Any]]) -> str:
    header = ["", "optimizer steps", "training time", "tokens per second", "parameters"]
    rows = [
        [
            model["attention"],
            f"{model['steps']:,}",
            _duration(model["seconds"]),
            f"{model['tokens_per_second']:,.0f}",
            f"{model['parameters']:,}",
        ]
        for model in models
    ]
    if _has_resident(models):
        header.append("resident memory")
        for model, row in zip(models, rows, strict=True):
            row.append(_bytes(model.get("resident_memory")))
    return _table("", header, [("" if index else "main", row) for index, row in enumerate(rows)])


def _table(caption: str, header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f'<tr class="{kind}">'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for kind, cells in rows
    )
    caption = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{caption}<tr>{head}</tr>{body}</table></div>'


def _attention(run: Path, metrics: Mapping[str, Any]) -> Iterable[str]:
    for model in metrics["models"]:
        if "attention_maps" not in model:
            continue
        name = model["attention"]
        maps = run / model["attention_maps"]["file"]
        remedy = "Delete attention_maps in metrics.json to draw the report without them."
        with holding(maps, "attention matrices of a run", remedy), np.load(maps) as arrays:
            figure = attention_figure(arrays["attention"], arrays["layers"].tolist())
        source = _save_and_embed(figure, run / f"attention-{name}.png", _again(run))
        protein = html.escape(model["attention_maps"]["protein"])
        yield (
            f'<figure><img alt="Attention matrices of {html.escape(name)}" src="{source}">'
            f"<figcaption>The attention matrices of {html.escape(name)} on {protein}. Rows attend "
            "to columns. A linear mechanism never forms its matrices; they are read out through "
            "one-hot values.</figcaption></figure>"
        )


def _facts(metrics: Mapping[str, Any]) -> str:
    environment = metrics["environment"]
    hardware = ", ".join(
        [*environment["accelerators"], f"{environment['processor']} ({environment['cores']} cores)"]
    )
    facts = {
        "again": "performers train config.yaml, with the config.yaml beside this page",
        "seed": str(metrics["config"]["seed"]),
        "data": metrics["data"]["description"],
        "hardware": hardware,
        "threads": str(environment["threads"]),
        "versions": ", ".join(
            [f"Python {environment['python']}"]
            + [f"{name} {version}" for name, version in environment["packages"].items()]
        ),
    }
    return "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items()
    )


def _save_and_embed(figure: Figure, path: Path, then: str) -> str:
    with writing(path, then):
        figure.savefig(path, format="png")
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def _bytes(count: int | None) -> str:
    if count is None:
        return "not known"
    return f"{count / 2**20:,.0f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"
