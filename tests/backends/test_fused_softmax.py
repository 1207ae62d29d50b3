"""The operator behind `landmarks`, against the softmax it computes."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from performers.backends import fused_softmax as module
from performers.backends.fused_softmax import HIDDEN, fused_softmax


def inputs(rows, keys, dim=5, value_dim=3, scale=1.0, dtype=torch.float64):
    """query, key, bias, value of 2 sequences with 5 heads."""
    draw = torch.Generator().manual_seed(3)
    shapes = (rows, dim), (keys, dim), (keys, 1), (keys, value_dim)
    tensors = [torch.randn(2, 5, *shape, generator=draw, dtype=dtype) for shape in shapes]
    return [tensors[0] * scale, tensors[1] * scale, *tensors[2:]]


def defined(query, key, bias, value, curvature=0.0):
    """out and lse as the module's docstring has them."""
    logits = query @ key.mT + (bias - curvature * key.square().sum(-1, keepdim=True)).mT
    logits = logits * math.log(2)
    out = logits.softmax(dim=-1) @ value
    return out, logits.logsumexp(dim=-1, keepdim=True) / math.log(2)


def gradients(function, tensors, *arguments):
    """Of a number that depends on both results, with respect to every tensor."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out, log_sum = function(*leaves, *arguments)
    draw = torch.Generator().manual_seed(7)
    ways = [torch.randn(part.shape, generator=draw, dtype=torch.float64) for part in (out, log_sum)]
    total = sum((part.double() * way).sum() for part, way in zip((out, log_sum), ways, strict=True))
    return torch.autograd.grad(total, leaves)


def relative_error(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles on both sides, the last not full, and several groups of heads."""
    monkeypatch.setattr(module, "_tile_sizes", lambda *_: (7, 7))
    monkeypatch.setattr(module, "HEADS", 3)
    monkeypatch.setattr(module, "SAMPLE", 2)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("rows", "keys"), [(17, 23), (5, 23), (17, 5), (1, 1)])
@pytest.mark.parametrize("curvature", [0.0, 0.3])
def test_tiles_give_the_softmax_of_the_whole_and_its_gradients(rows, keys, curvature):
    tensors = inputs(rows, keys)
    torch.testing.assert_close(fused_softmax(*tensors, curvature), defined(*tensors, curvature))
    found = gradients(fused_softmax, tensors, curvature)
    torch.testing.assert_close(found, gradients(defined, tensors, curvature))


@pytest.mark.usefixtures("small_tiles")
def test_operands_that_need_no_gradient_get_none():
    query, key, bias, value = inputs(17, 5)
    for leaf in (query, key):
        leaf.requires_grad_()
        out, log_sum = fused_softmax(query, key, bias, value)
        expected = sum(part.sum() for part in defined(query, key, bias, value))
        (found,) = torch.autograd.grad(out.sum() + log_sum.sum(), [leaf])
        torch.testing.assert_close(found, torch.autograd.grad(expected, [leaf])[0])
        leaf.requires_grad_(False)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 1, 6, 7, 22])
@pytest.mark.parametrize("rise", [-1e4, 100.0, 1e4, 1e9])
def test_a_shift_that_was_guessed_wrong_is_put_right(dtype, place, rise):
    """Sampled or not, in an early tile or a late one, a key may lie far above or below the rest."""
    query, key, bias, value = inputs(17, 23, dtype=torch.float32)
    key = key.to(dtype).float()
    bias[:, :, place] += rise
    expected, expected_log_sum = defined(*(x.double() for x in (query.to(dtype), key, bias, value)))
    out, log_sum = fused_softmax(query.to(dtype), key, bias, value)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(log_sum.double(), expected_log_sum, rtol=1e-6, atol=tolerance)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_lie_among_the_values_where_rounding_hides_every_difference(dtype):
    """Logits near 1e12, of which float32 keeps multiples of 65,536."""
    query, key, bias, value = inputs(17, 23, scale=1e6, dtype=torch.float32)
    out, _ = fused_softmax(query.to(dtype), key, bias, value)
    tolerance = 1e-5 if dtype == torch.float32 else 0.04
    assert (out <= value.amax(dim=2, keepdim=True) + tolerance).all()
    assert (out >= value.amin(dim=2, keepdim=True) - tolerance).all()
    of_tensors = gradients(fused_softmax, [query.to(dtype), key, bias, value])
    assert all(gradient.isfinite().all() for gradient in of_tensors)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_hidden_key_weighs_nothing(dtype):
    query, key, bias, value = inputs(17, 23)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    bias = bias.to(torch.promote_types(dtype, torch.float32))
    hidden = torch.arange(23) % 3 != 1  # among them whole samples and the first of every tile
    bias[:, :, hidden] = HIDDEN
    visible = fused_softmax(query, *(x[:, :, ~hidden] for x in (key, bias, value)))
    everything = fused_softmax(query, key, bias, value)
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype == torch.float64 else 2e-2}
    torch.testing.assert_close(everything, visible, **tolerance)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_bfloat16_costs_one_percent(scale):
    """Of the output, at most; of gradients two: against exact arithmetic on the same operands."""
    query, key, bias, value = inputs(173, 101, dim=31, value_dim=29, dtype=torch.float32)
    query, value = (query * scale).bfloat16(), value.bfloat16()
    key = key.bfloat16().float()
    exact = [x.double() for x in (query, key, bias, value)]
    (out, _), (expected, _) = fused_softmax(query, key, bias, value), defined(*exact)
    assert relative_error(out, expected) < 0.01
    pairs = zip(
        gradients(fused_softmax, [query, key, bias, value]), gradients(defined, exact), strict=True
    )
    assert max(relative_error(*pair) for pair in pairs) < 0.02


def test_a_call_in_inference_mode_leaves_nothing_that_training_cannot_use():
    module.buffers._flat.clear()
    module.buffers._last.clear()
    tensors = inputs(17, 23)
    with torch.inference_mode():
        fused_softmax(*tensors)
    torch.testing.assert_close(gradients(fused_softmax, tensors), gradients(defined, tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "keys"), [(256, 4096), (4096, 256), (1024, 65536), (31, 17)])
def test_a_tile_fits_the_memory_that_it_is_given(monkeypatch, rows, keys, dtype):
    for size in (2**19, 2**21, 2**23):
        monkeypatch.setattr(module, "TILE_BYTES", size)
        query, key = torch.empty(11, rows, 2, dtype=dtype), torch.empty(11, keys, 2, dtype=dtype)
        product = module._Product(query, key, key[..., :1], key, 0.0)
        row_tile, key_tile = product.row_tile, product.key_tile
        assert min(row_tile, key_tile) >= min(rows, keys, 64)
        shorter = row_tile if rows <= keys else key_tile
        assert shorter == min(rows, keys, module.SHORT_SIDE)  # is whole
        needed = module.HEADS * min(row_tile, rows) * min(key_tile, keys) * dtype.itemsize
        assert needed <= max(size, module.HEADS * 64 * min(rows, keys) * dtype.itemsize)


def test_threads_do_not_share_the_memory_of_tiles():
    tensors = [inputs(173, 101, scale=scale) for scale in (1.0, 2.0, 3.0, 4.0)]
    with ThreadPoolExecutor(4) as pool:
        for (found, _), each in zip(
            pool.map(lambda x: fused_softmax(*x), tensors), tensors, strict=True
        ):
            torch.testing.assert_close(found, defined(*each)[0])


@pytest.mark.usefixtures("without_shape_checks", "small_tiles")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_is_a_lawful_operator(dtype):
    flat = [x.flatten(0, 1) for x in inputs(17, 23, dtype=torch.float32)]
    if dtype == torch.float64:
        flat = [x.double() for x in flat]
    else:
        flat[0] = flat[0].bfloat16()
    leaves = [x.requires_grad_() for x in flat]
    torch.library.opcheck(module._fused_softmax, [*leaves, 0.3], rtol=0.02, atol=0.02)


def test_the_second_derivative_is_that_of_finite_differences():
    tensors = [x.requires_grad_() for x in inputs(5, 3, dtype=torch.float64)]
    assert torch.autograd.gradgradcheck(fused_softmax, tensors, fast_mode=True)
