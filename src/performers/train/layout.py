"""How the processes of a run share its work: sequences, tokens of a sequence, heads and weights.

    split_sequences=2, shard_heads=2 on 8 processes, which are two groups of 2 · 2

    process      0   1   2   3     4   5   6   7
    sequences    ───── A ─────     ───── B ─────
    piece        ─ 1 ─   ─ 2 ─     ─ 1 ─   ─ 2 ─
    heads        a   b   a   b     a   b   a   b

Each group has sequences of its own, and all of its processes read the same ones. Losses, gradients
and scores are those of one process up to rounding.

FSDP2 takes the mean of the gradients over all processes that have the same heads. Its mesh has two
dimensions, one of copies of the weights and one of their shares, of which one is 1: `shard_weights`
says which.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from performers.distributed.heads import check_divides, plan_of_heads, shard_heads
from performers.distributed.models import attending_modules, parallelize
from performers.train.config import RunConfig
from performers.train.sharding import layers_of, shard_weights
from performers.train.tasks import unloaded_model

__all__ = ["Layout", "Places"]


# Options of the Trainer by which it computes with all labels, or all embeddings, of a sequence.
WHOLE = ("label_smoothing_factor", "neftune_noise_alpha")


@dataclass(frozen=True)
class Places:
    """The processes that have the other pieces of this one's sequences, and the other heads of its
    piece; None where it has all.
    """

    pieces: dist.ProcessGroup | None = None
    heads: DeviceMesh | None = None


@dataclass(frozen=True)
class Layout:
    """`processes`: of the run. `pieces`, `heads`: how many share each sequence, and the heads of
    each layer. `shards_weights`: whether each keeps a share of the weights, or all of them.
    """

    processes: int
    pieces: int = 1
    heads: int = 1
    shards_weights: bool = False

    @classmethod
    def of(cls, config: RunConfig, processes: int) -> Layout:
        """That of a config on so many processes.

        Raises ValueError where they cannot be laid out so.
        """
        layout = cls(processes, config.split_sequences, config.shard_heads, config.shard_weights)
        least = max(layout.of_batch, 1 + layout.shards_weights)
        if processes % layout.of_batch or processes < least:
            step = layout.of_batch
            near = max(least, processes // step * step)
            raise ValueError(
                f"{layout} needs {least}, {least + step}, {least + 2 * step}, … processes, and "
                f"this run has {processes}. Start it with torchrun --nproc-per-node {near}, or "
                f"leave {layout} out."
            )
        return layout

    def __str__(self) -> str:
        keys = {
            "split_sequences": self.pieces > 1 and self.pieces,
            "shard_heads": self.heads > 1 and self.heads,
            "shard_weights": self.shards_weights and "true",
        }
        return " and ".join(f"{key}={value}" for key, value in keys.items() if value)

    @property
    def of_batch(self) -> int:
        """How many processes compute the same sequences."""
        return self.pieces * self.heads

    @property
    def is_plain(self) -> bool:
        """True where each process has whole sequences, all heads and all weights."""
        return self.of_batch == 1 and not self.shards_weights

    @property
    def groups(self) -> int:
        """How many groups of processes have sequences of their own."""
        return self.processes // self.of_batch

    def mesh_of_batches(self, kind: str) -> DeviceMesh:
        """A mesh in the words of accelerate, which gives the same batches to the ranks of its
        tensor parallelism. Its ParallelismConfig would make it, but refuses CPUs.
        """
        names = ("dp_shard", "tp")
        return init_device_mesh(kind, (self.groups, self.of_batch), mesh_dim_names=names)

    def check(self, config: RunConfig) -> None:
        """Raise ValueError where the model of a run cannot be laid out so, or would not learn the
        same.
        """
        if self.is_plain:
            return
        trainer = config.trainer
        found = ""
        if config.model.get("reversible"):
            found = "reversible layers compute in halves. Set model.reversible=false"
        elif trainer.get("optim") == "adafactor":
            found = "trainer.optim=adafactor takes whole weights. Take adamw_torch"
        elif trainer.get("optim") == "adamw_torch_fused" and self.heads > 1:
            found = "trainer.optim=adamw_torch_fused takes weights of one cut. Take adamw_torch"
        elif trainer.get("fp16"):
            found = "trainer.fp16 scales the gradients of whole weights. Take trainer.bf16"
        elif trainer.get("torch_compile"):
            found = "trainer.torch_compile would compile whole weights. Leave it out"
        elif self.pieces > 1 and any(given := [key for key in WHOLE if trainer.get(key)]):
            found = f"trainer.{given[0]} takes whole sequences. Leave it out"
        if found:
            raise ValueError(
                f"{self} lays a model out over several processes, and {found}, or leave {self} out."
            )
        model = unloaded_model(config)
        layers_of(model)
        if self.of_batch > 1:
            attending_modules(model)
            check_divides(model, self.heads)
        if self.heads > 1:
            plan_of_heads(model)

    def lay_out(self, model: PreTrainedModel) -> Places:
        """Leave to this process its heads, its pieces and its shares of the weights, in place."""
        kind = next(model.parameters()).device.type
        same_heads = self.groups * self.pieces
        sizes = (1, same_heads) if self.shards_weights else (same_heads, 1)
        names = ("copies", "shares", "heads")
        mesh = init_device_mesh(kind, (*sizes, self.heads), mesh_dim_names=names)
        heads = mesh["heads"] if self.heads > 1 else None
        pieces = None
        if heads is not None:
            shard_heads(model, heads)
        if self.pieces > 1:
            names = ("groups", "pieces", "heads")
            split = init_device_mesh(
                kind, (self.groups, self.pieces, self.heads), mesh_dim_names=names
            )
            pieces = split["pieces"].get_group()
            parallelize(model, pieces)
        shard_weights(model, mesh["copies", "shares"])
        return Places(pieces, heads)
