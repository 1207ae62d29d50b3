"""Kernels without exponents, differentiated by hand: f′, the operator, and what goes around it."""

import pytest
import torch

from performers import KernelFeatures, favor_attention
from performers.backends import kernel_chunks, kernel_tiles
from performers.functional import KERNELS

pytestmark = pytest.mark.filterwarnings("ignore:features of the kernel:UserWarning")

BY_HAND = [name for name, kernel in KERNELS.items() if kernel.backward is not None]
CAUSAL = (False, True)


@pytest.fixture(params=[1, 4])
def small_tiles(request, monkeypatch):
    """Several tiles, the last not full, and several groups of heads; causal ones of one head, or of
    several and then of all of their chunks."""
    monkeypatch.setattr(kernel_tiles, "_sizes", lambda *_: (2, 5))
    monkeypatch.setattr(kernel_chunks, "CHUNK", 5)
    heads, chunks = {1: (1, 2), 4: (4, 3)}[request.param]
    monkeypatch.setattr(kernel_chunks, "CHUNKS", chunks)
    monkeypatch.setattr(kernel_chunks, "sizes", lambda *_: (heads, chunks))


def inputs(length=17, dtype=torch.float64):
    """query, key, value of 2 sequences with 3 key heads and 2 queries for each."""
    shapes = [(2, 6, length, 5), (2, 3, length, 5), (2, 3, length, 7)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("num_features", [11, 256, 4099])
@pytest.mark.parametrize("count", [1, 3, 64])
def test_a_tile_is_of_whole_chunks_and_fills_the_memory_that_it_is_given(count, num_features):
    values = torch.zeros(count, num_features, 1)
    heads, rows = kernel_tiles._sizes(values, 10**6)
    assert heads == kernel_tiles.HEADS
    assert rows % kernel_tiles.ROWS == 0
    of_rows = 4 * min(heads, count) * num_features * kernel_tiles.ROWS  # bytes
    assert rows == kernel_tiles.ROWS * max(1, kernel_tiles.TILE_BYTES // of_rows)
    on_another = kernel_tiles._sizes(values.to("meta"), 10**6)
    assert on_another == (count, 8 * kernel_tiles.ROWS)


def test_of_short_sequences_as_many_heads_as_a_tile_holds_are_worked_on_at_once():
    heads, _ = kernel_tiles._sizes(torch.zeros(4096, 128, 16), 10)
    assert heads == kernel_tiles.TILE_BYTES // (4 * 10 * 128)


@pytest.mark.parametrize(
    ("length", "num_features", "expected"),
    [
        (0, 64, (64, 1)), (1, 256, (64, 1)), (64, 64, (64, 1)), (65, 64, (32, 2)),
        (128, 256, (8, 2)), (300, 4099, (1, 5)), (300, 11, (12, 5)), (10**6, 11, (1, 16)),
    ],
)  # fmt: skip
def test_a_causal_tile_is_of_one_head_or_of_all_chunks_of_several(length, num_features, expected):
    assert kernel_chunks.sizes(length, num_features, torch.device("cpu")) == expected
    heads, chunks = expected
    on_another = kernel_chunks.sizes(length, num_features, torch.device("meta"))
    assert on_another == (kernel_chunks.HEADS * heads, chunks)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1024, 1025, 1088, 5000])
def test_there_is_a_start_for_each_causal_tile_but_the_first(length):
    _, chunks = kernel_chunks.sizes(length, 7, torch.device("cpu"))
    tiles = kernel_chunks._tiles(torch.zeros(3, length, 2), chunks)
    assert sum(tile.shape[0] * tile.shape[2] for tile in tiles) == length
    normalizer, sums = kernel_chunks.room_of_starts(torch.zeros(3, 7, 5), length)
    assert normalizer.shape == (3, len(tiles) - 1, 7)
    assert sums.shape == (3, len(tiles) - 1, 7, 5)


def test_one_short_causal_sequence_keeps_no_state_beside_that_before_it():
    query, key, value = (torch.randn(4, 1, 64, 8, requires_grad=True) for _ in range(3))
    out, state = favor_attention(
        query, key, value, KernelFeatures(8, 16), is_causal=True, return_state=True
    )
    saved = out.grad_fn
    while not hasattr(saved, "saved_tensors"):
        saved = saved.next_functions[0][0]
    of_state = [x for x in saved.saved_tensors if x is not None and x.shape[-2:] == (16, 8)]
    assert sum(x.nbytes for x in of_state) <= state.values.nbytes + 16 * 8 * 4  # of ω


def test_every_kernel_that_has_values_has_a_derivative():
    assert set(BY_HAND) == {name for name, kernel in KERNELS.items() if not kernel.is_exponential}


@pytest.mark.parametrize("name", BY_HAND)
def test_the_derivative_of_a_named_kernel_is_that_of_autograd(name):
    kernel = KERNELS[name]
    projected = torch.cat([torch.linspace(-6, 6, 97), torch.tensor([0.0, -1e4, 1e4])])
    projected = projected.double().requires_grad_()
    gradient, values = torch.randn_like(projected), kernel.fn(projected)
    (expected,) = torch.autograd.grad(values, projected, gradient)
    torch.testing.assert_close(kernel.backward(gradient, projected.detach()), expected)
    if kernel.into is not None:
        room = torch.empty_like(gradient)
        torch.testing.assert_close(kernel.into(projected.detach(), room), values.detach())
        torch.testing.assert_close(room, values.detach())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("projection", ["orthogonal", None])
@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand_and_by_autograd_a_kernel_is_the_same(name, projection, normalize, is_causal):
    """A callable goes through autograd, a name through the operator."""
    options = {"projection": projection, "epsilon": 0.01}
    maps = [KernelFeatures(5, 11, fn, **options) for fn in (name, KERNELS[name])]
    assert [phi.elementwise is None for phi in maps] == [False, True]
    tensors = inputs()
    mask = torch.arange(17) % 3 != torch.tensor([[1], [2]])
    results = []
    for phi in maps:
        out, state = favor_attention(
            *tensors, phi, is_causal, mask, 0.7, normalize, enable_gqa=True, return_state=True
        )
        torch.manual_seed(3)
        ways = [torch.randn_like(part) for part in (out, state.values, state.normalizer)]
        parts = zip((out, state.values, state.normalizer), ways, strict=True)
        gradients = torch.autograd.grad(sum((part * way).sum() for part, way in parts), tensors)
        results.append((out, *state.parts().values(), *gradients))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("is_causal", CAUSAL)
def test_omega_and_a_state_have_the_gradients_of_finite_differences(is_causal):
    phi = KernelFeatures(5, 11, "sigmoid")
    tensors = [x.detach() for x in inputs()]
    _, state = favor_attention(*tensors, phi, enable_gqa=True, return_state=True)

    def attend(omega, normalizer, values):
        phi.omega = omega
        before = type(state)(state.log_scale, normalizer, values)
        out, after = favor_attention(
            *tensors,
            phi,
            is_causal,
            None,
            0.7,
            enable_gqa=True,
            initial_state=before,
            return_state=True,
        )
        return out, after.normalizer, after.values

    leaves = [phi.omega.double(), state.normalizer, state.values]
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("is_causal", CAUSAL)
def test_the_frame_of_a_state_does_not_matter(is_causal):
    phi = KernelFeatures(5, 11)
    tensors = [x.detach() for x in inputs()]
    options = {"is_causal": is_causal, "enable_gqa": True, "return_state": True}
    _, state = favor_attention(*tensors, phi, **options)
    expected, after = favor_attention(*tensors, phi, initial_state=state, **options)
    for shift in (-3.0, 3.0):
        moved = state.rescaled(state.log_scale + shift)
        out, other = favor_attention(*tensors, phi, initial_state=moved, **options)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(other.rescaled(after.log_scale).values, after.values)


@pytest.mark.parametrize(
    ("is_causal", "length", "count"), [(False, 5, 1), (False, 1, 1), (True, 5, 1), (True, 1, 0)]
)
def test_all_but_a_step_of_decoding_goes_through_the_operator(
    monkeypatch, is_causal, length, count
):
    calls, attend = [], kernel_tiles.attend
    monkeypatch.setattr(kernel_tiles, "attend", lambda *x: calls.append(x) or attend(*x))
    favor_attention(*inputs(length), KernelFeatures(5, 11), is_causal, enable_gqa=True)
    assert len(calls) == count


def test_a_callable_may_hold_parameters_that_learn():
    slope = torch.nn.PReLU(dtype=torch.float64)
    out = favor_attention(*inputs(), KernelFeatures(5, 11, slope), enable_gqa=True)
    out.square().sum().backward()
    assert slope.weight.grad.abs() > 0


@pytest.mark.usefixtures("small_tiles")
def test_inputs_of_half_precision_have_the_gradients_of_float32():
    halves = inputs(dtype=torch.bfloat16)
    wide = [x.detach().float().requires_grad_() for x in halves]
    for is_causal in CAUSAL:
        for name in ("relu", "gelu"):
            results = []
            for tensors in (halves, wide):
                out = favor_attention(
                    *tensors, KernelFeatures(5, 11, name), is_causal, normalize=False,
                    enable_gqa=True,
                )  # fmt: skip
                gradients = torch.autograd.grad(out.sum(), tensors)
                results.append([x.float() for x in (out, *gradients)])
            torch.testing.assert_close(*results, rtol=0.02, atol=0.01)


@pytest.mark.usefixtures("without_shape_checks", "small_tiles")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("is_causal", CAUSAL)
@pytest.mark.parametrize("has_directions", [True, False])
def test_it_is_a_lawful_operator(has_directions, is_causal):
    num_features = 11 if has_directions else 5
    shapes = [(3, 2, 17, 5), (3, 17, 5), (3, 17, 7), (3, num_features), (3, num_features, 7)]
    query, key, value, normalizer, values = (
        torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes
    )
    directions = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    presence = (torch.rand(3, 17, 1) > 0.3).double()
    arguments = [query, key, value, directions if has_directions else None, presence]
    arguments += [normalizer.detach().abs().requires_grad_(), values]
    torch.library.opcheck(
        kernel_tiles._kernel_attention, [*arguments, "sigmoid", 0.1, 0.7, is_causal, True]
    )


ONE_GRAPH = """
import torch
from performers import KernelFeatures, favor_attention

phi = KernelFeatures(5, 11, {name!r}, projection={projection!r})
compiled = torch.compile(favor_attention, backend="aot_eager", fullgraph=True)
for length in (7, 131):
    query, key, value = torch.randn(3, 2, 3, length, 5).unbind()
    query.requires_grad_()
    results = []
    for attend in (favor_attention, compiled):
        out = attend(query, key, value, phi, is_causal={is_causal})
        results.append((out, torch.autograd.grad(out.square().sum(), query)[0]))
    torch.testing.assert_close(*results)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "projection", "is_causal"),
    [("relu", "orthogonal", False), ("relu", "orthogonal", True), ("elu+1", None, True)],
)
def test_a_compiled_call_is_one_graph_also_at_a_second_length(
    fresh_python, name, projection, is_causal
):
    script = ONE_GRAPH.format(name=name, projection=projection, is_causal=is_causal)
    assert fresh_python(script).endswith("equal")
