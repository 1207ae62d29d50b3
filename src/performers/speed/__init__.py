"""What attention costs on this machine, in time and memory, beside the alternatives."""

from performers.speed.attention import run
from performers.speed.model import peak_of_step, seconds_of_step
from performers.speed.plan import Plan
from performers.speed.summary import crossover, wins_from

__all__ = ["Plan", "crossover", "peak_of_step", "run", "seconds_of_step", "wins_from"]
