"""An exact near field: blocks and sinks scored by exp, the rest by features, one normalizer."""

import itertools

import pytest
import torch
from cases import MASKS, NORMS, backends, inputs
from oracle import attended

from performers import (
    LinearState,
    SharpFeatures,
    SoftmaxFeatures,
    favor_attention,
    softmax_attention,
)

CAUSAL = (False, True)
# window_size, num_sinks, far
FIELDS = {
    "blocks": {"window_size": 3},
    "blocks of one": {"window_size": 1},
    "sinks": {"window_size": 3, "num_sinks": 2},
    "more sinks than a block": {"window_size": 2, "num_sinks": 7},
    "nothing far": {"window_size": 3, "far": False},
    "sinks, nothing far": {"window_size": 2, "num_sinks": 5, "far": False},
    "few far keys": {"window_size": 3, "far_limit": 0.3},
    "sinks, few far keys": {"window_size": 2, "num_sinks": 5, "far_limit": 0.02},
    "heavy keys": {"window_size": 3, "far": False, "num_heavy": 4},
    "sinks and heavy keys": {"window_size": 2, "num_sinks": 3, "far": False, "num_heavy": 5},
    "one block and a bit": {"window_size": 17, "num_sinks": 1},
    "more than all": {"window_size": 40, "num_sinks": 3},
}
every_field = pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
BACKENDS = backends(has_near_field=True)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_mode = pytest.mark.parametrize("is_causal", CAUSAL)


def feature_map(estimator: str = "positive") -> SoftmaxFeatures:
    return SoftmaxFeatures(5, 11, estimator=estimator)


def calibrated_map() -> SharpFeatures:
    """Sharp features that have learned something."""
    phi = SharpFeatures(5, 11, num_heads=3)
    query, key, _ = inputs(50)
    phi.calibrate(query + 1.0, key * torch.tensor([1.0, 3.0, 1.0, 0.2, 1.0]))
    return phi


@every_backend
@every_mode
@pytest.mark.parametrize("mask", MASKS)
def test_near_and_far_share_a_normalizer(mask, is_causal, backend):
    mask, tensors = MASKS[mask](23), inputs()
    estimators = itertools.cycle(["positive", "hyperbolic"])
    for field, estimator in zip(FIELDS.values(), estimators, strict=False):
        phi = feature_map(estimator)
        out = favor_attention(
            *tensors, phi, is_causal, mask, enable_gqa=True, backend=backend, **field
        )
        expected = attended(*tensors, phi, is_causal, mask, **field).out
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@every_backend
@every_mode
@pytest.mark.parametrize("norms", NORMS)
def test_a_near_field_is_right_at_any_norm(norms, is_causal, backend):
    phi, mask = feature_map(), MASKS["holes"](23)
    query, key, value = inputs(norms=norms, dtype=torch.float64)
    options = {"enable_gqa": True, "window_size": 3, "num_sinks": 2, "backend": backend}
    out = favor_attention(query, key, value, phi, is_causal, mask, **options)
    expected = attended(query, key, value, phi, is_causal, mask, window_size=3, num_sinks=2).out
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@every_mode
@every_field
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_over_ones_is_one_at_any_norm(dtype, field, is_causal):
    for norms, backend in [*zip(NORMS, itertools.repeat("chunked")), ("growing", "reference")]:
        query, key, value = inputs(norms=norms, dtype=dtype)
        value = torch.ones_like(value, requires_grad=True)
        out = favor_attention(
            query, key, value, feature_map(), is_causal, enable_gqa=True, backend=backend, **field
        )
        torch.testing.assert_close(out.float(), torch.ones_like(out.float()), rtol=2e-6, atol=0)
        (gradient,) = torch.autograd.grad(out.sum(), value)
        assert gradient.isfinite().all()


@every_backend
@every_mode
@pytest.mark.parametrize("norms", NORMS)
def test_far_keys_weigh_at_most_their_limit(norms, is_causal, backend):
    """Beside near keys that weigh 1, and no less where a limit of infinity would give them more."""
    query, key, _ = inputs(norms=norms, dtype=torch.float64)
    options = {"is_causal": is_causal, "enable_gqa": True, "window_size": 3, "backend": backend}
    block = torch.arange(23) // 3
    is_near = (block[:, None] - block).abs() <= 1
    value = torch.eye(23, dtype=torch.float64).expand(2, 3, -1, -1)

    def far_shares(limit: float | None) -> torch.Tensor:
        matrix = favor_attention(query, key, value, feature_map(), far_limit=limit, **options)
        return (matrix * ~is_near).sum(dim=-1)

    unlimited = far_shares(None)
    torch.testing.assert_close(far_shares(1e300), unlimited)
    for limit in (0.01, 0.2, 1.0):
        most = limit / (1 + limit)
        torch.testing.assert_close(far_shares(limit), unlimited.clamp(max=most))


@every_backend
@every_mode
def test_a_window_of_the_whole_length_is_exact_attention(is_causal, backend):
    query, key, value = inputs()
    exact = softmax_attention(query, key, value, is_causal, enable_gqa=True)
    every_key = {"window_size": 2, "num_sinks": 1, "far": False, "num_heavy": 23}
    all_of_23 = {"window_size": 23}, {"window_size": 12}, {"window_size": 1, "num_sinks": 23}
    for field in (*all_of_23, every_key):
        out = favor_attention(
            query, key, value, feature_map(), is_causal, enable_gqa=True, backend=backend, **field
        )
        torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)


def in_pieces(cuts, tensors, phi, mask, **options):
    """Outputs of a sequence that comes in pieces, and the last state."""
    outputs, state = [], None
    for start, stop in itertools.pairwise([0, *cuts, tensors[0].shape[2]]):
        out, state = favor_attention(
            *(x[:, :, start:stop] for x in tensors),
            phi,
            True,
            None if mask is None else mask[:, start:stop],
            enable_gqa=True,
            initial_state=state,
            return_state=True,
            **options,
        )
        outputs.append(out)
    return torch.cat(outputs, dim=2), state


PIECES = {"two": [5], "some empty": [0, 7, 7, 20], "tokens": list(range(1, 23))}


@every_backend
@every_mode
def test_a_window_of_any_size_costs_what_one_of_the_whole_length_does(is_causal, backend):
    tensors, phi, mask = inputs(heads=3), feature_map(), MASKS["left"](23)
    options = {"is_causal": is_causal, "key_padding_mask": mask, "backend": backend}
    expected = favor_attention(*tensors, phi, window_size=23, num_sinks=23, **options)
    for size in (10**9, 2**62):
        out = favor_attention(*tensors, phi, window_size=size, num_sinks=size, **options)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("size", [{"window_size": 10**9}, {"window_size": 1, "num_sinks": 10**9}])
def test_a_state_of_absurdly_many_keys_is_refused(size):
    # In the tests' 2 sequences of 3 heads a key and a value are 12 numbers: 48 bytes.
    with pytest.raises(ValueError, match=r"keys and values of two blocks .* are (536|268) GiB"):
        favor_attention(*inputs(heads=3), feature_map(), True, return_state=True, **size)
    out, _ = favor_attention(
        *inputs(heads=3), feature_map(), True, window_size=10**5, return_state=True
    )
    assert out.isfinite().all()


@every_field
@pytest.mark.parametrize("mask", ["no mask", "left", "holes"])
def test_pieces_with_carried_state_equal_the_whole(mask, field):
    """The outputs, the gradients through the states, and the last state, in every backend."""
    phi, mask = calibrated_map(), MASKS[mask](23)
    tensors = [x.requires_grad_() for x in inputs(dtype=torch.float64)]
    whole = favor_attention(*tensors, phi, True, mask, enable_gqa=True, **field)
    cotangent = torch.randn_like(whole)
    gradients = torch.autograd.grad(whole, tensors, cotangent)
    _, first = in_pieces([], tensors, phi, mask, **field)
    for cuts in PIECES.values():
        out, state = in_pieces(cuts, tensors, phi, mask, **field)
        torch.testing.assert_close(out, whole, rtol=1e-9, atol=1e-10)
        found = torch.autograd.grad(out, tensors, cotangent)
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
        assert_same_state(first, state)
    with torch.no_grad():
        for cuts in ([], [3, 3, 11]):
            out, state = in_pieces(cuts, tensors, phi, mask, backend="reference", **field)
            torch.testing.assert_close(out, whole, rtol=1e-9, atol=1e-10)
            assert_same_state(first, state)


def assert_same_state(first: LinearState, state: LinearState) -> None:
    frame = torch.maximum(first.log_scale, state.log_scale)
    one, other = first.rescaled(frame), state.rescaled(frame)
    torch.testing.assert_close(one.normalizer, other.normalizer)
    torch.testing.assert_close(one.values, other.values)
    for name in ("key", "value", "sink_key", "sink_value", "heavy_key", "heavy_value", "count"):
        assert torch.equal(getattr(first.near, name), getattr(state.near, name)), name
    for name in ("heavy_weight", "heavy_sums"):
        torch.testing.assert_close(getattr(first.near, name), getattr(state.near, name))


@every_backend
@every_field
def test_later_keys_and_values_leave_earlier_outputs_bit_identical(field, backend):
    options = {"enable_gqa": True, "backend": backend, **field}
    tensors = inputs()
    before = favor_attention(*tensors, feature_map(), True, **options)
    for position in (1, 2, 5, 6, 7, 8, 9, 17, 22):
        later = [x.clone() for x in tensors]
        for x in later:
            x[:, :, position:] = 1e4 * torch.randn_like(x[:, :, position:])
        after = favor_attention(*later, feature_map(), True, **options)
        assert torch.equal(before[:, :, :position], after[:, :, :position])


@every_mode
@every_field
def test_padding_on_either_side_changes_nothing(field, is_causal):
    tensors = inputs(17)
    options = {"enable_gqa": True, **field}
    expected = favor_attention(*tensors, feature_map(), is_causal, **options)
    for left, right in ((4, 0), (0, 5), (3, 2)):
        padded = [torch.nn.functional.pad(x, (0, 0, left, right), value=7.0) for x in tensors]
        mask = torch.zeros(2, left + 17 + right, dtype=torch.bool)
        mask[:, left : left + 17] = True
        out = favor_attention(*padded, feature_map(), is_causal, mask, **options)
        torch.testing.assert_close(out[:, :, left : left + 17], expected, rtol=1e-6, atol=1e-6)
        assert (out[:, :, :left] == 0).all()
        assert (out[:, :, left + 17 :] == 0).all()


@every_mode
@every_field
def test_gradients_equal_those_of_the_definition(field, is_causal):
    phi, mask = feature_map(), MASKS["holes"](23)
    # At growing norms many weights are 0, and which of those keys are heavy is arbitrary.
    for norms in ("1",) if "num_heavy" in field else ("1", "growing"):
        tensors = [x.requires_grad_() for x in inputs(dtype=torch.float64, norms=norms)]
        out = favor_attention(*tensors, phi, is_causal, mask, enable_gqa=True, **field)
        cotangent = torch.randn_like(out)
        gradients = torch.autograd.grad(out, tensors, cotangent)
        expected = attended(*tensors, phi, is_causal, mask, **field).out
        expected = torch.autograd.grad(expected, tensors, cotangent)
        for gradient, true in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, true, rtol=1e-5, atol=1e-6 * true.abs().max())


@every_mode
@every_field
@pytest.mark.parametrize("normalize", [True, False])
def test_the_operator_equals_the_reference_where_features_are_sharp(normalize, field, is_causal):
    """Statistics of the call, too; and omega has a gradient."""
    tensors = [x.requires_grad_() for x in inputs(dtype=torch.float64)]
    maps = [calibrated_map()]
    if not is_causal:
        maps.append(SharpFeatures(5, 11, num_heads=3, statistics="call"))
    for phi in maps:
        phi.omega.requires_grad_()
        outputs = [
            favor_attention(
                *tensors, phi, is_causal, MASKS["left"](23), normalize=normalize, enable_gqa=True,
                backend=backend, **field,
            )
            for backend in BACKENDS
        ]  # fmt: skip
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
        cotangent = torch.randn_like(outputs[0])
        leaves = [*tensors, phi.omega]
        ones, others = (
            torch.autograd.grad(out, leaves, cotangent, allow_unused=True) for out in outputs
        )
        for one, other in zip(ones, others, strict=True):
            one, other = (torch.zeros(()) if x is None else x for x in (one, other))
            exact = one.dtype == torch.float64  # omega is float32
            tolerance = {"rtol": 1e-6, "atol": 1e-8} if exact else {"rtol": 1e-4, "atol": 1e-5}
            torch.testing.assert_close(one, other.broadcast_to(one.shape), **tolerance)


@every_backend
def test_the_memory_of_a_near_field_does_not_grow_with_the_sequence(backend):
    sizes = set()
    for length in (5, 23):
        _, state = favor_attention(
            *inputs(length), feature_map(), True, enable_gqa=True, window_size=3, num_sinks=2,
            return_state=True, backend=backend,
        )  # fmt: skip
        sizes.add(sum(x.untyped_storage().nbytes() for x in state.parts().values()))
    assert len(sizes) == 1


@every_mode
@every_field
def test_an_empty_sequence_gives_an_empty_output(field, is_causal):
    out = favor_attention(*inputs(0), feature_map(), is_causal, enable_gqa=True, **field)
    assert out.shape == (2, 6, 0, 7)


@every_mode
@every_field
def test_a_batch_of_any_size_and_none_is_served(field, is_causal):
    tensors = inputs()
    options = {"enable_gqa": True, **field}
    whole = favor_attention(*tensors, feature_map(), is_causal, **options)
    for rows in (slice(0, 1), slice(1, 2), slice(0, 0)):
        part = favor_attention(*(x[rows] for x in tensors), feature_map(), is_causal, **options)
        torch.testing.assert_close(part, whole[rows])


@every_field
def test_a_batch_of_none_continues_its_state(field):
    options = {"enable_gqa": True, "return_state": True, **field}
    tensors, phi, state = [x[:0] for x in inputs()], feature_map(), None
    for _ in range(2):
        out, state = favor_attention(*tensors, phi, True, initial_state=state, **options)
    assert out.shape == (0, 6, 23, 7)


COMPILED = """
import torch
from performers import SharpFeatures, favor_attention

torch.manual_seed(0)
phi = SharpFeatures(8, 12, num_heads=2)
tensors = [x.requires_grad_() for x in torch.randn(3, 2, 2, 23, 8).unbind()]
phi.calibrate(*tensors[:2])


def attend(query, key, value, mask, is_causal, state=None, return_state=False):
    return favor_attention(
        query, key, value, phi, is_causal, mask, window_size=4, num_sinks=2,
        initial_state=state, return_state=return_state,
    )


compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
for is_causal in (False, True):
    for length in (19, 23):
        inputs = [x[:, :, :length] for x in tensors]
        mask = torch.arange(length) >= torch.tensor([[3], [0]])
        outputs = [f(*inputs, mask, is_causal) for f in (attend, compiled)]
        torch.testing.assert_close(*outputs)
        gradients = [torch.autograd.grad(out.square().sum(), tensors) for out in outputs]
        for one, other in zip(*gradients):
            torch.testing.assert_close(one, other)

with torch.no_grad():
    _, state = attend(*(x[:, :, :9] for x in tensors), None, True, return_state=True)
    other = state
    for position in range(9, 14):  # over the end of a block
        token = [x[:, :, position : position + 1] for x in tensors]
        one, state = attend(*token, None, True, state, True)
        two, other = compiled(*token, None, True, other, True)
        torch.testing.assert_close(one, two)
"""


@pytest.mark.slow
def test_near_fields_of_any_length_and_steps_compile_as_one_graph(fresh_python):
    fresh_python(COMPILED)


@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_inputs_and_outputs_and_nothing_between(dtype, is_causal):
    query, key, value = inputs(dtype=dtype, norms="10")
    options = {"enable_gqa": True, "window_size": 3, "num_sinks": 2}
    out = favor_attention(query, key, value, feature_map(), is_causal, **options)
    wide = favor_attention(
        query.float(), key.float(), value.float(), feature_map(), is_causal, **options
    )
    assert torch.equal(out, wide.to(dtype))
