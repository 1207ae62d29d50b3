"""The page around the tabs: bars, pictures and messages, and what it needs."""

import inspect
import sys
from functools import partial, wraps
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from performers.cli import app
from performers.explore.parts import answered, progress, stoppable


@pytest.mark.parametrize(("done", "share"), [(0, "0.0000"), (3, "0.7500"), (9, "1.0000")])
def test_a_bar_shows_a_share_of_the_whole(done, share):
    assert f'value="{share}"' in progress(done, 4, "steps")


def test_a_bar_takes_words_as_words():
    assert "&lt;b&gt;" in progress(1, 2, "<b>")


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    result = CliRunner().invoke(app, ["explore", "--no-browser"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == (
        "error: the explorer needs gradio, which is not installed. Install it with: "
        "pip install 'performers[explore]'"
    )


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    result = CliRunner().invoke(app, ["explore", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert "error: there is no folder" in result.stderr


class Said(Exception):  # noqa: N818 - in the place of gradio.Error, which is no error of ours
    def __init__(self, words, print_exception):
        super().__init__(words)


@pytest.fixture
def gradio(monkeypatch):
    module = type(sys)("gradio")
    module.Error, module.Request = Said, SimpleNamespace
    monkeypatch.setitem(sys.modules, "gradio", module)


class Button:
    def click(self, function, *others, **options):
        self.clicked = function


def clicks(function):
    """What two buttons call, of which one begins this work and the other ends it."""
    start, stop = Button(), Button()
    stoppable(start, stop, function, [], [])
    return start.clicked, stop.clicked


ONE, OTHER = SimpleNamespace(session_hash="one"), SimpleNamespace(session_hash="other")


@pytest.mark.usefixtures("gradio")
def test_a_mistake_of_the_user_is_said_on_the_page_once_or_in_the_middle_of_long_work():
    def once():
        raise ValueError("a < b\nis refused")

    def steps():
        yield 1
        raise FileNotFoundError("gone")

    with pytest.raises(Said, match="a &lt; b is refused"):
        answered(once)()
    work = clicks(steps)[0](ONE)
    assert next(work) == 1
    with pytest.raises(Said, match="gone"):
        next(work)


@pytest.mark.usefixtures("gradio")
def test_the_page_sees_that_long_work_has_steps_whatever_wraps_its_function():
    """Gradio asks whether the function is a generator's, and else shows what it returns."""

    def work(number):
        yield from range(number)

    begin, _ = clicks(partial(wraps(work)(lambda *given: work(*given)), 3))
    assert inspect.isgeneratorfunction(begin)
    assert list(begin(ONE)) == [0, 1, 2]


@pytest.mark.usefixtures("gradio")
def test_long_work_ends_at_the_step_in_which_its_own_page_asks_for_it():
    begin, end = clicks(lambda: iter(range(5)))
    work, others = begin(ONE), begin(OTHER)
    assert (next(work), next(others)) == (0, 0)
    end(ONE)
    assert list(work) == []
    assert list(others) == [1, 2, 3, 4]
    assert list(begin(ONE)) == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("gradio")
def test_a_mistake_of_ours_keeps_its_traceback():
    def broken():
        raise AssertionError("ours")

    with pytest.raises(AssertionError, match="ours"):
        answered(broken)()
