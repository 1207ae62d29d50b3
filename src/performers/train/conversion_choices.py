"""What a conversion measures before it trains: how many sinks, and what stands for far keys.

Candidates are compared on the same text, by how far each leaves the whole model from the exact one.
Of those that are about as close as the closest, the cheapest is taken.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from performers.convert.calibration import calibrate
from performers.convert.fidelity import Fidelity, compare_fidelity
from performers.convert.linearize import converted_layers, linearize
from performers.convert.options import FavorOptions
from performers.diagnosis.frontier import NUM_SINKS
from performers.nn.words import SHARP
from performers.theory.cost import exact_operations, favor_operations

__all__ = ["FAR_FIELDS", "LARGER_BLOCKS", "SINKS", "Candidate", "Chooser", "Size", "variant"]

# Of two candidates, the dearer must lower the distance to the exact model by this share.
WORTH_MORE = 0.05

# Numbers of sinks that are tried.
SINKS = (0, 1, NUM_SINKS)

# What is tried for the keys beyond the near field and the sinks.
LEFT_OUT, LARGER_BLOCKS, ESTIMATED = "left out", "left out, larger blocks", "estimated"
FAR_FIELDS: dict[str, dict[str, Any]] = {
    LEFT_OUT: {"far": False},
    "heavy keys": {"far": False, "num_heavy": 64},
    ESTIMATED: {"far": True},
    "estimated, limited": {"far": True, "far_limit": 0.2},
}
# Larger blocks are as large as the operations of the estimate allow, in steps of so many keys.
BLOCK_STEP = 16

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Size:
    """What counted operations depend on besides the options of a conversion."""

    length: int
    dim: int
    is_causal: bool

    def setting(self, options: FavorOptions) -> dict[str, Any]:
        """The options as `theory.favor_operations` takes them."""
        near = options.near_field()
        return {
            "num_projections": options.num_projections if near.get("far", True) else 0,
            "window_size": near.get("window_size"),
            "num_sinks": near.get("num_sinks", 0),
            "is_causal": self.is_causal,
            "is_sharp": options.features == SHARP,
            "num_heavy": near.get("num_heavy", 0),
        }

    def cost(self, options: FavorOptions) -> float:
        """Operations of a converted layer, as a share of those of exact attention."""
        operations = favor_operations(self.length, self.dim, **self.setting(options))
        return operations / exact_operations(self.length, self.dim, self.is_causal)

    def larger_blocks(self, options: FavorOptions) -> FavorOptions | None:
        """The largest blocks with nothing else far that cost no more than the estimate beside
        these; None where no larger ones do.
        """
        allowed = self.cost(dataclasses.replace(options, far=True))
        assert options.window_size, "blocks are those of a near field"
        found = None
        for window in range(options.window_size + BLOCK_STEP, self.length // 2 + 1, BLOCK_STEP):
            larger = dataclasses.replace(options, window_size=window, far=False)
            if 2 * window < self.length and self.cost(larger) <= allowed:
                found = larger
        return found


@dataclass(frozen=True)
class Candidate:
    """A setting of a conversion, the model with it, and what it was found to be.

    `cost`: counted operations ÷ those of exact attention; None where the dim of heads is not known.
    """

    options: FavorOptions
    model: PreTrainedModel
    fidelity: Fidelity
    cost: float | None

    def __str__(self) -> str:
        if self.cost is None:
            return str(self.fidelity)
        return f"{self.fidelity}; {self.cost:.2f} of the operations of exact attention"

    def to_dict(self) -> dict[str, Any]:
        """As types that JSON can hold."""
        return dataclasses.asdict(self.fidelity) | {
            "cost": self.cost,
            "window_size": self.options.window_size,
        }


@dataclass(frozen=True)
class Chooser:
    """Compares settings of a model, converted or not, on `batches`.

    `learn_from`: batches that sharp features are calibrated on.
    `size`: None where the dim of heads is not known.
    """

    model: PreTrainedModel
    teacher: PreTrainedModel
    batches: Batches
    learn_from: Batches
    size: Size | None
    report: Callable[[str], None]

    def sinks(self, options: FavorOptions) -> tuple[int, dict[int, Candidate]]:
        """The smallest number of sinks that is about as good as any, and what was found with each.

        Measured with nothing else far, where sinks count most and nothing has to be calibrated.
        """
        alone = dataclasses.replace(options, far=False, far_limit=None)
        found = self.compare({n: dataclasses.replace(alone, num_sinks=n) for n in SINKS})
        chosen = _cheapest(found)
        distances = ", ".join(f"{one.fidelity.distance:.4f} with {n}" for n, one in found.items())
        self.report(f"sinks: a distance to the exact model of {distances}; chosen: {chosen}")
        return chosen, found

    def far_field(
        self, options: FavorOptions, larger_blocks: bool
    ) -> tuple[str, dict[str, Candidate]]:
        """What should stand for far keys, and all candidates for that.

        A model bears what is missing better than an estimate with a heavy tail, and no error of a
        single layer shows it.
        """
        tried = {name: dataclasses.replace(options, **far) for name, far in FAR_FIELDS.items()}
        if larger_blocks and self.size is not None:
            larger = self.size.larger_blocks(options)
            tried |= {} if larger is None else {LARGER_BLOCKS: larger}
        found = self.compare(tried)
        for name, one in found.items():
            self.report(f"far keys {name}, blocks of {one.options.window_size}: {one}")
        chosen = _cheapest(found)
        self.report(f"chosen: far keys {chosen}")
        return chosen, found

    def compare(self, tried: Mapping[Any, FavorOptions]) -> dict[Any, Candidate]:
        """Of every setting the model, calibrated where it can be, and its fidelity; the cheapest
        first where costs are known, else in the order of the settings.
        """
        cost = {n: None if self.size is None else self.size.cost(x) for n, x in tried.items()}
        order = sorted(tried, key=lambda name: cost[name] or 0.0)
        models: dict[Any, PreTrainedModel] = {}
        learned: dict[FavorOptions, PreTrainedModel] = {}
        for name in tqdm(order, "calibrating settings", leave=False):
            options = tried[name]
            models[name] = variant(self.model, options)
            if not learns(options):
                continue
            alike = dataclasses.replace(options, far_limit=None)
            if alike in learned:
                _copy_features(learned[alike], models[name])
            else:
                learned[alike] = calibrate(models[name], self.learn_from)
        batches = tqdm(self.batches, "comparing settings", leave=False)
        found = compare_fidelity(models, self.teacher, batches)
        return {n: Candidate(tried[n], models[n], found[n], cost[n]) for n in order}


def variant(model: PreTrainedModel, options: FavorOptions) -> PreTrainedModel:
    """The model with other options; both have the same weights, in the same memory."""
    shared = {id(x): x for x in model.parameters()}
    return linearize(copy.deepcopy(model, shared), options)


def learns(options: FavorOptions) -> bool:
    """Whether a conversion with these options has something to calibrate."""
    is_sharp = options.features == SHARP and options.statistics != "call"
    return is_sharp and options.far is not False


def _copy_features(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Give a model the feature maps that another has learned."""
    layers = converted_layers(source)
    for name, layer in converted_layers(target).items():
        phi = layers[name].feature_map
        assert phi is not None, "it was calibrated"
        buffers = dict(phi.named_buffers())
        layer.load(buffers, buffers["omega"].device)


def _cheapest(found: Mapping[Any, Candidate]) -> Any:
    """The first whose distance is about the smallest."""
    closest = min(one.fidelity.distance for one in found.values())
    enough = max(closest, 0.0) / (1 - WORTH_MORE)  # rounding may put it below 0
    return next(name for name, one in found.items() if one.fidelity.distance <= enough)
