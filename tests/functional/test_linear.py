"""What linear attention hands on to the call that continues it."""

from dataclasses import replace

import pytest
from cases import backends, inputs

from performers import SoftmaxFeatures, favor_attention
from performers.backends import BACKENDS
from performers.state import Maker


@pytest.mark.parametrize("backend", backends(is_causal=True, has_state=True))
@pytest.mark.parametrize("options", [{}, {"window_size": 3, "num_sinks": 2}])
def test_a_state_knows_the_features_that_it_was_made_with(options, backend):
    phi = SoftmaxFeatures(5, 11)
    query, key, value = inputs(key_heads=6)
    options = {"return_state": True, "backend": backend, **options}
    _, state = favor_attention(query, key, value, phi, True, **options)
    assert state.made_by == Maker.of(phi, phi.default_scale)
    assert state.made_by != Maker.of(SoftmaxFeatures(5, 11, seed=1), phi.default_scale)
    step = (x[:, :, :1] for x in (query, key, value))
    _, after = favor_attention(*step, phi, True, initial_state=state, **options)
    assert after.made_by == state.made_by


def test_a_state_that_a_backend_has_made_anew_knows_its_features_too(monkeypatch):
    """The Triton kernels return numbers that no state holds yet."""

    def attend(*arguments):
        out, state = BACKENDS["reference"].attend(*arguments)
        return out, replace(state, made_by=None)

    monkeypatch.setitem(BACKENDS, "chunked", BACKENDS["chunked"]._replace(attend=attend))
    phi = SoftmaxFeatures(5, 11)
    tensors = inputs(3, key_heads=6)
    _, state = favor_attention(*tensors, phi, True, return_state=True, backend="chunked")
    assert state.made_by == Maker.of(phi, phi.default_scale)
