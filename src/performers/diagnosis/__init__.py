"""What linear attention gets wrong on given queries, keys and values, and what less error costs."""

from performers.diagnosis.frontier import Frontier, Setting, measure_frontier
from performers.diagnosis.sequence import (
    COMPARED,
    Diagnosis,
    HeadDiagnosis,
    compare,
    diagnose,
    recommendation,
)

__all__ = [
    "COMPARED",
    "Diagnosis",
    "Frontier",
    "HeadDiagnosis",
    "Setting",
    "compare",
    "diagnose",
    "measure_frontier",
    "recommendation",
]
