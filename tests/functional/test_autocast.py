"""What torch.autocast makes of inputs, and where it is switched off."""

import pytest
import torch

from performers import SoftmaxFeatures, favor_attention
from performers.functional.autocast import autocast_inputs, without_autocast

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_all_floats_but_float64(dtype):
    for given in FLOATS:
        x = torch.ones(3, dtype=given)
        assert all(found is x for found in autocast_inputs(x, x, x))
        with torch.autocast("cpu", dtype=dtype):
            assert [found.dtype for found in autocast_inputs(x, x, x)] == [dtype] * 3
    for given in (torch.float64, torch.int64, torch.bool):
        x = torch.ones(3, dtype=given)
        with torch.autocast("cpu", dtype=dtype):
            assert all(found is x for found in autocast_inputs(x, x, x))


@pytest.mark.usefixtures("without_shape_checks")
def test_what_is_no_tensor_is_left_to_the_checks():
    for given in ([1.0], None):
        assert autocast_inputs(given, given, given) == (given,) * 3
    query = torch.ones(1, 1, 3, 5)
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"key must be a torch\.Tensor"):
        favor_attention(query, [1.0], query, SoftmaxFeatures(5))


def test_products_are_in_the_precision_of_their_factors_where_autocast_is_off():
    x = torch.ones(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with without_autocast(x):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_a_device_without_autocast_has_none_to_switch_off():
    x = torch.ones(1, 1, 3, 5, device="meta")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(found is x for found in autocast_inputs(x, x, x))
        with without_autocast(x):
            assert (x @ x.mT).dtype == torch.float32
