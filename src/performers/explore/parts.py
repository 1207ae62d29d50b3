"""What the tabs share: pictures with a text for those who do not see them, progress, and errors."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

from performers.viz.files import Figure, data_url

__all__ = ["answered", "on_change", "picture", "progress", "stoppable"]

# What the layers below raise for what one has typed or chosen.
MISTAKES = (ValueError, TypeError, OSError)


# A style of matplotlib holds for the whole process while a figure is drawn, and pages have threads.
_drawing = threading.Lock()


def picture(words: str, figure: Callable[..., Figure], *arguments: Any) -> str:
    """What this function draws of these arguments as an image in a page, described in words."""
    with _drawing:
        source = data_url(figure(*arguments))
    # On a narrow screen the picture keeps its size and is scrolled, by keys too.
    return (
        f'<div class="picture" tabindex="0"><img src="{source}" alt="{html.escape(words)}"></div>'
    )


def progress(done: int | float, of: int | float, what: str) -> str:
    """A bar, and what it counts."""
    share = min(max(done / of, 0.0), 1.0)
    label = html.escape(what)
    return (
        f'<label class="progress">{label}<progress max="1" value="{share:.4f}">{share:.0%}'
        "</progress></label>"
    )


def answered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Show mistakes of the user as a message on the page, in the words of the error."""

    @wraps(function)
    def once(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except MISTAKES as error:
            raise _message(error) from error

    return once


def on_change(
    opened: Callable[..., Any],
    function: Callable[..., Any],
    controls: Sequence[Any],
    outputs: Sequence[Any],
    watched: Sequence[Any],
) -> None:
    """Call the function when its tab is opened, and when one of the watched controls has changed.

    `opened`: the event. Of many changes in succession, as a slider that is drawn makes them, the
    last one is shown.
    """
    for event in (opened, *(control.change for control in watched)):
        event(function, controls, outputs, show_progress="minimal", trigger_mode="always_last")


def stoppable(
    start: Any,
    stop: Any,
    function: Callable[..., Iterator[Any]],
    inputs: Sequence[Any],
    outputs: Sequence[Any],
) -> None:
    """Let one button begin a long work, of which the function yields what is to be shown, and
    another one end it.
    """
    import gradio  # by the page, which exists when this is called

    # Sessions whose work is to end. gradio's own way closes a generator that may be in a step.
    ending: set[str | None] = set()

    def steps(request: Any, *arguments: Any) -> Iterator[Any]:
        ending.discard(request.session_hash)
        try:
            for shown in function(*arguments):
                if request.session_hash in ending:
                    return
                yield shown
        except MISTAKES as error:
            raise _message(error) from error

    def end(request: Any) -> None:
        ending.add(request.session_hash)

    # By this annotation gradio knows what is no input.
    steps.__annotations__["request"] = end.__annotations__["request"] = gradio.Request
    start.click(steps, inputs, outputs, show_progress="hidden")
    stop.click(end, queue=False)


def _message(error: Exception) -> Exception:
    import gradio  # by the page, which exists when this is called

    return gradio.Error(html.escape(" ".join(str(error).split())), print_exception=False)
