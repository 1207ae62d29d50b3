"""`performers benchmark`: what it writes, what it refuses, and that a failing row ends alone."""

import json
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from performers import SoftmaxFeatures, favor_attention
from performers.benchmark import Plan, crossover, peak_of_step, seconds_of_step
from performers.benchmark import attention as benchmark
from performers.benchmark.timing import OUT_OF_MEMORY, interleaved
from performers.cli import app

SMALL = ["--heads", 2, "--dim", 5, "--num-projections", 7, "--repeats", 1, "--context", 11]


def run(*arguments):
    return CliRunner().invoke(app, ["benchmark", *map(str, arguments)])


@pytest.fixture(autouse=True)
def _as_many_threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_command_measures_every_mechanism_and_draws(tmp_path):
    output = tmp_path / "speed.json"
    lengths = ["--length", 13, "--length", 29]
    result = run(*SMALL, *lengths, "--dtype", "float32", "--no-memory", "--output", output)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    assert [(row["causal"], row["length"]) for row in found["time"]] == [
        (False, 13), (False, 29), (True, 13), (True, 29),
    ]  # fmt: skip
    for row in found["time"]:
        assert row["relative_error"] < 1e-4
        for name in ("exact", "identity", "performer"):
            both = row["seconds"][name]["forward_backward"]
            assert 0 < both["lower_quartile"] <= both["median"] <= both["upper_quartile"]
    assert found["decoding"][0]["context"] == 11
    assert found["decoding"][0]["bytes"]["performer"] == 4 * 2 * 7 * (5 + 2)
    assert found["environment"]["threads"] == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png", ".svg"}
    assert "L = " in result.output

    again = run(*SMALL, "--length", 13, "--output", output)
    assert again.exit_code == 2
    assert "--force" in again.stderr


def test_a_wrong_answer_is_not_timed(monkeypatch):
    real = benchmark.favor_attention

    def wrong(*arguments, backend=None, **options):
        out = real(*arguments, backend=backend, **options)
        return out if backend else 1.01 * out

    monkeypatch.setattr(benchmark, "favor_attention", wrong)
    plan = Plan(lengths=(13,), heads=2, dim=5, num_projections=7, dtypes=("float32",))
    with pytest.raises(RuntimeError, match="off by"):
        benchmark.run(plan, lambda line: None)


@pytest.mark.parametrize(("option", "word"), [("--dtype", "float31"), ("--device", "cuda")])
def test_what_is_not_there_is_refused_in_one_line(option, word, tmp_path):
    if word == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = run(option, word, "--output", tmp_path / "speed.json")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert word in line


def test_a_call_that_runs_out_of_memory_ends_alone():
    def greedy():
        raise MemoryError

    measured = interleaved({"greedy": greedy, "modest": list}, 2, torch.device("cpu"))
    assert measured["greedy"] == OUT_OF_MEMORY
    assert measured["modest"]["median"] >= 0


def test_an_error_that_is_not_of_memory_is_not_swallowed():
    def broken():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        interleaved({"broken": broken}, 1, torch.device("cpu"))


def test_the_crossover_lies_between_the_last_loss_and_the_win():
    def row(length, ours, exact):
        seconds = {"performer": {"forward": {"median": ours}}, "exact": exact}
        return {"dtype": "float32", "causal": False, "length": length, "seconds": seconds}

    def of(median):
        return {"forward": {"median": median}}

    loses, wins = row(100, 4.0, of(1.0)), row(400, 1.0, of(4.0))
    lost_to_memory = row(800, 1.0, {"forward": OUT_OF_MEMORY})
    assert crossover([loses, wins], "float32", False, "forward") == pytest.approx(200)
    assert crossover([loses], "float32", False, "forward") is None
    assert crossover([wins], "float32", False, "forward") == pytest.approx(400)
    assert crossover([loses, lost_to_memory], "float32", False, "forward") > 100


def test_a_model_step_is_timed_and_weighed_for_each_mechanism():
    config = {
        "vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 13, "num_projections": 7,
    }  # fmt: skip
    device = torch.device("cpu")
    names = ("exact", "identity", "performer-softmax")
    seconds = seconds_of_step(config, names, 17, batch=2, repeats=1, device=device)
    for name in names:
        assert seconds[name]["forward"].keys() == seconds[name]["forward_backward"].keys()
    # At this size memory is that of the program; the claim is that a number comes back.
    assert peak_of_step(config, "identity", 17, 2, device) > 0


def test_the_kernels_of_a_peer_are_given_the_features_of_favor(monkeypatch):
    """In their layout, without a scale of their own. A sum stands for kernels that need a GPU."""

    def chunk_linear_attn(q, k, v, scale, normalize):
        assert (scale, normalize) == (1.0, True)
        scores = torch.einsum("bihm,bjhm->bhij", q, k).tril()
        out = torch.einsum("bhij,bjhd->bihd", scores / scores.sum(dim=-1, keepdim=True), v)
        return out, None

    kernels = types.SimpleNamespace(chunk_linear_attn=chunk_linear_attn)
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", types.ModuleType("fla.ops"))
    monkeypatch.setitem(sys.modules, "fla.ops.linear_attn", kernels)
    phi = SoftmaxFeatures(5, 7)
    tensors = torch.randn(3, 2, 3, 11, 5).unbind()
    found = benchmark._flash_linear_attention(phi, *tensors)
    torch.testing.assert_close(found, favor_attention(*tensors, phi, is_causal=True))
