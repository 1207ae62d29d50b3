"""Drawing new random features while a model trains."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.distributed as dist
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from performers.convert.learned import redraw
from performers.distributed.agreement import agree
from performers.functional.fingerprint import fingerprint
from performers.models import PerformerPreTrainedModel
from performers.nn.sharp import SharpFeatures

__all__ = ["RedrawFeatures"]


class RedrawFeatures(TrainerCallback):
    """Draws the features of a Performer or a converted model anew, every `every` optimizer steps.

    ω and the number of redraws are saved, so a checkpoint made at such a step holds the new ω, and
    a run resumed from it continues with the same draws. ω is a function of (seed, layer, number
    of redraws), so all ranks draw the same. They compare what they have drawn, and raise ValueError
    on every rank if it differs.

    Source: Choromanski et al. 2021, Section 4.3 and Appendix A.6 ("redrawing").
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 optimizer step, got {every}.")
        self.every = every

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step % self.every == 0:
            assert model is not None, "the Trainer hands its model to callbacks"
            if isinstance(model, PerformerPreTrainedModel):
                model.redraw_features()
            else:
                redraw(model)
            if dist.is_available() and dist.is_initialized():
                group = dist.group.WORLD
                assert group is not None, "there is one once it is initialized"
                agree(group, partial(_drawn, model))


def _drawn(model: PreTrainedModel) -> tuple[Mapping[str, object], int]:
    """A number for the bits of each buffer: ω, and how often it was redrawn. What was learned of
    heads lies where the heads are.
    """
    of_heads = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, SharpFeatures)
        for part in module.of_heads()
    }
    numbers = {
        name: fingerprint("bits", (x.float(),))
        for name, x in model.named_buffers()
        if name not in of_heads
    }
    return {"random features after a redraw": numbers}, 0
