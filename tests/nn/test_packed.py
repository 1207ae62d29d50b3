"""Packed sequences in `FavorAttention`: masks of blocks along the diagonal."""

import pytest
import torch

from performers import FavorAttention


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("form", ["bool", "float"])
def test_a_mask_of_blocks_is_packed_sequences(is_causal, form):
    attention = FavorAttention(12, 3, batch_first=True)
    x = torch.randn(1, 11, 12)
    number = torch.tensor([0] * 4 + [1] + [2] * 6)
    hidden = number != number[:, None]
    if is_causal:
        hidden = hidden | torch.ones(11, 11, dtype=torch.bool).triu(1)
    mask = hidden if form == "bool" else torch.zeros(11, 11).masked_fill(hidden, -torch.inf)
    out, weights = attention(x, x, x, attn_mask=mask)
    assert (weights[0][hidden] == 0).all()
    assert (weights[0][~hidden] > 0).all()
    for at in (slice(4), slice(4, 5), slice(5, 11)):
        alone = attention(*[x[:, at]] * 3, attn_mask=hidden[at, at], need_weights=False)[0]
        torch.testing.assert_close(out[:, at], alone)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("extra", ["add_bias_kv", "add_zero_attn"])
def test_packed_sequences_and_keys_of_the_module_are_refused(extra):
    attention = FavorAttention(12, 3, batch_first=True, **{extra: True})
    x = torch.randn(1, 5, 12)
    number = torch.tensor([0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="it packs sequences, which add_bias_kv and add_zero"):
        attention(x, x, x, attn_mask=number != number[:, None])
