"""Checkpoints of other libraries, as models of this one with equal outputs.

Each library is a row of `LIBRARIES` and a file, which knows its names and its conventions.
"""

from performers.migration.importing import LIBRARIES, import_checkpoint

__all__ = ["LIBRARIES", "import_checkpoint"]
