"""JSON files that were written by a run, which may have been damaged since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["read_json"]


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file. `remedy`: a sentence, what to do about a file that has none.

    Raises FileNotFoundError, and ValueError that names the file.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bytes that are no text are a ValueError too
        raise ValueError(
            f"{path} must be a JSON file, and is damaged: {error}. {remedy}"
        ) from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(tree).__name__}. {remedy}")
    return tree
