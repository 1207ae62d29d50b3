"""Write the results of the demo into README.md, from the numbers that the run left.

performers train demo --output runs/demo
cp runs/demo/metrics.json experiments/demo/results.json
python experiments/demo/write_table.py
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("results.json")
BLOCK = re.compile(r"(<!-- results:demo -->\n).*?(<!-- /results:demo -->)", re.DOTALL)


def table(metrics: dict[str, Any]) -> str:
    """What each model saw, reached and took, beside the empirical baseline, and how."""
    header = ["", "tokens seen", "accuracy", "bits per character", "peak memory"]
    rows = []
    for model in metrics["models"]:
        memory = f"{model['peak_memory'] / 2**20:.0f} MiB"
        name, scores = f"`{model['attention']}`", _scores(model["metrics"]["valid"])
        rows.append([name, f"{model['tokens']:,}", *scores, memory])
    rows.append(["empirical baseline", "", *_scores(metrics["baseline"]["valid"]), ""])
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", _made(metrics)])


def _scores(scores: dict[str, float]) -> list[str]:
    return [f"{scores['accuracy']:.2%}", f"{scores['bits_per_character']:.3f}"]


def _made(metrics: dict[str, Any]) -> str:
    environment, data, config = metrics["environment"], metrics["data"], metrics["config"]
    versions = environment["packages"]
    steps = [f"{model['steps']:,}" for model in metrics["models"]]
    facts = [
        f"Made by `performers train demo` on {metrics['created'][:10]}",
        f"{config['max_seconds']:.0f} s of training each ({', '.join(steps)} optimizer steps)",
        f"{metrics['models'][0]['parameters']:,} parameters",
        f"seed {config['seed']}",
        f"windows of {config['data']['length']:,} tokens, {data['train_sequences']:,} to train on "
        f"and {data['splits']['valid']['sequences']:,} to validate",
        f"{environment['processor']}, {environment['threads']} of {environment['cores']} cores",
        f"torch {versions['torch']}, transformers {versions['transformers']}",
    ]
    return "; ".join(facts) + "."


def with_table(document: str, metrics: dict[str, Any]) -> str:
    """The document with a fresh table between its `results:demo` comments."""
    text, count = BLOCK.subn(lambda found: f"{found[1]}{table(metrics)}\n{found[2]}", document)
    if count != 1:
        raise ValueError(
            "the document must have one block between <!-- results:demo --> and "
            f"<!-- /results:demo -->, found {count}."
        )
    return text


def main() -> None:
    readme = ROOT / "README.md"
    metrics = json.loads(RESULTS.read_text(encoding="utf-8"))
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), metrics), encoding="utf-8")


if __name__ == "__main__":
    main()
