"""How far a converted model is from the exact one, by what its users see: its predictions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from performers.convert.modes import evaluating

__all__ = ["Fidelity", "measure_fidelity"]


@dataclass(frozen=True)
class Fidelity:
    """Of a language model, over all positions:

        distance   the mean of KL(exact ‖ converted) of the predicted tokens, in nats
        agreement  the share of positions where both find the same token the likeliest

    Of an encoder, over all sequences:

        distance   1 − the mean cosine of both embeddings, the means of the last hidden states
        agreement  None
    """

    distance: float
    agreement: float | None = None

    def __str__(self) -> str:
        if self.agreement is None:
            return f"cosine to the exact embedding {1 - self.distance:.4f}"
        return (
            f"KL to the exact model {self.distance:.4f} nats, "
            f"the same likeliest token at {self.agreement:.1%} of positions"
        )


@torch.no_grad()
def measure_fidelity(
    model: PreTrainedModel, exact: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]
) -> Fidelity:
    """The fidelity of a model to the exact one (`exact_copy`) on batches of arguments of both, a
    batch of sequences counting by its number. There is no padding to leave out.

    Cost: a forward pass of each.
    """
    distances, agreements, counts = [], [], []
    with evaluating(model):
        for batch in batches:
            found, wanted = model(**batch), exact(**batch)
            counts.append(len(wanted[0]))
            if not hasattr(wanted, "logits"):
                pair = (output.last_hidden_state.mean(dim=1) for output in (found, wanted))
                distances.append(1 - float(F.cosine_similarity(*pair).double().mean()))
                continue
            pair_of_logits = found.logits, wanted.logits
            ours, theirs = (x.flatten(0, 1).float().log_softmax(dim=-1) for x in pair_of_logits)
            divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
            distances.append(float(divergence))
            same = ours.argmax(dim=-1) == theirs.argmax(dim=-1)
            agreements.append(float(same.double().mean()))
    agreement = _mean(agreements, counts) if agreements else None
    return Fidelity(_mean(distances, counts), agreement)


def _mean(numbers: list[float], counts: list[int]) -> float:
    return sum(x * n for x, n in zip(numbers, counts, strict=True)) / sum(counts)
