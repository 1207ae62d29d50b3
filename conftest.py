"""What every test gets: no network, reproducible draws, a way to run code in a fresh process.

At the root, because the examples in the docstrings of src/ are tests as well.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import checks
import hypothesis
import jaxtyping
import pytest
import torch

# Read when transformers is imported: a test that asks a hub for something fails at once.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

# Read when triton is imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from packaging.version import Version
from transformers import PreTrainedConfig, __version__

# transformers makes every configuration a dataclass, yet calls it with keywords that are no fields.
# jaxtyping would refuse these; this mark, which subclasses inherit, exempts their constructors.
PreTrainedConfig.__no_type_check__ = True

# The tests say activation checkpointing, which had another name before.
if Version(__version__) < Version("5.23"):
    from transformers import PreTrainedModel as Model

    Model.activation_checkpointing_enable = Model.gradient_checkpointing_enable
    Model.activation_checkpointing_disable = Model.gradient_checkpointing_disable
    Model.is_activation_checkpointing = Model.is_gradient_checkpointing

# Before the package is imported.
checks.install()

# The machine may be busy: how long an example takes is no reason to fail.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
# `make fuzz` looks for new examples each time, and for many.
hypothesis.settings.register_profile(
    "fuzz", deadline=None, max_examples=2000, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test draws the same numbers alone and in company."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _checked_anew() -> None:
    """Each test has all of its kinds of calls checked."""
    checks.forget()


@pytest.fixture
def without_shape_checks() -> Iterator[None]:
    """Call the package as its users do, without jaxtyping's checks around every function.

    For tests of our own error messages, which jaxtyping would forestall with its own:

        @pytest.mark.usefixtures("without_shape_checks")
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def fresh_python() -> Callable[..., str]:
    """Run code in a new interpreter and return what it prints; a failure shows its traceback.

    Modules named in `blocked` cannot be imported there, as if they were not installed. Where torch
    may be imported already, `warm_python` of tests/warm.py does the same in less time.
    """

    def run(code: str, blocked: Sequence[str] = ()) -> str:
        block = "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
        done = subprocess.run(
            [sys.executable, "-c", f"import sys\n{block}{code}"], capture_output=True, text=True
        )
        assert done.returncode == 0, f"the fresh process failed:\n{done.stderr}"
        return done.stdout.strip()

    return run
