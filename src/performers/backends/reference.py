"""The specification: linear attention written as its definition, one key at a time.

A state absorbs keys and is read by queries. Both steps are softmaxes (DESIGN.md, Numerics): with
a_im = log φ_m(q_i) and b_jm = log φ_m(k_j),

    absorb:   s_m = max_j b_jm,    Z_m = Σ_j e^(b_jm − s_m),    S_m = Σ_j e^(b_jm − s_m) v_j
    read:     out_i = Σ_m w_im S_m / Σ_m w_im Z_m,    w_im = e^(a_im + s_m − c_i),
              c_i = max_m (a_im + s_m)

Every exponent is at most 0, and the largest of each sum is 0, so nothing overflows, nothing
vanishes, and no epsilon is needed. `s` and `c` are frames of reference that cancel; they are never
differentiated.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from performers.typing import FeatureMap, Features, LinearState, exp_difference

__all__ = ["absorb", "attend", "divide", "key_exponent", "read", "read_weights", "row_factor"]

# Signed features can have a normalizer of any sign. The paper's renormalizer adds 2ε where |D| ≤ ε.
SIGNED_STABILIZER = 1e-6


def attend(
    query: Float[Tensor, "batch key_heads group query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    phi: FeatureMap,
    *,
    root: float,
    key_mask: Bool[Tensor, "batch key_length"] | None,
    is_causal: bool,
    normalize: bool,
    state: LinearState,
) -> tuple[Float[Tensor, "batch key_heads group query_length value_dim"], LinearState]:
    """Attention with φ(root · q) and φ(root · k), and the state after it.

    Causal: a Python step per position, for clarity alone.
    """
    dtype = state.values.dtype
    features = phi.key_features(key.to(dtype) * root)
    query, value = query.to(dtype) * root, value.to(dtype)

    def read_positions(positions: slice) -> Tensor:
        rows = query[..., positions, :]
        out = read(state, phi.query_features(rows.flatten(2, 3)), phi.is_nonnegative, normalize)
        return out.unflatten(2, rows.shape[2:4])

    if not is_causal:
        state = absorb(state, features, value, key_mask)
        return read_positions(slice(None)), state
    outputs = [read_positions(slice(0, 0))]
    for position in range(key.shape[2]):
        here = slice(position, position + 1)
        one = Features(*(part if part is None else part[..., here, :] for part in features))
        mask = None if key_mask is None else key_mask[:, here]
        state = absorb(state, one, value[..., here, :], mask)
        outputs.append(read_positions(here))
    return torch.cat(outputs, dim=3), state


def absorb(
    state: LinearState,
    features: Features,
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    key_mask: Bool[Tensor, "batch key_length"] | None,
) -> LinearState:
    """The state that has seen these keys too; masked keys have no part in it."""
    if value.shape[2] == 0:
        return state
    exponent = key_exponent(features, key_mask)
    log_scale = torch.maximum(state.log_scale, exponent.detach().amax(dim=2))
    weights = exp_difference(exponent, log_scale.unsqueeze(2))
    if features.values is not None:
        weights = weights * features.values
    before = state.rescaled(log_scale)
    return LinearState(
        log_scale,
        before.normalizer + weights.sum(dim=2),
        before.values + weights.mT @ value,
    )


def read(
    state: LinearState, features: Features, is_nonnegative: bool, normalize: bool
) -> Float[Tensor, "batch key_heads query_length value_dim"]:
    """What queries find in the state: D⁻¹ Q′ (K′ᵀ V), or Q′ (K′ᵀ V) without `normalize`.

    A factor of a whole row of features cancels in D⁻¹, so `log_rows` matters only without it.
    """
    weights, frame = read_weights(state.log_scale.unsqueeze(2), features)
    numerator = weights @ state.values
    if normalize:
        return divide(numerator, weights @ state.normalizer.unsqueeze(-1), is_nonnegative)
    return numerator * row_factor(frame, features)


def read_weights(
    log_scale: Float[Tensor, "batch key_heads 1 num_features"], features: Features
) -> tuple[
    Float[Tensor, "batch key_heads query_length num_features"],
    Float[Tensor, "batch key_heads #query_length 1"],
]:
    """w_im = φ_m(q_i) e^(s_m − c_i): the weight of each feature for each query, and c_i."""
    exponent = log_scale
    if features.log_values is not None:
        exponent = exponent + features.log_values
    frame = exponent.detach().amax(dim=-1, keepdim=True)
    weights = exp_difference(exponent, frame)
    if features.values is not None:
        weights = weights * features.values
    return weights, frame


def row_factor(
    frame: Float[Tensor, "*batch query_length 1"], features: Features
) -> Float[Tensor, "*batch query_length 1"]:
    """What the division by the normalizer would have cancelled; 0 where nothing was visible."""
    return (frame if features.log_rows is None else frame + features.log_rows).exp()


def divide(
    numerator: Float[Tensor, "*batch length value_dim"],
    normalizer: Float[Tensor, "*batch length 1"],
    is_nonnegative: bool,
) -> Float[Tensor, "*batch length value_dim"]:
    """D⁻¹, with 0 for a row that sees no key.

    The normalizer of nonnegative features is 0 only there; that of signed features can vanish or
    change sign anywhere, and gets the paper's renormalizer.
    """
    if is_nonnegative:
        return numerator / (normalizer + (normalizer == 0))
    nearly_zero = normalizer.abs() <= SIGNED_STABILIZER
    return numerator / (normalizer + 2 * SIGNED_STABILIZER * nearly_zero)


def key_exponent(
    features: Features, key_mask: Bool[Tensor, "batch key_length"] | None
) -> Float[Tensor, "batch key_heads key_length width"]:
    """b_jm, −∞ for masked keys."""
    exponent = features.exponent()
    if key_mask is None:
        return exponent
    return exponent.masked_fill(~key_mask[:, None, :, None], -torch.inf)
