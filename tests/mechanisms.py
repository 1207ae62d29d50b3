"""What the tests know of the attention mechanisms in the registry, and one of each kind of them."""

from typing import NamedTuple

from performers.functional import KERNELS
from performers.models import MECHANISMS, PerformerConfig
from performers.nn.estimators import ESTIMATORS

TABLES = {"kernels": KERNELS, "estimators": ESTIMATORS}


class Baseline(NamedTuple):
    """A row of the suites for a mechanism of `performers.baselines`.

    `options`: small enough to matter in sequences of about ten tokens.
    `is_average`: whether outputs are averages of the values, with weights that sum to 1.
    `unread`: the projections of a layer that it does not read, and which so get no gradient.
    """

    options: dict[str, object]
    is_average: bool = True
    unread: tuple[str, ...] = ()

    def config(self, name: str) -> dict[str, object]:
        return {"attention": name, "attention_options": self.options}


BASELINES: dict[str, Baseline] = {
    "identity": Baseline({}, unread=("q_proj", "k_proj")),
    "linear-transformer": Baseline({}),
    "local": Baseline({"window_size": 3}),
    "sparse-transformer": Baseline({"stride": 3}),
    "longformer": Baseline({"window_size": 2, "num_global": 3}),
    "big-bird": Baseline({"block_size": 2, "num_random_blocks": 1}),
    "linformer": Baseline({"num_projections": 5}, is_average=False),
    "synthesizer": Baseline({"hidden_size": 7}, unread=("k_proj",)),
    "sinkhorn": Baseline({"block_size": 3, "hidden_size": 7}),
    "routing-transformer": Baseline({"num_clusters": 3, "chunk_size": 2}),
    "clustered-favor": Baseline({"num_clusters": 2}),
    "reformer": Baseline({"num_hashes": 2, "num_buckets": 4, "chunk_size": 3}, unread=("k_proj",)),
}
EVERY: dict[str, dict[str, object]] = {
    name: BASELINES[name].config(name) if name in BASELINES else {"attention": name}
    for name in MECHANISMS
}


def unread(config: PerformerConfig) -> tuple[str, ...]:
    """The projections of a layer that its mechanism does not read."""
    row = BASELINES.get(config.attention)
    return row.unread if row else ()


def is_average(config: PerformerConfig) -> bool:
    """Whether the rows of its mechanism's matrix sum to 1."""
    row = BASELINES.get(config.attention)
    return row is None or row.is_average


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
    **{name: EVERY[name] for name in _one_of_each_kind()},
    "window": {"attention": "performer-positive", "window_size": 3},
    "without omega": {"attention": "performer-elu+1", "projection": None},
}
CAUSAL_KINDS = {name: options for name, options in KINDS.items() if _serves_causal(options)}
