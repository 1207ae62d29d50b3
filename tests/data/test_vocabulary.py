import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from performers.data import AMINO_ACIDS, EOS_TOKEN_ID, TOKENS, VOCAB_SIZE, decode, encode

proteins = st.text(AMINO_ACIDS, max_size=211)


@given(proteins)
def test_decoding_inverts_encoding(sequence):
    assert decode(encode(sequence)) == sequence


@given(st.text(AMINO_ACIDS + AMINO_ACIDS.lower(), max_size=97))
def test_case_does_not_matter(sequence):
    assert decode(encode(sequence)) == sequence.upper()


def test_the_letters_are_the_papers_25_and_every_token_has_its_own_id():
    assert len(AMINO_ACIDS) == len(set(AMINO_ACIDS)) == 25
    assert len(TOKENS) == len(set(TOKENS)) == VOCAB_SIZE == 29
    assert encode(AMINO_ACIDS).tolist() == list(range(4, 29))


def test_j_is_read_as_unknown():
    assert decode(encode("MJK")) == "MXK"


def test_special_tokens_are_shown_or_skipped():
    ids = torch.cat([encode("MK"), torch.tensor([EOS_TOKEN_ID])])
    assert decode(ids) == "MK<eos>"
    assert decode(ids, skip_special_tokens=True) == "MK"


@pytest.mark.parametrize("letter", ["1", "*", "-", " ", "é", "€"])
def test_an_illegal_letter_is_named_with_its_position(letter):
    with pytest.raises(ValueError, match="position 3") as error:
        encode(f"MK{letter}V")
    assert repr(letter) in str(error.value)


@pytest.mark.parametrize("token", [-1, 29])
def test_an_id_outside_the_vocabulary_is_named(token):
    with pytest.raises(ValueError, match=rf"must be in 0 … 28, got {token}"):
        decode(torch.tensor([4, token]))
