"""Models of other libraries, imported, give the outputs that their formulas give there."""

import pytest
import restated
import torch
from restated import DIM, HEADS, HIDDEN, MAX_LENGTH, VOCABULARY

from performers import PerformerForCausalLM, PerformerForMaskedLM, PerformerModel, import_checkpoint
from performers.models import PerformerCache
from performers.models.layers import PerformerAttention

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    return torch.randint(VOCABULARY, (3, 61))


def mask_of(tokens):
    """Padding in the middle, too, since a mask may be any."""
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    mask[0, 40:] = mask[1, 7:19] = False
    return mask


@torch.no_grad()
def assert_equal(model, tokens, mask, expected):
    named = {"input_ids": tokens} if tokens.ndim == 2 else {"inputs_embeds": tokens}
    out = model(**named, attention_mask=mask)
    found = out.logits if hasattr(out, "logits") else out.last_hidden_state
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("position", "kernel", "is_causal", "is_padded"),
    [
        ("rotary", None, False, False),
        ("rotary", None, True, True),
        ("rotary", "relu", True, True),
        ("absolute", None, False, True),
        ("absolute", "relu", False, False),
        ("axial", None, True, False),
        ("axial", "elu+1", False, True),
    ],
)
def test_performer_pytorch(tokens, position, kernel, is_causal, is_padded):
    weights = restated.performer_pytorch_weights(position)
    mask = mask_of(tokens) if is_padded else None
    model = import_checkpoint(weights, "performer-pytorch", is_causal=is_causal, features=kernel)
    assert isinstance(model, PerformerForCausalLM if is_causal else PerformerForMaskedLM)
    expected = restated.performer_pytorch(weights, tokens, mask, is_causal, kernel)
    assert_equal(model, tokens, mask, expected)


def test_performer_pytorch_with_biases_and_one_table_for_embedding_and_head(tokens):
    weights = restated.performer_pytorch_weights(has_biases=True, is_tied=True)
    model = import_checkpoint(weights, "performer-pytorch")
    assert model.lm_head.weight is model.performer.embed_tokens.weight
    assert_equal(model, tokens, None, restated.performer_pytorch(weights, tokens))


@pytest.mark.parametrize(
    ("features", "is_causal", "is_padded", "has_norm"),
    [
        ("hyperbolic", False, True, True),
        ("hyperbolic", True, False, False),
        ("relu", False, False, True),
        ("relu", True, True, True),
        ("elu+1", False, True, False),
        ("elu+1", True, False, True),
        ("exact", True, True, True),
    ],
)
def test_fast_transformers(tokens, features, is_causal, is_padded, has_norm):
    weights = restated.fast_transformers_weights(features in ("hyperbolic", "relu"), has_norm)
    x = torch.randn(*tokens.shape, HIDDEN)
    mask = mask_of(tokens) if is_padded else None
    told = None if features in ("hyperbolic", "elu+1") else features  # these two are the defaults
    model = import_checkpoint(
        weights, "fast-transformers", is_causal=is_causal, features=told, num_heads=HEADS
    )
    assert isinstance(model, PerformerModel)
    expected = restated.fast_transformers(weights, x, mask, is_causal, features)
    assert_equal(model, x, mask, expected)


def test_fast_transformers_at_a_temperature_of_ones_own(tokens):
    weights = restated.fast_transformers_weights()
    x = torch.randn(*tokens.shape, HIDDEN)
    model = import_checkpoint(weights, "fast-transformers", scale=0.77)
    expected = restated.fast_transformers(weights, x, softmax_temp=0.77)
    assert_equal(model, x, None, expected)


@pytest.mark.parametrize(
    ("omega", "kernel", "is_causal", "is_padded", "is_linen"),
    [
        ("shared", None, False, False, False),
        ("shared", None, True, True, True),
        ("own", None, False, True, False),
        ("own", "sigmoid", True, False, True),
        ("shared", "relu", False, True, True),
        ("", "relu", True, False, False),
    ],
)
def test_google_jax(tokens, omega, kernel, is_causal, is_padded, is_linen):
    tree = restated.google_tree(is_linen, has_biases=is_linen, omega=omega)
    mask = mask_of(tokens) if is_padded else None
    model = import_checkpoint(tree, "google-jax", is_causal=is_causal, features=kernel)
    assert_equal(model, tokens, mask, restated.google(tree, tokens, mask, is_causal, kernel))


def test_google_jax_where_queries_and_keys_are_so_large_that_normalizers_are_small(tokens):
    """Rows with D of at most 1e-6, to which 2e-6 is added there."""
    tree = restated.google_tree(omega="own")
    for part in ("query", "key"):
        tree["Transformer1DBlock_2"]["SelfAttention_1"][part]["kernel"] *= 4
    assert_equal(import_checkpoint(tree, "google-jax"), tokens, None, restated.google(tree, tokens))


def test_attention_layers_alone():
    torch.manual_seed(0)
    x = torch.randn(2, 41, HIDDEN)
    performer = restated.performer_pytorch_weights("absolute", has_biases=True)
    start = "performer.net.layers.0.0.fn."
    alone = {
        name.removeprefix(start): tensor
        for name, tensor in performer.items()
        if name.startswith(start)
    }
    layer = {"layer0.fn." + name: tensor for name, tensor in restated.doubled(alone).items()}
    expected = restated.performer_pytorch_attention(layer, "layer", x.double(), None, False, None)
    assert_equal_layer(import_checkpoint(alone, "performer-pytorch"), x, expected)

    tree = restated.google_tree(omega="own")["Transformer1DBlock_2"]["SelfAttention_1"]
    doubled = restated.doubled(tree)
    expected = restated.google_attention(doubled, {}, x.double(), None, False, None)
    assert_equal_layer(import_checkpoint(tree, "google-jax"), x, expected)


def assert_equal_layer(attention, x, expected):
    assert isinstance(attention, PerformerAttention)
    torch.testing.assert_close(attention(x)[0].double(), expected, **TOLERANCE)


def test_the_longest_sequence_has_its_position_and_a_longer_one_is_refused():
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (1, MAX_LENGTH))
    weights = restated.performer_pytorch_weights()
    model = import_checkpoint(weights, "performer-pytorch")
    assert_equal(model, tokens, None, restated.performer_pytorch(weights, tokens))
    with pytest.raises(ValueError, match=r"sinusoidal\+rotary positions end at .*67"):
        model(torch.cat([tokens, tokens], dim=1))


def test_generating_sees_what_the_whole_sequence_sees_and_keeps_nothing(tokens):
    """A new key can be the largest, which changes the features of all keys before it."""
    weights = restated.performer_pytorch_weights()
    model = import_checkpoint(weights, "performer-pytorch", is_causal=True)
    generated = model.generate(
        tokens[:1, :5],
        max_new_tokens=17,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for step, logits in enumerate(generated.logits):
        seen = generated.sequences[:, : 5 + step]
        expected = restated.performer_pytorch(weights, seen, is_causal=True)[:, -1]
        torch.testing.assert_close(logits.double(), expected, **TOLERANCE)
    for use_cache in (lambda: model(tokens, past_key_values=PerformerCache(model.config)),
                      lambda: model.generate(tokens, use_cache=True)):  # fmt: skip
        with pytest.raises(ValueError, match="must have use_cache=False"):
            use_cache()


def test_a_state_of_constant_size_serves_what_has_no_epsilon_in_features(tokens):
    weights = restated.fast_transformers_weights()
    model = import_checkpoint(weights, "fast-transformers", is_causal=True)
    x = torch.randn(*tokens.shape, HIDDEN)
    expected = restated.fast_transformers(weights, x, is_causal=True)
    cache = None
    for start, end in ((0, 30), (30, 31), (31, 61)):
        out = model(inputs_embeds=x[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        torch.testing.assert_close(
            out.last_hidden_state.double(), expected[:, start:end], **TOLERANCE
        )
    assert cache.layers[0].state.values.shape[-1] == DIM + 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"generalized_attention": True},
        {"rotary_position_emb": False},
        {"tie_embed": True, "qkv_bias": True, "attn_out_bias": True},
        {"rotary_position_emb": False, "axial_position_emb": True, "axial_position_shape": (8, 8)},
    ],
    ids=str,
)
def test_the_library_itself_agrees_and_so_do_gradients(tokens, options):
    theirs = pytest.importorskip("performer_pytorch").PerformerLM(
        num_tokens=VOCABULARY, max_seq_len=64, dim=HIDDEN, depth=2, heads=HEADS, dim_head=DIM,
        **options,
    ).eval()  # fmt: skip
    ours = import_checkpoint(
        theirs.state_dict(),
        "performer-pytorch",
        is_causal=options.get("causal", False),
        features="relu" if "generalized_attention" in options else None,
    )
    mask = mask_of(tokens)
    expected, found = theirs(tokens, mask=mask), ours(tokens, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, **TOLERANCE)
    for logits in (expected, found):
        logits.square().mean().backward()
    torch.testing.assert_close(
        ours.performer.embed_tokens.weight.grad, theirs.token_emb.weight.grad, **TOLERANCE
    )


def scbert(depth):
    """Of scBERT's shape: genes have learned places, and expression is one of seven tokens."""
    torch.manual_seed(0)
    return pytest.importorskip("performer_pytorch").PerformerLM(
        num_tokens=7, dim=200, depth=depth, heads=10, max_seq_len=16_907, rotary_position_emb=False
    ).eval()  # fmt: skip


@torch.no_grad()
def check_scbert(depth, length):
    theirs = scbert(depth)
    ours = import_checkpoint(theirs.state_dict(), "performer-pytorch")
    assert (ours.config.head_dim, ours.config.max_position_embeddings) == (64, 16_907)
    genes = torch.randint(7, (1, length))
    torch.testing.assert_close(ours(genes).logits, theirs(genes), **TOLERANCE)


def test_a_model_of_the_shape_of_scbert():
    check_scbert(depth=2, length=997)


@pytest.mark.slow
def test_the_whole_of_scbert_over_all_genes():
    check_scbert(depth=6, length=16_907)
