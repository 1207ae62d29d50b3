"""How far a converted model is from the exact one, by what its users see: its predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from performers.convert.modes import evaluating

__all__ = ["Fidelity", "compare_fidelity", "divergence", "measure_fidelity", "real_positions"]

Name = TypeVar("Name")


@dataclass(frozen=True)
class Fidelity:
    """Of a language model, over all positions:

        distance   the mean of KL(exact ‖ converted) of the predicted tokens, in nats
        agreement  the share of positions where both find the same token the likeliest

    Of an encoder, over all sequences, whose embeddings are the means of the last hidden states:

        distance   1 − the mean cosine of both embeddings of a sequence
        neighbors  the share of sequences whose nearest other, by the cosine of embeddings, stays
                   the nearest; None for fewer than three

    Padding does not count.
    """

    distance: float
    agreement: float | None = None
    neighbors: float | None = None

    def __str__(self) -> str:
        if self.agreement is not None:
            return (
                f"KL to the exact model {self.distance:.4f} nats, "
                f"the same likeliest token at {self.agreement:.1%} of positions"
            )
        kept = "" if self.neighbors is None else f", {self.neighbors:.1%} of nearest neighbors kept"
        return f"cosine to the exact embedding {1 - self.distance:.4f}{kept}"


def measure_fidelity(
    model: PreTrainedModel, exact: Callable[..., Any], batches: Iterable[Mapping[str, Tensor]]
) -> Fidelity:
    """The fidelity of a model to the exact one (`exact_copy`) on batches of arguments of both,
    whatever the batches are.

    Cost: a forward pass of each.
    """
    return compare_fidelity({"model": model}, exact, batches)["model"]


@torch.no_grad()
def compare_fidelity(
    models: Mapping[Name, PreTrainedModel],
    exact: Callable[..., Any],
    batches: Iterable[Mapping[str, Tensor]],
) -> dict[Name, Fidelity]:
    """`measure_fidelity` of several models. Cost: a forward pass of each, and one of the exact."""
    sums = {name: _Sums() for name in models}
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        for batch in batches:
            wanted = exact(**batch)
            for name, model in models.items():
                sums[name].add(model(**batch), wanted, batch)
    return {name: one.fidelity() for name, one in sums.items()}


class _Sums:
    """What the fidelity of a model is computed from, over batches."""

    def __init__(self) -> None:
        self.distance, self.same, self.count = 0.0, 0.0, 0
        self.embeddings: list[tuple[Tensor, Tensor]] = []

    def add(self, found: Any, wanted: Any, batch: Mapping[str, Tensor]) -> None:
        if not hasattr(wanted, "logits"):
            self.embeddings.append((embedding(found, batch), embedding(wanted, batch)))
            return
        is_real = real_positions(wanted.logits, batch)
        # One sequence at a time: logits of all words are the largest tensors that there are.
        for real, *logits in zip(is_real, found.logits, wanted.logits, strict=True):
            ours, theirs = (x[real] for x in logits)
            if not len(ours):
                continue
            self.distance += float(divergence(ours, theirs).double()) * len(ours)
            self.same += float((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).sum())
            self.count += len(ours)

    def fidelity(self) -> Fidelity:
        if not self.embeddings:
            return Fidelity(self.distance / self.count, agreement=self.same / self.count)
        ours, theirs = (torch.cat(of) for of in zip(*self.embeddings, strict=True))
        cosine = F.cosine_similarity(ours, theirs).double().mean()
        return Fidelity(1 - float(cosine), neighbors=_neighbors_kept(ours, theirs))


def divergence(
    ours: Float[Tensor, "positions words"], theirs: Float[Tensor, "positions words"]
) -> Float[Tensor, ""]:
    """The mean of KL(theirs ‖ ours) of the predictions that these logits are, in float32."""
    log_ours, log_theirs = (x.float().log_softmax(dim=-1) for x in (ours, theirs))
    return F.kl_div(log_ours, log_theirs, reduction="batchmean", log_target=True)


def real_positions(
    states: Float[Tensor, "batch length _"], batch: Mapping[str, Tensor]
) -> Bool[Tensor, "batch length"]:
    """The positions of a model's output that are no padding."""
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    if mask is None or mask.shape != states.shape[:2]:
        return states.new_ones(states.shape[:2], dtype=torch.bool)
    return mask.bool()


def embedding(output: Any, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch width"]:
    """The mean of the last hidden states of each sequence."""
    states = output.last_hidden_state.float()
    is_real = real_positions(states, batch)[..., None]
    mean: Tensor = (states * is_real).sum(dim=1) / is_real.sum(dim=1)
    return mean


def _neighbors_kept(
    ours: Float[Tensor, "sequences width"], theirs: Float[Tensor, "sequences width"]
) -> float | None:
    if len(ours) < 3:  # with one other there is no choice
        return None
    nearest = []
    for x in (ours, theirs):
        unit = F.normalize(x, dim=-1)
        nearest.append((unit @ unit.T).fill_diagonal_(-torch.inf).argmax(dim=-1))
    return float((nearest[0] == nearest[1]).double().mean())
