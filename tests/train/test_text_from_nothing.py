"""A model of its own reads a text byte by byte, without a tokenizer that somebody made for it."""

import json
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from performers.models import PerformerForMaskedLM
from performers.train import Evaluation, Generation, Run, load_config
from performers.train.byte_tokenizer import byte_tokenizer
from performers.train.embed import Embedding
from performers.train.fill import Filling
from performers.viz import write_report

LETTERS = "Dž, ein Wort: 語 naïve 🙂\n"
SMALL = [
    "data.length=33", "data.test_fraction=0.1", "model.hidden_size=16", "model.num_hidden_layers=1",
    "model.intermediate_size=16", "model.num_projections=5", "model.window_size=4",
    "trainer.max_steps=2", "trainer.use_cpu=true", "trainer.disable_tqdm=true",
    "compare=[identity]",
]  # fmt: skip


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(LETTERS * 60)
    return path


@pytest.fixture(scope="module")
def run(book, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs") / "run"
    Run.prepare(load_config("demo", [f"data.text={book}", *SMALL]), place).train()
    return place


def test_every_text_comes_back_from_its_bytes():
    tokenizer = byte_tokenizer()
    tokens = tokenizer(LETTERS)["input_ids"]
    assert len(tokens) == len(LETTERS.encode())
    assert tokenizer.decode(tokens) == LETTERS
    assert not set(tokens) & {tokenizer.pad_token_id, tokenizer.mask_token_id}
    assert len(tokenizer) == 2 + 256


def test_a_shipped_config_trains_on_a_text_by_overrides_alone(run, book):
    saved = AutoTokenizer.from_pretrained(run / "model")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert saved.decode(saved(LETTERS)["input_ids"]) == LETTERS
    assert model.config.vocab_size == len(saved)
    metrics = json.loads((run / "metrics.json").read_text())
    assert [model["attention"] for model in metrics["models"]] == ["performer-positive", "identity"]
    assert "bits per token" in write_report(run).read_text()


def test_evaluate_gives_the_scores_of_the_run(run, book, tmp_path):
    evaluation = Evaluation.prepare(run, [book], length=33)
    assert len(evaluation.sequences) == len(book.read_bytes()) // 33
    config = load_config("demo", [f"data.text={book}", *SMALL])
    held_out = Run.prepare(config, tmp_path / "again").data.test
    scores = replace(evaluation, sequences=held_out).run()
    result = json.loads((run / "result.json").read_text())
    for name, value in result["metrics"]["test"].items():
        assert scores[name] == pytest.approx(value, rel=1e-6), name


def test_generate_goes_on_with_a_text(run):
    generation = Generation.prepare(run, prompt="ein W", count=1, length=12, temperature=0)
    (sample,) = generation.run()
    assert generation.written(sample).startswith("ein W")
    with pytest.raises(ValueError, match="no token to begin a text with: give a prompt"):
        Generation.prepare(run, length=12)


def test_hidden_bytes_are_those_of_the_text(book, tmp_path):
    config = load_config("demo", [f"data.text={book}", *SMALL, "task=masked-lm", "compare=[]"])
    run = Run.prepare(config, tmp_path / "run")
    assert isinstance(run.build(config), PerformerForMaskedLM)
    tokenizer = byte_tokenizer()
    batch = run.task.collator(0)([run.data.train[i] for i in range(8)])
    hidden = batch["input_ids"] == tokenizer.mask_token_id
    assert hidden.any()
    assert (batch["labels"][hidden] > tokenizer.mask_token_id).all()


def test_what_reads_proteins_refuses_a_model_of_text(run, tmp_path):
    proteins = tmp_path / "proteins.fasta"
    proteins.write_text(">a\nMKTAYIAK\n")
    for prepare in (
        lambda: Embedding.prepare(run, [proteins], tmp_path / "out.npz"),
        lambda: Filling.prepare(run, "MK?A"),
    ):
        with pytest.raises(ValueError, match="must hold a model of proteins, which has 29 tokens"):
            prepare()
