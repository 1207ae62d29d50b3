"""Back-propagation through a sequence of any length, in the memory of a piece of it.

A causal model reads a sequence in chunks, and its states are all that goes from one to the next.
So are their gradients on the way back:

    forward    state 0 ─► chunk 1 ─► state 1 ─► chunk 2 ─► state 2 ─► chunk 3
    backward                    ◄─ gradient ─ chunk 2 ◄─ gradient ─ chunk 3

The way back needs the state before each chunk. A few are kept, from which the others are computed
anew. They are never computed backward, by subtraction: sums of exponentials in a frame do not give
back what was added to them.

Source: Likhosherstov et al. 2021, "Sub-linear memory: how to make Performers SLiM", which carries
states and gradients so, and subtracts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from performers.checks import check_count, check_model, check_tensor
from performers.convert.saved_states import linear_memories, new_cache
from performers.models.losses import next_tokens, summed_loss
from performers.models.naming import CACHE
from performers.state import LinearState

__all__ = ["backward_through_time"]

Gradients = dict[str, Tensor]


def backward_through_time(
    model: nn.Module,
    input_ids: Int[Tensor, "batch length"],
    labels: Int[Tensor, "batch length"] | None = None,
    *,
    chunk_length: int = 4096,
    kept_states: int = 16,
) -> Float[Tensor, ""]:
    """The loss of a causal language model over whole sequences, and its gradients, which are added
    to `.grad` of the parameters as `loss.backward()` would add them. The loss comes detached.

    Equal to one call of the model up to rounding, without dropout; with dropout chunks have masks
    of their own, the same each time they are computed. `labels`: as the model takes them; the input
    itself unless given.

    `kept_states` trades time for memory. With C chunks and k kept states, each chunk is computed
    ⌈log_k C⌉ times without gradients and once with them, and at most k · ⌈log_k C⌉ states are in
    memory, beside what a model call with gradients takes for one chunk.

    For causal Performers and converted models all layers of which have a state. Sequences of a
    batch have one length, without padding: pad on the right with labels of −100.

    Raises ValueError or TypeError for models and arguments that do not fit.
    """
    check_model(model)
    check_tensor("input_ids", input_ids)
    check_count("chunk_length", chunk_length)
    check_count("kept_states", kept_states, least=2)
    labels = input_ids if labels is None else labels
    check_tensor("labels", labels)
    if input_ids.ndim != 2 or labels.shape != input_ids.shape or input_ids.shape[1] < 2:
        raise ValueError(
            "input_ids and labels must be (batch, length) with at least two tokens: got "
            f"{tuple(input_ids.shape)} and {tuple(labels.shape)}."
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "activation checkpointing runs layers again in the backward pass, which would count "
            "keys twice: call model.gradient_checkpointing_disable(). Chunks save memory instead."
        )
    linear_memories(new_cache(model))  # refuses other models, before any work
    # Slices are views, so that nothing is as long as the sequence but the sequence.
    starts = range(0, input_ids.shape[1], chunk_length)
    pieces = [
        (input_ids[:, start : start + chunk_length], labels[:, start : start + chunk_length + 1])
        for start in starts
    ]
    count = torch.stack([(after[:, 1:] != -100).sum() for _, after in pieces]).sum().clamp(min=1)
    seed = int(torch.randint(2**62, ()))  # of dropout
    chunks = [_Chunk(model, *piece, count, seed + number) for number, piece in enumerate(pieces)]
    loss, _ = _back(chunks, None, None, kept_states)
    return loss


def _back(
    chunks: Sequence[_Chunk],
    states: _States | None,
    gradients: list[Gradients] | None,
    kept_states: int,
) -> tuple[Tensor, list[Gradients]]:
    """The loss of these chunks, after the gradients of their parameters were added; and the
    gradients of the states before them, from those of the states after them.
    """
    if len(chunks) == 1:
        return chunks[0].back(states, gradients)
    # As equal parts as can be, at most `kept_states`, each a power of it long but the last.
    size = 1
    while size * kept_states < len(chunks):
        size *= kept_states
    parts = [chunks[start : start + size] for start in range(0, len(chunks), size)]
    before = [states]
    for part in parts[:-1]:
        for chunk in part:
            states = chunk.states_after(states)
        before.append(states)
    total = torch.zeros((), device=chunks[0].input_ids.device)
    while parts:
        loss, gradients = _back(parts.pop(), before.pop(), gradients, kept_states)
        total = total + loss
    assert gradients is not None, "there is at least one part"
    return total, gradients


@dataclass(frozen=True)
class _States:
    """What the layers remember after a chunk, and how many tokens they have seen."""

    states: list[LinearState]
    num_tokens: int


@dataclass(frozen=True)
class _Chunk:
    """Tokens and what they predict: their labels, and that of the token after them if there is one.
    `count`: of all predictions of the whole sequences.
    """

    model: Any
    input_ids: Int[Tensor, "batch chunk"]
    labels: Int[Tensor, "batch chunk_and_next"]
    count: Int[Tensor, ""]
    seed: int

    def read(self, states: _States | None) -> tuple[Tensor, _States]:
        """The logits of the chunk and the states after it, with the same dropout each time."""
        cache = new_cache(self.model)
        memories = linear_memories(cache)
        if states is not None:
            for memory, state in zip(memories, states.states, strict=True):
                memory.state, memory.num_tokens = state, states.num_tokens
        device = self.input_ids.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            torch.manual_seed(self.seed)
            outputs = self.model(self.input_ids, **{CACHE: cache}, use_cache=True)
        after = [memory.state for memory in memories if memory.state is not None]
        return outputs.logits, _States(after, memories[0].num_tokens)

    @torch.no_grad()
    def states_after(self, states: _States | None) -> _States:
        """The states alone."""
        return self.read(states)[1]

    @torch.enable_grad()
    def back(
        self, states: _States | None, gradients: list[Gradients] | None
    ) -> tuple[Tensor, list[Gradients]]:
        """As `_back`, for this chunk."""
        if states is not None:
            leaves = [_leaves(state) for state in states.states]
            states = replace(states, states=leaves)
        logits, after = self.read(states)
        targets = next_tokens(self.labels)[:, : logits.shape[1]]
        loss = summed_loss(logits, targets) / self.count
        ends, of_ends = [loss], [torch.ones_like(loss)]
        for state, of_state in zip(after.states, gradients or (), strict=gradients is not None):
            parts = state.parts()
            for name, gradient in of_state.items():
                if parts[name].requires_grad:
                    ends.append(parts[name])
                    of_ends.append(gradient)
        torch.autograd.backward(ends, of_ends)
        if states is None:
            return loss.detach(), []
        found = [
            {name: x.grad for name, x in state.parts().items() if x.grad is not None}
            for state in states.states
        ]
        return loss.detach(), found


def _leaves(state: LinearState) -> LinearState:
    """The state, cut off from what made it, with gradients of its own."""

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_(x.is_floating_point())

    leaves = state.map(leaf)
    # Log-scales are frames, and never differentiated.
    return replace(leaves, log_scale=leaves.log_scale.detach())
