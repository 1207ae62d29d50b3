"""A run as a YAML file that a person can read: `RunConfig` and how it is loaded.

    task: masked-lm                  # predict hidden residues; causal-lm predicts the next one
    data: {source: sample, length: 256}
    model: {hidden_size: 128, num_hidden_layers: 2, attention: performer-relu}
    trainer: {max_steps: 500, learning_rate: 1e-3}
    compare: [exact]                 # the same run again with exact attention

`max_seconds: 100` instead of `max_steps` trains every model for the same time.

Keys under `model` are those of `PerformerConfig`, keys under `trainer` those of transformers'
`TrainingArguments`. Every key is checked against those classes before anything else happens.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig, TrainingArguments

from performers.checks import check_choice, check_count, check_number, check_seed, described
from performers.models import MECHANISMS, PerformerConfig
from performers.models.mechanisms import in_current_words
from performers.models.mixes import attention_words
from performers.train.clock import SCHEDULES
from performers.train.data import DataConfig, StreamConfig, check_text, checked_stream
from performers.train.options import REFUSED_OPTIONS, TRAINER_OPTIONS, Served
from performers.train.overrides import take_out_replaced
from performers.train.pretrained import PretrainedConfig, checked_start, resolved

__all__ = ["TASKS", "RunConfig", "load_config", "read_yaml", "shipped_configs"]

CONFIGS = Path(__file__).parent / "configs"

TASKS = ("masked-lm", "causal-lm")

# Keys that a run does not leave open, with what to do instead.
SET_BY_THE_RUN = {
    "model": {
        **dict.fromkeys(
            (entry.name for entry in dataclasses.fields(PreTrainedConfig)),
            "it is transformers', and says nothing about a Performer",
        ),
        "dtype": "weights learn in float32, and trainer.bf16=true multiplies in bfloat16",
        "vocab_size": "the vocabulary is that of the amino acids",
        "pad_token_id": "it is the vocabulary's",
        "bos_token_id": "it is the vocabulary's",
        "eos_token_id": "it is the vocabulary's",
        "is_decoder": "write task: causal-lm",
        "seed": "write seed at the top level",
        **dict.fromkeys(
            ("num_decoder_layers", "decoder_start_token_id", "cross_attention"),
            "it is of encoder-decoders, which no task trains",
        ),
        "image_shape": "proteins are no images",
    },
    "trainer": REFUSED_OPTIONS,
}

# The paper's hyperparameters (Appendix A.2). Its Adam decays weights apart from the gradient, which
# PyTorch calls AdamW, and its learning rate is fixed.
PAPER_ARGUMENTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0.0,
    "optim": "adamw_torch",
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-9,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
}

# Two checkpoints at least: while one is being written, the one before it is the only whole one.
RUN_ARGUMENTS: dict[str, Any] = {
    "logging_steps": 50.0,
    "eval_strategy": "steps",
    "eval_steps": 500.0,
    "save_steps": 500.0,
    "save_total_limit": 2,
}


@dataclass(frozen=True)
class RunConfig:
    """One training run and what it is compared with.

    `seed` sets weights, ω, the order of the data, masks and splits.
    `redraw_every`: draw new random features after so many optimizer steps; 0 never.
    `compare`: mechanisms trained once more on the same batches in the same order, from the same
    seed, for as many steps or for the same time.
    `max_seconds`: train for this time, of the optimizer steps alone (see `TrainingClock`), in the
    place of trainer.max_steps. The learning rate then rises and falls with the time that is used:
    trainer.warmup_steps is a share of it, and trainer.logging_steps, eval_steps and save_steps may
    be. How many steps fit into this time depends on the machine, so such a run cannot be repeated
    bit by bit, and neither can a resumed one, which uses the time that was left at its last
    checkpoint.
    `shard_weights`: each of several processes keeps a share of the weights, of their gradients and
    of what the optimizer remembers (FSDP2), and not all of them.
    `shard_heads`, `split_sequences`: so many processes share the heads of each layer, or the tokens
    of each sequence (see `Layout`). The numbers are the same.
    `pretrained`: in the place of `model`, a model folder to start from.
    """

    task: str = "masked-lm"
    seed: int = 0
    redraw_every: int = 1000
    compare: list[str] = field(default_factory=list)
    max_seconds: float | None = None
    shard_weights: bool = False
    shard_heads: int = 1
    split_sequences: int = 1
    data: DataConfig = field(default_factory=DataConfig)
    pretrained: PretrainedConfig | None = None
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    @property
    def attention(self) -> str:
        """The mechanism of the run's own model, or a mix in words."""
        if self.pretrained is not None:
            return f"performer-{self.pretrained.favor.features}"
        return attention_words(self.model["attention"])

    def with_attention(self, attention: str) -> RunConfig:
        """The same run with another mechanism, without the fields that only the first one takes."""
        if attention == self.attention and attention not in MECHANISMS:
            return self  # a mix
        if self.pretrained is not None:
            return self  # no other is trained
        model = {**self.model, "attention": attention}
        if attention != self.attention:
            model.pop("attention_options", None)
            if not MECHANISMS[attention].takes_window:
                model.pop("window_size", None)
        return dataclasses.replace(self, model=model)

    @property
    def laid_out_plainly(self) -> RunConfig:
        """The same run with a whole model in each process."""
        return dataclasses.replace(self, shard_weights=False, shard_heads=1, split_sequences=1)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=100)


def shipped_configs() -> dict[str, str]:
    """Name → first comment line of every config that ships with the package."""
    return {
        path.stem: path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        for path in sorted(CONFIGS.glob("*.yaml"))
    }


def load_config(config: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """The run that a YAML file (a path, or the name of a shipped one) and overrides describe.

    `overrides`: `key=value` with dotted keys; values are read as YAML. One of model.attention also
    takes out the file's window_size where the mechanism has none, and one that says how long to
    train the file's other words for it: max_seconds, trainer.max_steps or num_train_epochs. So one
    of pretrained.model takes out the sections model and compare, one of data.text the proteins.

    Raises FileNotFoundError for a config that is not there, ValueError for a key or a value that
    has no meaning.

    >>> load_config("demo", ["max_seconds=7"]).max_seconds
    7.0
    """
    path = _find(config)
    tree = read_yaml(path)
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path} must be a YAML mapping such as 'task: masked-lm', got {type(tree).__name__}."
        )
    changes = list(overrides)
    for override in changes:
        _apply(tree, override)
    take_out_replaced(tree, {override.partition("=")[0].strip() for override in changes})
    return _checked(tree, str(path))


def read_yaml(path: Path) -> Any:
    """What a YAML file says. Raises ValueError, naming the file, for one that is not YAML."""
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise ValueError(f"{path} must be a YAML file: {where}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _parse(text: str) -> Any:
    """The value of a YAML text in which no mapping has a key twice: YAML would take the last.

    Raises yaml.YAMLError, and ValueError for what is YAML and is refused.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_keys_differ(node)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(
            "a YAML text must not be nested deeper than its reader can follow. A config has two "
            "levels: sections, and their keys."
        ) from None
    finally:
        loader.dispose()


def _check_keys_differ(root: yaml.Node) -> None:
    seen: set[int] = set()  # an alias is its anchor's node, which may even hold itself
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
            continue
        lines: dict[str, int] = {}
        for key, value in node.value:
            waiting += [key, value]
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                raise ValueError(
                    f"a key must be given once, and {described(key.value)} is given in line "
                    f"{lines[key.value]} and in line {line}. Take one of the two away."
                )
            lines[key.value] = line


def _find(config: str | Path) -> Path:
    path = Path(config)
    if path.is_file():
        return path
    shipped = CONFIGS / f"{config}.yaml"
    if path.suffix in {"", ".yaml"} and shipped.is_file():
        return shipped
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(
            f"there is no config file {config}. Shipped configs, by name: "
            f"{', '.join(shipped_configs())}."
        )
    check_choice("config", str(config), shipped_configs())
    raise AssertionError("an unknown name has been refused")


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one dotted key of the tree to one value."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(
            f"an override must be key=value, as trainer.max_steps=100: got {described(override)}."
        )
    *parents, last = key.strip().split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise ValueError(
                f"{described(override)} sets a key inside {described(parent)}, which holds one "
                "value."
            )
    try:
        tree[last] = _parse(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"the value in {described(override)} must be YAML: {error}") from error


def _checked(tree: Mapping[str, Any], source: str) -> RunConfig:
    top = _section(RunConfig, tree, "", source)
    given = _section(DataConfig, top.get("data", {}), "data", source)
    if given.get("stream") is not None:
        stream = _section(StreamConfig, given["stream"], "data.stream", source)
        given["stream"] = checked_stream(stream, given)
    data = DataConfig(**given)
    start = top.get("pretrained")
    if start is not None:
        start = checked_start(_section(PretrainedConfig, start, "pretrained", source), top)
    model = top.get("model", {})
    if start is None and isinstance(model, Mapping):
        model = in_current_words({"attention": PerformerConfig.attention, **model})
    model = _section(PerformerConfig, model, "model", source)
    trainer = _section(TrainingArguments, top.get("trainer", {}), "trainer", source)
    trainer = {**PAPER_ARGUMENTS, **RUN_ARGUMENTS, **trainer}
    compare = [
        in_current_words({"attention": word})["attention"] for word in top.get("compare", ())
    ]
    parts = {"compare": compare, "data": data, "model": model, "trainer": trainer}
    parts["pretrained"] = start
    config = RunConfig(**{**top, **parts})
    check_choice("task", config.task, TASKS)
    for attention in config.compare:
        check_choice("attention in compare", attention, MECHANISMS)
    check_seed(config.seed)
    check_text(config.data)
    if start is not None:
        start = resolved(start, config.task, config.seed, config.data)
        config = dataclasses.replace(config, pretrained=start)
    check_count("shard_heads", config.shard_heads)
    check_count("split_sequences", config.split_sequences)
    if config.redraw_every < 0:
        raise ValueError(f"redraw_every must be at least 0 (0 = never), got {config.redraw_every}.")
    if not config.data.source:
        raise ValueError(
            "data.source must be sample, or FASTA files: a path or a list of them, got none."
        )
    if config.data.length < 2:
        raise ValueError(f"data.length must be at least 2, got {config.data.length}.")
    if not config.data.valid_fraction > 0 and data.stream is None:
        raise ValueError("data.valid_fraction must be above 0: the curves of a run need a set.")
    if config.max_seconds is not None:
        _check_time(config.max_seconds, trainer)
    elif data.stream is not None and "max_steps" not in trainer:
        raise ValueError(
            "a stream has no end, so a run on data.stream must say its own: set trainer.max_steps, "
            "or max_seconds."
        )
    return config


def _check_time(max_seconds: float, trainer: Mapping[str, Any]) -> None:
    """Refuse settings that have no meaning in a run with a limit of time."""
    check_number("max_seconds", max_seconds)
    for key in ("max_steps", "num_train_epochs", "lr_scheduler_kwargs"):
        if trainer.get(key) is not None:
            raise ValueError(
                f"max_seconds says how long the run is and trainer.{key} counts in steps: leave "
                "one of the two out."
            )
    if not 0 <= trainer["warmup_steps"] < 1:
        raise ValueError(
            "trainer.warmup_steps must be below 1 beside max_seconds, the share of the time in "
            f"which the learning rate rises, got {described(trainer['warmup_steps'])}."
        )
    check_choice("trainer.lr_scheduler_type", trainer["lr_scheduler_type"], SCHEDULES)


def _section(owner: type, given: object, name: str, source: str) -> dict[str, Any]:
    """The keys of one section, each known to `owner` and of its type."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} in {source} must be a mapping of keys, got {described(given)}.")
    known = {entry.name for entry in dataclasses.fields(owner)}
    checked = {}
    for key, value in given.items():
        dotted = f"{name}.{key}" if name else str(key)
        if key in SET_BY_THE_RUN.get(name, {}):
            raise ValueError(f"{dotted} is not to be set: {SET_BY_THE_RUN[name][key]}.")
        if key not in known:
            near = difflib.get_close_matches(str(key), known - SET_BY_THE_RUN.get(name, {}).keys())
            hint = f"Did you mean {near[0]!r}?" if near else f"See the fields of {owner.__name__}."
            raise ValueError(f"unknown key {described(dotted)} in {source}. {hint}")
        row = TRAINER_OPTIONS.get(key) if name == "trainer" else None
        if value is False and isinstance(row, Served) and "no" in row.words:
            value = "no"  # as YAML reads it without quotes
        checked[str(key)] = _typed(value, _annotation(owner, key), dotted)
        if isinstance(row, Served):
            row.check(dotted, checked[key])
    return checked


def _annotation(owner: type, key: str) -> Any:
    """The declared type of one field, read in the module that declares it."""
    base = next(base for base in owner.__mro__ if key in inspect.get_annotations(base))
    declared = types.SimpleNamespace(__annotations__={key: inspect.get_annotations(base)[key]})
    return typing.get_type_hints(declared, vars(sys.modules[base.__module__]))[key]


# What a person writes for a value of each type.
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    list: "a list",
    dict: "a mapping of keys",
    type(None): "null",
}


def _typed(value: object, annotation: Any, key: str) -> Any:
    """`value` as what the annotation asks for, or an error that names the key.

    YAML reads 1e-3 as a string and 1 as an integer where a float is meant; both are converted.
    Annotations beyond plain values (enumerations, nested options) are left to their owner.
    """
    if typing.get_origin(annotation) in {typing.Union, types.UnionType}:
        options = typing.get_args(annotation)
    else:
        options = (annotation,)
    plain = [typing.get_origin(option) or option for option in options]
    for option in plain:
        if option is type(None) and value is None:
            return None
        if isinstance(option, type) and type(value) is option:
            if isinstance(value, list) and not all(isinstance(item, str) for item in value):
                raise ValueError(f"{key} must be a list of words, got {described(value)}.")
            return value
    if float in plain and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if set(plain) <= WORDS.keys():
        expected = " or ".join(WORDS[option] for option in plain)
        raise ValueError(f"{key} must be {expected}, got {described(value)}.")
    return value
