"""Packed sequences in the Performer models: each as if it were alone."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from performers.models import PerformerForCausalLM, PerformerForMaskedLM

LENGTHS = (7, 1, 13, 2)
SEQUENCES = [
    {"input_ids": torch.arange(length).mul(3).add(length).remainder(31).tolist()}
    for length in LENGTHS
]
HEADS = [PerformerForCausalLM, PerformerForMaskedLM]


def flattened(**options):
    return DataCollatorWithFlattening(**options)(SEQUENCES)


def alone(model):
    rows = [torch.tensor([sequence["input_ids"]]) for sequence in SEQUENCES]
    return torch.cat([model(row).logits for row in rows], dim=1)


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.parametrize("position", ["rotary", "learned"])
@pytest.mark.parametrize("attention", ["performer-relu", "performer-positive", "exact", "identity"])
def test_packed_sequences_are_each_as_if_alone(model_class, position, attention, tiny_model):
    window = 3 if attention == "performer-positive" else None
    model = tiny_model(model_class, attention=attention, position=position, window_size=window)
    packed = model(**flattened()).logits
    torch.testing.assert_close(packed, alone(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"return_flash_attn_kwargs": True},
        {"return_flash_attn_kwargs": True, "return_position_ids": False},
        {"return_seq_idx": True, "return_position_ids": False},
    ],
)
def test_all_that_the_collator_says_of_packed_sequences_is_heard(options, tiny_model):
    model = tiny_model(PerformerForCausalLM, attention="performer-relu", position="learned")
    given = flattened(**options)
    expected = model(**flattened()).logits
    assert torch.equal(model(**given).logits, expected)
    mask = torch.ones_like(given["input_ids"])
    if "position_ids" not in given:
        torch.testing.assert_close(model(**given, attention_mask=mask).logits, expected)


def test_nothing_leaks_from_one_packed_sequence_to_another(tiny_model):
    model = tiny_model(PerformerForMaskedLM, attention="performer-positive", window_size=3)
    given = flattened()
    before = model(**given).logits
    given["input_ids"][0, 8:21] = 5
    after = model(**given).logits
    assert torch.equal(before[:, :8], after[:, :8])
    assert torch.equal(before[:, 21:], after[:, 21:])
    assert not torch.equal(before[:, 8:21], after[:, 8:21])


def test_gradients_of_packed_sequences_are_the_sums_of_those_alone(tiny_model):
    model = tiny_model(PerformerForCausalLM, attention="performer-relu", initializer_range=0.02)
    packed, single = (
        torch.autograd.grad(logits.square().sum(), list(model.parameters()), materialize_grads=True)
        for logits in (model(**flattened()).logits, alone(model))
    )
    for found, expected in zip(packed, single, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_checkpointed_layers_and_implied_matrices_are_those_of_packed_sequences(tiny_model):
    model = tiny_model(PerformerForCausalLM, attention="performer-relu", hidden_dropout_prob=0.0)
    matrices = model(**flattened(), output_attentions=True).attentions
    assert (matrices[0][0, 0, 8:21, :8] == 0).all()
    expected = model(**flattened()).logits
    model.gradient_checkpointing_enable()
    out = model.train()(**flattened()).logits
    torch.testing.assert_close(out, expected)
    out.sum().backward()


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_cache": True}, "these rows are packed with several"),
        ({"cu_seq_lens_q": torch.tensor([0, 7, 22])}, r"got \[0, 7, 22\] for 1 rows of 23"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 23]), "cu_seq_lens_k": torch.tensor([0, 9, 23])},
            "cu_seq_lens_k must be cu_seq_lens_q",
        ),
        ({"seq_idx": torch.zeros(1, 5, dtype=torch.int32)}, r"\(batch, length\) = \(1, 23\)"),
    ],
)
def test_packing_that_fits_nothing_is_refused(changes, words, tiny_model):
    model = tiny_model(PerformerForCausalLM, attention="performer-relu")
    with pytest.raises(ValueError, match=words):
        model(**flattened() | changes)


# In a fresh process, because jaxtyping's import hook leaves traces that cannot be compiled.
COMPILED = """
import torch
from performers.models import PerformerConfig, PerformerForMaskedLM

config = PerformerConfig(
    vocab_size=31, hidden_size=24, num_hidden_layers=1, num_attention_heads=3,
    intermediate_size=41, num_projections=17, attention="performer-relu",
)
model = PerformerForMaskedLM(config).eval()
whole = torch.compile(model, fullgraph=True, backend="eager")
broken = torch.compile(lambda *given, **words: model(*given, **words), backend="eager")
tokens, restarting = torch.randint(31, (1, 23)), torch.arange(23)[None] % 7
for compiled, words in [
    (whole, {"position_ids": torch.arange(23)[None]}),
    (broken, {"position_ids": restarting, "seq_idx": torch.arange(23)[None].int() // 7}),
    (broken, {"cu_seq_lens_q": torch.tensor([0, 7, 14, 21, 23])}),
    (whole, {"position_ids": restarting}),
]:
    try:
        torch.testing.assert_close(compiled(tokens, **words).logits, model(tokens, **words).logits)
        print("equal")
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.slow
def test_compiled_models_see_packed_sequences_that_are_numbered_and_refuse_restarts(fresh_python):
    *equal, refusal = fresh_python(COMPILED).splitlines()
    assert equal == ["equal"] * 3
    assert refusal.startswith("positions that restart pack several sequences into a row")
