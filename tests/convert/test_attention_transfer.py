"""Attention transfer brings every layer nearer to the exact one, and touches nothing else."""

import copy

import pytest
import torch
from tiny_models import bart, bert, gpt2, inputs_for, llama, outputs_of
from torch.optim.optimizer import register_optimizer_step_pre_hook

from performers import FavorOptions, calibrate, linearize
from performers.convert.attention_transfer import (
    averaging_errors,
    exact_copy,
    layer_errors,
    transfer_attention,
)
from performers.convert.linearize import converted_layers

SMALL = FavorOptions(num_projections=11, window_size=0)
MODELS = {"BERT": bert, "GPT-2": gpt2, "Llama": llama, "BART": bart}


def converted(build, options=SMALL):
    model = linearize(build(), options)
    return model, exact_copy(model)


@pytest.mark.parametrize("name", MODELS)
def test_layers_come_nearer_to_their_exact_teacher_on_other_inputs(name):
    """Together by a twentieth at least; one whose error is small may stay where it was."""
    model, teacher = converted(MODELS[name])
    calibrate(model, [inputs_for(model, 43)])
    held_out = [inputs_for(model, 43)]
    before = layer_errors(model, teacher, held_out)
    batches = [inputs_for(model, 43) for _ in range(40)]
    losses = []
    transfer_attention(model, teacher, batches, 3e-3, lambda step, loss: losses.append(loss))
    after = layer_errors(model, teacher, held_out)
    assert len(losses) == 40
    assert before.keys() == after.keys() == converted_layers(model).keys()
    assert all(after[layer] < 1.15 * before[layer] for layer in before)
    assert sum(after.values()) < 0.95 * sum(before.values())


def test_the_learning_rate_falls_linearly_to_0():
    model, teacher = converted(bert)
    rates = []

    def note(optimizer, arguments, names):
        rates.append(optimizer.param_groups[0]["lr"])

    handle = register_optimizer_step_pre_hook(note)
    try:
        transfer_attention(model, teacher, [inputs_for(model)] * 4, learning_rate=8e-3)
    finally:
        handle.remove()
    assert rates == pytest.approx([8e-3, 6e-3, 4e-3, 2e-3])


def test_only_converted_attention_is_trained_and_omega_stays():
    model, teacher = converted(llama, FavorOptions(num_projections=11, window_size=0, layers=(1,)))
    before = copy.deepcopy(model)
    model.model.layers[1].self_attn.k_proj.requires_grad_(False)
    model.train()
    model.model.embed_tokens.eval()
    modes = [module.training for module in model.modules()]
    transfer_attention(model, teacher, [inputs_for(model)])
    layer_errors(model, teacher, [inputs_for(model)])
    assert [module.training for module in model.modules()] == modes
    changed = {
        name
        for (name, tensor), old in zip(
            model.state_dict().items(), before.state_dict().values(), strict=True
        )
        if not torch.equal(tensor, old)
    }
    layer = "model.layers.1.self_attn"
    assert changed == {f"{layer}.{part}_proj.weight" for part in "qvo"}
    pair = (converted_layers(one)[layer].feature_map.omega for one in (model, before))
    assert torch.equal(*pair)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.model.layers[1].self_attn.k_proj.weight.requires_grad


@pytest.mark.parametrize("name", MODELS)
def test_the_teacher_is_the_exact_model_and_frozen(name):
    model = MODELS[name]()
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)
    teacher = exact_copy(linearize(model, SMALL))
    assert not torch.allclose(outputs_of(model, inputs), expected)
    torch.testing.assert_close(outputs_of(teacher, inputs), expected)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert len(converted_layers(model)) > 0


def test_a_model_that_attends_exactly_has_no_teacher():
    with pytest.raises(ValueError, match=r"this one is exact\. Convert it with performers.linear"):
        exact_copy(bert())


def test_a_window_of_the_whole_length_has_no_error():
    model, teacher = converted(bert, FavorOptions(num_projections=11, window_size=13))
    errors = layer_errors(model, teacher, [inputs_for(model)])
    assert all(error < 1e-5 for error in errors.values())


@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_averaging_is_what_attention_without_queries_does(name):
    model = MODELS[name]()
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if "q_proj" in weight_name or "query" in weight_name:
                weight.zero_()
    teacher = exact_copy(linearize(model, SMALL))
    errors = averaging_errors(model, teacher, [inputs_for(model)])
    assert all(error < 1e-5 for error in errors.values())
    model, teacher = converted(MODELS[name])
    errors = averaging_errors(model, teacher, [inputs_for(model)])
    assert all(error > 0.1 for error in errors.values())


def test_padding_does_not_count():
    model, teacher = converted(bert)
    inputs = inputs_for(model)
    other = dict(inputs)
    other["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 3)
    pair = [layer_errors(model, teacher, [batch]) for batch in (inputs, other)]
    for layer, error in pair[0].items():
        assert pair[1][layer] == pytest.approx(error, rel=1e-4)


def test_divergence_is_an_error():
    model, teacher = converted(bert)
    with torch.no_grad():
        model.encoder.layer[1].attention.self.value.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="diverged: the loss is nan at step 0"):
        transfer_attention(model, teacher, [inputs_for(model)])
