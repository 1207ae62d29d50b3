"""`parallelize`: a model whose sequences are split over ranks, each of which computes a piece."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from performers.checks import check_instance
from performers.convert.layer import FavorLayer
from performers.convert.sites import Sites
from performers.distributed.agreement import agree, report
from performers.distributed.attention import sequence_parallel_attention
from performers.distributed.collectives import group_of, rank_in, size_of, summed
from performers.distributed.positions import counts_by_itself, default_positions
from performers.functional import favor_attention
from performers.functional.fingerprint import fingerprint
from performers.models.layers import PerformerAttention
from performers.models.losses import next_tokens, summed_loss
from performers.models.masks import packed_segments
from performers.models.modeling import PerformerPreTrainedModel
from performers.nn.mechanisms import Favor

__all__ = ["attending_modules", "identities", "own_piece", "parallelize"]

# The arguments of models that have a place for each token.
OF_TOKENS = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
# Models with a loss for each token, by what transformers calls it: whether it is of the next one.
LOSSES = {"ForMaskedLM": False, "ForCausalLM": True}


def own_piece(length: int, mesh: DeviceMesh | dist.ProcessGroup) -> slice:
    """Which positions of a sequence of this length are those of this rank.

    Pieces are as equal as can be: the first ranks have one token more where they do not divide it.

    Raises ValueError for fewer tokens than ranks.
    """
    group = group_of(mesh)
    ranks, rank = size_of(group), rank_in(group)
    if length < ranks:
        raise ValueError(
            f"a sequence of {length} tokens cannot be split over {ranks} ranks: each needs at "
            "least one. Take fewer ranks, or pad the sequence."
        )
    size, longer = divmod(length, ranks)
    start = rank * size + min(rank, longer)
    return slice(start, start + size + (rank < longer))


def parallelize(model: nn.Module, mesh: DeviceMesh | dist.ProcessGroup) -> nn.Module:
    """Split the sequences of a model over the ranks of a mesh of one dimension; the model itself.

    For Performers that attend by FAVOR+, and for models of transformers that `linearize` has
    converted in all layers. Every rank calls the model with the same whole batch. The model takes
    the rank's piece (`own_piece`) of tokens, mask and positions; outputs are those of the piece.

    With `labels` the loss is that of the whole sequence, mean cross-entropy over labels other than
    −100, the same on every rank; a causal model predicts the first token of the next piece too. The
    gradient of the whole is the *mean* over ranks of the gradients, as DDP and FSDP2 take it of all
    their ranks: give them the ranks of this mesh, or these and those of data parallelism. Call
    `parallelize` first, then them, then torch.compile.

    Raises ValueError on every rank for a model whose attention is not FAVOR+ everywhere, and where
    ranks have other weights, ω, options or batches than the rest. What goes wrong in one rank's
    forward pass is raised on all of them. A call refuses caches, packed sequences and attention
    matrices, which need whole sequences: generate with a model that is not split.
    """
    check_instance("model", model, nn.Module, "a Performer or a converted model of transformers")
    group = group_of(mesh)
    attending: list[Favor | FavorLayer] = []

    def describe() -> tuple[Mapping[str, object], int]:
        attending.extend(attending_modules(model))
        return {"class of the model": type(model).__name__, **identities(model)}, 0

    agree(group, describe)
    is_own = isinstance(model, PerformerPreTrainedModel)
    pieces = _Pieces(group, counts_by_itself=is_own or counts_by_itself(model))
    for module in attending:
        module.attend = partial(sequence_parallel_attention, mesh=group)
    model.register_forward_pre_hook(pieces.split, with_kwargs=True)
    model.register_forward_hook(pieces.add_loss, with_kwargs=True, always_call=True)
    return model


def attending_modules(model: nn.Module) -> list[Favor | FavorLayer]:
    """What computes attention in this model.

    Raises ValueError where it is anything else than FAVOR+ of a sequence with itself.
    """
    title = type(model).__name__
    found: list[tuple[str, nn.Module | None]] = []
    for name, module in model.named_modules():
        if isinstance(module, PerformerAttention):
            found.append((name, module.mechanism))
    if not found and hasattr(model, "base_model"):
        sites = Sites.of(model)
        found += [(site.name, sites.layers.get(site)) for site in sites]
        found += [(name, None) for name in sites.by_themselves]
    if not found:
        raise ValueError(
            f"{title} has no attention that could be split over ranks: pass a Performer, or a "
            "model of transformers after performers.linearize(model)."
        )
    attending: list[Favor | FavorLayer] = []
    for name, module in found:
        if not isinstance(module, Favor | FavorLayer):
            reason = "attends by something else than FAVOR+, or by FAVOR+ in another dialect"
        elif isinstance(module, FavorLayer) and module.is_cross:
            reason = "attends to another sequence"
        elif isinstance(module, FavorLayer) and module.options.exact_heads.get(module.number):
            reason = "has exact heads, which take whole sequences and all heads"
        elif module.attend is not favor_attention:
            reason = "is split over ranks already"
        else:
            attending.append(module)
            continue
        raise ValueError(
            f"{title} cannot be split over ranks, because {name} {reason}. All of its layers must "
            "attend to their own sequence by FAVOR+."
        )
    return attending


def identities(model: nn.Module) -> dict[str, object]:
    """Shape and bits of every parameter and buffer, ω among them."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: _identity(x) for name, x in tensors.items()}


def _identity(x: Tensor) -> tuple[object, ...]:
    """What tells a tensor from others, a number for its bits included; of a DTensor, the share of
    this rank.
    """
    x = x.to_local() if isinstance(x, DTensor) else x
    if x.is_floating_point():
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    else:
        wide = x.detach().long()
    return tuple(x.shape), x.dtype, fingerprint("bits", (wide,))


class _Pieces:
    """The hooks of a split model: from the whole batch to a piece, and to the loss of the whole."""

    def __init__(self, group: dist.ProcessGroup, counts_by_itself: bool) -> None:
        self.group = group
        self.counts_by_itself = counts_by_itself
        # Of the call at hand: the labels of this rank's piece, and the number of all.
        self.labels: Tensor | None = None
        self.num_labels: Tensor | int = 0

    @torch.compiler.disable(reason="ranks first compare their batches: compile without fullgraph")
    def split(
        self, model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(signature(model.forward).parameters, arguments, strict=False)) | options
        whole: dict[str, Any] = {}

        def describe() -> tuple[Mapping[str, object], int]:
            whole.update(self._whole(model, given))
            return {
                "training": model.training,
                "arguments": sorted(whole),
                **{name: _identity(x) if isinstance(x, Tensor) else x for name, x in whole.items()},
            }, 0

        agree(self.group, describe)
        piece = own_piece(whole["position_ids"].shape[1], self.group)
        labels, self.num_labels = whole.pop("labels", None), whole.pop("num_items_in_batch", 0)
        self.labels = None if labels is None else labels[:, piece]
        for name in OF_TOKENS:
            if name in whole:
                whole[name] = whole[name][:, piece]
        return (), whole

    def _whole(self, model: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the call by name, with positions, and with labels at the places where
        they are predicted.

        Raises ValueError for what does not fit a sequence that is split.
        """
        whole = {name: x for name, x in given.items() if x is not None}
        tokens = whole.get("inputs_embeds", whole.get("input_ids"))
        if not isinstance(tokens, Tensor):
            raise ValueError("a split model needs input_ids or inputs_embeds, and got neither.")
        batch, length = tokens.shape[:2]
        own_piece(length, self.group)  # refuses sequences that are too short
        labels = whole.pop("labels", None)
        if getattr(model.config, "output_attentions", False):
            whole["output_attentions"] = True
        for name, x in whole.items():
            is_usual = isinstance(x, bool) and x == (name == "return_dict")
            if is_usual or name in {"output_hidden_states", "num_items_in_batch"}:
                continue
            is_of_tokens = isinstance(x, Tensor) and x.ndim >= 2 and x.shape[1] == length
            if name not in OF_TOKENS or not is_of_tokens:
                raise ValueError(
                    f"a model whose sequences are split over ranks cannot take this {name}: it "
                    f"takes {', '.join(OF_TOKENS)} and labels of (batch, length) = "
                    f"{(batch, length)}. Caches, packed sequences and attention matrices need a "
                    "model that is not split."
                )
        if "position_ids" not in whole:
            if not self.counts_by_itself:
                raise ValueError(
                    f"{type(model).__name__} has a way of its own to count positions, which needs "
                    "the whole sequence: pass position_ids=."
                )
            whole["position_ids"] = default_positions(model, whole.get("attention_mask"), tokens)
        elif (
            "attention_mask" not in whole
            and packed_segments(batch, length, whole["position_ids"]) is not None
        ):
            raise ValueError(
                "position_ids that restart pack several sequences into a row, and a row is split "
                "as one sequence. Pass each in a row of its own, with an attention_mask."
            )
        if labels is not None:
            whole = self._targets(model, labels, (batch, length)) | whole
        return whole | {"use_cache": False} if _takes(model, "use_cache") else whole

    def _targets(self, model: nn.Module, labels: Tensor, shape: tuple[int, int]) -> dict[str, Any]:
        kind = getattr(model, "loss_type", None)
        if kind not in LOSSES:
            raise ValueError(
                f"the loss of {type(model).__name__} is not one of each token, so it cannot be "
                f"split over ranks: labels are for models {' and '.join(LOSSES)}. Leave them out, "
                "and compute the loss from the outputs."
            )
        if labels.shape != shape:
            raise ValueError(
                f"labels must be (batch, length) = {shape}, got {tuple(labels.shape)}."
            )
        if LOSSES[kind]:
            labels = next_tokens(labels)
        return {"labels": labels, "num_items_in_batch": (labels != -100).sum().clamp(min=1)}

    @torch.compiler.disable(reason="ranks first tell each other of errors")
    def add_loss(
        self, model: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], outputs: Any
    ) -> Any:
        if outputs is None:  # an error is on its way
            report(self.group, sys.exc_info()[1] or RuntimeError("no outputs"))
            return None
        agree(self.group, lambda: ({}, 0))
        labels, self.labels = self.labels, None
        if labels is None:
            return outputs
        loss = summed(summed_loss(outputs["logits"], labels), self.group) / self.num_labels
        return type(outputs)(**{**outputs, "loss": loss})


def _takes(model: nn.Module, name: str) -> bool:
    return name in signature(model.forward).parameters
