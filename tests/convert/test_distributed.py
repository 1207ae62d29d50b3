"""A converted model on two processes, under DDP and FSDP2, is the model on one."""

from pathlib import Path

import pytest

CODE = """
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, {tests!r})
from performers import FavorOptions, linearize
from tiny_models import inputs_for, llama, outputs_of

def model():
    torch.manual_seed(0)
    return linearize(llama(), FavorOptions(num_projections=17, window_size=0))

def gradient(model):
    return model.model.layers[0].self_attn.k_proj.weight.grad

def check(rank):
    dist.init_process_group("gloo", init_method={store!r}, rank=rank, world_size=2)
    alone, replicated, sharded = model(), model(), model()
    inputs = inputs_for(alone)
    expected = outputs_of(alone, inputs)
    expected.sum().backward()

    out = DistributedDataParallel(replicated)(**inputs).logits
    out[inputs["attention_mask"].bool()].sum().backward()
    torch.testing.assert_close(gradient(replicated), gradient(alone))

    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    out = outputs_of(sharded, inputs)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    torch.testing.assert_close(gradient(sharded).full_tensor(), gradient(alone))
    dist.destroy_process_group()

start_processes(check, nprocs=2, start_method="fork")
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does(fresh_python, tmp_path):
    tests = str(Path(__file__).parents[1])
    fresh_python(CODE.format(tests=tests, store=f"file://{tmp_path}/store"))
