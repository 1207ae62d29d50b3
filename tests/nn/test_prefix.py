"""Prefixes and chunks in `FavorAttention`: masks by which each query sees the first keys."""

import pytest
import torch

from performers import FavorAttention

OWN = torch.arange(1, 12)


@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("lengths", [OWN.clamp(min=5), ((OWN + 3) // 4 * 4).clamp(max=11)])
def test_a_mask_of_the_first_keys_hides_the_others(form, lengths, extra):
    attention = FavorAttention(12, 3, batch_first=True, **extra)
    x = torch.randn(2, 11, 12)
    hidden = torch.arange(11) >= lengths[:, None]
    mask = hidden if form == "bool" else torch.zeros(11, 11).masked_fill(hidden, -1e9)
    out, weights = attention(x, x, x, attn_mask=mask)
    assert (weights[:, :, :11][:, hidden] == 0).all()
    assert (weights[:, :, :11][:, ~hidden] > 0).all()
    assert (weights[:, :, 11:] > 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 11))
    for row in (0, 4, 10):
        alone, _ = attention(x[:, row : row + 1], *[x[:, : lengths[row]]] * 2, need_weights=False)
        torch.testing.assert_close(out[:, row : row + 1], alone, rtol=1e-4, atol=1e-5)
