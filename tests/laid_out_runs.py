"""Runs of `performers train` on several processes, and what must be equal between them."""

import os

import pytest
import torch.distributed as dist
from ranks import on_ranks

from performers.train import Run, load_config


def trained(path, folder, processes=1, overrides=(), resume=False):
    """What the run's own model came to."""

    def run():
        rank = str(dist.get_rank())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # they have met already
        return Run.prepare(load_config(path, overrides), folder, resume).train()

    return on_ranks(processes, run)[0]["models"][0]


def check_equal(model, expected):
    """Losses, gradient norms, evaluations, final scores and tokens."""
    for found, one in zip(model["history"], expected["history"], strict=True):
        assert found.keys() == one.keys()
        for key in one.keys() & {"loss", "grad_norm", "eval_loss", "eval_accuracy"}:
            assert found[key] == pytest.approx(one[key], rel=1e-6), key
        for key in one.keys() & {"eval_num_scored", "num_input_tokens_seen"}:
            assert found[key] == one[key], key
    for name, scores in expected["metrics"].items():
        assert model["metrics"][name] == pytest.approx(scores, rel=1e-6)
    for key in ("tokens", "parameters", "attention"):
        assert model[key] == expected[key]
