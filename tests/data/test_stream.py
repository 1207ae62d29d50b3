"""A stream is what its files hold, each record once in a pass, in an order that can be resumed."""

import gzip
import itertools
import os
import random

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from performers.data import MaskedCollator, concatenate_sequences, crop_sequences, decode
from performers.data.fasta import read_fasta, read_piece
from performers.data.pieces import cut_files
from performers.data.stream import TokenStream, stream_tokens
from performers.data.vocabulary import EOS_TOKEN_ID, STANDARD_AMINO_ACIDS

draw = random.Random(0)
PROTEINS = [
    "".join(draw.choices(STANDARD_AMINO_ACIDS, k=draw.randrange(7, 61))) for _ in range(211)
]


@pytest.fixture(scope="module")
def fasta(tmp_path_factory):
    """211 proteins on lines of 23 letters, 9,671 bytes."""
    path = tmp_path_factory.mktemp("stream") / "proteins.fasta"
    path.write_text(
        "".join(
            f">p{number} some protein\n"
            + "".join(f"{letters[i : i + 23]}\n" for i in range(0, len(letters), 23))
            for number, letters in enumerate(PROTEINS)
        )
    )
    return path


def streamed(path, length=97, **options):
    return stream_tokens(path, length, **{"shuffle_buffer": 501, "piece_bytes": 1999} | options)


def letters(stream):
    return [decode(item["input_ids"], skip_special_tokens=True) for item in stream]


@pytest.mark.parametrize("piece_bytes", [1, 83, 1999, 10**6])
def test_the_pieces_of_a_file_hold_its_records_once(fasta, piece_bytes):
    pieces = cut_files([fasta], b">", piece_bytes)
    assert (len(pieces) == 1) == (piece_bytes == 10**6)
    records = [record for piece in pieces for record in read_piece(piece)]
    assert records == list(read_fasta(fasta))


def test_a_pass_has_every_record_once_and_each_pass_another_order(fasta):
    first, again, second = (letters(streamed(fasta, epoch=epoch)) for epoch in (0, 0, 1))
    assert first == again
    assert first != second != PROTEINS
    assert sorted(first) == sorted(second) == sorted(PROTEINS)
    assert letters(streamed(fasta, seed=3)) != first
    # Neighbors in the file are not neighbors in the stream.
    place = {protein: number for number, protein in enumerate(PROTEINS)}
    steps = [place[b] - place[a] for a, b in itertools.pairwise(first)]
    assert sum(step == 1 for step in steps) < 20


@pytest.mark.parametrize("name", ["proteins.fasta", "proteins.fasta.gz"])
def test_in_order_it_is_the_data_set_in_memory(fasta, tmp_path, name):
    path = tmp_path / name
    text = fasta.read_bytes()
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    for concatenate, build in ((True, concatenate_sequences), (False, crop_sequences)):
        options = {"shuffle_buffer": 0, "piece_bytes": 10**6}
        stream = streamed(path, length=31, concatenate=concatenate, **options)
        expected = build(PROTEINS, 31)
        pairs = zip(stream, expected, strict=True)
        assert all(torch.equal(row["input_ids"], other["input_ids"]) for row, other in pairs)


@pytest.mark.parametrize("options", [{}, {"concatenate": True, "length": 53}])
@pytest.mark.parametrize("done", [0, 1, 46, 47, 150, 211])
def test_it_goes_on_at_the_exact_item_from_its_state(fasta, options, done):
    whole = letters(streamed(fasta, **options))
    stream = streamed(fasta, **options)
    before = letters(itertools.islice(stream, done)) if done else []
    resumed = streamed(fasta, **options)
    resumed.load_state_dict(stream.state_dict())
    assert before + letters(resumed) == whole


def test_ranks_and_workers_divide_a_pass(fasta):
    stream = streamed(fasta)
    of_ranks = [letters(split_dataset_by_node(stream, rank, 3)) for rank in range(3)]
    assert sorted(itertools.chain(*of_ranks)) == sorted(PROTEINS)
    assert all(len(part) > 50 for part in of_ranks)
    loaded = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(letters(loaded)) == sorted(PROTEINS)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_processes_of_a_run_have_each_sequence_of_a_pass_once(fasta, num_workers):
    stream = TokenStream([fasta], 97, shuffle_buffer=501, piece_bytes=1999)
    loader = DataLoader(stream, batch_size=5, num_workers=num_workers, collate_fn=list)
    seen = []
    for rank in range(2):
        # As the Trainer has it made, by each process for itself.
        own = prepare_data_loader(
            loader, num_processes=2, process_index=rank, dispatch_batches=False,
            put_on_device=False,
        )  # fmt: skip
        batches = itertools.islice(own, 2 * len(PROTEINS) // 5)
        seen += [item for batch in batches for item in batch]
    first = [item for item in seen if item["epoch"] == 0]
    assert sorted(letters(first)) == sorted(PROTEINS)


def test_what_is_held_out_is_passed_over(fasta):
    assert sorted(letters(streamed(fasta, left_out=PROTEINS[:100]))) == sorted(PROTEINS[100:])


def test_lines_are_records_and_a_running_text_is_windows_of_it(tmp_path):
    path = tmp_path / "text.txt"
    text = "".join(f"Line {number} of a text, äöü.\n" for number in range(97)) + "\n"
    path.write_text(text)
    options = {"encode": lambda text: text.encode(), "piece_bytes": 301}
    rows = list(streamed(path, kind="lines", **options))
    assert all(row["input_ids"][-1] == EOS_TOKEN_ID for row in rows)
    lines = [bytes(row["input_ids"][1:-1].tolist()).decode() + "\n" for row in rows]
    assert sorted([*lines, "\n"]) == sorted(text.splitlines(keepends=True))

    options |= {"piece_bytes": 10**6, "kind": "text", "concatenate": True, "length": 41}
    windows = [
        bytes(w["input_ids"].tolist()) for w in streamed(path, **options | {"shuffle_buffer": 0})
    ]
    joined = text.encode()
    assert b"".join(windows) == joined[: len(joined) // 41 * 41]
    shuffled = [bytes(w["input_ids"].tolist()) for w in streamed(path, **options)]
    assert shuffled != windows
    assert sorted(shuffled) == sorted(windows)


def test_masks_change_from_pass_to_pass(fasta):
    first, second = (next(iter(streamed(fasta, shuffle_buffer=0, epoch=e))) for e in (0, 1))
    assert torch.equal(first["input_ids"], second["input_ids"])
    collate = MaskedCollator()
    assert not torch.equal(collate([first])["labels"], collate([second])["labels"])
    together = collate([first, second])["labels"]
    assert torch.equal(together[:1], collate([first])["labels"])


def test_a_stream_without_end_goes_from_pass_to_pass(fasta):
    stream = TokenStream([fasta], 97, shuffle_buffer=501, piece_bytes=1999)
    items = list(itertools.islice(stream, 300))
    assert [int(item["epoch"]) for item in items] == [0] * 211 + [1] * 89
    assert letters(items[:211]) == letters(streamed(fasta))
    assert letters(items[211:]) == letters(streamed(fasta, epoch=1))[:89]
    counts = crop_sequences(PROTEINS, 97).token_counts()
    assert torch.equal(stream.token_counts(), counts)


def test_a_defect_is_named_with_its_line_in_the_file(fasta, tmp_path):
    lines = fasta.read_text().splitlines()
    lines[400] = lines[400][:-1] + "1"
    path = tmp_path / "proteins.fasta"
    path.write_text("\n".join(lines))
    assert len(cut_files([path], b">", 1999)) > 3
    with pytest.raises(ValueError, match=r"proteins\.fasta, line 401: '1' in 'p\d+' is no amino"):
        list(streamed(path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "csv"}, "unknown kind 'csv'"),
        ({"kind": "text"}, "a running text has no records to crop: pass concatenate=True"),
        ({"length": 0}, "length must be .*got 0"),
        ({"shuffle_buffer": -1}, "shuffle_buffer must be .*got -1"),
    ],
)
@pytest.mark.usefixtures("without_shape_checks")
def test_what_cannot_be_streamed_is_refused(fasta, options, words):
    with pytest.raises(ValueError, match=words):
        streamed(fasta, **options)


def test_a_stream_of_nothing_is_refused_instead_of_waited_for(fasta):
    stream = TokenStream([fasta], 10**6, concatenate=True)
    with pytest.raises(
        ValueError, match=r"must have a sequence: .* fill no window of length 10+, or"
    ):
        next(iter(stream))


def test_a_pipe_is_refused_because_it_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe must be a file, because a stream is read again"):
        streamed(tmp_path / "pipe")
