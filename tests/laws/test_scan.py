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


def test_the_gradient_of_the_scan_is_that_of_finite_differences():
    *tensors, chunk_size, keep = arguments()

    def differentiable_results(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both, frame, log_scale, sums, *_ = scan._exponential_scan(*tensors, chunk_size, keep)
        # In no frame: frames move with the inputs, and are never differentiated.
        return both * frame.detach().exp(), sums * log_scale.detach().exp().unsqueeze(-1)

    assert torch.autograd.gradcheck(differentiable_results, tensors)


def test_the_second_derivative_of_the_scan_is_that_of_finite_differences():
    *tensors, chunk_size, keep = arguments()

    def differentiable_results(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both, frame, log_scale, sums, *_ = scan._exponential_scan(*tensors, chunk_size, keep)
        return both * frame.detach().exp(), sums * log_scale.detach().exp().unsqueeze(-1)

    assert torch.autograd.gradgradcheck(differentiable_results, tensors, fast_mode=True)


def test_the_states_kept_for_the_backward_pass_cost_as_much_as_the_values_at_any_m():
    dim, length = 64, 16384
    for num_features in (64, 256, 1024):
        segment = scan._segment(num_features, scan.CHUNK)
        assert length / segment * num_features * (dim + 2) <= 1.1 * length * dim
