"""What feature maps of a converted model have learned or redrawn, in a file beside its weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from performers.convert.sites import Sites
from performers.convert.source import read_tensors

__all__ = [
    "DAMAGED",
    "TENSORS",
    "learned_tensors",
    "load_learned",
    "place_learned",
    "redraw",
    "save_learned",
]

TENSORS = "favor.safetensors"
DAMAGED = "Copy it again, or convert the model again."


def redraw(model: PreTrainedModel) -> None:
    """Draw ω of every converted layer anew, the same on every rank."""
    for layer in Sites.of(model).layers.values():
        if layer.feature_map is not None:
            layer.feature_map.redraw()


def load_learned(model: PreTrainedModel, folder: Path) -> None:
    """Put what `save_pretrained` of a converted model wrote beside its weights into another that is
    converted alike. Without such a file its feature maps are those that the options draw.
    """
    if (folder / TENSORS).is_file():
        place_learned(Sites.of(model), read_tensors(folder / TENSORS, DAMAGED))


def save_learned(model: PreTrainedModel, folder: Path, instead: Mapping[str, Tensor]) -> None:
    """Write that file again with other tensors in the place of some buffers, which are named as in
    `named_buffers`: those of all heads, where this process has what some have learned.
    """
    sites = Sites.of(model)
    tensors = learned_tensors(sites)
    for site, layer in sites.layers.items():
        for name, tensor in instead.items():
            if layer.is_calibrated and name.startswith(f"{site.name}."):
                part = name.rpartition(".")[2]
                tensors[f"{_base_name(model, site.name)}.{part}"] = tensor.contiguous()
    if tensors:
        save_file(tensors, folder / TENSORS)


def learned_tensors(sites: Sites) -> dict[str, Tensor]:
    """The buffers of feature maps that differ from what their options would make them."""
    tensors = {}
    for site, layer in sites.layers.items():
        phi = layer.feature_map
        if phi is not None and (layer.is_calibrated or phi.num_redraws > 0):
            for part, buffer in phi.named_buffers():
                tensors[f"{_base_name(sites.model, site.name)}.{part}"] = buffer.contiguous()
    return tensors


def place_learned(sites: Sites, tensors: dict[str, Tensor]) -> None:
    """Put what `learned_tensors` returned into the layers of a model."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        layer_name, _, part = name.rpartition(".")
        parts[layer_name][part] = tensor
    for site, layer in sites.layers.items():
        buffers = parts.pop(_base_name(sites.model, site.name), None)
        if buffers is not None:
            layer.load(buffers, site.device)
    if parts:
        raise ValueError(
            f"{TENSORS} has layers that {type(sites.model).__name__} has not: "
            f"{', '.join(sorted(parts))}. Load it with the class that it was saved from."
        )


def _base_name(model: PreTrainedModel, name: str) -> str:
    """The name of a module in the model without its head, which AutoModel loads."""
    return name.removeprefix(f"{model.base_model_prefix}.")
