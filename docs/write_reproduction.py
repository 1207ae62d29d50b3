"""Write docs/reproduction.md: the paper's claims in order, with what the experiments here found.

python docs/write_reproduction.py
"""

import json
from pathlib import Path
from typing import Any

from performers.records import markdown_table, write_block
from performers.reproduction.claims import CLAIMS

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "reproduction.md"
BLOCK = "results:reproduction"


def _records(experiment: str) -> list[Path]:
    """Its numbers, those of the paper's scale first."""
    folder = ROOT / "experiments" / experiment
    paths = [folder / f"{scale}.json" for scale in ("paper", "reduced")]
    return [path for path in paths if path.exists()]


RESULTS = {claim.experiment: _records(claim.experiment)[0] for claim in CLAIMS}


def table(results: dict[str, Any]) -> str:
    lines = [["in the paper", "what it says", "here", "what was found", "experiment"]]
    for claim in CLAIMS:
        record = results[claim.experiment]
        verdict, found = claim.find(record["results"])
        link = _link(claim.experiment, record["scale"])
        lines.append([claim.where, claim.says, f"**{verdict}**", found, link])
    return markdown_table(lines, of_words=True)


def _link(name: str, scale: str) -> str:
    return f"[{name}](../experiments/{name}/README.md), {scale}"


if __name__ == "__main__":
    records = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in RESULTS.items()}
    write_block(DOCUMENT, BLOCK, table(records))
