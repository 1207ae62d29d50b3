"""One contract for every mechanism, backend and dtype: what attention is, whatever its kernel.

Shapes come from Hypothesis, as distinct primes, so that a transposed axis cannot hide.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from cases import FEATURE_MAPS, NONNEGATIVE, backends
from hypothesis import given, settings
from hypothesis import strategies as st
from mechanisms import BASELINES
from torch import Tensor

from performers import favor_attention, softmax_attention
from performers.models import MECHANISMS as ROWS
from performers.models import PerformerConfig

PRIMES = (1, 2, 3, 5, 7, 11, 13)


class Mechanism(NamedTuple):
    """Attention for one dim, and what may be asked of it."""

    build: Callable[[int], Callable[..., Tensor]]
    is_average: bool  # rows of the matrix are nonnegative and sum to 1
    has_causal: bool = True  # otherwise a causal call is refused


def _favor(feature_map: Callable[[int, int], torch.nn.Module], **options: object) -> Callable:
    def build(dim: int) -> Callable[..., Tensor]:
        phi = feature_map(dim, 17)

        def attend(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
            return favor_attention(query, key, value, phi, *rest, enable_gqa=True, **options)

        return attend

    return build


def _exact(dim: int) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
        return softmax_attention(query, key, value, *rest, enable_gqa=True)

    return attend


def _baseline(name: str) -> Callable:
    """The mechanism of this row in the registry, whose heads share what it may have learned."""

    def build(dim: int) -> Callable[..., Tensor]:
        config = PerformerConfig(
            **BASELINES[name].config(name),
            hidden_size=dim,
            num_attention_heads=1,
            position="learned",
            max_position_embeddings=max(PRIMES),
        )
        mechanism = ROWS[name].build(config, 0)

        def attend(query: Tensor, key: Tensor, value: Tensor, *masks: object) -> Tensor:
            given = dict(zip(("is_causal", "key_padding_mask"), masks, strict=False))
            return mechanism(query, key, value, **given)

        return attend

    return build


MECHANISMS = {
    "exact": Mechanism(_exact, is_average=True),
    **{
        f"{name}, {backend}": Mechanism(_favor(build, backend=backend), name in NONNEGATIVE)
        for name, build in FEATURE_MAPS.items()
        for backend in backends(name, is_causal=True)  # bidirectional None is for another
    },
    "positive with a window": Mechanism(_favor(FEATURE_MAPS["positive"], window_size=3), True),
    **{
        name: Mechanism(_baseline(name), row.is_average, ROWS[name].memory is not None)
        for name, row in BASELINES.items()
        if name != "identity"  # in which no key is seen, and none can be hidden
    },
}

AVERAGES = {name: mechanism for name, mechanism in MECHANISMS.items() if mechanism.is_average}

every_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS.values(), ids=MECHANISMS)
every_average = pytest.mark.parametrize("mechanism", AVERAGES.values(), ids=AVERAGES)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
some_shapes = given(
    shape=st.permutations(PRIMES), group=st.sampled_from([1, 2]), is_causal=st.booleans()
)


def under_contract(test: Callable[..., None]) -> Callable[..., None]:
    return every_mechanism(for_dtypes_and_shapes(test))


def for_dtypes_and_shapes(test: Callable[..., None]) -> Callable[..., None]:
    return every_dtype(settings(max_examples=3)(some_shapes(test)))


def assert_refuses_causality(mechanism: Mechanism, *tensors: Tensor) -> None:
    with pytest.raises(ValueError, match=r"has no causal form: .*is_causal=False"):
        mechanism.build(tensors[0].shape[-1])(*tensors, True)


def draw(shape: list[int], group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, key_heads, length, dim, value_dim, *_ = shape
    torch.manual_seed(sum(shape[:5]))
    query = torch.randn(batch, key_heads * group, length, dim)
    key = torch.randn(batch, key_heads, length, dim)
    value = torch.randn(batch, key_heads, length, value_dim)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def tolerance(dtype: torch.dtype) -> float:
    return max(1e-4, 2 * torch.finfo(dtype).eps)


@under_contract
def test_the_output_has_the_shape_of_queries_and_values(mechanism, dtype, shape, group, is_causal):
    is_causal = is_causal and mechanism.has_causal
    query, key, value = draw(shape, group, dtype)
    out = mechanism.build(query.shape[-1])(query, key, value, is_causal)
    assert out.shape == (*query.shape[:3], value.shape[-1])
    assert out.dtype == dtype
    assert out.isfinite().all()


@every_average
@for_dtypes_and_shapes
def test_outputs_of_averages_stay_among_the_values(mechanism, dtype, shape, group, is_causal):
    is_causal = is_causal and mechanism.has_causal
    query, key, value = draw(shape, group, dtype)
    attend = mechanism.build(query.shape[-1])
    out = attend(10 * query, 10 * key, value, is_causal)
    assert out.abs().max() <= value.abs().max() * (1 + tolerance(dtype))
    ones = attend(query, key, torch.ones_like(value), is_causal)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=tolerance(dtype), atol=0)


@every_mechanism
@settings(max_examples=3)
@some_shapes
def test_the_output_is_linear_in_the_values(mechanism, shape, group, is_causal):
    is_causal = is_causal and mechanism.has_causal
    query, key, value = draw(shape, group, torch.float32)
    attend = mechanism.build(query.shape[-1])
    out = attend(query, key, value, is_causal)
    twice = attend(query, key, -2 * value, is_causal)
    torch.testing.assert_close(twice, -2 * out, rtol=1e-5, atol=1e-5)


@under_contract
def test_the_future_does_not_matter(mechanism, dtype, shape, group, is_causal):
    query, key, value = draw(shape, group, dtype)
    if not mechanism.has_causal:
        assert_refuses_causality(mechanism, query, key, value)
        return
    attend = mechanism.build(query.shape[-1])
    position = query.shape[2] // 2
    before = attend(query, key, value, True)[:, :, :position]
    for x in (query, key, value):
        x[:, :, position:] = -3 * x[:, :, position:]
    assert torch.equal(attend(query, key, value, True)[:, :, :position], before)


@under_contract
def test_padding_does_not_matter(mechanism, dtype, shape, group, is_causal):
    is_causal = is_causal and mechanism.has_causal
    query, key, value = draw(shape, group, dtype)
    attend = mechanism.build(query.shape[-1])
    mask = torch.arange(query.shape[2]) % 3 != 1
    mask = mask.expand(len(query), -1)
    out = attend(query, key, value, is_causal, mask)
    for x in (key, value):
        x[:, :, ~mask[0]] = torch.nan
    assert torch.equal(attend(query, key, value, is_causal, mask), out)
    nothing = attend(query, key, value, is_causal, torch.zeros_like(mask))
    assert nothing.eq(0).all()


@under_contract
def test_sequences_and_heads_do_not_see_each_other(mechanism, dtype, shape, group, is_causal):
    is_causal = is_causal and mechanism.has_causal
    query, key, value = draw(shape, group, dtype)
    attend = mechanism.build(query.shape[-1])
    out = attend(query, key, value, is_causal)
    one = (query[:1, :group], key[:1, :1], value[:1, :1])
    slack = 10 * tolerance(dtype) * out.abs().max().clamp(min=1).item()
    torch.testing.assert_close(attend(*one, is_causal), out[:1, :group], rtol=0, atol=slack)
