"""What models make of masks, of the ends of packed sequences, and of both for positions."""

import pytest
import torch

from performers.models.masks import count_positions, packed_segments, padding_mask

ODD = torch.tensor([[1, 1, 1, 1, 1, 1, 2]])


@pytest.mark.parametrize(("past_length", "length"), [(0, 7), (0, 1), (5, 2)])
def test_a_mask_of_other_numbers_than_0_and_1_is_refused(past_length, length):
    mask = ODD[:, -(past_length + length) :]
    with pytest.raises(ValueError, match="1 for a real token and 0 for padding, got 2"):
        padding_mask(mask, 1, past_length, length)


@pytest.mark.usefixtures("without_shape_checks")
def test_masks_that_add_or_are_of_another_shape_are_refused():
    with pytest.raises(TypeError, match=r"got torch\.float32. An additive mask"):
        padding_mask(torch.zeros(1, 7), 1, 0, 7)
    with pytest.raises(ValueError, match=r"= \(1, 7\), the cached positions included, got \(1, 2"):
        padding_mask(torch.ones(1, 2).bool(), 1, 5, 2)


def test_the_numbers_of_a_mask_are_not_read_again_for_each_token():
    # A GPU would have to be waited for.
    assert padding_mask(ODD, 1, 6, 1).all()


def test_positions_count_real_tokens_whatever_is_padded():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    embeddings = torch.zeros(3, 5, 2)
    expected = torch.tensor([[0, 0, 0, 1, 2], [0, 1, 1, 2, 2], [0, 0, 0, 0, 0]])
    assert torch.equal(count_positions(mask, 0, embeddings), expected)
    assert torch.equal(count_positions(mask, 3, embeddings[:, 3:]), expected[:, 3:])
    assert torch.equal(count_positions(None, 3, embeddings), torch.arange(3, 8)[None])


def test_positions_count_real_tokens_of_each_packed_sequence_anew():
    segment_ids = torch.tensor([[4, 4, 4, 7, 7, 7], [0, 1, 1, 1, 0, 0]])
    embeddings = torch.zeros(2, 6, 2)
    found = count_positions(None, 0, embeddings, segment_ids)
    assert found.tolist() == [[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 0, 1]]
    mask = torch.tensor([[1, 0, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1]]).bool()
    found = count_positions(mask, 0, embeddings, segment_ids)
    assert found[mask].tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 1]


def test_packed_sequences_are_where_the_collator_says():
    ends = torch.tensor([0, 2, 5, 6])
    position_ids = torch.tensor([[0, 1, 0, 1, 2, 0]])
    expected = torch.tensor([0, 0, 1, 1, 1, 2])
    by_ends = packed_segments(1, 6, None, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    assert torch.equal(by_ends, expected[None])
    assert torch.equal(packed_segments(1, 6, None, seq_idx=expected[None]), expected[None])
    by_positions = packed_segments(2, 6, position_ids)
    changes = by_positions.diff(dim=1) != 0
    assert torch.equal(changes, (expected.diff() != 0).expand(2, -1))
    assert packed_segments(2, 6, torch.arange(6)[None] + 3) is None
    assert packed_segments(2, 6, None) is None


@pytest.mark.parametrize(
    ("batch", "ends", "of_keys", "words"),
    [
        (2, [0, 6], [0, 6], "for 2 rows of 6"),
        (1, [0, 5], [0, 5], r"from 0 to the length of a single row.*got \[0, 5\]"),
        (1, [1, 6], [1, 6], r"from 0 to the length of a single row.*got \[1, 6\]"),
        (1, [0, 4, 2, 6], [0, 4, 2, 6], "from 0 to the length of a single row"),
        (1, [0, 2, 6], [0, 3, 6], "cu_seq_lens_k must be cu_seq_lens_q"),
    ],
)
def test_ends_that_are_not_of_one_row_are_refused(batch, ends, of_keys, words):
    with pytest.raises(ValueError, match=words):
        packed_segments(
            batch,
            6,
            None,
            cu_seq_lens_q=torch.tensor(ends),
            cu_seq_lens_k=torch.tensor(of_keys),
        )
