"""Near keys by PyTorch's own kernel are those by products of matrices, forward and backward."""

import pytest
import torch
from cases import MASKS, inputs

from performers import SoftmaxFeatures, favor_attention
from performers.backends.blocks import neighbors, sizes

FIELDS = {
    "far keys": {"window_size": 3, "num_sinks": 2},
    "many blocks": {"window_size": 1},
    "nothing far": {"window_size": 4, "far": False},
    "heavy keys": {"window_size": 2, "far": False, "num_heavy": 3},
    "a limit": {"window_size": 3, "far_limit": 0.3},
    "two blocks": {"window_size": 12},
}


@pytest.fixture
def fused(monkeypatch, without_shape_checks):
    """How often PyTorch's kernel was asked, there and back."""
    monkeypatch.setattr(sizes, "TILE_BYTES", 1500)
    monkeypatch.setattr(sizes, "FUSED_FROM", {"cpu": (1, 1)})
    calls = {"_fused": 0, "_fused_back": 0}

    def counting(name, kernel):
        def counted(*arguments, **options):
            calls[name] += 1
            return kernel(*arguments, **options)

        return counted

    for name in calls:
        monkeypatch.setattr(neighbors, name, counting(name, getattr(neighbors, name)))
    return calls


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_the_kernel_and_products_agree_there_and_back(field, mask, is_causal, fused, monkeypatch):
    phi, mask, drawn = SoftmaxFeatures(5, 11), MASKS[mask](23), inputs()

    def found():
        tensors = [x.clone().requires_grad_() for x in drawn]
        out = favor_attention(*tensors, phi, is_causal, mask, enable_gqa=True, **field)
        out.square().sum().backward()
        return out, *(x.grad for x in tensors)

    by_kernel = found()
    assert fused["_fused"] > 0
    # What a limit takes off is not of the outputs alone.
    assert (fused["_fused_back"] > 0) == ("far_limit" not in field)
    monkeypatch.setattr(sizes, "FUSED_FROM", {})
    fused.update(_fused=0, _fused_back=0)
    by_products = found()
    assert set(fused.values()) == {0}
    for one, other in zip(by_kernel, by_products, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_rows_with_large_logits_go_back_by_products(fused):
    query, key, value = (x.double().requires_grad_() for x in inputs())
    phi = SoftmaxFeatures(5, 11)
    favor_attention(
        100 * query, 100 * key, value, phi, enable_gqa=True, window_size=3
    ).sum().backward()
    assert fused["_fused"] > 0
    assert fused["_fused_back"] == 0
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [5, 8, 12, 17, 40, 80])
def test_each_block_is_scored_once_with_all_its_neighbors(length, is_causal, fused):
    """A few blocks are cut where a neighbor is missing, many are not."""
    query, key, value = inputs(length, batch=1, key_heads=6)
    out = favor_attention(
        query, key, value, SoftmaxFeatures(5, 7), is_causal, window_size=4, far=False
    )
    block = torch.arange(length) // 4
    near = (block[:, None] - block).abs() <= 1
    if is_causal:
        near = near.tril()
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, near)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)
