"""A converted layer: heads that stay exact are exact, and the others are as they were."""

import pytest
import torch

from performers import FavorOptions
from performers.convert.layer import FavorLayer
from performers.functional import softmax_attention

LENGTH, DIM = 13, 8


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("window_size", [0, 3])
@pytest.mark.parametrize("query_length", [LENGTH, 5, 1])
@pytest.mark.parametrize("is_causal", [False, True])
def test_heads_that_stay_exact_are_exact_and_the_others_estimated_as_before(
    is_causal, query_length, window_size, is_padded
):
    query = torch.randn(2, 6, LENGTH, DIM)
    key, value = torch.randn(2, 2, 3, LENGTH, DIM).unbind()
    mask = None
    if is_padded:
        mask = torch.ones(2, LENGTH, dtype=torch.bool)
        mask[0, :3] = mask[1, -2:] = False
    exact = softmax_attention(query, key, value, is_causal, mask, enable_gqa=True)
    query, exact = (x[:, :, -query_length:] for x in (query, exact))

    def attend(exact_heads):
        options = FavorOptions(17, window_size=window_size, num_sinks=0, exact_heads=exact_heads)
        layer = FavorLayer(options, number=7)
        return layer(query, key, value, is_causal=is_causal, key_padding_mask=mask, scale=None)

    out, plain = attend({7: [1, 4]}), attend({3: [1, 4]})
    torch.testing.assert_close(out[:, [1, 4]], exact[:, [1, 4]])
    assert torch.equal(out[:, [0, 2, 3, 5]], plain[:, [0, 2, 3, 5]])
    assert not torch.allclose(plain[:, [1, 4]], exact[:, [1, 4]], atol=1e-3)
