"""Every attention mechanism that a model can be built on, by name, one row each.

A mechanism is a module that maps (Q, K, V) to an output (`performers.typing.Attention`); multi-head
attention is handed one and knows nothing of its kind. To add one, write its file in
`performers.baselines` and its row here.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import nn

from performers.baselines import (
    BigBirdAttention,
    BigBirdOptions,
    ClusteredFavor,
    ClusteredFavorOptions,
    Identity,
    LinformerAttention,
    LinformerOptions,
    LocalAttention,
    LocalOptions,
    LongformerAttention,
    LongformerOptions,
    ReformerAttention,
    ReformerOptions,
    RoutingAttention,
    RoutingOptions,
    SinkhornAttention,
    SinkhornOptions,
    SparseOptions,
    SparseTransformerAttention,
    SynthesizerAttention,
    SynthesizerOptions,
)
from performers.checks import check_choice, described
from performers.functional.seeds import mixed_seed
from performers.models.fields import PerformerFields
from performers.models.memory import (
    EncodedKeys,
    EncodedState,
    KeysAndValues,
    Nothing,
    QueriesAndValues,
    Rerun,
    State,
)
from performers.nn.dialect import Dialect, DialectFavor
from performers.nn.feature_maps import KernelFeatures
from performers.nn.mechanisms import Exact, Favor
from performers.nn.sharp import SharpFeatures
from performers.nn.words import FEATURES, SHARP, build_features, check_features, takes_window

__all__ = [
    "MECHANISMS",
    "Mechanism",
    "causal_memory",
    "check_dialect",
    "cross_config",
    "cross_memory",
    "has_epsilon_features",
    "in_current_words",
    "only_mechanism",
    "own_options",
    "performer",
]

CausalMemory = type[Nothing | Rerun | State]
CrossMemory = type[EncodedKeys | EncodedState]

LINEAR = "L · m · d, m = num_projections"


def _any_config(config: PerformerFields) -> None:
    """What a mechanism checks that has nothing to refuse."""


@dataclass(frozen=True)
class NoOptions:
    """The options of a mechanism that has none."""


class Mechanism(NamedTuple):
    """What a model, its config and its cache ask of a mechanism.

    `build`: the module of one layer, for a config and the number of the layer.
    `check`: raises ValueError for a config that it cannot be built from.
    `memory`: what a layer remembers when generating; None of one that has no causal form.
    `cross_memory`: what a layer of cross-attention remembers of the encoder; None of one that needs
    a query per key, or whose rows depend on one another.
    `takes_window`: whether `window_size` means something to it.
    `options`: a dataclass of what can be chosen about this mechanism alone, which refuses values
    that do not fit. A config names them in `attention_options`.
    `cost`: the time of one head that its paper promises, up to a factor. L is the length, d the dim
    of a head; other letters the options that are named beside them.
    """

    build: Callable[[PerformerFields, int], nn.Module]
    check: Callable[[PerformerFields], None] = _any_config
    memory: CausalMemory | None = None
    cross_memory: CrossMemory | None = None
    takes_window: bool = False
    options: type = NoOptions
    cost: str = ""


def only_mechanism(config: PerformerFields) -> str:
    """The mechanism of a config that is no mix; `performers.models.mixes` makes these of a mix."""
    assert isinstance(config.attention, str), "a mix has a config for each of its places"
    return config.attention


def own_options(config: PerformerFields) -> Any:
    """The options of the config's own mechanism, as the dataclass of its row.

    Raises ValueError for an option that it does not have, and for a value that does not fit.
    """
    options = MECHANISMS[only_mechanism(config)].options
    known = [field.name for field in fields(options)]
    for name in config.attention_options or {}:
        if not known:
            raise ValueError(
                f"attention={config.attention!r} has no options, got attention_options="
                f"{config.attention_options}. Leave them out."
            )
        check_choice(f"option of attention={config.attention!r}", name, known)
    return options(**(config.attention_options or {}))


def performer(features: str) -> Mechanism:
    """FAVOR+ with the features of this name, a word of `performers.nn.words`."""

    def build(config: PerformerFields, layer: int) -> Favor | DialectFavor:
        assert config.head_dim is not None, "a config has chosen it"
        phi = build_features(
            features,
            config.head_dim,
            config.num_projections,
            num_heads=config.num_key_value_heads or config.num_attention_heads,
            statistics="call",
            has_window=config.window_size is not None,
            projection=config.projection,
            distribution=config.distribution,
            kernel_epsilon=config.kernel_epsilon,
            seed=config.seed,
            layer=layer,
        )
        if config.dialect is not None and not isinstance(phi, SharpFeatures):
            return DialectFavor(phi, Dialect.from_dict(config.dialect))
        return Favor(phi, window_size=config.window_size)

    def check(config: PerformerFields) -> None:
        check_features(features, config.projection, config.distribution)

    # Statistics of a whole sequence tell its past about its future.
    is_sharp = features == SHARP
    return Mechanism(
        build,
        check,
        memory=None if is_sharp else State,
        cross_memory=None if is_sharp else EncodedState,
        takes_window=takes_window(features),
        cost=LINEAR,
    )


def linear_transformer(config: PerformerFields, layer: int) -> Favor:
    """φ(x) = elu(x) + 1 of queries and keys themselves: linear attention without ω.

    Source: Katharopoulos et al. 2020, "Transformers are RNNs", Eq. 7.
    """
    assert config.head_dim is not None, "a config has chosen it"
    return Favor(KernelFeatures(config.head_dim, fn="elu+1", epsilon=0.0, projection=None))


def _sizes(mechanism: type[nn.Module], heads: str, config: PerformerFields, layer: int) -> Any:
    """Those of a layer's sizes that the constructor of a mechanism names. `heads`: the field of the
    config with the number of heads that have something of their own.
    """
    sizes = {
        "dim": config.head_dim,
        "num_heads": getattr(config, heads),
        "max_length": config.max_position_embeddings,
        "seed": config.seed,
        "layer": layer,
    }
    named = inspect.signature(mechanism).parameters
    return {name: size for name, size in sizes.items() if name in named}


def drawn(
    mechanism: type[nn.Module],
    options: type,
    memory: CausalMemory | None = None,
    heads: str = "num_key_value_heads",
    *,
    cost: str,
) -> Mechanism:
    """A mechanism in which each head of each layer draws for itself, key heads unless `heads` names
    the others; for sequences up to `max_position_embeddings`, where it has room for so many only.
    """

    def build(config: PerformerFields, layer: int) -> nn.Module:
        return mechanism(own_options(config), **_sizes(mechanism, heads, config, layer))

    return Mechanism(build, memory=memory, options=options, cost=cost)


def clustered_favor(config: PerformerFields, layer: int) -> ClusteredFavor:
    """Clustered FAVOR+ with features as the config describes them."""
    options = own_options(config)
    sizes = _sizes(ClusteredFavor, "num_key_value_heads", config, layer)
    phi = build_features(
        options.features,
        sizes["dim"],
        config.num_projections,
        projection=config.projection,
        distribution=config.distribution,
        kernel_epsilon=config.kernel_epsilon,
        seed=config.seed,
        layer=layer,
    )
    return ClusteredFavor(phi, options, **sizes)


def check_clustered_favor(config: PerformerFields) -> None:
    """Features that learn from a sequence would learn from the past of one cluster and the future
    of another.
    """
    features = own_options(config).features
    check_features(features, config.projection, config.distribution)
    if features == SHARP:
        raise ValueError(
            "clustered FAVOR+ takes features that do not depend on the sequence: got "
            "features='sharp'. Take 'positive'."
        )


MECHANISMS: dict[str, Mechanism] = {
    "exact": Mechanism(
        lambda config, layer: Exact(),
        memory=KeysAndValues,
        cross_memory=EncodedKeys,
        cost="L² · d",
    ),
    "identity": Mechanism(lambda config, layer: Identity(), memory=Nothing, cost="none"),
    "linear-transformer": Mechanism(
        linear_transformer, memory=State, cross_memory=EncodedState, cost="L · d²"
    ),
    "local": Mechanism(
        lambda config, layer: LocalAttention(own_options(config)),
        memory=Rerun,
        options=LocalOptions,
        cost="L · w · d, w = window_size",
    ),
    "sparse-transformer": Mechanism(
        lambda config, layer: SparseTransformerAttention(own_options(config)),
        memory=Rerun,
        options=SparseOptions,
        cost="L · √L · d, stride = √L",
    ),
    "longformer": Mechanism(
        lambda config, layer: LongformerAttention(own_options(config)),
        memory=Rerun,
        options=LongformerOptions,
        cost="L · (w + g) · d, w = window_size, g = num_global",
    ),
    "big-bird": drawn(
        BigBirdAttention,
        BigBirdOptions,
        Rerun,
        cost="L · (5 + r) · b · d, r = num_random_blocks, b = block_size",
    ),
    "linformer": drawn(
        LinformerAttention, LinformerOptions, cost="L · k · d, k = its num_projections"
    ),
    "synthesizer": drawn(
        SynthesizerAttention,
        SynthesizerOptions,
        Rerun,
        heads="num_attention_heads",
        cost="L² · d",
    ),
    "reformer": drawn(
        ReformerAttention,
        ReformerOptions,
        QueriesAndValues,
        heads="num_attention_heads",
        cost="n · L · log L · d, n = num_hashes",
    ),
    "sinkhorn": drawn(
        SinkhornAttention, SinkhornOptions, cost="L · b · d + (L / b)² · d, b = block_size"
    ),
    "routing-transformer": drawn(
        RoutingAttention, RoutingOptions, Rerun, cost="L · √L · d, num_clusters = √L"
    ),
    "clustered-favor": Mechanism(
        clustered_favor,
        check_clustered_favor,
        memory=Rerun,
        options=ClusteredFavorOptions,
        cost="c · L · m · d, c = num_clusters, m = num_projections",
    ),
    **{f"performer-{features}": performer(features) for features in FEATURES},
}


def check_dialect(config: PerformerFields) -> None:
    """Raise ValueError or TypeError for a dialect with wrong fields, or of another mechanism."""
    if not isinstance(config.dialect, dict):
        raise TypeError(f"dialect must be a dict or None, got {described(config.dialect)}.")
    dialect = Dialect.from_dict(config.dialect)
    _, _, features = only_mechanism(config).partition("performer-")
    if features not in FEATURES or features == SHARP or config.window_size is not None:
        raise ValueError(
            "a dialect says how another library computes FAVOR+, and none there has sharp features "
            f"or a window: got attention={config.attention!r}, window_size={config.window_size!r}. "
            "Take dialect=None for these."
        )
    if dialect.feature_epsilon and features != "positive":
        raise ValueError(
            "dialect feature_epsilon is added to the features of attention='performer-positive', "
            f"got attention={config.attention!r}. The ε of a kernel is kernel_epsilon."
        )


def has_epsilon_features(config: PerformerFields) -> bool:
    """Whether features depend on all keys of the sequence, see `Dialect`."""
    return bool((config.dialect or {}).get("feature_epsilon"))


def causal_memory(config: PerformerFields) -> CausalMemory:
    """What this mechanism remembers of a sequence that it continues.

    Raises ValueError if it cannot be causal, and if there is nothing that it could remember.
    """
    attention = only_mechanism(config)
    memory = MECHANISMS[attention].memory
    if has_epsilon_features(config):
        raise ValueError(
            "a causal model with dialect feature_epsilon must have use_cache=False: there each new "
            "token changes the features of all tokens before it, in every layer, so that nothing "
            "of them can be kept. Pass use_cache=False to the config, and to generate()."
        )
    if memory is None:
        causal = sorted(name for name, row in MECHANISMS.items() if row.memory is not None)
        raise ValueError(
            f"attention={attention!r} cannot be causal, and is_decoder=True, or the decoder of an "
            f"encoder-decoder, asks for that: choose one of {causal}, or build a bidirectional "
            "model."
        )
    return memory


def cross_config(config: PerformerFields) -> PerformerFields:
    """What the mechanism of cross-attention is built from: that of the config, without what has a
    meaning within one sequence alone, and with ω of its own.
    """
    config = copy.copy(config)
    config.attention = config.cross_attention or config.attention
    config.attention_options = config.window_size = None
    config.seed = mixed_seed(config.seed, 0, 0)
    return config


def cross_memory(config: PerformerFields) -> CrossMemory:
    """What a layer of cross-attention remembers. Raises ValueError if there is no such attention
    with this mechanism.
    """
    attention = config.cross_attention or config.attention
    memory = MECHANISMS[attention].cross_memory if isinstance(attention, str) else None
    if memory is None or config.dialect is not None:
        crossing = sorted(name for name, row in MECHANISMS.items() if row.cross_memory is not None)
        raise ValueError(
            "an encoder-decoder needs a mechanism in which queries see the keys of another "
            f"sequence, one by one, and no dialect: choose cross_attention from {crossing}, got "
            f"{attention!r}, dialect={config.dialect!r}."
        )
    return memory


def in_current_words(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `PerformerConfig` without words of earlier versions, for which it warns.

    attention="performer-softmax" was "performer-positive", or what a field `estimator` said.
    """
    current = dict(fields)
    estimator = current.pop("estimator", None)
    attention = current.get("attention")
    if attention == "performer-softmax":
        current["attention"] = f"performer-{estimator or 'positive'}"
    elif estimator is None:
        return current
    warnings.warn(
        "attention='performer-softmax' and the field estimator are words of an older version, "
        "which the next one will not know: attention now names the features. Instead of "
        f"attention={attention!r}, estimator={estimator!r} this is "
        f"attention={current.get('attention')!r}.",
        FutureWarning,
        stacklevel=3,
    )
    return current
