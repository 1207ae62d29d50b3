"""Closed forms for the estimators: errors, kernels and bounds, one function per lemma or theorem,
and what attention costs in counted operations (`cost`, of plain numbers).

The others take the vectors that φ takes, temperature included, and any batch of them. Give float64
where numbers are compared: the errors grow like exp(‖x + y‖²).
"""

from performers.theory.cost import cheaper_from, exact_operations, favor_operations, near_pairs
from performers.theory.mean_squared_error import (
    mse_hyperbolic,
    mse_optimal_positive,
    mse_positive,
    mse_regularized,
    mse_trigonometric,
    optimal_positive_parameter,
)
from performers.theory.orthogonality import (
    orthogonality_gap,
    orthogonality_gap_bound,
    orthogonality_gap_bound_beautiful,
)
from performers.theory.output_error import (
    log_joint_moment_hyperbolic,
    log_joint_moment_optimal,
    log_joint_moment_positive,
    log_joint_moment_trigonometric,
    mse_attention,
)
from performers.theory.regularized_kernel import (
    regularized_ratio,
    regularized_ratio_asymptote,
    regularized_ratio_bound,
    regularized_softmax_kernel,
)
from performers.theory.tails import (
    regularized_moment_generating_function,
    regularized_tail_bound_iid,
    regularized_tail_bound_orthogonal,
    tail_bound_iid,
    tail_bound_orthogonal,
)
from performers.theory.uniform_convergence import sufficient_projections

__all__ = [
    "cheaper_from",
    "exact_operations",
    "favor_operations",
    "log_joint_moment_hyperbolic",
    "log_joint_moment_optimal",
    "log_joint_moment_positive",
    "log_joint_moment_trigonometric",
    "mse_attention",
    "mse_hyperbolic",
    "mse_optimal_positive",
    "mse_positive",
    "mse_regularized",
    "mse_trigonometric",
    "near_pairs",
    "optimal_positive_parameter",
    "orthogonality_gap",
    "orthogonality_gap_bound",
    "orthogonality_gap_bound_beautiful",
    "regularized_moment_generating_function",
    "regularized_ratio",
    "regularized_ratio_asymptote",
    "regularized_ratio_bound",
    "regularized_softmax_kernel",
    "regularized_tail_bound_iid",
    "regularized_tail_bound_orthogonal",
    "sufficient_projections",
    "tail_bound_iid",
    "tail_bound_orthogonal",
]
