"""Every argument and option of every command reaches what it is for.

`EFFECTS` has a row for each parameter in the tree of commands: a command line that sets it to
something other than its default, and the call that must then be made with that value, as deep in
the package as it can be seen. A parameter without a row fails, and so does a row whose value stops
on the way.
"""

import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import restated
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from typer.main import get_command
from typer.testing import CliRunner

from performers.cli import app
from performers.cli.answers import COMMON_OPTIONS
from performers.data.vocabulary import BOS_TOKEN_ID, EOS_TOKEN_ID, PAD_TOKEN_ID, VOCAB_SIZE
from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM

pytestmark = pytest.mark.usefixtures("without_shape_checks")


class Call(NamedTuple):
    """`line` leads to a call of `place` whose argument is `value`.

    `argument`: its name, dotted for an attribute, or a function of all arguments by their names.
    `instead`: what calls on the way give back in place of long work.
    """

    line: str
    place: str
    argument: str | Callable[[Mapping[str, Any]], object]
    value: object
    instead: Mapping[str, object] = {}


class Shown(NamedTuple):
    """`line` prints something of which `read` makes `value`."""

    line: str
    read: Callable[[str], object]
    value: object


def evaluate(options: str, place: str, argument: str, value: object) -> Call:
    line = f"evaluate {{masked}} {{fasta}} {options}"
    return Call(line, f"performers.train.evaluate.{place}", argument, value)


def generate(options: str, place: str, argument: str, value: object) -> Call:
    line = f"generate {{causal}} {options}"
    return Call(line, f"performers.train.generate.{place}", argument, value)


def embed(options: str, place: str, argument: str, value: object) -> Call:
    line = f"embed {{masked}} {{fasta}} --output {{new}}/vectors.npz {options}"
    return Call(line, f"performers.train.{place}", argument, value)


def fill(options: str, place: str, argument: str, value: object) -> Call:
    return Call(f"fill {{masked}} MK? {options}", f"performers.train.fill.{place}", argument, value)


def proteins(options: str, argument: str, value: object) -> Call:
    line = f"data proteins {{new}}/set.fasta.gz {options}"
    return Call(line, "performers.data.fetch.fetch_proteins", argument, value)


def reproduce(options: str, place: str, argument: str, value: object) -> Call:
    line = f"reproduce figure-4 {options}"
    return Call(line, f"performers.reproduction.{place}", argument, value)


def train(options: str, place: str, argument: str, value: object) -> Call:
    return Call(f"train demo {options}", f"performers.train.{place}", argument, value)


def benchmark(options: str, argument: str, value: object) -> Call:
    line = f"benchmark --output {{new}}/speed.json {options}"
    return Call(line, "performers.speed.run", f"plan.{argument}", value)


def plan(options: str, place: str, argument: str, value: object) -> Call:
    return Call(f"plan demo {options}", f"performers.{place}", argument, value)


def explore(options: str, place: str, argument: str, value: object) -> Call:
    instead = {"performers.explore.sample_subject": None, "performers.explore.build": None}
    instead.pop(f"performers.explore.{place}", None)
    return Call(f"explore {options}", f"performers.explore.{place}", argument, value, instead)


def diagnose(options: str, place: str, argument: str, value: object, **options_of: object) -> Call:
    return Call(f"diagnose {options}", f"performers.{place}", argument, value, **options_of)


def of_file(options: str) -> str:
    return f"diagnose {{tensors}} --num-projections 8 --output {{new}}/picture.png {options}"


def convert(options: str, argument: str, value: object, place: str = "Conversion.prepare") -> Call:
    """Training is one step of each kind."""
    line = f"convert {{bert}} --data {{text}} --output {{new}}/out --length 23 {options}"
    if "--error" not in options:
        line += " --window 3"
    return Call(line, f"performers.train.conversion_run.{place}", argument, value)


def imported(
    checkpoint: str, options: str, argument: Any, value: object, place: str = "PerformerConfig"
) -> Call:
    """`checkpoint`: the name of a library, which is that of a file of it, too."""
    library = f"--library {checkpoint}"
    line = f"import-checkpoint {{{checkpoint}}} {library} --output {{new}}/out {options}"
    return Call(line, f"performers.migration.importing.{place}", argument, value)


TRAINED = "--transfer-steps 0"

EFFECTS: dict[str, dict[str, Call | Shown]] = {
    "train": {
        "config": train("", "load_config", "config", "demo"),
        "overrides": train("seed=7 a.b=c", "load_config", "overrides", ["seed=7", "a.b=c"]),
        "output": train("--output {new}/run", "Run.prepare", "folder", "{new}/run"),
        "resume": train("--output {new}/run --resume", "Run.prepare", "resume", True),
        "if_exists": train("--output {new} --if-exists show", "holds_run", "folder", "{new}"),
    },
    "evaluate": {
        "checkpoint": Call(
            "evaluate {masked} {fasta}",
            "performers.train.trained.load_model",
            "checkpoint",
            "{masked}",
        ),
        "data": evaluate("", "read_proteins", "source", ["{fasta}"]),
        "length": evaluate(
            "--length 23", "crop_sequences", "length", 23
        ),
        "batch_size": evaluate(
            "--batch-size 3", "DataLoader", "batch_size", 3
        ),
        "seed": Call(
            "evaluate {masked} {fasta} --seed 7", "performers.train.tasks.HiddenTokens", "seed", 7
        ),
    },
    "generate": {
        "checkpoint": Call(
            "generate {causal}", "performers.train.trained.load_model", "checkpoint", "{causal}"
        ),
        "prompt": generate("--prompt MKV", "encode", "sequence", "MKV"),
        "count": Shown("generate {causal} --length 5 --count 2", lambda out: out.count(">"), 2),
        "length": generate(
            "--length 19", "GenerationConfig", "max_new_tokens", 19
        ),
        "temperature": generate(
            "--temperature 0.5", "GenerationConfig", "temperature", 0.5
        ),
        "seed": generate("--seed 7", "torch.manual_seed", "seed", 7),
    },
    "embed": {
        "checkpoint": embed("", "embed.load_of_proteins", "checkpoint", "{masked}"),
        "data": embed("", "embed.read_fasta", "paths", ["{fasta}"]),
        "output": embed("", "Embedding.prepare", "output", "{new}/vectors.npz"),
        "pooling": embed("--pooling residue", "Embedding.run", "self.pooling", "residue"),
        "batch_tokens": embed("--batch-tokens 31", "Embedding.run", "self.batch_tokens", 31),
        "resume": embed("--resume", "Embedding._make_place", "resume", True),
        "force": embed("--force", "Embedding._make_place", "force", True),
    },
    "fill": {
        "checkpoint": fill("", "load_of_proteins", "checkpoint", "{masked}"),
        "sequence": fill("", "encode", "sequence", "MKX"),
        "top": Shown("fill {masked} MK? --top 3 --json", lambda out: out.count("0."), 3),
    },
    "plan": {
        "config": plan("", "train.load_config", "config", "demo"),
        "overrides": plan("seed=7", "train.load_config", "overrides", ["seed=7"]),
        "devices": plan("--devices 3", "planning.plan_layouts", "devices", 3),
        "memory": plan("--memory 2KiB", "planning.plan_layouts", "memory", 2048),
    },
    "explore": {
        "source": explore("{masked}", "load_subject", "source", "{masked}"),
        "runs": explore("--runs {new}/runs", "build", "runs", "{new}/runs"),
        "host": explore("--host 0.0.0.0", "serve", "host", "0.0.0.0"),
        "port": explore("--port 8001", "serve", "port", 8001),
        "browser": explore("--no-browser", "serve", "opens_browser", False),
    },
    "report": {"run": Call("report {new}", "performers.viz.write_report", "run", "{new}")},
    "reproduce": {
        "name": reproduce("", "experiment_folder", "name", "figure-4"),
        "scale": reproduce("--scale paper", "Reproduction.prepare", "scale", "paper"),
        "draw_only": Call(
            "reproduce figure-4 --draw-only --scale smoke",
            "performers.reproduction.Reproduction.draw", "self.scale", "smoke",
            {"performers.reproduction.Reproduction.run": []},
        ),
    },
    "info": {},
    "data proteins": {
        "output": proteins("", "output", "{new}/set.fasta.gz"),
        "source": proteins("--source examples", "source", "examples"),
        "from_path": proteins("--from {fasta} --from {text}", "from_paths", ["{fasta}", "{text}"]),
        "clustering": proteins("--clustering kmers", "clustering", "kmers"),
    },
    "benchmark": {
        "quick": benchmark("--quick", "patience", 0.5),
        "length": benchmark("--length 29 --length 13", "lengths", (13, 29)),
        "context": benchmark("--context 17 --context 11", "contexts", (11, 17)),
        "setting": benchmark("--setting sharp --setting relu", "settings", ("sharp", "relu")),
        "dtype": benchmark("--dtype float16", "dtypes", ("float16",)),
        "repeats": benchmark("--repeats 3", "repeats", 3),
        "batch": benchmark("--batch 3", "batch", 3),
        "heads": benchmark("--heads 3", "heads", 3),
        "dim": benchmark("--dim 7", "dim", 7),
        "num_projections": benchmark("--num-projections 19", "num_projections", 19),
        "memory": benchmark("--no-memory", "memory_lengths", ()),
        "models": benchmark("--no-models", "model_lengths", ()),
        "device": benchmark("--device meta", "device", "meta"),
        "threads": Call(
            "benchmark --output {new}/x.json --threads 3", "torch.set_num_threads",
            lambda call: call[0], 3
        ),
        "output": Call(
            "benchmark --output {new}/x.json", "performers.viz.files.save_figure", "path",
            "{new}/x.json", {"performers.speed.run": {}, "performers.viz.speed.speed_figure": None},
        ),
        "force": Call(
            "benchmark --output {fasta} --force", "performers.speed.run", "plan.seed", 0
        ),
    },
    "diagnose": {
        "source": diagnose("{tensors}", "convert.read_captured", "path", "{tensors}"),
        "text": diagnose("{bert} --text {text}", "convert.capture_text", "text", "to be " * 150),
        "text_format": diagnose(
            "{bert} --text {text} --format lines", "data.read_texts", "kind", "lines"
        ),
        "column": diagnose(
            "{bert} --text {text} --format csv --column a", "data.read_texts", "columns", ["a"]
        ),
        "length": diagnose(
            "{bert} --text {text} --length 23", "convert.capture_text", "length", 23
        ),
        "sequences": diagnose(
            "{bert} --text {text} --sequences 3", "convert.capture_text", "sequences", 3
        ),
        "num_projections": diagnose(
            "{tensors} --num-projections 19", "diagnosis.compare", "num_projections", 19
        ),
        "window": diagnose("{tensors} --window 7", "diagnosis.compare", "window_size", 7),
        "sinks": diagnose(
            "{tensors} --sinks 3", "train.progress.frontier_with_bar", "num_sinks", 3,
            instead={"performers.diagnosis.compare": {}},
        ),
        "target_error": diagnose(
            "{tensors} --target-error 0.25", "diagnosis.compare", "target_error", 0.25
        ),
        "causal": diagnose("{tensors} --causal", "convert.read_captured", "is_causal", True),
        "heads": Shown(of_file("--heads"), lambda out: "attention, sharp + window" in out, True),
        "output": Call(
            of_file(""), "performers.viz.files.save_figure", "path", "{new}/picture.png"
        ),
    },
    "convert": {
        "model": convert("", "config.model", "{bert}"),
        "data": convert("", "config.text", "{text}"),
        "data_format": convert("--format lines", "config.text_format", "lines"),
        "column": convert("--column a --column b", "config.columns", ("a", "b")),
        "output": convert("", "output", "{new}/out"),
        "error": convert("--error 0.25", "config.error", 0.25),
        "num_projections": convert(
            "--num-projections 19", "options.num_projections", 19, "linearize"
        ),
        "features": convert("--features hyperbolic", "options.features", "hyperbolic", "linearize"),
        "statistics": convert("--statistics call", "options.statistics", "call", "linearize"),
        "window": convert("", "options.window_size", 3, "linearize"),
        "sinks": convert("--sinks 5", "options.num_sinks", 5, "linearize"),
        "far": convert("--no-far", "options.far", False, "linearize"),
        "far_limit": convert("--far-limit 0.3", "options.far_limit", 0.3, "linearize"),
        "heavy": convert("--no-far --heavy 5", "options.num_heavy", 5, "linearize"),
        "exact_layers": convert("--exact-layers 1", "num_exact", 1, "choose_layers"),
        "length": Call(
            "convert {bert} --data {text} --output {new}/out --length 23 --window 3",
            "performers.convert.sequences.text_windows", "length", 23
        ),
        "batch_size": convert(f"--batch-size 3 {TRAINED}", "batch_size", 3, "fine_tune"),
        "transfer_steps": convert(
            "--transfer-steps 2", lambda call: len(call["batches"]), 2, "transfer_attention"
        ),
        "transfer_learning_rate": convert(
            "--transfer-learning-rate 0.25", "learning_rate", 0.25, "transfer_attention"
        ),
        "steps": convert(f"--steps 7 {TRAINED}", "steps", 7, "fine_tune"),
        "learning_rate": convert(
            f"--learning-rate 0.25 {TRAINED}", "learning_rate", 0.25, "fine_tune"
        ),
        "lora": convert(f"--lora 3 {TRAINED}", "lora_rank", 3, "fine_tune"),
        "seed": convert("--seed 7", "options.seed", 7, "linearize"),
        "recovery": convert("--no-recovery", "config.steps", 0),
        "resume": convert("--resume", "resume", True),
        "force": convert("--force", "force", True),
    },
    "import-checkpoint": {
        "source": imported(
            "google-jax", "", "source", "{google-jax}", "read_tensors"
        ),
        "output": Call(
            "import-checkpoint {performer-pytorch} --library performer-pytorch --output {new}/out",
            "performers.PerformerForMaskedLM.save_pretrained", "save_directory", "{new}/out",
        ),
        "library": imported("google-jax", "", "word", "google-jax", "check_choice"),
        "causal": imported("performer-pytorch", "--causal", "is_decoder", True),
        "features": imported(
            "performer-pytorch", "--features relu", "attention", "performer-relu"
        ),
        "heads": imported("fast-transformers", "--heads 5", "num_attention_heads", 5),
        "num_projections": imported("google-jax", "--num-projections 19", "num_projections", 19),
        "activation": imported("performer-pytorch", "--activation relu", "hidden_act", "relu"),
        "scale": imported(
            "performer-pytorch", "--scale 0.25", lambda call: call["dialect"]["scale"], 0.25
        ),
        "prefix": imported(
            "performer-pytorch", "--prefix module.", "prefix", "module.", "_renamed"
        ),
        "force": Call(
            "import-checkpoint {performer-pytorch} --library performer-pytorch --output {bert} "
            "--force",
            "performers.migration.importing.PerformerConfig", "hidden_size", restated.HIDDEN,
        ),
    },
}  # fmt: skip


def commands(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its words."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, below in command.commands.items():
        yield from commands(below, f"{path} {name}".strip())


PARAMETERS = {
    (path, parameter.name): parameter
    for path, command in commands(get_command(app))
    for parameter in command.params
    if parameter.name not in COMMON_OPTIONS  # those of all commands are tested in test_answers.py
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """What the command lines name."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "set.fasta").write_text("".join(f">p{n}\n{'MKV' * (5 + n)}\n" for n in range(5)))
    (folder / "text.txt").write_text("to be " * 150)
    save_file(
        {part: torch.randn(1, 2, 13, 5) for part in ("query", "key", "value")},
        folder / "attention.safetensors",
    )
    sizes = {
        "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 13,
    }  # fmt: skip
    tokens = {
        "vocab_size": VOCAB_SIZE, "pad_token_id": PAD_TOKEN_ID, "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID, "num_projections": 7,
    }  # fmt: skip
    for name, kind in (("masked", PerformerForMaskedLM), ("causal", PerformerForCausalLM)):
        kind(PerformerConfig(**sizes, **tokens, is_decoder=name == "causal")).save_pretrained(
            folder / name
        )
    words = {"[UNK]": 0, "[PAD]": 1, "to": 2, "be": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bert = BertModel(BertConfig(vocab_size=4, max_position_embeddings=600, **sizes))
    bert.save_pretrained(folder / "bert")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder / "bert")
    checkpoints = {
        "performer-pytorch": folder / "performer.pt",
        "fast-transformers": folder / "encoder.safetensors",
        "google-jax": folder / "params.npz",
    }
    torch.save(restated.performer_pytorch_weights(), checkpoints["performer-pytorch"])
    save_file(restated.fast_transformers_weights(False), checkpoints["fast-transformers"])
    np.savez(checkpoints["google-jax"], **restated.google_arrays(restated.google_tree()))
    return {
        **{library: str(path) for library, path in checkpoints.items()},
        "fasta": str(folder / "set.fasta"), "text": str(folder / "text.txt"),
        "tensors": str(folder / "attention.safetensors"),
        **{name: str(folder / name) for name in ("masked", "causal", "bert")},
    }  # fmt: skip


class Reached(BaseException):
    """The call that was waited for, with its arguments. No command catches it."""


def as_words(value: object) -> object:
    """Paths as they were given, in lists or alone."""
    if isinstance(value, list):
        return [as_words(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def filled(value: object, names: Mapping[str, str]) -> object:
    """With what the names in braces stand for."""
    if isinstance(value, list):
        return [filled(part, names) for part in value]
    return value.format(**names) if isinstance(value, str) else value


def reached(effect: Call, words: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """What the call gets when the words are run; nothing is done after it."""
    for name, given in effect.instead.items():
        monkeypatch.setattr(name, lambda *arguments, _given=given, **named: _given)
    original = pkgutil.resolve_name(effect.place)

    def note(*arguments: object, **named: object) -> None:
        try:
            bound = inspect.signature(original).bind(*arguments, **named)
        except ValueError:  # a builtin, whose arguments have no names
            raise Reached(dict(enumerate(arguments))) from None
        bound.apply_defaults()
        raise Reached({**bound.arguments, **bound.arguments.get("kwargs", {})})

    monkeypatch.setattr(effect.place, note)
    try:
        result = CliRunner().invoke(app, words)
    except Reached as call:
        (found,) = call.args
    else:
        pytest.fail(f"{effect.place} was not called:\n{result.output}\n{result.exception!r}")
    if callable(effect.argument):
        return effect.argument(found)
    name, _, attribute = effect.argument.partition(".")
    return as_words(getattr(found[name], attribute) if attribute else found[name])


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_parameter_of_every_command_has_a_row():
    rows = {(path, name) for path, effects in EFFECTS.items() for name in effects}
    assert rows == PARAMETERS.keys()
    assert EFFECTS.keys() == dict(commands(get_command(app))).keys()


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, effects in EFFECTS.items() for name in effects]
)
def test_each_parameter_reaches_its_effect(path, name, files, tmp_path, monkeypatch):
    effect = EFFECTS[path][name]
    names = files | {"new": str(tmp_path)}
    words = effect.line.format(**names).split()
    parameter = PARAMETERS[path, name]
    if parameter.param_type_name == "option":
        assert {*parameter.opts, *parameter.secondary_opts} & {*words}, "the row must set it"
    if isinstance(effect, Call):
        found = reached(effect, words, monkeypatch)
    else:
        found = effect.read(CliRunner().invoke(app, words).stdout)
    assert found == filled(effect.value, names)
