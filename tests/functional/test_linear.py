"""What linear attention hands on to the call that continues it."""

import pytest
from cases import backends, inputs

from performers import SoftmaxFeatures, favor_attention
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
