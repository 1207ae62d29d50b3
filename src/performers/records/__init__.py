"""What a measurement writes down: on what it was made, tables, blocks of documents."""

from performers.records.environment import PeakMemory, describe_environment

__all__ = ["PeakMemory", "describe_environment"]
