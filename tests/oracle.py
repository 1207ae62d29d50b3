"""Linear attention by its definition: float64, log space, quadratic, and no code of the package.

log|φ_m(x)| and the sign of φ_m(x) from the paper's formulas, written here a second time;
A_ij = Σ_m φ_m(q_i) φ_m(k_j), or exp(q_i·k_j) where j is near of i or a sink,
out_i = Σ_j A_ij v_j / Σ_j A_ij over the visible j
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from performers.nn import KernelFeatures, RandomFeatures, SharpFeatures, SoftmaxFeatures


class Attended(NamedTuple):
    """What attention should return, and how much a relative error of A is amplified in each row."""

    out: Tensor  # (batch, heads, query_length, value_dim), float64
    condition: Tensor  # (batch, heads, query_length): Σ_jm |terms| / |Σ_jm terms|, 1 for φ ≥ 0


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi: RandomFeatures,
    is_causal: bool = False,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = True,
    window_size: int = 0,
    num_sinks: int = 0,
    far: bool = True,
    far_limit: float | None = None,
    num_heavy: int = 0,
    seen_lengths: Tensor | None = None,
) -> Attended:
    """Every row by itself, in the frame of its largest term. Key heads are repeated for groups.

    With a window, padded queries see nothing: they have no place among the blocks.
    """
    group = query.shape[1] // key.shape[1]
    root = math.sqrt(phi.default_scale if scale is None else scale)
    query, key, value = (x.double() for x in (query, key, value))
    visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool)
    if is_causal:
        visible = visible.tril()
    visible = visible.expand(len(query), 1, -1, -1)
    if seen_lengths is not None:
        visible = visible & (torch.arange(key.shape[2]) < seen_lengths[:, None, :, None])
    if key_padding_mask is not None:
        absent = ~key_padding_mask[:, None, :, None]
        key, value = key.masked_fill(absent, 0), value.masked_fill(absent, 0)
        visible = visible & key_padding_mask[:, None, None, :]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))

    if isinstance(phi, SharpFeatures):
        query_log, key_log = log_sharp_features(query * root, key * root, phi)
        query_sign, key_sign = torch.ones_like(query_log), torch.ones_like(key_log)
    else:
        query_sign, query_log = log_features(query * root, phi)
        key_sign, key_log = log_features(key * root, phi)
    # (batch, heads, query_length, key_length, num_features)
    log_terms = query_log.unsqueeze(3) + key_log.unsqueeze(2)
    signs = query_sign.unsqueeze(3) * key_sign.unsqueeze(2)
    if window_size:
        real = torch.ones(len(key), key.shape[2], dtype=torch.bool)
        real = real if key_padding_mask is None else key_padding_mask
        position = real.cumsum(dim=1) - real.long()  # real tokens before
        block = position // window_size
        is_near = (block[:, :, None] - block[:, None, :]).abs() <= 1
        is_near = (is_near | (position < num_sinks)[:, None, :])[:, None, :, :, None]
        visible = visible & real[:, None, :, None]
        exact = (query @ key.mT).unsqueeze(-1) * root**2
        if num_heavy:
            of_near = exact.squeeze(-1).masked_fill(~(visible & is_near.squeeze(-1)), -torch.inf)
            paid = of_near.softmax(dim=-1).masked_fill(~real[:, None, :, None], 0.0)
            is_heavy = heaviest(paid, block, real & (position >= num_sinks), group, num_heavy)
            is_near = is_near | (is_heavy & visible).unsqueeze(-1)
        if not far:
            visible = visible & is_near.squeeze(-1)
        only_term = torch.nn.functional.pad(exact, (0, log_terms.shape[-1] - 1), value=-torch.inf)
        log_terms = torch.where(is_near, only_term, log_terms)
        signs = torch.where(is_near, 1.0, signs)
    log_terms = log_terms.masked_fill(~visible.unsqueeze(-1), -torch.inf)
    if far_limit is not None:
        of_near = log_terms.masked_fill(~is_near, -torch.inf).logsumexp(dim=(3, 4), keepdim=True)
        of_far = log_terms.masked_fill(is_near, -torch.inf).logsumexp(dim=(3, 4), keepdim=True)
        surplus = of_far - of_near - math.log(far_limit)
        surplus = surplus.where((of_near > -torch.inf) & (surplus > 0), 0.0)
        log_terms = torch.where(is_near, log_terms, log_terms - surplus)
    frame = torch.zeros(*query.shape[:3], 1, 1, dtype=torch.float64)
    if normalize and log_terms.shape[3]:
        frame = log_terms.detach().amax(dim=(3, 4), keepdim=True)
        frame = frame.masked_fill(frame == -torch.inf, 0.0)
    terms = signs * (log_terms - frame).exp()
    matrix = terms.sum(dim=-1)
    normalizer = matrix.sum(dim=-1, keepdim=True)
    is_empty = (terms == 0).all(dim=-1).all(dim=-1)
    condition = terms.abs().sum(dim=(3, 4)) / normalizer.squeeze(-1).abs()
    condition = condition.masked_fill(is_empty, 1.0)
    if normalize:
        matrix = matrix / normalizer.masked_fill(is_empty.unsqueeze(-1), 1.0)
    return Attended(matrix @ value, condition)


def heaviest(paid: Tensor, block: Tensor, is_known: Tensor, group: int, number: int) -> Tensor:
    """(batch, heads, queries, keys): True for the far keys that near queries paid most."""
    result = torch.zeros_like(paid, dtype=torch.bool)
    for row, head in itertools.product(*map(range, paid.shape[:2])):
        heads = slice(head // group * group, (head // group + 1) * group)
        of_row, known = block[row], is_known[row]
        distance = of_row[:, None] - of_row[None, :]  # from key to query, in blocks
        is_near = distance.abs() <= 1
        is_seen = paid[row, heads].sum(dim=0) > 0
        weight = (paid[row, heads].sum(dim=0) * is_near).sum(dim=0)
        weight = weight / (is_seen & is_near).sum(dim=0).clamp(min=1)
        for query in range(len(of_row)):
            far = known & (distance[query].abs() >= 2)
            if not is_seen.triu(1).any():  # causal: no query sees what comes later
                far &= distance[query] >= 2
            candidates = far.nonzero().squeeze(1)
            order = weight[candidates].argsort(descending=True)[:number]
            result[row, head, query, candidates[order]] = True
    return result


def log_features(x: Tensor, phi: RandomFeatures) -> tuple[Tensor, Tensor]:
    """The signs of φ(x) and log|φ(x)|, −∞ where φ is 0."""
    omega = None if phi.omega is None else phi.omega.double()
    projected = x if omega is None else x @ omega.T
    half_square = x.square().sum(dim=-1, keepdim=True) / 2
    log_root_m = math.log(1 if omega is None else len(omega)) / 2
    if isinstance(phi, SoftmaxFeatures):
        if phi.estimator == "trigonometric":
            waves = torch.cat([projected.sin(), projected.cos()], dim=-1)
            return waves.sign(), waves.abs().log() + half_square - log_root_m
        if phi.estimator == "hyperbolic":
            projected = torch.cat([projected, -projected], dim=-1) - math.log(2) / 2
        else:
            assert phi.estimator == "positive", f"write down what {phi.estimator} features are"
        return torch.ones_like(projected), projected - half_square - log_root_m
    assert isinstance(phi, KernelFeatures)
    if phi.fn == "exp":
        log_values = torch.logaddexp(
            projected, torch.tensor(phi.epsilon, dtype=torch.float64).log()
        )
        return torch.ones_like(log_values), log_values - log_root_m
    values = _FUNCTIONS[phi.fn](projected) + phi.epsilon
    return values.sign(), values.abs().log() - log_root_m


def log_sharp_features(query: Tensor, key: Tensor, phi: SharpFeatures) -> tuple[Tensor, Tensor]:
    """log φ_m(q) and log φ_m(k) of features that were calibrated, by

    q·k = M(q − a) · M⁻ᵀ(k − b) + a·(k − b) + b·q
    f(ω, x) = Π_i (1 − 4A_i)^¼ exp(A_i ω_i² + √(1 − 4A_i) ω_i x_i − x_i²/2)
    """
    assert phi.statistics == "calibrated"

    def for_heads(part: Tensor) -> Tensor:
        """(heads or 1, dim, ...) for each query head, with an axis for positions."""
        return part.repeat_interleave(query.shape[1] // len(part), dim=0)

    a, b, exponent = (
        for_heads(part)[:, None] for part in (phi.query_shift, phi.key_shift, phi.exponent)
    )
    omega = phi.omega.double()
    stretch = (1 - 4 * exponent).sqrt()
    # of each feature, before it meets x
    tilt = (stretch.log() / 2).sum(dim=-1, keepdim=True) + exponent @ omega.square().T

    def log_positive(x: Tensor, matrix: Tensor) -> Tensor:
        x = x @ for_heads(matrix).mT
        half_square = x.square().sum(dim=-1, keepdim=True) / 2
        return (stretch * x) @ omega.T + tilt - half_square - math.log(len(omega)) / 2

    from_shift = ((key - b) * a).sum(dim=-1, keepdim=True), (query * b).sum(dim=-1, keepdim=True)
    return (
        log_positive(query - a, phi.query_map) + from_shift[1],
        log_positive(key - b, phi.key_map) + from_shift[0],
    )


_FUNCTIONS = {
    "relu": lambda u: u.clamp(min=0),
    "sigmoid": lambda u: 1 / (1 + (-u).exp()),
    "abs": torch.abs,
    "elu+1": lambda u: torch.where(u > 0, u + 1, u.clamp(max=0).exp()),
    "gelu": lambda u: u * (1 + torch.erf(u / math.sqrt(2))) / 2,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "identity": lambda u: u,
}
