"""Long contexts: a language model by position, distance and time, and an encoder of speech."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from performers.convert.options import FavorOptions
from performers.convert.sequences import text_windows
from performers.reproduction import read_texts, resumable_folder

from . import speech
from .language import Needle, compared, load, read, retrieved
from .report import figure, summary

__all__ = ["CONFIGS", "figure", "run", "summary"]

Found = TypeVar("Found")
EXACT = "exact"


@dataclass(frozen=True)
class Config:
    """`language`, `speech`: "pretrained" models, or "random" ones.

    `books`: each is read from its beginning, `length` tokens. `edges`: perplexities are means
    between two of these positions. `window`, `num_heavy`: the near field, and the numbers of heavy
    keys beside it; 0 is the near field alone. `needles`: how many pass keys are asked for at each
    of the `distances`, fewer at larger ones. `blocks`: near fields of the encoder. `recordings`:
    how many inputs the encoder gets. `repeats`: of its times.
    """

    language: str = "pretrained"
    speech: str = "pretrained"
    texts: str = "novels"
    books: tuple[str, ...] = ("Persuasion", "Emma", "Mansfield Park", "Sense And Sensibility")
    filler: str = "Northanger Abbey"
    length: int = 8192
    edges: tuple[int, ...] = (0, 256, 512, 1024, 2048, 4096, 6144, 8192)
    window: int = 128
    num_heavy: tuple[int, ...] = (64, 0)
    new_tokens: int = 200
    distances: tuple[int, ...] = (64, 192, 384, 1024, 2048, 7936)
    needles: tuple[int, ...] = (20, 20, 20, 20, 20, 10)
    blocks: tuple[int, ...] = (32, 64, 96, 128, 192, 256, 320)
    recordings: int = 10
    repeats: int = 9
    seed: int = 0


FULL = Config()
REDUCED = replace(
    FULL, books=("Persuasion",), distances=(64, 192, 384, 1024, 2048), needles=(4, 4, 4, 2, 1),
    blocks=(64, 128, 256, 320), repeats=5,
)  # fmt: skip
SMOKE = replace(
    REDUCED, language="random", speech="random", texts="excerpts", books=("persuasion",),
    filler="northanger-abbey", length=160, edges=(0, 32, 64, 160), window=16, num_heavy=(8, 0),
    new_tokens=3, distances=(8, 40), needles=(1, 1), blocks=(4,), recordings=1, repeats=1,
)  # fmt: skip
# The sizes are not the paper's, which has no such experiment: "paper" is the whole table.
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": FULL}

# What stands for far positions of the encoder, of a near field of so many blocks.
FAR_OF_SPEECH: dict[str, dict[str, Any]] = {
    "nothing far": {"far": False},
    "estimated, at most 0.2": {"far": True, "far_limit": 0.2},
}


def methods(config: Config) -> dict[str, FavorOptions | None]:
    """How the language model attends, by title; the exact model first."""
    options: dict[str, FavorOptions | None] = {EXACT: None}
    for count in config.num_heavy:
        title = f"{count} heavy keys" if count else "nothing far"
        options[title] = FavorOptions(window_size=config.window, far=False, num_heavy=count)
    return options


@torch.no_grad()
def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    books, origin = read_texts(config.texts, report)
    with resumable_folder("long-context", config) as folder:
        pieces = Pieces(folder, report)
        return {
            "origin": origin,
            "speech": _speech(config, books, pieces),
            **_language(config, books, pieces),
        }


@dataclass(frozen=True)
class Pieces:
    """Parts of the results, each kept in a file, so that a run that is interrupted goes on."""

    folder: Path
    report: Callable[[str], None]

    def get(self, name: str, measure: Callable[[], Found]) -> Found:
        path = self.folder / f"{name}.pt"
        if not path.exists():
            self.report(name)
            part = path.with_suffix(".part")
            torch.save(measure(), part)
            part.replace(path)
        found: Found = torch.load(path)
        return found


def _language(config: Config, books: dict[str, str], pieces: Pieces) -> dict[str, Any]:
    tokenizer, model = load(config.language, list(books.values()))
    found = [_read(config, books, title, tokenizer, model, pieces) for title in config.books]
    return {
        "read": found,
        "retrieval": _retrieval(config, books[config.filler], tokenizer, model, pieces),
    }


def _read(
    config: Config,
    books: dict[str, str],
    book: str,
    tokenizer: Any,
    model: PreTrainedModel,
    pieces: Pieces,
) -> dict[str, Any]:
    ids = text_windows(tokenizer, books[book], config.length)[:1]
    states, continued = {}, {}
    for title, options in methods(config).items():
        states[title], continued[title] = pieces.get(
            f"{book}, {title}",
            lambda options=options: read(model, tokenizer, ids, options, config.new_tokens),
        )
    positions = pieces.get(f"{book}, compared", lambda: compared(model, ids, states, config.edges))
    return {"continued": continued, "positions": positions}


def _retrieval(
    config: Config, filler: str, tokenizer: Any, model: PreTrainedModel, pieces: Pieces
) -> dict[str, list[list[float]]]:
    """For each method and distance, the share of digits of each needle."""
    draw = random.Random(config.seed)
    found: dict[str, list[list[float]]] = {
        title: [[] for _ in config.distances] for title in methods(config)
    }
    share = len(filler) // config.needles[0]
    for number in range(config.needles[0]):
        key = "".join(draw.choices("0123456789", k=5))
        needle = Needle(key, filler[number * share :])
        reached = [
            distance
            for distance, count in zip(config.distances, config.needles, strict=True)
            if number < count
        ]
        for title, options in methods(config).items():
            shares = pieces.get(
                f"pass key {number}, {title}",
                lambda needle=needle, options=options, reached=reached: retrieved(
                    model, tokenizer, needle, options, reached
                ),
            )
            for of, one in zip(found[title], shares, strict=False):
                of.append(one)
    return found


def _speech(config: Config, books: dict[str, str], pieces: Pieces) -> dict[str, Any]:
    texts = list(books.values())
    recognizer = speech.load(config.speech, config.recordings, texts, pieces.report)
    chosen = speech_settings(config)
    exact = pieces.get(f"speech, {EXACT}", lambda: speech.heard(recognizer, None))
    heard = {
        title: pieces.get(
            f"speech, {title}",
            lambda options=options: speech.heard(recognizer, options, exact),
        )
        for title, options in chosen.items()
    }
    seconds = pieces.get(
        "speech, seconds",
        lambda: speech.encoder_seconds(recognizer, {EXACT: None, **chosen}, config.repeats),
    )
    return {"heard": {EXACT: exact, **heard}, "seconds": seconds}


def speech_settings(config: Config) -> dict[str, FavorOptions]:
    """How the encoder attends, by title."""
    return {
        f"{far}, blocks of {window}": FavorOptions(window_size=window, **fields)
        for far, fields in FAR_OF_SPEECH.items()
        for window in config.blocks
    }
