"""Every attention mechanism that a model can be built on, by name.

A mechanism is a module that maps (Q, K, V) to an output (`performers.typing.Attention`); multi-head
attention is handed one and knows nothing of its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor, nn

from performers.baselines import Identity
from performers.functional import KERNELS, favor_attention, softmax_attention
from performers.functional.sharp import QUERY_RATIO
from performers.models.memory import KeysAndValues, Nothing, State
from performers.nn import KernelFeatures, SharpFeatures, SoftmaxFeatures
from performers.typing import LinearState

if TYPE_CHECKING:
    from performers.models.config import PerformerConfig

__all__ = ["MECHANISMS", "Exact", "Favor", "Mechanism"]

Output = Float[Tensor, "batch heads query_length value_dim"]


class Favor(nn.Module):
    """`favor_attention` with its own feature map, and with a near field if given a window."""

    def __init__(
        self,
        feature_map: SoftmaxFeatures | SharpFeatures | KernelFeatures,
        window_size: int | None = None,
    ) -> None:
        super().__init__()
        self.feature_map = feature_map
        self.window_size = window_size

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
        return favor_attention(
            query,
            key,
            value,
            self.feature_map,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            enable_gqa=True,
            window_size=self.window_size,
        )

    def resume(
        self,
        query: Float[Tensor, "batch heads length dim"],
        key: Float[Tensor, "batch key_heads length dim"],
        value: Float[Tensor, "batch key_heads length value_dim"],
        key_padding_mask: Bool[Tensor, "batch length"] | None,
        state: LinearState | None,
    ) -> tuple[Float[Tensor, "batch heads length value_dim"], LinearState]:
        """Causal attention of positions that continue a sequence, and the state after them."""
        return favor_attention(
            query,
            key,
            value,
            self.feature_map,
            is_causal=True,
            key_padding_mask=key_padding_mask,
            enable_gqa=True,
            window_size=self.window_size,
            initial_state=state,
            return_state=True,
        )


class Exact(nn.Module):
    """`softmax_attention`: the Transformer that a Performer is measured against."""

    def forward(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
        *,
        is_causal: bool = False,
        key_padding_mask: Bool[Tensor, "batch key_length"] | None = None,
    ) -> Output:
        """Arguments and result are those of `softmax_attention`."""
        return softmax_attention(
            query,
            key,
            value,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            enable_gqa=query.shape[1] != key.shape[1],
        )


class Mechanism(NamedTuple):
    """How to build a mechanism for one layer of a model, and what it remembers when generating."""

    build: Callable[[PerformerConfig, int], nn.Module]
    memory: type[KeysAndValues | Nothing | State]


def _exact(config: PerformerConfig, layer: int) -> Exact:
    return Exact()


def _identity(config: PerformerConfig, layer: int) -> Identity:
    return Identity()


def _performer_softmax(config: PerformerConfig, layer: int) -> Favor:
    assert config.projection is not None, "PerformerConfig refuses softmax features without omega"
    return Favor(
        SoftmaxFeatures(
            config.head_dim,
            num_projections=config.num_projections,
            estimator=config.estimator,
            projection=config.projection,
            distribution=config.distribution,
            seed=config.seed,
            layer=layer,
        ),
        window_size=config.window_size,
    )


def _performer_sharp(config: PerformerConfig, layer: int) -> Favor:
    assert config.projection is not None, "PerformerConfig refuses softmax features without omega"
    assert config.num_key_value_heads is not None, "PerformerConfig fills it in"
    return Favor(
        SharpFeatures(
            config.head_dim,
            num_projections=config.num_projections,
            num_heads=config.num_key_value_heads,
            statistics="call",
            query_ratio=QUERY_RATIO if config.window_size is None else 1.0,
            projection=config.projection,
            seed=config.seed,
            layer=layer,
        ),
        window_size=config.window_size,
    )


def _performer_kernel(fn: str, config: PerformerConfig, layer: int) -> Favor:
    return Favor(
        KernelFeatures(
            config.head_dim,
            num_projections=config.num_projections,
            fn=fn,
            epsilon=config.kernel_epsilon,
            projection=config.projection,
            distribution=config.distribution,
            seed=config.seed,
            layer=layer,
        )
    )


MECHANISMS: dict[str, Mechanism] = {
    "exact": Mechanism(_exact, memory=KeysAndValues),
    "identity": Mechanism(_identity, memory=Nothing),
    "performer-softmax": Mechanism(_performer_softmax, memory=State),
    "performer-sharp": Mechanism(_performer_sharp, memory=State),
    **{  # performer-relu, performer-exp, …
        f"performer-{fn}": Mechanism(partial(_performer_kernel, fn), memory=State) for fn in KERNELS
    },
}
