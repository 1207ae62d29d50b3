"""Measure what other libraries' conventions do, and write it into docs/migration.md.

python docs/measure_migration.py

Their conventions are those of `performers.nn.Dialect`, which the tests hold to be theirs.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from performers import SoftmaxFeatures, draw_projection
from performers.functional import implied_matrix, positive_features
from performers.nn import Dialect, DialectFavor
from performers.records import describe_environment, markdown_table, write_block

DOCUMENT = Path(__file__).with_name("migration.md")
BLOCK = "results:migration"
RESULTS = DOCUMENT.with_suffix(".json")

DIALECTS = {"there": Dialect(feature_epsilon=1e-4, padding_counts=True), "here": Dialect()}
DIM, NUM_PROJECTIONS, LENGTH = 64, 266, 512  # the first two are performer-pytorch's defaults
SIGN_DIM, NORMS, PADDING = 8, (0.5, 1.0, 2.0), (0.5, 0.9)


def measure(draws: int = 20_000, length: int = LENGTH, heads: int = 8) -> dict[str, Any]:
    """All of it, by the line of the table and by "there" or "here"."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, heads, length, DIM).unbind()
    return {
        "signs": {
            "there": _estimate(draws, has_signs=False),
            "here": _estimate(draws, has_signs=True),
        },
        "uniform": {
            str(norm): {
                "exact": _unevenness((norm * query @ (norm * key).mT * DIM**-0.5).softmax(dim=-1)),
                **{side: _unevenness(_matrix(side, norm * query, norm * key)) for side in DIALECTS},
            }
            for norm in NORMS
        },
        "future": {side: _leak(side, query, key, value) for side in DIALECTS},
        "padding": {
            str(share): {side: _shrinking(side, share, query, key, value) for side in DIALECTS}
            for share in PADDING
        },
    }


def _estimate(draws: int, has_signs: bool) -> dict[str, float]:
    """The estimate of exp(x·x) by its truth, x = (1, …, 1)/√dim, with its standard error.

    Without signs ω is the orthogonal factor of QR as it comes, times norms: where the factorization
    is by reflections, the numbers on its diagonal are negative more often than not, the first
    always.
    """
    x = torch.full((1, SIGN_DIM), SIGN_DIM**-0.5)
    ratios = []
    for _ in range(draws):
        if has_signs:
            omega = draw_projection(SIGN_DIM, SIGN_DIM)
        else:
            norms = torch.randn(SIGN_DIM, SIGN_DIM).norm(dim=1, keepdim=True)
            omega = norms * torch.linalg.qr(torch.randn(SIGN_DIM, SIGN_DIM)).Q.mT
        phi = positive_features(x, omega).dense()
        ratios.append((phi @ phi.mT / x.square().sum().exp()).item())
    found = torch.tensor(ratios)
    return {"mean": found.mean().item(), "error": (found.std() / draws**0.5).item()}


def _attend(side: str) -> DialectFavor:
    return DialectFavor(SoftmaxFeatures(DIM, NUM_PROJECTIONS), DIALECTS[side])


def _matrix(side: str, query: Tensor, key: Tensor) -> Tensor:
    attend = _attend(side)
    return implied_matrix(lambda value: attend(query, key, value), key)


def _unevenness(matrix: Tensor) -> float:
    """Half of Σ_j |A_ij − 1/L|: 0 where all keys weigh alike, 1 where one has everything."""
    return (matrix - 1 / matrix.shape[-1]).abs().sum(dim=-1).mean().item() / 2


def _leak(side: str, query: Tensor, key: Tensor, value: Tensor) -> float:
    """How far earlier outputs move, relative to their norms, if the last key is made 4 times as
    long."""
    later = key.clone()
    later[:, :, -1] *= 4
    before, after = (
        _attend(side)(query, keys, value, is_causal=True)[:, :, :-1] for keys in (key, later)
    )
    return ((after - before).norm() / before.norm()).item()


def _shrinking(side: str, share: float, query: Tensor, key: Tensor, value: Tensor) -> float:
    """The norm of outputs beside so much padding, by that of the same sequence without."""
    real = round(key.shape[2] * (1 - share))
    mask = (torch.arange(key.shape[2]) < real).unsqueeze(0)
    padded = _attend(side)(query, key, value, key_padding_mask=mask)[:, :, :real]
    alone = _attend(side)(query[:, :, :real], key[:, :, :real], value[:, :, :real])
    return (padded.norm() / alone.norm()).item()


def table(record: dict[str, Any]) -> str:
    """A line for each convention, and how it was measured."""
    found, environment = record["results"], record["environment"]
    there, here = (
        f"{found['signs'][side]['mean']:.3f} ± {found['signs'][side]['error']:.3f}"
        for side in ("there", "here")
    )
    rows = [
        ["", "there", "here"],
        [f"estimate of exp(x·x) by its truth, x = (1, …, 1)/√{SIGN_DIM}", there, here],
    ]
    for norm, of in found["uniform"].items():
        exact = f"(exact: {of['exact']:.3f})"
        what = f"distance of attention from uniform, entries of size {norm} {exact}"
        rows.append([what, f"{of['there']:.3f}", f"{of['here']:.3f}"])
    moved = (f"{found['future'][side]:.2g}" for side in ("there", "here"))
    rows.append(["change of earlier outputs if the last key gets 4 times as long", *moved])
    for share, of in found["padding"].items():
        what = f"size of outputs beside {float(share):.0%} padding, by that without padding"
        rows.append([what, f"{of['there']:.2f}", f"{of['here']:.2f}"])
    made = (
        f"Made by `python docs/measure_migration.py` on {environment['processor']}, torch "
        f"{environment['packages']['torch']}: normal queries, keys and values, dim {DIM}, "
        f"{NUM_PROJECTIONS} projections, length {LENGTH}."
    )
    return f"{markdown_table(rows)}\n\n{made}"


if __name__ == "__main__":
    record = {"results": measure(), "environment": describe_environment()}
    RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_block(DOCUMENT, BLOCK, table(record))
