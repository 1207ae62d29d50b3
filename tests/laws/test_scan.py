"""The causal scan as an operator of PyTorch: what torch.library asks of one."""

import pytest
import torch

from performers.backends import scan


def arguments(requires_grad: bool = True) -> list:
    """Those of the operator: 3 heads, 2 query heads for each, chunks of 5 of 11 positions."""
    heads, group, length, dim, num_features, width = 3, 2, 11, 7, 13, 6
    shapes = [
        (heads, group, length, dim),
        (heads, num_features, dim),
        (heads, length, dim),
        (heads, num_features, dim),
        (heads, length, 1),
        (heads, length, width),
        (heads, num_features),
        (heads, num_features, width),
    ]
    tensors = [torch.randn(shape, dtype=torch.float64) / 3 for shape in shapes]
    log_scale = 6
    for index, tensor in enumerate(tensors):
        tensor.requires_grad_(requires_grad and index != log_scale)
    return [*tensors, 5, True]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_scan_is_a_lawful_operator():
    torch.library.opcheck(scan._exponential_scan, arguments())


def results(*arguments: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
    """In no frame: frames move with the inputs, and are never differentiated."""
    both, frame, log_scale, sums, *_ = scan._exponential_scan(*arguments)
    return both * frame.detach().exp(), sums * log_scale.detach().exp().unsqueeze(-1)


def defined(query, query_directions, key, key_directions, log_rows, value, log_scale, sums):
    """The same as sums over the keys up to each row."""
    of_keys = (key @ key_directions.mT + log_rows).exp()
    before = sums * log_scale.exp().unsqueeze(-1)
    added = of_keys.unsqueeze(-1) * value.unsqueeze(2)  # [heads, length, num_features, width]
    states = before.unsqueeze(1) + added.cumsum(dim=1)
    of_queries = (query @ query_directions.unsqueeze(1).mT).exp()
    return torch.einsum("hglm,hlmw->hglw", of_queries, states), states[:, -1]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("rise", [0.0, 70.0])  # of one key: more than one pass bears
def test_rows_and_the_last_state_are_sums_over_keys_each_with_its_own_gradient(rise, keep):
    *tensors, chunk_size, _ = arguments()
    with torch.no_grad():
        tensors[4][:, 7] += rise
    leaves = [x for x in tensors if x.requires_grad]
    found, expected = results(*tensors, chunk_size, keep), defined(*tensors)
    torch.testing.assert_close(found, expected)
    for one, other in zip(found, expected, strict=True):
        cotangent = torch.randn_like(one)
        gradients = (
            torch.autograd.grad(x, leaves, cotangent, retain_graph=True, materialize_grads=True)
            for x in (one, other)
        )
        torch.testing.assert_close(*gradients)
    kept = scan._exponential_scan(*tensors, chunk_size, keep)[4:]
    assert all(bool(part.numel()) == keep for part in kept)


def test_the_second_derivative_of_the_scan_is_that_of_finite_differences():
    *tensors, chunk_size, keep = arguments()
    assert torch.autograd.gradgradcheck(
        lambda *tensors: results(*tensors, chunk_size, keep), tensors, fast_mode=True
    )


def test_the_states_kept_for_the_backward_pass_cost_as_much_as_the_values_at_any_m():
    """And the features of a segment, which it holds at once, at most m² or those of one chunk."""
    dim, length, chunk = 64, 16384, 64
    for num_features in (16, 64, 256, 1000, 1024):
        segment = scan._segment(num_features, chunk)
        assert segment % chunk == 0
        assert length / segment * num_features * (dim + 2) <= 1.1 * length * dim
        assert segment <= max(num_features, chunk)
