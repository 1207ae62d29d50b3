"""Feature maps own ω: a float32 buffer, a function of (seed, layer, number of redraws)."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn
from warm import warm_python

from performers import KernelFeatures, SharpFeatures, SoftmaxFeatures, favor_attention
from performers.functional import KERNELS, Kernel
from performers.functional.projections import DISTRIBUTIONS
from performers.nn import feature_maps

BUILDERS = {
    "softmax": lambda **options: SoftmaxFeatures(5, 11, **options),
    "kernel": lambda **options: KernelFeatures(5, 11, **options),
}


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


def test_omega_is_what_it_always_was():
    """Golden values: a saved seed must give the same ω in every later version."""
    golden = {
        (0, 0, 0): [[0.091115, 0.659278, 0.550632], [0.300588, -1.721854, 2.011857]],
        (0, 1, 0): [[0.934678, -0.205564, -2.126723], [-1.810625, 2.811425, -1.067501]],
        (1, 0, 0): [[0.619049, 0.033144, 0.733701], [0.974956, 0.541273, -0.847055]],
        (7, 3, 2): [[0.480664, -1.299905, 1.172107], [1.226499, -0.685283, -1.262971]],
    }
    for (seed, layer, redraws), rows in golden.items():
        phi = SoftmaxFeatures(3, 2, seed=seed, layer=layer)
        for _ in range(redraws):
            phi.redraw()
        torch.testing.assert_close(phi.omega, torch.tensor(rows), rtol=1e-5, atol=1e-6)


def test_omega_depends_on_seed_layer_and_redraws_and_on_nothing_else(build):
    drawn = {}
    for seed in range(3):
        for layer in range(3):
            torch.manual_seed(seed + layer)  # the global generator has no part in it
            phi = build(seed=seed, layer=layer)
            for redraws in range(3):
                drawn[seed, layer, redraws] = phi.omega.clone()
                assert phi.num_redraws == redraws
                phi.redraw()
    values = list(drawn.values())
    assert all(not torch.equal(x, y) for i, x in enumerate(values) for y in values[:i])
    again = build(seed=1, layer=2)
    again.redraw()
    assert torch.equal(again.omega, drawn[1, 2, 1])
    again.reset_parameters()
    assert torch.equal(again.omega, drawn[1, 2, 0])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_draw_is_of_the_distribution_that_was_asked_for(build, distribution):
    phi = build(distribution=distribution)
    draws = [phi.omega.clone()]
    phi.redraw()
    draws.append(phi.omega.clone())
    phi.redraw(torch.Generator().manual_seed(7))
    draws.append(phi.omega.clone())
    phi.reset_parameters()
    draws.append(phi.omega.clone())
    for omega in draws:
        is_on_sphere = (omega.norm(dim=1) - 5**0.5).abs() < 1e-5
        assert is_on_sphere.all() if distribution == "sphere" else not is_on_sphere.any()


def test_drawing_leaves_the_global_generator_alone(build):
    before = torch.get_rng_state()
    build().redraw()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_of_the_caller_decides_the_redraw(build):
    first, second = build(seed=0), build(seed=1)
    for phi in (first, second):
        phi.redraw(torch.Generator().manual_seed(7))
        assert phi.num_redraws == 1
    assert torch.equal(first.omega, second.omega)


def test_redraws_continue_after_loading(build):
    saved, loaded = build(seed=3), build(seed=3)
    saved.redraw()
    saved.redraw()
    loaded.load_state_dict(saved.state_dict())
    assert torch.equal(loaded.omega, saved.omega)
    saved.redraw()
    loaded.redraw()
    assert torch.equal(loaded.omega, saved.omega)


def test_forward_never_redraws(build):
    phi = build().train()
    before = phi.omega.clone()
    favor_attention(*torch.randn(3, 1, 2, 7, 5), phi)
    assert torch.equal(phi.omega, before)
    assert phi.num_redraws == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_omega_stays_float32_when_its_module_is_cast(build, dtype):
    phi = build()
    before = phi.omega.clone()
    model = nn.Sequential(nn.Linear(5, 5), phi).to(dtype)
    assert model[0].weight.dtype == dtype
    assert phi.omega.dtype == torch.float32
    assert torch.equal(phi.omega, before)
    assert phi.num_redraws.dtype == torch.int64
    model.half().float()
    assert torch.equal(phi.omega, before)


class Damped(nn.Module):
    """A kernel with a number of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.tensor(0.5))

    def forward(self, x):
        return (self.factor * x).exp()


def test_what_a_kernel_owns_is_cast_with_the_model_and_omega_is_not():
    phi = KernelFeatures(5, 11, Kernel(Damped(), is_nonnegative=True))
    by_module = KernelFeatures(5, 11, Damped())
    before = by_module.omega.clone()
    by_module.half()
    assert by_module.fn.factor.dtype == torch.float16
    assert torch.equal(by_module.omega, before)
    assert phi.half().omega.dtype == torch.float32


def test_a_fingerprint_is_made_once_for_each_omega(build):
    phi = build()
    first = phi.fingerprint
    assert phi.fingerprint is first
    phi.redraw()
    assert phi.fingerprint != first
    phi.reset_parameters()
    assert phi.fingerprint == first
    other = build(seed=1)
    phi.load_state_dict(other.state_dict(), assign=True)
    assert phi.fingerprint == other.fingerprint != first


def test_without_omega_a_fingerprint_is_of_the_kernel_alone():
    def of(**options):
        return KernelFeatures(5, projection=None, **options).fingerprint

    assert of(fn="elu+1") == of(fn="elu+1", seed=1)
    assert of(fn="elu+1") != of(fn="exp")
    assert of(epsilon=0.25) != of(epsilon=0.5)


def test_omega_survives_copies_and_pickles(build):
    phi = build()
    phi.redraw()
    for copied in (copy.deepcopy(phi), pickle.loads(pickle.dumps(phi))):
        assert torch.equal(copied.omega, phi.omega)
        assert copied.num_redraws == 1
        copied.redraw()
        assert not torch.equal(copied.omega, phi.omega)
    file = io.BytesIO()
    torch.save(phi.state_dict(), file)
    file.seek(0)
    loaded = build(seed=1)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded.omega, phi.omega)


def test_omega_survives_the_meta_device(build):
    phi = build()
    for make in (lambda: build(seed=1).to("meta"), lambda: _under_meta(build)):
        shell = make()
        shell.load_state_dict(phi.state_dict(), assign=True)
        assert torch.equal(shell.omega, phi.omega)
        assert shell.omega.device.type == "cpu"


def test_reset_parameters_fills_a_module_made_on_the_meta_device(build):
    shell = _under_meta(build).to_empty(device="cpu")
    shell.reset_parameters()
    assert torch.equal(shell.omega, build().omega)
    assert shell.num_redraws == 0


def _under_meta(build):
    with torch.device("meta"):
        return build()


def test_omega_is_saved_and_is_not_trained(build):
    phi = build()
    assert set(phi.state_dict()) == {"omega", "num_redraws"}
    assert not list(phi.parameters())


def test_without_omega_the_kernel_acts_on_the_input_itself():
    phi = KernelFeatures(5, fn="elu+1", epsilon=0.0, projection=None)
    assert phi.omega is None
    assert phi.num_features == 5
    phi.redraw()
    x = torch.randn(1, 2, 7, 5)
    torch.testing.assert_close(phi.query_features(x).dense(), nn.functional.elu(x) + 1)


def test_any_elementwise_callable_is_a_kernel():
    by_name, by_hand = KernelFeatures(5, 11, "gelu"), KernelFeatures(5, 11, nn.functional.gelu)
    tensors = torch.randn(3, 1, 2, 7, 5)
    torch.testing.assert_close(
        favor_attention(*tensors, by_name), favor_attention(*tensors, by_hand)
    )


@pytest.mark.parametrize("fn", KERNELS)
def test_elementwise_features_are_those_of_the_map(fn):
    phi = KernelFeatures(5, 11, fn, epsilon=0.25)
    # A kernel without a derivative by hand, or without a name, is left to autograd.
    assert (phi.elementwise is None) == (KERNELS[fn].backward is None)
    assert KernelFeatures(5, 11, KERNELS[fn]).elementwise is None
    if phi.elementwise is not None:
        name, epsilon, directions = phi.elementwise
        x = torch.randn(7, 5)
        values = (KERNELS[name].fn(x @ directions.T) + epsilon) / 11**0.5
        torch.testing.assert_close(phi.query_features(x).dense(), values)


ONE_GRAPH = """
import torch
from performers import SharpFeatures, SoftmaxFeatures, favor_attention

for is_causal, dtype in (False, torch.float32), (False, torch.bfloat16), (True, torch.float32):
    query, key, value = torch.randn(3, 2, 3, 7, 5, dtype=dtype).unbind()
    query.requires_grad_()
    phi = {features}
    torch._dynamo.reset()
    compiled = torch.compile(favor_attention, backend="aot_eager", fullgraph=True)
    results = []
    for attend in (favor_attention, compiled):
        out = attend(query, key, value, phi, is_causal=is_causal)
        results.append((out, torch.autograd.grad(out.square().sum(), query)[0]))
    torch.testing.assert_close(*results)
    print("equal")
"""

CAUSAL = """
import torch
from torch import nn
from warm import warm_python
from performers import FavorAttention

attention = FavorAttention(15, 3, batch_first=True)
mask = nn.Transformer.generate_square_subsequent_mask(7)
x = torch.randn(2, 7, 15)
results = []
for attend in (attention, torch.compile(attention, backend="aot_eager")):
    out, _ = attend(x, x, x, attn_mask=mask, need_weights=False)
    results.append((out, torch.autograd.grad(out.square().sum(), attention.in_proj_weight)[0]))
torch.testing.assert_close(*results)
print("equal")
"""


@pytest.mark.parametrize("features", ["SoftmaxFeatures(5, 11)", "SharpFeatures(5, 11)"])
def test_attention_compiles_as_one_graph(features):
    assert warm_python(ONE_GRAPH.format(features=features)).split() == ["equal"] * 3


@pytest.mark.slow
def test_compiled_causal_attention_is_equal():
    assert warm_python(CAUSAL).splitlines()[-1] == "equal"


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: SoftmaxFeatures(5, 7, estimator="trigonometric"), 'estimator="positive"'),
        (lambda: KernelFeatures(5, 7, fn="cos"), '"relu"'),
        (lambda: KernelFeatures(5, 7, fn=torch.sin), "is_nonnegative=True"),
    ],
)
def test_features_that_can_be_negative_warn_and_say_what_avoids_it(make, remedy):
    with pytest.warns(UserWarning, match="normalizer of attention may vanish") as caught:
        make()
    assert remedy in str(caught[0].message)
    assert "normalize=False" in str(caught[0].message)


def test_the_warning_is_about_the_line_that_makes_the_map(monkeypatch):
    # As users call it: the shape checks of the tests are further frames.
    plain = inspect.unwrap(feature_maps._warn_of_signs)
    monkeypatch.setattr(feature_maps, "_warn_of_signs", plain)
    for kind, option in ((SoftmaxFeatures, "trigonometric"), (KernelFeatures, "cos")):
        with pytest.warns(UserWarning, match="may vanish or change sign") as caught:
            inspect.unwrap(kind.__init__)(kind.__new__(kind), 5, 7, option)
        assert caught[0].filename == __file__


def test_a_callable_that_is_said_to_be_nonnegative_does_not_warn(recwarn):
    phi = KernelFeatures(5, 7, fn=Kernel(torch.square, is_nonnegative=True))
    assert phi.is_nonnegative
    assert not recwarn.list


@pytest.mark.parametrize("make", [KernelFeatures, SoftmaxFeatures, SharpFeatures])
def test_a_copy_that_is_redrawn_is_told_from_the_first(make):
    phi = make(7)
    for _ in range(3):  # changes that a copy does not count
        phi.reset_parameters()
    before = phi.fingerprint
    assert copy.deepcopy(phi).fingerprint == before
    other = copy.deepcopy(phi)
    for _ in range(9):  # at some time the copy has as many changes as the first had
        other.redraw()
        assert other.fingerprint != before


COMMON = [
    ("dim", 0, "dim must be a whole number of at least 1, got 0"),
    ("num_projections", 0, "num_projections must be a whole number of at least 1, got 0"),
    ("projection", "orthogonl", "Did you mean 'orthogonal'"),
    ("seed", 0.5, "seed must be a whole number, got 0.5"),
    ("layer", "1", "layer must be a whole number, got '1'"),
]
SHARP = [
    ("num_heads", 0, "num_heads must be a whole number of at least 1, got 0"),
    ("statistics", "calibratd", "Did you mean 'calibrated'"),
    ("optimal", "coordinat", "Did you mean 'coordinate'"),
    ("query_ratio", "2", "query_ratio must be positive and finite"),
    ("shift", 1, "shift must be True or False"),
    ("balance", "no", "balance must be True or False"),
]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("kind", "name", "value", "words"),
    [(kind, *row) for kind in (SoftmaxFeatures, KernelFeatures, SharpFeatures) for row in COMMON]
    + [(SharpFeatures, *row) for row in SHARP],
)
def test_a_choice_that_does_not_fit_is_named(kind, name, value, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        kind(**{"dim": 5, "num_projections": 7, name: value})
    assert words in str(caught.value)
