"""What `performers info` says about this installation."""

from __future__ import annotations

import torch

from performers.backends import BACKENDS, choose_backend
from performers.functional.projections import DISTRIBUTIONS, PROJECTIONS
from performers.models import MECHANISMS
from performers.nn.feature_maps import ESTIMATORS, SoftmaxFeatures
from performers.train import shipped_configs
from performers.train.environment import describe_environment
from performers.train.tables import aligned

__all__ = ["describe"]


def describe() -> str:
    """Versions, hardware, and every word that a config or a call may use."""
    environment = describe_environment()
    query = torch.empty(1, 1, 1, 64)
    chosen = {
        kind: choose_backend(
            None, query, SoftmaxFeatures(64), is_causal=causal, window_size=None, has_state=False
        )
        for kind, causal in (("bidirectional", False), ("causal", True))
    }
    rows = [
        *environment["packages"].items(),
        ("python", f"{environment['python']} on {environment['system']}"),
        ("processor", f"{environment['processor']}, {environment['cores']} cores"),
        ("accelerators", ", ".join(environment["accelerators"]) or "none"),
        ("threads", f"{environment['threads']} (set OMP_NUM_THREADS to change)"),
        ("backends", ", ".join(BACKENDS)),
        *((f"  {kind}", f"{name}: the fastest that can") for kind, name in chosen.items()),
        ("attention", ", ".join(MECHANISMS)),
        ("estimators", ", ".join(ESTIMATORS)),
        ("projections", ", ".join(PROJECTIONS)),
        ("distributions", ", ".join(DISTRIBUTIONS)),
        ("", ""),
        ("config", "performers train NAME"),
        *shipped_configs().items(),
    ]
    return "\n".join(aligned([[name, text] for name, text in rows], right=False))
