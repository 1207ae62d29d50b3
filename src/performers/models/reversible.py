"""Reversible layers: a training step whose memory does not depend on the number of layers.

    x₁ = x₂ = x                          x₂ = y₂ − mlp(norm(y₁))
    y₁ = x₁ + attention(norm(x₂))        x₁ = y₁ − attention(norm(x₂))
    y₂ = x₂ + mlp(norm(y₁))

Two streams go through the layers, each sublayer reads one and adds to the other, and the result is
their mean. The backward pass computes the inputs of a layer from its outputs (on the right), so
that none has to be kept, and each sublayer twice. Of a sublayer the state of the random number
generators is kept, 5 kB on a CPU, so that the same numbers are dropped both times.

Source: Gomez et al. 2017, "The Reversible Residual Network"; Kitaev et al. 2020, "Reformer: The
Efficient Transformer", Section 3; Choromanski et al. 2021, Section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import get_device_states, set_device_states

from performers.models.layers import PerformerLayer

__all__ = ["run_reversible"]

# Sums of numbers of the first type are exact in the second but for rare last bits. So the inputs
# that are computed back are those of the forward pass, and errors do not grow with the depth.
WIDER = {
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
    torch.float32: torch.float64,
}

Hidden = Float[Tensor, "batch length hidden"]
Streams = tuple[Hidden, Hidden]


@dataclass(frozen=True)
class Branch:
    """A sublayer with its norm and dropout, as a function of the stream that it reads."""

    function: Callable[[Tensor], Tensor]
    modules: tuple[nn.Module, ...]

    @property
    def weights(self) -> list[nn.Parameter]:
        return [weight for module in self.modules for weight in module.parameters()]


def run_reversible(
    layers: nn.ModuleList, hidden: Hidden, arguments: tuple[Any, ...], inside: Mapping[str, bool]
) -> tuple[list[Hidden], list[Tensor | None]]:
    """The hidden states after each layer, and what attention gives beside its output.

    Where gradients are wanted and nothing of the `inside`, the layers are computed back, and the
    hidden state after the last of them is all there is. Otherwise autograd keeps what it keeps of
    every layer. `arguments`: of `PerformerAttention.forward` after the first.

    Raises ValueError for a model in training whose inside is wanted: its memory would depend on the
    number of layers. Raises NotImplementedError for layers that FSDP has sharded.
    """
    if any(isinstance(weight, DTensor) for weight in layers.parameters()):
        raise NotImplementedError(
            "reversible layers are called in halves, for which FSDP does not gather their weights: "
            "take DistributedDataParallel, or build the model with reversible=False."
        )
    matrices = []

    def attend(layer: PerformerLayer, x: Hidden) -> Hidden:
        out, matrix = layer.attend(x, *arguments)
        matrices.append(matrix)
        return out

    branches = []
    for layer in layers:
        assert isinstance(layer, PerformerLayer), "layers of a Performer"
        branches.append(Branch(partial(attend, layer), (layer.attention_norm, layer.attention)))
        branches.append(Branch(layer.transform, (layer.mlp_norm, layer.mlp)))
    if not torch.is_grad_enabled() or torch.compiler.is_exporting():
        return list(_with_all_kept(hidden, branches)), matrices
    wanted = [name for name, is_wanted in inside.items() if is_wanted]
    if not wanted:
        return [_with_nothing_kept(hidden, branches)], matrices
    if layers.training:
        raise ValueError(
            "reversible layers keep nothing of their inside in training: got "
            f"{' and '.join(wanted)}. Ask for it in evaluation, or under torch.no_grad()."
        )
    return list(_with_all_kept(hidden, branches)), matrices


def _with_all_kept(hidden: Hidden, branches: Sequence[Branch]) -> Iterator[Hidden]:
    """The mean of the streams after each layer."""
    first = last = hidden.to(_wider(hidden))
    for number, branch in enumerate(branches):
        first, last = last, first + branch.function(last.to(hidden.dtype))
        if number % 2:
            yield _mean(first, last, hidden)


@torch.compiler.disable
def _with_nothing_kept(hidden: Hidden, branches: Sequence[Branch]) -> Hidden:
    """The mean of the streams after the last layer."""
    streams = hidden.to(_wider(hidden))
    weights = [weight for branch in branches for weight in branch.weights]
    first, last = _Reversible.apply(branches, hidden.dtype, streams, streams, *weights)
    return _mean(first, last, hidden)


def _wider(hidden: Hidden) -> torch.dtype:
    return WIDER.get(hidden.dtype, hidden.dtype)


def _mean(first: Hidden, last: Hidden, hidden: Hidden) -> Hidden:
    return ((first + last) / 2).to(hidden.dtype)


class _Reversible(torch.autograd.Function):
    """All sublayers as one function of the streams and of their weights.

    One step is (a, b) ↦ (b, a + f(b)), whose inverse is (b, c) ↦ (c − f(b), b), and whose gradients
    (∂b, ∂c) ↦ (∂c, ∂b + f′(b)ᵀ ∂c).
    """

    @staticmethod
    def forward(
        ctx: Any,
        branches: Sequence[Branch],
        dtype: torch.dtype,
        a: Tensor,
        b: Tensor,
        *weights: Tensor,
    ) -> Streams:
        ctx.branches, ctx.dtype = branches, dtype
        ctx.autocast = _autocast_of_now(b.device.type)
        ctx.randomness = []
        state = torch.get_rng_state()
        rooms = state.new_empty(len(branches), *state.shape)  # first, as in `backward`
        with ctx.autocast():
            for branch, room in zip(branches, rooms, strict=True):
                ctx.randomness.append(_Randomness.now(b, room))
                a, b = b, a + branch.function(b.to(dtype))
        # The weights are at hand anyway. Saved, they are checked: whoever changes them in place
        # before the backward pass gets an error, as everywhere.
        ctx.save_for_backward(a, b, *weights)
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_a: Tensor, of_b: Tensor) -> tuple[Tensor | None, ...]:
        a, b, *_ = ctx.saved_tensors
        of_weights: list[Tensor | None] = []
        # Room for all that stays, before anything that does not. Gradients made among activations
        # stand between the places that these leave, so that the allocator finds none large enough
        # for the next layer, and memory grows with the number of layers after all.
        rooms = [
            [torch.empty_like(w) for w in branch.weights if w.requires_grad]
            for branch in ctx.branches
        ]
        for branch, randomness, room in zip(
            reversed(ctx.branches), reversed(ctx.randomness), reversed(rooms), strict=True
        ):
            read = a.detach().requires_grad_()
            with randomness.again(), ctx.autocast(), torch.enable_grad():
                added = branch.function(read.to(ctx.dtype))
            weights = branch.weights
            wanted = [weight for weight in weights if weight.requires_grad]
            of_read, *found = torch.autograd.grad(
                added, [read, *wanted], of_b.to(added.dtype), allow_unused=True
            )
            gradients = iter(
                None if gradient is None else kept.copy_(gradient)
                for kept, gradient in zip(room, found, strict=True)
            )
            of_weights[:0] = [next(gradients) if w.requires_grad else None for w in weights]
            a, b = b - added.detach(), a
            of_a, of_b = of_b, of_a + of_read
        return None, None, of_a, of_b, *of_weights


def _autocast_of_now(device: str) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which torch.autocast is as it is now.

    Without its cache, so that no cast of a weight that was made without gradients can serve the
    backward pass.
    """
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    return partial(
        torch.autocast,
        device,
        torch.get_autocast_dtype(device),
        torch.is_autocast_enabled(device),
        cache_enabled=False,
    )


@dataclass(frozen=True)
class _Randomness:
    """The state of the generators that dropout draws from."""

    cpu: Tensor
    device: str
    numbers: list[int]
    states: list[Tensor]

    @classmethod
    def now(cls, x: Tensor, room: Tensor) -> _Randomness:
        """That of the generators of the CPU, which goes into `room`, and of the device of `x`."""
        return cls(room.copy_(torch.get_rng_state()), x.device.type, *get_device_states(x))

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw the numbers that were drawn then; afterwards the generators are as they were."""
        with torch.random.fork_rng(self.numbers, device_type=self.device):
            torch.set_rng_state(self.cpu.clone())
            set_device_states(self.numbers, self.states, device_type=self.device)
            yield
