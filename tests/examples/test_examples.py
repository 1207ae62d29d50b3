"""Every example runs, and what it says of itself is what it does."""

import importlib.util
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from performers import attention_matrix, linearize, restore
from performers.records import with_block

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "measured")
# What an example needs beside this package's own extras.
NEEDED = {"lightning_loop": "lightning", "sweep": "optuna", "timm_model": "timm"}


def loaded(name):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name], reason=f"examples/{name}.py needs {NEEDED[name]}")
    specification = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # where dataclasses look for it
    specification.loader.exec_module(module)
    return module


measured = loaded("measured")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_measures_the_figures_of_its_docstring(path):
    example = loaded(path.stem)
    figures = example.run(example.SMALL)
    assert list(figures) == list(measured.figures_of(path))
    assert not any("nan" in figure or "inf" in figure for figure in figures.values())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_help_of_an_example_is_its_docstring(path, monkeypatch, capsys):
    loaded(path.stem)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    assert measured.described(path) in capsys.readouterr().out


def test_the_list_of_examples_is_what_their_docstrings_say():
    document = measured.README.read_text("utf-8")
    assert with_block(document, measured.BLOCK, measured.listing()) == document


def test_figures_replace_the_figures_before_and_nothing_else(tmp_path):
    path = tmp_path / "example.py"
    source = '"""Shows.\n\nSays more.\n"""\n\ncode = """ """\n'
    once = measured.with_figures(source, {"a": "1 (b 2)"}, seconds=3.0)
    twice = measured.with_figures(once, {"a": "2", "c, d": "3.5%"}, seconds=4.0)
    for written, figures in ((once, {"a": "1 (b 2)"}), (twice, {"a": "2", "c, d": "3.5%"})):
        path.write_text(written, "utf-8")
        assert measured.figures_of(path) == figures
        assert measured.described(path).startswith("Shows.\n\nSays more.\n\nMeasured in ")
        assert written.endswith('"""\n\ncode = """ """\n')
        assert written.count("Measured in ") == 1


def test_only_the_settings_of_the_file_are_written(monkeypatch, capsys):
    example = loaded("pointer_network")
    monkeypatch.setattr(sys, "argv", ["pointer_network.py", "--write", "--steps", "3"])
    with pytest.raises(SystemExit):
        measured.command(example.__file__, example.run, example.FULL, example.SMALL)
    assert "leave out --small and the others" in capsys.readouterr().err


def test_hulls_go_counterclockwise_around_all_points():
    points = torch.tensor([[0.5, 0.4], [0.0, 1.0], [0.5, 0.0], [1.0, 0.9], [0.4, 0.6]])
    (order,) = loaded("pointer_network").hull(points[None]).tolist()
    assert order == [2, 3, 1, 5, 5]


def test_greedy_answers_are_answers():
    example = loaded("pointer_network")
    points = torch.rand(31, 7, 2)
    assert (example.greedy_sorting(points).sort(dim=1).values == torch.arange(7)).all()
    square = torch.tensor([[[0.5, 0.5], [1.0, 1.0], [0.0, 0.1], [1.0, 0.0], [0.1, 1.0]]])
    assert example.greedy_hull(square).tolist() == [[3, 1, 4, 2, 5]]
    assert example.hull(square).tolist() == [[3, 1, 4, 2, 5]]


def test_attention_along_a_graph_is_the_implied_matrix_times_that_of_walks():
    example = loaded("graph_attention")
    layer = example.GraphAttention(example.FULL)
    transition, _ = example.karate_club()
    x = 3 * torch.randn(34, 64)
    query, key, value = (part.transpose(0, 2) for part in layer.queries_keys_values(x))
    walks = (1 - example.CONTINUE) * sum(
        example.CONTINUE**t * torch.linalg.matrix_power(transition.to_dense(), t)
        for t in range(layer.walk + 1)
    )
    weights = walks * attention_matrix(query, key, layer.phi, normalize=False)
    expected = weights / weights.sum(dim=-1, keepdim=True) @ value
    torch.testing.assert_close(layer(x, transition), expected[0].transpose(0, 1).flatten(1))


def test_random_features_find_the_sides_of_the_karate_club():
    example = loaded("graph_attention")
    settings = replace(example.FULL, num_projections=32, steps=15)
    untrained, found = example.share_found(example.GraphAttention, settings, seed=0)
    assert found > 0.9 > untrained


def test_the_importance_of_patches_is_the_column_sums_of_attention():
    example = loaded("patch_agent")
    phi = example.SoftmaxFeatures(dim=5, num_projections=23)
    query, key = torch.randn(2, 3, 17, 5).unbind()
    matrix = attention_matrix(query[:, None], key[:, None], phi)[:, 0]
    torch.testing.assert_close(example.importance(query, key, phi), matrix.sum(dim=1))


def test_swapped_attention_has_the_same_weights():
    example = loaded("vision_transformer")
    exact = example.VisionTransformer(example.FULL)
    before = {name: weight.clone() for name, weight in exact.state_dict().items()}
    swapped = example.swap(exact, num_projections=16)
    kinds = {type(module).__name__ for module in swapped.modules()}
    assert "FavorAttention" in kinds
    assert "MultiheadAttention" not in kinds
    after = swapped.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_a_converted_model_of_timm_keeps_its_weights_and_attends_by_them():
    example = loaded("timm_model")
    exact = example.build(example.FULL).eval()
    before = {name: weight.clone() for name, weight in exact.state_dict().items()}
    images, _ = example.digits(3)
    wanted = exact(images)
    converted = example.convert(exact, num_projections=512)
    layers = [x for x in converted.modules() if type(x) is example.FavorTimm]
    assert len(layers) == example.FULL.layers
    after = converted.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    assert (converted(images) - wanted).norm() < 0.1 * wanted.norm()
    with pytest.raises(ValueError, match="leave out attn_mask"):
        layers[0](torch.zeros(1, 5, 48), is_causal=True)


def test_two_lines_let_a_sentence_transformer_read_whole_documents(tmp_path):
    """Those of the docstring, on a model that reads 31 tokens."""
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    example = loaded("long_documents")
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "to": 2, "be": 3}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", model_max_length=31
    ).save_pretrained(tmp_path)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertConfig(
        vocab_size=4, max_position_embeddings=31, intermediate_size=13, pad_token_id=1, **sizes
    )
    BertModel(bert).save_pretrained(tmp_path)
    model = library.SentenceTransformer(str(tmp_path), device="cpu")
    document = "to be " * 20 + "to " * 47
    cut = torch.tensor(model.encode(document))
    assert torch.equal(cut, torch.tensor(model.encode("to be " * 15 + "to")))

    linearize(example.extend_positions(model[0].auto_model, 128))
    model.max_seq_length = 128
    whole = torch.tensor(model.encode(document))
    tokens = torch.tensor([[2, 3] * 20 + [2] * 47])
    expected = example.embed(restore(model[0].auto_model), tokens, torch.ones_like(tokens) > 0)
    torch.testing.assert_close(whole, expected[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole, cut, atol=1e-2)


def test_documents_are_cut_into_sentences_without_names_of_libraries():
    example = loaded("hierarchical_documents")
    text = "Return a Tensor of torch. Not\nin place:\n\nSee PyTorch"
    assert example.sentences(text) == [
        ["return", "a", "tensor", "of"], ["not", "in", "place"], ["see"],
    ]  # fmt: skip
