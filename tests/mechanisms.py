"""One attention mechanism of each kind in the registry, for the tests that hold for all of them."""

from performers.functional import KERNELS
from performers.models import MECHANISMS, PerformerConfig
from performers.nn.estimators import ESTIMATORS

TABLES = {"kernels": KERNELS, "estimators": ESTIMATORS}


def _one_of_each_kind() -> list[str]:
    """Of the kernels and of the estimators, which one function builds, the first of each."""
    first: dict[str, str] = {}
    for name in MECHANISMS:
        _, _, features = name.partition("performer-")  # none in "identity", also a kernel's name
        kinds = [kind for kind, table in TABLES.items() if features in table]
        first.setdefault(kinds[0] if kinds else name, name)
    return list(first.values())


def _serves_causal(options: dict[str, object]) -> bool:
    """False where a config refuses it; any other error is one."""
    try:
        PerformerConfig(**options, is_decoder=True)
    except ValueError as error:
        if "causal" not in str(error):
            raise
        return False
    return True


# Options of a config by a name for the test.
KINDS: dict[str, dict[str, object]] = {
    **{name: {"attention": name} for name in _one_of_each_kind()},
    "window": {"attention": "performer-positive", "window_size": 3},
    "without omega": {"attention": "performer-elu+1", "projection": None},
}
CAUSAL_KINDS = {name: options for name, options in KINDS.items() if _serves_causal(options)}
