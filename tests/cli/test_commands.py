"""The commands: what they print, what they refuse, and in how many lines."""

import inspect
import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
import typer
import yaml
from safetensors.torch import save_file
from tqdm.auto import tqdm
from typer.main import get_command
from typer.testing import CliRunner

import performers.cli
from performers.cli import app
from performers.cli.answers import answering
from performers.cli.app import COMMANDS, GROUPS
from performers.data.vocabulary import STANDARD_AMINO_ACIDS, VOCAB_SIZE
from performers.models import MECHANISMS, PerformerConfig, PerformerForCausalLM
from performers.train import UnsavedError, shipped_configs

# Modules of performers.cli that are no commands.
SHARED = {"__init__", "__main__", "answers", "app", "errors", "interrupts"}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments):
    """The one line that a refused command says."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    """37 proteins that alternate between two letters, each its own cluster."""
    path = tmp_path_factory.mktemp("data") / "proteins.fasta"
    with path.open("w") as file:
        for number in range(37):
            pair = STANDARD_AMINO_ACIDS[number % 19 : number % 19 + 2]
            file.write(f">p{number} Cluster=c{number} Family=f{number}\n{pair * (5 + number)}\n")
    return path


@pytest.fixture(scope="module")
def config(fasta, tmp_path_factory):
    tree = {
        "task": "causal-lm",
        "data": {"source": [str(fasta)], "length": 29},
        "model": {
            "hidden_size": 12,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 13,
            "num_projections": 7,
        },
        "trainer": {
            "max_steps": 2,
            "per_device_train_batch_size": 5,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """A finished run and what was printed on the way."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    result = run("train", config, "--output", folder)
    assert result.exit_code == 0, result.output
    return folder, result.stdout


def examples(command):
    """The command lines in the help of a command, as argument lists."""
    lines = (line.strip() for line in inspect.getdoc(command).splitlines())
    return [
        shlex.split(line.partition(" > ")[0])[1:]
        for line in lines
        if line.startswith("performers ")
    ]


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_explains_itself_with_examples_that_parse(words):
    result = run(*words.split(), "--help")
    assert result.exit_code == 0
    assert f"performers {words}" in result.output
    for arguments in examples(COMMANDS[words]):
        # --help makes it check the command and its options, and do nothing.
        assert run(*arguments, "--help").exit_code == 0, arguments


@pytest.mark.parametrize("words", COMMANDS)
def test_the_help_of_a_command_has_every_word_of_its_docstring(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = run(*words.split(), "--help").output
    assert " ".join(inspect.getdoc(COMMANDS[words]).split()) in " ".join(shown.split())


@pytest.mark.parametrize("words", COMMANDS)
def test_the_usage_of_a_command_has_each_optional_argument_in_one_pair_of_brackets(words):
    assert "[[" not in run(*words.split(), "--help").output


@pytest.mark.parametrize("words", COMMANDS)
def test_every_argument_and_option_of_a_command_says_what_it_is_for(words):
    command = get_command(app)
    for word in words.split():
        command = command.commands[word]
    assert [parameter.name for parameter in command.params if not parameter.help] == []


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_is_a_file_of_its_own(words):
    name = words.split()[-1].replace("-", "_")
    assert COMMANDS[words].__name__ == name
    assert COMMANDS[words].__module__ == f"performers.cli.{name}"


def test_every_file_of_a_command_is_in_the_table():
    files = {path.stem for path in Path(performers.cli.__file__).parent.glob("*.py")}
    assert files - SHARED == {words.split()[-1].replace("-", "_") for words in COMMANDS}


def test_a_group_of_commands_explains_itself():
    for group in GROUPS:
        result = run(group, "--help")
        assert result.exit_code == 0
        assert GROUPS[group] in result.output


def test_help_answers_without_torch(fresh_python):
    assert fresh_python("import performers.cli; print('torch' in sys.modules)") == "False"


def test_training_prints_a_table_and_where_the_report_is(trained):
    folder, printed = trained
    assert "empirical baseline" in printed
    assert "performer-relu" in printed
    assert printed.rstrip().endswith(f"Report: {folder / 'report.html'}")
    assert (folder / "report.html").stat().st_size > 10_000


def test_an_output_folder_with_a_run_is_refused_and_left_alone(trained, config):
    folder, _ = trained
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "already holds a run. Add --resume" in refused("train", config, "--output", folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_finished_run_is_shown_without_training(trained, config):
    folder, printed = trained
    result = run("train", config, "--output", folder, "--if-exists", "show")
    assert result.exit_code == 0
    assert "This run is finished" in result.stdout
    table = printed[: printed.index("\nReport")]
    assert result.stdout.startswith(table)


def test_a_run_whose_numbers_are_damaged_says_which_file(trained, config, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    (folder / "metrics.json").write_text("{")
    message = refused("train", config, "--output", folder, "--if-exists", "show")
    assert f"{folder}/metrics.json must be a JSON file" in message
    assert "Delete it" in message
    assert f"{folder}/metrics.json must be a JSON file" in refused("report", folder)


def test_a_run_that_cannot_be_written_is_one_line(config, tmp_path, monkeypatch):
    def full(self):
        raise UnsavedError("checkpoint-5 could not be written: the disk is full.")

    monkeypatch.setattr("performers.train.Run.train", full)
    message = refused("train", config, "--output", tmp_path / "run")
    assert "checkpoint-5 could not be written" in message


@pytest.fixture
def full_disk():
    """No file grows beyond 50 bytes, which is as if the disk were full, until room is made."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize(
    ("arguments", "file", "then"),
    [
        ("train {config} --output {new}/run", "run/config.yaml", "go on with --resume"),
        ("report {run}", "run/curves.png", "draw the report with: performers report {run}"),
        (
            "embed {run} {fasta} --output {new}/e.npz",
            "e.npz.parts/plan.json",
            "go on with --resume",
        ),
        ("diagnose {tensors} --output {new}/d.png", "d.png", "give the command again"),
        (
            "data proteins {new}/p.fasta.gz --source fasta --from {fasta}",
            "p.json",
            "give the command again",
        ),
        (
            "benchmark --quick --length 16 --context 8 --repeats 1 --setting plain --no-models "
            "--no-memory --output {new}/b.json",
            "b.json.unfinished",
            "give the command again",
        ),
    ],
)
def test_a_command_whose_disk_is_full_names_the_file_and_how_to_go_on(
    arguments, file, then, trained, config, fasta, tmp_path, request
):
    run_folder = shutil.copytree(trained[0], tmp_path / "copied" / "run")
    tensors = tmp_path / "tensors.safetensors"
    save_file({name: torch.randn(1, 2, 13, 5) for name in ("query", "key", "value")}, tensors)
    names = {"config": config, "run": run_folder, "fasta": fasta, "tensors": tensors}
    names["new"] = tmp_path
    make_room = request.getfixturevalue("full_disk")
    result = run(*arguments.format(**names).split())
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert re.search(rf"{re.escape(file)} could not be written: .* MiB free: make room, and ", line)
    assert then.format(**names) in line
    make_room()
    again = [*arguments.format(**names).split(), *(["--resume"] if "--resume" in then else [])]
    result = run(*again)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "arguments",
    [
        "embed {run} {fasta} --output {below}/e.npz",
        "diagnose {tensors} --output {below}/d.png",
        "benchmark --output {below}/b.json",
        "train {config} --output {below}/run",
        "convert {run} --data {fasta} --output {below}/model",
        "import-checkpoint {tensors} --library google-jax --output {below}/model --force",
    ],
)
def test_an_output_below_a_file_is_refused_before_the_work(
    arguments, trained, config, fasta, tmp_path
):
    (tmp_path / "file").touch()
    names = {"config": config, "run": trained[0], "fasta": fasta, "tensors": tmp_path / "absent"}
    names["below"] = tmp_path / "file" / "below"
    line = refused(*arguments.format(**names).split())
    assert "must be a folder, and" in line
    assert f"{tmp_path / 'file'} is a file. Choose another with --output." in line


def test_a_report_whose_pictures_are_damaged_names_their_file(trained, tmp_path):
    folder = shutil.copytree(trained[0], tmp_path / "run")
    for damaged in (b"", b"{", b"PK\x03\x04"):
        (folder / "attention.npz").write_bytes(damaged)
        line = refused("report", folder)
        assert f"{folder}/attention.npz must hold attention matrices of a run" in line


def test_whatever_command_is_interrupted_says_so_in_its_last_line():
    bars = []

    def command() -> None:
        bars.append(tqdm(total=3))
        raise KeyboardInterrupt

    one = typer.Typer()
    one.command()(answering(command))
    result = CliRunner().invoke(one, [])
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("Interrupted. Give the same command again")
    assert bars[0].disable  # closed: it is not drawn again


def test_an_interrupted_run_says_how_to_go_on_and_can(config, tmp_path, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("performers.train.Run.train", interrupt)
        result = run("train", config, "seed=3", "--output", folder)
    assert result.exit_code == 130
    assert f"performers train {config} seed=3 --output {folder} --resume" in result.stderr
    assert not (folder / "metrics.json").exists()
    assert run("train", config, "seed=3", "--output", folder, "--if-exists", "show").exit_code == 0
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "demmo"], "Did you mean 'demo'?"),
        (["train", "absent.yaml"], "no config file absent.yaml"),
        (["train", "demo", "trainer.max_step=3"], "Did you mean 'max_steps'?"),
        (["train", "demo", "model.num_attention_heads=3"], "num_attention_heads must divide"),
        (["train", "demo", "trainer.optim=adamm"], "adamm"),
        (["train", "demo", "data.source=[absent.fasta]"], "absent.fasta"),
        (["evaluate", "absent", "absent.fasta"], "must be a run with a finished model/"),
        (["generate", "absent"], "must be a run with a finished model/"),
        (
            ["generate", "absent", "--temperature", "-1"],
            "temperature must be a finite number of at least 0",
        ),
        (["generate", "absent", "--temperature", "nan"], "a finite number of at least 0, got nan"),
        (["report", "absent"], "absent"),
        (["reproduce", "figure-22"], "Did you mean 'figure-2'?"),
        (["train", "demo", "seed=-1"], "seed must be a whole number from 0 to 4294967295"),
        (["train", "demo", "trainer.learning_rate=.nan"], "must be at least 0 and finite, got nan"),
        (["train", "demo", "trainer.fp16=true"], "trainer.fp16 needs an accelerator"),
        (["data", "proteins", "x.fasta.gz", "--source", "swisprot"], "Did you mean 'swissprot'?"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_a_folder_is_named_and_so_is_the_other_way_around(tmp_path):
    file, folder = tmp_path / "model.safetensors", tmp_path / "run"
    file.touch()
    (folder / "metrics.json").mkdir(parents=True)
    words = "is a file, and a folder is needed to hold metrics.json. Give a folder."
    assert f"{file} {words}" in refused("report", file)
    assert f"{file} {words}" in refused("report", file / "run")
    assert "metrics.json is a folder, and a file is needed" in refused("report", folder)
    assert f"there is no {tmp_path / 'absent' / 'metrics.json'}." in refused(
        "report", tmp_path / "absent"
    )


def test_a_model_is_evaluated_on_any_proteins(trained, fasta):
    result = run("evaluate", trained[0], fasta, "--json", "--length", "23")
    assert result.exit_code == 0, result.output
    scores = json.loads(result.stdout)
    assert scores["proteins"] == 37
    assert 0 <= scores["accuracy"] <= 1
    assert scores["perplexity"] > 1
    table = run("evaluate", trained[0] / "model", fasta, "--length", "23").stdout
    assert f"{scores['perplexity']:.4f}" in table


def test_sampled_proteins_are_fasta_that_begins_with_the_prompt(trained):
    arguments = ("generate", trained[0], "--count", "2", "--length", "70", "--prompt", "MKV")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    records = result.stdout.split(">")[1:]
    assert len(records) == 2
    for record in records:
        header, *lines = record.splitlines()
        sequence = "".join(lines)
        assert sequence.startswith("MKV")
        assert f"length={len(sequence)}" in header
        assert len(sequence) <= 70
        assert all(len(line) <= 60 for line in lines)
        assert sequence.isalpha()
    assert run(*arguments).stdout == result.stdout


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["train", "{config}", "--output", "{run}", "--if-exists", "show"], {"models", "baseline"}),
        (["evaluate", "{run}", "{fasta}", "--length", "23"], {"accuracy", "perplexity"}),
        (["embed", "{run}", "{fasta}", "--output", "{new}/x.npz"], {"proteins", "dim", "output"}),
        (["report", "{run}"], {"report"}),
        (["plan", "{config}", "--devices", "3"], {"layouts", "refused", "memory"}),
        (["info"], {"environment", "attention", "configs"}),
        (
            ["data", "proteins", "{new}/x.fasta.gz", "--source", "fasta", "--from", "{fasta}"],
            {"card"},
        ),
    ],
    ids=lambda case: case[0] if isinstance(case, list) else None,
)
def test_with_json_a_command_prints_one_document(arguments, keys, trained, config, fasta, tmp_path):
    names = {"run": trained[0], "config": config, "fasta": fasta, "new": tmp_path}
    result = run(*(word.format(**names) for word in arguments), "--json")
    assert result.exit_code == 0, result.output
    assert keys <= json.loads(result.stdout).keys()


def test_a_plan_as_json_holds_what_its_table_says(config):
    asked = ["plan", config, "--devices", "3", "--memory", "2GiB"]
    found, table = json.loads(run(*asked, "--json").stdout), run(*asked).stdout
    assert found["layouts"].keys() | found["refused"].keys() == {"data", "sharded", "sequence"}
    assert f"{found['weights']:,} weights" in table
    assert f"{found['layouts']['data']['largest_batch']:,}" in table
    assert found["layouts"]["data"]["fits"] is True
    assert found["memory"] == 2 * 2**30


def test_sampled_proteins_as_json_are_those_of_the_fasta(trained):
    asked = ["generate", trained[0], "--count", "2", "--length", "70", "--prompt", "MKV"]
    found, fasta = json.loads(run(*asked, "--json").stdout), run(*asked).stdout
    for protein, record in zip(found, fasta.split(">")[1:], strict=True):
        header, *lines = record.splitlines()
        assert protein["sequence"] == "".join(lines)
        assert header.startswith(f"{protein['name']} length={protein['length']} ")
        assert ("complete" in header) is protein["is_complete"]


def test_a_masked_model_cannot_be_sampled_from(trained, tmp_path):
    from performers.models import PerformerConfig, PerformerForMaskedLM

    config = PerformerConfig.from_pretrained(trained[0] / "model")
    with torch.random.fork_rng():
        PerformerForMaskedLM(config).save_pretrained(tmp_path)
    assert "must hold a causal model" in refused("generate", tmp_path)


def test_a_prompt_that_is_no_protein_or_too_long_is_one_line(tmp_path):
    sizes = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 1, "hidden_size": 8}
    config = PerformerConfig(**sizes, num_attention_heads=1, is_decoder=True)
    PerformerForCausalLM(config).save_pretrained(tmp_path)
    assert "got '1' at position 3" in refused("generate", tmp_path, "--prompt", "MK1")
    too_long = refused("generate", tmp_path, "--prompt", "MKV", "--length", "3")
    assert "must exceed that of the prompt: 3 and 3 residues" in too_long


def test_info_names_every_word_that_a_config_may_use():
    result = run("info")
    assert result.exit_code == 0
    for word in ("torch", "transformers", "threads", "chunked", *MECHANISMS, *shipped_configs()):
        assert word in result.stdout


def test_a_fasta_set_is_written_with_its_card(fasta, tmp_path):
    output = tmp_path / "mine.fasta.gz"
    result = run("data", "proteins", output, "--source", "fasta", "--from", fasta)
    assert result.exit_code == 0, result.output
    assert output.exists()
    assert (tmp_path / "mine.json").exists()


def test_a_shell_is_taught_to_complete_the_names_of_commands():
    assert "install_completion" in {option.name for option in get_command(app).params}
    asked = {
        "_PERFORMERS_COMPLETE": "complete_bash", "COMP_WORDS": "performers e", "COMP_CWORD": "1"
    }  # fmt: skip
    result = CliRunner().invoke(app, [], env=asked, prog_name="performers")
    assert result.stdout.split() == ["evaluate", "embed", "explore"]
