"""A word for φ means the features of its row, with all that can be chosen about them."""

import pytest
import torch

from performers import KernelFeatures, SharpFeatures, SoftmaxFeatures
from performers.functional import KERNELS
from performers.nn.estimators import ESTIMATORS
from performers.nn.words import FEATURES, SHARP, build_features, check_features, takes_window
from performers.typing import is_log_linear

# What a row of each table is built into.
OF_KERNELS = dict.fromkeys(KERNELS, KernelFeatures)
OF_ESTIMATORS = dict.fromkeys(ESTIMATORS, SoftmaxFeatures)
CLASSES = {SHARP: SharpFeatures, **OF_ESTIMATORS, **OF_KERNELS}

every_word = pytest.mark.parametrize("word", FEATURES)


@every_word
def test_a_word_builds_the_features_of_its_row_with_every_choice(word):
    distribution = "gaussian" if word == SHARP else "sphere"
    common = {"projection": "iid", "distribution": distribution, "seed": 2, "layer": 3}
    phi = build_features(
        word, 5, 7, num_heads=3, statistics="call", kernel_epsilon=0.25, has_window=True, **common
    )
    assert type(phi) is CLASSES[word]
    chosen = {name: getattr(phi, name) for name in ("dim", "num_projections", *common)}
    assert chosen == {"dim": 5, "num_projections": 7, **common}
    assert torch.equal(phi.omega, SoftmaxFeatures(5, 7, **common).omega)
    if word == SHARP:
        assert (phi.num_heads, phi.statistics) == (3, "call")
    elif word in ESTIMATORS:
        assert phi.estimator == word
    else:
        assert (phi.fn, phi.epsilon) == (word, 0.25)


def test_queries_are_made_twice_as_long_but_beside_a_window():
    assert build_features(SHARP, 5, 7).query_ratio == 2
    assert build_features(SHARP, 5, 7, has_window=True).query_ratio == 1


@every_word
def test_a_window_stands_beside_exponential_features_of_softmax_alone(word):
    phi = build_features(word, 5, 7)
    assert takes_window(word) == (phi.is_softmax and is_log_linear(phi))


@every_word
def test_only_a_kernel_can_do_without_omega(word):
    if word in KERNELS:
        assert build_features(word, 5, 7, projection=None).omega is None
    else:
        with pytest.raises(ValueError, match=rf"{word}' need random projections.*'orthogonal'"):
            check_features(word, None)


@every_word
def test_all_but_sharp_features_take_rows_of_one_length(word):
    check_features(word, "orthogonal", "gaussian")
    if word == SHARP:
        with pytest.raises(ValueError, match="need distribution='gaussian', got 'sphere'"):
            check_features(word, "orthogonal", "sphere")
    else:
        check_features(word, "orthogonal", "sphere")


def test_an_unknown_word_is_refused():
    with pytest.raises(ValueError, match="unknown features 'sharpish'"):
        check_features("sharpish", "orthogonal")
