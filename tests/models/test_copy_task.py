"""The copy task: an encoder-decoder with linear attention writes what it has read."""

import pytest
import torch

from performers.models import PerformerConfig, PerformerForConditionalGeneration

WORDS, LENGTH = 16, 128


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_linear_attention_copies_sequences_of_length_128():
    """FAVOR+ in the encoder, in the decoder and between them, of one layer each.

    Tokens are drawn anew for each step, and the steps take a minute or two of one core of a CPU.
    On short sequences the decoder soon learns to look at its own place in the input. Of long waves
    of position (`rope_theta`) neighboring places look alike, so that there are none beyond 63
    positions here: together the waves still tell all places of a long sequence apart.
    """
    torch.manual_seed(0)
    config = PerformerConfig(
        attention="performer-positive",
        num_projections=256,
        rope_theta=10.0,
        vocab_size=WORDS + 1,
        bos_token_id=WORDS,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        initializer_range=0.05,
    )
    model = PerformerForConditionalGeneration(config)
    lengths = [8] * 50 + [32] * 50 + [LENGTH] * 700
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, len(lengths), pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    for length in lengths:
        tokens = torch.randint(WORDS, (4 * LENGTH // length, length), generator=generator)
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    tokens = torch.randint(WORDS, (32, LENGTH), generator=generator)
    options = {"max_new_tokens": LENGTH, "do_sample": False}
    written = model.generate(tokens, **options)[:, 1:]
    assert (written == tokens).float().mean() >= 0.99
    assert torch.equal(written[:4], model.generate(tokens[:4], **options, use_cache=False)[:, 1:])
