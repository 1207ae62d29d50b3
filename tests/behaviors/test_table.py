"""The table of behaviors says what the tests claim."""

import json

import pytest
from behavior_table import NAMES, RESULTS, SUBJECTS, Refused, behavior, claims


def test_the_table_is_what_the_tests_claim():
    assert json.loads(RESULTS.read_text(encoding="utf-8")) == claims()


def test_a_behavior_that_is_refused_fails_where_it_holds_or_ends_in_another_error():
    said = Refused("not so", ValueError, "no such thing")
    for happens in (None, ValueError("other words"), TypeError("no such thing")):

        @behavior("toys", "a toy", refused=dict.fromkeys(NAMES, said))
        def toy(subject, happens=happens):
            if happens is not None:
                raise happens

        with pytest.raises((AssertionError, pytest.fail.Exception, TypeError)):
            toy(SUBJECTS[0])


def test_a_behavior_that_is_refused_passes_where_it_ends_in_its_error():
    @behavior("toys", "a toy", refused={NAMES[0]: Refused("so", ValueError, "no such thing")})
    def toy(subject):
        raise ValueError("there is no such thing")

    toy(SUBJECTS[0])
    with pytest.raises(ValueError, match="no such thing"):
        toy(SUBJECTS[1])
