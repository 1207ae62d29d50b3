"""Trainings of equal steps: what ends them, what is the same for all, and the paper's sizes."""

import sys

import pytest
import torch

from performers.models import PerformerConfig, PerformerForMaskedLM
from performers.reproduction.proteins import Proteins
from performers.reproduction.protocol import EXPERIMENTS, load_experiment
from performers.reproduction.steps import Steps, drawn_batches, scored_batches, train_for_steps
from performers.train.tasks import TASKS

TASK = TASKS["masked-lm"]


def experiment(name):
    return load_experiment(EXPERIMENTS / name)


def part(name, module):
    experiment(name)
    return sys.modules[f"experiment_{name}.{module}"]


@pytest.fixture(scope="module")
def proteins():
    return Proteins.read("sample", 29, 7, {"valid": 0.1})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return PerformerForMaskedLM(
        PerformerConfig(
            vocab_size=29, hidden_size=12, num_hidden_layers=1, num_attention_heads=3,
            intermediate_size=7, num_projections=5, hidden_dropout_prob=0.0, pad_token_id=0,
        )
    )  # fmt: skip


def test_equal_seeds_give_equal_curves_and_ω_is_redrawn_every_so_many_steps(proteins, model):
    valid = scored_batches(proteins.scored["valid"], TASK, 5, 0)
    draws = []
    model.redraw_features = lambda: draws.append(None)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    plan = Steps(steps=6, evaluations=3, redraw_every=2, redraw_from=3)
    found = []
    for _ in range(2):
        model.load_state_dict(weights)
        batches = drawn_batches(proteins.train, TASK, 3, seed=5)
        found.append(train_for_steps(model, batches, valid, plan, TASK.shift))
    assert found[0] == found[1]
    assert [step for step, _, _ in found[0]["curve"]] == [0, 2, 4, 6]
    assert len(found[0]["gradients"]) == 3
    assert found[0]["stopped"] is None
    assert len(draws) == 4  # after steps 4 and 6, twice


def test_a_training_that_diverges_ends_at_that_step_with_what_it_had_reached(proteins, model):
    valid = scored_batches(proteins.scored["valid"], TASK, 5, 0)
    batches = drawn_batches(proteins.train, TASK, 3, seed=5)

    def batch(step):
        if step == 3:
            with torch.no_grad():
                model.lm_head.weight[7, 5] = torch.nan
        return batches(step)

    found = train_for_steps(model, batch, valid, Steps(steps=6, evaluations=3), TASK.shift)
    assert found["stopped"] == 4
    assert [step for step, _, _ in found["curve"]] == [0, 2]


def test_batches_differ_from_step_to_step_and_from_seed_to_seed(proteins):
    batches = [drawn_batches(proteins.train, TASK, 3, seed) for seed in (5, 6)]
    found = [batch(step)["input_ids"] for batch in batches for step in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_without_the_normalizer_the_output_is_the_plain_sum_in_every_layer():
    module = experiment("figures-16-and-17")
    config = module.CONFIGS["smoke"]
    plain, normalized = (module.build(config, "relu", flag, 0) for flag in (False, True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(plain.state_dict().values(), normalized.state_dict().values(), strict=True)
    )
    attention = plain.performer.layers[0].attention.mechanism
    q, k, v = torch.rand(3, 1, 2, 5, 8).unbind()
    phi = attention.feature_map
    sums = phi.query_features(q).dense() @ phi.key_features(k).dense().mT @ v
    torch.testing.assert_close(attention(q, k, v), sums)


def test_figures_16_and_17_at_the_papers_scale_are_eight_kernels_on_512_tokens():
    module = experiment("figures-16-and-17")
    paper = module.CONFIGS["paper"]
    assert (paper.length, len(paper.kernels), len(paper.batch_sizes)) == (512, 8, 2)
    with torch.device("meta"):
        for kernel in paper.kernels[:1]:
            model = module.build(paper, kernel, False, 0).to("meta")
            assert model.config.attention == f"performer-{kernel}"
            assert model(torch.zeros(1, 512, dtype=torch.int64)).logits.shape == (1, 512, 29)


def test_figure_18_at_the_papers_scale_is_the_model_of_figure_6():
    module = experiment("figure-18")
    paper = module.CONFIGS["paper"]
    assert (paper.num_hidden_layers, paper.length, paper.learning_rates) == (36, 1024, (1e-3,))
    with torch.device("meta"):
        model = module.build(module.replace(paper, num_hidden_layers=1), "as published", "U", 0).to(
            "meta"
        )
        assert model(torch.zeros(1, 67, dtype=torch.int64)).logits.shape == (1, 67, 29)
    up = model.performer.layers[0].mlp.up_proj.weight
    assert up.shape == (1024, 512)
    assert model.config.hidden_act == "relu"


def test_figure_18_two_programs_of_the_linear_transformer_agree_where_features_are_large():
    errors = part("figure-18", "attentions").errors_of_output((0.0, 20.0), seed=0)
    ours, published, _ = errors.values()
    assert max(ours) < 1e-6
    assert published[0] < 1e-6
    assert published[1] > 0.5


def test_figure_7_at_the_papers_scale_is_performers_half_as_deep_on_12288_bytes():
    module = experiment("figure-7-left")
    paper = module.CONFIGS["paper"]
    depths = {}
    for (name, layers), fields in module.models(paper).items():
        depths.setdefault(name, []).append(layers)
        if len(depths[name]) > 1:
            continue
        shallow = module._deepened(fields, 2)  # as good as 24 layers, and built in less time
        with torch.device("meta"):
            model = module.build(shallow, 0).to("meta")
        assert model.config.image_shape == [64, 64, 3]
        assert model.performer.layers[0].mlp.up_proj.weight.shape == (2048, 512)
    assert depths[module.RELU] == depths[module.SOFTMAX] == [6, 12]
    assert depths[module.REFORMER] == [12, 24]
    assert module.models(paper)[module.REFORMER, 24]["attention"] == ["local", "reformer"] * 12


def test_no_photograph_is_in_both_parts_and_the_marginal_entropy_is_that_of_its_bytes():
    photographs = part("figure-7-left", "photographs")
    cut = photographs.Tiles.read("scikit-learn", 64, 1, 0, print)
    assert {*cut.photographs["train"], *cut.photographs["valid"]} == {"china", "flower"}
    assert cut.train.shape == cut.valid.shape == (60, 64, 64, 3)
    halves = (
        torch.tensor([0, 255], dtype=torch.uint8).repeat(8).reshape(1, 4, 4, 1).repeat(1, 1, 1, 3)
    )
    assert photographs.marginal_bits(halves) == pytest.approx(1.0)
    stripes = halves.repeat(1, 64, 64, 1)
    for is_after, bits in ((False, 1.0), (True, 0.0)):
        found = photographs.frequency_bits(stripes, stripes, is_after=is_after)
        assert found == pytest.approx(bits, abs=0.01)
    text = photographs.packed(cut.valid[:2])
    assert torch.equal(
        torch.from_numpy(photographs.unpacked(text, (2, 64, 64, 3)).copy()), cut.valid[:2]
    )


def test_figure_15_at_the_papers_scale_trains_the_regular_model_from_scratch():
    module = experiment("figure-15")
    paper = module.CONFIGS["paper"]
    assert (paper.vocab_size, paper.length, paper.pretraining_steps) == (32768, 1024, 0)
    fields = module.model_fields(paper, module.TRIGONOMETRIC)
    with torch.device("meta"):
        model = PerformerForMaskedLM(
            PerformerConfig(**{**fields, "num_hidden_layers": 1}, vocab_size=paper.vocab_size)
        ).to("meta")
        assert model(torch.zeros(1, 67, dtype=torch.int64)).logits.shape == (1, 67, 32768)
    assert fields["num_hidden_layers"] == 6
    assert model.performer.layers[0].mlp.up_proj.weight.shape == (2048, 512)


def test_figure_15_models_differ_in_ω_alone():
    module = experiment("figure-15")
    config = module.CONFIGS["smoke"]
    books = module.prepared(config, print)[0]
    start = books.build_model(module.model_fields(config, {"attention": "exact"}), 0)
    one, other = (module.started(config, books, start, module.POSITIVE, seed) for seed in (0, 1))
    differing = [
        name
        for (name, x), y in zip(one.state_dict().items(), other.state_dict().values(), strict=True)
        if not torch.equal(x, y)
    ]
    assert differing
    assert all(name.endswith(".omega") for name in differing)
