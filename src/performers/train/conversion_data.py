"""What a conversion reads: the task of its model, and text to train on, choose by and report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from performers.convert.sequences import Sequences
from performers.convert.source import check_source_weights, source_config, source_tokenizer
from performers.data.files import read_texts
from performers.nn.words import SHARP
from performers.theory import cheaper_from
from performers.train.conversion_config import ConversionConfig
from performers.train.fine_tuning import FineTuningTask, fine_tuning_task

__all__ = ["ConversionData"]

# Measuring these costs about as much as two steps of training at the default batch size.
MOST_HELD_OUT = 16

# The fewest sequences with which there is something to calibrate on, to train on and to hold out.
FEWEST_SEQUENCES = 4


@dataclass(frozen=True)
class ConversionData:
    """The last tenth of a running text is held out, and the tenth before it is for validation, at
    most 16 sequences of each. Records are shuffled first.

    `warnings`: what is worth knowing before the work.
    """

    task: FineTuningTask
    tokenizer: Any
    train: Sequences
    validation: Sequences
    held_out: Sequences
    warnings: tuple[str, ...]

    @classmethod
    def read(cls, config: ConversionConfig) -> ConversionData:
        """Read the text. The weights of the model are not touched.

        Raises ValueError or OSError for a model, text or number that cannot be used.
        """
        texts = read_texts(config.text, config.text_format, config.columns)
        model = source_config(config.model)
        task = fine_tuning_task(model)
        tokenizer = source_tokenizer(config.model)
        longest = getattr(model, "max_position_embeddings", None) or tokenizer.model_max_length
        longest = min(longest, tokenizer.model_max_length)
        if config.length > longest:
            raise ValueError(
                f"length must be at most {longest} for this model, got {config.length}."
            )
        layers = getattr(model, "num_hidden_layers", None)
        if layers is not None and config.exact_layers >= layers:
            raise ValueError(
                f"exact_layers must leave a layer to convert: this model has {layers}, and "
                f"{config.exact_layers} would stay exact."
            )
        has_types = getattr(model, "type_vocab_size", 0) > 1
        found = Sequences.of(tokenizer, texts, config.length, has_types)
        what = "sequences of " + ("" if isinstance(texts, str) else "at most ")
        if len(found) < FEWEST_SEQUENCES:
            raise ValueError(
                f"the text must have at least {FEWEST_SEQUENCES} {what}{config.length} tokens, and "
                f"better hundreds: {config.text} has {len(found)}. Give a longer text or a smaller "
                "length."
            )
        _check_blocks(config, int(found.lengths.max()))
        check_source_weights(config.model)
        generator = torch.Generator().manual_seed(config.seed)
        if not isinstance(texts, str):  # which may be sorted
            found = found[torch.randperm(len(found), generator=generator)]
        count = min(max(1, len(found) // 10), MOST_HELD_OUT)
        train, held_out = found[: -2 * count], found[-count:]
        validation = found[-2 * count : -count]
        order = torch.randperm(len(train), generator=generator)
        warnings = _warnings(config, model, task, longest)
        return cls(task, tokenizer, train[order], validation, held_out, warnings)


def _check_blocks(config: ConversionConfig, longest: int) -> None:
    """Refuse sequences in which every key is near: there is nothing to choose or to measure."""
    window = config.options.window_size
    if window and config.error is None and longest <= 2 * window:
        raise ValueError(
            f"a sequence must be longer than two blocks, {2 * window} tokens with a window of "
            f"{window}, or attention is exact: the longest of {config.text} has {longest}. Give "
            f"longer ones, with a length of {2 * window + 1} or more, or a smaller window."
        )


def _warnings(
    config: ConversionConfig, model: PreTrainedConfig, task: FineTuningTask, longest: int
) -> tuple[str, ...]:
    """What is worth knowing before the work: whether this setting ever saves an operation."""
    options = config.options
    heads, width = (getattr(model, name, None) for name in ("num_attention_heads", "hidden_size"))
    dim = getattr(model, "head_dim", None) or (heads and width and width // heads)
    if config.error is not None or not dim:
        return ()
    near = options.near_field()
    first = cheaper_from(
        dim,
        options.num_projections if near.get("far", True) else 0,
        near.get("window_size"),
        near.get("num_sinks", 0),
        task.name == "causal-lm",
        options.features == SHARP,
        near.get("num_heavy", 0),
    )
    if first <= longest:
        return ()
    return (
        f"warning: this setting needs fewer operations than exact attention from {first} tokens "
        f"on, and the model reads at most {longest}. Choose a smaller window or fewer projections, "
        "or keep exact attention.",
    )
