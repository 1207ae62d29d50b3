"""The paper as pure functions: draw ω, apply φ, contract."""

from performers.functional.favor import favor_attention
from performers.functional.features import (
    KERNELS,
    Kernel,
    hyperbolic_features,
    kernel_features,
    positive_features,
    trigonometric_features,
)
from performers.functional.linear import linear_attention
from performers.functional.normalizer import (
    absorb_keys,
    approximate_cross_entropy,
    log_normalizer,
)
from performers.functional.projections import draw_projection
from performers.functional.readout import attention_matrix, implied_matrix
from performers.functional.softmax import softmax_attention

__all__ = [
    "KERNELS",
    "Kernel",
    "absorb_keys",
    "approximate_cross_entropy",
    "attention_matrix",
    "draw_projection",
    "favor_attention",
    "hyperbolic_features",
    "implied_matrix",
    "kernel_features",
    "linear_attention",
    "log_normalizer",
    "positive_features",
    "softmax_attention",
    "trigonometric_features",
]
