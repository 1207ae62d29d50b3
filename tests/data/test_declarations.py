"""Pieces of one document or of two: every label is true, and no document is in both parts."""

import pytest

from performers.data.declarations import DECLARATIONS, match_pieces
from performers.data.fetch import read_package

# A byte tells of which of 30 documents a piece is; each has 11 pieces of 7 bytes and a rest.
DOCUMENTS = [bytes([40 + number]) * (7 * 11 + 3) for number in range(30)]


def owners(part):
    return part.tokens[:, :, 0].tolist()


def test_pieces_match_if_they_are_of_one_document():
    train, test = match_pieces(DOCUMENTS, 7, num_test=20)
    assert len(test) == 20
    assert len(train) > 20
    for part in (train, test):
        assert part.most_frequent_share() == 0.5
        assert (part.tokens == part.tokens[:, :, :1]).all()
        assert [int(one == other) for one, other in owners(part)] == part.labels.tolist()


def test_no_document_to_test_with_is_in_a_pair_to_train_on():
    train, test = ({owner for pair in owners(part) for owner in pair} for part in
                   match_pieces(DOCUMENTS, 7, num_test=20))  # fmt: skip
    assert len(test) > 1
    assert not train & test


def test_every_piece_is_in_at_most_one_pair():
    numbered = [b"".join(b"%07d" % (100 * n + k) for k in range(11)) for n in range(30)]
    train, test = match_pieces(numbered, 7, num_test=20)
    pieces = [
        tuple(piece) for part in (train, test) for piece in part.tokens.flatten(0, 1).tolist()
    ]
    assert len(set(pieces)) == len(pieces)


def test_more_pairs_than_a_fifth_of_the_documents_has_are_refused():
    with pytest.raises(ValueError, match=r"at most the pairs .* 6 of 30 have 30 .* got 31"):
        match_pieces(DOCUMENTS, 7, num_test=31)


def test_declarations_are_read_without_markup_and_each_once(tmp_path):
    root = tmp_path / "package/declaration"
    root.mkdir(parents=True)
    page = "<!doctype html><html><head><title>No</title></head>\n<body>\n<h1>{}</h1></body></html>"
    for name, text in {"a": "Tudu &amp; todos\n <p>é", "b": "x", "c": "x", "d": ""}.items():
        (root / f"{name}.html").write_text(page.format(text), encoding="utf-8")
    found, _ = read_package(DECLARATIONS, tmp_path)
    assert found == ["Tudu & todos é".encode(), b"x"]
