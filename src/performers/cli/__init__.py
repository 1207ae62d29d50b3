"""The `performers` command."""

from performers.cli.app import app, main

__all__ = ["app", "main"]
