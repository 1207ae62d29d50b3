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
    """The models of the run beside the empirical baseline, and how the numbers were made."""
    header = ["", "accuracy", "perplexity", "bits per character"]
    header += ["accuracy, families held out", "peak memory"]
    baseline = metrics["baseline"]
    rows = [["empirical baseline", *_scores(baseline), ""]]
    for model in metrics["models"]:
        memory = f"{model['peak_memory'] / 2**20:.0f} MiB"
        rows.append([f"`{model['attention']}`", *_scores(model["metrics"]), memory])
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "", _made(metrics)])


def _scores(metrics: dict[str, dict[str, float]]) -> list[str]:
    valid = metrics["valid"]
    return [
        f"{valid['accuracy']:.2%}",
        f"{valid['perplexity']:.2f}",
        f"{valid['bits_per_character']:.3f}",
        f"{metrics['ood']['accuracy']:.2%}",
    ]


def _made(metrics: dict[str, Any]) -> str:
    environment, data = metrics["environment"], metrics["data"]
    model, versions = metrics["models"][0], environment["packages"]
    facts = [
        f"Made by `performers train demo` on {metrics['created'][:10]}",
        f"{model['steps']} optimizer steps",
        f"{model['parameters']:,} parameters",
        f"seed {metrics['config']['seed']}",
        f"{data['train_sequences']:,} proteins to train on and "
        f"{data['splits']['valid']['sequences']:,} to validate",
        f"at most {metrics['config']['data']['length']} tokens each",
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
