"""Orthogonal directions have the norm of what they map, and spare the product that would."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performers import SharpFeatures, favor_attention
from performers.functional.moments import Moments
from performers.functional.sharp import LEADING, ReparametrizedFeatures, sharpen

HEADS, DIM = 2, 20


def samples(seed, dim=DIM, length=60, heads=HEADS):
    """Queries and keys whose coordinates vary differently, and not around the origin."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(2, heads, dim, dim, generator=generator, dtype=torch.float64)
    stretch = torch.logspace(-1, 0.5, dim, dtype=torch.float64) / dim**0.5
    x = torch.randn(2, 1, heads, length, dim, generator=generator, dtype=torch.float64)
    return (0.3 + (x * stretch) @ mixing.unsqueeze(1)).unbind()


def features(seed, num_projections, dim=DIM, optimal="coordinate"):
    """Sharp ones, with orthogonal directions of all lengths in float64."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-num_projections // dim)):
        axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
        lengths = 1 + torch.rand(dim, 1, generator=generator, dtype=torch.float64) * 3
        blocks.append(axes * lengths)
    queries, keys = (Moments.of(x) for x in samples(seed, dim))
    reparametrization = sharpen(queries.over_batch(), keys.over_batch(), optimal=optimal)
    return ReparametrizedFeatures(torch.cat(blocks)[:num_projections], reparametrization)


@given(st.integers(0, 99), st.integers(2, 40), st.sampled_from(["coordinate", "isotropic", "none"]))
def test_products_with_orthogonal_directions_have_the_norm_of_y(seed, dim, optimal):
    phi = features(seed, dim + 3, dim, optimal)
    for side, x in zip(
        (phi.query_side(torch.float64), phi.key_side(torch.float64)),
        samples(seed, dim),
        strict=True,
    ):
        centered = x - side.shift
        y = centered @ side.matrix
        products = (y @ side.directions.mT)[..., :dim] / side.lengths
        surplus = centered @ side.surplus
        found = products.square().sum(dim=-1) - surplus.square().sum(dim=-1)
        torch.testing.assert_close(found, y.square().sum(dim=-1))


class Blind(ReparametrizedFeatures):
    """The same features, of whose norms nothing is known."""

    def _norm_by_products(self, matrix, dtype):
        return None, None


@given(st.integers(0, 9), st.integers(DIM, 3 * DIM), st.booleans(), st.integers(1, 70))
def test_attention_and_its_gradients_do_not_depend_on_what_is_known(seed, m, is_causal, length):
    known = features(seed, m)
    blind = Blind(known.omega, known.reparametrization)
    assert known.query_side(torch.float64).lengths is not None

    def found(phi):
        query, key = (x.clone().requires_grad_() for x in samples(seed, length=length))
        value = key.detach().flip(-1).requires_grad_()
        out = favor_attention(query, key, value, phi, is_causal, window_size=8)
        out.square().sum().backward()
        return out, *(x.grad for x in (query, key, value))

    for one, other in zip(found(known), found(blind), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("is_causal", [False, True])
def test_directions_that_learn_have_the_gradient_of_y(is_causal):
    known, (query, key) = features(3, DIM + 5), samples(3)
    found = []
    for phi in (known, Blind(known.omega, known.reparametrization)):
        leaves = []
        for name in ("query", "key"):
            side = phi._side(name, torch.float64)
            leaves.append(side.directions.clone().requires_grad_())
            phi._sides[name, torch.float64] = side._replace(directions=leaves[-1])
        out = favor_attention(query, key, key, phi, is_causal, window_size=8)
        out.square().sum().backward()
        found.append([out, *(x.grad for x in leaves)])
    for one, other in zip(*found, strict=True):
        assert bool(one.any())
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "case",
    ["independent directions", "few directions", "exponents of old", "directions that learn"],
)
def test_nothing_is_claimed_of_norms_that_products_do_not_have(case):
    query, key = samples(5)
    kind = "iid" if case == "independent directions" else "orthogonal"
    phi = SharpFeatures(DIM, DIM - 1 if case == "few directions" else DIM, HEADS, projection=kind)
    phi.calibrate(query, key)
    if case == "exponents of old":
        phi.exponent.sub_(torch.arange(DIM) / DIM)
    elif case == "directions that learn":
        phi.omega.requires_grad_()
    assert phi.query_side(torch.float32).lengths is None
    assert phi.key_side(torch.float32).surplus is None


def test_no_precision_takes_independent_directions_for_orthogonal_ones():
    """The largest cosine of two of 64 is less than 64 roundings of bfloat16."""
    phi = SharpFeatures(64, 64, projection="iid")
    assert phi.query_side(torch.bfloat16).lengths is None
    orthogonal = SharpFeatures(64, 64)
    assert orthogonal.query_side(torch.bfloat16).lengths is not None


def test_the_coordinates_that_vary_most_have_exponents_of_their_own():
    dim = 2 * LEADING
    queries, keys = (Moments.of(x).over_batch() for x in samples(7, dim))
    found = sharpen(queries, keys)
    own = found.exponent.sort(dim=-1).values
    common = own[:, LEADING:]
    assert bool((common == common[:, :1]).all())
    assert bool((own[:, :LEADING].diff() > 0).all())
    assert bool((own[:, LEADING - 1] < common[:, 0]).all())
