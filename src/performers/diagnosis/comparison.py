"""Plain, sharp and windowed features side by side, and which of them to use."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from performers.diagnosis.heads import Diagnosis, short
from performers.diagnosis.measure import diagnose
from performers.functional.sharp import QUERY_RATIO
from performers.nn.feature_maps import SoftmaxFeatures
from performers.nn.sharp import SharpFeatures

__all__ = ["COMPARED", "compare", "recommendation"]

COMPARED = ("positive", "sharp", "sharp + window")


def compare(
    query: Float[Tensor, "batch heads query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    num_projections: int = 256,
    window_size: int | None = 32,
    is_causal: bool = False,
    scale: float | None = None,
    target_error: float | None = None,
) -> dict[str, Diagnosis]:
    """`diagnose` for plain positive features, sharp ones, and sharp ones with a window, at one m.

    `window_size`: None for cross-attention, which has no window.

    Bidirectional: sharp features take the statistics of each sequence. Causal: those of the first
    half of the batch, and the other half is diagnosed; a batch of one serves for both.
    """
    dim, key_heads = key.shape[-1], key.shape[1]
    statistics = "calibrated" if is_causal else "call"
    positive = SoftmaxFeatures(dim, num_projections)
    sharp, beside_window = (
        SharpFeatures(dim, num_projections, key_heads, statistics, query_ratio=ratio)
        for ratio in (QUERY_RATIO, 1.0)
    )
    if is_causal:
        half = len(query) // 2
        seen = slice(half) if half else slice(None)
        for phi in (sharp, beside_window):
            phi.to(query.device).calibrate(query[seen], key[seen], scale=scale)
        query, key, value = query[half:], key[half:], value[half:]
    maps: tuple[SoftmaxFeatures | SharpFeatures, ...] = (positive, sharp, beside_window)
    windows = (None, None, window_size)
    return {
        name: diagnose(
            query,
            key,
            value,
            phi.to(query.device),
            is_causal,
            scale=scale,
            enable_gqa=True,
            window_size=window,
            target_error=target_error,
        )
        for name, phi, window in zip(COMPARED, maps, windows, strict=True)
    }


def recommendation(layers: dict[str, dict[str, Diagnosis]]) -> str:
    """What to use for these layers, from what `compare` found in each, in a few lines."""
    errors = {
        name: sum(layer[name].mean("observed_error") for layer in layers.values()) / len(layers)
        for name in COMPARED
    }
    lines = ["Mean error: " + ", ".join(f"{name} {short(error)}" for name, error in errors.items())]
    best = min(errors, key=lambda name: errors[name])
    lines.append(f"Lowest with {best} features.")
    hopeless = [
        layer
        for layer, found in layers.items()
        if found[best].mean("observed_error") >= found[best].mean("uniform_error")
    ]
    if hopeless:
        lines.append(
            f"Even so no better than averaging the values in {', '.join(hopeless)}: keep exact "
            "attention there, or train with features from the start."
        )
    return "\n".join(lines)
