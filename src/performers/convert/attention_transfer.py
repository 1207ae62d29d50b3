"""Attention transfer: each converted layer learns to attend as the exact one does.

    teacher = exact_copy(model)                     # before anything is trained
    layer_errors(model, teacher, held_out)          # beside averaging_errors(teacher, held_out)
    transfer_attention(model, teacher, batches)

The exact model runs, and each converted layer is called with what the exact layer was called with.
So the layers learn independently of each other: a step trains all of them, with gradients through
attention only, which makes it several times cheaper than a step of fine-tuning. Fine-tuning then
corrects how errors of earlier layers change the inputs of later ones.

Source: Zhang et al. 2024, "The Hedgehog & the Porcupine", which distils attention weights; here
outputs are matched, which needs no quadratic matrix.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from performers.convert.layer import FavorLayer
from performers.convert.linearize import converted_layers, options_of
from performers.convert.modes import evaluating
from performers.convert.options import FAVOR
from performers.convert.sites import Sites
from performers.functional.softmax import softmax_attention

__all__ = [
    "LayerErrors",
    "averaging_errors",
    "exact_copy",
    "layer_errors",
    "transfer_attention",
]

Batch = Mapping[str, Tensor]


def exact_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy of a converted model that attends exactly: the teacher.

    Raises ValueError for a model that was not converted.
    """
    options = options_of(model)
    if options is None:
        raise ValueError(
            "recovery is for converted models, and this one is exact. Convert it with "
            "performers.linearize(model, FavorOptions(...))."
        )
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    sites = Sites.of(teacher)
    # It is still switched to FAVOR+, with no layer in the place: so its attention is exact and gets
    # the masks that converted layers get, which are then called with the same arguments.
    for site in sites.within(options):
        setattr(site.module, FAVOR, None)
    for config in sites.configs(options):
        # A cache would be among those arguments, and already hold the keys of the call.
        if hasattr(config, "use_cache"):
            config.use_cache = False
    return teacher


class LayerErrors:
    """The teacher, whose every pass also compares layers with its own:

        measure = LayerErrors(model, teacher)
        output = measure(**batch)          # that of the teacher
        measure.errors()                   # of each converted layer: ‖out − exact‖ / ‖exact‖

    Each layer is given what the exact layer is given. `out` is what the attention module returns:
    in most decoders after the output projection.
    """

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel) -> None:
        self.model, self.teacher = model, teacher
        self.layers: Mapping[str, nn.Module] = _converted_modules(model)
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    @torch.no_grad()
    def __call__(self, **batch: Tensor) -> Any:
        output, calls = _attention_calls(self.teacher, self.layers, batch)
        with evaluating(self.model):
            for call in calls:
                square, whole = call.compare(self.layers[call.name])
                self.sums[call.name][0] += float(square)
                self.sums[call.name][1] += float(whole)
        return output

    def errors(self) -> dict[str, float]:
        return {name: math.sqrt(square / whole) for name, (square, whole) in self.sums.items()}


def layer_errors(
    model: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[Batch]
) -> dict[str, float]:
    """‖out − exact‖ / ‖exact‖ of each converted layer, see `LayerErrors`."""
    return _errors(LayerErrors(model, teacher), batches)


def averaging_errors(
    model: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[Batch]
) -> dict[str, float]:
    """`layer_errors` of averaging the visible values; a useful estimate has smaller ones."""
    measure = LayerErrors(model, teacher)
    layers = {}
    for name, layer in converted_layers(model).items():
        layers[name] = copy.deepcopy(teacher.get_submodule(name))
        setattr(layers[name], FAVOR, _Averaging(layer.options, layer.number))
    measure.layers = layers
    return _errors(measure, batches)


def transfer_attention(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Batch],
    learning_rate: float = 1e-3,
    report: Callable[[int, float], None] | None = None,
) -> PreTrainedModel:
    """Train the projections of each converted layer until its output is that of the exact layer.

        loss = mean over layers of ‖out − exact‖² / ‖exact‖²

    One step of AdamW per batch, `learning_rate` falling linearly to 0; only the parameters of
    converted attention modules change, and ω stays. `report` gets the steps done and the loss.
    Trains in place, without dropout; returns the model.

    Raises FloatingPointError if the loss is no longer finite.
    """
    layers = _converted_modules(model)
    parameters = [p for module in layers.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    with evaluating(model):
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - step / len(batches))
            losses = []
            for call in _attention_calls(teacher, layers, batch)[1]:
                square, whole = call.compare(layers[call.name])
                # Each layer by its own size: outputs of layers differ by orders of magnitude.
                losses.append(square / whole)
            loss = torch.stack(losses).mean()
            if not loss.isfinite():
                raise FloatingPointError(
                    f"attention transfer diverged: the loss is {float(loss.detach())} at step "
                    f"{step}. Start again with a lower learning rate."
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if report is not None:
                report(step + 1, float(loss.detach()))
    optimizer.zero_grad()
    return model


class _Averaging(FavorLayer):
    """Every visible key has the same weight."""

    def forward(
        self,
        query: Float[Tensor, "batch heads query_length dim"],
        key: Float[Tensor, "batch key_heads key_length dim"],
        value: Float[Tensor, "batch key_heads key_length value_dim"],
        *,
        is_causal: bool,
        key_padding_mask: Bool[Tensor, "batch key_length"] | None,
        scale: float | None,
        segment_ids: Int[Tensor, "batch key_length"] | None = None,
        prefix_lengths: Int[Tensor, " batch"] | None = None,
        seen_lengths: Int[Tensor, "batch query_length"] | None = None,
    ) -> Float[Tensor, "batch heads query_length value_dim"]:
        return softmax_attention(
            torch.zeros_like(query), key, value, is_causal, key_padding_mask, scale,
            enable_gqa=True, segment_ids=segment_ids, prefix_lengths=prefix_lengths,
            seen_lengths=seen_lengths,
        )  # fmt: skip


class _Call(NamedTuple):
    """One call of an attention module of the teacher, and its output at positions that count."""

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    exact: Float[Tensor, "positions width"]
    is_real: Bool[Tensor, "batch length"]

    def compare(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """‖out − exact‖² of another module, given the same, and ‖exact‖², in float32."""
        out = _output(module(*self.arguments, **self.options))[self.is_real]
        return (out - self.exact).float().square().sum(), self.exact.float().square().sum()


def _attention_calls(
    teacher: PreTrainedModel, names: Iterable[str], batch: Batch
) -> tuple[Any, list[_Call]]:
    """The output of the teacher, and the calls of its attention modules of these names."""
    # The inputs of all these layers are kept until the batch is done, as a forward pass with
    # gradients keeps them.
    calls: list[_Call] = []
    mask = batch.get("attention_mask")

    def keeper(name: str) -> Callable[..., None]:
        def keep(
            module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any
        ) -> None:
            exact = _output(output)
            if mask is not None and mask.shape == exact.shape[:2]:
                is_real = mask.bool()
            else:
                is_real = exact.new_ones(exact.shape[:2], dtype=torch.bool)
            calls.append(_Call(name, arguments, options, exact[is_real], is_real))

        return keep

    handles = [
        teacher.get_submodule(name).register_forward_hook(keeper(name), with_kwargs=True)
        for name in names
    ]
    try:
        with torch.no_grad():
            output = teacher(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return output, calls


def _output(output: Any) -> Tensor:
    """The output of an attention module, without the weights that most modules return beside it."""
    return output[0] if isinstance(output, tuple) else output


def _errors(measure: LayerErrors, batches: Iterable[Batch]) -> dict[str, float]:
    for batch in batches:
        measure(**batch)
    return measure.errors()


def _converted_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    return {site.name: site.module for site in Sites.of(model).layers}
