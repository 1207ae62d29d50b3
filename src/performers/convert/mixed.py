"""Mixed models: the layers whose estimates change the model's output most stay exact.

    costs = layer_costs(model, batches)             # of a converted model
    options = replace(options, layers=choose_layers(costs, num_exact=2))
    linearize(model, options)                       # then calibrate again

A layer that stays exact costs as much as before, and keeps its keys in generation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from performers.checks import check_count
from performers.convert.modes import evaluating
from performers.convert.options import FAVOR
from performers.convert.sites import Sites

__all__ = ["choose_layers", "layer_costs"]


@torch.no_grad()
def layer_costs(
    model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]
) -> dict[int, float]:
    """‖out − exact‖ / ‖exact‖ of the whole model with one layer converted and all others exact.

    By the number of the converted layer; modules of one number, as an encoder's and a decoder's
    are, count together. `out` is what the model without its head returns first, most often its last
    hidden states, at positions that `attention_mask` does not hide.

    The error of a layer's own output says less, because later layers amplify some errors and
    suppress others. Cost: a forward pass for each layer and one more. The model is as before
    afterwards.

    Raises ValueError for a model without converted layers and for no batches.
    """
    layers = Sites.of(model).layers
    if not layers:
        raise ValueError(
            "costs are those of converted layers, and this model is exact. Convert it with "
            "performers.linearize(model, FavorOptions(...))."
        )
    if not batches:
        raise ValueError("costs are measured on at least one batch of inputs, got none.")

    def outputs(converted: int | None) -> Iterator[Float[Tensor, "positions width"]]:
        for site, layer in layers.items():
            # None attends exactly, with the masks of converted layers: no switch, no other masks.
            setattr(site.module, FAVOR, layer if site.number == converted else None)
        for batch in batches:
            yield _output(model, batch)

    costs = {}
    with evaluating(model):
        try:
            exact = list(outputs(converted=None))
            whole = sum(float(x.square().sum()) for x in exact)
            for number in sorted({site.number for site in layers}):
                wrong = sum(
                    float((x - y).square().sum())
                    for x, y in zip(outputs(converted=number), exact, strict=True)
                )
                costs[number] = math.sqrt(wrong / whole)
        finally:
            for site, layer in layers.items():
                setattr(site.module, FAVOR, layer)
    return costs


def choose_layers(costs: Mapping[int, float], num_exact: int) -> tuple[int, ...]:
    """The layers to convert, where the `num_exact` that cost most stay exact: for
    `FavorOptions(layers=...)`. Of equal costs, the earlier layer stays exact.

    Raises ValueError where no layer would be left.
    """
    check_count("num_exact", num_exact)
    if num_exact >= len(costs):
        raise ValueError(
            f"num_exact must leave a layer to convert: there are {len(costs)}, and {num_exact} "
            "would stay exact."
        )
    worst_first = sorted(costs, key=lambda number: (-costs[number], number))
    return tuple(sorted(worst_first[num_exact:]))


def _output(
    model: PreTrainedModel, batch: Mapping[str, Tensor]
) -> Float[Tensor, "positions width"]:
    """The output of the model without its head, without the rows of padding."""
    out: Tensor = model.base_model(**batch)[0]
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    if mask is not None and mask.shape == out.shape[:2]:
        out = out[mask.bool()]
    return out.float().flatten(0, -2)
