"""`DialectFavor`: FAVOR+ as other libraries compute it, for models that were trained there.

Those libraries keep their sums in range by small additive numbers, where ours keeps exponents
apart. A model that was trained with such a number has learned to live with it, and gives other
outputs without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from performers.checks import check_choice, check_omega, described
from performers.functional import favor_attention
from performers.nn.feature_maps import KernelFeatures, SoftmaxFeatures
from performers.state import LinearState
from performers.typing import FeatureMap, Features

__all__ = ["Dialect", "DialectFavor", "EpsilonFeatures"]

Output = Float[Tensor, "batch heads query_length value_dim"]


@dataclass(frozen=True)
class Dialect:
    """What another library computes in the place of out = D⁻¹ Q′ (K′ᵀ V).

        out_i = Σ_j φ(q_i)·φ(k_j) v_j / D_i
        D_i   = Σ_m φ_m(q_i) (Σ_j φ_m(k_j) + key_sum_epsilon) + normalizer_epsilon,
                and 2 · renormalizer more where |D_i| ≤ renormalizer

    `feature_epsilon`: positive features are `EpsilonFeatures` with this ε. Each then depends on all
    keys of the sequence: causal attention sees a trace of the future, and nothing can be kept from
    token to token.
    `key_sum_epsilon`, `normalizer_epsilon`, `renormalizer`: as in the formula.
    `padding_counts`: padded keys count in D, though their values are taken as 0, and padding has
    positions.
    `scale`: that of `favor_attention`; None for that of the features.

    The defaults change nothing. Raises ValueError or TypeError for values that do not fit.
    """

    feature_epsilon: float = 0.0
    key_sum_epsilon: float = 0.0
    normalizer_epsilon: float = 0.0
    renormalizer: float = 0.0
    padding_counts: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("feature_epsilon", "key_sum_epsilon", "normalizer_epsilon", "renormalizer"):
            number = getattr(self, name)
            if not _is_number(number) or not 0 <= number < math.inf:
                raise ValueError(
                    f"dialect {name} must be a finite number of at least 0, got "
                    f"{described(number)}."
                )
        if not isinstance(self.padding_counts, bool):
            raise TypeError(
                "dialect padding_counts must be true or false, got "
                f"{described(self.padding_counts)}."
            )
        if self.scale is not None and not (_is_number(self.scale) and 0 < self.scale < math.inf):
            raise ValueError(
                f"dialect scale must be positive and finite, or None, got {described(self.scale)}."
            )

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Dialect:
        """The dialect of the field of a config. Raises ValueError for an unknown name, too."""
        for name in tree:
            check_choice("field of a dialect", name, [field.name for field in fields(cls)])
        return cls(**tree)


@dataclass(frozen=True)
class EpsilonFeatures:
    """Positive features, divided by the largest of them, with an ε added to each.

        φ_m(q) = (exp(ω_m·q − ‖q‖²/2 − max_m′ ω_m′·q) + ε) / √m
        φ_m(k) = (exp(ω_m·k − ‖k‖²/2 − largest) + ε) / √m

    `largest`: max ω_m·k over all features and all keys of a sequence, see `largest_exponent`.

    At ordinary norms most features are smaller than ε = 1e-4, so that attention is nearly uniform.
    Source: `softmax_kernel` of performer-pytorch 1.1.4, and
    `nonnegative_softmax_kernel_feature_creator` of google-research/performer.
    """

    omega: Float[Tensor, "num_projections dim"]
    epsilon: float
    largest: Float[Tensor, "batch key_heads 1 1"]

    @staticmethod
    def largest_exponent(
        key: Float[Tensor, "batch key_heads length dim"],
        omega: Float[Tensor, "num_projections dim"],
        key_padding_mask: Bool[Tensor, "batch length"] | None,
    ) -> Float[Tensor, "batch key_heads 1 1"]:
        """max ω_m·k_j over features m and over keys j, without masked ones; no gradient."""
        check_omega(key, omega)
        exponents = (key @ omega.to(key.dtype).mT).detach()
        if key_padding_mask is not None:
            exponents = exponents.masked_fill(~key_padding_mask[:, None, :, None], -torch.inf)
        largest = exponents.flatten(2).amax(dim=-1)
        return torch.where(largest.isinf(), 0.0, largest)[..., None, None]  # no key at all

    @property
    def num_features(self) -> int:
        return len(self.omega)

    @property
    def default_scale(self) -> float:
        return float(self.omega.shape[1] ** -0.5)

    @property
    def is_nonnegative(self) -> bool:
        return True

    @property
    def is_softmax(self) -> bool:
        return False

    def fitted(
        self,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None,
        *,
        scale: float,
        is_streaming: bool,
    ) -> FeatureMap:
        """The map itself: it was made for these keys."""
        return self

    def query_features(self, x: Float[Tensor, "*batch length dim"]) -> Features:
        projected = x @ self.omega.to(x.dtype).mT
        return self._features(x, projected, projected.detach().amax(dim=-1, keepdim=True))

    def key_features(self, x: Float[Tensor, "*batch length dim"]) -> Features:
        return self._features(x, x @ self.omega.to(x.dtype).mT, self.largest)

    def _features(self, x: Tensor, projected: Tensor, largest: Tensor) -> Features:
        exponents = projected - x.square().sum(dim=-1, keepdim=True) / 2 - largest
        # None is above 0, so that exp cannot overflow.
        return Features(values=(exponents.exp() + self.epsilon) / math.sqrt(len(self.omega)))


class DialectFavor(nn.Module):
    """`favor_attention` in the dialect of another library (`Dialect`), with its own feature map."""

    def __init__(self, feature_map: SoftmaxFeatures | KernelFeatures, dialect: Dialect) -> None:
        super().__init__()
        self.feature_map = feature_map
        self.dialect = dialect

    def forward(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
        *,
        is_causal: bool = False,
        key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    ) -> Output:
        """Arguments and result are those of `favor_attention`."""
        return self._attend(query, key, value, key_padding_mask, None, is_causal)[0]

    def resume(
        self,
        query: Float[Tensor, "batch heads length dim"],
        key: Float[Tensor, "batch key_heads length dim"],
        value: Float[Tensor, "batch key_heads length value_dim"],
        key_padding_mask: Bool[Tensor, "batch length"] | None,
        state: LinearState | None,
    ) -> tuple[Float[Tensor, "batch heads length value_dim"], LinearState]:
        """Causal attention of positions that continue a sequence, and the state after them.

        For features without ε, which do not depend on later keys.
        """
        return self._attend(query, key, value, key_padding_mask, state, is_causal=True)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        state: LinearState | None,
        is_causal: bool,
    ) -> tuple[Tensor, LinearState]:
        dialect, dtype = self.dialect, query.dtype
        with torch.autocast(query.device.type, enabled=False):
            wide = torch.promote_types(dtype, torch.float32)
            query, key, value = (x.to(wide) for x in (query, key, value))
            ones = value.new_ones(*value.shape[:-1], 1)
            if dialect.padding_counts and mask is not None:
                value, mask = value.masked_fill(~mask[:, None, :, None], 0.0), None
            scale = self.feature_map.default_scale if dialect.scale is None else dialect.scale
            # D is one more column of the output: that of values 1.
            sums, state = favor_attention(
                query,
                key,
                torch.cat([value, ones], dim=-1),
                self._features(key, mask, scale),
                is_causal=is_causal,
                key_padding_mask=mask,
                scale=scale,
                normalize=False,
                enable_gqa=True,
                initial_state=self._first_state(key, value) if state is None else state,
                return_state=True,
            )
            normalizer = sums[..., -1:] + dialect.normalizer_epsilon
            if dialect.renormalizer:
                is_small = normalizer.abs() <= dialect.renormalizer
                normalizer = normalizer + 2 * dialect.renormalizer * is_small
            # 0 / 1 instead of 0 / 0 for a row that sees no key.
            out = sums[..., :-1] / (normalizer + (normalizer == 0))
        return out.to(dtype), state

    def _features(self, key: Tensor, mask: Tensor | None, scale: float) -> FeatureMap:
        epsilon, phi = self.dialect.feature_epsilon, self.feature_map
        if not epsilon:
            return phi
        assert phi.omega is not None, "softmax features always have omega"
        largest = EpsilonFeatures.largest_exponent(key * math.sqrt(scale), phi.omega, mask)
        return EpsilonFeatures(phi.omega, epsilon, largest)

    def _first_state(self, key: Tensor, value: Tensor) -> LinearState:
        """The state before the first key: its sums of keys are 0, or `key_sum_epsilon`."""
        batch, heads, _, value_dim = value.shape
        sizes = (batch, heads, self.feature_map.num_features, value_dim + 1)
        state = LinearState.empty(*sizes, device=value.device, dtype=value.dtype)
        epsilon = self.dialect.key_sum_epsilon
        if not epsilon:
            return state
        values = state.values.clone()
        values[..., -1] = epsilon  # of the column that is D
        return LinearState(torch.zeros_like(state.log_scale), state.normalizer, values)

    def extra_repr(self) -> str:
        return repr(self.dialect)


def _is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)
