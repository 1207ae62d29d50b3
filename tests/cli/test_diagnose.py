"""`performers diagnose`: a table and a picture of every layer, from a model or from tensors."""

import json

import pytest
import torch
from columns import columns
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from performers import SharpFeatures, SoftmaxFeatures, favor_attention
from performers.cli import app
from performers.functional.sharp import QUERY_RATIO


def run(*arguments):
    return CliRunner().invoke(app, ["diagnose", *map(str, arguments)])


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def tensors(tmp_path):
    path = tmp_path / "attention.safetensors"
    parts = {f"{i}.{part}": torch.randn(2, 3, 29, 7) for i in (0, 1) for part in PARTS}
    save_file(parts, path)
    return path


@pytest.fixture
def model(tmp_path):
    words = ["[UNK]", "[PAD]", "to", "be", "or", "not"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=6, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=13, max_position_embeddings=31,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("to be or not to be " * 20)
    return folder, tmp_path / "text.txt"


PARTS = ("query", "key", "value")
SMALL = ("--num-projections", 16, "--window", 4)


@pytest.mark.parametrize("causal", [(), ("--causal",)])
def test_tensors_are_diagnosed_layer_by_layer(tensors, tmp_path, causal):
    result = run(tensors, *SMALL, *causal, "--output", tmp_path / "picture.png")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split()[:5] == ["error", "of", "the", "output", "averaging"]
    assert [line.split()[0] for line in lines[1:3]] == ["0", "1"]
    assert "Mean error: positive" in result.stdout
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert (tmp_path / "picture.svg").exists()
    assert "cheaper than exact attention at length 29" in result.stdout
    assert (tmp_path / "picture-frontier.png").stat().st_size > 10_000


def test_every_column_of_the_layers_is_what_its_heading_says(tensors, tmp_path):
    result = run(tensors, *SMALL, "--output", tmp_path / "picture.png")
    rows = columns(result.stdout.split("\n\n")[0])
    assert rows[0] == [
        "error of the output", "averaging", "positive", "sharp", "sharp + window",
        "E‖q + k‖²", "sharp", "features", "sharp",
    ]  # fmt: skip
    parts = load_file(tensors)
    for layer, row in enumerate(rows[1:3]):
        query, key, value = (parts[f"{layer}.{part}"] for part in PARTS)
        plain = SoftmaxFeatures(7, 16)
        sharp, beside_window = (
            SharpFeatures(7, 16, 3, "call", query_ratio=ratio) for ratio in (QUERY_RATIO, 1.0)
        )
        exact = (query @ key.mT / 7**0.5).softmax(dim=-1) @ value

        def error(out, exact=exact):
            difference, size = ((out - exact).flatten(2).norm(dim=2), exact.flatten(2).norm(dim=2))
            return float((difference / size).mean())

        errors = [
            error(value.mean(dim=2, keepdim=True).expand_as(exact)),
            error(favor_attention(query, key, value, plain)),
            error(favor_attention(query, key, value, sharp)),
            error(favor_attention(query, key, value, beside_window, window_size=4)),
        ]
        spreads, counts = zip(
            spread_and_count(query, key, plain), spread_and_count(query, key, sharp), strict=True
        )
        assert len({f"{x:.3f}" for x in errors}) == 4
        numbers = [*(f"{x:.3f}" for x in errors), *(f"{x:.1f}" for x in (*spreads, *counts))]
        assert row == [str(layer), *numbers]


def spread_and_count(query, key, phi):
    """E‖q + k‖² over all pairs as φ has them, and (Σ_m u_m)² / Σ_m u_m² of a normalizer Σ_m u_m."""
    query, key = query.double() * 7**-0.25, key.double() * 7**-0.25
    fitted = phi.fitted(query, key, None, scale=1.0, is_streaming=False)
    u = fitted.query_features(query).dense() * fitted.key_features(key).dense().sum(2, keepdim=True)
    count = (u.sum(-1).square() / u.square().sum(-1)).mean()
    if isinstance(phi, SharpFeatures):
        query = fitted.query_side(torch.float64).log_linear(query).inputs
        key = fitted.key_side(torch.float64).log_linear(key).inputs
    spread = (query[:, :, :, None] + key[:, :, None]).square().sum(-1).mean()
    return float(spread), float(count)


def test_heads_and_targets_are_shown_when_asked_for(tensors, tmp_path):
    result = run(
        tensors, *SMALL, "--heads", "--target-error", 0.5, "--output", tmp_path / "picture.png"
    )
    assert result.exit_code == 0, result.output
    assert "0, sharp + window" in result.stdout
    assert "m predicted" in result.stdout
    assert "For an error of 0.5: " in result.stdout or "the lowest is" in result.stdout


def test_numbers_are_json_when_asked_for(tensors, tmp_path):
    tensors_of = {part: 40 * torch.randn(2, 3, 29, 7) for part in PARTS}
    save_file(tensors_of, tensors)  # expected errors beyond all numbers
    result = run(tensors, *SMALL, "--json", "--output", tmp_path / "picture.png")
    record = json.loads(result.stdout)
    layer = record["layers"]["attention"]
    assert list(layer) == ["positive", "sharp", "sharp + window"]
    assert len(layer["sharp"]["heads"]) == 3
    assert layer["positive"]["heads"][0]["expected_error"] is None
    assert record["frontier"]["length"] == 29


def test_a_model_reads_a_text(model, tmp_path):
    folder, text = model
    options = ("--text", text, "--length", 23, "--output", tmp_path / "picture.png")
    result = run(folder, *SMALL, *options)
    assert result.exit_code == 0, result.output
    assert "encoder.layer.1.attention.self" in result.stdout


def test_what_cannot_be_diagnosed_is_one_line(model, tensors, tmp_path):
    folder, text = model
    assert "there is no model folder and no safetensors file" in refused(tmp_path / "nothing")
    assert "pass --text FILE" in refused(folder)
    assert "length must be at most 31 for this model, got 512" in refused(folder, "--text", text)
    text.write_text("to be or not")
    line = refused(folder, "--text", text, "--length", 23)
    assert "the text must have at least 23 tokens, got 4" in line
    save_file({"query": torch.randn(2, 3, 29, 7)}, tensors)
    assert "must hold query, key and value" in refused(tensors)
