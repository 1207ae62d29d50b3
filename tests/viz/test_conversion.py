"""The figure of a conversion names each layer by what tells it from the others."""

import pytest

from performers.viz.conversion import conversion_figure


@pytest.mark.parametrize(
    ("names", "labels", "around"),
    [
        (["model.layers.0.attn", "model.layers.11.attn"], ["0", "11"], "model.layers.….attn"),
        (["encoder.0.self", "decoder.0.cross"], ["encoder.0.self", "decoder.0.cross"], "…"),
        (["layers.3.attn"], ["layers.3.attn"], ""),
        (["h.0", "h.1"], ["0", "1"], "h.…"),
    ],
)
def test_layers_are_named_by_what_tells_them_apart(names, labels, around):
    found = {
        "layers": dict.fromkeys(names, 0.1), "is_kept": True, "fidelity": {"distance": 0.2},
    }  # fmt: skip
    record = {"averaging": dict.fromkeys(names, 0.5), "stages": {"calibrated": found}}
    (axes,) = conversion_figure(record).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == labels
    assert axes.get_xlabel() == around
    assert list(axes.lines[1].get_ydata()) == [0.1] * len(names)
