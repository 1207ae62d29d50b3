"""What a step of training needs of each device: memory, operations, communication."""

from performers.planning.layouts import LAYOUTS, Plan, largest_batch, plan
from performers.planning.tables import plan_layouts, plan_words
from performers.planning.workload import Workload, workload_of

__all__ = [
    "LAYOUTS",
    "Plan",
    "Workload",
    "largest_batch",
    "plan",
    "plan_layouts",
    "plan_words",
    "workload_of",
]
