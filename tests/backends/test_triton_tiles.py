"""The tiles that users get compute what the reference defines, at every head dim of the table.

On a GPU all of them; in the interpreter the least.
"""

import pytest
import torch

from performers import SoftmaxFeatures, favor_attention

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

ON_GPU = torch.cuda.is_available()
CASES = [(torch.float32, 16, 67)]
if ON_GPU:
    CASES = [
        (dtype, dim, 1031)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for dim in (16, 40, 64, 96, 128, 256)
    ]


@pytest.mark.parametrize(("dtype", "dim", "length"), CASES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("field", [{}, {"window_size": 16, "num_sinks": 4}])
def test_the_tiles_of_the_table_compute_what_is_defined(field, is_causal, dtype, dim, length):
    device = "cuda" if ON_GPU else "cpu"
    phi = SoftmaxFeatures(dim, 43).to(device)
    query = torch.randn(1, 2, length, dim, device=device, dtype=dtype, requires_grad=True)
    key, value = torch.randn(2, 1, 1, length, dim, device=device, dtype=dtype).unbind()
    tensors = (query, key.requires_grad_(), value.requires_grad_())
    wide = [x.detach().double().requires_grad_() for x in tensors]
    mask = torch.arange(length, device=device)[None] % 7 != 0
    cotangent = torch.randn(1, 2, length, dim, device=device, dtype=dtype)
    results = []
    for leaves, backend in ((tensors, "triton"), (wide, "chunked")):
        out = favor_attention(
            *leaves, phi, is_causal, mask, enable_gqa=True, backend=backend, **field
        )
        gradients = torch.autograd.grad(out, leaves, cotangent.to(out.dtype))
        results.append([out, *gradients])
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max()
