"""The tab of estimates: two vectors, and what random features make of their kernel (Lemma 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from performers.explore.parts import answered, on_change, picture
from performers.functional import draw_projection
from performers.functional.projections import PROJECTIONS
from performers.nn.estimators import ESTIMATORS
from performers.theory import (
    mse_hyperbolic,
    mse_positive,
    mse_regularized,
    mse_trigonometric,
    orthogonality_gap,
    regularized_softmax_kernel,
)
from performers.viz.explorer import estimates_figure

__all__ = ["CHOICES", "DRAWS", "Estimates", "closed_form", "estimates", "estimator_tab"]

DRAWS = 2000

# Blocks of orthogonal rows have this size for every kind of projection where it is a power of two.
DIMS = (4, 8, 16, 32)
MOST_PROJECTIONS = 128

# By the words of the page: a row of `ESTIMATORS`, and the distribution of ω.
CHOICES = {name: (name, "gaussian") for name in ESTIMATORS} | {
    "regularized positive": ("positive", "sphere")
}

Formula = Callable[[Tensor, Tensor, int], Tensor]

# Variances that the paper has a closed form for, by estimator, distribution and projection.
CLOSED_FORMS: dict[tuple[str, str, str], Formula] = {
    ("positive", "gaussian", "iid"): mse_positive,
    ("positive", "gaussian", "orthogonal"): lambda x, y, m: (
        mse_positive(x, y, m) - orthogonality_gap(x, y, m)
    ),
    ("positive", "sphere", "iid"): mse_regularized,
    ("positive", "sphere", "orthogonal"): lambda x, y, m: (
        mse_regularized(x, y, m) - orthogonality_gap(x, y, m, "sphere")
    ),
    ("hyperbolic", "gaussian", "iid"): mse_hyperbolic,
    ("trigonometric", "gaussian", "iid"): mse_trigonometric,
}


@dataclass(frozen=True)
class Estimates:
    """Estimates of exp(x·y), one for each draw of ω, beside what they should be.

    `expected`: their expectation, exp(x·y) but for regularized features.
    `closed_form`: their variance, None where the paper has no formula.
    `variance`, `standard_error`: the sample's, and how far off it may be.
    """

    values: Float[Tensor, " draws"]
    truth: float
    expected: float
    closed_form: float | None
    variance: float
    standard_error: float


def pair(
    first_length: float, second_length: float, angle: float, dim: int
) -> tuple[Float[Tensor, " dim"], Float[Tensor, " dim"]]:
    """Two vectors of these lengths with this angle, in degrees, in the plane of the first axes."""
    x, y = torch.zeros(2, dim, dtype=torch.float64).unbind()
    x[0] = first_length
    y[0] = second_length * math.cos(math.radians(angle))
    y[1] = second_length * math.sin(math.radians(angle))
    return x, y


def closed_form(
    x: Float[Tensor, " dim"],
    y: Float[Tensor, " dim"],
    num_projections: int,
    estimator: str,
    projection: str,
) -> float | None:
    """The variance of one estimate, for an estimator in the words of `CHOICES`."""
    formula = CLOSED_FORMS.get((*CHOICES[estimator], projection))
    return None if formula is None else float(formula(x, y, num_projections))


def estimates(
    first_length: float,
    second_length: float,
    angle: float,
    dim: int,
    num_projections: int,
    projection: str,
    estimator: str,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimates:
    """Estimate the kernel of two vectors once for each of `draws` independent ω.

    `dim`: one of `DIMS`. The estimates are computed in one go: a long ω has independent blocks of
    `dim` rows, of which each estimate takes whole ones.
    """
    name, distribution = CHOICES[estimator]
    x, y = pair(first_length, second_length, angle, dim)
    generator = Generator().manual_seed(seed)
    rows = math.ceil(num_projections / dim) * dim
    omega = draw_projection(draws * rows, dim, projection, distribution, generator)
    omega = omega.unflatten(0, (draws, rows))[:, :num_projections].flatten(0, 1)
    query, key = ESTIMATORS[name].features(torch.stack([x, y]), omega.double()).dense()
    # [features per projection, draws, m]; the features are those of one estimate by draws · m.
    values = draws * (query * key).unflatten(0, (-1, draws, num_projections)).sum(dim=(0, 2))
    deviations = values - values.mean()
    variance = deviations.square().mean()
    fourth = deviations.pow(4).mean()
    kernel = regularized_softmax_kernel if distribution == "sphere" else _softmax_kernel
    return Estimates(
        values=values,
        truth=float(_softmax_kernel(x, y)),
        expected=float(kernel(x, y)),
        closed_form=closed_form(x, y, num_projections, estimator, projection),
        variance=float(variance),
        standard_error=float(((fourth - variance**2) / draws).clamp(min=0).sqrt()),
    )


def _softmax_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y).exp()


def summary(found: Estimates) -> str:
    """The numbers of the picture, as a table in Markdown."""
    formula = "none in the paper" if found.closed_form is None else f"{found.closed_form:.4g}"
    mean = found.values.mean()
    return "\n".join(
        [
            "| | closed form | simulated |",
            "|---|---|---|",
            f"| mean | {found.expected:.4g} | {mean:.4g} |",
            f"| variance | {formula} | {found.variance:.4g} ± {found.standard_error:.2g} |",
            f"\nexp(x·y) = {found.truth:.4g}; {len(found.values):,} draws of ω, ± one standard "
            "error. Where ‖x + y‖ is large, rare draws make most of the variance, and a sample "
            "without them shows less than there is.",
        ]
    )


def show(
    first_length: float,
    second_length: float,
    angle: float,
    dim: int,
    num_projections: int,
    projection: str,
    estimator: str,
) -> tuple[str, str]:
    """The picture and the numbers for these controls."""
    found = estimates(
        first_length, second_length, angle, dim, num_projections, projection, estimator
    )
    words = (
        f"Histogram of {len(found.values):,} estimates of exp(x·y) = {found.truth:.4g}, with mean "
        f"{found.values.mean():.4g} and variance {found.variance:.4g}."
    )
    drawn = picture(
        words,
        estimates_figure,
        found.values.numpy(),
        found.truth,
        found.expected,
        found.closed_form,
        (first_length, second_length),
        angle,
    )
    return drawn, summary(found)


def estimator_tab(gr: Any, tab: Any) -> None:
    """Lay out the tab, on a page that is being built."""
    gr.Markdown(
        "FAVOR+ replaces exp(x·y) by the product φ(x)·φ(y) of m random features. That is right on "
        "average. How far a single estimate is off is its variance, for which Lemma 2 of the paper "
        "has a closed form. Move a slider and compare."
    )
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            controls = [
                gr.Slider(0, 2.5, 0.7, step=0.05, label="length of x"),
                gr.Slider(0, 2.5, 0.7, step=0.05, label="length of y"),
                gr.Slider(0, 180, 60, step=1, label="angle in degrees"),
                gr.Dropdown(list(DIMS), value=16, label="dimension d"),
                gr.Slider(1, MOST_PROJECTIONS, 16, step=1, label="projections m"),
                gr.Dropdown(list(PROJECTIONS), value="iid", label="rows of ω"),
                gr.Dropdown(list(CHOICES), value="positive", label="estimator"),
            ]
        with gr.Column(scale=3, min_width=280):
            outputs = [gr.HTML(elem_id="estimates"), gr.Markdown(elem_id="estimates-numbers")]
    on_change(tab.select, answered(show), controls, outputs, watched=controls)
