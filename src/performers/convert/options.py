"""`FavorOptions`: all choices of a conversion, checked when they are made, kept in config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from transformers import PreTrainedConfig

from performers.checks import check_choice, check_count, check_flags, check_whole_number, described
from performers.diagnosis.frontier import NUM_SINKS, Frontier
from performers.functional.near_field import check_far_limit, check_num_heavy
from performers.functional.projections import PROJECTIONS
from performers.nn import KernelFeatures, SharpFeatures, SoftmaxFeatures
from performers.nn.sharp import STATISTICS
from performers.nn.words import (
    FEATURES,
    SHARP,
    build_features,
    check_features,
    estimator_of,
    takes_window,
)

__all__ = ["FAVOR", "FavorOptions", "is_within"]

# Chosen by the frontiers of several pretrained models (DESIGN.md): the largest near field whose
# cost, these projections included, is below that of exact attention from 512 positions on.
WINDOW_SIZE, NUM_PROJECTIONS = 128, 64

# The name of FAVOR+ among transformers' attention implementations, of the child that holds a
# converted layer's feature map, and of the options in a configuration.
FAVOR = "favor"


@dataclass(frozen=True)
class FavorOptions:
    """How the attention of a pretrained model is estimated.

    `num_projections`, `projection`, `seed`: see `SoftmaxFeatures`.
    `features`: a word of `performers.nn.words`, which `PerformerConfig.attention` has after its
    "performer-": "sharp" (`SharpFeatures`), "positive", "hyperbolic" or "trigonometric"
    (`SoftmaxFeatures`), or the name of a kernel such as "relu" (`KernelFeatures`), which is another
    attention than softmax and needs training.
    `statistics`: where sharp features learn, see `SharpFeatures`. None: from `calibrate` once that
    was called; before that, bidirectional attention learns from each call, and causal attention
    learns nothing and uses plain positive features.
    `window_size`, `num_sinks`, `far`, `far_limit`: the exact near field, and whether the other keys
    are estimated and what they weigh at most, see `favor_attention`. Cross-attention has no near
    field. A `window_size` of 0 is no near field; None is 128, or 0 for features that cannot be
    combined with exact scores: kernels and trigonometric ones. `num_sinks` None is 4 in a near
    field, because trained models put attention that they have no use for on the first tokens.
    `num_heavy`: with far=False, so many far keys stay exact, those that near queries attended to
    most.
    `far` None is True. But `performers convert` measures what None leaves open: it takes fewer
    sinks where these are as good, and of an estimated far field, heavy keys and nothing far the
    cheapest that leaves the model about as close to the exact one as any.
    `layers`: numbers of the layers that are converted, the others stay exact. None: all, other than
    the sliding-window layers of models that also have layers without one. By the names of parts of
    the model, such as {"encoder": None, "decoder": [0, 2]}: these layers of these parts, and no
    other part is touched. A part is named as in the model without its head, up to any depth.
    `exact_heads`: query heads of converted layers that stay exact, by the number of the layer. They
    cost quadratic time in addition; in generation such layers keep all their keys.

    Raises ValueError for unknown words, counts below 1, and words that do not go together.
    """

    num_projections: int = NUM_PROJECTIONS
    features: str = SHARP
    projection: str | None = "orthogonal"
    statistics: str | None = None
    window_size: int | None = None
    num_sinks: int | None = None
    far: bool | None = None
    far_limit: float | None = None
    num_heavy: int = 0
    layers: Sequence[int] | Mapping[str, Sequence[int] | None] | None = field(
        default=None, hash=False
    )
    exact_heads: Mapping[int, Sequence[int]] = field(default_factory=dict, hash=False)
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("num_projections", self.num_projections)
        check_features(self.features, self.projection)
        if self.projection is not None:
            check_choice("projection", self.projection, PROJECTIONS)
        if self.statistics is not None:
            check_choice("statistics", self.statistics, STATISTICS)
            if self.features != SHARP:
                raise ValueError(
                    f"statistics are learned by features={SHARP!r} alone, got "
                    f"features={self.features!r} with statistics={self.statistics!r}."
                )
        can_be_near = takes_window(self.features)
        if self.window_size is None:
            object.__setattr__(self, "window_size", WINDOW_SIZE if can_be_near else 0)
        else:
            check_count("window_size", self.window_size, least=0)
            if self.window_size and not can_be_near:
                raise ValueError(
                    "window_size puts exact softmax scores beside estimated ones: it needs "
                    f"features in {_with_windows()}, got "
                    f"{self.features!r} with window_size={self.window_size}. Pass window_size=0."
                )
        if self.num_sinks is not None:
            check_count("num_sinks", self.num_sinks, least=0)
        if self.far is not None:
            check_flags(far=self.far)
        check_far_limit(self.far_limit, self.far)
        check_num_heavy(self.num_heavy, self.far)
        if not self.window_size and (self.num_sinks or self.far is False or self.far_limit):
            raise ValueError(
                "num_sinks, far=False and far_limit belong to an exact near field, and there is "
                f"none: got num_sinks={self.num_sinks!r}, far={self.far!r}, "
                f"far_limit={self.far_limit!r}, features={self.features!r}. Pass window_size= too, "
                f"with features in {_with_windows()}."
            )
        check_whole_number("seed", self.seed)
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        if not isinstance(self.exact_heads, Mapping) or not all(
            _are_numbers([layer]) and _are_numbers(heads)
            for layer, heads in self.exact_heads.items()
        ):
            raise ValueError(
                "exact_heads must be numbers of heads by the number of their layer, both counted "
                f"from 0, such as {{3: [0, 5]}}: got {described(self.exact_heads)}."
            )
        if estimator_of(self.features) is None and self.exact_heads:
            raise ValueError(
                "exact_heads put softmax attention beside its estimates: they need features "
                f"'sharp' or an estimator of softmax, got {self.features!r}."
            )
        heads = {n: tuple(sorted(set(heads))) for n, heads in self.exact_heads.items() if heads}
        object.__setattr__(self, "exact_heads", heads)

    @classmethod
    def within(cls, frontier: Frontier, error: float, **others: Any) -> FavorOptions:
        """The cheapest of the measured settings with at most this error; `others` are options.

            layers = capture_attention(model, **inputs)
            linearize(model, FavorOptions.within(measure_frontier(layers), error=0.2))

        Raises ValueError where no setting has so small an error. The printed frontier says whether
        it is cheaper than exact attention.
        """
        setting = frontier.within(error)
        chosen: dict[str, Any] = {
            "features": setting.features,
            "window_size": setting.window_size or 0,
            "num_sinks": setting.num_sinks,
            "far": setting.num_projections > 0,
        }
        if setting.num_projections:
            chosen["num_projections"] = setting.num_projections
        if setting.features == SHARP:
            chosen["statistics"] = frontier.statistics
        return cls(**chosen, **others)

    def feature_map(
        self, dim: int, num_heads: int = 1, layer: int = 0, is_cross: bool = False
    ) -> SharpFeatures | SoftmaxFeatures | KernelFeatures:
        """φ for one attention layer: a function of these options and of the layer's number.

        `is_cross`: cross-attention, which has no near field.
        """
        return build_features(
            self.features,
            dim,
            self.num_projections,
            num_heads=num_heads,
            statistics=self.statistics or "calibrated",
            has_window=bool(self.window_size) and not is_cross,
            projection=self.projection,
            seed=self.seed,
            layer=layer,
        )

    def near_field(self) -> dict[str, Any]:
        """The words of `favor_attention` for the near field; none where there is none."""
        if not self.window_size:
            return {}
        return {
            "window_size": self.window_size,
            "num_sinks": NUM_SINKS if self.num_sinks is None else self.num_sinks,
            "far": self.far is not False,
            "far_limit": self.far_limit,
            "num_heavy": self.num_heavy,
        }

    def converts(self, number: int, layer_types: Sequence[str], name: str = "") -> bool:
        """True if FAVOR+ takes the place of attention in the layer of this number.

        `layer_types`: the kinds of a model's layers, where its configuration has any.
        `name`: of the attention module, in the model without its head.
        """
        chosen = self.layers
        if isinstance(chosen, Mapping):
            parts = [numbers for part, numbers in chosen.items() if is_within(name, part)]
            if not parts:
                return False
            everything = None in parts
            chosen = None if everything else [n for numbers in parts for n in numbers or ()]
        if chosen is not None:
            return number in chosen
        is_mixed = len(set(layer_types)) > 1 and number < len(layer_types)
        return not (is_mixed and layer_types[number] in {"sliding_attention", "chunked_attention"})

    def to_dict(self) -> dict[str, Any]:
        """The options as types that JSON can hold; `from_dict` reads them."""
        written = asdict(self)
        if isinstance(self.layers, Mapping):
            written["layers"] = {
                part: None if numbers is None else list(numbers)
                for part, numbers in self.layers.items()
            }
        elif self.layers is not None:
            written["layers"] = list(self.layers)
        heads = {str(layer): list(heads) for layer, heads in self.exact_heads.items()}
        return written | {"exact_heads": heads}

    @classmethod
    def of(cls, config: PreTrainedConfig) -> FavorOptions:
        """The options that `linearize` has written into a configuration; the defaults if there are
        none.
        """
        written = getattr(config, FAVOR, None) or {}
        return cls.from_dict(written.get("options", {}))

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> FavorOptions:
        """The options from `to_dict`. Raises ValueError for one that this version does not know."""
        known = [field.name for field in fields(cls)]
        for name in written:
            check_choice("option of a conversion", name, known)
        heads = {int(layer): heads for layer, heads in written.get("exact_heads", {}).items()}
        return cls(**{**written, "exact_heads": heads})


def is_within(name: str, part: str) -> bool:
    """True if the module of this name is the part of that name, or inside it."""
    return name == part or name.startswith(f"{part}.")


def _checked_layers(layers: Any) -> tuple[int, ...] | dict[str, tuple[int, ...] | None] | None:
    """The same choice in one form, so that choices which mean the same are equal."""
    by_part = layers if isinstance(layers, Mapping) else {"": layers}
    for part, numbers in by_part.items():
        if not isinstance(part, str) or not (numbers is None or _are_numbers(numbers)):
            raise ValueError(
                "layers must be numbers of layers, counted from 0, or None for all, or these by "
                "the names of parts, such as {'encoder': None, 'decoder': [0, 2]}: got "
                f"{described(layers)}."
            )
    tidy = {
        part: None if numbers is None else tuple(sorted(set(numbers)))
        for part, numbers in by_part.items()
    }
    return tidy if isinstance(layers, Mapping) else tidy[""]


def _with_windows() -> list[str]:
    return [features for features in FEATURES if takes_window(features)]


def _are_numbers(given: object) -> bool:
    """True if these are whole numbers of at least 0."""
    if not isinstance(given, list | tuple | range | set):
        return False
    return all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in given)
