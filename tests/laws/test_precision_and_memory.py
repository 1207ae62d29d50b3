"""Sums stay float32, and training keeps nothing of the size of the features."""

import gc

import pytest
import torch
from cases import inputs

from performers import KernelFeatures, SoftmaxFeatures, favor_attention

CAUSAL = (False, True)


@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("features", [SoftmaxFeatures, KernelFeatures])
def test_autocast_does_not_touch_the_sums(features, dtype, is_causal):
    phi = features(5, 11)
    tensors = [x.requires_grad_() for x in inputs(dtype=dtype)]
    plain = favor_attention(*tensors, phi, is_causal, enable_gqa=True)
    plain_gradients = torch.autograd.grad(plain.sum(), tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = favor_attention(*tensors, phi, is_causal, enable_gqa=True)
        _, state = favor_attention(*tensors, phi, is_causal, enable_gqa=True, return_state=True)
    gradients = torch.autograd.grad(out.sum(), tensors)
    assert state.values.dtype == torch.float32
    assert torch.equal(out, plain)
    for one, other in zip(gradients, plain_gradients, strict=True):
        assert torch.equal(one, other)


def bytes_kept(length: int, num_features: int, is_causal: bool, window_size: int | None) -> int:
    """Memory that a forward pass leaves behind for the backward pass, inputs and output apart."""
    phi = SoftmaxFeatures(16, num_features)
    tensors = inputs(length, batch=1, heads=1, key_heads=1, dim=16, value_dim=16)
    # Memory for tiles lives on from the first call, whatever is to be differentiated.
    favor_attention(*tensors, phi, is_causal, window_size=window_size)
    for x in tensors:
        x.requires_grad_()
    before = living_storages()
    # What autograd saves in C++ becomes visible to Python by passing through a hook.
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        out = favor_attention(*tensors, phi, is_causal, window_size=window_size)
    after = living_storages()
    del after[out.untyped_storage().data_ptr()]
    return sum(size for pointer, size in after.items() if pointer not in before)


def living_storages() -> dict[int, int]:
    """Address and size of the memory of all tensors that Python knows."""
    gc.collect()
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) is torch.Tensor]
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
