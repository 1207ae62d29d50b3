"""What a caller gets wrong is said at once: what must hold, what came, what to do."""

import functools
import re
from dataclasses import replace

import pytest
import torch
from cases import inputs

from performers import (
    KernelFeatures,
    LinearState,
    SoftmaxFeatures,
    attention_matrix,
    draw_projection,
    favor_attention,
    softmax_attention,
)
from performers.checks import FEATURE_MAP_PARTS
from performers.functional import kernel_features, positive_features
from performers.typing import FeatureMap

# jaxtyping would speak first; a caller does not have its checks.
pytestmark = pytest.mark.usefixtures("without_shape_checks")


def refused(words: str, error: type[Exception] = ValueError) -> pytest.RaisesExc:
    return pytest.raises(error, match=re.escape(words))


class TestAttention:
    """The same checks guard linear and exact attention."""

    @pytest.fixture(params=["favor", "exact"])
    def attend(self, request):
        if request.param == "exact":
            return softmax_attention
        phi = SoftmaxFeatures(5, 11)
        return lambda query, key, value, *arguments, **options: favor_attention(
            query, key, value, phi, *arguments, **options
        )

    def test_three_axes(self, attend):
        query, key, value = inputs(key_heads=6)
        with refused("key must be (batch, heads, length, dim), got (2, 23, 5). For one head write"):
            attend(query, key[:, 0], value)

    def test_whole_numbers(self, attend):
        query, key, value = inputs(key_heads=6)
        with refused("query must be of a floating dtype, got torch.int64", TypeError):
            attend(query.long(), key, value)

    def test_two_devices(self, attend):
        query, key, value = inputs(key_heads=6)
        with refused("on one device: query on cpu, key on meta, value on cpu. Move them"):
            attend(query, key.to("meta"), value)

    def test_two_dtypes(self, attend):
        query, key, value = inputs(key_heads=6)
        with refused("one dtype: query torch.float32, key torch.float64", TypeError):
            attend(query, key.double(), value)

    def test_dims_of_query_and_key(self, attend):
        query, key, value = inputs(key_heads=6)
        with refused("same dim per head: query is (2, 6, 23, 5), key is (2, 6, 23, 4)."):
            attend(query, key[..., :4], value)

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_keys_without_values(self, attend, axis):
        query, key, value = inputs(key_heads=6)
        fewer = value.narrow(axis, 0, 1)
        with refused(f"key is (2, 6, 23, 5), value is {tuple(fewer.shape)}"):
            attend(query, key, fewer)

    def test_two_batch_sizes(self, attend):
        query, key, value = inputs(key_heads=6)
        with refused("same batch size: query is (1, 6, 23, 5), key is (2, 6, 23, 5)"):
            attend(query[:1], key, value)

    def test_groups_unasked_for(self, attend):
        with refused("query has 6 heads and key has 3: they must be equal. For grouped-query"):
            attend(*inputs())

    @pytest.mark.parametrize("key_heads", [0, 4, 7])
    def test_groups_that_do_not_divide(self, attend, key_heads):
        with refused(f"6 query heads, {key_heads} key heads"):
            attend(*inputs(key_heads=key_heads), enable_gqa=True)

    def test_causal_cross_attention(self, attend):
        with refused("one query per key: query length is 7, key length is 11. To continue"):
            attend(*inputs(7, 11, key_heads=6), is_causal=True)

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
    def test_scales_that_are_no_temperature(self, attend, scale):
        with refused(f"scale must be positive and finite, got {scale!r}"):
            attend(*inputs(key_heads=6), scale=scale)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.uint8])
    def test_masks_that_are_not_bool(self, attend, dtype):
        mask = torch.ones(2, 23, dtype=dtype)
        with refused(f"must be bool with True for a real key, got {dtype}. From a 0/1", TypeError):
            attend(*inputs(key_heads=6), key_padding_mask=mask)

    @pytest.mark.parametrize("shape", [(23,), (2, 22), (3, 23), (2, 1, 23), (2, 1, 23, 23)])
    def test_masks_of_another_shape(self, attend, shape):
        with refused(f"must be (batch, key_length) = (2, 23), got {shape}"):
            attend(*inputs(key_heads=6), key_padding_mask=torch.ones(shape, dtype=torch.bool))

    def test_masks_on_another_device(self, attend):
        mask = torch.ones(2, 23, dtype=torch.bool, device="meta")
        with refused("key_padding_mask must be on the device of key: meta and cpu"):
            attend(*inputs(key_heads=6), key_padding_mask=mask)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_torch_jit_would_trace_is_refused():
    phi = SoftmaxFeatures(5, 11)
    with refused("torch.jit.trace cannot record this attention", RuntimeError):
        torch.jit.trace(lambda query: favor_attention(query, query, query, phi), inputs()[0])


def test_a_near_miss_of_a_backend_is_named():
    with refused("unknown backend 'chunk': choose one of") as raised:
        favor_attention(*inputs(key_heads=6), SoftmaxFeatures(5), backend="chunk")
    assert "Did you mean 'chunked'?" in str(raised.value)


LANDMARKS_REFUSALS = [
    (SoftmaxFeatures(5), {"is_causal": True}, "it serves bidirectional attention without a window"),
    (SoftmaxFeatures(5), {"window_size": 3}, "it serves bidirectional attention without a window"),
    (SoftmaxFeatures(5), {"return_state": True}, "it neither takes nor gives a LinearState"),
    (KernelFeatures(5), {}, "it needs positive features of the softmax kernel"),
    (SoftmaxFeatures(5, estimator="trigonometric"), {}, "it needs positive features"),
]


@pytest.mark.parametrize(("phi", "options", "reason"), LANDMARKS_REFUSALS)
def test_a_named_backend_is_obeyed_or_refused_with_the_reason(phi, options, reason):
    tensors = inputs(key_heads=6)
    with refused(f'backend="landmarks" cannot serve this call: {reason}'):
        favor_attention(*tensors, phi, backend="landmarks", **options)
    favor_attention(*tensors, phi, backend=None, **options)


def test_no_name_means_the_landmarks_where_they_can_serve():
    tensors, phi = inputs(key_heads=6), SoftmaxFeatures(5)
    chosen = favor_attention(*tensors, phi)
    assert torch.equal(chosen, favor_attention(*tensors, phi, backend="landmarks"))
    causal = favor_attention(*tensors, phi, is_causal=True)
    assert torch.equal(causal, favor_attention(*tensors, phi, is_causal=True, backend="chunked"))


def test_the_implied_matrix_has_the_same_checks():
    query, key, _ = inputs()
    with refused("they must be equal. For grouped-query attention pass enable_gqa=True"):
        attention_matrix(query, key, SoftmaxFeatures(5))


@pytest.mark.parametrize("phi", [SoftmaxFeatures(4), KernelFeatures(4, projection=None)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_feature_map_of_another_dim(phi, is_causal):
    with refused("the feature map is for dim 4 per head: query is (2, 6, 23, 5). Make one with"):
        favor_attention(*inputs(key_heads=6), phi, is_causal)


def test_a_feature_map_on_another_device():
    phi = SoftmaxFeatures(5).to("meta")
    with refused("it is on meta, query on cpu. Move it with phi.to('cpu')"):
        favor_attention(*inputs(key_heads=6), phi)


class TestState:
    """A state is continued only by what it belongs to."""

    @pytest.fixture
    def state(self) -> LinearState:
        phi = SoftmaxFeatures(5, 11)
        return favor_attention(*inputs(key_heads=6), phi, True, return_state=True)[1]

    def test_of_another_batch(self, state):
        with refused("initial_state.log_scale must have shape (3, 6, 11) for these inputs, got (2"):
            favor_attention(
                *inputs(batch=3, key_heads=6), SoftmaxFeatures(5, 11), True, initial_state=state
            )

    def test_of_another_feature_map(self, state):
        with refused("must have shape (2, 6, 13) for these inputs, got (2, 6, 11)"):
            favor_attention(*inputs(key_heads=6), SoftmaxFeatures(5, 13), True, initial_state=state)

    def test_of_other_values(self, state):
        with refused("initial_state.values must have shape (2, 6, 11, 4) for these inputs"):
            favor_attention(
                *inputs(key_heads=6, value_dim=4),
                SoftmaxFeatures(5, 11),
                True,
                initial_state=state,
            )

    def test_on_another_device(self, state):
        with refused("it is on meta, value on cpu. Move the state with state.to('cpu')"):
            favor_attention(
                *inputs(key_heads=6), SoftmaxFeatures(5, 11), True, initial_state=state.to("meta")
            )

    def test_of_another_precision(self, state):
        rounded = replace(state, values=state.values.bfloat16())
        with refused("must be torch.float32 for these inputs, got torch.bfloat16", TypeError):
            favor_attention(
                *inputs(key_heads=6), SoftmaxFeatures(5, 11), True, initial_state=rounded
            )

    @pytest.mark.parametrize(
        ("made", "asked", "words"),
        [
            ({}, {"window_size": 3}, "made with no window, and this call has window_size=3"),
            ({"window_size": 3}, {}, "far=True, num_heavy=0, and this call has no window"),
            ({"window_size": 3}, {"window_size": 4}, "made with window_size=3, num_sinks=0"),
            ({"window_size": 3}, {"window_size": 3, "num_sinks": 2}, "call has window_size=3, num"),
            ({"window_size": 3}, {"window_size": 3, "far": False}, "far=False, num_heavy=0: pass"),
            ({"window_size": 3, "far": False}, {"window_size": 3}, "made with window_size=3"),
        ],
    )
    def test_of_another_near_field(self, made, asked, words):
        tensors, phi = inputs(key_heads=6), SoftmaxFeatures(5, 11)
        _, state = favor_attention(*tensors, phi, True, return_state=True, **made)
        favor_attention(*tensors, phi, True, initial_state=state, **made)
        with refused(words):
            favor_attention(*tensors, phi, True, initial_state=state, **asked)

    def test_with_a_window_cannot_merge(self):
        tensors, phi = inputs(key_heads=6), SoftmaxFeatures(5, 11)
        _, state = favor_attention(*tensors, phi, True, return_state=True, window_size=3)
        with refused("states with a window cannot merge"):
            state.merge(state)


class TestNearField:
    @pytest.mark.parametrize("given", [{"num_sinks": 2}, {"far": False}, {"far_limit": 0.2}])
    def test_without_a_window(self, given):
        ((name, value),) = given.items()
        with refused(f"{name}={value} belongs to an exact near field, and window_size is None"):
            favor_attention(*inputs(key_heads=6), SoftmaxFeatures(5), **given)

    @pytest.mark.parametrize("num_sinks", [-1, 1.5, True, "two"])
    def test_of_an_odd_number_of_sinks(self, num_sinks):
        with refused("num_sinks must be a whole number of at least 0"):
            favor_attention(
                *inputs(key_heads=6), SoftmaxFeatures(5), window_size=3, num_sinks=num_sinks
            )

    @pytest.mark.parametrize("far_limit", [0, -0.2, float("inf"), float("nan"), True, "0.2"])
    def test_with_an_odd_limit_on_far_keys(self, far_limit):
        with refused("far_limit must be positive and finite"):
            favor_attention(
                *inputs(key_heads=6), SoftmaxFeatures(5), window_size=3, far_limit=far_limit
            )

    def test_with_heavy_keys_that_would_be_counted_twice(self):
        with refused("would count them again: pass far=False with it"):
            favor_attention(*inputs(key_heads=6), SoftmaxFeatures(5), window_size=3, num_heavy=5)

    @pytest.mark.parametrize("num_heavy", [-1, 1.5, True])
    def test_with_an_odd_number_of_heavy_keys(self, num_heavy):
        with refused("num_heavy must be a whole number of at least 0"):
            favor_attention(
                *inputs(key_heads=6), SoftmaxFeatures(5), window_size=3, far=False,
                num_heavy=num_heavy,
            )  # fmt: skip

    def test_with_a_limit_on_far_keys_that_are_left_out(self):
        with refused("far_limit=0.2 limits the far keys, and far=False leaves them out"):
            favor_attention(
                *inputs(key_heads=6), SoftmaxFeatures(5), window_size=3, far=False, far_limit=0.2
            )

    def test_of_no_keys(self):
        with refused("window_size must be a whole number of at least 1, got 0"):
            favor_attention(*inputs(key_heads=6), SoftmaxFeatures(5), window_size=0)

    @pytest.mark.parametrize(
        "phi", [KernelFeatures(5), SoftmaxFeatures(5, estimator="trigonometric")]
    )
    def test_beside_another_kernel(self, phi):
        with refused("φ must be positive features of the softmax kernel"):
            favor_attention(*inputs(key_heads=6), phi, window_size=3)

    def test_in_cross_attention(self):
        with refused("a window needs one query per key"):
            favor_attention(*inputs(7, 11, key_heads=6), SoftmaxFeatures(5), window_size=3)

    def test_that_continues_in_both_directions(self):
        tensors, phi = inputs(key_heads=6), SoftmaxFeatures(5)
        _, state = favor_attention(*tensors, phi, return_state=True)
        with refused("a bidirectional window neither takes nor gives a state"):
            favor_attention(*tensors, phi, initial_state=state, window_size=3)


class TestFeatures:
    @pytest.mark.parametrize("count", [0, -1, 2.0, True, None])
    def test_counts_below_1_or_not_whole(self, count):
        said = f"must be a whole number of at least 1, got {count!r}"
        with refused(f"num_projections {said}"):
            draw_projection(count, 5)
        with refused(f"dim {said}"):
            draw_projection(5, count)
        with refused(f"num_projections {said}"):
            SoftmaxFeatures(5, count)
        with refused(f"dim {said}"):
            SoftmaxFeatures(count)
        with refused(f"num_projections {said}"):
            KernelFeatures(5, count)

    def test_near_misses_are_named(self):
        with refused("unknown kind of projection 'orthogonl': choose one of") as raised:
            draw_projection(5, 5, "orthogonl")
        assert "Did you mean 'orthogonal'?" in str(raised.value)
        with refused("unknown distribution 'gausian'") as raised:
            SoftmaxFeatures(5, distribution="gausian")
        assert "Did you mean 'gaussian'?" in str(raised.value)
        with refused("unknown estimator 'positiv'") as raised:
            SoftmaxFeatures(5, estimator="positiv")
        assert "Did you mean 'positive'?" in str(raised.value)
        with refused("unknown kernel 'rleu'") as raised:
            KernelFeatures(5, fn="rleu")
        assert "Did you mean 'relu'?" in str(raised.value)
        with refused("unknown projection 'Hadamard'") as raised:
            SoftmaxFeatures(5, projection="Hadamard")
        assert "Did you mean 'hadamard'?" in str(raised.value)

    def test_what_is_like_nothing_gets_the_choices_alone(self):
        with refused("unknown estimator 'xyz': choose one of ['hyperbolic',") as raised:
            SoftmaxFeatures(5, estimator="xyz")
        assert "Did you mean" not in str(raised.value)
        with refused("unknown kernel None: choose one of"):
            kernel_features(torch.ones(1, 3), None, None)

    def test_omega_of_another_dim(self):
        with refused("omega is (7, 4), x is (2, 3). Draw it with draw_projection(num_projections"):
            positive_features(torch.ones(2, 3), torch.ones(7, 4))
        with refused("omega must be a matrix with one column per feature of x"):
            positive_features(torch.ones(2, 3), torch.ones(3))

    @pytest.mark.parametrize("epsilon", [-1e-3, float("inf"), float("nan")])
    def test_an_epsilon_that_no_kernel_has(self, epsilon):
        with refused(f"epsilon must be a finite number of at least 0, got {epsilon!r}"):
            KernelFeatures(5, epsilon=epsilon)


@pytest.mark.parametrize(
    ("given", "came"),
    [([1.0], "[1.0]"), (None, "None"), ("x", "'x'"), (torch.Tensor, "the class Tensor")],
)
@pytest.mark.parametrize("name", ["query", "key", "value", "key_padding_mask"])
def test_what_is_no_tensor_is_named(name, given, came):
    if name == "key_padding_mask" and given is None:
        return
    query, key, value = inputs(key_heads=6)
    arguments = {"query": query, "key": key, "value": value, name: given}
    for attend in (softmax_attention, functools.partial(favor_attention, phi=SoftmaxFeatures(5))):
        with refused(f"{name} must be a torch.Tensor", TypeError) as raised:
            attend(**arguments)
        assert f"got {came}." in str(raised.value)


def test_the_rank_is_looked_at_before_the_dim():
    query, key, value = inputs(key_heads=6)
    with refused("query must be (batch, heads, length, dim), got (2, 6, 23)"):
        favor_attention(query[..., 0], key, value, SoftmaxFeatures(5))


@pytest.mark.parametrize("name", ["is_causal", "normalize", "enable_gqa", "far", "return_state"])
def test_a_flag_is_true_or_false(name):
    with refused(f"{name} must be True or False, got 'False'", TypeError):
        favor_attention(*inputs(key_heads=6), SoftmaxFeatures(5), **{name: "False"})


def test_a_class_is_no_feature_map():
    with refused("phi must be a feature map", TypeError) as raised:
        favor_attention(*inputs(key_heads=6), SoftmaxFeatures)
    assert "got the class SoftmaxFeatures." in str(raised.value)


def test_the_parts_of_a_feature_map_are_those_of_the_protocol():
    assert set(FEATURE_MAP_PARTS) == {name for name in vars(FeatureMap) if name[0] != "_"}


def test_a_scale_that_learns_is_refused():
    scale = torch.tensor(0.5, requires_grad=True)
    with refused("A scale that is learned multiplies the query."):
        favor_attention(*inputs(key_heads=6), SoftmaxFeatures(5), scale=scale)
