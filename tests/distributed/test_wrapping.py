"""Models that each of two processes trains on its half of a batch train as on one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tiny_models import SIZES, WORDS, llama
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from performers import FavorOptions, PerformerConfig, PerformerForMaskedLM, linearize

MODELS = {
    "PerformerForMaskedLM": lambda: PerformerForMaskedLM(PerformerConfig(**SIZES)),
    "linearized Llama": lambda: linearize(llama(), FavorOptions(num_projections=17)),
}


def sharded(model):
    for layer in model.base_model.layers:
        fully_shard(layer)
    return fully_shard(model)


WRAPPERS = (DistributedDataParallel, sharded)


def losses(model, ids):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_to_the_losses_of_one_under_ddp_and_fsdp(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().train()
    ids = torch.randint(5, WORDS, (4, 23))
    expected = losses(copy.deepcopy(model), ids)

    def run():
        half = ids.chunk(2)[dist.get_rank()]
        found = [losses(wrap(copy.deepcopy(model)), half) for wrap in WRAPPERS]
        mean = torch.stack(found)
        dist.all_reduce(mean)
        return mean / 2

    for found in on_ranks(2, run):
        for of_wrapper in found:
            torch.testing.assert_close(of_wrapper, expected, rtol=1e-6, atol=0)
