"""What `performers info` says about this installation."""

from __future__ import annotations

from performers.backends import BACKENDS, choose_backend
from performers.functional.projections import DISTRIBUTIONS, PROJECTIONS
from performers.models import MECHANISMS
from performers.nn.feature_maps import ESTIMATORS
from performers.train import shipped_configs
from performers.train.environment import describe_environment
from performers.train.tables import aligned

__all__ = ["describe"]


def describe() -> str:
    """Versions, hardware, and every word that a config or a call may use."""
    environment = describe_environment()
    chosen = next(name for name, run in BACKENDS.items() if run is choose_backend(None))
    rows = [
        *environment["packages"].items(),
        ("python", f"{environment['python']} on {environment['system']}"),
        ("processor", f"{environment['processor']}, {environment['cores']} cores"),
        ("accelerators", ", ".join(environment["accelerators"]) or "none"),
        ("threads", f"{environment['threads']} (set OMP_NUM_THREADS to change)"),
        ("backends", f"{', '.join(BACKENDS)}; {chosen} unless named: the fastest that runs here"),
        ("attention", ", ".join(MECHANISMS)),
        ("estimators", ", ".join(ESTIMATORS)),
        ("projections", ", ".join(PROJECTIONS)),
        ("distributions", ", ".join(DISTRIBUTIONS)),
        ("", ""),
        ("config", "performers train NAME"),
        *shipped_configs().items(),
    ]
    return "\n".join(aligned([[name, text] for name, text in rows], right=False))
