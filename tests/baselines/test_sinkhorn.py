"""Sinkhorn attention against its equations."""

import pytest
import torch
from cases import inputs
from torch import Tensor

from performers.baselines import SinkhornAttention, SinkhornOptions


def made(num_iterations: int = 8, temperature: float = 0.75) -> SinkhornAttention:
    options = SinkhornOptions(4, num_iterations, temperature, hidden_size=11)
    return SinkhornAttention(options, dim=5, num_heads=3, max_length=29)


def sorting(mechanism: SinkhornAttention, key: Tensor) -> Tensor:
    """R by products, for keys [batch, key_heads, length, dim] of whole blocks."""
    of_block = key.unflatten(2, (-1, 4)).sum(dim=3)
    scores = torch.relu(of_block @ mechanism.up) @ mechanism.down
    scores = scores[..., : of_block.shape[2]] / mechanism.options.temperature
    matrix = scores.double().exp()
    matrix = matrix / matrix.sum(dim=-1, keepdim=True)
    for _ in range(mechanism.options.num_iterations):
        matrix = matrix / matrix.sum(dim=-2, keepdim=True)
        matrix = matrix / matrix.sum(dim=-1, keepdim=True)
    return matrix


@pytest.mark.parametrize("num_iterations", [0, 1, 8])
def test_a_query_attends_to_its_block_and_to_the_sorted_one(num_iterations):
    mechanism = made(num_iterations)
    query, key, value = inputs(24)
    out = mechanism(query, key, value)
    matrix = sorting(mechanism, key).float()
    blocks = [x.unflatten(2, (-1, 4)) for x in (key, value)]
    both = [torch.cat([x, torch.einsum("bhij,bhjsd->bhisd", matrix, x)], dim=3) for x in blocks]
    key, value = (x.repeat_interleave(2, dim=1) for x in both)
    weights = (query.unflatten(2, (-1, 4)) @ key.mT / 5**0.5).softmax(dim=-1)
    expected = (weights @ value).flatten(2, 3)
    torch.testing.assert_close(out, expected)


def test_many_iterations_sort_every_block_into_one_place():
    matrix = made(50).sorting(torch.randn(2, 3, 6, 4, 5), torch.ones(1, 6, dtype=torch.bool))
    ones = torch.ones(2, 3, 6)
    torch.testing.assert_close(matrix.sum(dim=-1), ones)
    torch.testing.assert_close(matrix.sum(dim=-2), ones, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("length", [1, 7, 23])
def test_padded_sequences_are_sorted_as_each_alone(length):
    mechanism = made()
    query, key, value = inputs(29)
    mask = (torch.arange(29) >= 3) & (torch.arange(29) < torch.tensor([[3 + length], [29]]))
    out = mechanism(query, key, value, key_padding_mask=mask)
    for row, real in enumerate(mask):
        alone = mechanism(*(x[row : row + 1, :, real] for x in (query, key, value)))
        torch.testing.assert_close(out[row : row + 1, :, real], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_gradients_are_finite_where_a_sequence_is_empty_or_its_last_block_is_not_full(size):
    mechanism = made()
    query, key, value = (x.requires_grad_() for x in inputs(23))
    mask = torch.arange(23) < torch.tensor([[0], [22]])
    mechanism(query, size * key, value, key_padding_mask=mask).square().sum().backward()
    for gradient in (query.grad, key.grad, value.grad, mechanism.up.grad, mechanism.down.grad):
        assert gradient.isfinite().all()
    assert mechanism.down.grad.any() or size > 1


@pytest.mark.usefixtures("without_shape_checks")
def test_what_sinkhorn_attention_cannot_do_is_refused():
    with pytest.raises(ValueError, match="no causal form: it sorts all blocks"):
        made()(*inputs(7), is_causal=True)
    with pytest.raises(ValueError, match="blocks of 29 positions, got 31"):
        made()(*inputs(31))
    with pytest.raises(ValueError, match="sorts for 3 key heads, got 2"):
        made()(*inputs(7, heads=2, key_heads=2))
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, got 0\.0"):
        SinkhornOptions(temperature=0.0)
