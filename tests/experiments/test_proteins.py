"""What the experiments on proteins share, and what they measure, does what it says."""

import importlib
import random
import sys
from pathlib import Path

import pytest
import torch

from performers.data import Protein
from performers.data.vocabulary import STANDARD_AMINO_ACIDS, encode
from performers.models import PerformerConfig, PerformerForMaskedLM
from performers.reproduction.means import Mean
from performers.reproduction.proteins import LENGTH_UNIT, Proteins
from performers.reproduction.protocol import EXPERIMENTS, load_experiment
from performers.train.attention import (
    amino_acid_similarity,
    attention_to_amino_acids,
    residue_attention,
)
from performers.train.tasks import TASKS, build_model

ROOT = Path(__file__).parents[2]


def experiment(name):
    return load_experiment(EXPERIMENTS / name)


def part(name):
    """A module beside that of Figures 10 to 13."""
    experiment("figures-10-to-13")
    return sys.modules[f"experiment_figures-10-to-13.{name}"]


@pytest.fixture(scope="module")
def proteins():
    return Proteins.read("sample", 101, 7, {"valid": 0.1, "ood": 0.1}, seed=3)


def test_what_is_scored_is_the_first_of_each_split_that_is_not_empty(proteins):
    assert list(proteins.scored) == ["train", "valid", "ood"]
    assert {len(split) for split in proteins.scored.values()} == {7}
    first, again = proteins.train[6]["input_ids"], proteins.scored["train"][6]["input_ids"]
    assert torch.equal(first, again)


def test_chosen_sequences_come_in_the_order_of_their_indices(proteins):
    chosen = proteins.train.chosen([5, 2, 5])
    for index, place in enumerate([5, 2, 5]):
        assert torch.equal(chosen[index]["input_ids"], proteins.train[place]["input_ids"])
    assert len(proteins.train.chosen([])) == 0


@pytest.mark.parametrize("name", ["masked-lm", "causal-lm"])
def test_batches_have_few_lengths_and_every_seed_is_scored_at_the_same_positions(proteins, name):
    from performers.reproduction.proteins import _task

    rows = [proteins.train[index] for index in range(5)]
    task = _task(name, scoring_seed=3)
    one, other = (task.evaluation_collator(seed)(rows) for seed in (0, 1))
    assert one["input_ids"].shape[1] % LENGTH_UNIT == 0
    assert torch.equal(one["labels"], other["labels"])
    assert task.collator(0)(rows)["input_ids"].shape == one["input_ids"].shape
    # As in any run with this seed, but for the padding.
    expected = TASKS[name].evaluation_collator(3)(rows)["labels"]
    assert torch.equal(one["labels"][:, : expected.shape[1]], expected)


@pytest.mark.parametrize(
    ("samples", "others", "words"),
    [
        ([0.3, 0.31, 0.29], [0.1, 0.11, 0.09], ("+20.00 ± 0.82", "yes")),
        ([0.1, 0.11, 0.09], [0.3, 0.31, 0.29], ("-20.00 ± 0.82", "no")),
        ([0.3, 0.31, 0.29], [0.3, 0.32, 0.28], ("+0.00 ± 1.29", "undecided")),
        ([0.3], [0.1, 0.11, 0.09], ("+20.00", "undecided")),
    ],
)
def test_a_difference_decides_beyond_its_standard_error(samples, others, words):
    difference = Mean.of(samples) - Mean.of(others)
    assert (difference.points(), difference.is_above_0()) == words


def shapes(run):
    """(heads, layers, width within, width) of the model of a run, built without memory."""
    with torch.device("meta"):
        model = build_model(run).to("meta")  # ω is always drawn on the CPU
        logits = model(torch.zeros(1, 67, dtype=torch.int64)).logits
    assert logits.shape == (1, 67, model.config.vocab_size)
    layer = model.performer.layers[0]
    width, hidden = layer.mlp.up_proj.weight.shape
    heads = model.config.num_attention_heads
    return (heads, len(model.performer.layers), width, hidden), model.config.attention


def test_figure_6_at_the_papers_scale_is_five_mechanisms_of_36_layers_on_1024_tokens():
    module = experiment("figure-6")
    paper = module.CONFIGS["paper"]
    assert (paper.length, paper.num_projections, paper.linformer_projections) == (1024, 256, 600)
    for direction, count in {"U": 4, "B": 5}.items():
        models = module.models(paper, direction)
        assert len(models) == count
        assert {fields["num_hidden_layers"] for fields in models.values()} == {36}
        for fields in models.values():  # one layer is as good as 36, and built in less time
            run = module.training_run(paper, direction, {**fields, "num_hidden_layers": 1}, 0)
            assert shapes(run) == ((8, 1, 1024, 512), fields["attention"])


def test_figure_7_at_the_papers_scale_is_one_regular_and_three_small_models_on_8192_tokens():
    module = experiment("figure-7-right")
    paper = module.CONFIGS["paper"]
    assert paper.length == 8192
    built = [shapes(module.training_run(paper, f, 0)) for f in module.models(paper).values()]
    small = [((8, layers, 256, 256), "exact") for layers in (1, 2, 3)]
    regular = (8, 6, 2048, 512)
    assert built == [*small, (regular, "performer-relu"), (regular, "performer-positive")]


def test_figure_13_at_the_papers_scale_reads_800_sequences():
    module = experiment("figures-10-to-13")
    paper = module.CONFIGS["paper"]
    assert paper.num_sequences == 800
    assert (
        module.training_run(paper).model
        == experiment("figure-6").models(experiment("figure-6").CONFIGS["paper"], "B")[
            "Performer-ReLU"
        ]
    )


def test_models_that_are_compared_train_for_the_same_seconds_at_every_scale():
    for name in ("figure-6", "figure-7-right"):
        module = experiment(name)
        for config in module.CONFIGS.values():
            arguments = [config] if name == "figure-7-right" else [config, "B"]
            runs = [
                module.training_run(*arguments, fields, seed)
                for fields in module.models(*arguments).values()
                for seed in (0, 1)
            ]
            assert {run.max_seconds for run in runs} == {config.seconds}


@pytest.fixture
def even():
    """A model whose every token attends to all tokens alike."""
    torch.manual_seed(0)
    config = PerformerConfig(
        vocab_size=29, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=7, attention="exact",
    )  # fmt: skip
    model = PerformerForMaskedLM(config)
    for layer in model.performer.layers:
        torch.nn.init.zeros_(layer.attention.q_proj.weight)
    return model


def framed(sequence):
    return torch.cat([torch.tensor([1]), encode(sequence), torch.tensor([2])])


def test_residues_attend_to_residues_without_the_special_tokens(even):
    matrices = residue_attention(even, framed("MKVXA"))
    assert matrices.shape == (2, 3, 5, 5)
    assert torch.allclose(matrices, torch.full_like(matrices, 1 / 7))


def test_even_attention_gives_each_amino_acid_its_frequency(even):
    shares = attention_to_amino_acids(even, [framed("MKVKA"), framed("KKX")])
    assert shares.shape == (2, 3, 20)
    # Row sums are 5/7 and 3/5: each of 5 rows gives 2/7 to K, each of 3 rows 2/5.
    total = 5 * 5 / 7 + 3 * 3 / 5
    expected = {"M": 5 / 7, "K": 10 / 7 + 6 / 5, "V": 5 / 7, "A": 5 / 7}
    for index, letter in enumerate(STANDARD_AMINO_ACIDS):
        wanted = torch.full((2, 3), expected.get(letter, 0.0) / total)
        assert torch.allclose(shares[..., index], wanted)


def test_attention_to_nothing_is_refused(even):
    with pytest.raises(ValueError, match="at least one sequence, got none"):
        attention_to_amino_acids(even, [])


def test_amino_acids_that_the_same_heads_look_at_are_similar():
    torch.manual_seed(0)
    shares = torch.rand(2, 3, 20)
    shares[..., 5] = 0.1 + 2 * shares[..., 3]
    shares[..., 7] = 1.0 - shares[..., 3]
    similarity = amino_acid_similarity(shares)
    assert similarity[3, 5] == pytest.approx(1.0)
    assert similarity[3, 7] == pytest.approx(-1.0)


def test_heads_are_sorted_by_where_they_look():
    even = torch.full((29, 29), 1 / 29)
    position = torch.arange(29)
    neighbors = ((position[:, None] - position).abs() == 1).float()
    column = torch.zeros(29, 29)
    column[:, 17] = 1.0
    found = part("heads").described(torch.stack([even, neighbors, column])[None])
    assert [head["kind"] for head in found] == ["global", "local", "vertical"]
    assert [(head["layer"], head["head"]) for head in found] == [(1, 1), (1, 2), (1, 3)]
    assert found[1]["near"] == found[2]["top"] == 1.0
    assert found[0]["top"] == pytest.approx(3 / 29, abs=1e-4)


def test_matrices_come_back_out_of_their_text_to_half_a_level():
    torch.manual_seed(0)
    matrices = torch.rand(2, 3, 11, 11)
    heads = part("heads")
    again = heads.unpacked(heads.packed(matrices))
    assert abs(again - matrices.sqrt().numpy()).max() <= 0.5 / 255 + 1e-6


def test_blosum62_is_one_on_its_diagonal_and_knows_the_pairs_of_the_paper():
    similarity = part("similarity")
    blosum = similarity.blosum62()
    assert torch.allclose(blosum, blosum.T)
    assert torch.allclose(blosum.diagonal(), torch.ones(20, dtype=torch.float64))
    d, e = (STANDARD_AMINO_ACIDS.index(letter) for letter in "DE")
    assert float(blosum[d, e]) == pytest.approx(2 / 30**0.5)  # B_DE = 2, B_DD = 6, B_EE = 5
    assert max(similarity.ranks(blosum)[pair] for pair in ("DE", "FY")) <= 10


def test_a_permutation_test_finds_what_is_there_and_is_uniform_where_nothing_is():
    similarity = part("similarity")
    blosum = similarity.blosum62()
    assert similarity.permutation_test(blosum, blosum, 99, seed=0) == 0.01
    generator = torch.Generator().manual_seed(0)
    found = []
    for seed in range(40):
        noise = torch.randn(20, 20, generator=generator, dtype=torch.float64)
        found.append(similarity.permutation_test(noise + noise.T, blosum, 19, seed))
    # p is uniform on 1/20, …, 1: its mean is 0.525, with deviation 0.288.
    assert abs(sum(found) / 40 - 0.525) < 4 * 0.288 / 40**0.5


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module


@pytest.fixture
def build_subset(tool):
    return tool("build_subset")


def test_the_largest_families_of_short_proteins_are_chosen_whole(tool):
    sizes = {"long": (29, 449), "large": (13, 448), "short": (11, 5), "small": (7, 5)}
    all_of = [
        Protein(f"{family}{number}", "", length * "M", family, family)
        for family, (count, length) in sizes.items()
        for number in range(count)
    ]
    chosen = tool("build_families").choose(all_of[::-1], num_families=2)
    assert [protein.family for protein in chosen] == 13 * ["large"] + 11 * ["short"]


def test_a_part_of_a_set_has_whole_families_whatever_the_order_of_the_file(build_subset):
    draw = random.Random(0)
    all_of = [
        Protein(
            f"p{number}", "", "".join(draw.choices(STANDARD_AMINO_ACIDS, k=draw.randrange(5, 43))),
            f"c{number}", f"f{number % 31}",
        )
        for number in range(101)
    ]  # fmt: skip
    chosen = build_subset.choose(all_of, 1009)
    assert 900 < sum(len(protein.sequence) for protein in chosen) <= 1009
    families = {protein.family for protein in chosen}
    assert {p.identifier for p in chosen} == {p.identifier for p in all_of if p.family in families}
    shuffled = draw.sample(all_of, k=len(all_of))
    assert set(build_subset.choose(shuffled, 1009)) == set(chosen)
