"""What sharp features learn from moments, where these say little or differ much between heads."""

import pytest
import torch
from torch import Tensor

from performers.functional.moments import Moments
from performers.functional.sharp import sharpen

DIM = 5


def moments(scale: Tensor) -> Moments:
    """Of 101 vectors for each head, with standard deviations of the size of its `scale`."""
    x = torch.randn(len(scale), 101, DIM, dtype=torch.float64) * torch.linspace(0.5, 2, DIM)
    x = x * scale.double()[:, None, None]
    count = torch.full((len(scale),), 101.0, dtype=torch.float64)
    centered = x - x.mean(dim=1, keepdim=True)
    return Moments(count, x.mean(dim=1), centered.mT @ centered / 101)


def test_a_head_of_small_numbers_learns_as_it_would_alone():
    scale = torch.tensor([1.0, 1e-5])
    queries, keys = moments(scale), moments(scale)
    together = sharpen(queries, keys)
    alone = sharpen(*(Moments(x.count[1:], x.mean[1:], x.covariance[1:]) for x in (queries, keys)))
    for mine, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(mine[1:], theirs)


@pytest.mark.parametrize("constant", ["queries", "keys"])
def test_where_one_side_does_not_vary_no_axes_are_learned(constant):
    varying, still = moments(torch.ones(3)), moments(torch.zeros(3))
    of_queries, of_keys = (still, varying) if constant == "queries" else (varying, still)
    learned = sharpen(of_queries, of_keys, query_ratio=2.0)
    identity = torch.eye(DIM, dtype=torch.float64).expand(3, -1, -1)
    assert torch.equal(learned.query_map, identity)
    assert torch.equal(learned.key_map, identity)
