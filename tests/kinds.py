"""Things of every kind, for arguments that are of another."""

import numpy as np
import torch

import performers
from performers import functional

PHI = performers.SoftmaxFeatures(4, 8)
STATE = functional.absorb_keys(
    torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(1)), PHI
)


class Stranger:
    """An object of which nothing is known."""


# By kind: a value of no kind that an argument has, and values of each kind that one might have.
OTHERS = {
    "none": None, "true": True, "negative": -1, "zero": 0, "three": 3, "fraction": 2.5,
    "nan": float("nan"), "infinity": float("inf"), "beyond float": 10**400, "word": "x",
    "empty word": "", "long word": "x" * 10**6, "bytes": b"x", "list": [1, 2], "dict": {"a": 1},
    "tuple": (), "set": {1}, "array": np.zeros((2, 3, 7, 4), np.float32), "numpy int": np.int64(3),
    "scalar": torch.tensor(1.0), "index": torch.tensor(3), "vector": torch.zeros(3),
    "bools": torch.zeros(2, 3, 7, 4, dtype=torch.bool), "integers": torch.zeros(2, 3, 7, 4).long(),
    "sparse": torch.eye(3).to_sparse(), "complex": torch.zeros(2, 3, 7, 4, dtype=torch.complex64),
    "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "float8": torch.zeros(2, 3, 7, 4).to(torch.float8_e4m3fn),
    "meta": torch.zeros(2, 3, 7, 4, device="meta"), "half": torch.zeros(2, 3, 7, 4).half(),
    "no dim": torch.zeros(2, 3, 7, 0), "no batch": torch.zeros(0, 3, 7, 4),
    "no heads": torch.zeros(2, 0, 7, 4), "no length": torch.zeros(2, 3, 0, 4),
    "rank 3": torch.zeros(2, 7, 4), "rank 5": torch.zeros(1, 2, 3, 7, 4),
    "generator": iter(()), "function": len, "class": performers.SoftmaxFeatures,
    "object": Stranger(), "dtype": torch.float32, "state": STATE, "map": PHI,
}  # fmt: skip
