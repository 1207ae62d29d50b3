"""No argument of a public function may be mistaken for another kind of thing."""

import inspect
from dataclasses import fields

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from kinds import OTHERS, PHI, STATE
from refusals import few, outcome
from torch import Tensor

import performers
from performers import functional
from performers.models.mechanisms import MECHANISMS
from performers.nn.dialect import Dialect
from performers.state import LinearState

QUERY, KEY, VALUE = torch.randn(3, 2, 3, 7, 4, generator=torch.Generator().manual_seed(1)).unbind()
MASK = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
SHARP = performers.SharpFeatures(4, 8, num_heads=3)
ATTENTION = performers.FavorAttention(8, 2, batch_first=True)
TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(2))
OMEGA = functional.draw_projection(8, 4)


NEAR = {"window_size": 2, "num_sinks": 1, "far": True, "far_limit": 0.5, "num_heavy": 0}
INPUTS = {"query": QUERY, "key": KEY, "is_causal": False, "key_padding_mask": MASK, "scale": 0.5}
LINEAR = {
    **INPUTS, **NEAR, "value": VALUE, "phi": PHI, "normalize": True, "enable_gqa": False,
    "initial_state": None, "return_state": False, "backend": None,
}  # fmt: skip
ORDERED = {"segment_ids": None, "prefix_lengths": None, "seen_lengths": None}
DRAWN = {"dim": 4, "num_projections": 8, "projection": "iid", "seed": 0, "layer": 0}

# Function → arguments that it serves.
SERVED = {
    performers.favor_attention: LINEAR | ORDERED,
    functional.linear_attention: LINEAR,
    performers.softmax_attention: {
        **INPUTS, **ORDERED, "value": VALUE, "enable_gqa": False
    },
    performers.attention_matrix: {
        **INPUTS, **NEAR, **ORDERED, "phi": PHI, "normalize": True, "enable_gqa": False,
    },
    performers.draw_projection: {
        "num_projections": 8, "dim": 4, "kind": "iid", "distribution": "sphere", "generator": None
    },
    functional.positive_features: {"x": QUERY, "omega": OMEGA},
    functional.hyperbolic_features: {"x": QUERY, "omega": OMEGA},
    functional.trigonometric_features: {"x": QUERY, "omega": OMEGA},
    functional.kernel_features: {"x": QUERY, "omega": OMEGA, "fn": "relu", "epsilon": 1e-3},
    functional.absorb_keys: {"key": KEY, "phi": PHI, "key_padding_mask": MASK, "scale": 0.5},
    functional.log_normalizer: {"query": QUERY, "phi": PHI, "state": STATE, "scale": 0.5},
    functional.approximate_cross_entropy: {
        "hidden": QUERY[0, 0], "output_embeddings": KEY[0, 0], "targets": torch.arange(7),
        "phi": PHI, "ignore_index": -100, "reduction": "mean",
    },
    performers.SoftmaxFeatures: {**DRAWN, "estimator": "positive", "distribution": "sphere"},
    performers.KernelFeatures: {
        **DRAWN, "fn": "relu", "epsilon": 1e-3, "distribution": "gaussian"
    },
    performers.SharpFeatures: {
        **DRAWN, "num_heads": 3, "statistics": "call", "shift": True, "balance": True,
        "optimal": "isotropic", "query_ratio": 1.0,
    },
    SHARP.calibrate: {"query": QUERY, "key": KEY, "key_padding_mask": MASK, "scale": 0.5},
    PHI.redraw: {"generator": None},
    performers.FavorAttention: {
        "embed_dim": 8, "num_heads": 2, "dropout": 0.0, "bias": True, "add_bias_kv": False,
        "add_zero_attn": False, "kdim": None, "vdim": None, "batch_first": True,
        "feature_map": None,
    },
    ATTENTION.forward: {
        "query": TOKENS, "key": TOKENS, "value": TOKENS, "attn_mask": None, "is_causal": False,
        "key_padding_mask": None, "need_weights": False, "average_attn_weights": True,
    },
    performers.diagnose: {
        **INPUTS, "value": VALUE, "phi": PHI, "enable_gqa": False, "window_size": None,
        "target_error": None, "max_projections": 16,
    },
    LinearState.empty: {
        "batch": 2, "key_heads": 3, "num_features": 8, "value_dim": 4, "device": "cpu",
        "dtype": torch.float32,
    },
    STATE.merge: {"other": STATE},
    STATE.rescaled: {"log_scale": STATE.log_scale},
    STATE.emptied: {"where": torch.ones(2, 1, 1, dtype=torch.bool)},
    STATE.index_select: {"index": torch.tensor([1, 0])},
    STATE.repeat_interleave: {"repeats": 2},
    STATE.to: {"device": "cpu"},
    STATE.map: {"function": torch.clone},
    performers.FavorOptions: {
        "num_projections": 8, "features": "sharp", "projection": "iid", "statistics": None,
        "window_size": None, "num_sinks": None, "far": None, "far_limit": 0.5,
        "num_heavy": 0, "layers": None, "exact_heads": {},
        "seed": 0,
    },
}  # fmt: skip

# They take a function of the caller, who knows what it takes.
NOT_OURS = (functional.implied_matrix, functional.Kernel)


def test_every_function_of_the_paper_and_every_argument_is_under_this_law():
    public = [getattr(functional, name) for name in functional.__all__]
    assert [one for one in public if callable(one) and one not in (*SERVED, *NOT_OURS)] == []
    for function, arguments in SERVED.items():
        known = inspect.signature(function).parameters.keys()
        assert known - arguments.keys() <= {"device", "dtype", "distribution"}, function


@pytest.mark.parametrize("function", SERVED, ids=lambda one: one.__qualname__)
def test_the_arguments_are_served(function):
    function(**SERVED[function])


@few
@given(st.data())
@pytest.mark.filterwarnings("ignore")  # of dropout and of signs
@pytest.mark.parametrize("function", SERVED, ids=lambda one: one.__qualname__)
def test_another_kind_of_thing_is_served_or_refused_by_name(function, data):
    arguments = SERVED[function]
    name = data.draw(st.sampled_from(sorted(arguments)))
    kind = data.draw(st.sampled_from(sorted(OTHERS)))
    # A function of the caller's has errors of its own.
    assume(not (name in ("fn", "function") and callable(OTHERS[kind])))
    outcome(lambda: function(**{**arguments, name: OTHERS[kind]}))


def test_every_method_of_a_state_and_every_argument_is_under_this_law():
    given = [name for name, method in inspect.getmembers(STATE, callable) if name[0] != "_"]
    alone = [name for name in given if not inspect.signature(getattr(STATE, name)).parameters]
    served = {function.__name__ for function in SERVED if "LinearState." in function.__qualname__}
    assert served == set(given) - set(alone)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: STATE.merge(None), "other must be a LinearState, got None"),
        (lambda: STATE.merge(STATE.map(lambda part: part[:1])), "must be torch.float32 of shape"),
        (lambda: STATE.merge(STATE.map(Tensor.double)), "must be torch.float32 of shape"),
        (
            lambda: STATE.merge(STATE.to("meta")),
            "must be on the device of this state: it is on meta",
        ),
        (lambda: STATE.index_select([1, 0]), "index must be a torch.Tensor"),
        (lambda: STATE.index_select(torch.tensor([2])), "numbers of batch rows, 0 to 1, got 2"),
        (lambda: STATE.index_select(torch.tensor([-1])), "numbers of batch rows, 0 to 1, got -1"),
        (lambda: STATE.index_select(torch.tensor(1)), "index must be a vector of whole numbers"),
        (lambda: STATE.repeat_interleave(0), "repeats must be a whole number of at least 1"),
        (lambda: STATE.to("the moon"), "device must be one of torch's"),
        (
            lambda: STATE.to("cuda:99"),
            "device must be one that torch sees, got 'cuda:99', and it sees ",
        ),
        (
            lambda: LinearState.empty(2, 3, -1, 4),
            "num_features must be a whole number of at least 0, got -1",
        ),
    ],
)
def test_a_state_says_what_it_is_not_given(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


# Each field with each kind of thing: there are few, and no call is long.
OPTIONS = {
    performers.FavorOptions: SERVED[performers.FavorOptions],
    Dialect: {field.name: field.default for field in fields(Dialect)},
    **{
        row.options: {field.name: field.default for field in fields(row.options)}
        for row in MECHANISMS.values()
    },
}


@pytest.mark.parametrize("options", OPTIONS, ids=lambda one: one.__name__)
def test_another_kind_of_thing_in_any_option_is_served_or_refused_by_name(options):
    for name in OPTIONS[options]:
        for thing in OTHERS.values():
            outcome(lambda given={name: thing}: options(**{**OPTIONS[options], **given}))


def test_a_state_of_other_features_is_no_state_of_these():
    other = LinearState.empty(2, 3, 5, 0)
    words = outcome(lambda: functional.log_normalizer(QUERY, PHI, other)).words
    assert "state must hold sums of 8 features for 3 heads" in words
