"""Write the results of the demo into README.md, from the numbers that the run left.

performers train demo --output runs/demo
cp runs/demo/metrics.json experiments/demo/results.json
python experiments/demo/write_table.py
"""

import json
from pathlib import Path
from typing import Any

from performers.records import markdown_table, write_block

DOCUMENT = Path(__file__).parents[2] / "README.md"
BLOCK = "results:demo"
RESULTS = Path(__file__).with_name("results.json")


def table(metrics: dict[str, Any]) -> str:
    """What each model saw, reached and took, beside the empirical baseline, and how."""
    memories = {"peak_memory": "peak memory", "resident_memory": "resident"}
    header = ["", "tokens seen", "accuracy", "bits per character", *memories.values()]
    rows = []
    for model in metrics["models"]:
        sizes = [f"{model[name] / 2**20:.0f} MiB" for name in memories]
        name, scores = f"`{model['attention']}`", _scores(model["metrics"]["valid"])
        rows.append([name, f"{model['tokens']:,}", *scores, *sizes])
    baseline = _scores(metrics["baseline"]["valid"])
    rows.append(["empirical baseline", "", *baseline, *[""] * len(memories)])
    return f"{markdown_table([header, *rows])}\n\n{_made(metrics)}"


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


if __name__ == "__main__":
    write_block(DOCUMENT, BLOCK, table(json.loads(RESULTS.read_text(encoding="utf-8"))))
