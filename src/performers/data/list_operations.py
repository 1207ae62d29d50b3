"""ListOps: nested operations on lists of digits, whose value is a digit.

    [MAX 2 9 [MIN 4 7 ] 0 ]   =   9

Whoever gets the value right has read the whole tree: an operation may hang on the last argument of
the list that it is in. The longer form of Long Range Arena has 500 to 2,000 symbols.

Source: Nangia & Bowman 2018, "ListOps: A Diagnostic Dataset for Latent Tree Learning"; Tay et al.
2021, "Long Range Arena", Section 2.2.1.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from performers.checks import check_count
from performers.data.labeled import PADDING, LabeledSequences, byte_rows

__all__ = [
    "OPERATORS",
    "SYMBOLS",
    "ListOperations",
    "draw_list_operations",
    "encode_expressions",
    "evaluate",
]

# The median of an even number of digits lies between two of them and is rounded down.
OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda digits: int(median(digits)),
    "[SM": lambda digits: sum(digits) % 10,
}
END = "]"
DIGITS = tuple("0123456789")

# A symbol is the token of its place in this list, after the padding.
SYMBOLS = (*DIGITS, *OPERATORS, END)
TOKENS = {symbol: PADDING + 1 + place for place, symbol in enumerate(SYMBOLS)}

# How often an argument is an operation, where the tree may still grow.
NESTING = 0.25

LEAST_ARGUMENTS = 2


@dataclass(frozen=True)
class ListOperations:
    """How large expressions are, in symbols; the defaults are those of Long Range Arena.

    `max_depth`: levels of the tree, the digits being the last. `max_arguments`: of an operation,
    which has at least two.
    """

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_arguments: int = 10

    def __post_init__(self) -> None:
        check_count("max_depth", self.max_depth, least=2)
        check_count("max_arguments", self.max_arguments, least=LEAST_ARGUMENTS)
        check_count("min_length", self.min_length)
        check_count("max_length", self.max_length, least=self.min_length)
        longest = _longest(self.max_depth, self.max_arguments)
        if self.min_length > longest:
            raise ValueError(
                f"min_length must be reached by a tree of max_depth={self.max_depth} and "
                f"max_arguments={self.max_arguments}, which has at most {longest} symbols: got "
                f"{self.min_length}."
            )


def _longest(depth: int, arguments: int) -> int:
    """Symbols of a full tree."""
    return 1 if depth == 1 else 2 + arguments * _longest(depth - 1, arguments)


def draw_list_operations(
    count: int, sizes: ListOperations = ListOperations(), seed: int = 0
) -> LabeledSequences:
    """`count` different expressions and their values, which are the same for the same seed.

    An operation has 2 to `max_arguments` arguments, each an operation with probability 1/4 and a
    digit otherwise; operators and digits are equally likely. Trees of other lengths are drawn
    again.
    """
    check_count("count", count)
    generator = random.Random(seed)
    drawn: dict[tuple[str, ...], int] = {}
    while len(drawn) < count:
        symbols: list[str] = []
        if _grow(symbols, 1, sizes, generator) and len(symbols) >= sizes.min_length:
            drawn.setdefault(tuple(symbols), evaluate(symbols))
    return encode_expressions(drawn, list(drawn.values()), sizes.max_length)


def _grow(symbols: list[str], depth: int, sizes: ListOperations, generator: random.Random) -> bool:
    """Append an operation; False, with the rest left out, once it is too long."""
    symbols.append(generator.choice(list(OPERATORS)))
    for _ in range(generator.randint(LEAST_ARGUMENTS, sizes.max_arguments)):
        if depth + 1 < sizes.max_depth and generator.random() < NESTING:
            if not _grow(symbols, depth + 1, sizes, generator):
                return False
        else:
            symbols.append(generator.choice(DIGITS))
    symbols.append(END)
    return len(symbols) <= sizes.max_length


def evaluate(symbols: Iterable[str]) -> int:
    """The value of an expression.

    >>> evaluate("[MED 3 [SM 9 8 ] 1 5 ]".split())
    4

    Raises ValueError for what is no expression.
    """
    opened: list[tuple[str, list[int]]] = []
    whole: list[int] = []
    for symbol in symbols:
        arguments = opened[-1][1] if opened else whole
        if symbol in OPERATORS:
            opened.append((symbol, []))
        elif symbol in DIGITS:
            arguments.append(int(symbol))
        elif symbol == END and opened and arguments:
            operator, arguments = opened.pop()
            (opened[-1][1] if opened else whole).append(OPERATORS[operator](arguments))
        else:
            raise ValueError(
                f"an expression consists of {' '.join(SYMBOLS)}, each operator closed once after "
                f"one argument or more: got {symbol!r} after {len(opened)} open operators."
            )
    if opened or len(whole) != 1:
        raise ValueError(
            "an expression must be one operation or digit, with every operator closed: got "
            f"{len(whole)} values and {len(opened)} open operators."
        )
    return whole[0]


def encode_expressions(
    expressions: Iterable[Sequence[str]], values: Sequence[int], length: int
) -> LabeledSequences:
    """Expressions as tokens; one that is longer than `length` loses its end."""
    rows = [bytes(TOKENS[symbol] for symbol in symbols) for symbols in expressions]
    return LabeledSequences(byte_rows(rows, length), torch.tensor(values))
