"""Sharp features change no kernel value: what they estimate is exp(q·k) at every step."""

import copy
import math

import pytest
import torch
from cases import MASKS, NORMS, backends, inputs
from oracle import attended
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from performers import SharpFeatures, SoftmaxFeatures, favor_attention, softmax_attention
from performers.functional.moments import Moments, received_attention, sampled
from performers.functional.sharp import (
    OPTIMAL,
    Reparametrization,
    ReparametrizedFeatures,
    optimal_exponent,
    sharpen,
)
from performers.nn.sharp import STATISTICS
from performers.theory import optimal_positive_parameter

# (window_size, is_causal, backend)
CALLS = [
    (window_size, is_causal, backend)
    for window_size in (None, 3)
    for is_causal in (False, True)
    for backend in backends("sharp", is_causal, has_near_field=window_size is not None)
]
every_call = pytest.mark.parametrize(("window_size", "is_causal", "backend"), CALLS)

STEPS = {
    "none": {"shift": False, "balance": False, "optimal": "none"},
    "shift": {"balance": False, "optimal": "none"},
    "balance": {"shift": False, "optimal": "none"},
    "isotropic": {"optimal": "isotropic"},
    "longer queries": {"query_ratio": 2.0},
    "all": {},
}


def anisotropic(x: Tensor, seed: int) -> Tensor:
    """x away from the origin and stretched along skew axes, as in pretrained models."""
    generator = torch.Generator().manual_seed(seed)
    dim = x.shape[-1]
    mixing = torch.randn(dim, dim, generator=generator).to(x.dtype)
    stretch = torch.logspace(-1, 0.3, dim, dtype=x.dtype)
    return 0.5 * (x * stretch) @ mixing + torch.randn(dim, generator=generator).to(x.dtype) / 2


def anisotropic_inputs(**options: object) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = inputs(**options)
    return anisotropic(query, 1), anisotropic(key, 2), value


def calibrated(query: Tensor, key: Tensor, m: int = 11, **options: object) -> SharpFeatures:
    phi = SharpFeatures(query.shape[-1], m, key.shape[1], **options)
    phi.calibrate(query, key)
    return phi


def reparametrization_of(phi: SharpFeatures) -> Reparametrization:
    return Reparametrization(
        phi.query_shift, phi.key_shift, phi.query_map, phi.key_map, phi.exponent
    )


def mapped_scores(query: Tensor, key: Tensor, r: Reparametrization) -> Tensor:
    """q·k through mapped coordinates: (M(q − a))·(M⁻ᵀ(k − b)) + a·(k − b) + b·q."""
    a, b = r.query_shift.unsqueeze(-2), r.key_shift.unsqueeze(-2)
    mapped_query, mapped_key = (query - a) @ r.query_map.mT, (key - b) @ r.key_map.mT
    return mapped_query @ mapped_key.mT + ((key - b) * a).sum(-1)[..., None, :] + query @ b.mT


def quadrature(phi: ReparametrizedFeatures, query: Tensor, key: Tensor) -> Tensor:
    """E[φ(q)·φ(k)] over ω ~ N(0, I₂), by Gauss–Hermite quadrature instead of draws."""
    nodes, weights = (torch.tensor(x, dtype=torch.float64) for x in hermite(80))
    grid = torch.cartesian_prod(nodes, nodes)
    probability = torch.outer(weights, weights).flatten()
    # Every node is a projection; √m of the features goes to the probabilities.
    phi = ReparametrizedFeatures(grid, phi.reparametrization)
    queries, keys = phi.query_features(query).dense(), phi.key_features(key).dense()
    return (queries * probability * len(grid)) @ keys.mT


def hermite(count: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of the standard normal distribution (Golub and Welsch 1969)."""
    off_diagonal = torch.arange(1, count, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(off_diagonal.diag(1) + off_diagonal.diag(-1))
    return nodes.tolist(), vectors[0].square().tolist()


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("steps", STEPS)
def test_shift_and_balance_are_identities(steps, statistics):
    query, key, _ = anisotropic_inputs(key_heads=6, dtype=torch.float64)
    phi = SharpFeatures(5, 11, 6, statistics, **STEPS[steps])
    if statistics == "calibrated":
        phi.calibrate(query, key, scale=1.0)
    fitted = phi.fitted(query, key, None, scale=1.0, is_streaming=False)
    assert isinstance(fitted, ReparametrizedFeatures)
    scores = mapped_scores(query, key, fitted.reparametrization)
    torch.testing.assert_close(scores.exp(), (query @ key.mT).exp(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("optimal", OPTIMAL)
@pytest.mark.parametrize("is_balanced", [False, True])
def test_the_expectation_of_every_step_is_the_kernel(is_balanced, optimal):
    query, key, _ = (x.double() for x in anisotropic_inputs(dim=2, heads=3, batch=1))
    query, key = query / 2, key / 2
    r = sharpen(
        Moments.of(query).over_batch(),
        Moments.of(key).over_batch(),
        balance=is_balanced,
        optimal=optimal,
    )
    phi = ReparametrizedFeatures(torch.zeros(1, 2), r)
    estimate = quadrature(phi, query, key)
    torch.testing.assert_close(estimate, (query @ key.mT).exp(), rtol=1e-10, atol=0)


def test_balance_gives_queries_and_keys_one_diagonal_covariance():
    query, key, _ = anisotropic_inputs(length=997, dtype=torch.float64, key_heads=6)
    queries, keys = Moments.of(query).over_batch(), Moments.of(key).over_batch()
    r = sharpen(queries, keys)
    of_queries = r.query_map @ queries.covariance @ r.query_map.mT
    of_keys = r.key_map @ keys.covariance @ r.key_map.mT
    torch.testing.assert_close(of_queries, of_keys, rtol=0, atol=1e-2 * of_keys.abs().max())
    diagonal = torch.diag_embed(of_keys.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(of_keys, diagonal, rtol=0, atol=1e-2 * of_keys.abs().max())


def test_balance_makes_queries_as_many_times_longer_than_keys_as_it_is_told():
    query, key, _ = anisotropic_inputs(length=997, dtype=torch.float64, key_heads=6)
    moments = Moments.of(query).over_batch(), Moments.of(key).over_batch()
    even, longer = sharpen(*moments), sharpen(*moments, query_ratio=3.0)
    torch.testing.assert_close(longer.query_map, 3**0.5 * even.query_map)
    torch.testing.assert_close(longer.key_map, even.key_map / 3**0.5)
    assert (longer.exponent < even.exponent).all()  # it suits the spread that there is then


def test_balance_minimizes_the_spread():
    query, key, _ = anisotropic_inputs(length=97, dtype=torch.float64, key_heads=6)
    queries, keys = Moments.of(query).over_batch(), Moments.of(key).over_batch()
    r = sharpen(queries, keys)

    def spread(query_map: Tensor) -> Tensor:
        """E‖M(q − a) + M⁻ᵀ(k − b)‖²."""
        key_map = torch.linalg.inv(query_map).mT
        both = query_map @ queries.covariance @ query_map.mT
        both = both + key_map @ keys.covariance @ key_map.mT
        return both.diagonal(dim1=-2, dim2=-1).sum(-1)

    best = spread(r.query_map)
    assert (best < spread(torch.eye(5, dtype=torch.float64).expand(6, 5, 5))).all()
    for _ in range(20):
        nearby = r.query_map @ (
            torch.eye(5, dtype=torch.float64) + 0.1 * torch.randn(6, 5, 5, dtype=torch.float64)
        )
        assert (best <= spread(nearby) * 1.001).all()  # the floor on covariances moves it a little


def test_a_sample_is_evenly_spaced_among_the_positions_shown():
    position = torch.arange(3 * 2003.0)[None, None, :, None]
    shown = torch.arange(3 * 2003).remainder(3).eq(1)[None]
    alone, nothing = sampled(position[:, :, :2003], None)
    among, mask = sampled(position.masked_fill(~shown[:, None, :, None], math.nan), shown)
    assert nothing is None
    assert mask.all()
    assert torch.equal(among, 3 * alone + 1)
    gaps = alone.diff(dim=2)
    assert gaps.min() == 2003 // 997
    assert gaps.max() == 2003 // 997 + 1
    assert alone.min() + alone.max() == 2002  # centered


@pytest.mark.parametrize("length", [331, 2003])
def test_neither_padding_nor_its_batch_changes_the_statistics_of_a_sequence(length):
    shape = {"heads": 3, "batch": 1, "dtype": torch.float64}
    query, key, _ = anisotropic_inputs(length=length, **shape)
    others = anisotropic_inputs(length=3001, **shape)
    phi = SharpFeatures(5, 11, 3, "call")
    alone = phi.fitted(query, key, None, scale=1.0, is_streaming=False)
    for first in (0, 3001 - length):
        mask = torch.ones(2, 3001, dtype=torch.bool)
        mask[0] = False
        mask[0, first : first + length] = True
        batch = [torch.cat([torch.full_like(x, math.nan), x]) for x in others[:2]]
        for wide, x in zip(batch, (query, key), strict=True):
            wide[0, :, first : first + length] = x[0]
        padded = phi.fitted(*batch, mask, scale=1.0, is_streaming=False)
        for part, expected in zip(padded.reparametrization, alone.reparametrization, strict=True):
            torch.testing.assert_close(part[:1], expected)


@pytest.mark.parametrize("repeats", [1, 17])
def test_keys_receive_the_attention_of_queries_all_along_the_sequence(repeats):
    query, key = torch.randn(2, 3, 32, 5), torch.randn(2, 3, 131, 5)
    received = received_attention(query.repeat_interleave(repeats, dim=2), key)
    torch.testing.assert_close(received, (query @ key.mT).softmax(-1).sum(-2))


@pytest.mark.parametrize("length", [23, 131])
def test_what_a_mask_hides_neither_gives_nor_receives_attention(length):
    query, key, _ = inputs(length=length, key_heads=6)
    alone = received_attention(query, key)
    shown = torch.arange(3 * length).remainder(3).eq(1).expand(2, -1)
    padded = [torch.full((2, 6, 3 * length, 5), math.nan) for _ in range(2)]
    for wide, x in zip(padded, (query, key), strict=True):
        wide[:, :, 1::3] = x
    (query, mask), (key, _) = (sampled(wide, shown) for wide in padded)
    received = received_attention(query, key, mask, mask)
    torch.testing.assert_close(received[:, :, :length], alone)
    assert received[:, :, length:].eq(0).all()


def test_a_weight_of_n_is_n_equal_vectors():
    x = torch.randn(1, 1, 7, 5, dtype=torch.float64)
    weight = torch.tensor([1, 0, 3, 2, 0, 1, 4])
    weighted = Moments.of(x, weight=weight[None, None].double() / 11)
    repeated = Moments.of(x.repeat_interleave(weight, dim=2))
    torch.testing.assert_close(weighted.mean, repeated.mean)
    torch.testing.assert_close(weighted.covariance, repeated.covariance)
    assert weighted.count == 7


def test_keys_count_by_the_attention_they_receive():
    query, key, _ = anisotropic_inputs(length=32, key_heads=6, batch=1)
    key[:, :, 5] = 3 * query.mean(dim=2)  # one key that draws attention to it
    phi = SharpFeatures(5, 11, 6)
    phi.calibrate(query, key, scale=1.0)
    attention = (query @ key.mT).softmax(-1).mean(-2, keepdim=True).double()
    torch.testing.assert_close(
        phi.key_shift, (attention @ key.double())[0, :, 0], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(phi.query_shift, query.double().mean(2)[0])


@pytest.mark.parametrize("dim", [1, 7])
def test_the_optimal_exponent_is_that_of_the_theory(dim):
    spreads = [0.0, 1e-9, 0.1, 1.0, 20.0, 1e6]
    mine = optimal_exponent(torch.tensor(spreads, dtype=torch.float64), dim)
    theirs = [optimal_positive_parameter(spread, dim) for spread in spreads]
    torch.testing.assert_close(mine, torch.tensor(theirs, dtype=torch.float64))


def test_uncalibrated_features_are_plain_positive_features():
    tensors = inputs()
    phi = SharpFeatures(5, 11, 3)
    plain = SoftmaxFeatures(5, 11)
    out = favor_attention(*tensors, phi, enable_gqa=True)
    torch.testing.assert_close(out, favor_attention(*tensors, plain, enable_gqa=True))


@every_call
@pytest.mark.parametrize("mask", ["no mask", "left", "holes", "full"])
def test_attention_is_that_of_the_definition(mask, window_size, is_causal, backend):
    query, key, value = anisotropic_inputs(dtype=torch.float64)
    phi, mask = calibrated(query, key), MASKS[mask](23)
    out = favor_attention(
        query, key, value, phi, is_causal, mask, enable_gqa=True, window_size=window_size,
        backend=backend,
    )  # fmt: skip
    expected = attended(query, key, value, phi, is_causal, mask, window_size=window_size or 0).out
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("statistics", STATISTICS)
@pytest.mark.parametrize("norms", NORMS)
def test_attention_over_ones_is_one_at_any_norm(norms, statistics):
    query, key, value = inputs(norms=norms)
    phi = SharpFeatures(5, 11, 3, statistics)
    if statistics == "calibrated":
        phi.calibrate(query, key)
    for window_size, is_causal, backend in CALLS:
        if is_causal and statistics == "call":
            continue  # refused: a position would see its future
        out = favor_attention(
            query, key, torch.ones_like(value), phi, is_causal, enable_gqa=True,
            window_size=window_size, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("statistics", STATISTICS)
def test_attention_is_finite_up_to_1e4(statistics, dtype):
    query, key, value = (x.to(dtype) for x in inputs(norms="1e4"))
    phi = SharpFeatures(5, 11, 3, statistics)
    if statistics == "calibrated":
        phi.calibrate(query, key)
    assert favor_attention(query, key, value, phi, enable_gqa=True).isfinite().all()


@pytest.mark.parametrize("window_size", [None, 5])
def test_later_keys_and_values_leave_earlier_outputs_bit_identical(window_size):
    query, key, value = anisotropic_inputs()
    phi = calibrated(query, key)
    options = {"enable_gqa": True, "window_size": window_size}
    before = favor_attention(query, key, value, phi, True, **options)
    for position in (1, 7, 8, 22):
        later = [x.clone() for x in (query, key, value)]
        for x in later:
            x[:, :, position:] = 1e4 * torch.randn_like(x[:, :, position:])
        after = favor_attention(*later, phi, True, **options)
        assert torch.equal(before[:, :, :position], after[:, :, :position])


@pytest.mark.parametrize("window_size", [None, 4])
def test_prefill_and_decoding_equal_the_parallel_run(window_size):
    tensors = anisotropic_inputs()
    phi = calibrated(*tensors[:2])
    options = {"enable_gqa": True, "window_size": window_size}
    whole = favor_attention(*tensors, phi, True, **options)
    first = (x[:, :, :11] for x in tensors)
    out, state = favor_attention(*first, phi, True, return_state=True, **options)
    outputs = [out]
    for position in range(11, 23):
        token = (x[:, :, position : position + 1] for x in tensors)
        out, state = favor_attention(
            *token, phi, True, initial_state=state, return_state=True, **options
        )
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=2), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window_size", [None, 4])
def test_a_state_follows_its_rows_when_beams_are_reordered(window_size):
    tensors = anisotropic_inputs()
    phi = calibrated(*tensors[:2])
    options = {"enable_gqa": True, "window_size": window_size}
    _, state = favor_attention(*tensors, phi, True, return_state=True, **options)
    index = torch.tensor([1, 0, 0])
    step = inputs(1, batch=3)
    whole = [torch.cat([x[index], y], dim=2) for x, y in zip(tensors, step, strict=True)]
    expected = favor_attention(*whole, phi, True, **options)[:, :, -1:]
    out = favor_attention(*step, phi, True, initial_state=state.index_select(index), **options)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@every_call
def test_gradients_are_the_slopes_of_the_output(window_size, is_causal, backend):
    shape = {"batch": 1, "heads": 2, "key_heads": 1, "dim": 3, "value_dim": 2}
    tensors = anisotropic_inputs(length=17, dtype=torch.float64, **shape)
    phi = calibrated(*tensors[:2], m=5)
    mask = torch.arange(17)[None] % 5 != 0

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return favor_attention(
            query, key, value, phi, is_causal, mask, enable_gqa=True, window_size=window_size,
            backend=backend,
        )  # fmt: skip

    assert gradcheck(attend, [x.requires_grad_() for x in tensors], fast_mode=True)


@pytest.mark.parametrize(
    ("window_size", "backend"),
    [(window, backend) for window, causal, backend in CALLS if not causal],
)
def test_statistics_of_a_call_are_constants_to_its_gradients(window_size, backend):
    shape = {"batch": 2, "heads": 2, "key_heads": 1, "dim": 3, "value_dim": 2}
    tensors = [x.requires_grad_() for x in anisotropic_inputs(dtype=torch.float64, **shape)]
    phi = SharpFeatures(3, 5, 1, "call")
    fixed = phi.fitted(*tensors[:2], None, scale=3**-0.5, is_streaming=False)

    def attend(query: Tensor, key: Tensor, value: Tensor, features: object = fixed) -> Tensor:
        return favor_attention(
            query, key, value, features, enable_gqa=True, window_size=window_size, backend=backend
        )

    assert gradcheck(attend, tensors, fast_mode=True)
    cotangent = torch.randn(2, 2, 23, 2, dtype=torch.float64)
    through_call = torch.autograd.grad(attend(*tensors, phi), tensors, cotangent)
    through_fixed = torch.autograd.grad(attend(*tensors), tensors, cotangent)
    for mine, expected in zip(through_call, through_fixed, strict=True):
        torch.testing.assert_close(mine, expected)


def test_padding_has_no_part_in_the_statistics():
    query, key, value = anisotropic_inputs(key_heads=6)
    mask = MASKS["left"](23)
    hidden = ~mask[:, None, :, None]
    for statistics in STATISTICS:
        outputs = []
        for junk in (0.0, 1e6, float("nan")):
            tensors = [x.masked_fill(hidden, junk) for x in (query, key, value)]
            phi = SharpFeatures(5, 11, 6, statistics)
            if statistics == "calibrated":
                phi.calibrate(tensors[0], tensors[1], mask)
            out = favor_attention(*tensors, phi, key_padding_mask=mask)
            outputs.append(out.masked_fill(hidden, 0.0))
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])


def test_neither_padding_nor_the_batch_turns_an_axis():
    # In float32 and for many heads: where rounding chose signs, some of these axes were turned.
    query, key, value = anisotropic_inputs(length=37, batch=5, heads=17, key_heads=17, dim=13)
    phi = SharpFeatures(13, 29, 17, "call")
    alone = torch.cat(
        [favor_attention(*(x[row, None] for x in (query, key, value)), phi) for row in range(5)]
    )
    torch.testing.assert_close(favor_attention(query, key, value, phi), alone, rtol=1e-3, atol=1e-3)
    for left in (0, 5, 30):
        padded = (F.pad(x, (0, 0, left, 30 - left), value=7.0) for x in (query, key, value))
        mask = F.pad(torch.ones(5, 37, dtype=torch.bool), (left, 30 - left))
        out = favor_attention(*padded, phi, key_padding_mask=mask)[:, :, left : left + 37]
        torch.testing.assert_close(out, alone, rtol=1e-3, atol=1e-3)


def test_statistics_of_a_call_are_of_each_sequence_by_itself():
    query, key, value = anisotropic_inputs(key_heads=6)
    phi = SharpFeatures(5, 11, 6, "call")
    both = favor_attention(query, 3 * key, value, phi)
    one = favor_attention(query[1:], 3 * key[1:], value[1:], phi)
    torch.testing.assert_close(both[1:], one)


def test_calibration_in_batches_is_calibration_on_all_of_them():
    query, key, _ = anisotropic_inputs(batch=7)
    mask = torch.rand(7, 23) < 0.7
    mask[3] = False
    whole, running = SharpFeatures(5, 11, 3), SharpFeatures(5, 11, 3)
    whole.calibrate(query, key, mask)
    for rows in (slice(0, 1), slice(1, 5), slice(5, 5), slice(5, 7)):
        running.calibrate(query[rows], key[rows], mask[rows])
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(getattr(running, name), buffer, rtol=1e-9, atol=1e-9)
    assert whole.query_count.tolist() == [2 * int(mask.sum())] * 3


def test_calibration_follows_the_scale():
    query, key, value = anisotropic_inputs(key_heads=6)
    phi, wide = SharpFeatures(5, 11, 6), SharpFeatures(5, 11, 6)
    phi.calibrate(query, key, scale=0.25)
    wide.calibrate(query / 2, key / 2, scale=1.0)
    out = favor_attention(query, key, value, phi, scale=0.25)
    expected = favor_attention(query / 2, key / 2, value, wide, scale=1.0)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_calibration_is_saved_and_loaded_bit_for_bit(tmp_path):
    query, key, value = anisotropic_inputs()
    phi = calibrated(query, key)
    torch.save(phi.state_dict(), tmp_path / "phi.pt")
    loaded = SharpFeatures(5, 11, 3, seed=9)
    loaded.load_state_dict(torch.load(tmp_path / "phi.pt"))
    tensors = (query, key, value)
    out = favor_attention(*tensors, loaded, True, enable_gqa=True)
    assert torch.equal(out, favor_attention(*tensors, phi, True, enable_gqa=True))
    more, more_loaded = copy.deepcopy(phi), loaded
    for features in (more, more_loaded):
        features.calibrate(3 * query, key - 1)
    assert torch.equal(more.query_map, more_loaded.query_map)


def test_calibration_keeps_its_precision_in_half_precision_models():
    query, key, _ = anisotropic_inputs()
    phi = calibrated(query, key)
    before = {name: buffer.clone() for name, buffer in phi.named_buffers()}
    for cast in (phi.half, phi.bfloat16, phi.float, phi.double):
        cast()
        for name, buffer in phi.named_buffers():
            assert torch.equal(buffer, before[name]), name
            assert buffer.dtype == before[name].dtype, name


CHANGES = {
    "redraw": lambda phi, other, inputs: phi.redraw(),
    "calibrate": lambda phi, other, inputs: phi.calibrate(*inputs),
    "reset": lambda phi, other, inputs: phi.reset_parameters(),
    "load": lambda phi, other, inputs: phi.load_state_dict(other.state_dict()),
    "assign": lambda phi, other, inputs: phi.load_state_dict(other.state_dict(), assign=True),
    "one buffer": lambda phi, other, inputs: phi.key_shift.add_(0.5),
    "precision": lambda phi, other, inputs: phi.to(torch.float64),
    "inference": lambda phi, other, inputs: None,
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_features_that_were_used_follow_every_change_of_the_calibration(change):
    """What is kept from call to call is what a module without a past would compute."""
    query, key, value = anisotropic_inputs()
    group = query.shape[1] // key.shape[1]
    phi, other = calibrated(query, key), calibrated(2 * query, key - 1)
    other.redraw()
    with torch.inference_mode(change == "inference"):
        favor_attention(query, key, value, phi, enable_gqa=group > 1)  # is ready from here on
    CHANGES[change](phi, other, (query + 1, key))
    fresh = SharpFeatures(phi.dim, phi.num_projections, phi.num_heads)
    fresh.load_state_dict(phi.state_dict())
    copied = copy.deepcopy(phi)
    copied.key_shift.add_(1.0)
    with torch.enable_grad():
        rows = query.clone().requires_grad_()
        out = favor_attention(rows, key, value, phi, enable_gqa=group > 1)
        out.sum().backward()
    assert torch.equal(out, favor_attention(query, key, value, fresh, enable_gqa=group > 1))
    moved = favor_attention(query, key, value, copied, enable_gqa=group > 1)
    assert not torch.equal(out, moved)


def test_resetting_forgets_the_calibration():
    phi = calibrated(*anisotropic_inputs()[:2])
    phi.redraw()
    phi.reset_parameters()
    for name, buffer in SharpFeatures(5, 11, 3).named_buffers():
        assert torch.equal(getattr(phi, name), buffer), name


POOR = {
    "length 1": lambda q, k: (q[:, :, :1], k[:, :, :1]),
    "length 0": lambda q, k: (q[:, :, :0], k[:, :, :0]),
    "batch 0": lambda q, k: (q[:0], k[:0]),
    "constant keys": lambda q, k: (q, torch.ones_like(k) * 0.7),
    "constant queries and keys": lambda q, k: (torch.ones_like(q), torch.ones_like(k) * 0.7),
    "zeros": lambda q, k: (q * 0, k * 0),
    "a singular covariance": lambda q, k: (q, k * torch.tensor([1.0, 0, 0, 1, 0])),
    "disjoint directions": lambda q, k: (
        q * torch.tensor([1.0, 1, 0, 0, 0]),
        k * torch.tensor([0.0, 0, 1, 1, 1]),
    ),
    "tiny": lambda q, k: (q * 1e-20, k * 1e-20),
    "huge": lambda q, k: (q * 1e4, k * 1e4),
    "ill matched": lambda q, k: (q * 1e4, k * 1e-4),
}


@pytest.mark.parametrize("poor", POOR)
def test_whatever_calibration_sees_the_identities_hold(poor):
    query, key, value = (x.double() for x in anisotropic_inputs(key_heads=6))
    phi = SharpFeatures(5, 11, 6)
    phi.calibrate(*POOR[poor](query, key), scale=1.0)
    r = reparametrization_of(phi)
    for part in r:
        assert part.isfinite().all()
    scores = mapped_scores(query, key, r)
    size = max(1.0, *(float(part.abs().max()) for part in (r.query_shift, r.key_shift))) ** 2
    torch.testing.assert_close(scores, query @ key.mT, rtol=0, atol=1e-10 * size)
    assert favor_attention(query.float(), key.float(), value.float(), phi).isfinite().all()


def test_a_covariance_that_rounding_left_indefinite_changes_nothing_but_the_origin():
    variances = torch.tensor([1.0, 1, 1, -1e-3], dtype=torch.float64)
    count, mean = torch.tensor([1e6], dtype=torch.float64), torch.ones(1, 4, dtype=torch.float64)
    moments = Moments(count, mean, variances.diag()[None])
    r = sharpen(moments, moments)
    assert torch.equal(r.query_map, torch.eye(4, dtype=torch.float64)[None])
    assert torch.equal(r.key_map, r.query_map)
    assert r.exponent.isfinite().all()


@pytest.mark.parametrize("poor", ["length 0", "batch 0"])
def test_nothing_to_learn_from_is_the_identity(poor):
    query, key, _ = inputs(key_heads=6)
    phi = SharpFeatures(5, 11, 6)
    phi.calibrate(*POOR[poor](query, key))
    for part, expected in zip(
        reparametrization_of(phi), Reparametrization.identity(6, dim=5), strict=True
    ):
        assert torch.equal(part, expected)


def test_a_mask_that_hides_everything_teaches_nothing():
    query, key, value = inputs(key_heads=6)
    nothing = torch.zeros(2, 23, dtype=torch.bool)
    phi = SharpFeatures(5, 11, 6)
    phi.calibrate(query, key, nothing)
    assert torch.equal(phi.query_map, SharpFeatures(5, 11, 6).query_map)
    per_call = SharpFeatures(5, 11, 6, "call")
    assert favor_attention(query, key, value, per_call, key_padding_mask=nothing).eq(0).all()


def test_constant_keys_give_the_mean_of_the_values():
    query, key, value = inputs(key_heads=6)
    key = torch.ones_like(key) * 3
    for statistics in STATISTICS:
        phi = SharpFeatures(5, 11, 6, statistics)
        if statistics == "calibrated":
            phi.calibrate(query, key)
        out = favor_attention(query, key, value, phi)
        expected = softmax_attention(query, key, value)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_calibration_names_the_layer_and_head_of_what_is_not_finite(bad):
    query, key, _ = anisotropic_inputs()
    phi = calibrated(query, key, layer=7)
    before = {name: buffer.clone() for name, buffer in phi.named_buffers()}
    key[1, 2, 13, 4] = bad
    with pytest.raises(ValueError, match=r"layer 7 got NaN or infinity in the key of head 2\. Not"):
        phi.calibrate(query, key)
    query[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"layer 7 got NaN or infinity in the query of head 0\."):
        phi.calibrate(query, key)
    assert all(torch.equal(buffer, before[name]) for name, buffer in phi.named_buffers())


@pytest.mark.parametrize("backend", backends("sharp"))
def test_nan_in_a_call_reaches_the_output_it_belongs_to(backend):
    query, key, value = anisotropic_inputs(key_heads=6)
    query[0, 2, 5, 1] = math.nan
    out = favor_attention(query, key, value, SharpFeatures(5, 11, 6, "call"), backend=backend)
    assert out[0, 2, 5].isnan().all()
    out[0, 2, 5] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"return_state": True}, {"is_causal": True, "window_size": 3}]
)
def test_statistics_of_a_call_refuse_causal_and_streaming_attention(options):
    phi = SharpFeatures(5, 11, 3, "call")
    with pytest.raises(ValueError, match=r"would let a position see its future.*calibrate\(\)"):
        favor_attention(*inputs(), phi, enable_gqa=True, **options)


def test_misfits_are_refused_in_words():
    query, key, value = inputs()
    with pytest.raises(ValueError, match=r"needs keys with 2 heads.*got 3\. Pass num_heads="):
        SharpFeatures(5, 11, 2).calibrate(query, key)
    with pytest.raises(ValueError, match=r"made for 2 key heads and key has 3\. Pass num_heads="):
        favor_attention(query, key, value, SharpFeatures(5, 11, 2), enable_gqa=True)
    with pytest.raises(ValueError, match="for dim 7 per head"):
        SharpFeatures(7, 11, 3).calibrate(query, key)
    with pytest.raises(TypeError, match="key_padding_mask must be bool"):
        SharpFeatures(5, 11, 3).calibrate(query, key, torch.ones(2, 23))
    with pytest.raises(ValueError, match="scale must be positive"):
        SharpFeatures(5, 11, 3).calibrate(query, key, scale=-1.0)
    for wrong, words in (
        ({"statistics": "calls"}, "unknown statistics 'calls'.*Did you mean 'call'"),
        ({"optimal": "all"}, "unknown optimal 'all'"),
        ({"projection": None}, "unknown projection None"),
        ({"query_ratio": 0.0}, "query_ratio must be positive and finite, got 0.0"),
        ({"num_heads": 0}, "num_heads must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            SharpFeatures(5, 11, **wrong)
