"""Long Range Arena: the published models have the published shapes, a run resumes, and the table
says what the numbers say."""

import sys
from dataclasses import replace

import pytest
import torch

from performers.data.labeled import byte_rows
from performers.models import MECHANISMS
from performers.reproduction.protocol import EXPERIMENTS, load_experiment


@pytest.fixture(scope="module")
def experiment():
    return load_experiment(EXPERIMENTS / "long-range-arena")


@pytest.fixture(scope="module")
def part(experiment):
    return lambda name: sys.modules[f"experiment_long-range-arena.{name}"]


def built(experiment, part, config, task, mechanism):
    amount = config.amounts[task]
    with torch.device("meta"):
        return part("training").build(
            part("tasks").TASKS[task], amount, config.models[task],
            experiment.fields(mechanism, amount.length), config.num_projections, 0,
        )  # fmt: skip


PUBLISHED_SIZES = {
    "listops": (6, 8, 512, 2048),
    "text": (4, 4, 256, 1024),
    "retrieval": (4, 4, 128, 512),
    "image": (1, 1, 32, 64),
    "pathfinder": (1, 2, 32, 32),
    "path-x": (1, 2, 32, 32),
}


@pytest.mark.parametrize("task", PUBLISHED_SIZES)
def test_models_of_the_paper_s_scale_have_its_sizes_and_read_its_lengths(experiment, part, task):
    config = experiment.CONFIGS["paper"]
    model = built(experiment, part, config, task, "exact")
    fields = model.config
    layers, heads, hidden, intermediate = PUBLISHED_SIZES[task]
    assert fields.num_hidden_layers == layers
    assert fields.num_attention_heads == heads
    assert (fields.hidden_size, fields.intermediate_size) == (hidden, intermediate)
    row = part("tasks").TASKS[task]
    length = config.amounts[task].length
    shape = (3, 2, length) if row.is_pair else (3, length)
    inputs = row.inputs(torch.ones(shape, dtype=torch.uint8, device="meta"))
    assert model(**inputs).logits.shape == (3, row.num_labels)


def test_every_mechanism_is_built_at_the_paper_s_scale(experiment, part):
    config = experiment.CONFIGS["paper"]
    assert set(config.amounts) == set(PUBLISHED_SIZES)
    baselines = {name for name in MECHANISMS if not name.startswith("performer-")}
    assert baselines < set(config.mechanisms)
    for mechanism in config.mechanisms:
        model = built(experiment, part, config, "path-x", mechanism)
        assert model.config.attention == mechanism


def test_an_interrupted_run_goes_on_with_what_is_not_finished(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smoke = experiment.CONFIGS["smoke"]
    tiny = replace(smoke, amounts={"retrieval": smoke.amounts["retrieval"]})
    lines = []

    def be_interrupted(line):
        lines.append(line)
        if line == "training on retrieval: performer-relu":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run(tiny, be_interrupted)
    assert lines[0] == "preparing retrieval"
    again = []
    results = experiment.run(tiny, again.append)
    assert again == lines[-1:]
    whole = experiment.run(tiny, lines.append)
    kept = ("task", "mechanism", "accuracy", "steps")
    first, second = (
        [[row[key] for key in kept] for row in found["rows"]] for found in (results, whole)
    )
    assert first == second
    assert results["tasks"] == whole["tasks"]


def test_the_distance_of_the_dots_is_measured_from_dot_to_dot(part):
    tasks = part("tasks")
    images = torch.zeros(3, 32, 32, dtype=torch.uint8)
    images[:, 28] = 2  # no dot, but a dash
    for image, dots in zip(images, [(5, 7, 21, 19), (5, 7, 5, 24), (5, 7, 5, 7)], strict=True):
        for row, column in (dots[:2], dots[2:]):
            image[row - 1 : row + 2, column - 1 : column + 2] = 3
    data = tasks.LabeledSequences(images.flatten(1), torch.tensor([1, 1, 0]))
    torch.testing.assert_close(tasks._distances(data), torch.tensor([20.0, 17.0, 0.0]))
    assert tasks.by_distance(tasks.Split(data, data, {})) == 1.0


def test_short_pathfinder_has_four_grays_of_which_dots_alone_have_the_brightest(part):
    tasks = part("tasks")
    side = 8
    split = tasks.TASKS["pathfinder-short"].prepare(
        tasks.Amount(side * side, 40, 20), "packages", 0, lambda line: None
    )
    assert set(split.train.tokens.unique().tolist()) == set(range(4))
    assert split.train.most_frequent_share() == split.test.most_frequent_share() == 0.5
    # Two dots of a diameter of two pixels.
    assert (split.train.tokens == 3).sum(1).max() <= 2 * 9
    assert (split.train.tokens == 3).any(1).all()


def test_a_histogram_tells_pieces_of_one_document_from_others(part):
    tasks = part("tasks")
    pairs = [(b"aabb", b"baba"), (b"aab", b"aba"), (b"aabb", b"ccdd"), (b"ab", b"cdd")]
    tokens = torch.stack([byte_rows([pair[place] for pair in pairs], 5) for place in (0, 1)], dim=1)
    data = tasks.LabeledSequences(tokens, torch.tensor([1, 1, 0, 0]))
    torch.testing.assert_close(tasks._likenesses(data), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert tasks.by_histogram(tasks.Split(data, data, {})) == 1.0


RESULTS = {
    "device": "a machine",
    "tasks": {
        "text": {"train": 97, "test": 400, "most_frequent": 0.5, "shortcut": None, "origin": {}},
        "image": {"train": 97, "test": 900, "most_frequent": 0.1, "shortcut": 0.9, "origin": {}},
    },
    "rows": [
        {"task": task, "mechanism": name, "accuracy": accuracy, "steps": steps, "seconds": 2.0,
         "bytes": size * 2**20}
        for task, name, accuracy, steps, size in [
            ("text", "exact", 0.60, 10, 30),
            ("image", "exact", 0.11, 10, 50),
            ("text", "performer-positive", 0.54, 20, 10),
            ("image", "performer-positive", 0.3, 80, 20),
            ("text", "performer-relu", 0.56, 10, 10),
            ("image", "performer-relu", 0.2, 10, 20),
        ]
    ],
}  # fmt: skip


def test_the_table_has_scores_speeds_and_memory_beside_the_published_mean(experiment):
    config = {
        "amounts": {"text": {"length": 97}, "image": {"length": 1009}},
        "trainings": {
            "text": {"seconds": 2.5, "steps": 7}, "image": {"seconds": None, "steps": 35_000},
        },
    }  # fmt: skip
    text = experiment.summary(config, RESULTS)
    rows = {
        cells[1]: cells[2:-1]
        for line in text.splitlines()
        if len(cells := [cell.strip() for cell in line.split("|")]) == 10
    }
    assert rows["exact"] == [
        "**60.0**", "11.0", "35.5", "54.39", "1 of 2", "1.00", "40 MiB",
    ]  # fmt: skip
    # Twice and eight times as fast: four times in the geometric mean. 54 % of 400 are 1.6 standard
    # errors of 2.5 points above chance.
    assert rows["performer-positive"] == [
        "54.0", "**30.0**", "**42.0**", "", "1 of 2", "4.00", "15 MiB",
    ]  # fmt: skip
    assert rows["performer-relu"][:4] == ["56.0", "20.0", "38.0", "51.41"]
    assert rows["the most frequent label"][:2] == ["50.0", "10.0"]
    assert rows["a rule of one number"][:2] == ["", "90.0"]
    assert "text: 2.5 s on 97 tokens, 97 to train on" in text
    assert "image: 35,000 steps on 1,009 tokens" in text
    assert "| exact | +4.0 | +1.0 |" in text
    assert "(performer-positive) performer-positive has the highest mean" in text
    slow = [
        row | {"seconds": 16.0} if row["mechanism"] != "exact" else row for row in RESULTS["rows"]
    ]
    text = experiment.summary(config, RESULTS | {"rows": slow})
    assert "No mechanism that attends is faster" in text
    assert "The highest mean has performer-positive." in text
