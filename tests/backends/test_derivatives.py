"""What the derivatives of hand-written operators are made of."""

import pytest
import torch
from torch.autograd import forward_ad

from performers.backends.derivatives import (
    is_differentiated,
    is_transformed,
    plain_gradients,
    refuse_second_derivative,
)


def formula(x, y, factor):
    """Two outputs, of which one does not depend on y."""
    return (x * y).sin() * factor, x.square()


@pytest.fixture
def arguments():
    x, y = torch.randn(2, 7, dtype=torch.float64).unbind()
    return x.requires_grad_(), y.requires_grad_(), 0.5


@pytest.mark.parametrize(
    "needed", [(True, True, False), (True, False, False), (False, True, False)]
)
def test_the_gradients_that_are_needed_are_those_of_the_formula(arguments, needed):
    ways = torch.randn(2, 7, dtype=torch.float64).unbind()
    found = plain_gradients(formula, arguments, needed, ways)
    expected = torch.autograd.grad(formula(*arguments), arguments[:2], ways)
    for gradient, need, right in zip(found, needed, (*expected, None), strict=True):
        if need:
            torch.testing.assert_close(gradient, right)
        else:
            assert gradient is None


def test_an_output_without_a_gradient_has_no_part(arguments):
    way = torch.randn(7, dtype=torch.float64)
    needed = (True, True, False)
    of_x, of_y, _ = plain_gradients(formula, arguments, needed, (None, way))
    torch.testing.assert_close(of_x, 2 * arguments[0] * way)
    assert of_y is None
    assert plain_gradients(formula, arguments, needed, (None, None)) == (None, None, None)
    assert plain_gradients(formula, arguments, (False,) * 3, (way, way)) == (None, None, None)


@pytest.mark.parametrize("is_enabled", [False, True])
def test_gradients_can_be_differentiated_where_gradients_are_on(arguments, is_enabled):
    way = torch.randn(7, dtype=torch.float64, requires_grad=True)
    with torch.set_grad_enabled(is_enabled):
        of_x, _, _ = plain_gradients(formula, arguments, (True, False, False), (way, None))
    assert of_x.requires_grad == is_enabled
    if is_enabled:  # cos(xy) y/2 · way
        x, y = (part.detach() for part in arguments[:2])
        of_way, of_y = torch.autograd.grad(of_x.sum(), [way, arguments[1]])
        torch.testing.assert_close(of_way, (x * y).cos() * y / 2)
        slope = (x * y).cos() - x * y * (x * y).sin()
        torch.testing.assert_close(of_y, slope / 2 * way.detach())


def test_transforms_are_seen_while_they_last_and_no_longer():
    seen = []

    def look(x):
        seen.append(is_transformed())
        return x.sum()

    look(torch.ones(3))
    for transform in (torch.func.grad, torch.func.vmap):
        transform(look)(torch.ones(3, 1))
        look(torch.ones(3))
    with forward_ad.dual_level():
        look(torch.ones(3))
    look(torch.ones(3))
    assert seen == [False, True, False, True, False, True, False]


def test_a_backward_pass_is_differentiated_where_gradients_are_on_or_a_transform_is():
    with torch.no_grad():
        assert not is_differentiated()
        with forward_ad.dual_level():
            assert is_differentiated()
    assert is_differentiated()


def test_what_has_a_first_derivative_only_says_so():
    words = 'the toy has a first derivative only.*backend="chunked"'
    with pytest.raises(RuntimeError, match=words):
        refuse_second_derivative("the toy")(None, torch.ones(3))
