"""What a forward pass returns, and what it depends on."""

import pytest
import torch
from behavior_table import CONVERTED, GENERATING, LENGTH, NAMES, OURS, WORDS, Refused, behavior

SECTION = "Outputs"
NO_TEXT = {"ViT": "images have no tokens"}
IN_BOTH_DIRECTIONS = {
    name: "attends in both directions" for name in NAMES if name not in GENERATING
}
EAGER_ALONE = Refused(
    "transformers lets a config ask for attentions under eager attention alone; pass "
    "`output_attentions=True` to calls, or set it before the conversion",
    ValueError,
    "output_attentions` attribute is not supported.*'eager'",
)
NO_PAIRS = Refused(
    "a mask of pairs has no linear-time form; a Performer takes (batch, length)",
    (ValueError, TypeError),
    "no linear-time form",
)


@behavior(SECTION, "in evaluation the same input gives the same output")
def test_deterministic(subject):
    model, inputs = subject.model(), subject.inputs()
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)


@behavior(SECTION, "a row alone gives what it gives in a batch")
def test_alone(subject):
    model, inputs = subject.model(), subject.inputs()
    together = model(**inputs, output_hidden_states=True)
    alone = model(**{name: x[:1] for name, x in inputs.items()}, output_hidden_states=True)
    torch.testing.assert_close(alone.logits, together.logits[:1], rtol=1e-4, atol=1e-4)
    for one, many in zip(alone.hidden_states, together.hidden_states, strict=True):
        torch.testing.assert_close(one, many[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@behavior(SECTION, "padding on either side changes nothing", without=NO_TEXT)
def test_padding(subject, side):
    model, tokens = subject.model(), subject.inputs()["input_ids"]
    padding, ones = torch.full((3, 4), 7), torch.ones_like(tokens)
    parts, masks = [padding, tokens], [padding * 0, ones]
    if side == "right":
        parts, masks = parts[::-1], masks[::-1]
    mask = torch.cat(masks, dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    padded = {"input_ids": torch.cat(parts, dim=1), "attention_mask": mask}
    out, expected = model(**padded, position_ids=positions).logits, model(tokens).logits
    if subject.labels != "of inputs":
        out, expected = out[mask.bool()], expected.flatten(0, 1)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


@behavior(SECTION, "hidden states: of the embeddings and of each layer, by argument and by config")
def test_hidden_states(subject):
    inputs = subject.inputs()
    states = subject.model()(**inputs, output_hidden_states=True).hidden_states
    length = LENGTH if subject.reads_text else 10
    assert [x.shape for x in states] == [(3, length, 32)] * 3
    assert subject.model()(**inputs).hidden_states is None
    by_config = subject.model(output_hidden_states=True)(**inputs).hidden_states
    assert all(map(torch.equal, by_config, states))


@behavior(SECTION, "attentions: a matrix per layer and head, whose rows sum to 1")
def test_attentions(subject):
    model, inputs = subject.model(), subject.inputs()
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    length = LENGTH if subject.reads_text else 10
    assert [x.shape for x in out.attentions] == [(3, 4, length, length)] * 2
    for matrix in out.attentions:
        torch.testing.assert_close(matrix.sum(dim=-1), torch.ones(3, 4, length))
        assert not subject.generates or (matrix.triu(1) == 0).all()
    assert not model(**inputs).attentions
    torch.testing.assert_close(out.logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)
    keys = list(out.keys())
    assert keys.index("hidden_states") < keys.index("attentions")


@behavior(
    SECTION,
    "a config may ask for attentions at any time",
    refused=dict.fromkeys(CONVERTED, EAGER_ALONE),
)
def test_attentions_by_config(subject):
    model = subject.model()
    model.config.output_attentions = True
    assert len(model(**subject.inputs()).attentions) == 2


@behavior(SECTION, "gradients reach hidden states and attentions")
def test_gradients_of_outputs(subject):
    model = subject.model().train()
    out = model(**subject.inputs(), output_attentions=True, output_hidden_states=True)
    kept = [out.hidden_states[0], out.attentions[0]]
    for tensor in kept:
        tensor.retain_grad()
    out.logits[0].flatten()[-1].backward()
    assert all(tensor.grad.any() for tensor in kept)


@behavior(SECTION, "return_dict=False gives the same as a tuple")
def test_tuples(subject):
    model, inputs = subject.model(), subject.labeled()
    options = {"output_hidden_states": True, "output_attentions": True}
    if subject.generates:
        options["use_cache"] = False
    named, plain = (model(**inputs, **options, return_dict=given) for given in (True, False))
    assert isinstance(plain, tuple)
    for one, other in zip(named.to_tuple(), plain, strict=True):
        torch.testing.assert_close(one, other)


@behavior(SECTION, "inputs_embeds stands for input_ids", without=NO_TEXT)
def test_embeddings_as_inputs(subject):
    model, tokens = subject.model(), subject.inputs()["input_ids"]
    embeddings = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(tokens).logits)


@behavior(SECTION, "position_ids may be left out", without=NO_TEXT)
def test_positions(subject):
    model, tokens = subject.model(), subject.inputs()["input_ids"]
    positions = torch.arange(LENGTH)[None]
    torch.testing.assert_close(model(tokens, position_ids=positions).logits, model(tokens).logits)


@behavior(
    SECTION,
    "a mask of pairs that says causality is read as causality",
    refused={"PerformerForCausalLM": NO_PAIRS},
    without=IN_BOTH_DIRECTIONS,
)
def test_masks_of_pairs(subject):
    model, tokens = subject.model(), subject.inputs()["input_ids"]
    pairs = torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    out = model(tokens, attention_mask=pairs, use_cache=False).logits
    torch.testing.assert_close(out, model(tokens).logits, rtol=1e-4, atol=1e-4)


@behavior(SECTION, "only the logits asked for are computed", without=IN_BOTH_DIRECTIONS)
def test_logits_to_keep(subject):
    model, tokens = subject.model(), subject.inputs()["input_ids"]
    kept = model(tokens, logits_to_keep=3).logits
    assert kept.shape == (3, 3, WORDS)
    torch.testing.assert_close(kept, model(tokens).logits[:, -3:])


@behavior(SECTION, "the first argument is main_input_name, and the body is base_model_prefix")
def test_names(subject):
    model, (inputs,) = subject.model(), subject.inputs().values()
    assert torch.equal(model(inputs).logits, model(**subject.inputs()).logits)
    assert getattr(model, model.base_model_prefix) is model.base_model
    assert model.base_model is not model


@behavior(
    SECTION,
    "chunks of the feed-forward layers give the same output",
    without=dict.fromkeys([*OURS, "Llama", "GPT-2", "ViT"], "has no such option"),
)
def test_feed_forward_chunks(subject):
    inputs = subject.inputs()
    chunked = subject.model(chunk_size_feed_forward=1)
    assert chunked.base_model.encoder.layer[0].chunk_size_feed_forward == 1
    torch.testing.assert_close(chunked(**inputs).logits, subject.model()(**inputs).logits)


@behavior(SECTION, "under autocast to bfloat16 outputs are near, and gradients finite")
def test_autocast(subject):
    model, inputs = subject.model(), subject.labeled()
    expected = model(**inputs).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**inputs)
    assert (out.logits - expected).norm() < 0.1 * expected.norm()
    out.loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
