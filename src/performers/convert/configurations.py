"""What is converted gets configurations of its own: models and their parts share them.

transformers keeps the attention implementation in the configuration of a model. An encoder and a
decoder made from one configuration hold the same object, and so do two models made from it: what
is written there for one would switch the other.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig

from performers.convert.options import FAVOR, FavorOptions, is_within
from performers.convert.sites import Sites

__all__ = ["Owned", "give_back", "held_by", "own_configurations"]


class Owned(NamedTuple):
    """A configuration of a converted model: whose place it takes, and what it was at the start."""

    own: PreTrainedConfig
    shared: PreTrainedConfig
    at_first: dict[str, Any]


def own_configurations(sites: Sites, options: FavorOptions) -> list[Owned]:
    """Give the model, and each part that is switched by itself, copies of its configurations.

    Parts of a model, and models of one configuration, share that object, in which transformers
    keeps the attention implementation. Within what is switched together they go on sharing.
    """
    owned: list[Owned] = []
    for root in dict.fromkeys(("", *sites.roots(options))):
        memo: dict[int, Any] = {}
        for name, module in sites.configured.items():
            if root and not is_within(name, root):
                continue
            for attribute, shared in held_by(module).items():
                own = copy.deepcopy(shared, memo)
                setattr(module, attribute, own)
                if all(own is not one.own for one in owned):
                    owned.append(Owned(own, shared, copy.deepcopy(vars(own))))
    return owned


def give_back(sites: Sites, owned: list[Owned]) -> None:
    """Put the shared configurations back, with what was changed in the copies since."""
    for own, shared, at_first in reversed(owned):
        for name, value in vars(own).items():
            is_ours = name in (FAVOR, "_attn_implementation_internal")
            if is_ours or isinstance(value, PreTrainedConfig):
                continue
            if name not in at_first or value != at_first[name]:
                setattr(shared, name, value)
        for module in sites.configured.values():
            for attribute, held in held_by(module).items():
                if held is own:
                    setattr(module, attribute, shared)


def held_by(module: nn.Module) -> dict[str, PreTrainedConfig]:
    """The configurations that a module holds, by the names of its attributes."""
    return {name: held for name, held in vars(module).items() if isinstance(held, PreTrainedConfig)}
