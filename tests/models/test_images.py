"""Images byte by byte: positions, completion, and what is refused."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from performers.models import PerformerConfig, PerformerForCausalLM, PerformerForImageGeneration

HEIGHT, WIDTH, CHANNELS = SHAPE = (3, 5, 2)
LENGTH = math.prod(SHAPE)


@pytest.fixture
def model(tiny_model):
    return tiny_model(PerformerForImageGeneration, image_shape=list(SHAPE))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(5)
    return torch.randint(256, (3, *SHAPE), generator=generator, dtype=torch.uint8)


def test_tokens_are_the_bytes_in_reading_order_behind_a_first_one(model, images):
    tokens = model.tokens(images)
    assert tokens.shape == (3, 1 + LENGTH)
    assert (tokens[:, 0] == 0).all()
    for row, column, channel in ((0, 0, 1), (0, 4, 0), (2, 1, 1)):
        place = 1 + (row * WIDTH + column) * CHANNELS + channel
        assert torch.equal(tokens[:, place], images[:, row, column, channel].long())


def test_a_position_is_the_row_the_column_and_the_channel_of_the_next_byte(model):
    positions = model.performer.positions
    nothing = torch.zeros(1, LENGTH + 1, 24)
    added = positions.add_to(nothing, torch.arange(LENGTH + 1)[None])[0]
    for row, column, channel in ((0, 0, 0), (0, 4, 1), (1, 1, 0), (2, 4, 1)):
        expected = (
            positions.rows.weight[row]
            + positions.columns.weight[column]
            + positions.channels.weight[channel]
        )
        place = (row * WIDTH + column) * CHANNELS + channel
        torch.testing.assert_close(added[place], expected)
    end = positions.rows.weight[3] + positions.columns.weight[0] + positions.channels.weight[0]
    torch.testing.assert_close(added[LENGTH], end)
    with pytest.raises(ValueError, match=r"image_shape=\[3, 5, 2\] has 30 bytes, got position 31"):
        model(torch.zeros(1, LENGTH + 2, dtype=torch.long))


def test_the_loss_is_the_mean_over_bytes_each_from_those_before_it(model, images):
    tokens = model.tokens(images)
    out = model(tokens, labels=tokens)
    assert out.logits.shape == (3, 1 + LENGTH, 256)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), images.flatten().long())
    torch.testing.assert_close(out.loss, expected)


def test_later_bytes_leave_earlier_logits_bit_identical(model, images):
    changed = images.clone()
    changed[:, 2, 1, 1] += 1
    place = 1 + (2 * WIDTH + 1) * CHANNELS + 1
    before, after = (model(model.tokens(given)).logits for given in (images, changed))
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place:], after[:, place:])


@pytest.mark.parametrize("rows", [0, 2, 3])
def test_an_image_is_completed_from_its_first_rows(model, images, rows):
    torch.manual_seed(7)
    drawn = model.complete(images[:, :rows])
    assert drawn.shape == images.shape
    assert drawn.dtype == torch.uint8
    assert torch.equal(drawn[:, :rows], images[:, :rows])
    torch.manual_seed(8)
    assert torch.equal(model.complete(images[:, :rows]), drawn) == (rows == HEIGHT)


def test_the_most_likely_rest_is_the_same_with_a_cache_and_without(model, images):
    greedy = {"do_sample": False}
    rest = model.complete(images[:, :2], **greedy)
    assert torch.equal(rest, model.complete(images[:, :2], **greedy, use_cache=False))
    logits = model(model.tokens(rest)).logits
    first = 2 * WIDTH * CHANNELS
    assert torch.equal(logits[:, first:-1].argmax(dim=-1), rest.flatten(1)[:, first:].long())


def test_bytes_are_drawn_from_their_distribution(tiny_model):
    model = tiny_model(PerformerForImageGeneration, image_shape=[1, 1, 1], initializer_range=0.1)
    torch.manual_seed(7)
    count = 8192
    drawn = model.complete(torch.empty(count, 0, 1, 1, dtype=torch.uint8)).flatten().long()
    expected = model(torch.zeros(1, 1, dtype=torch.long)).logits[0, 0].softmax(dim=-1)
    observed = torch.bincount(drawn, minlength=256) / count
    standard_error = (expected * (1 - expected) / count).sqrt()
    assert ((observed - expected).abs() < 5 * standard_error).all()
    assert (observed > 0).sum() > 128  # no word of generation left out the tail


def test_an_image_model_comes_back_equal(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    again = PerformerForImageGeneration.from_pretrained(tmp_path)
    tokens = model.tokens(images)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()


@pytest.mark.slow
def test_the_trainer_learns_an_image_and_shifts_its_labels(tiny_model, images, tmp_path):
    model = tiny_model(PerformerForImageGeneration, initializer_range=0.1)
    tokens = model.tokens(images)
    before = model(tokens, labels=tokens).loss.item()
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=40,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        label_smoothing_factor=0.01,  # with which the Trainer shifts, for models that it knows
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    Trainer(model, arguments, train_dataset=rows).train()
    assert model.eval()(tokens, labels=tokens).loss.item() < before / 2


def test_the_paper_s_images_are_sequences_of_12288_bytes():
    config = PerformerConfig(image_shape=[64, 64, 3])
    with torch.device("meta"):
        model = PerformerForImageGeneration(config)
    assert model.tokens(torch.zeros(1, 64, 64, 3, dtype=torch.uint8)).shape == (1, 1 + 12_288)
    assert config.position == "rotary"  # the caller's own config does not change


@pytest.mark.usefixtures("without_shape_checks")
def test_what_is_no_image_of_the_shape_is_refused(model, tiny_config, images):
    for wrong in (images.permute(0, 3, 1, 2), images[0], torch.cat([images, images], dim=1)):
        with pytest.raises(ValueError, match=r"with width and channels of image_shape=\[3, 5, 2\]"):
            model.tokens(wrong)
    with pytest.raises(TypeError, match=r"bytes, 0 to 255, as torch.uint8: got torch.float32"):
        model.complete(images / 255)
    with pytest.raises(ValueError, match=r"bytes, 0 to 255: got -1 to"):
        model.tokens(images.long() - 256 * (images == 255) - 1)
    with pytest.raises(ValueError, match=r"give the config an image_shape"):
        PerformerForImageGeneration(tiny_config(image_shape=None))
    with pytest.raises(ValueError, match=r"give the config an image_shape"):
        PerformerConfig(position="image")
    for shape in ([5, 3], "5x3", [5, 0, 2], [5, 3, 2.0]):
        with pytest.raises((ValueError, TypeError), match="image_shape must be"):
            PerformerForCausalLM(tiny_config(image_shape=shape))
