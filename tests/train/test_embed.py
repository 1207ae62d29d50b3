"""An embedding is the mean of what the model makes of a protein's residues, however it is run."""

import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from performers.data import encode, read_fasta
from performers.data.vocabulary import BOS_TOKEN_ID, EOS_TOKEN_ID, VOCAB_SIZE
from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM
from performers.train import Embedding


def saved(folder, model=PerformerForMaskedLM, **options):
    torch.manual_seed(0)
    config = PerformerConfig(
        vocab_size=VOCAB_SIZE, hidden_size=12, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=17, num_projections=7, **options,
    )  # fmt: skip
    model(config).save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return saved(tmp_path / "model")


class KilledError(Exception):
    pass


def killed_after(parts, embedding, monkeypatch):
    """Run until so many parts are written."""
    write = Embedding._write_part

    def write_or_die(self, index, rows):
        if index == parts:
            raise KilledError
        write(self, index, rows)

    monkeypatch.setattr(Embedding, "_write_part", write_or_die)
    with pytest.raises(KilledError):
        embedding.run()
    monkeypatch.undo()


@pytest.mark.parametrize("model", [PerformerForMaskedLM, PerformerForCausalLM])
def test_an_embedding_is_made_of_the_last_hidden_states_of_the_residues(model, fasta, tmp_path):
    checkpoint = saved(tmp_path / "model", model)
    loaded = model.from_pretrained(checkpoint).eval()
    records = list(read_fasta(fasta))
    files = {}
    for pooling in ("mean", "residue"):
        path = tmp_path / f"{pooling}.npz"
        found = Embedding.prepare(checkpoint, [fasta], path, pooling, batch_tokens=300).run()
        assert (found["proteins"], found["dim"]) == (len(records), 12)
        files[pooling] = np.load(path, allow_pickle=False)
        assert files[pooling]["ids"].tolist() == [record.identifier for record in records]
    starts, of_residues = files["residue"]["starts"], files["residue"]["embeddings"]
    for number in (0, 1, 57, 100):
        ids = encode(records[number].sequence)
        ids = torch.cat([torch.tensor([BOS_TOKEN_ID]), ids, torch.tensor([EOS_TOKEN_ID])])
        with torch.no_grad():
            expected = loaded.performer(ids[None]).last_hidden_state[0, 1:-1].numpy()
        one = of_residues[starts[number] : starts[number + 1]]
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-5)
        mean = files["mean"]["embeddings"][number]
        np.testing.assert_allclose(mean, expected.mean(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "residue"])
def test_a_resumed_run_writes_the_bytes_of_one_that_was_not_interrupted(
    pooling, checkpoint, fasta, tmp_path, monkeypatch
):
    whole, resumed = tmp_path / "whole.npz", tmp_path / "resumed.npz"
    Embedding.prepare(checkpoint, [fasta], whole, pooling, 300).run()
    begun = Embedding.prepare(checkpoint, [fasta], resumed, pooling, 300)
    killed_after(4, begun, monkeypatch)
    assert not resumed.exists()
    again = Embedding.prepare(checkpoint, [fasta], resumed, pooling, 300, resume=True)
    written = []
    monkeypatch.setattr(
        Embedding, "_write_part", lambda self, index, rows, write=Embedding._write_part: (
            written.append(index), write(self, index, rows)
        )
    )  # fmt: skip
    again.run()
    assert written == list(range(4, len(again.batches())))
    assert resumed.read_bytes() == whole.read_bytes()
    assert not again.parts.exists()


KILLED = """
import os, signal, sys
import numpy
from performers.cli import app

write, parts = numpy.save, []

def write_or_die(file, rows, **options):
    parts.append(rows)
    if len(parts) == 5:
        file.write(b"half of a part")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, rows, **options)

numpy.save = write_or_die
app(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("pooling", ["mean", "residue"])
def test_a_process_killed_within_a_part_is_resumed_to_the_same_bytes(
    pooling, checkpoint, fasta, tmp_path
):
    whole, resumed = tmp_path / "whole.npz", tmp_path / "resumed.npz"
    Embedding.prepare(checkpoint, [fasta], whole, pooling, 300).run()
    options = ["--output", str(resumed), "--pooling", pooling, "--batch-tokens", "300"]
    command = [sys.executable, "-c", KILLED, "embed", str(checkpoint), str(fasta), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = Embedding.prepare(checkpoint, [fasta], resumed, pooling, 300, resume=True)
    assert sorted(path.name for path in again.parts.iterdir()) == [
        *(f"part-{number:06}.npy" for number in range(4)), "part-000004.partial", "plan.json",
    ]  # fmt: skip
    again.run()
    assert resumed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("pooling", ["mean", "residue"])
def test_a_damaged_part_is_made_again(pooling, checkpoint, fasta, tmp_path, monkeypatch):
    whole, resumed = tmp_path / "whole.npz", tmp_path / "resumed.npz"
    Embedding.prepare(checkpoint, [fasta], whole, pooling, 300).run()
    begun = Embedding.prepare(checkpoint, [fasta], resumed, pooling, 300)
    killed_after(7, begun, monkeypatch)
    bytes_of = [begun._part(index).read_bytes() for index in range(7)]
    begun._part(0).write_bytes(b"")
    begun._part(1).write_bytes(bytes_of[1][:-5])
    begun._part(2).write_bytes(bytes_of[2][:30])
    begun._part(3).write_bytes(b"PK" + bytes_of[3])
    np.save(begun._part(4), np.zeros((2, 3), np.float32))
    np.save(begun._part(5), np.load(begun._part(5)).astype(np.float64))
    Embedding.prepare(checkpoint, [fasta], resumed, pooling, 300, resume=True).run()
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_batch_is_no_larger_than_asked_but_for_a_single_protein(checkpoint, fasta, tmp_path):
    embedding = Embedding.prepare(checkpoint, [fasta], tmp_path / "out.npz", batch_tokens=40)
    batches = embedding.batches()
    assert sorted(number for batch in batches for number in batch) == list(range(101))
    lengths = [len(record.sequence) + 2 for record in embedding.records]
    sizes = [len(batch) * max(lengths[number] for number in batch) for batch in batches]
    assert all(size <= 40 or len(b) == 1 for size, b in zip(sizes, batches, strict=True))


def test_what_cannot_be_resumed_or_would_be_lost_is_refused(
    checkpoint, fasta, tmp_path, monkeypatch
):
    path = tmp_path / "out.npz"
    with pytest.raises(FileNotFoundError, match=r"nothing to resume.*Leave out --resume"):
        Embedding.prepare(checkpoint, [fasta], path, resume=True)
    killed_after(1, Embedding.prepare(checkpoint, [fasta], path, "mean", 300), monkeypatch)
    with pytest.raises(FileExistsError, match=r"interrupted run.*--resume"):
        Embedding.prepare(checkpoint, [fasta], path, "mean", 300)
    with pytest.raises(ValueError, match="begun with another pooling and another batch_tokens"):
        Embedding.prepare(checkpoint, [fasta], path, "residue", 301, resume=True)
    other = saved(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="begun with another model"):
        Embedding.prepare(other, [fasta], path, "mean", 300, resume=True)
    Embedding.prepare(checkpoint, [fasta], path, "residue", 300, force=True).run()
    with pytest.raises(FileExistsError, match=r"exists already.*--force"):
        Embedding.prepare(checkpoint, [fasta], path)
    Embedding.prepare(checkpoint, [fasta], path, force=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pooling": "max"}, "unknown pooling 'max'"),
        ({"batch_tokens": 0}, "batch_tokens must be a whole number of at least 1"),
        ({"output": "embeddings.csv"}, "must be a file named .npz"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_anything_is_made(
    options, words, checkpoint, fasta, tmp_path
):
    output = tmp_path / options.pop("output", "out.npz")
    with pytest.raises(ValueError, match=words):
        Embedding.prepare(checkpoint, [fasta], output, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_protein_beyond_the_positions_that_were_learned_is_refused(fasta, tmp_path):
    checkpoint = saved(tmp_path / "model", position="learned", max_position_embeddings=20)
    with pytest.raises(ValueError, match="learned 20 positions, and the longest protein takes"):
        Embedding.prepare(checkpoint, [fasta], tmp_path / "out.npz")
