"""Which attention FAVOR+ can take the place of: softmax(scale · QKᵀ) V under padding and causality.

What makes attention another function is listed here, and nowhere else. It shows in the arguments
of a call. Some of it shows earlier, in the text of a class: that an attention computes by itself
and asks no AttentionInterface, that it reads a mask of pairs, or that it always passes such an
argument.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

__all__ = [
    "OTHER_ATTENTION",
    "PAIRS_OF_ITS_OWN",
    "asks_the_interface",
    "attends_by_itself",
    "check_architecture",
    "other_attention",
    "other_attention_of_class",
    "own_attention",
    "reads_pairs",
    "refusal",
    "source_of",
]


class Other(NamedTuple):
    """What an argument of an attention call makes of attention.

    `in_every_call`: a class that names the argument passes it always. The other arguments may be
    left out by a configuration, so only a call can tell.
    """

    what: str
    in_every_call: bool


# By the argument's name: attention with it is not softmax(scale · QKᵀ) V under a mask of padding
# and causality.
OTHER_ATTENTION = {
    "position_bias": Other("a bias for each pair of positions", in_every_call=True),
    "s_aux": Other("attention sinks", in_every_call=True),
    "sinks": Other("attention sinks", in_every_call=True),
    "softcap": Other("a soft cap on its logits", in_every_call=False),
    "indices": Other("keys chosen for each query", in_every_call=True),
    "block_indices": Other("keys chosen for each query", in_every_call=True),
    "cache": Other("a paged cache", in_every_call=False),
}

PAIRS_OF_ITS_OWN = "a mask of pairs of its own (an indexer, or a mask that depends on the input)"

# How an attention that looks into its mask of pairs, before it asks the interface, is written:
# attention_mask[:, 0, …] or attention_mask[:, :, …]. Masks of padding have no such places.
READS_PAIRS = re.compile(r"\battention_mask\[:, [0:][,\]]")


def other_attention(arguments: Mapping[str, Any]) -> list[str]:
    """What makes a call with these arguments another attention, in words; empty for a plain one."""
    return [_in_words(word) for word in OTHER_ATTENTION if arguments.get(word) is not None]


def other_attention_of_class(source: str) -> list[str]:
    """What makes every call of the class with this text another attention, in words."""
    return [
        _in_words(word)
        for word, other in OTHER_ATTENTION.items()
        if other.in_every_call and re.search(rf"\b{word}=", source)
    ]


def asks_the_interface(source: str) -> bool:
    """Whether this text of a class is that of an attention which asks the AttentionInterface."""
    return "get_interface(" in source


def attends_by_itself(source: str) -> bool:
    """Whether this text of a class is that of an attention which asks no interface for it."""
    is_attention = re.match(r"class \w*Attention\(", source) is not None
    computes = "attention_mask" in source and "softmax(" in source
    return is_attention and computes and not asks_the_interface(source)


def reads_pairs(source: str) -> bool:
    """Whether this text of a class is that of an attention which looks into a mask of pairs."""
    return asks_the_interface(source) and READS_PAIRS.search(source) is not None


def source_of(module: nn.Module) -> str:
    """The text of a module's class and of those that it derives from, but for those of torch."""
    return _source_of_class(type(module))  # type: ignore[arg-type]  # mypy sees Module.__hash__


@cache
def _source_of_class(module_class: type) -> str:
    # The text of PreTrainedModel speaks of the interface, too.
    classes = [c for c in module_class.__mro__ if c not in PreTrainedModel.__mro__]
    return "".join(map(_text_of_class, classes))


def _text_of_class(module_class: type) -> str:
    # Wrappers derive classes without a text from those of a model (FSDP2, parametrizations).
    try:
        return inspect.getsource(module_class)
    except (OSError, TypeError):
        return ""


@cache
def check_architecture(config_class: str, configuration_module: str) -> None:
    """Refuse a model that makes masks by transformers' functions but attends by its own, or looks
    into them for what a mask of FAVOR+ does not have.

    A mask is all that transformers asks for before such a model attends, and it hands over the
    configuration without the model, so the whole file that belongs to it is read.
    """
    modeling = sys.modules.get(configuration_module.replace(".configuration_", ".modeling_"))
    source = "" if modeling is None else inspect.getsource(modeling)
    for text in re.split(r"^(?=class |def )", source, flags=re.MULTILINE):
        if attends_by_itself(text):
            raise ValueError(own_attention(config_class.removesuffix("Config")))
        if reads_pairs(text):
            raise ValueError(refusal(config_class.removesuffix("Config"), PAIRS_OF_ITS_OWN))


def own_attention(name: str) -> str:
    """The error of a model that does not ask the AttentionInterface."""
    return (
        f"{name} computes attention, or some of it, by itself and not through transformers' "
        "AttentionInterface, so it cannot be converted."
    )


def refusal(name: str, kind: str) -> str:
    """The error of attention of another kind."""
    return (
        f"{name} attends with {kind}, which is not softmax(scale · QKᵀ) V and has no linear-time "
        "form. Use another attn_implementation for this model."
    )


def _in_words(word: str) -> str:
    return f"{OTHER_ATTENTION[word].what} ({word}=)"
