"""What a `Dialect` says is what `DialectFavor` computes, field by field."""

import pytest
import restated
import torch

from performers import KernelFeatures, PerformerConfig, SoftmaxFeatures, favor_attention
from performers.nn import Dialect, DialectFavor

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
DIM = 5


@pytest.fixture
def tensors():
    """Four heads of queries, two of keys, and a mask."""
    torch.manual_seed(0)
    query = torch.randn(3, 4, 23, DIM)
    key, value = torch.randn(2, 3, 2, 23, DIM).unbind()
    mask = torch.rand(3, 23) > 0.3
    mask[:, 0] = True  # so that each causal row sees a key
    return query, key, value, mask


def expected(phi, tensors, mask, is_causal, scale, **numbers):
    """In float64, with the whole matrix."""
    query, key, value = (x.double() for x in tensors[:3])
    key, value = (x.repeat_interleave(2, dim=1) for x in (key, value))
    if numbers.pop("feature_epsilon", None) is not None:
        omega = phi.omega.double()
        q, k = (restated.epsilon_features(x, omega, 0.01, x is query) for x in (query, key))
    else:
        q, k = (phi.query_features(x * scale**0.5).dense() for x in (query, key))
    seen = torch.ones(3, 1, 23, 1) if mask is None else mask[:, None, :, None].double()
    if numbers.pop("padding_counts", False):
        return restated.attention(q, k, value * seen, is_causal, **numbers)
    return restated.attention(q, k * seen, value, is_causal, **numbers)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize(
    ("dialect", "numbers"),
    [
        ({"feature_epsilon": 0.01, "padding_counts": True}, {"feature_epsilon": 0.01}),
        ({"key_sum_epsilon": 0.3}, {"key_sum": 0.3}),
        ({"normalizer_epsilon": 0.7}, {"added": 0.7}),
        ({"renormalizer": 20.0}, {"small": 20.0}),
        ({"padding_counts": True}, {}),
        ({"scale": 0.2}, {}),
        ({"scale": 0.3, "key_sum_epsilon": 0.1, "normalizer_epsilon": 0.2, "renormalizer": 9.0},
         {"key_sum": 0.1, "added": 0.2, "small": 9.0}),
    ],
    ids=str,
)  # fmt: skip
def test_each_field_does_what_its_formula_says(tensors, is_causal, is_padded, dialect, numbers):
    query, key, value, mask = tensors
    mask = mask if is_padded else None
    phi = SoftmaxFeatures(DIM, 17)
    scale = dialect.get("scale", DIM**-0.5)
    if dialect.get("padding_counts"):
        numbers = numbers | {"padding_counts": True}
    found = DialectFavor(phi, Dialect(**dialect))(
        query, key, value, is_causal=is_causal, key_padding_mask=mask
    )
    oracle = expected(phi, tensors, mask, is_causal, scale, **numbers)
    torch.testing.assert_close(found.double(), oracle, **TOLERANCE)
    plain = expected(phi, tensors, mask, is_causal, DIM**-0.5)
    if is_padded or list(dialect) != ["padding_counts"]:
        assert (oracle - plain).abs().max() > 1e-3  # or nothing would be proved


@pytest.mark.parametrize("phi", [SoftmaxFeatures(DIM, 17), KernelFeatures(DIM, 17)], ids=str)
def test_a_dialect_without_words_is_favor_attention(tensors, phi):
    query, key, value, mask = tensors
    options = {"is_causal": True, "key_padding_mask": mask}
    found = DialectFavor(phi, Dialect())(query, key, value, **options)
    plain = favor_attention(query, key, value, phi, enable_gqa=True, **options)
    torch.testing.assert_close(found, plain, **TOLERANCE)


def test_a_row_that_sees_no_key_is_zero(tensors):
    query, key, value, mask = tensors
    for dialect in (Dialect(), Dialect(feature_epsilon=1e-4)):
        attend = DialectFavor(SoftmaxFeatures(DIM, 17), dialect)
        out = attend(query, key, value, key_padding_mask=torch.zeros_like(mask))
        assert (out == 0).all()


@pytest.mark.parametrize("dialect", [{}, {"key_sum_epsilon": 0.3, "renormalizer": 9.0}], ids=str)
def test_resuming_goes_on_where_the_state_ends(tensors, dialect):
    attend = DialectFavor(SoftmaxFeatures(DIM, 17), Dialect(**dialect))
    query, key, value, mask = tensors
    whole = attend(query, key, value, is_causal=True, key_padding_mask=mask)
    state, outputs = None, []
    for place in (slice(9), slice(9, 10), slice(10, 23)):
        piece = [x[:, :, place] for x in (query, key, value)]
        out, state = attend.resume(*piece, mask[:, place], state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, dim=2), whole, **TOLERANCE)


def test_a_module_shows_its_dialect():
    dialect = Dialect(renormalizer=0.25)
    assert repr(dialect) in repr(DialectFavor(SoftmaxFeatures(DIM, 17), dialect))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(tensors, dtype):
    query, key, value = (x.to(dtype) for x in tensors[:3])
    attend = DialectFavor(SoftmaxFeatures(DIM, 17), Dialect(feature_epsilon=1e-4))
    out = attend(query, key, value)
    assert out.dtype == dtype
    wide = attend(query.float(), key.float(), value.float())
    assert torch.equal(out, wide.to(dtype))


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"feature_epsilon": -1e-4}, "feature_epsilon must be a finite number of at least 0"),
        ({"key_sum_epsilon": float("nan")}, "key_sum_epsilon must be a finite number of at least"),
        ({"normalizer_epsilon": True}, "normalizer_epsilon must be a finite number of at least 0"),
        ({"renormalizer": "1e-6"}, "renormalizer must be a finite number of at least 0"),
        ({"padding_counts": 1}, "padding_counts must be true or false, got 1"),
        ({"scale": 0}, "scale must be positive and finite, or None, got 0"),
        ({"feature_epsilom": 1e-4}, "Did you mean 'feature_epsilon'?"),
    ],
)
def test_a_wrong_field_of_a_dialect_is_named(fields, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        PerformerConfig(attention="performer-positive", dialect=fields)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention": "exact"}, "none there has sharp features or a window"),
        ({"attention": "performer-sharp"}, "none there has sharp features or a window"),
        ({"window_size": 3}, "none there has sharp features or a window"),
        ({"attention": "performer-relu"}, "The ε of a kernel is kernel_epsilon"),
        ({"is_decoder": True}, "must have use_cache=False"),
    ],
)
def test_a_dialect_where_it_says_nothing_is_refused(fields, words):
    fields = {"attention": "performer-positive"} | fields
    with pytest.raises(ValueError, match=words):
        PerformerConfig(**fields, dialect={"feature_epsilon": 1e-4})
