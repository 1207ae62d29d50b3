"""Any YAML is the config of a run, or refused with the key that is wrong."""

import dataclasses

import yaml
from hypothesis import given
from hypothesis import strategies as st
from refusals import Refusal, few, outcome
from transformers import TrainingArguments

from performers.models import PerformerConfig
from performers.train import load_config
from performers.train.config import CONFIGS, DataConfig, RunConfig

OWNERS = {"": RunConfig, "data": DataConfig, "model": PerformerConfig, "trainer": TrainingArguments}
NAMES = {
    section: sorted(entry.name for entry in dataclasses.fields(owner))
    for section, owner in OWNERS.items()
}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**30, -(10**400), 2**31, 512]),
    st.floats(),
    st.sampled_from(
        ["1e-3", "exact", "performer-relu", "masked-lm", "linear", "sgd", "no", "ß", ""]
    ),
    st.text(max_size=7),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def trees(draw):
    """A shipped config with some keys, known or not, set to other values."""
    shipped = draw(st.sampled_from(sorted(CONFIGS.glob("*.yaml"))))
    tree = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    for _ in range(draw(st.integers(0, 3))):
        section = draw(st.sampled_from(sorted(OWNERS)))
        inner = tree.setdefault(section, {}) if section else tree
        if isinstance(inner, dict):
            name = draw(st.one_of(st.sampled_from(NAMES[section]), st.text(max_size=9)))
            inner[name] = draw(values)
    return draw(st.one_of(st.just(tree), values)) if draw(st.integers(0, 5)) == 0 else tree


def the_same_again(text, folder):
    """The config of a text, and that of what is written of it."""
    path = folder / "run.yaml"
    path.write_bytes(text)
    config = load_config(path)
    path.write_text(config.to_yaml(), encoding="utf-8")
    return config, load_config(path)


@few
@given(trees())
def test_a_tree_is_a_config_that_is_written_and_read_again_or_refused(tmp_path_factory, tree):
    folder = tmp_path_factory.mktemp("config")
    text = yaml.safe_dump(tree, allow_unicode=True).encode()
    found = outcome(lambda: the_same_again(text, folder))
    if not isinstance(found, Refusal):
        first, second = found
        assert first.to_yaml() == second.to_yaml()  # NaN, where it is allowed, is not itself


@few
@given(trees(), st.data())
def test_a_damaged_text_is_a_config_or_refused(tmp_path_factory, tree, data):
    folder = tmp_path_factory.mktemp("config")
    text = yaml.safe_dump(tree, allow_unicode=True).encode()
    start, end = sorted(data.draw(st.tuples(*2 * [st.integers(0, len(text))])))
    pieces = st.sampled_from(
        [b"", b"{", b"[" * 3000, b"- " * 3000, b"&a *a", b"\xff", b": ", b"!!x "]
    )
    text = text[:start] + data.draw(pieces) + text[end:]
    outcome(lambda: the_same_again(text, folder))


@few
@given(st.sampled_from(sorted(OWNERS)), st.data())
def test_an_override_is_taken_or_refused(section, data):
    key = data.draw(st.sampled_from(NAMES[section]))
    value = data.draw(st.one_of(values.map(yaml.safe_dump), st.text(max_size=9)))
    word = f"{section}.{key}={value}" if section else f"{key}={value}"
    outcome(lambda: load_config("demo", [word]))
