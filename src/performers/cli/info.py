"""`performers info`: what this installation is and can do."""

from __future__ import annotations

from typing import Any

from performers.cli.answers import Answer

__all__ = ["info"]


def info() -> Answer:
    """Print versions, hardware, and the words that configs may use.

    Example:

        performers info
    """
    from performers.backends import BACKENDS
    from performers.functional.projections import DISTRIBUTIONS, PROJECTIONS
    from performers.models import MECHANISMS
    from performers.nn.words import FEATURES
    from performers.records import describe_environment
    from performers.train import shipped_configs

    record = {
        "environment": describe_environment(),
        "backends": {
            "all": list(BACKENDS),
            "bidirectional": _chosen(is_causal=False),
            "causal": _chosen(is_causal=True),
        },
        "attention": list(MECHANISMS),
        "features": list(FEATURES),
        "projections": list(PROJECTIONS),
        "distributions": list(DISTRIBUTIONS),
        "configs": shipped_configs(),
    }
    return Answer(record, _words(record))


def _words(record: dict[str, Any]) -> str:
    """Versions, hardware, and the values that a config or a call may have, as a table."""
    from performers.records import aligned

    environment, backends = record["environment"], record["backends"]
    rows = [
        *environment["packages"].items(),
        ("python", f"{environment['python']} on {environment['system']}"),
        ("processor", f"{environment['processor']}, {environment['cores']} cores"),
        ("accelerators", ", ".join(environment["accelerators"]) or "none"),
        ("threads", f"{environment['threads']} (set OMP_NUM_THREADS to change)"),
        ("backends", ", ".join(backends["all"])),
        ("  bidirectional", backends["bidirectional"]),
        ("  causal", backends["causal"]),
        *(
            (name, ", ".join(record[name]))
            for name in ("attention", "features", "projections", "distributions")
        ),
        ("", ""),
        ("config", "performers train NAME"),
        *record["configs"].items(),
    ]
    return "\n".join(aligned([[name, text] for name, text in rows], right=False))


def _chosen(is_causal: bool) -> str:
    """The backend that softmax features get by default, and why the others are not chosen."""
    import torch

    from performers.backends import Call, choose_backend, refusals
    from performers.nn import SoftmaxFeatures

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.empty(1, 1, 1, 64, device=device)
    phi = SoftmaxFeatures(64).to(device)
    call = Call(
        phi, phi.default_scale, is_causal, normalize=True, near=None, has_state=False, dtype=x.dtype
    )
    name, reasons = choose_backend(None, call, x, x, x), refusals(call, x, x, x)
    others = [f"{other} cannot: {reason}" for other, reason in reasons.items()]
    return "; ".join([name, *others])
