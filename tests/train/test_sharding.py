"""Weights that are shared out over processes learn what whole ones learn, and are saved whole."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from performers.models import PerformerConfig, PerformerForMaskedLM
from performers.train.sharding import shard_weights, share_out, whole

SIZES = {
    "vocab_size": 29,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 17,
    "num_projections": 7,
    "max_position_embeddings": 11,
    "hidden_dropout_prob": 0.0,
}
IDS = torch.arange(4 * 11).reshape(4, 11) % 23 + 5


def steps(model, optimizer, ids, count):
    """The mean losses of all processes."""
    losses = []
    for _ in range(count):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found = torch.stack(losses)
    if dist.is_initialized():
        dist.all_reduce(found)
        found /= dist.get_world_size()
    return found


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def shares():
    """A mesh of one copy of the weights."""
    return init_device_mesh("cpu", (1, 2), mesh_dim_names=("copies", "shares"))


def sharded(model):
    own = copy.deepcopy(model)
    shard_weights(own, shares())
    return own, adam(own)


@pytest.mark.usefixtures("without_shape_checks")
def test_shares_learn_what_whole_weights_learn_and_go_on_from_what_they_saved():
    torch.manual_seed(0)
    model = PerformerForMaskedLM(PerformerConfig(**SIZES)).double().train()
    alone = copy.deepcopy(model)
    expected = steps(alone, adam(alone), IDS, 4)

    def run():
        own_ids = IDS.chunk(2)[dist.get_rank()]
        own, optimizer = sharded(model)
        shares = sum(x.to_local().numel() for x in own.parameters())
        before = steps(own, optimizer, own_ids, 2)
        weights = whole(own.state_dict(keep_vars=True))
        state = whole(optimizer.state_dict())
        saved = [(weights, state)]
        dist.broadcast_object_list(saved, 0)  # what others read from a file
        again = copy.deepcopy(model)
        again.load_state_dict(saved[0][0])
        again, other = sharded(again)
        other.load_state_dict(share_out(saved[0][1], other))
        return torch.cat([before, steps(again, other, own_ids, 2)]), shares, weights

    answers = on_ranks(2, run)
    for losses, shares, _ in answers:
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
        assert shares < 0.6 * model.num_parameters()
    (_, _, first), (_, _, second) = answers
    assert first["lm_head.weight"] is first["performer.embed_tokens.weight"]
    assert not any(isinstance(x, DTensor) for x in first.values())
    assert second["lm_head.weight"] is None


def test_weights_that_layers_share_are_refused():
    options = {"num_projections": 5, "sharing": "layers"}
    model = PerformerForMaskedLM(
        PerformerConfig(**SIZES | {"attention": "linformer", "attention_options": options})
    )

    def run():
        with pytest.raises(ValueError, match="attention='linformer' have weights in common"):
            shard_weights(model, shares())

    on_ranks(2, run)
