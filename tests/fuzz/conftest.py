"""The package as its users call it: jaxtyping would refuse most of this first."""

import pytest


@pytest.fixture(autouse=True)
def _as_users_call_it(without_shape_checks):
    """Without jaxtyping's checks."""
