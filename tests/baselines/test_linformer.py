"""The Linformer against its equation, and what its projections are."""

import pytest
import torch
from cases import inputs
from safetensors.torch import load_file
from standard_errors import assert_mean_within

from performers.baselines import LinformerAttention, LinformerOptions
from performers.baselines.linformer import SHARING
from performers.models import PerformerConfig, PerformerForMaskedLM


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("is_learned", [False, True])
def test_the_linformer_is_softmax_attention_over_projected_keys(sharing, is_learned):
    options = LinformerOptions(5, sharing=sharing, is_learned=is_learned)
    mechanism = LinformerAttention(options, num_heads=3, max_length=29)
    query, key, value = inputs(23)
    of_keys = mechanism.of_keys
    of_values = of_keys if sharing in ("keys and values", "layers") else mechanism.of_values
    assert of_keys.shape == (3 if sharing == "none" else 1, 5, 29)
    assert of_keys.requires_grad == is_learned
    projected_key, projected_value = (
        (matrix[..., :23] @ x).repeat_interleave(2, dim=1)
        for matrix, x in ((of_keys, key), (of_values, value))
    )
    weights = (query @ projected_key.mT / 5**0.5).softmax(dim=-1)
    torch.testing.assert_close(mechanism(query, key, value), weights @ projected_value)


def test_projections_keep_squared_lengths_in_the_mean():
    mechanism = LinformerAttention(LinformerOptions(7), num_heads=1009, max_length=11)
    x = torch.randn(11, generator=torch.Generator().manual_seed(1))
    lengths = (mechanism.of_keys @ x).square().sum(dim=-1)
    assert_mean_within(lengths, x.square().sum(), standard_errors=4)


def linformer(attention="linformer", fields=None, **options) -> PerformerForMaskedLM:
    """A model of two layers, in which "linformer" has these options."""
    options = {"num_projections": 5, **options}
    config = PerformerConfig(
        attention=attention,
        attention_options=options if attention == "linformer" else {"linformer": options},
        vocab_size=31,
        hidden_size=24,
        num_attention_heads=3,
        num_hidden_layers=2,
        max_position_embeddings=13,
        **(fields or {}),
    )
    return PerformerForMaskedLM(config).eval()


def projections(model: PerformerForMaskedLM) -> list[torch.Tensor]:
    return [layer.attention.mechanism.of_keys for layer in model.performer.layers]


def test_only_projections_that_are_not_learned_are_redrawn():
    for is_learned in (False, True):
        model = linformer(is_learned=is_learned)
        before = [matrix.clone() for matrix in projections(model)]
        assert not torch.equal(*before)
        model.redraw_features()
        for old, new in zip(before, projections(model), strict=True):
            assert torch.equal(old, new) == is_learned


def test_redrawn_projections_are_saved(tmp_path):
    model = linformer(is_learned=False)
    model.redraw_features()
    model.save_pretrained(tmp_path)
    again = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, projections(again), projections(model)))


@pytest.mark.parametrize("is_reversible", [False, True])
def test_a_projection_that_layers_share_learns_from_all_of_them(is_reversible):
    fields = {"reversible": is_reversible}
    shared = linformer(sharing="layers", fields=fields)
    apart = linformer(sharing="keys and values", fields=fields)
    apart.load_state_dict(shared.state_dict())
    tokens = torch.randint(31, (2, 11))
    for model in (shared, apart):
        model(tokens, labels=tokens).loss.backward()
    first, last = projections(shared)
    assert first is last
    total = sum(matrix.grad for matrix in projections(apart))
    torch.testing.assert_close(first.grad, total)


MIX = ["linformer", {"linformer": 1, "local": 2}]


@pytest.mark.parametrize("is_learned", [False, True])
@pytest.mark.parametrize(("attention", "is_tied"), [("linformer", True), (MIX, False)], ids=str)
def test_a_projection_that_layers_share_is_drawn_and_saved_once(
    tmp_path, attention, is_learned, is_tied
):
    fields = {"tie_word_embeddings": is_tied}
    model = linformer(attention, fields, sharing="layers", is_learned=is_learned)
    model.redraw_features()
    model.save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert [name for name in names if "of_keys" in name] == [
        "performer.layers.0.attention.mechanism.of_keys"
    ]
    again, report = PerformerForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    tokens = torch.randint(31, (2, 11))
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    mechanisms = [m for m in again.modules() if isinstance(m, LinformerAttention)]
    assert [int(m.num_redraws) for m in mechanisms] == [1 - is_learned]


@pytest.mark.usefixtures("without_shape_checks")
def test_what_the_linformer_cannot_do_is_refused():
    mechanism = LinformerAttention(LinformerOptions(5), num_heads=3, max_length=7)
    with pytest.raises(ValueError, match=r"no causal form: it sums over all positions"):
        mechanism(*inputs(7), is_causal=True)
    with pytest.raises(ValueError, match=r"projections for 7 positions, got 11\. .*max_position"):
        mechanism(*inputs(11))
    with pytest.raises(ValueError, match=r"projections for 3 key heads, got 2\. .*sharing='heads'"):
        mechanism(*inputs(7, heads=2, key_heads=2))
    with pytest.raises(ValueError, match=r"one query per key: query length is 5"):
        mechanism(*inputs(5, 7))
    with pytest.raises(ValueError, match=r"unknown sharing 'head'.*Did you mean 'heads'"):
        LinformerOptions(sharing="head")
    with pytest.raises(TypeError, match="is_learned must be true or false, got 'no'"):
        LinformerOptions(is_learned="no")
    with pytest.raises(ValueError, match=r"'linformer' cannot be causal.*'reformer'"):
        PerformerConfig(attention="linformer", is_decoder=True)


def test_the_paper_s_linformer_has_600_projections():
    config = PerformerConfig(attention="linformer")
    assert config.attention_options is None
    assert LinformerOptions().num_projections == 600
