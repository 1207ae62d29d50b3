"""A training run that takes seconds: random proteins in labelled clusters, two small layers."""

import random
from pathlib import Path

import pytest
import torch
import yaml

from performers.data.vocabulary import STANDARD_AMINO_ACIDS


@pytest.fixture(scope="session")
def fasta(tmp_path_factory) -> Path:
    """101 random proteins, each its own cluster and family."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("fasta") / "proteins.fasta"
    with path.open("w") as file:
        for number in range(101):
            letters = "".join(draw.choices(STANDARD_AMINO_ACIDS, k=draw.randrange(13, 43)))
            file.write(f">p{number} Cluster=c{number} Family=f{number}\n{letters}\n")
    return path


@pytest.fixture(scope="session")
def config_file(fasta, tmp_path_factory) -> Path:
    """Several epochs, so that their masks count; the last step is not a multiple of save_steps."""
    tree = {
        "task": "masked-lm",
        "seed": 5,
        "redraw_every": 3,
        "compare": ["exact"],
        "data": {"source": [str(fasta)], "length": 31},
        "model": {
            "attention": "performer-relu",
            "hidden_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 17,
            "num_projections": 7,
        },
        "trainer": {
            "max_steps": 17,
            "per_device_train_batch_size": 11,
            "logging_steps": 1,
            "eval_steps": 5,
            "save_steps": 5,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in another order are other numbers, and a child process may count other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
