"""The explorer: a local page to look at attention, estimates, costs, runs and generation.

A tab is a file. What it shows comes from `diagnosis`, `theory`, `functional` and the models, and is
drawn by `viz`; a tab asks, and shows. Gradio is imported when the page is built, not before.
"""

from performers.explore.app import build, serve
from performers.explore.subject import Subject, load_subject, sample_subject

__all__ = ["Subject", "build", "load_subject", "sample_subject", "serve"]
