"""ListOps: values agree with another evaluation, and trees are as large as they are asked to be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from performers.data.labeled import PADDING
from performers.data.list_operations import (
    OPERATORS,
    SYMBOLS,
    ListOperations,
    draw_list_operations,
    evaluate,
)

SIZES = ListOperations(min_length=23, max_length=61, max_depth=5, max_arguments=7)

# An operation is a name and its arguments.
TREES = st.recursive(
    st.integers(0, 9),
    lambda trees: st.tuples(
        st.sampled_from(sorted(OPERATORS)), st.lists(trees, min_size=1, max_size=6)
    ),
    max_leaves=19,
)


def written(tree):
    if isinstance(tree, int):
        return [str(tree)]
    name, arguments = tree
    return [name, *(symbol for argument in arguments for symbol in written(argument)), "]"]


def value(tree):
    """The value of a tree, by numpy and from the tree itself."""
    if isinstance(tree, int):
        return tree
    name, arguments = tree
    digits = np.array([value(argument) for argument in arguments])
    return int(
        {
            "[MIN": np.min,
            "[MAX": np.max,
            "[MED": lambda x: np.floor(np.median(x)),
            "[SM": lambda x: np.sum(x) % 10,
        }[name](digits)
    )


@settings(max_examples=60, deadline=None)
@given(TREES)
def test_the_value_of_an_expression_is_that_of_its_tree(tree):
    assert evaluate(written(tree)) == value(tree)


def parsed(symbols):
    """The tree of an expression, by recursive descent."""
    symbol = symbols.pop(0)
    if symbol not in OPERATORS:
        return int(symbol)
    arguments = []
    while symbols[0] != "]":
        arguments.append(parsed(symbols))
    symbols.pop(0)
    return symbol, arguments


def depth(tree):
    return 1 if isinstance(tree, int) else 1 + max(map(depth, tree[1]))


def lists(tree):
    """All lists of arguments."""
    if isinstance(tree, int):
        return []
    return [tree[1], *(found for argument in tree[1] for found in lists(argument))]


def expressions(drawn):
    return [
        [SYMBOLS[token - PADDING - 1] for token in row if token != PADDING]
        for row in drawn.tokens.tolist()
    ]


@pytest.fixture(scope="module")
def drawn():
    return draw_list_operations(307, SIZES, seed=3)


def test_drawn_expressions_are_within_their_sizes_and_carry_their_values(drawn):
    found = expressions(drawn)
    trees = [parsed(list(symbols)) for symbols in found]
    lengths = [len(symbols) for symbols in found]
    arguments = [len(of_one) for tree in trees for of_one in lists(tree)]
    assert drawn.tokens.shape == (307, SIZES.max_length)
    assert SIZES.min_length <= min(lengths) < max(lengths) == SIZES.max_length
    assert (min(arguments), max(arguments)) == (2, SIZES.max_arguments)
    assert max(map(depth, trees)) == SIZES.max_depth
    assert drawn.labels.tolist() == [value(tree) for tree in trees]
    assert len(set(map(tuple, found))) == 307


def test_operators_and_digits_are_equally_likely(drawn):
    counts = torch.bincount(drawn.tokens.flatten().int(), minlength=len(SYMBOLS) + 1)
    for several in (counts[1:11], counts[11:15]):
        share = 1 / len(several)
        standard_error = (share * (1 - share) / several.sum()) ** 0.5
        assert (several / several.sum() - share).abs().max() < 4 * standard_error


def test_the_same_seed_draws_the_same_and_another_seed_others(drawn):
    again, other = (draw_list_operations(5, SIZES, seed) for seed in (3, 4))
    assert torch.equal(again.tokens, drawn.tokens[:5])
    assert not torch.equal(other.tokens, again.tokens)


def test_the_benchmark_has_500_to_2000_symbols_in_ten_levels():
    rows = expressions(draw_list_operations(11))
    assert all(500 <= len(row) <= 2000 for row in rows)
    assert max(depth(parsed(row)) for row in rows) <= 10


@pytest.mark.parametrize("text", ["[MIN 1", "[MIN ]", "1 2", "]", "[AVG 1 2 ]", "", "12"])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ValueError, match="an expression"):
        evaluate(text.split())


@pytest.mark.usefixtures("without_shape_checks")
def test_sizes_that_no_tree_reaches_are_refused():
    with pytest.raises(ValueError, match="at most 17 symbols: got 19"):
        ListOperations(min_length=19, max_length=23, max_depth=3, max_arguments=3)
    with pytest.raises(ValueError, match="max_length"):
        ListOperations(min_length=19, max_length=17)
