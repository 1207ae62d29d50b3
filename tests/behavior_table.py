"""What transformers checks of every model, over ours and over converted ones: the table of it.

    python tests/behavior_table.py

A behavior is a test in tests/behaviors. It holds for a model, or is refused by an error that says
why, and the test proves which. This script reads these tests without running them, and writes what
they claim to behaviors.json and, from there, into docs/behaviors.md.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from performers import FavorOptions, linearize, load_linearized
from performers.models import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForMaskedLM,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
)
from performers.records import write_block

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "behaviors.md"
RESULTS = Path(__file__).with_name("behaviors.json")
BLOCK = "behaviors"
TESTS = Path(__file__).with_name("behaviors")

WORDS, LENGTH = 97, 11
SIZES = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "initializer_range": 0.3}
VISION = {name: size for name, size in SIZES.items() if name != "vocab_size"}
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONVERSION = FavorOptions(num_projections=17, window_size=3, num_sinks=0)


@dataclass(frozen=True)
class Subject:
    """A model under test: its class and the configuration of a tiny one with random weights.

    `classifier`: the class of the same architecture that classifies whole inputs, if there is one.
    `labels`: what it predicts.
    """

    name: str
    model_class: type[PreTrainedModel]
    config: Callable[..., Any]
    is_converted: bool = True
    classifier: type[PreTrainedModel] | None = None
    labels: str = "words"  # or two classes "of tokens" or "of inputs"

    @property
    def generates(self) -> bool:
        return self.model_class.can_generate()

    @property
    def reads_text(self) -> bool:
        return self.model_class.main_input_name == "input_ids"

    def convert(self, model: PreTrainedModel) -> PreTrainedModel:
        return linearize(model, CONVERSION) if self.is_converted else model

    def model(self, **changes: Any) -> PreTrainedModel:
        """In evaluation, converted where that is what is tested."""
        torch.manual_seed(3)
        return self.convert(self.model_class(self.config(**changes))).eval()

    def loaded(self, path: Path, **options: Any) -> PreTrainedModel:
        if self.is_converted:
            return load_linearized(self.model_class, path, **options).eval()
        return self.model_class.from_pretrained(path, **options).eval()

    def inputs(self, batch: int = 3) -> dict[str, Tensor]:
        """Without padding."""
        generator = torch.Generator().manual_seed(5)
        if self.reads_text:
            return {"input_ids": torch.randint(5, WORDS, (batch, LENGTH), generator=generator)}
        return {"pixel_values": torch.randn(batch, 3, 12, 12, generator=generator)}

    def labeled(self, batch: int = 3) -> dict[str, Tensor]:
        inputs = self.inputs(batch)
        if self.labels == "of inputs":
            return inputs | {"labels": torch.arange(batch) % 2}
        words = inputs["input_ids"]
        return inputs | {"labels": words if self.labels == "words" else words % 2}


def _performer(**changes: Any) -> PerformerConfig:
    options = {"attention": "performer-positive", "num_projections": 17, "hidden_dropout_prob": 0.0}
    return PerformerConfig(**SIZES | TOKENS | options | changes)


def _bert(**changes: Any) -> BertConfig:
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertConfig(**SIZES | dropouts | changes)


def _llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**SIZES | TOKENS | {"num_key_value_heads": 2} | changes)


def _gpt2(**changes: Any) -> GPT2Config:
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**GPT2 | TOKENS | dropouts | changes)


def _vit(**changes: Any) -> ViTConfig:
    return ViTConfig(**VISION | {"image_size": 12, "patch_size": 4} | changes)


SUBJECTS = [
    Subject("PerformerForMaskedLM", PerformerForMaskedLM, _performer, is_converted=False),
    Subject("PerformerForCausalLM", PerformerForCausalLM, _performer, is_converted=False),
    Subject(
        "PerformerForSequenceClassification",
        PerformerForSequenceClassification,
        _performer,
        is_converted=False,
        classifier=PerformerForSequenceClassification,
        labels="of inputs",
    ),
    Subject(
        "PerformerForTokenClassification",
        PerformerForTokenClassification,
        _performer,
        is_converted=False,
        labels="of tokens",
    ),
    Subject("BERT", BertForMaskedLM, _bert, classifier=BertForSequenceClassification),
    Subject("Llama", LlamaForCausalLM, _llama, classifier=LlamaForSequenceClassification),
    Subject("GPT-2", GPT2LMHeadModel, _gpt2, classifier=GPT2ForSequenceClassification),
    Subject(
        "ViT",
        ViTForImageClassification,
        _vit,
        classifier=ViTForImageClassification,
        labels="of inputs",
    ),
]
NAMES = [subject.name for subject in SUBJECTS]
OURS = [subject.name for subject in SUBJECTS if not subject.is_converted]
CONVERTED = [subject.name for subject in SUBJECTS if subject.is_converted]
CLASSIFIERS = [subject.name for subject in SUBJECTS if subject.labels != "words"]
GENERATING = [subject.name for subject in SUBJECTS if subject.generates]


class Refused(NamedTuple):
    """`why` goes into the table; the error is of this kind and matches `words`."""

    why: str
    error: type[Exception]
    words: str


class Behavior(NamedTuple):
    says: str
    refused: dict[str, str]
    does_not_apply: dict[str, str]


BEHAVIORS: dict[str, dict[str, Behavior]] = {}


def behavior(
    section: str,
    says: str,
    refused: Mapping[str, Refused] | None = None,
    without: Mapping[str, str] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test of a `subject` one of every model, and its claim a row of the table.

    `refused`: by the name of a model, that the test must end in this error there. `without`: names
    of models to which the behavior does not apply, with the reason.
    """
    refused, without = dict(refused or {}), dict(without or {})
    assert refused.keys() | without.keys() <= set(NAMES), "names of subjects"
    row = Behavior(says, {name: no.why for name, no in refused.items()}, without)
    BEHAVIORS.setdefault(section, {})[says] = row
    subjects = [subject for subject in SUBJECTS if subject.name not in without]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.usefixtures("without_shape_checks")
        @pytest.mark.parametrize("subject", subjects, ids=lambda subject: subject.name)
        @functools.wraps(test)
        def run(subject: Subject, **fixtures: Any) -> None:
            no = refused.get(subject.name)
            if no is None:
                test(subject=subject, **fixtures)
                return
            with pytest.raises(no.error, match=no.words):
                test(subject=subject, **fixtures)

        return run

    return decorate


def claims() -> dict[str, Any]:
    """What the tests in tests/behaviors claim, read by importing them."""
    BEHAVIORS.clear()
    for path in sorted(TESTS.glob("test_*.py")):
        specification = importlib.util.spec_from_file_location(path.stem, path)
        assert specification is not None
        assert specification.loader is not None
        specification.loader.exec_module(importlib.util.module_from_spec(specification))
    return {
        section: {row.says: _cells(row) for row in rows.values()}
        for section, rows in sorted(BEHAVIORS.items())
    }


def _cells(row: Behavior) -> dict[str, str]:
    return {
        name: f"refused: {row.refused[name]}"
        if name in row.refused
        else f"–: {row.does_not_apply[name]}"
        if name in row.does_not_apply
        else "holds"
        for name in NAMES
    }


def table(record: dict[str, Any]) -> str:
    """A table for each section; reasons are notes below it."""
    lines = []
    for section, rows in record.items():
        notes: list[str] = []
        lines += [
            f"## {section}",
            "",
            "| | " + " | ".join(NAMES) + " |",
            "|---" * (len(NAMES) + 1) + "|",
        ]
        for says, cells in rows.items():
            words = []
            for name in NAMES:
                kind, _, why = cells[name].partition(": ")
                if why and why not in notes:
                    notes.append(why)
                words.append(f"{kind} ({notes.index(why) + 1})" if why else kind)
            lines.append(f"| {says} | " + " | ".join(words) + " |")
        lines += ["", *(f"{number}. {why}." for number, why in enumerate(notes, 1)), ""]
    return "\n".join(lines)


def main() -> None:
    record = claims()
    RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_block(DOCUMENT, BLOCK, table(record))


if __name__ == "__main__":
    import behavior_table  # as the tests import it, so that they register with that module

    behavior_table.main()
