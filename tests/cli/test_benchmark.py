"""`performers benchmark`: what it writes, what it refuses, and that a failing row ends alone."""

import json
import re
import sys
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.main import get_command
from typer.testing import CliRunner

from performers import SoftmaxFeatures, favor_attention
from performers.cli import app
from performers.speed import (
    Plan,
    competitors,
    crossover,
    peak_of_step,
    seconds_of_step,
    wins_from,
)
from performers.speed import attention as benchmark
from performers.speed.settings import SETTINGS, Layer
from performers.speed.timing import OUT_OF_MEMORY, interleaved

MODES = ("bidirectional", "causal")
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
        for name in ("exact", "identity", *SETTINGS):
            both = row["seconds"][name]["forward_backward"]
            assert 0 < both["lower_quartile"] <= both["median"] <= both["upper_quartile"]
        assert row["floor_seconds"].keys() == {"exact", *SETTINGS}
    assert [(row["setting"], row["causal"]) for row in found["correctness"]] == [
        (name, causal) for causal in (False, True) for name in SETTINGS
    ]
    assert all(row["relative_error"] < 1e-4 for row in found["correctness"])
    assert [(row["causal"], row["length"]) for row in found["models"]] == [(False, 29), (True, 29)]
    assert found["decoding"][0]["context"] == 11
    assert found["decoding"][0]["bytes"]["plain"] == 4 * 2 * 7 * (5 + 2)
    assert found["decoding"][0]["bytes"]["near-field"] > 4 * 2 * 2 * 64 * (5 + 5)
    assert found["environment"]["threads"] == 1
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".png", ".svg"}
    verdict = result.output.partition("faster than exact attention")[2]
    assert all(f"{mode}, float32, {name}" in verdict for mode in MODES for name in SETTINGS)

    again = run(*SMALL, "--length", 13, "--output", output)
    assert again.exit_code == 2
    assert "--force" in again.stderr


def test_an_interrupted_benchmark_keeps_what_it_measured_and_goes_on(tmp_path, monkeypatch):
    """Interrupted at each length but the first, the same command measures each row once."""
    output, measured, interrupted = tmp_path / "speed.json", [], set()
    real = benchmark._time_row

    def interrupted_once(plan, made, dtype, causal, length, slow):
        if length != 13 and (causal, length) not in interrupted:
            interrupted.add((causal, length))
            raise KeyboardInterrupt
        measured.append((causal, length))
        return real(plan, made, dtype, causal, length, slow)

    monkeypatch.setattr(benchmark, "_time_row", interrupted_once)
    what = ["--setting", "plain", "--dtype", "float32", "--no-memory", "--no-models"]
    arguments = [*SMALL, *what, "--length", 13, "--length", 29, "--output", output]
    kept = []
    for _ in range(2):
        result = run(*arguments)
        assert result.exit_code == 130
        assert "same command" in result.stderr
        assert not output.exists()
        kept = json.loads((tmp_path / "speed.json.unfinished").read_text())["time"]
    assert [row["length"] for row in kept] == [13, 29, 13]

    other = run(*arguments[2:])
    assert other.exit_code == 2
    assert "another plan" in other.stderr

    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert measured == [(False, 13), (False, 29), (True, 13), (True, 29)]
    found = json.loads(output.read_text())
    assert found["time"][:3] == kept
    assert len(found["correctness"]) == 2
    assert not (tmp_path / "speed.json.unfinished").exists()


def test_a_mechanism_that_was_too_slow_is_not_tried_by_a_resumed_benchmark():
    plan = Plan(
        lengths=(13, 29), settings=("plain",), heads=2, dim=5, num_projections=7, repeats=1,
        dtypes=("float32",), memory_lengths=(), model_lengths=(), contexts=(), patience=0.0,
    )  # fmt: skip
    kept = []
    whole = benchmark.run(plan, lambda line: None, lambda x: kept.append(json.dumps(x)))
    resumed = benchmark.run(plan, lambda line: None, begun=json.loads(kept[0]))
    for row, again in zip(whole["time"], resumed["time"], strict=True):
        assert row["seconds"].keys() == again["seconds"].keys()
        for parts in (row["seconds"], again["seconds"]):
            assert isinstance(parts["plain"]["forward"], str) == (row["length"] == 29)


def test_only_the_settings_asked_for_are_timed(tmp_path):
    output = tmp_path / "speed.json"
    asked = ["--setting", "near-field", "--setting", "relu", "--setting", "relu"]
    what = ["--length", 13, "--dtype", "float32", "--no-memory", "--no-models"]
    result = run(*SMALL, *asked, *what, "--output", output)
    assert result.exit_code == 0, result.output
    found = json.loads(output.read_text())
    ours = [name for name in found["time"][0]["seconds"] if name in SETTINGS]
    assert ours == list(found["settings"]) == ["near-field", "relu"]
    assert found["models"] == []
    assert found["decoding"][0]["seconds"].keys() == {"near-field", "exact"}


def test_the_help_names_every_setting():
    (option,) = [x for x in get_command(app).commands["benchmark"].params if x.name == "setting"]
    assert set(SETTINGS) <= set(re.findall(r"[\w-]+", option.help))


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_wrong_answer_is_not_timed(setting, causal, monkeypatch):
    real = competitors.favor_attention

    def wrong(*arguments, backend=None, is_causal, **options):
        out = real(*arguments, backend=backend, is_causal=is_causal, **options)
        return out if backend or is_causal != causal else 1.01 * out

    monkeypatch.setattr(competitors, "favor_attention", wrong)
    plan = Plan(
        lengths=(13,), heads=2, dim=5, num_projections=7, dtypes=("float32",), settings=(setting,),
        repeats=1,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=f"{setting} must be .* causal={causal}"):
        benchmark.run(plan, lambda line: None)


@pytest.mark.parametrize(
    ("option", "word"), [("--dtype", "float31"), ("--device", "cuda"), ("--setting", "planar")]
)
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


def test_each_timed_call_comes_after_one_of_its_own():
    made = []
    calls = {name: lambda name=name: made.append(name) for name in ("first", "second")}
    interleaved(calls, 3, torch.device("cpu"))
    assert made == ["first", "first", "second", "second"] * 3


def test_an_error_that_is_not_of_memory_is_not_swallowed():
    def broken():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        interleaved({"broken": broken}, 1, torch.device("cpu"))


def _rows(*medians):
    """(length, ours, exact attention's); a word stands for what could not be measured."""

    def part(measured):
        return {"forward": measured if isinstance(measured, str) else {"median": measured}}

    return [
        {
            "dtype": "float32",
            "causal": False,
            "length": length,
            "seconds": {"plain": part(ours), "exact": part(exact)},
        }
        for length, ours, exact in medians
    ]


def test_the_crossover_lies_between_the_last_loss_and_the_win():
    def of(*rows):
        return crossover(_rows(*rows), "plain", "float32", False, "forward")

    loses, wins, lost_to_memory = (100, 4.0, 1.0), (400, 1.0, 4.0), (800, 1.0, OUT_OF_MEMORY)
    assert of(loses, wins) == pytest.approx(200)
    assert of(loses) is None
    assert of(wins) == 400
    assert of(loses, lost_to_memory) > 100


def test_a_crossover_is_only_claimed_between_the_lengths_that_were_measured():
    def of(*rows):
        return wins_from(_rows(*rows), "plain", "float32", False, "forward")

    loses, wins = (1000, 4.0, 1.0), (4000, 1.0, 4.0)
    assert of(loses, wins) == "2,000"
    assert of(loses) == "> 1,000"
    assert of(wins) == "≤ 4,000"


def test_products_of_plain_features_are_those_that_torch_counts():
    """φ of queries and keys, K′ᵀV and Q′ times that, without the column of the normalizer."""
    length, m, d = 13, 7, 5
    query, key, value, omega = (torch.randn(n, d) for n in (length, length, length, m))
    with FlopCounterMode(display=False) as counter:
        (query @ omega.mT) @ ((key @ omega.mT).mT @ value)
    setting = SETTINGS["plain"]
    layer = Layer(d, m, 1, False, torch.device("cpu"))
    needed = setting.operations(layer, length)
    assert needed.products == counter.get_total_flops()
    assert needed.exponentials == 2 * length * m
    assert needed.with_backward().products == 3.5 * needed.products


def test_a_setting_costs_what_it_adds_to_plain_features():
    length, m, d, w = 29, 7, 5, 64
    layer = Layer(d, m, 1, False, torch.device("cpu"))
    plain, relu, sharp, near = (
        SETTINGS[name].operations(layer, length)
        for name in ("plain", "relu", "sharp", "near-field")
    )
    assert (relu.products, relu.exponentials) == (plain.products, 0)
    assert sharp.products == plain.products + 4 * length * d**2
    assert length <= w, "every key is near"
    merging = 2 * 2 * m * (d + 1) * length / w
    assert near.products == pytest.approx(sharp.products + 4 * d * length**2 + merging)
    assert near.exponentials == sharp.exponentials + length**2


def test_the_floor_is_the_time_of_the_operations_of_all_heads():
    """At 3 products and 5 exponentials a second."""
    length, d, heads, batch = 13, 5, 2, 3
    plan = Plan(batch=batch, heads=heads, dim=d, num_projections=7)
    for causal, pairs in ((False, length**2), (True, length**2 / 2)):
        floors = benchmark._floors(plan, causal, length, 3.0, 5.0)
        products, exponentials = 4 * d * pairs, pairs
        assert floors["exact"]["forward"] == pytest.approx(
            batch * heads * (products / 3 + exponentials / 5)
        )
        assert floors["exact"]["forward_backward"] == pytest.approx(
            batch * heads * (3.5 * products / 3 + 2 * exponentials / 5)
        )
        # φ of queries and of keys, their sums with the values, the readout; two of these have exps
        assert floors["plain"]["forward"] == pytest.approx(
            batch * heads * (4 * 2 * length * 7 * d / 3 + 2 * length * 7 / 5)
        )
        assert floors.keys() == {"exact", *SETTINGS}
        without = benchmark._floors(plan, causal, length, 3.0, None)
        assert without["exact"]["forward"] == pytest.approx(batch * heads * products / 3)


def test_a_model_step_is_timed_and_weighed_for_each_mechanism():
    config = {
        "vocab_size": 11, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 13, "num_projections": 7,
    }  # fmt: skip
    device = torch.device("cpu")
    models = {
        "exact": {**config, "attention": "exact"},
        "identity": {**config, "attention": "identity", "is_decoder": True},
        "softmax": {**config, "attention": "performer-positive", "window_size": 3},
    }
    seconds = seconds_of_step(models, 17, batch=2, repeats=1, device=device)
    for name in models:
        assert seconds[name]["forward"].keys() == seconds[name]["forward_backward"].keys()
    # At this size memory is that of the program; the claim is that a number comes back.
    assert peak_of_step(models["identity"], 17, 2, device) > 0


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
    found = competitors._flash_linear_attention(phi, *tensors)
    torch.testing.assert_close(found, favor_attention(*tensors, phi, is_causal=True))
