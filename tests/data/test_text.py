import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from performers.data import EmpiricalBaseline, MaskedCollator, mask_tokens
from performers.data.text import (
    encode_text,
    log_likelihood_multiplier,
    paragraphs,
    piece_ids,
    sentences,
    train_vocabulary,
)
from performers.data.tokens import concatenate_tokens, crop_tokens
from performers.data.vocabulary import BOS_TOKEN_ID, EOS_TOKEN_ID, MASK_TOKEN_ID

BOOK = """CHAPTER I


Sir Walter Elliot, of Kellynch Hall, was a man who never took up any book
but the Baronetage. "Is that so?" asked Mrs. Croft. He was vain!

  It was so. (Nobody doubted it.) She had been
forced into prudence"""


@pytest.fixture(scope="module")
def vocabulary():
    return train_vocabulary(sentences(BOOK), 67)


def test_lines_of_a_paragraph_are_joined_and_no_word_is_lost():
    found = paragraphs(BOOK)
    assert len(found) == 3
    assert " ".join(found).split() == BOOK.split()
    assert not any("\n" in paragraph or "  " in paragraph for paragraph in found)


def test_sentences_end_at_their_marks_and_not_at_titles():
    assert sentences(BOOK) == [
        "CHAPTER I",
        "Sir Walter Elliot, of Kellynch Hall, was a man who never took up any book but the "
        "Baronetage.",
        '"Is that so?" asked Mrs. Croft.',
        "He was vain!",
        "It was so.",
        "(Nobody doubted it.)",
        "She had been forced into prudence",
    ]


def test_a_vocabulary_of_pieces_is_invertible(vocabulary):
    for text in paragraphs(BOOK):
        (row,) = encode_text([text], vocabulary)
        assert vocabulary.decode(row.tolist()) == text
        assert int(row.min()) >= piece_ids(vocabulary).start


def test_characters_that_were_not_seen_are_unknown_and_no_piece(vocabulary):
    (row,) = encode_text(["Ω"], vocabulary)
    unknown = set(row.tolist()) - set(piece_ids(vocabulary))
    assert [vocabulary.id_to_token(token) for token in unknown] == ["<unk>"]


def test_the_same_texts_give_the_same_vocabulary(vocabulary):
    for _ in range(3):
        again = train_vocabulary(sentences(BOOK), 67)
        assert again.get_vocab() == vocabulary.get_vocab()
        assert again.to_str() == vocabulary.to_str()


def test_special_tokens_have_the_ids_that_they_have_for_proteins(vocabulary):
    names = ("<pad>", "<bos>", "<eos>", "<mask>")
    assert [vocabulary.token_to_id(name) for name in names] == [0, 1, 2, MASK_TOKEN_ID]
    assert (vocabulary.token_to_id("<bos>"), vocabulary.token_to_id("<eos>")) == (
        BOS_TOKEN_ID,
        EOS_TOKEN_ID,
    )


@pytest.mark.usefixtures("without_shape_checks")
def test_a_vocabulary_without_room_for_pieces_is_refused():
    with pytest.raises(ValueError, match="must leave room for pieces beside the 5 special tokens"):
        train_vocabulary([BOOK], 5)


def test_the_multiplier_is_tokens_per_word(vocabulary):
    texts = ["He was vain!", "It was so."]
    tokens = sum(len(row) for row in encode_text(texts, vocabulary))
    assert log_likelihood_multiplier(texts, vocabulary) == tokens / 6


def test_text_is_masked_among_its_own_pieces(vocabulary):
    ids = piece_ids(vocabulary)
    rows = torch.randint(ids.start, ids.stop, (101, 103))
    masked, labels = mask_tokens(rows, seed=3, mask_rate=0.9, token_ids=ids)
    replaced = masked[(masked != MASK_TOKEN_ID) & (masked != rows)]
    assert set(replaced.tolist()) == set(ids)
    assert set(labels[labels != -100].tolist()) == set(ids)


def test_what_precedes_the_pieces_is_never_masked(vocabulary):
    ids = piece_ids(vocabulary)
    rows = torch.tensor([[BOS_TOKEN_ID, ids.start - 1, ids.start, ids.start - 1, EOS_TOKEN_ID]])
    _, labels = mask_tokens(rows, seed=3, mask_rate=0.99, token_ids=ids)
    assert (labels != -100).tolist() == [[False, False, True, False, False]]


def test_a_row_that_is_cut_has_no_end_and_windows_have_one_after_each_row():
    rows = [torch.tensor([7, 8, 9], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)]
    cropped = crop_tokens(rows, 4, vocab_size=11)
    assert [cropped[i]["input_ids"].tolist() for i in range(2)] == [[1, 7, 8, 9], [1, 5, 2]]
    windows = concatenate_tokens(rows, 5, vocab_size=11)
    assert [windows[i]["input_ids"].tolist() for i in range(len(windows))] == [[7, 8, 9, 2, 5]]
    assert len(windows.token_counts()) == 11


def test_the_baseline_of_text_is_its_commonest_piece(vocabulary):
    ids = piece_ids(vocabulary)
    common, rare = ids.start, ids.stop - 1
    rows = torch.where(torch.rand(53, 101) < 0.97, common, rare).int()
    data = crop_tokens(list(rows), 103, vocabulary.get_vocab_size())
    collator = MaskedCollator(token_ids=ids)
    scores = EmpiricalBaseline.fit(data, collator.scored_token_ids).evaluate(data, collator)
    standard_error = (0.97 * 0.03 / scores["num_scored"]) ** 0.5
    assert abs(scores["accuracy"] - 0.97) < 4 * standard_error


@pytest.fixture(scope="module")
def invertible():
    return train_vocabulary([BOOK], 400, is_invertible=True)


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example(BOOK)
@example("  two\r\n\n\tand <0xE2> ▁ <pad><unk>\ufeff é 𝄞 \x00 ")
def test_an_invertible_vocabulary_gives_every_text_back(invertible, text):
    (row,) = encode_text([text], invertible)
    assert invertible.decode(row.tolist(), skip_special_tokens=False) == text
    assert all(token in piece_ids(invertible) for token in row.tolist())


def test_what_a_vocabulary_knows_is_not_written_in_bytes(invertible):
    assert invertible.get_vocab_size() <= 400
    (row,) = encode_text([BOOK], invertible)
    first_piece = piece_ids(invertible).start + 256
    assert int(row.min()) >= first_piece
    (row,) = encode_text(["é"], invertible)
    assert [token - first_piece + 256 for token in row.tolist()] == list("é".encode())


def test_a_vocabulary_of_bytes_alone_is_refused():
    with pytest.raises(ValueError, match=r"5 special tokens and 256 bytes, got 261"):
        train_vocabulary([BOOK], 261, is_invertible=True)
