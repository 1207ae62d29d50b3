"""A model whose sequences are split over ranks is the model: losses, gradients, training."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from tiny_models import SIZES, WORDS, bart, gpt2, llama
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertConfig, BertForMaskedLM

from performers import (
    FavorOptions,
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForMaskedLM,
    linearize,
)
from performers.distributed import sequence_parallel_attention
from performers.distributed.models import own_piece, parallelize

LENGTH = 23


def masked(**changes):
    return PerformerForMaskedLM(PerformerConfig(**SIZES, num_projections=17, **changes))


def causal(**changes):
    return PerformerForCausalLM(PerformerConfig(**SIZES, num_projections=17, **changes))


def converted(model, **options):
    return linearize(model, FavorOptions(num_projections=17, **options))


def bert():
    return BertForMaskedLM(BertConfig(**SIZES, attention_probs_dropout_prob=0.0))


MODELS = {
    "masked, sharp": lambda: masked(attention="performer-sharp", window_size=4, position="learned"),
    "Llama": lambda: converted(llama(), window_size=0),
    "masked": masked,
    "causal": lambda: causal(num_key_value_heads=2, position="sinusoidal"),
    "causal, window": lambda: causal(attention="performer-positive", window_size=4),
    "Llama, window": lambda: converted(llama(), window_size=4, num_sinks=2),
    "BERT": lambda: converted(bert(), window_size=4),
}


def made(name):
    """In float64, so that what differs is no rounding."""
    torch.manual_seed(0)
    return MODELS[name]().double().train()


def batch(has_padding=True):
    """Labels begin and end in different pieces; the first row's first piece is padding."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, WORDS, (2, LENGTH), generator=generator)
    labels = ids.masked_fill(torch.rand(2, LENGTH, generator=generator) < 0.3, -100)
    if not has_padding:
        return {"input_ids": ids, "labels": labels}
    mask = torch.ones_like(ids)
    mask[0, :9], mask[1, -4:] = 0, 0
    labels = labels.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model):
    """Of every parameter, 0 where there is none."""
    found = {}
    for name, x in model.named_parameters():
        found[name] = torch.zeros_like(x) if x.grad is None else x.grad
    return found


def split(model):
    """The model over all ranks, which average gradients."""
    return DistributedDataParallel(parallelize(model, dist.group.WORLD))


def check_pieces_are_the_model(name, has_padding):
    model, inputs = made(name), batch(has_padding)
    whole = copy.deepcopy(model)
    expected = whole(**inputs)
    expected.loss.backward()

    def run():
        together = split(model)
        own = together(**inputs)
        own.loss.backward()
        piece = own_piece(LENGTH, dist.group.WORLD)
        return own.loss.detach(), own.logits.detach(), gradients(model), piece

    for loss, logits, found, piece in on_ranks(3, run):
        torch.testing.assert_close(loss.float(), expected.loss.float(), rtol=1e-6, atol=0)
        is_real = inputs.get("attention_mask", torch.ones(2, LENGTH))[:, piece].bool()
        rows = expected.logits.detach()[:, piece][is_real]
        torch.testing.assert_close(logits[is_real], rows, rtol=1e-6, atol=1e-6 * rows.abs().max())
        for parameter, x in gradients(whole).items():
            scale = 1e-6 * float(x.abs().max()) + 1e-12
            torch.testing.assert_close(
                found[parameter], x, rtol=0, atol=scale, msg=lambda m, n=parameter: f"{n}: {m}"
            )


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", ["masked, sharp", "Llama"])
def test_a_split_model_has_the_loss_the_outputs_and_the_gradients_of_the_model(name):
    check_pieces_are_the_model(name, has_padding=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("has_padding", [True, False])
def test_every_split_model_has(name, has_padding):
    check_pieces_are_the_model(name, has_padding)


def losses(model, inputs, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def sharded(model):
    parallelize(model, dist.group.WORLD)
    layers = model.model.layers if hasattr(model, "model") else model.performer.layers
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


def compiled(model):
    return torch.compile(split(model), backend="eager")


def checkpointed(model):
    model.gradient_checkpointing_enable()
    return split(model)


WRAPPERS = {"DDP": split, "FSDP2": sharded, "compile": compiled, "checkpointing": checkpointed}


def check_training(name, wrappers):
    inputs = batch()
    expected = losses(made(name), inputs)

    def run():
        return {word: losses(WRAPPERS[word](made(name)), inputs) for word in wrappers}

    for found in on_ranks(2, run):
        for word in wrappers:
            torch.testing.assert_close(found[word], expected, rtol=1e-6, atol=0, msg=word)


@pytest.mark.usefixtures("without_shape_checks")
def test_a_split_model_trains_to_the_same_losses_under_ddp_and_fsdp():
    check_training("Llama", ["DDP", "FSDP2"])


@pytest.mark.slow
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", ["masked, sharp", "Llama, window", "causal, window"])
def test_a_split_model_trains_to_the_same_losses_however_it_is_wrapped(name):
    check_training(name, WRAPPERS)


def said(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (TypeError, ValueError, IndexError) as error:
        return str(error)
    return "nothing"


class Deaf(BertForMaskedLM):
    """A model that takes positions and counts by itself."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **options):
        return super().forward(input_ids, attention_mask, **options)


UNFIT = {
    "performer.layers.0.attention attends by something else": lambda: causal(attention="exact"),
    "attends by something else than FAVOR+": lambda: converted(llama(), layers=[1], window_size=0),
    "attends to another sequence": lambda: converted(bart(), statistics="calibrated"),
    "has exact heads": lambda: converted(llama(), window_size=0, exact_heads={0: (1,)}),
    "pass a Performer, or a model of transformers": lambda: torch.nn.Linear(2, 3),
    "does not compute with the position_ids": lambda: converted(Deaf(bert().config)),
}


@pytest.mark.usefixtures("without_shape_checks")
def test_models_that_cannot_be_split_are_refused_by_name():
    def run():
        return {word: said(parallelize, make(), dist.group.WORLD) for word, make in UNFIT.items()}

    for found in on_ranks(2, run):
        for word, text in found.items():
            assert word in text


@pytest.mark.usefixtures("without_shape_checks")
def test_all_ranks_refuse_what_a_split_model_cannot_take_or_one_of_them_does_otherwise():
    inputs = batch(has_padding=False)
    ids = inputs["input_ids"]
    positions = torch.arange(LENGTH) % 7
    calls = {
        "a sequence of 1 tokens cannot be split over 2 ranks": lambda _: {"input_ids": ids[:, :1]},
        "cannot take this use_cache": lambda _: {"input_ids": ids, "use_cache": True},
        "cannot take this output_attentions": lambda _: {
            "input_ids": ids, "output_attentions": True,
        },
        "cannot take this attention_mask": lambda _: {
            "input_ids": ids, "attention_mask": torch.ones(2, 1, LENGTH, LENGTH),
        },
        "position_ids that restart": lambda _: {
            "input_ids": ids, "position_ids": positions.expand(2, -1),
        },
        "labels must be (batch, length)": lambda _: inputs | {"labels": ids[:, 1:]},
        "needs input_ids or inputs_embeds": lambda _: {},
        "must have the same input_ids": lambda rank: {"input_ids": ids + rank},
        "must have the same arguments": lambda rank: {
            "input_ids": ids, "attention_mask": torch.ones_like(ids) if rank else None,
        },
        # In the second half alone: the embedding of one rank fails, not the agreement before it.
        "rank 1 of the group cannot go on": lambda _: {
            "input_ids": ids.index_fill(1, torch.tensor([LENGTH - 1]), WORDS + 5),
        },
    }  # fmt: skip

    def run():
        rank = dist.get_rank()
        torch.manual_seed(rank)
        others = said(parallelize, causal(), dist.group.WORLD)
        torch.manual_seed(0)
        model = parallelize(causal(), dist.group.WORLD)
        again = said(parallelize, model, dist.group.WORLD)
        found = {word: said(model, **call(rank)) for word, call in calls.items()}
        # Whatever was refused, ranks still understand each other.
        return found, others, again, model(**inputs).loss.item()

    answers = on_ranks(2, run)
    for rank, (found, others, again, loss) in enumerate(answers):
        assert "must have the same performer.embed_tokens.weight" in others
        assert "is split over ranks already" in again
        assert loss == answers[0][3] > 0
        for word, text in found.items():
            is_own = rank == 1 and "cannot go on" in word
            assert ("index out of range" if is_own else word) in text


def test_only_a_loss_of_tokens_is_split():
    def run():
        model = parallelize(converted(gpt2(), window_size=0), dist.group.WORLD)
        ids = torch.arange(LENGTH).unsqueeze(0) + 5
        return said(model, input_ids=ids, labels=ids), model(input_ids=ids).last_hidden_state.shape

    for text, shape in on_ranks(2, run):
        assert "the loss of GPT2Model is not one of each token" in text
        assert shape[1] in (11, 12)


def test_pieces_are_as_equal_as_can_be():
    def run():
        return [own_piece(length, dist.group.WORLD) for length in (3, 7, 11)]

    for length, pieces in zip((3, 7, 11), zip(*on_ranks(3, run), strict=True), strict=True):
        assert [i for piece in pieces for i in range(length)[piece]] == list(range(length))
        sizes = [piece.stop - piece.start for piece in pieces]
        assert max(sizes) - min(sizes) <= 1


def test_split_attention_of_one_rank_is_attention():
    model, inputs = made("Llama"), batch()

    def run():
        expected = model(**inputs).loss.item()
        return expected, parallelize(model, dist.group.WORLD)(**inputs).loss.item()

    ((expected, found),) = on_ranks(1, run)
    assert found == pytest.approx(expected, rel=1e-6)
    assert model.model.layers[0].self_attn.favor.attend is not sequence_parallel_attention
