"""What attention costs on this machine, in time and memory, beside the alternatives."""

from performers.benchmark.attention import Plan, run
from performers.benchmark.model import peak_of_step, seconds_of_step
from performers.benchmark.summary import crossover, wins_from

__all__ = ["Plan", "crossover", "peak_of_step", "run", "seconds_of_step", "wins_from"]
