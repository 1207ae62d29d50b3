"""The tab of runs: curves, scores and cost of several training runs, from what they wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from performers.explore.parts import answered, picture
from performers.records import holding, read_json
from performers.viz.figures import COLORS, curves_figure
from performers.viz.report import comparison_tables

__all__ = ["combined", "found_runs", "runs_tab"]

# What `performers train` writes at the end of a run.
METRICS = "metrics.json"
REMEDY = "Delete it, and train --resume writes it anew."


def found_runs(folder: Path) -> list[str]:
    """The folders of finished runs in a folder, or the folder itself if it is one, by name."""
    if (folder / METRICS).is_file():
        return [str(folder)]
    return [str(path.parent) for path in sorted(folder.glob(f"*/{METRICS}"))]


def combined(runs: Sequence[str]) -> dict[str, Any]:
    """The metrics of several runs as those of one, whose models are named by run and attention.

    Raises ValueError for no run, for more models than there are colors, and for runs whose scores
    cannot be compared because the baselines differ, which means that the data do.
    """
    if not runs:
        raise ValueError("there must be a run to show, got none. Choose one or several.")
    models, first = [], None
    for run in runs:
        path = Path(run) / METRICS
        metrics = read_json(path, REMEDY)
        with holding(path, "the numbers of a run", REMEDY):
            first = first or metrics
            metrics["config"]["data"]  # the report of a run reads it
            if metrics["baseline"] != first["baseline"]:
                raise ValueError(
                    "runs must have been scored on the same data to be compared, and "
                    f"{Path(run).name} has another baseline than {Path(runs[0]).name}. Choose runs "
                    "of one data set, split and length."
                )
            for model in metrics["models"]:
                name = f"{Path(run).name}: {model['attention']}" if len(runs) > 1 else None
                models.append({**model, "attention": name or model["attention"]})
    if len(models) > len(COLORS):
        raise ValueError(
            f"at most {len(COLORS)} models can be told apart in one picture: these runs have "
            f"{len(models)}. Choose fewer."
        )
    assert first is not None, "there is a run"
    return {**first, "models": models}


def show(runs: Sequence[str]) -> tuple[str, str]:
    """The curves and the tables of these runs."""
    metrics = combined(runs)
    histories = {model["attention"]: model["history"] for model in metrics["models"]}
    drawn = picture(
        f"Bits per character of {', '.join(histories)}, against time and against tokens.",
        curves_figure,
        histories,
        metrics["baseline"]["valid"],
    )
    return drawn, comparison_tables(metrics)


def runs_tab(gr: Any, tab: Any, folder: Path) -> None:
    """Lay out the tab, on a page that is being built."""
    gr.Markdown(
        "Finished runs of `performers train`: bits per character as they were trained, scores, and "
        "cost. Runs on the same data can be put beside each other."
    )
    runs = found_runs(folder)
    with gr.Row():
        chosen = gr.CheckboxGroup(runs, value=runs[:1], label=f"runs in {folder}")
        again = gr.Button("Look for runs", scale=0)
    if not runs:
        gr.Markdown(f"There is none yet. `performers train demo --output {folder}/demo` makes one.")
    outputs = [gr.HTML(elem_id="curves"), gr.HTML(elem_id="tables")]
    draw = answered(show)
    if runs:
        tab.select(draw, chosen, outputs)
    chosen.input(draw, chosen, outputs)
    again.click(lambda: gr.CheckboxGroup(found_runs(folder)), None, chosen)
