"""Which backend serves a call: the one that was named, or the fastest proven one."""

import pytest
import torch
from cases import FEATURE_MAPS

from performers import favor_attention
from performers.backends import BACKENDS, Call, choose_backend, refusals
from performers.state import NearField

X = torch.zeros(1, 1, 2, 5)


def call(name, is_causal=False, near=None, has_state=False):
    phi = FEATURE_MAPS[name](5, 3)
    return Call(phi, 1.0, is_causal, True, near, has_state, dtype=torch.float32)


CALLS = {
    **{name: call(name) for name in FEATURE_MAPS},
    "causal": call("positive", is_causal=True),
    "window": call("positive", near=NearField(1)),
    "state": call("positive", has_state=True),
}


@pytest.mark.parametrize("asked", CALLS.values(), ids=CALLS)
def test_each_backend_serves_a_call_or_has_a_reason(asked):
    reasons = refusals(asked, X, X, X)
    for name in BACKENDS:
        if name in reasons:
            with pytest.raises(ValueError, match=f'"{name}" cannot serve this call') as caught:
                choose_backend(name, asked, X, X, X)
            assert reasons[name] in str(caught.value)
        else:
            assert choose_backend(name, asked, X, X, X) == name
    assert not {"reference", "chunked"} & reasons.keys()
    expected = "chunked" if "landmarks" in reasons else "landmarks"
    assert choose_backend(None, asked, X, X, X) == expected


@pytest.mark.parametrize("scale", [0.25, 9.0])
def test_queries_and_keys_share_the_scale(scale):
    x = torch.randn(2, 3, 5, dtype=torch.bfloat16)
    asked = Call(FEATURE_MAPS["positive"](5, 3), scale, False, True, None, False, torch.float64)
    assert asked.scaled(x).dtype == torch.float64
    torch.testing.assert_close(asked.scaled(x), x.double() * scale**0.5)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", ["chunk", 3])
def test_a_backend_that_there_is_not_is_refused(name):
    with pytest.raises((ValueError, TypeError), match=r"backend.*'chunked', 'landmarks'"):
        choose_backend(name, CALLS["positive"], X, X, X)


@pytest.mark.parametrize("backend", [None, *sorted(BACKENDS.keys() - {"triton"})])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_tensors_are_made_where_the_inputs_are_whatever_the_default_device(name, backend):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, 7, 5).unbind()
    phi = FEATURE_MAPS[name](5, 3)
    for is_causal in (False, True):
        options = {"is_causal": is_causal, "backend": backend}
        reasons = refusals(call(name, is_causal), query, key, value)
        if backend in reasons:
            continue
        expected = favor_attention(query, key, value, phi, **options)
        with torch.device("meta"):
            found = favor_attention(query, key, value, phi, **options)
        assert torch.equal(found, expected)
