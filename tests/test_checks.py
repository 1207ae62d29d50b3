"""Annotations are checked in every kind of call, if not in every call."""

import inspect
from typing import Literal

import beartype
import jaxtyping
import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from performers import SoftmaxFeatures, favor_attention

SQUARE = torch.zeros(3, 3)


def turned(
    x: Float[Tensor, "n n"],
    times: int,
    others: list[Float[Tensor, "n n"]] | None = None,
    side: Literal["left", "right"] = "left",
) -> Float[Tensor, "n n"]:
    return x[:times] if side == "right" else x.mT


@pytest.mark.parametrize(
    "arguments",
    [
        (SQUARE[:2], 1),
        (SQUARE.long(), 1),
        (SQUARE, 1.0),
        (SQUARE, 1, [SQUARE[:2]]),
        (SQUARE, 1, [None]),  # of a longer list one element is checked, at random
        (SQUARE, 1, None, "above"),
        (SQUARE, 1, None, "right"),  # returns what it should not
    ],
)
def test_what_no_call_before_had_is_checked(arguments):
    checked = jaxtyping.jaxtyped(turned, typechecker=beartype.beartype)
    for _ in range(2):
        checked(SQUARE, 1, [SQUARE])
        checked(SQUARE, 1)
        with pytest.raises(TypeCheckError):
            checked(*arguments)


def test_the_functions_of_the_package_are_checked():
    x = torch.zeros(1, 2, 3, 5)
    favor_attention(x, x, x, SoftmaxFeatures(5))
    with pytest.raises(TypeCheckError):
        favor_attention(x, x, x[0], SoftmaxFeatures(5))


def test_functions_inside_of_functions_are_checked_in_each_that_is_made():
    def made():
        @jaxtyping.jaxtyped(typechecker=beartype.beartype)
        def inner(x: Float[Tensor, "n n"]) -> None:
            pass

        return inner

    made()(SQUARE)
    with pytest.raises(TypeCheckError):
        made()(SQUARE[:2])


def test_a_function_that_yields_is_still_seen_to_and_is_checked():
    def count(x: Float[Tensor, "n n"], times: int):
        yield from range(times)
        return x.mT

    checked = jaxtyping.jaxtyped(count, typechecker=beartype.beartype)
    assert inspect.isgeneratorfunction(checked)
    assert list(checked(SQUARE, 3)) == [0, 1, 2]
    with pytest.raises(TypeCheckError):
        list(checked(SQUARE[:2], 3))
