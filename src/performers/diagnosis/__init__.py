"""The error of linear attention on given queries, keys and values, and what less of it costs."""

from performers.diagnosis.comparison import COMPARED, compare, recommendation
from performers.diagnosis.frontier import Frontier, Setting, measure_frontier
from performers.diagnosis.heads import Diagnosis, HeadDiagnosis
from performers.diagnosis.measure import diagnose

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
