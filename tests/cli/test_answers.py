"""What all commands have in common: --json, --verbose, --quiet, and where their words go."""

import inspect
import json
import math
import os
import re
import warnings
from pathlib import Path

import pytest
from typer import Typer
from typer.main import get_command
from typer.testing import CliRunner

from performers.cli.answers import COMMON_OPTIONS, Answer, answering, plain, remark
from performers.cli.app import COMMANDS, app
from performers.cli.errors import one_line_errors


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch):
    """The variables that --quiet and --verbose set for the libraries below are set for good."""
    for name in ("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def run(command, *options):
    small = Typer()
    small.command()(answering(command))
    return CliRunner().invoke(small, options)


def weigh() -> Answer:
    """Say how it goes, warn, and answer."""
    remark("weighing")
    warnings.warn("the scales are old", stacklevel=1)
    return Answer({"grams": 3, "error": math.inf, "file": Path("a.npz")}, "3 g")


def fail() -> Answer:
    """Fail as a command does whose caller has made a mistake."""
    with one_line_errors():
        raise ValueError("grams must be above 0, got -1.")


def lines() -> Answer:
    """Answer line by line."""
    return Answer((number for number in (1, 2)), (f"line {number}" for number in (1, 2)))


def serve() -> None:
    """Answer nothing."""


def test_the_answer_is_on_stdout_and_the_way_to_it_on_stderr():
    with pytest.warns(UserWarning, match="old"):
        result = run(weigh)
    assert result.stdout == "3 g\n"
    assert result.stderr == "weighing\n"


def test_as_json_the_answer_is_one_document_without_infinity():
    with pytest.warns(UserWarning, match="old"):
        result = run(weigh, "--json")
    assert json.loads(result.stdout) == {"grams": 3, "error": None, "file": "a.npz"}
    assert result.stderr == "weighing\n"


def test_a_quiet_command_prints_its_answer_alone():
    for option in ("--quiet", "-q"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = run(weigh, option)
        assert (result.stdout, result.stderr) == ("3 g\n", "")
    assert os.environ["TQDM_DISABLE"] == "1"


def test_a_quiet_command_leaves_the_next_one_its_words():
    run(weigh, "--quiet")
    with pytest.warns(UserWarning, match="old"):
        assert run(weigh).stderr == "weighing\n"


def test_quiet_bars_are_not_drawn(fresh_python):
    code = """
from performers.cli.answers import answering
def count() -> None:
    from tqdm import tqdm
    list(tqdm(range(3), file=sys.stdout))
    list(tqdm(range(5), file=sys.stdout, disable=False))
answering(count)(quiet=True)
"""
    drawn = fresh_python(code)
    assert "3/3" not in drawn
    assert "5/5" in drawn


def test_a_verbose_error_is_its_traceback_and_then_its_line():
    said = run(fail).stderr
    assert said == "error: grams must be above 0, got -1.\n"
    for option in ("--verbose", "-v"):
        result = run(fail, option)
        assert result.exit_code == 2
        assert result.stderr.startswith("Traceback")
        assert "in fail" in result.stderr
        assert result.stderr.endswith(said)


def test_verbose_and_quiet_exclude_each_other():
    result = run(weigh, "-v", "-q")
    assert result.exit_code == 2
    assert "exclude each other" in result.stderr


def test_lines_are_printed_as_they_come_and_are_a_list_of_json():
    assert run(lines).stdout == "line 1\nline 2\n"
    assert json.loads(run(lines, "--json").stdout) == [1, 2]


def test_json_has_lists_for_tuples_and_words_for_what_it_has_not():
    tree = {"a": (1.5, math.nan), 3: [True, None, -math.inf], "b": Path("c") / "d"}
    assert plain(tree) == {"a": [1.5, None], "3": [True, None, None], "b": "c/d"}


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_that_answers_has_the_options_of_all(words):
    command = get_command(app)
    for word in words.split():
        command = command.commands[word]
    names = {parameter.name for parameter in command.params}
    answers = inspect.signature(COMMANDS[words], eval_str=True).return_annotation is not None
    assert names & COMMON_OPTIONS.keys() == {
        "verbose",
        "quiet",
        *(["json_output"] if answers else []),
    }
    assert answers is (words != "explore")


def test_a_command_without_an_answer_has_no_json():
    assert run(serve).exit_code == 0
    result = run(serve, "--json")
    assert result.exit_code == 2
    assert "--json" in result.stderr


def test_the_page_about_the_commands_has_a_row_for_each():
    page = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z- ]+)` \|", page, re.MULTILINE) == list(COMMANDS)
