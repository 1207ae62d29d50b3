"""Sums stay float32, under autocast too, and training keeps nothing of the size of the features."""

import copy
import gc
import itertools
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from cases import calibrated, inputs
from torch.nn import functional as F

from performers import KernelFeatures, SharpFeatures, SoftmaxFeatures, favor_attention
from performers.backends.buffers import KEPT_BYTES, buffers
from performers.functional import absorb_keys, log_normalizer, softmax_attention

CAUSAL = (False, True)


MAPS = {
    "positive": SoftmaxFeatures(5, 11),
    "relu": KernelFeatures(5, 11),
    "calibrated": calibrated(5, 11),
    "of the call": SharpFeatures(5, 11, num_heads=3, statistics="call"),
}


@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("name", MAPS)
def test_autocast_casts_the_inputs_and_touches_no_sum(name, is_causal):
    phi = MAPS[name]
    if is_causal and name == "of the call":
        phi = MAPS["positive"]
    query, key, value = inputs()
    # As rotary embeddings and linear layers leave them.
    tensors = [x.requires_grad_() for x in (query, key, value.bfloat16())]
    cast = [x.detach().bfloat16().requires_grad_() for x in tensors]
    options = {"is_causal": is_causal, "enable_gqa": True}
    expected = favor_attention(*cast, phi, **options)
    gradients = torch.autograd.grad(expected.sum(), cast)
    phi = copy.deepcopy(phi)  # what it keeps between calls is made under autocast
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = favor_attention(*tensors, phi, **options)
        if name != "of the call":
            _, state = favor_attention(*tensors, phi, **options, return_state=True)
            assert state.values.dtype == torch.float32
    assert torch.equal(out, expected)
    for one, other in zip(torch.autograd.grad(out.sum(), tensors), gradients, strict=True):
        assert torch.equal(one.bfloat16(), other)


def test_features_asked_for_under_autocast_do_not_round_those_after_it():
    x = torch.randn(2, 3, 7, 5)
    expected = calibrated(5, 11).key_features(x).log_values
    phi = calibrated(5, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        phi.key_features(x)
    assert torch.equal(phi.key_features(x).log_values, expected)


@pytest.mark.usefixtures("without_shape_checks")
def test_autocast_takes_the_dtypes_that_it_takes_for_torchs_attention():
    """All of them, cast to its own, but for float64, which it leaves as it is."""
    tensors, phi = inputs(key_heads=6), SoftmaxFeatures(5, 11)
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for mixed in itertools.product(dtypes, repeat=3):
            cast = [x.to(dtype) for x, dtype in zip(tensors, mixed, strict=True)]
            is_refused = torch.float64 in mixed and len(set(mixed)) > 1
            with pytest.raises(RuntimeError) if is_refused else nullcontext():
                expected = F.scaled_dot_product_attention(*cast).dtype
            for attend in (softmax_attention, lambda *x: favor_attention(*x, phi)):
                with pytest.raises(TypeError, match="one dtype") if is_refused else nullcontext():
                    assert attend(*cast).dtype == expected


def test_a_logarithm_of_a_sum_is_not_rounded_by_autocast():
    phi, key = SoftmaxFeatures(5, 11), torch.randn(1, 1, 7, 5)
    expected = log_normalizer(key, phi, absorb_keys(key, phi))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(log_normalizer(key, phi, absorb_keys(key, phi)), expected)


def bytes_kept(length: int, num_features: int, is_causal: bool, window_size: int | None) -> int:
    """Memory that a forward pass leaves behind for the backward pass, inputs and output apart.

    Buffers serve all calls.
    """
    phi = SoftmaxFeatures(16, num_features)
    tensors = inputs(length, batch=1, heads=1, key_heads=1, dim=16, value_dim=16)
    for x in tensors:
        x.requires_grad_()
    before = living_storages()
    # What autograd saves in C++ becomes visible to Python by passing through a hook.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        out = favor_attention(*tensors, phi, is_causal, window_size=window_size)
    after = living_storages()
    for x in (out, *buffers._flat.values()):
        after.pop(x.untyped_storage().data_ptr(), None)
    return sum(size for pointer, size in after.items() if pointer not in before)


def living_storages() -> dict[int, int]:
    """Address and size of the memory of all tensors that Python knows."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    storages = [
        x.untyped_storage() for x in tensors if x.layout == torch.strided
    ]  # others have none
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize(
    ("is_causal", "window_size"), [(False, None), (True, None), (False, 31), (True, 31)]
)
def test_training_at_length_16384_keeps_nothing_of_the_size_of_features(
    is_causal, window_size, monkeypatch
):
    monkeypatch.undo()  # the tiles that users get
    length = 16384
    few, many = (bytes_kept(length, m, is_causal, window_size) for m in (16, 128))
    assert few > 0
    assert many - few < 4 * length * (128 - 16) / 3


@pytest.mark.parametrize(
    ("features", "near"),
    [
        (SoftmaxFeatures, {}),
        (KernelFeatures, {}),
        (SoftmaxFeatures, {"window_size": 64, "num_sinks": 4}),
    ],
)
@pytest.mark.parametrize("num_features", [64, 256, 1024])
@pytest.mark.parametrize("is_causal", CAUSAL)
def test_what_training_keeps_is_at_most_half_again_as_large_as_inputs_and_output(
    is_causal, near, num_features, features, monkeypatch
):
    monkeypatch.undo()  # the tiles that users get
    tensors = inputs(16384, batch=1, heads=1, key_heads=1, dim=64, value_dim=64)
    for x in tensors:
        x.requires_grad_()
    saved = set()

    def keep(x: torch.Tensor) -> torch.Tensor:
        saved.add(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = favor_attention(*tensors, features(64, num_features), is_causal, **near)
    # Some of what was saved is of branches that lead nowhere, and is gone.
    kept = sum(size for pointer, size in living_storages().items() if pointer in saved)
    assert 0 < kept <= 1.5 * sum(x.nbytes for x in (*tensors, out))


@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("name", "window"), [("positive", 8), ("relu", None)])
def test_joining_the_heads_of_one_long_sequence_copies_nothing(name, window, is_causal, group):
    """Where values lie as a linear layer leaves them."""
    rows = [torch.randn(1, 75, heads, 5).transpose(1, 2) for heads in (3 * group, 3, 3)]
    options = {"is_causal": is_causal, "enable_gqa": group > 1, "window_size": window}
    out = favor_attention(*rows, MAPS[name], **options)
    joined = out.transpose(1, 2).flatten(2)
    assert joined.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
    other = favor_attention(*(x.contiguous() for x in rows), MAPS[name], **options)
    assert torch.equal(out, other)


@pytest.mark.parametrize("is_causal", CAUSAL)
def test_a_near_field_holds_no_memory_of_the_length_between_calls(is_causal):
    def held():
        tensors = torch.randn(3, 1, 2, 60_000, 16).requires_grad_().unbind()
        out = favor_attention(*tensors, SoftmaxFeatures(16, 8), is_causal=is_causal, window_size=64)
        sizes = [sum(flat.nbytes for flat in buffers._flat.values())]
        out.sum().backward()
        return [*sizes, sum(flat.nbytes for flat in buffers._flat.values())]

    with ThreadPoolExecutor(1) as pool:  # a thread begins without buffers
        assert max(pool.submit(held).result()) <= KEPT_BYTES < 8 * 60_000 * 16 * 4
