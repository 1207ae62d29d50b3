"""What a conversion reads: the task of its model, and text to train on, choose by and report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from performers.convert.sequences import Sequences
from performers.convert.source import check_source_weights, source_config, source_tokenizer
from performers.data.files import read_texts
from performers.theory import cheaper_from
from performers.train.conversion_choices import Size
from performers.train.conversion_config import ConversionConfig
from performers.train.fine_tuning_task import FineTuningTask, fine_tuning_task

__all__ = ["ConversionData"]

# Measuring these costs about as much as two steps of training at the default batch size.
MOST_HELD_OUT, MOST_TOKENS = 16, 8192

# The fewest sequences with which there is something to calibrate on, to train on and to hold out.
FEWEST_SEQUENCES = 4


@dataclass(frozen=True)
class ConversionData:
    """The last tenth of a running text is held out, and the tenth before it is for validation, at
    most 16 sequences of each, and of long ones fewer. Records are shuffled first.

    `size`: of a sequence; None where the dim of heads is not known.
    `warnings`: what is worth knowing before the work.
    """

    task: FineTuningTask
    tokenizer: Any
    train: Sequences
    validation: Sequences
    held_out: Sequences
    size: Size | None
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
        count = min(len(found) // 10, MOST_HELD_OUT, MOST_TOKENS // config.length)
        count = max(count, 1)
        train, held_out = found[: -2 * count], found[-count:]
        validation = found[-2 * count : -count]
        order = torch.randperm(len(train), generator=generator)
        warnings = _warnings(config, _size(task, model, longest))
        size = _size(task, model, config.length)
        return cls(task, tokenizer, train[order], validation, held_out, size, warnings)


def _check_blocks(config: ConversionConfig, longest: int) -> None:
    """Refuse sequences in which every key is near: there is nothing to choose or to measure."""
    window = config.options.window_size
    if window and config.error is None and longest <= 2 * window:
        raise ValueError(
            f"a sequence must be longer than two blocks, {2 * window} tokens with a window of "
            f"{window}, or attention is exact: the longest of {config.text} has {longest}. Give "
            f"longer ones, with a length of {2 * window + 1} or more, or a smaller window."
        )


def _size(task: FineTuningTask, model: PreTrainedConfig, length: int) -> Size | None:
    heads, width = (getattr(model, name, None) for name in ("num_attention_heads", "hidden_size"))
    dim = getattr(model, "head_dim", None) or (heads and width and width // heads)
    return Size(length, dim, task.name == "causal-lm") if dim else None


def _warnings(config: ConversionConfig, size: Size | None) -> tuple[str, ...]:
    """What is worth knowing before the work: whether this setting ever saves an operation.

    `size`: of the longest input.
    """
    if config.error is not None or size is None:
        return ()
    first = cheaper_from(size.dim, **size.setting(config.options))
    if first <= size.length:
        return ()
    return (
        f"warning: this setting needs fewer operations than exact attention from {first} tokens "
        f"on, and the model reads at most {size.length}. Choose a smaller window or fewer "
        "projections, or keep exact attention.",
    )
