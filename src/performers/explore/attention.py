"""The tab of attention: the matrix that a layer implies beside the exact one, and a row of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from performers.checks import check_choice
from performers.convert import FavorOptions
from performers.convert.layer import FavorLayer
from performers.explore.parts import answered, on_change, picture
from performers.explore.subject import Layer, Subject
from performers.functional.readout import implied_matrix
from performers.functional.softmax import softmax_attention
from performers.nn.sharp import SharpFeatures
from performers.viz.explorer import matrices_figure, row_figure

__all__ = ["OWN", "Matrices", "attention_tab", "matrices"]

OWN = "as the model attends"

# Features of the softmax kernel that can stand in a layer's place, with a near field or without.
IN_PLACE = ("sharp", "positive", "hyperbolic")


@dataclass(frozen=True)
class Matrices:
    """One head's exact attention and the matrix that stands in its place. Rows attend to columns.

    `distance`: the mean over rows of half the sum of the differences (total variation): 0 for equal
    rows, 1 for rows that attend to nothing in common.
    """

    exact: Float[Tensor, "length length"]
    implied: Float[Tensor, "length length"]
    is_causal: bool

    @property
    def distance(self) -> float:
        return float((self.implied - self.exact).abs().sum(dim=-1).mean() / 2)

    @property
    def is_exact(self) -> bool:
        """Whether they differ by rounding alone."""
        return self.distance < 1e-5


@torch.no_grad()
def matrices(
    layer: Layer, head: int, features: str, num_projections: int, window_size: int
) -> Matrices:
    """The matrices of one head of a layer, read out through one-hot values (Appendix C.4).

    `features`: `OWN` for what the model's layer computes, or those of FAVOR+ in its place, with m
    projections and a near field of blocks of `window_size`, 0 for none. Sharp features of causal
    attention learn from this text.

    Raises ValueError for `OWN` where the model attends exactly.
    Cost: O(length²) memory for each head of the layer.
    """
    captured = layer.captured
    query, key = captured.query, captured.key

    def exactly(value: Tensor) -> Tensor:
        return softmax_attention(
            query, key, value, captured.is_causal, scale=captured.scale, enable_gqa=True
        )

    check_choice("features", features, (OWN, *IN_PLACE))
    if features != OWN:
        attend = _in_place(layer, features, num_projections, window_size)
    elif layer.attend is not None:
        attend = layer.attend
    else:
        raise ValueError(
            f"{captured.name} attends exactly: there is nothing of its own to put beside that. "
            f"Choose one of {', '.join(IN_PLACE)}, to see what FAVOR+ would do in its place."
        )
    exact, implied = (implied_matrix(one, key)[0, head].float() for one in (exactly, attend))
    return Matrices(exact, implied, captured.is_causal)


def _in_place(
    layer: Layer, features: str, num_projections: int, window_size: int
) -> Callable[[Tensor], Tensor]:
    """What a converted layer computes for the same queries and keys."""
    captured = layer.captured
    options = FavorOptions(
        num_projections=num_projections, features=features, window_size=window_size
    )
    favor = FavorLayer(options, number=0)
    favor.prepare(captured.key.shape[-1], captured.key.device, captured.key.shape[1])
    if captured.is_causal and isinstance(favor.feature_map, SharpFeatures):
        favor.feature_map.calibrate(captured.query, captured.key, scale=captured.scale)
        favor.is_calibrated = True
    return partial(
        _with_values, favor, captured.query, captured.key, captured.is_causal, captured.scale
    )


def _with_values(
    favor: FavorLayer,
    query: Tensor,
    key: Tensor,
    is_causal: bool,
    scale: float | None,
    value: Tensor,
) -> Tensor:
    return favor(query, key, value, is_causal=is_causal, key_padding_mask=None, scale=scale)


def look(
    subject: Subject,
    text: str,
    layer: int,
    head: int,
    features: str,
    num_projections: int,
    window_size: int,
    picked: int,
    first: int,
    last: int,
) -> tuple[str, str, str]:
    """The matrices, the picked row, and a sentence about both. Positions and heads count from 1."""
    words = subject.words(text)
    chosen = subject.layers(text)[layer]
    heads = chosen.captured.query.shape[1]
    head = min(head, heads)
    found = matrices(chosen, head - 1, features, num_projections, window_size)
    picked, first, last = (min(x, len(words)) - 1 for x in (picked, first, last))
    first, last = min(first, last), max(first, last)
    exact, implied = found.exact.numpy(), found.implied.numpy()
    place = f"{chosen.captured.name}, head {head} of {heads}"
    sentence = (
        f"**{place}**: {len(words)} tokens. Rows of the two matrices differ by "
        f"{found.distance:.3f} on average (total variation: 0 if they are equal, 1 if they attend "
        "to nothing in common)."
    )
    if found.is_exact:
        sentence += (
            " They are equal up to rounding, as in a layer that attends exactly, or in a near "
            "field that holds the whole text. Choose other features, or read a longer text."
        )
    strongest = int(implied[picked].argmax())
    whole = picture(
        f"Exact attention, the implied matrix and their difference in {place}.",
        matrices_figure,
        exact,
        implied,
        found.is_causal,
        first,
        last,
        picked,
    )
    row = picture(
        f"What {words[picked]} at position {picked + 1} attends to, most of all "
        f"{words[strongest]} at position {strongest + 1}.",
        row_figure,
        exact[picked],
        implied[picked],
        words,
        first,
        last,
        picked,
    )
    return whole, row, sentence


def _example(subject: Subject) -> str:
    """A text to begin with: the short one, unless all of it lies in the near field of the model."""
    short, long = subject.vocabulary.example, subject.vocabulary.long_example
    layer = subject.layers(short)[0]
    try:
        subject.tokens(long)
    except ValueError:  # the model has too few positions
        return short
    return long if layer.attend and matrices(layer, 0, OWN, 64, 0).is_exact else short


def attention_tab(gr: Any, tab: Any, subject: Subject) -> None:
    """Lay out the tab, on a page that is being built.

    Raises ValueError for a model that has no layer to look at.
    """
    example = _example(subject)
    layers, length = subject.layers(example), len(subject.tokens(example))
    names = [(layer.captured.name, index) for index, layer in enumerate(layers)]
    heads = max(layer.captured.query.shape[1] for layer in layers)
    own = [OWN] if layers[0].attend is not None else []
    gr.Markdown(
        "Linear attention never forms a matrix, but what it computes implies one. Here it stands "
        "beside softmax attention of the same queries and keys."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            text = gr.Textbox(
                example, label="protein or text", lines=4, max_lines=8, elem_id="attention-text"
            )
            read = gr.Button("Read it", variant="primary")
            layer = gr.Dropdown(names, value=0, label="layer")
            head = gr.Slider(1, heads, 1, step=1, label="head", visible=heads > 1)
            features = gr.Dropdown(
                [*own, *IN_PLACE], value=[*own, *IN_PLACE][0], label="features of FAVOR+"
            )
            with gr.Accordion("In the layer's place", open=not own):
                projections = gr.Slider(8, 512, 64, step=8, label="projections m")
                window = gr.Slider(0, 64, 0, step=4, label="near field: block size, 0 for none")
        with gr.Column(scale=3, min_width=280):
            sentence = gr.Markdown(elem_id="attention-sentence")
            whole = gr.HTML(elem_id="matrices")
            with gr.Row():
                picked = gr.Slider(1, length, min(20, length), step=1, label="position picked")
                first = gr.Slider(1, length, 1, step=1, label="view from position")
                last = gr.Slider(1, length, length, step=1, label="view to position")
            row = gr.HTML(elem_id="row")

    def reread(given: str) -> tuple[Any, ...]:
        count = len(subject.tokens(given))
        return (
            gr.Slider(maximum=count, value=min(20, count)),
            gr.Slider(maximum=count, value=1),
            gr.Slider(maximum=count, value=count),
        )

    controls = [layer, head, features, projections, window, picked, first, last]
    outputs = [whole, row, sentence]
    draw = answered(partial(look, subject))
    on_change(tab.select, draw, [text, *controls], outputs, watched=controls)
    for event in (read.click, text.submit):
        event(answered(reread), text, [picked, first, last]).then(draw, [text, *controls], outputs)
