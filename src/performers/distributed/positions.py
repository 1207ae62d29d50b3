"""The positions of tokens that a model would count by itself, had it the whole sequence."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from performers.convert.sites import is_unmoved_by_shifts
from performers.models.masks import count_positions, padding_mask
from performers.models.modeling import PerformerPreTrainedModel

__all__ = ["counts_by_itself", "default_positions"]


def default_positions(
    model: nn.Module, attention_mask: Tensor | None, tokens: Tensor
) -> Int[Tensor, "rows length"]:
    """0, 1, 2, … as this model counts: a Performer counts real tokens, and a converted model whose
    positions are rotations begins with the first real token.
    """
    batch, length = tokens.shape[:2]
    mask = padding_mask(attention_mask, batch, 0, length)
    if isinstance(model, PerformerPreTrainedModel):
        like = tokens if tokens.ndim == 3 else tokens.unsqueeze(-1).float()
        return count_positions(mask, 0, like)
    position = torch.arange(length, device=tokens.device).unsqueeze(0)
    if mask is None or not is_unmoved_by_shifts(_base(model)):
        return position
    return (position - mask.long().argmax(dim=1, keepdim=True)).clamp(min=0)


@torch.no_grad()
def counts_by_itself(model: nn.Module) -> bool:
    """Whether a converted model, given no positions, counts as `default_positions` does.

    Tried out on five tokens with padding before them and after. Raises ValueError for a model that
    computes the same wherever a piece is: it takes no positions, or does not use those it is given.
    """
    title = type(model).__name__
    if "position_ids" in signature(model.forward).parameters:
        device = next(model.parameters()).device
        mask = torch.tensor([[0, 1, 1, 1, 0]], device=device)
        ids = torch.arange(5, device=device).unsqueeze(0) + 5
        position = default_positions(model, mask, ids)
        was_training = model.training
        model.eval()
        try:
            by_itself, told, elsewhere = (
                _first(model(input_ids=ids, attention_mask=mask, **options))[:, 1:4]
                for options in (
                    {},
                    {"position_ids": position},
                    {"position_ids": 2 * position + 1},
                )
            )
        finally:
            model.train(was_training)
        if not torch.equal(told, elsewhere):
            return torch.equal(by_itself, told)
    raise ValueError(
        f"{title} does not compute with the position_ids that it is given, and a piece of a "
        "sequence has to be told where it is. Split sequences of a model that takes them, such as "
        "one of the Llama family."
    )


def _base(model: Any) -> Any:
    return model.base_model


def _first(outputs: Any) -> Tensor:
    """Logits, or hidden states of a model without a head."""
    logits: Tensor = outputs["logits" if "logits" in outputs else "last_hidden_state"]
    return logits
