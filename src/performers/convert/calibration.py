"""`calibrate`: sharp features learn from the queries and keys of the exact model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from performers.convert.interface import (
    attend_exactly,
    attention_modules,
    favor_mask,
    keys_seen,
    switch,
)
from performers.convert.linearize import converted_layers, options_of
from performers.convert.options import FAVOR, SHARP
from performers.functional.favor import without_sinks
from performers.nn.sharp import SharpFeatures

__all__ = ["calibrate"]

# The name of the attention function below among those of transformers.
CALIBRATE = "performers_calibrate"


@torch.no_grad()
def calibrate(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> PreTrainedModel:
    """Let converted layers learn the statistics of their queries and keys, from inputs like those
    to come.

    `batches`: keyword arguments of the model, padded with an attention_mask if at all. They run
    through the model with exact attention, so that each layer sees what the pretrained layers give.
    A few thousand tokens are enough. Each call of `calibrate` starts anew; returns the model.

    Raises ValueError for no data, for fewer positions than a head has dimensions, and where a query
    or key is not finite, naming layer and head. The model is then as it was.
    """
    options = options_of(model)
    if options is None or options.features != SHARP or options.statistics == "call":
        raise ValueError(
            "calibration is for models converted with features='sharp' and statistics=None or "
            f"'calibrated', got {options or 'a model that was not converted'}. Convert it with "
            "performers.linearize(model, FavorOptions(...))."
        )
    given = list(batches)
    if not given:
        raise ValueError("calibration needs at least one batch of inputs, got none.")
    for batch in given:
        if not isinstance(batch, Mapping):
            raise TypeError(
                "batches must be keyword arguments of the model, such as a tokenizer returns: got "
                f"{type(batch).__name__}."
            )
    learners = _Learners(model)
    modes = [(module, module.training) for module in model.modules()]
    token = _learners.set(learners)
    try:
        switch(model.eval(), CALIBRATE)
        for batch in given:
            model(**batch)
    finally:
        switch(model, FAVOR)
        for module, training in modes:
            module.training = training
        _learners.reset(token)
    learners.check()
    for name, layer in converted_layers(model).items():
        layer.attach(learners.feature_maps[name])
        layer.is_calibrated = True
    return model


class _Learners:
    """New feature maps for the converted layers of a model, while they learn."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.layers = converted_layers(model)
        modules = attention_modules(model)
        self.names = {modules[name]: name for name in self.layers}
        self.feature_maps: dict[str, SharpFeatures] = {}

    def learn(
        self, name: str, query: Tensor, key: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        if name not in self.feature_maps:
            phi = self.layers[name].new_feature_map(query.shape[-1], key.shape[1])
            assert isinstance(phi, SharpFeatures), "others have nothing to calibrate"
            self.feature_maps[name] = phi.to(query.device)
        layer = self.layers[name]
        if layer.options.num_sinks and not layer.is_cross:
            # Sinks are scored exactly, and their keys lie far from all others: features must not
            # learn from them.
            mask = without_sinks(key, mask, layer.options.num_sinks)
        try:
            self.feature_maps[name].calibrate(query, key, mask, scale)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def check(self) -> None:
        """Raise unless every layer has seen enough."""
        for name, layer in self.layers.items():
            if name not in self.feature_maps:
                raise ValueError(
                    f"calibration needs inputs that reach every converted layer: {name} was not "
                    f"called. Give all inputs of the model, or convert other layers than "
                    f"{layer.number}."
                )
            phi = self.feature_maps[name]
            seen = min(int(phi.get_buffer(f"{side}_count").min()) for side in ("query", "key"))
            if seen < phi.dim:
                raise ValueError(
                    f"calibration needs at least {phi.dim} positions, the dim of a head, and "
                    f"better thousands: {name} saw {seen}. Give more or longer inputs."
                )


_learners: ContextVar[_Learners] = ContextVar("learners")


def _calibrate(
    module: nn.Module,
    query: Float[Tensor, "batch heads query_length dim"],
    key: Float[Tensor, "batch key_heads key_length dim"],
    value: Float[Tensor, "batch key_heads key_length value_dim"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch query_length heads value_dim"], None]:
    options["is_causal"] = is_causal
    learners = _learners.get()
    if module in learners.names:
        mask = keys_seen(module, key, attention_mask, **options).key_padding_mask
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        learners.learn(learners.names[module], query, key, mask, scale)
    out = attend_exactly(module, query, key, value, attention_mask, scaling, **options)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(CALIBRATE, _calibrate)
AttentionMaskInterface.register(CALIBRATE, favor_mask)
