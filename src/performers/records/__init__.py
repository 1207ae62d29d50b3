"""What a measurement writes down: on what it was made, tables, blocks of documents."""

from performers.records.documents import with_block, write_block
from performers.records.environment import PeakMemory, describe_environment, resident_bytes
from performers.records.files import (
    DamagedFileError,
    UnsavedError,
    holding,
    read_json,
    read_text,
    replace_text,
    writing,
)
from performers.records.progress import TimeLeft
from performers.records.tables import aligned, markdown_table

__all__ = [
    "DamagedFileError",
    "PeakMemory",
    "TimeLeft",
    "UnsavedError",
    "aligned",
    "describe_environment",
    "holding",
    "markdown_table",
    "read_json",
    "read_text",
    "replace_text",
    "resident_bytes",
    "with_block",
    "write_block",
    "writing",
]
