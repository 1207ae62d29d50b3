"""`linearize`: a pretrained model with FAVOR+ in the place of its attention, and the way back.

    model = linearize(AutoModel.from_pretrained(path))
    model.save_pretrained(folder)
    model = load_linearized(AutoModel, folder)     # the same numbers
    model = AutoModel.from_pretrained(folder)      # the exact model, from the same weights
    restore(model)                                 # the exact model, in place

No weight is added to the model, renamed or changed. What describes a conversion is saved beside the
weights: the options in config.json, under `favor`, and learned statistics, if any, in
favor.safetensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import cached_file

from performers.checks import check_attention_mask, check_instance, described
from performers.convert.cache import CAUSAL_LAYERS, PREPARE_CACHE, generate_in_constant_memory
from performers.convert.configurations import give_back, held_by, own_configurations
from performers.convert.interface import favor_layer
from performers.convert.layer import FavorLayer
from performers.convert.learned import DAMAGED, TENSORS, learned_tensors, place_learned
from performers.convert.options import FAVOR, FavorOptions
from performers.convert.sites import (
    Sites,
    check_convertible,
    head_dim,
    is_converted,
    is_cross_attention,
    is_unmoved_by_shifts,
)
from performers.convert.source import missing_model, read_tensors
from performers.models.cache import no_continuous_batching
from performers.models.naming import cache_among

__all__ = ["converted_layers", "linearize", "load_linearized", "options_of", "restore"]

NOTE = (
    "Attention was converted by performers. pip install 'performers[hf]', then "
    "performers.load_linearized(AutoModel..., path). Without it, from_pretrained(path) gives the "
    "exact model."
)

# Attributes of a converted model, beside the children of its attention modules: the configurations
# that it shared before, see `Owned`.
BEFORE = "attention_before_favor"
# And the hooks that look at its masks, before transformers makes bools of them.
HOOKS = "hooks_of_favor"
# The method that generate_batch begins with.
BATCHING = "init_continuous_batching"

# What from_pretrained may be told about where a file is.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def linearize(model: PreTrainedModel, options: FavorOptions | None = None) -> PreTrainedModel:
    """Replace the attention of a pretrained model by FAVOR+, in place; returns the model.

    Any architecture that goes through transformers' AttentionInterface will do. Pretrained weights
    keep their names and values. A second call with the same options does nothing; with others it
    replaces the options and forgets all calibration.

    Nothing else is touched: models made from one configuration, as the encoder and the decoder of
    BART are, share that object, and what is converted gets a copy of its own until it is restored.
    So `linearize(model.encoder)` converts the encoder. To save it with the rest of its model,
    convert the whole with FavorOptions(layers={"encoder": None}), which says so in its config.json.

    Raises ValueError, before the model is touched, for architectures and options that do not fit;
    what only a call of the model shows, such as a soft cap, is refused in that call.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"a model of transformers is converted, got {type(model).__name__}. Of a wrapped model "
            "pass the one inside, such as peft_model.get_base_model()."
        )
    check_instance("options", options, (FavorOptions, type(None)), "FavorOptions or None")
    _linearize(Sites.of(model), FavorOptions() if options is None else options)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `linearize`, in place; returns the model. An exact model stays as it is."""
    _restore(Sites.of(model))
    return model


def load_linearized(auto_class: Any, path: str | Path, **options: Any) -> PreTrainedModel:
    """Load what a converted model saved: its weights, its options, and what it has learned.

    `auto_class`: any class with `from_pretrained`, which gets `options`.

        model = load_linearized(AutoModelForCausalLM, path, dtype=torch.bfloat16)

    Raises FileNotFoundError where there is no model at `path`, and ValueError where it was not
    converted.
    """
    if not hasattr(auto_class, "from_pretrained"):
        raise TypeError(
            "auto_class must be a class with from_pretrained, as AutoModelForCausalLM is one, got "
            f"{described(auto_class)}."
        )
    check_instance("path", path, (str, Path), "the path of a folder")
    try:
        model: PreTrainedModel = auto_class.from_pretrained(path, **options)
    except OSError as error:  # whose words speak of a connection where there is no folder
        if Path(path, options.get("subfolder") or "", "config.json").is_file():
            raise
        raise missing_model(path) from error
    written = getattr(model.config, FAVOR, None)
    if written is None:
        raise ValueError(
            f"the model at {path} was not converted: its config has no {FAVOR!r}. Load it with "
            f"{auto_class.__name__}.from_pretrained and convert it with performers.linearize."
        )
    sites = Sites.of(model)
    _linearize(sites, FavorOptions.from_dict(written["options"]))
    if written["tensors"]:
        where = {word: options[word] for word in HUB_OPTIONS if word in options}
        learned = cached_file(path, written["tensors"], **where)
        place_learned(sites, read_tensors(learned, DAMAGED))
    return model


def options_of(model: PreTrainedModel) -> FavorOptions | None:
    """The options that `linearize` was given; None for a model that it did not convert."""
    if not hasattr(model, BEFORE):
        return None
    return FavorOptions.from_dict(getattr(model.config, FAVOR)["options"])


def converted_layers(model: PreTrainedModel) -> dict[str, FavorLayer]:
    """The converted layers of a model, by the names of their attention modules."""
    return {site.name: layer for site, layer in Sites.of(model).layers.items()}


def _linearize(sites: Sites, options: FavorOptions) -> None:
    model = sites.model
    check_convertible(sites, options)
    if options_of(model) == options:
        return
    _undo(sites)
    setattr(model, BEFORE, own_configurations(sites, options))
    _attend_exactly(sites)  # on these copies: a model around this one may attend by FAVOR+
    try:
        sites.switch(FAVOR, options)
    except ValueError:
        _restore(sites)
        raise
    # Trainers save by this method too; it also writes what was learned. No bound method, which
    # pickle would look for among the attributes of the model.
    model.save_pretrained = partial(_save_pretrained, model)
    register = model.base_model.register_forward_pre_hook
    hooks = [register(_check_masks, with_kwargs=True)]
    if is_unmoved_by_shifts(model.base_model):
        hooks.append(register(_count_from_the_first_token, with_kwargs=True))
    setattr(model, HOOKS, hooks)
    generate_in_constant_memory(model)
    if isinstance(model, GenerationMixin):
        setattr(model, BATCHING, no_continuous_batching)
    _write(sites, options, tensors=None)
    for site in sites.within(options):
        layer = None
        if is_converted(site, options):
            layer = favor_layer(site.module, options)
            dim = head_dim(site.module)
            # Drawn now where it can be, so that the model can be compiled at once; weights on the
            # meta device lie nowhere yet, and their first call draws.
            if dim is not None and site.device.type != "meta":
                layer.prepare(dim, site.device)
        setattr(site.module, FAVOR, layer)


def _restore(sites: Sites) -> None:
    _undo(sites)
    _attend_exactly(sites)


def _undo(sites: Sites) -> None:
    """Undo conversions of the model, and of models inside it, by `linearize`."""
    for site in sites:
        if hasattr(site.module, FAVOR):
            delattr(site.module, FAVOR)
    # A model inside this one may have been converted by itself, before or after.
    for module in sites.configured.values():
        for method in ("save_pretrained", PREPARE_CACHE, BATCHING):
            vars(module).pop(method, None)
        for hook in vars(module).pop(HOOKS, []):
            hook.remove()
    for module in reversed([*sites.configured.values()]):
        give_back(sites, vars(module).pop(BEFORE, []))


def _attend_exactly(sites: Sites) -> None:
    """Undo what transformers has switched without `linearize`, and what a saved model says."""
    for module in sites.configured.values():
        for config in held_by(module).values():
            vars(config).pop(FAVOR, None)
    model = sites.model
    if model.config._attn_implementation == FAVOR:
        sites.switch(model.get_correct_attn_implementation(None), FavorOptions())


def _check_masks(model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Masks of tokens, but not once more for each token, which a GPU would have to wait for."""
    if torch.compiler.is_compiling():
        return
    given = dict(zip(signature(model.forward).parameters, arguments, strict=False)) | options
    tokens = given.get("decoder_input_ids", given.get("input_ids"))
    if isinstance(tokens, Tensor) and tokens.shape[-1] == 1:
        return
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = given.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            check_attention_mask(name, mask)


def _count_from_the_first_token(
    model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positions of a batch padded on the left, where the caller gives none.

    transformers then counts padding too, and the exact model does not mind: rotations by the same
    angle leave q·k as it is. But they turn q and k, so an estimate would be another one, from
    statistics of other positions.
    """
    if not torch.compiler.is_compiling():  # a compiled model is called by names alone
        names = signature(model.forward).parameters
        arguments, options = (), dict(zip(names, arguments, strict=False)) | options
    mask, tokens = options.get("attention_mask"), options.get("input_ids")
    tokens = options.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(mask, Tensor) or mask.ndim != 2 or tokens is None:
        return arguments, options
    cache = cache_among(options)
    past, new = 0 if cache is None else cache.get_seq_length(), tokens.shape[1]
    if options.get("position_ids") is not None or mask.shape[1] != past + new:
        return arguments, options
    first = mask.bool().long().argmax(dim=1, keepdim=True)
    position = torch.arange(past, past + new, device=mask.device) - first
    return arguments, options | {"position_ids": position.clamp(min=0)}


def _save_pretrained(
    model: PreTrainedModel, save_directory: str | Path, *args: Any, **options: Any
) -> None:
    """`save_pretrained`, and beside the weights what the feature maps have learned, if anything."""
    sites = Sites.of(model)
    tensors = learned_tensors(sites)
    chosen = options_of(model)
    assert chosen is not None, "only converted models have this method"
    expected = {site for site in sites if is_converted(site, chosen)}
    layers = sites.layers
    if layers.keys() != expected or any(layer.options != chosen for layer in layers.values()):
        raise ValueError(
            "a model is saved with one choice of options, and a part of this one was converted or "
            "restored by itself since. Convert the whole anew, with layers by the names of parts: "
            'FavorOptions(layers={"encoder": None}).'
        )
    _write(sites, chosen, tensors=TENSORS if tensors else None)
    if tensors and options.get("is_main_process", True):
        # Before the rest, which may end with an upload of the folder.
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(save_directory) / TENSORS)
    with _attention_before(model):
        type(model).save_pretrained(model, save_directory, *args, **options)


@contextmanager
def _attention_before(model: PreTrainedModel) -> Iterator[None]:
    """With configurations that name the attention that the model had.

    transformers checks a configuration that it saves, and under another attention than "eager" it
    refuses `output_attentions=True` there.
    """
    owned = getattr(model, BEFORE)
    switched = [one.own._attn_implementation_internal for one in owned]
    for one in owned:
        # The public setter would set the parts of this configuration too, which may differ.
        one.own._attn_implementation_internal = one.at_first["_attn_implementation_internal"]
    try:
        yield
    finally:
        for one, implementation in zip(owned, switched, strict=True):
            one.own._attn_implementation_internal = implementation


def _write(sites: Sites, options: FavorOptions, tensors: str | None) -> None:
    """Say in the configuration how the model was converted, for every part that attends."""
    written: dict[str, Any] = {"options": options.to_dict(), "tensors": tensors, "note": NOTE}
    if isinstance(options.layers, Mapping):
        written[CAUSAL_LAYERS] = sorted(
            {
                site.number
                for site in sites
                if is_converted(site, options)
                and getattr(site.module, "is_causal", False)
                and not is_cross_attention(site.module)
            }
        )
    for config in sites.configs(options):
        setattr(config, FAVOR, copy.deepcopy(written))
