"""ω has the distribution that every theorem assumes: of each row, and of rows together."""

import math

import pytest
import torch
from standard_errors import assert_mean_within

from performers.functional.projections import (
    DISTRIBUTIONS,
    PROJECTIONS,
    draw_projection,
    walsh_hadamard_transform,
)

ORTHOGONAL = ["orthogonal", "hadamard", "givens"]


def draw_blocks(count, dim, kind, distribution="gaussian"):
    """Independent square blocks, (count, rows, dim)."""
    rows = 2 ** (dim - 1).bit_length() if kind == "hadamard" else dim
    return draw_projection(count * rows, dim, kind, distribution).double().view(count, rows, dim)


def raw_qr_blocks(count, dim):
    """What earlier libraries draw: Q of QR with the sign convention of LAPACK left in."""
    q = torch.linalg.qr(torch.randn(count, dim, dim, dtype=torch.float64)).Q.mT
    return q * torch.randn(count, dim, dim, dtype=torch.float64).norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("dim", [2, 5, 13, 16])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_first_and_last_rows_have_mean_zero_and_identity_covariance(kind, distribution, dim):
    for row in draw_blocks(3000, dim, kind, distribution)[:, [0, -1]].unbind(1):
        # Ten thousand comparisons in all: one in 16,000 is beyond 4 standard errors by chance.
        assert_mean_within(row, 0, standard_errors=5)
        assert_mean_within(row[:, :, None] * row[:, None, :], torch.eye(dim), standard_errors=5)


def test_a_raw_qr_draw_is_told_from_a_haar_draw():
    with pytest.raises(AssertionError, match="standard errors away"):
        assert_mean_within(raw_qr_blocks(300, 16)[:, 0], 0)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_gaussian_rows_have_chi_lengths(kind):
    dim = 16
    square_lengths = draw_blocks(500, dim, kind).square().sum(-1).flatten()
    assert_mean_within(square_lengths, dim)
    assert_mean_within((square_lengths - dim).square(), 2 * dim)


@pytest.mark.parametrize("exponents", [(2,), (4,), (2, 2), (4, 2, 2), (1, 2), (3, 1)])
@pytest.mark.parametrize("dim", [3, 8])
def test_lemma_5_moments_of_a_direction_are_those_of_gaussians_over_that_of_their_length(
    dim, exponents
):
    # E[g^k] of N(0, 1), and E[‖g‖^n] of the chi distribution with `dim` degrees of freedom.
    of_gaussians = math.prod(0 if k % 2 else math.prod(range(1, k, 2)) for k in exponents)
    n = sum(exponents)
    of_length = 2 ** (n / 2) * math.gamma((dim + n) / 2) / math.gamma(dim / 2)
    u = draw_projection(40_000, dim, "iid", "sphere").double() / math.sqrt(dim)
    product = math.prod(u[:, i] ** k for i, k in enumerate(exponents))
    assert_mean_within(product, of_gaussians / of_length)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_sphere_rows_have_length_root_dim(kind):
    lengths = draw_projection(37, 16, kind, "sphere").norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((37,), 4.0))


@pytest.mark.parametrize("dim", [1, 2, 7, 16, 64])
@pytest.mark.parametrize("kind", ["orthogonal", "givens"])
def test_rows_of_a_block_are_orthogonal_in_every_draw(kind, dim):
    directions = draw_blocks(41, dim, kind, "sphere") / math.sqrt(dim)
    eye = torch.eye(dim, dtype=torch.float64).expand(41, -1, -1)
    torch.testing.assert_close(directions @ directions.mT, eye, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 16, 64])
def test_hadamard_blocks_are_an_orthogonal_matrix_of_the_next_power_of_two_cut_to_dim(dim):
    blocks = draw_blocks(41, dim, "hadamard", "sphere")
    rows = blocks.shape[1]
    assert rows in {1, 2, 4, 8, 16, 64}
    assert rows >= dim
    # Columns of an orthogonal matrix of size `rows` whose rows were given length √rows.
    expected = rows * torch.eye(dim, dtype=torch.float64).expand(41, -1, -1)
    torch.testing.assert_close(blocks.mT @ blocks, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ORTHOGONAL)
@pytest.mark.parametrize("dim", [1, 2, 16])
def test_both_signs_of_the_determinant_are_equally_likely(kind, dim):
    assert_mean_within(draw_blocks(400, dim, kind).det().sign(), 0)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_blocks_are_independent(kind):
    dim = 16
    first, second = draw_blocks(4000, dim, kind).view(2000, 2, dim, dim)[:, :, 3].unbind(1)
    product = (first * second).sum(-1)
    assert_mean_within(product, 0)
    assert_mean_within(product.square(), dim)


@pytest.mark.parametrize(("num_projections", "dim"), [(1, 5), (3, 16), (37, 16), (41, 13)])
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_any_number_of_rows_can_be_drawn(kind, num_projections, dim):
    omega = draw_projection(num_projections, dim, kind)
    assert omega.shape == (num_projections, dim)
    assert omega.dtype == torch.float32
    assert omega.isfinite().all()


@pytest.mark.parametrize("kind", ["orthogonal", "givens"])
@pytest.mark.parametrize("dim", [5, 16])
def test_fourth_moments_are_those_of_the_haar_measure(kind, dim):
    row = draw_blocks(8000, dim, kind, "sphere")[:, 1] / math.sqrt(dim)
    assert_mean_within(row[:, 0].pow(4), 3 / (dim * (dim + 2)))
    assert_mean_within(row.mean(1).mul(math.sqrt(dim)).pow(4), 3 / (dim * (dim + 2)))


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_hadamard_fourth_moment_is_below_haar_by_what_its_docstring_says(dim):
    """E u₁⁴ = (3 − 6/d + 4/d²)/d² for rows of H D₁ H D₂ H D₃, against 3/(d (d + 2))."""
    u = draw_blocks(6000 // dim, dim, "hadamard", "sphere")[:, :, 0] / math.sqrt(dim)
    exact = (3 - 6 / dim + 4 / dim**2) / dim**2
    assert_mean_within(u.pow(4).mean(1), exact)
    assert -8 / (3 * dim**2) <= exact * dim * (dim + 2) / 3 - 1 < 0


def test_the_bias_of_hadamard_rows_is_seen_where_it_is_large():
    u = draw_blocks(20000, 8, "hadamard", "sphere")[:, :, 0] / math.sqrt(8)
    with pytest.raises(AssertionError, match="standard errors away"):
        assert_mean_within(u.pow(4).mean(1), 3 / (8 * 10))


@pytest.mark.parametrize("dim", [1, 2, 32])
def test_the_hadamard_matrix_is_symmetric_orthogonal_and_flat(dim):
    matrix = walsh_hadamard_transform(torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(matrix, matrix.mT)
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(matrix.abs(), torch.full_like(matrix, dim**-0.5))


def test_the_hadamard_transform_refuses_other_lengths():
    with pytest.raises(ValueError, match=r"power of two long, got \(3, 12\). Pad it with zeros"):
        walsh_hadamard_transform(torch.ones(3, 12))
