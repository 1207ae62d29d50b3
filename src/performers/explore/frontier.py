"""The tab of costs: error against counted operations, for the model's own queries and keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

from performers.diagnosis import Frontier, Setting, measure_frontier
from performers.diagnosis.frontier import frontier_steps
from performers.explore.parts import answered, on_change, picture, progress, stoppable
from performers.explore.subject import Subject
from performers.viz.diagnosis import frontier_figure

__all__ = ["frontier_tab", "grid", "one_setting"]


def grid(subject: Subject, text: str) -> Iterator[tuple[str, Frontier | None]]:
    """Measure the whole grid of settings on what the model's layers get from this text.

    Yields a bar after every setting, and in the end the frontier.
    """
    steps = frontier_steps([layer.captured for layer in subject.layers(text)])
    while True:
        try:
            done, of = next(steps)
        except StopIteration as end:
            yield progress(1, 1, "all settings are measured"), end.value
            return
        yield progress(done, of, f"{done} of {of} settings are measured"), None


def one_setting(
    subject: Subject, text: str, window_size: int, num_projections: int
) -> tuple[Setting, Frontier]:
    """The setting with this near field (0 for none) and m (0 for nothing far), and the frontier
    that it was measured in.

    Raises ValueError where this is no setting: with neither, and where two blocks hold the text.
    """
    captured = [layer.captured for layer in subject.layers(text)]
    if not window_size and not num_projections:
        raise ValueError(
            "a setting must have a near field, projections m, or both: got neither. Move one of "
            "the sliders."
        )
    frontier = measure_frontier(
        captured,
        windows=[window_size or None],
        num_projections=[num_projections] if num_projections else [],
    )
    found = [
        setting
        for setting in frontier.settings
        if (setting.window_size or 0, setting.num_projections) == (window_size, num_projections)
    ]
    return min(found, key=lambda setting: setting.error), frontier


def compare(
    subject: Subject,
    text: str,
    measured: Frontier | None,
    window_size: int,
    num_projections: int,
) -> tuple[str, str]:
    """The picture of all that was measured, with the setting of the sliders in it, and its cost."""
    setting, frontier = one_setting(subject, text, window_size, num_projections)
    if measured is not None and measured.length == frontier.length:
        frontier = measured
    sentence = (
        f"**{setting}**: error {setting.error:.3f} of the output, where averaging the values has "
        f"{frontier.averaging_error:.3f}; {frontier.cost(setting)}."
    )
    drawn = picture(
        f"Error against cost of {len(frontier.settings)} settings. {setting} has error "
        f"{setting.error:.3f}.",
        frontier_figure,
        dataclasses.asdict(frontier),
        dataclasses.asdict(setting),
    )
    return drawn, sentence


def frontier_tab(gr: Any, tab: Any, subject: Subject) -> None:
    """Lay out the tab, on a page that is being built."""
    gr.Markdown(
        "What a smaller error costs, averaged over the layers of this model. The sliders measure "
        "one setting at once. The grid takes longer, and shows which settings are the cheapest for "
        "their error."
    )
    measured = gr.State(None)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            text = gr.Textbox(
                subject.vocabulary.long_example, label="protein or text", lines=4, max_lines=8
            )
            window = gr.Slider(0, 128, 16, step=4, label="near field: block size, 0 for none")
            projections = gr.Slider(0, 256, 32, step=8, label="projections m, 0 for nothing far")
            start = gr.Button("Measure the grid", variant="primary")
            stop = gr.Button("Stop measuring")
            bar = gr.HTML(elem_id="frontier-bar")
        with gr.Column(scale=3, min_width=280):
            outputs = [gr.HTML(elem_id="frontier"), gr.Markdown(elem_id="frontier-sentence")]
    controls = [text, measured, window, projections]
    draw = answered(partial(compare, subject))
    on_change(tab.select, draw, controls, outputs, watched=[window, projections, measured])
    text.submit(draw, controls, outputs)
    stoppable(start, stop, partial(grid, subject), [text], [bar, measured])
