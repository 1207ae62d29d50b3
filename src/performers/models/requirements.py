"""The versions of transformers that the models and conversions work with."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

__all__ = ["TRANSFORMERS", "check_transformers"]

# That of pyproject.toml. A minor version may rename what models are called with, as 5.24 did with
# caches, so none is allowed before the tests have passed with it.
TRANSFORMERS = SpecifierSet(">=5.20,<5.25")


def check_transformers(version: str) -> None:
    """Raise ImportError for a version of transformers that this package does not work with.

    pip can bring such a one later, for another package, and only warns then.
    """
    if not TRANSFORMERS.contains(version, prereleases=True):
        raise ImportError(
            f"performers needs a transformers with {TRANSFORMERS}, and {version} is installed. "
            f"Install another: pip install 'transformers{TRANSFORMERS}'"
        )
