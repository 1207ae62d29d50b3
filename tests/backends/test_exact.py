"""Attention of short rows: the fused kernel and the formula are both the definition."""

import pytest
import torch

from performers.backends import exact

FORWARD = {"fused": exact.attend, "formula": exact._attend}
BACKWARD = {"fused": exact.attend_back, "formula": exact._attend_back}


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("name", FORWARD)
def test_rows_and_gradients_are_those_of_the_definition(name: str, is_masked: bool) -> None:
    torch.manual_seed(0)
    rows = torch.randn(6 * 4, 8, dtype=torch.float64)
    query = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    # windows of 12 rows, each 4 rows on from the one before; the values are one row for all
    key = rows.as_strided((3, 12, 8), (4 * 8, 8, 1)).requires_grad_()
    value = torch.randn(1, 12, 8, dtype=torch.float64).expand(3, 12, 8).requires_grad_()
    mask = None
    if is_masked:
        mask = torch.zeros(1, 5, 12, dtype=torch.float64)
        mask[:, :, 7:] = -torch.inf
    logits = query @ key.mT + (0 if mask is None else mask)
    expected = logits.softmax(dim=-1) @ value
    of_out = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, (query, key, value), of_out)

    query, key, value = query.detach(), key.detach(), value.detach()
    out, log_sum = FORWARD[name](query, key, value, mask)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(log_sum, logits.logsumexp(dim=-1))
    found = BACKWARD[name](of_out, query, key, value, mask, out, log_sum)
    for one, right in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, right)


@pytest.mark.parametrize("name", BACKWARD)
def test_weights_are_those_of_the_log_sum_and_losses_those_of_the_outputs(name: str) -> None:
    torch.manual_seed(0)
    query, key, value, of_out, out = torch.randn(5, 3, 4, 8, dtype=torch.float64).unbind()
    log_sum = (query @ key.mT).logsumexp(dim=-1) + torch.rand(3, 4)
    weights = (query @ key.mT - log_sum.unsqueeze(-1)).exp()
    of_logits = weights * (of_out @ value.mT - (of_out * out).sum(dim=-1, keepdim=True))
    found = BACKWARD[name](of_out, query, key, value, None, out, log_sum)
    expected = of_logits @ key, of_logits.mT @ query, weights.mT @ of_out
    for one, right in zip(found, expected, strict=True):
        torch.testing.assert_close(one, right)
