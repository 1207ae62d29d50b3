"""Counted costs: floating-point operations of one head's forward pass, with no constant left out.

A product of matrices (n, k) and (k, p) counts 2·n·k·p; exponentials, maxima and divisions are not
counted, because there is one of them for many products. So the counts are lower bounds of what the
formulas ask, the same for every backend. A backend may find a part of it cheaper: a near field on a
CPU takes 4·d·16 in the place of 4·d² up to d = 64, a quarter beyond, for the maps of sharp features
whose directions are orthogonal (`backends.blocks.sides`).
"""

from __future__ import annotations

import itertools

__all__ = ["cheaper_from", "exact_operations", "favor_operations", "near_pairs"]


def exact_operations(length: int, dim: int, is_causal: bool = False) -> int:
    """Exact attention: QKᵀ and the product with V, 4·d·L²; half of that where it is causal."""
    return 4 * dim * length**2 // (2 if is_causal else 1)


def favor_operations(
    length: int,
    dim: int,
    num_projections: int,
    window_size: int | None = None,
    num_sinks: int = 0,
    is_causal: bool = False,
    is_sharp: bool = False,
    num_heavy: int = 0,
) -> float:
    """`favor_attention`: d operations per token and head, in order

        8·m·d               features of queries and keys, their sums with the values, the readout
        4·d²                sharp features: the maps of queries and of keys
        2·m·(d + 1) / w     of each direction: a block's sums join those of the blocks before
        4·d·n               exact scores and their values, of n = near_pairs / L keys
        4·d·s               the same for s sinks
        4·d·h, 2·d·(n + s)  the same for h heavy keys, and the scores that choose them

    `num_projections`: 0 for a near field alone (`far=False`), which has none of the first three.
    `window_size`: None for no near field.
    """
    operations = 4.0 * dim * num_sinks * length
    if window_size is not None:
        operations += 4 * dim * near_pairs(length, window_size, is_causal)
    if num_heavy:
        operations += operations / 2 + 4 * dim * num_heavy * length
    if num_projections:
        operations += 8 * num_projections * dim * length
        operations += 4 * dim**2 * length if is_sharp else 0
        if window_size is not None:
            directions = 1 if is_causal else 2
            operations += directions * 2 * num_projections * (dim + 1) * length / window_size
    return operations


def cheaper_from(
    dim: int,
    num_projections: int,
    window_size: int | None = None,
    num_sinks: int = 0,
    is_causal: bool = False,
    is_sharp: bool = False,
    num_heavy: int = 0,
) -> int:
    """The first length at which `favor_operations` are fewer than `exact_operations`."""

    def is_cheaper(length: int) -> bool:
        setting = (num_projections, window_size, num_sinks, is_causal, is_sharp, num_heavy)
        return favor_operations(length, dim, *setting) < exact_operations(length, dim, is_causal)

    # Linear against quadratic: there is such a length.
    return next(filter(is_cheaper, itertools.count(1)))


def near_pairs(length: int, window_size: int, is_causal: bool = False) -> int:
    """Pairs of a query and a key of its own or a neighboring block of `window_size` positions.

    Causal: of its own block or the one before. The own block counts as a whole, because it is
    multiplied as a whole and then masked.
    """
    full, rest = divmod(length, window_size)
    own = full * window_size**2 + rest**2
    # Pairs with the block before: between full blocks, and between the last full block and the
    # rest.
    beside = max(full - 1, 0) * window_size**2 + (window_size * rest if full else 0)
    return own + (1 if is_causal else 2) * beside
