"""`performers diagnose`: a table and a picture of every layer, from a model or from tensors."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from performers.cli import app


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
