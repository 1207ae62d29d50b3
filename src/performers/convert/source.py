"""The pretrained model that is converted or measured: whether it is there, and whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

__all__ = [
    "check_source_weights",
    "missing_model",
    "read_tensors",
    "source_config",
    "source_tokenizer",
]

# What transformers raises for a config.json that it cannot use, or that is not there.
UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, StrictDataclassError)


def source_config(source: str | Path) -> PreTrainedConfig:
    """The configuration of a model folder, or of a model that transformers knows by its name.

    transformers itself would speak of a connection where there is no folder.

    Raises FileNotFoundError where there is no model, ValueError for a config.json that is damaged.
    """
    folder = Path(source)
    try:
        return AutoConfig.from_pretrained(source)
    except UNREADABLE as error:
        path = folder / "config.json"
        if path.is_file():
            words = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} must describe a model of transformers: {words}") from error
        raise missing_model(source) from error


def missing_model(source: str | Path) -> FileNotFoundError:
    """The error to raise where there is no model."""
    return FileNotFoundError(
        f"there is no model {source}: no folder with a config.json, and no name that transformers "
        "can load. Give a folder that save_pretrained wrote."
    )


def check_source_weights(source: str | Path) -> None:
    """Raise FileNotFoundError for a model folder without weights, ValueError where a file is
    damaged. Only the headers are read.
    """
    folder = Path(source)
    weights = sorted(folder.glob("*.safetensors"))
    if folder.is_dir() and not weights and not any(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} must hold the weights of a model, model.safetensors or its parts, and has "
            "none. Give a folder that save_pretrained wrote."
        )
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path} is damaged and cannot be loaded: {error}. Copy or download it again."
            ) from error


def source_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a model.

    Raises ValueError where there is none, for a damaged one, and for one with ids that the model
    has no embedding for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the class that tokenizers raises
        words = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{source} must hold a whole tokenizer, tokenizer.json and tokenizer_config.json or "
            f"their like: {words}. Save the model's own there, with tokenizer.save_pretrained."
        ) from error
    size = getattr(source_config(source).get_text_config(), "vocab_size", len(tokenizer))
    if len(tokenizer) > size:
        raise ValueError(
            f"the tokenizer of {source} has {len(tokenizer)} tokens, and the model embeds {size}. "
            "Save the tokenizer that belongs to it in its folder, or resize its embeddings before."
        )
    return tokenizer


def read_tensors(path: str | Path, remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. `remedy`: a sentence, what to do about another file.

    Raises ValueError that names the file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a safetensors file, and is none or is damaged: {error}. {remedy}"
        ) from error
