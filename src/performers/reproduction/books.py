"""Masked language modeling on books, for experiments that compare mechanisms on text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from performers.data.baseline import EmpiricalBaseline
from performers.data.text import (
    encode_text,
    log_likelihood_multiplier,
    paragraphs,
    piece_ids,
    sentences,
    train_vocabulary,
)
from performers.data.tokens import TokenDataset, concatenate_tokens, crop_tokens
from performers.data.vocabulary import PAD_TOKEN_ID
from performers.models import PerformerConfig, PerformerForMaskedLM
from performers.train.config import PAPER_ARGUMENTS, RunConfig
from performers.train.tasks import Task, masked_lm
from performers.train.trainer import TokenTrainer, train_to_the_end

__all__ = ["Books", "evaluations", "model_fields", "transfer_weights"]


@dataclass(frozen=True)
class Books:
    """Sentences or windows of books, one of which is held out, and what to compare with.

    `baseline`: the empirical baseline on `valid`, keys as in `EmpiricalBaseline.evaluate`.
    `multiplier`: tokens per word of the held-out book, see `log_likelihood_multiplier`.
    """

    train: TokenDataset
    valid: TokenDataset
    task: Task
    baseline: dict[str, float]
    multiplier: float

    @classmethod
    def prepare(
        cls,
        texts: Mapping[str, str],
        held_out: str,
        unit: str,
        vocab_size: int,
        length: int,
        num_valid: int,
        seed: int,
    ) -> Books:
        """Train a vocabulary on all books but `held_out`, and tokenize.

        `unit`: "sentences", each `<bos> … <eos>` cropped to `length` tokens, or "windows" of
        `length` tokens of whole paragraphs, each followed by <eos>.
        `num_valid`: how many sentences or windows of the held-out book are scored, drawn by `seed`.

        Raises ValueError if the held-out book is not among `texts` or has fewer.
        """
        if held_out not in texts:
            raise ValueError(f"held_out must be one of {sorted(texts)}, got {held_out!r}.")
        cut, frame = UNITS[unit]
        kept = [part for title, text in texts.items() if title != held_out for part in cut(text)]
        away = cut(texts[held_out])
        tokenizer = train_vocabulary(kept, vocab_size)
        size = tokenizer.get_vocab_size()
        train = frame(encode_text(kept, tokenizer), length, size)
        rows = frame(encode_text(away, tokenizer), length, size)
        if len(rows) < num_valid:
            raise ValueError(
                f"{held_out} must have at least num_valid {unit}: it has {len(rows)} of {length} "
                f"tokens, num_valid is {num_valid}. Choose a smaller number or length."
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        valid = rows.chosen(order[:num_valid].sort().values.tolist())
        task = masked_lm(piece_ids(tokenizer))
        collator = task.evaluation_collator(seed)
        # Every training is scored at the same tokens, whatever its own seed is.
        task = replace(task, evaluation_collator=lambda seed: collator)
        baseline = EmpiricalBaseline.fit(train, collator.scored_token_ids)
        return cls(
            train,
            valid,
            task,
            baseline.evaluate(valid, collator),
            log_likelihood_multiplier(away, tokenizer),
        )

    def train_model(
        self,
        folder: Path,
        model: Mapping[str, Any],
        trainer: Mapping[str, Any],
        seed: int,
        redraw_every: int = 0,
        start_from: PerformerForMaskedLM | None = None,
    ) -> TokenTrainer:
        """Train a masked-lm to its last step; an interrupted training in `folder` is continued.

        `model`: fields of `PerformerConfig`. `trainer`: fields of TrainingArguments beside the
        paper's hyperparameters. `start_from`: weights to begin with, of any mechanism; ω is the new
        model's own.
        """
        config = RunConfig(
            seed=seed,
            redraw_every=redraw_every,
            model=dict(model),
            trainer={**PAPER_ARGUMENTS, "save_total_limit": 2, **trainer},
        )

        def build() -> PerformerForMaskedLM:
            built = self.build_model(model, seed)
            if start_from is not None:
                transfer_weights(start_from, built)
            return built

        return train_to_the_end(config, folder, build, self.train, self.valid, self.task)

    def build_model(self, model: Mapping[str, Any], seed: int) -> PerformerForMaskedLM:
        """A model with new random weights for this vocabulary."""
        return PerformerForMaskedLM(
            PerformerConfig(
                **model, vocab_size=self.train.vocab_size, pad_token_id=PAD_TOKEN_ID, seed=seed
            )
        )


def transfer_weights(source: PerformerForMaskedLM, target: PerformerForMaskedLM) -> None:
    """Copy every weight into a model of another mechanism, whose ω stays as it was drawn.

    Raises ValueError if anything but ω would be left out.
    """
    loaded = target.load_state_dict(_weights(source), strict=False)
    if loaded.unexpected_keys or [n for n in loaded.missing_keys if ".feature_map." not in n]:
        raise ValueError(
            "the models must differ in their mechanism alone: without counterpart are "
            f"{loaded.unexpected_keys + loaded.missing_keys}."
        )


def _weights(model: PerformerForMaskedLM) -> dict[str, torch.Tensor]:
    return {
        name: weight for name, weight in model.state_dict().items() if ".feature_map." not in name
    }


def evaluations(trainer: TokenTrainer) -> list[tuple[int, float, float]]:
    """Step, accuracy and loss of each evaluation while it trained.

    There is one for each step, although with `eval_on_start` a resumed training evaluates its first
    step again.
    """
    log = trainer.state.log_history
    by_step = {entry["step"]: entry for entry in log if "eval_loss" in entry}
    return [(s, entry["eval_accuracy"], entry["eval_loss"]) for s, entry in by_step.items()]


def model_fields(config: Any, mechanism: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `PerformerConfig` from those of an experiment, and those of one mechanism."""
    return {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": 4 * config.hidden_size,
        "hidden_dropout_prob": 0.0,
        "num_projections": config.num_projections,
        **mechanism,
    }


UNITS: dict[str, tuple[Callable[[str], list[str]], Callable[..., TokenDataset]]] = {
    "sentences": (sentences, crop_tokens),
    "windows": (paragraphs, concatenate_tokens),
}
