"""A Trainer whose processes share its work as a `Layout` says.

Checkpoints hold whole weights, and whole states of the optimizer, of the two groups of parameters
that the Trainer makes of a whole model: with weight decay and without. So any layout goes on with
what another has saved.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import EvalLoopOutput

from performers.convert.learned import load_learned, save_learned
from performers.distributed.collectives import rank_in
from performers.distributed.heads import of_all_heads
from performers.models.modeling import PerformerPreTrainedModel
from performers.train.layout import Layout, Places
from performers.train.sharding import share_out, whole

__all__ = ["LaidOutTrainer"]


class LaidOutTrainer(Trainer):
    """`options`: those of the Trainer. The model is whole until `train` has loaded a checkpoint;
    from then on `places` says what this process has of it.
    """

    def __init__(self, layout: Layout, **options: Any) -> None:
        self.layout, self.places = layout, Places()
        super().__init__(**options)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.layout.of_batch > 1:
            state = self.accelerator.state
            state.device_mesh = self.layout.mesh_of_batches(self.accelerator.device.type)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Of what the layout leaves to this process. By now whole weights have been loaded."""
        if self.layout.is_plain:
            return super().create_optimizer(*args, **kwargs)
        self.places = self.layout.lay_out(self.model)
        if self.places.pieces is not None:  # other dropout for each piece
            torch.manual_seed(self.args.seed + rank_in(self.places.pieces))
        # The Trainer's word for a model that accelerate is not to wrap.
        self.is_distributed_loading_by_transformers = True
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)
        _merge_groups(optimizer, self.model, set(self.get_decay_parameter_names(self.model)))
        return optimizer

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager[None]:
        """Between the batches of a step: nothing, for shares of gradients add up to shares. To wait
        with the exchange would keep whole gradients meanwhile.
        """
        return nullcontext()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        if self.layout.of_batch > 1:
            self.gather_function = self._gathered
        return super().evaluation_loop(*args, **kwargs)

    def _gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes, once those that several compute. Rows that filled up the last
        batch are left out.
        """
        together: Tensor = self.accelerator.gather(rows)
        once = together.unflatten(0, (-1, self.layout.of_batch, len(rows)))[:, 0].flatten(0, 1)
        state = self.accelerator.gradient_state
        return once[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else once

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Once those of sequences that several processes compute."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        seen = self.state.num_input_tokens_seen - before
        self.state.num_input_tokens_seen = before + seen // self.layout.of_batch

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.layout.is_plain:
            super().save_model(output_dir, _internal_call)
            return
        weights = whole(self.model.state_dict(keep_vars=True))
        learned: dict[str, Tensor] = {}
        if self.places.heads is not None:
            learned = of_all_heads(self.model, self.places.heads)
        is_own = isinstance(self.model, PerformerPreTrainedModel)
        if self.args.should_save:
            self._save(output_dir, state_dict=weights | learned if is_own else weights)
            if not is_own:  # its weights are those of the exact model
                save_learned(self.model, Path(output_dir or self.args.output_dir), learned)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(checkpoint, model)
        if not isinstance(self.model, PerformerPreTrainedModel):
            load_learned(self.model, Path(checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.layout.is_plain:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.layout.is_plain or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        saved, schedule = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        self.optimizer.load_state_dict(share_out(saved, self.optimizer))
        self.lr_scheduler.load_state_dict(schedule)


def _merge_groups(optimizer: Optimizer, model: nn.Module, decayed: Collection[str]) -> None:
    """Leave the two groups of a whole model, where the Trainer has made one for each mesh.

    `decayed`: the names of the parameters with weight decay.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = {parameter: number for number, parameter in enumerate(names)}
    merged: dict[bool, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        decays = names[group["params"][0]] in decayed
        merged.setdefault(decays, {**group, "params": []})["params"] += group["params"]
    for group in merged.values():
        group["params"].sort(key=order.__getitem__)
    optimizer.param_groups = list(merged.values())
