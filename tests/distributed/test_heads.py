"""A model whose heads are shared out over ranks is the model."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tiny_models import SIZES, WORDS, bert, llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from performers import (
    FavorOptions,
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForMaskedLM,
    calibrate,
    linearize,
    shard_heads,
)

PERFORMER = {**SIZES, "num_projections": 17}


def ids():
    return torch.randint(5, WORDS, (4, 23), generator=torch.Generator().manual_seed(3))


def calibrated():
    model = linearize(llama(), FavorOptions(num_projections=17, window_size=4))
    calibrate(model, [{"input_ids": ids()}])
    return model


MODELS = {
    "masked": lambda: PerformerForMaskedLM(PerformerConfig(**PERFORMER)),
    "masked, sharp": lambda: PerformerForMaskedLM(
        PerformerConfig(**PERFORMER, attention="performer-sharp")
    ),
    "causal, window": lambda: PerformerForCausalLM(
        PerformerConfig(
            **PERFORMER, num_key_value_heads=2, attention="performer-positive", window_size=4
        )
    ),
    "calibrated Llama": calibrated,
}


def made(name):
    """In float64, so that what differs is no rounding; the same weights on each rank."""
    torch.manual_seed(0)
    return MODELS[name]().double().train()


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def trained(model, inputs):
    """Losses of two steps, and the gradients of the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, first = [], {}
    for step in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        if step == 0:
            first = {name: whole(x.grad).clone() for name, x in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), first


def mesh_of(*sizes, names=("heads",)):
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def check_heads_are_the_model(name):
    model = made(name)
    expected, of_whole = trained(copy.deepcopy(model), ids())

    def run():
        own = shard_heads(copy.deepcopy(model), mesh_of(2))
        shares = {x.to_local().numel() / x.numel() for x in own.parameters() if hasattr(x, "_spec")}
        return trained(own, ids()), shares

    for (losses, gradients), shares in on_ranks(2, run):
        assert 0.5 in shares
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
        for parameter, x in of_whole.items():
            scale = 1e-6 * float(x.abs().max()) + 1e-12
            torch.testing.assert_close(gradients[parameter], x, rtol=0, atol=scale, msg=parameter)


@pytest.mark.usefixtures("without_shape_checks")
def test_shared_out_heads_have_the_losses_and_gradients_of_the_model():
    check_heads_are_the_model("calibrated Llama")


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", ["masked", "masked, sharp", "causal, window"])
def test_so_have_those_of_other_models(name):
    check_heads_are_the_model(name)


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
def test_fsdp_shares_out_what_the_heads_leave_and_the_losses_stay():
    model = made("causal, window")
    expected, _ = trained(copy.deepcopy(model), ids())

    def run():
        mesh = mesh_of(2, 2, names=("data", "heads"))
        own = shard_heads(copy.deepcopy(model), mesh["heads"])
        for layer in own.performer.layers:
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(own, mesh=mesh["data"])
        losses, _ = trained(own, ids().chunk(2)[mesh["data"].get_local_rank()])
        mean = losses.clone()
        dist.all_reduce(mean)
        return mean / 4

    for losses in on_ranks(4, run):
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


UNFIT = {
    "attends by something else than FAVOR+": lambda: PerformerForMaskedLM(
        PerformerConfig(**PERFORMER, attention="exact")
    ),
    "Sequential is a module around one": lambda: torch.nn.Sequential(MODELS["masked"]()),
    "has no plan for tensor parallelism": lambda: linearize(bert(), FavorOptions()),
}


def said(model):
    try:
        shard_heads(model, mesh_of(dist.get_world_size()))
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.usefixtures("without_shape_checks")
def test_models_whose_heads_cannot_be_shared_out_are_refused_by_name():
    def run():
        found = {word: said(make()) for word, make in UNFIT.items()}
        model = MODELS["masked"]()
        assert said(model) == "nothing"
        return found | {"are shared out already": said(model)}

    (found,) = on_ranks(1, run)
    for word, text in found.items():
        assert word in text


@pytest.mark.usefixtures("without_shape_checks")
def test_ranks_with_other_weights_say_so_on_every_rank():
    def run():
        torch.manual_seed(dist.get_rank())
        return said(MODELS["masked"]())

    for text in on_ranks(2, run):
        assert "must have the same performer.embed_tokens.weight" in text


@pytest.mark.usefixtures("without_shape_checks")
def test_ranks_that_do_not_divide_the_heads_are_told_what_does():
    def run():
        torch.manual_seed(0)
        with pytest.raises(
            ValueError,
            match=r"over 1, 2 ranks here, and 3 are asked for: .* num_attention_heads=4, "
            r"num_key_value_heads=2, intermediate_size=48",
        ):
            shard_heads(MODELS["causal, window"](), mesh_of(3))

    on_ranks(3, run)
