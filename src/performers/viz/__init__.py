"""Figures and reports, drawn from saved numbers alone."""

from performers.viz.figures import attention_figure, curves_figure
from performers.viz.report import write_report

__all__ = ["attention_figure", "curves_figure", "write_report"]
