"""`FavorAttention` stands where torch.nn.MultiheadAttention stood."""

import copy
import itertools
import pickle
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from performers import FavorAttention, KernelFeatures, SoftmaxFeatures
from performers.typing import FeatureMap, Features

EMBED, HEADS, DIM = 15, 3, 5
BATCH, LENGTH, KEY_LENGTH = 2, 11, 7


class TaylorFeatures(nn.Module):
    """exp(x·y) to the fourth order: (1, x, x⊗x/√2!, …). Nothing random, and a map of one's own.

    For |x·y| < 1 its relative error is below 1/5! and mostly far below.
    """

    num_features = sum(DIM**order for order in range(5))
    default_scale = DIM**-0.5
    is_nonnegative = False
    is_softmax = True

    def fitted(self, query: Tensor, key: Tensor, *rest: object, **options: object) -> FeatureMap:
        return self

    def query_features(self, x: Tensor) -> Features:
        powers = [torch.ones_like(x[..., :1])]
        for order in range(1, 5):
            product = powers[-1].unsqueeze(-1) * x.unsqueeze(-2) / order**0.5
            powers.append(product.flatten(-2))
        return Features(values=torch.cat(powers, dim=-1))

    key_features = query_features


def pair(**options: object) -> tuple[nn.MultiheadAttention, FavorAttention]:
    """Torch's module, and ours with its parameters and features that leave nothing to chance."""
    theirs = nn.MultiheadAttention(EMBED, HEADS, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours = FavorAttention(EMBED, HEADS, **options, feature_map=TaylorFeatures())
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def sequences(kdim: int = EMBED, vdim: int = EMBED, batch_first: bool = True) -> list[Tensor]:
    tensors = [
        torch.randn(BATCH, LENGTH, EMBED),
        torch.randn(BATCH, KEY_LENGTH, kdim),
        torch.randn(BATCH, KEY_LENGTH, vdim),
    ]
    return tensors if batch_first else [x.transpose(0, 1) for x in tensors]


def assert_same(theirs: tuple, ours: tuple) -> None:
    """Same shapes, and outputs equal but for the end of the Taylor series."""
    for expected, came in zip(theirs, ours, strict=True):
        assert (expected is None) == (came is None)
        if expected is not None:
            torch.testing.assert_close(came, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("add_bias_kv", [False, True])
@pytest.mark.parametrize("add_zero_attn", [False, True])
@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (5, 13)])
def test_it_agrees_with_exact_attention_where_features_are_exact(
    batch_first, bias, add_bias_kv, add_zero_attn, kdim, vdim
):
    theirs, ours = pair(
        batch_first=batch_first,
        bias=bias,
        add_bias_kv=add_bias_kv,
        add_zero_attn=add_zero_attn,
        kdim=kdim,
        vdim=vdim,
    )
    tensors = sequences(kdim or EMBED, vdim or EMBED, batch_first)
    padding = torch.arange(KEY_LENGTH) >= torch.tensor([[5], [7]])
    for mask, need_weights, average in itertools.product(
        (None, padding), (False, True), (False, True)
    ):
        options = {
            "key_padding_mask": mask,
            "need_weights": need_weights,
            "average_attn_weights": average,
        }
        assert_same(theirs(*tensors, **options), ours(*tensors, **options))


@pytest.mark.parametrize("add_bias_kv", [False, True])
@pytest.mark.parametrize("add_zero_attn", [False, True])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("is_causal", [False, True])
def test_it_agrees_with_exact_causal_attention(is_causal, mask_dtype, add_zero_attn, add_bias_kv):
    theirs, ours = pair(batch_first=True, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn)
    x = torch.randn(BATCH, LENGTH, EMBED)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    padding = torch.arange(LENGTH) >= torch.tensor([[9], [11]])
    if mask_dtype != torch.bool:
        mask, padding = (torch.zeros(m.shape).masked_fill(m, -torch.inf) for m in (mask, padding))
    for need_weights in (False, True):
        options = {
            "attn_mask": mask,
            "key_padding_mask": padding,
            "need_weights": need_weights,
            "average_attn_weights": False,
        }
        # Torch's own hint drops the padding mask; the result must not depend on the hint.
        assert_same(theirs(x, x, x, **options), ours(x, x, x, **options, is_causal=is_causal))


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_sequence_without_a_batch_axis_is_taken(batch_first, average):
    theirs, ours = pair(batch_first=batch_first)
    query, key, value = (x[0] for x in sequences())
    padding = torch.arange(KEY_LENGTH) >= 5
    for options in ({}, {"key_padding_mask": padding}, {"need_weights": False}):
        options = {"average_attn_weights": average, **options}
        assert_same(theirs(query, key, value, **options), ours(query, key, value, **options))


def test_a_mask_that_hides_nothing_is_no_mask():
    _, ours = pair(batch_first=True)
    query, key, value = sequences()
    plain, _ = ours(query, key, value)
    for mask in (torch.zeros(LENGTH, KEY_LENGTH), torch.zeros(LENGTH, KEY_LENGTH).bool()):
        torch.testing.assert_close(ours(query, key, value, attn_mask=mask)[0], plain)


def test_padding_never_reaches_the_output():
    _, ours = pair(batch_first=True)
    query, key, value = sequences()
    padding = torch.arange(KEY_LENGTH).expand(BATCH, -1) >= 5
    out, weights = ours(query, key, value, padding)
    for x in (key, value):
        x[padding] = torch.nan
    dirty, dirty_weights = ours(query, key, value, padding)
    assert torch.equal(out, dirty)
    assert torch.equal(weights, dirty_weights)


class TestStateDict:
    def test_of_torch_loads_and_leaves_omega_alone(self):
        ours = FavorAttention(EMBED, HEADS)
        omega = ours.feature_map.omega.clone()
        theirs = nn.MultiheadAttention(EMBED, HEADS)
        assert ours.load_state_dict(theirs.state_dict()) == ([], [])
        assert torch.equal(ours.in_proj_weight, theirs.in_proj_weight)
        assert torch.equal(ours.feature_map.omega, omega)

    def test_of_torch_loads_inside_a_model(self):
        theirs = nn.TransformerEncoderLayer(EMBED, HEADS)
        ours = copy.deepcopy(theirs)
        ours.self_attn = FavorAttention(EMBED, HEADS)
        nn.Sequential(ours).load_state_dict(nn.Sequential(theirs).state_dict())
        assert torch.equal(ours.self_attn.in_proj_weight, theirs.self_attn.in_proj_weight)

    def test_of_ours_brings_its_omega(self):
        saved, loaded = (
            FavorAttention(EMBED, HEADS, feature_map=SoftmaxFeatures(5, 11, seed=s)) for s in (0, 1)
        )
        loaded.load_state_dict(saved.state_dict())
        x = torch.randn(LENGTH, BATCH, EMBED)
        assert torch.equal(loaded(x, x, x)[0], saved(x, x, x)[0])

    def test_with_half_a_feature_map_is_refused(self):
        state = FavorAttention(EMBED, HEADS).state_dict()
        del state["feature_map.omega"]
        with pytest.raises(RuntimeError, match=r"Missing key.*feature_map\.omega"):
            FavorAttention(EMBED, HEADS).load_state_dict(state)

    def test_fills_a_module_of_the_meta_device(self):
        saved = FavorAttention(EMBED, HEADS, batch_first=True)
        with torch.device("meta"):
            shell = FavorAttention(EMBED, HEADS, batch_first=True)
        shell.load_state_dict(saved.state_dict(), assign=True)
        query, key, value = sequences()
        assert torch.equal(shell(query, key, value)[0], saved(query, key, value)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_computed_with_the_same_omega(dtype):
    attention = FavorAttention(EMBED, HEADS, add_bias_kv=True)
    x = torch.randn(LENGTH, BATCH, EMBED)
    expected, _ = attention(x, x, x)
    cast = copy.deepcopy(attention).to(dtype)
    assert torch.equal(cast.feature_map.omega, attention.feature_map.omega)
    out, weights = cast(*(x.to(dtype),) * 3)
    assert out.dtype == weights.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02)


def test_it_runs_under_autocast_with_extra_keys():
    attention = FavorAttention(EMBED, HEADS, add_bias_kv=True, add_zero_attn=True)
    x = torch.randn(LENGTH, BATCH, EMBED)
    expected, _ = attention(x, x, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = attention(x, x, x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02)


def test_copies_and_pickles_give_the_same_output():
    attention = FavorAttention(EMBED, HEADS, feature_map=KernelFeatures(5, 11))
    x = torch.randn(LENGTH, BATCH, EMBED)
    for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(copied(x, x, x)[0], attention(x, x, x)[0])


# Of an even number of heads: torch's fused path leaves odd ones alone.
WIDTH = 20


class TestInsideTorch:
    """Torch's encoder has a fused exact path for evaluation, which must not replace ours."""

    @pytest.fixture
    def layer(self) -> nn.TransformerEncoderLayer:
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 17, dropout=0.0, batch_first=True)
        # Few features, so that the exact answer would be told apart.
        layer.self_attn = FavorAttention(
            WIDTH, 4, batch_first=True, feature_map=SoftmaxFeatures(DIM, 2)
        )
        return layer

    @staticmethod
    def by_hand(layer: nn.TransformerEncoderLayer, x: Tensor, **options: Tensor) -> Tensor:
        x = layer.norm1(x + layer.self_attn(x, x, x, need_weights=False, **options)[0])
        return layer.norm2(x + layer.linear2(layer.linear1(x).relu()))

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_a_layer_uses_our_attention(self, layer, training, context):
        layer.train(training)
        x = 3 * torch.randn(BATCH, LENGTH, WIDTH)
        padding = torch.arange(LENGTH) >= torch.tensor([[9], [11]])
        causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        with context():
            torch.testing.assert_close(layer(x), self.by_hand(layer, x))
            torch.testing.assert_close(
                layer(x, src_key_padding_mask=padding),
                self.by_hand(layer, x, key_padding_mask=padding),
            )
            torch.testing.assert_close(
                layer(x, causal, is_causal=True), self.by_hand(layer, x, attn_mask=causal)
            )

    def test_copies_of_a_layer_use_our_attention(self, layer):
        x = 3 * torch.randn(BATCH, LENGTH, WIDTH)
        for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            with torch.no_grad():
                torch.testing.assert_close(copied.eval()(x), self.by_hand(layer, x))

    @pytest.mark.parametrize("is_ready", [False, True])
    @pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
    def test_a_stack_uses_our_attention(self, layer, is_ready):
        """A stack takes the padding out of what it evaluates: attention gets a nested tensor."""
        x = 3 * torch.randn(BATCH, LENGTH, WIDTH)
        padding = torch.arange(LENGTH) >= torch.tensor([[9], [11]])
        if is_ready:
            exact = nn.TransformerEncoderLayer(WIDTH, 4, 17, dropout=0.0, batch_first=True)
            stack = nn.TransformerEncoder(exact, 2)
            for one in stack.layers:
                one.self_attn = copy.deepcopy(layer.self_attn)
        else:
            stack = nn.TransformerEncoder(layer, 2)
        stack.eval()
        expected = x
        for one in stack.layers:
            expected = self.by_hand(one, expected, key_padding_mask=padding)
        with torch.no_grad():
            out = stack(x, src_key_padding_mask=padding)
        torch.testing.assert_close(out[~padding], expected[~padding])

    @pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_a_whole_transformer_is_the_same(self, is_causal):
        theirs = nn.Transformer(EMBED, HEADS, 2, 2, 17, dropout=0.0, batch_first=True)
        for parameter in theirs.parameters():
            nn.init.normal_(parameter, std=0.1)
        ours = copy.deepcopy(theirs)
        for module in list(ours.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.MultiheadAttention):
                    favor = FavorAttention(
                        EMBED, HEADS, batch_first=True, feature_map=TaylorFeatures()
                    )
                    favor.load_state_dict(child.state_dict())
                    setattr(module, name, favor)
        source, target = torch.randn(BATCH, KEY_LENGTH, EMBED), torch.randn(BATCH, LENGTH, EMBED)
        padding = torch.arange(KEY_LENGTH) >= torch.tensor([[5], [7]])
        options = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        if is_causal:
            options["tgt_mask"] = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for training, context in ((True, torch.enable_grad), (False, torch.no_grad)):
            with context():
                expected = theirs.train(training)(source, target, **options)
                out = ours.train(training)(source, target, **options)
            torch.testing.assert_close(out, expected, rtol=0, atol=1e-3)

    def test_it_trains(self, layer):
        layer.train()
        layer(torch.randn(BATCH, LENGTH, WIDTH)).square().sum().backward()
        assert layer.self_attn.in_proj_weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kdim", [None, 7])
def test_its_weights_can_be_drawn_again_as_torch_draws_them(kdim):
    theirs, ours = pair(kdim=kdim)
    for module in (theirs, ours):
        torch.manual_seed(1)
        module._reset_parameters()
    for name, weight in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), weight)


class TestAdapters:
    """What changes the weights of nn.MultiheadAttention changes ours alike."""

    def test_lora_is_that_of_exact_attention(self):
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(
            target_modules=["attention"], r=11, lora_alpha=1, init_lora_weights=False
        )
        x, results = torch.randn(BATCH, LENGTH, EMBED), []
        for module in pair(batch_first=True):
            torch.manual_seed(1)
            model = peft.get_peft_model(nn.ModuleDict({"attention": module}), lora)
            out, weights = model.base_model.model["attention"](x, x, x)
            out.square().sum().backward()
            learned = [p.grad for name, p in model.named_parameters() if "lora_" in name]
            merged, _ = model.merge_and_unload()["attention"](x, x, x)
            results.append((out, weights, merged, *learned))
        assert len(results[0]) == 3 + 4  # A and B, of the input's projections and of the output's
        assert_same(results[0][:3], results[1][:3])
        for theirs, ours in zip(results[0][3:], results[1][3:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=1e-3)
            assert ours.abs().sum() > 0

    def test_linear_layers_around_it_can_be_quantized(self):
        _, ours = pair(batch_first=True)
        model = nn.Sequential(nn.TransformerEncoderLayer(EMBED, HEADS, 17, batch_first=True)).eval()
        model[0].self_attn = ours.eval()
        x = torch.randn(BATCH, LENGTH, EMBED)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch moves quantization to another package
            quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        assert isinstance(quantized[0].self_attn, FavorAttention)
        with torch.no_grad():
            torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=0.05)


def additive(hidden: Tensor, number: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, number)


# What people make of hidden pairs, (batch, length, length).
LOWEST = torch.finfo(torch.float32).min
FORMS = {
    "bool by head": lambda hidden: hidden.repeat_interleave(HEADS, dim=0),
    "-inf by head": lambda hidden: additive(hidden, -torch.inf).repeat_interleave(HEADS, dim=0),
    "bool 4-D": lambda hidden: hidden[:, None],
    "lowest number 4-D": lambda hidden: additive(hidden, LOWEST)[:, None],
    "-1e9 4-D by head": lambda hidden: additive(hidden, -1e9)[:, None].repeat(1, HEADS, 1, 1),
    "-1e4 in half precision": lambda hidden: additive(hidden, -1e4, torch.float16)[:, None],
}


class TestMasksOfPairs:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("is_causal", [False, True])
    def test_causality_and_padding_are_read_in_every_form(self, form, is_causal):
        _, ours = pair(batch_first=True)
        x = torch.randn(BATCH, LENGTH, EMBED)
        causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        for start, end in ((0, LENGTH), (2, LENGTH), (0, 7)):
            position = torch.arange(LENGTH)
            padding = ((position < start) | (position >= end)).repeat(BATCH, 1)
            padding[1] = False
            hidden = padding[:, None] | (causal & is_causal)
            expected, _ = ours(x, x, x, padding, attn_mask=causal if is_causal else None)
            # Some hide what padded queries see, too: nobody reads their outputs.
            for mask in (hidden, hidden | padding[:, :, None]):
                out, _ = ours(x, x, x, attn_mask=FORMS[form](mask))
                assert torch.equal(out, expected)

    @pytest.mark.parametrize("number", [-torch.inf, LOWEST, -1e9, -1e4])
    def test_whatever_hides_in_torch_hides_here(self, number):
        theirs, ours = pair(batch_first=True)
        x = torch.randn(BATCH, LENGTH, EMBED)
        mask = torch.full((LENGTH, LENGTH), number).triu(1)
        padding = additive(torch.arange(LENGTH) >= torch.tensor([[9], [11]]), number)
        for options in ({"attn_mask": mask}, {"key_padding_mask": padding}):
            assert_same(theirs(x, x, x, **options), ours(x, x, x, **options))

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda hidden: hidden.triu(3) | (hidden & ~hidden.triu(2)), "query 0 sees key 2"),
            (lambda hidden: hidden.mT, "not padding: of sequence 0, query 1 does not see key 0"),
            (lambda hidden: hidden | hidden.mT.tril(-3), "query 3 does not see key 0"),
            (lambda hidden: hidden.index_fill(1, torch.tensor(4), True), "query 4 does not see"),
            (lambda hidden: torch.stack([hidden, hidden & False, hidden], 1), "between heads"),
            (lambda hidden: hidden.float(), "it adds, or learns to add"),
            (lambda hidden: torch.randn(hidden.shape), "it adds, or learns to add"),
            (lambda hidden: additive(hidden, -5.0), "it adds, or learns to add"),
            (lambda hidden: torch.zeros(hidden.shape, requires_grad=True), "it adds, or learns"),
            (lambda hidden: additive(hidden, torch.nan), "it adds, or learns to add"),
            (lambda hidden: hidden[:, :5], "it does not have this shape"),
        ],
    )  # fmt: skip
    @pytest.mark.usefixtures("without_shape_checks")
    def test_others_are_refused_with_the_cause(self, change, words):
        _, ours = pair(batch_first=True)
        x = torch.randn(BATCH, LENGTH, EMBED)
        mask = change(torch.ones(BATCH, LENGTH, LENGTH, dtype=torch.bool).triu(1))
        mask = mask[:, None] if mask.ndim == 3 else mask
        with pytest.raises(ValueError, match=f"attn_mask must be None or say causality.*{words}"):
            ours(x, x, x, attn_mask=mask)


class TestErrors:
    def test_dropout_is_not_applied_and_says_so(self):
        with pytest.warns(UserWarning, match="does not apply dropout to attention weights"):
            attention = FavorAttention(EMBED, HEADS, dropout=0.1)
        x = torch.randn(LENGTH, BATCH, EMBED)
        assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])

    def test_a_padding_bias_is_refused(self):
        x = torch.randn(LENGTH, BATCH, EMBED)
        with pytest.raises(ValueError, match=r"must be bool .* or hold only 0 and -inf"):
            FavorAttention(EMBED, HEADS)(x, x, x, key_padding_mask=torch.randn(BATCH, LENGTH))

    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_a_padding_mask_of_whole_numbers_is_refused(self, number):
        x, mask = torch.randn(LENGTH, BATCH, EMBED), torch.full((BATCH, LENGTH), number)
        with pytest.raises(TypeError, match=r"must be bool with True for padding, got torch.int64"):
            FavorAttention(EMBED, HEADS)(x, x, x, key_padding_mask=mask)

    def test_a_hint_without_its_mask_is_refused(self):
        x = torch.randn(LENGTH, BATCH, EMBED)
        with pytest.raises(ValueError, match="is_causal=True is a hint about attn_mask"):
            FavorAttention(EMBED, HEADS)(x, x, x, is_causal=True)

    def test_a_feature_map_of_another_dim_is_refused(self):
        attention = FavorAttention(EMBED, HEADS, feature_map=SoftmaxFeatures(EMBED))
        x = torch.randn(LENGTH, BATCH, EMBED)
        with pytest.raises(ValueError, match=re.escape("the feature map is for dim 15 per head")):
            attention(x, x, x)

    @pytest.mark.usefixtures("without_shape_checks")
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"embed_dim": 0}, "embed_dim must be a whole number of at least 1, got 0"),
            ({"num_heads": 0}, "num_heads must be a whole number of at least 1, got 0"),
            ({"num_heads": 4}, "num_heads must divide embed_dim: got 4 and 15"),
            ({"dropout": -0.1}, "dropout must be"),
            ({"bias": "no"}, "bias must be True or False"),
            ({"add_bias_kv": 1}, "add_bias_kv must be True or False"),
            ({"add_zero_attn": 1}, "add_zero_attn must be True or False"),
            ({"batch_first": "yes"}, "batch_first must be True or False"),
            ({"kdim": 0}, "kdim must be a whole number of at least 1, got 0"),
            ({"vdim": 2.5}, "vdim must be a whole number of at least 1, got 2.5"),
            ({"feature_map": nn.Linear(5, 5)}, "must be a feature map"),
        ],
        ids=str,
    )
    def test_what_no_module_can_be_made_of_is_named(self, options, words):
        with pytest.raises((ValueError, TypeError)) as caught:
            FavorAttention(**{"embed_dim": EMBED, "num_heads": HEADS, **options})
        assert words in str(caught.value)

    @pytest.mark.usefixtures("without_shape_checks")
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"query": torch.zeros(2, 11, 13)}, "with dim=15 here: got (2, 11, 13)"),
            ({"query": torch.zeros(11, 15)}, "key must be"),
            ({"query": torch.zeros(3, 11, 15)}, "must have the same batch, the axis 0"),
            ({"key": torch.zeros(2, 7, 15).int()}, "key must be"),
            ({"value": torch.zeros(2, 5, 15)}, "key is (2, 7, 15), value is (2, 5, 15)"),
            ({"value": torch.zeros(3, 7, 15)}, "key is (2, 7, 15), value is (3, 7, 15)"),
            ({"key_padding_mask": [True] * 7}, "key_padding_mask must be a torch.Tensor"),
            ({"key_padding_mask": torch.ones(7, 2).bool()}, "(2, 7) here, got (7, 2)"),
            ({"attn_mask": [[True]]}, "attn_mask must be a torch.Tensor"),
            ({"need_weights": "no"}, "need_weights must be True or False"),
            ({"average_attn_weights": 1}, "average_attn_weights must be True or False"),
            ({"is_causal": 1}, "is_causal must be True or False"),
        ],
        ids=lambda x: next(iter(x)) if isinstance(x, dict) else x,
    )
    def test_inputs_that_do_not_fit_are_named(self, change, words):
        attention = FavorAttention(EMBED, HEADS, batch_first=True)
        inputs = dict(zip(("query", "key", "value"), sequences(), strict=True))
        with pytest.raises((ValueError, TypeError)) as caught:
            attention(**{**inputs, **change})
        assert words in str(caught.value)

    @pytest.mark.usefixtures("without_shape_checks")
    def test_the_batch_is_the_second_axis_unless_it_is_first(self):
        attention = FavorAttention(EMBED, HEADS)
        query, key, value = sequences(batch_first=False)
        attention(query, key, value, torch.zeros(BATCH, KEY_LENGTH, dtype=torch.bool))
        with pytest.raises(ValueError, match="must have the same batch, the axis 1"):
            attention(query[:, :1], key, value)
        with pytest.raises(ValueError, match=re.escape("(2, 7) here, got (7, 2)")):
            attention(query, key, value, torch.zeros(KEY_LENGTH, BATCH, dtype=torch.bool))
