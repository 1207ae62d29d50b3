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

from performers.checks import described
from performers.convert.interface import attend_exactly, favor_mask, keys_seen
from performers.convert.linearize import options_of
from performers.convert.modes import evaluating
from performers.convert.options import FAVOR
from performers.convert.sites import Site, Sites
from performers.functional.favor import without_sinks
from performers.nn.sharp import SharpFeatures
from performers.nn.words import SHARP

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

    Raises ValueError for no data, for fewer positions than a head has dimensions, for sequences of
    at most two blocks beside a near field, and where a query or key is not finite, naming layer and
    head. The model is then as it was.
    """
    options = options_of(model)
    if options is None or options.features != SHARP or options.statistics == "call":
        raise ValueError(
            "calibration is for models converted with features='sharp' and statistics=None or "
            f"'calibrated', got {options or 'a model that was not converted'}. Convert it with "
            "performers.linearize(model, FavorOptions(...))."
        )
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor):
        raise TypeError(
            f"batches must be several batches, such as a list of them, got {described(batches)}."
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
    sites = Sites.of(model)
    learners = _Learners(sites)
    token = _learners.set(learners)
    with evaluating(model):
        try:
            # Its masks are those of FAVOR+, so what the layers learn from is what they will get.
            sites.switch(CALIBRATE, options)
            for batch in given:
                model(**batch)
        finally:
            sites.switch(FAVOR, options)
            _learners.reset(token)
    learners.check()
    # Only now, so that an error above leaves the model as it was.
    for site, layer in learners.layers.items():
        layer.attach(learners.feature_maps[site])
        layer.is_calibrated = True
    return model


class _Learners:
    """New feature maps for the converted layers of a model, while they learn."""

    def __init__(self, sites: Sites) -> None:
        self.layers = sites.layers
        self.sites = {site.module: site for site in self.layers}
        self.feature_maps: dict[Site, SharpFeatures] = {}
        self.longest: dict[Site, int] = {}

    def learn(
        self, site: Site, query: Tensor, key: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        layer = self.layers[site]
        if site not in self.feature_maps:
            phi = layer.new_feature_map(query.shape[-1], key.shape[1])
            assert isinstance(phi, SharpFeatures), "others have nothing to calibrate"
            self.feature_maps[site] = phi.to(query.device)
        length = key.shape[2] if mask is None else max(mask.sum(dim=1).tolist(), default=0)
        self.longest[site] = max(length, self.longest.get(site, 0))
        num_sinks = layer.options.near_field().get("num_sinks")
        if num_sinks and not layer.is_cross:
            # Sinks are scored exactly, and their keys lie far from all others: features must not
            # learn from them.
            mask = without_sinks(key, mask, num_sinks)
        try:
            self.feature_maps[site].calibrate(query, key, mask, scale)
        except ValueError as error:
            raise ValueError(f"{site.name}: {error}") from error

    def check(self) -> None:
        """Raise ValueError unless every layer has seen enough."""
        for site, layer in self.layers.items():
            if site not in self.feature_maps:
                raise ValueError(
                    f"calibration needs inputs that reach every converted layer: {site.name} was "
                    f"not called. Give all inputs of the model, or convert other layers than "
                    f"{layer.number}."
                )
            window = 0 if layer.is_cross else layer.options.window_size or 0
            if window and self.longest[site] <= 2 * window:
                raise ValueError(
                    f"calibration needs sequences longer than two blocks, {2 * window} positions "
                    f"with a window of {window}, because in shorter ones attention is exact: the "
                    f"longest that {site.name} saw has {self.longest[site]}. Give longer inputs or "
                    "convert with a smaller window_size."
                )
            phi = self.feature_maps[site]
            seen = min(int(phi.get_buffer(f"{side}_count").min()) for side in ("query", "key"))
            if seen < phi.dim:
                raise ValueError(
                    f"calibration needs at least {phi.dim} positions, the dim of a head, and "
                    f"better thousands: {site.name} saw {seen}. Give more or longer inputs."
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
    site = learners.sites.get(module)
    if site is not None:
        mask = keys_seen(module, query, key, attention_mask, **options).key_padding_mask
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        learners.learn(site, query, key, mask, scale)
    out = attend_exactly(module, query, key, value, attention_mask, scaling, **options)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(CALIBRATE, _calibrate)
AttentionMaskInterface.register(CALIBRATE, favor_mask)
