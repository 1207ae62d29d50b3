"""What an override takes out of a config besides the key that it sets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from performers.models import MECHANISMS
from performers.train.data import OF_PROTEINS

__all__ = ["take_out_replaced"]

# How long a run is: each in the place of the others.
ENDS = ("max_seconds", "trainer.max_steps", "trainer.num_train_epochs")


def take_out_replaced(tree: dict[str, Any], changed: Collection[str]) -> None:
    """Take out what the file says and these overrides, by their dotted keys, have replaced."""
    _take_out_window(tree, changed)
    _take_out_ends(tree, changed)
    if "pretrained.model" in changed:  # in the place of a model that the file makes
        for section in {"model", "compare"} - {key.split(".")[0] for key in changed}:
            tree.pop(section, None)
    data = tree.get("data")
    if "data.text" in changed and isinstance(data, dict):  # in the place of the file's proteins
        for key in OF_PROTEINS:
            if f"data.{key}" not in changed:
                data.pop(key, None)


def _take_out_window(tree: Mapping[str, Any], changed: Collection[str]) -> None:
    """The window in a file is for the attention there, not for another that an override asks for;
    one that is asked for together with it is refused where it means nothing.
    """
    model = tree.get("model")
    if "model.attention" in changed and not {"model", "model.window_size"} & set(changed):
        assert isinstance(model, dict), "a key in it has been set"
        word = model["attention"]
        if isinstance(word, str) and word in MECHANISMS and not MECHANISMS[word].takes_window:
            model.pop("window_size", None)


def _take_out_ends(tree: dict[str, Any], changed: Collection[str]) -> None:
    """The end in a file is not for a run whose end an override says. Two that are asked for are
    refused later.
    """
    trainer = tree.get("trainer")
    sections = {"": tree, "trainer": trainer if isinstance(trainer, dict) else {}}
    places = {end: (sections[end.rpartition(".")[0]], end.rpartition(".")[2]) for end in ENDS}
    asked = {end for end in changed if end in places and places[end][0].get(places[end][1])}
    for end in set(places) - asked if asked else ():
        section, key = places[end]
        section.pop(key, None)
