"""`PerformerConfig`: every choice that a model is built from, checked when it is made."""

from __future__ import annotations

import copy
import difflib
from dataclasses import fields
from typing import Any

from transformers.activations import ACT2FN

from performers.checks import (
    check_choice,
    check_count,
    check_whole_number,
    described,
    is_finite,
)
from performers.functional.projections import DISTRIBUTIONS, PROJECTIONS
from performers.functional.seeds import mixed_seed
from performers.models.fields import PerformerFields
from performers.models.mechanisms import MECHANISMS, cross_memory, in_current_words
from performers.models.mixes import check_attention
from performers.models.positions import POSITIONS

__all__ = ["SIZES", "PerformerConfig", "changed", "decoder_config"]

# (n_heads, n_layers, d_ff, d) of the paper: "regular" in Section 4.1, "small", where attention
# dominates the cost, in Appendix E, "protein" in Section 4.4.
SIZES: dict[str, dict[str, int]] = {
    "regular": {
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "intermediate_size": 2048,
        "hidden_size": 512,
    },
    "small": {
        "num_attention_heads": 1,
        "num_hidden_layers": 6,
        "intermediate_size": 64,
        "hidden_size": 64,
    },
    "protein": {
        "num_attention_heads": 8,
        "num_hidden_layers": 36,
        "intermediate_size": 1024,
        "hidden_size": 512,
    },
}


class PerformerConfig(PerformerFields):
    """A Performer in transformers' words, the paper's defaults where the paper names one.

    `attention`: the mechanism. "exact" (an ordinary Transformer), "identity" (the paper's X: no
    attention at all), another that the paper compares with, as `performers.baselines` and its rows
    in `MECHANISMS` name them, or "performer-" and a word for features: "performer-relu" (the
    paper's default for training) or any other kernel; "performer-positive" (the paper's estimate of
    softmax), "performer-hyperbolic", "performer-trigonometric"; or "performer-sharp" (a positive
    estimate with the statistics of each sequence, so for bidirectional models only, see
    `SharpFeatures`).
    It may be a list with an entry for each layer, and each entry, or all there is, a mapping of
    mechanisms to numbers of heads: {"local": 2, "performer-relu": 6}, which have the heads in the
    alphabetical order of their names.
    `attention_options`: what can be chosen about this mechanism alone: fields of its options in
    `performers.baselines`, such as {"num_projections": 600} of `LinformerOptions`. Where attention
    is a list or a mapping, these of each mechanism: {"local": {"window_size": 64}}.
    `num_projections`, `projection`, `distribution`, `seed`: see `SoftmaxFeatures`;
    `kernel_epsilon`: see `KernelFeatures`. `projection=None` is a kernel without ω.
    `window_size`: positive estimates of softmax score the keys of neighboring blocks of this size
    exactly, see `favor_attention`.
    `position`: "rotary", "learned" (limited to `max_position_embeddings`), "sinusoidal", "image" or
    "none"; `rope_theta` is the base of both rotary and sinusoidal wavelengths.
    `head_dim`: of queries, keys and values; hidden_size / num_attention_heads unless given. With
    another the projections lead from hidden_size to num_attention_heads · head_dim and back.
    `num_key_value_heads`: fewer than `num_attention_heads` for grouped-query attention.
    `is_decoder`: causal attention. PerformerForCausalLM and PerformerForMaskedLM set it themselves.
    `num_labels`, `problem_type`: of heads for whole sequences and for tokens, as in transformers.
    `num_decoder_layers`: of an encoder-decoder; num_hidden_layers, which its encoder has, unless
    given. `cross_attention`: the mechanism of its decoder's attention to the encoder; `attention`
    unless given. `decoder_start_token_id`: what its decoder reads first; bos_token_id unless given.
    `image_shape`: [height, width, channels] of the images that position="image" is for: embeddings
    of the row, the column and the channel of the byte that comes next. PerformerForImageGeneration
    sets that position itself.
    `reversible`: layers that the backward pass computes back, so that the memory of training does
    not depend on their number, for a third more time; see `performers.models.reversible`. The
    weights have the same names and shapes, but mean another function.
    `hidden_dropout_prob` drops embeddings and the outputs of sublayers; attention weights are
    never formed and never dropped.

    For models that were trained with other libraries (`performers.import_checkpoint`), and for
    nothing else: `dialect`, the fields of `performers.nn.Dialect`, says what they compute in the
    place of FAVOR+'s formulas; position="sinusoidal+rotary" is performer-pytorch's;
    `norm_first=False` normalizes after each sublayer and its residual; `final_norm=False` leaves
    out the last norm; `lm_head_bias` is a bias of the head. `origin` says where the weights are
    from.

    Raises ValueError or TypeError for values that do not fit, and for a misspelt name.
    Source: Choromanski et al. 2021, Appendix A.

    >>> PerformerConfig(hidden_size=128, num_attention_heads=4).head_dim
    32
    >>> PerformerConfig(hidden_size=128, num_attention_heads=6, head_dim=64).head_dim
    64
    >>> PerformerConfig.named("protein", attention="performer-positive").num_hidden_layers
    36
    """

    @classmethod
    def named(cls, size: str, **overrides: Any) -> PerformerConfig:
        """A size of the paper, with any field changed: "regular", "small" or "protein".

        (n_heads, n_layers, d_ff, d) = (8, 6, 2048, 512), (1, 6, 64, 64), (8, 36, 1024, 512).
        """
        check_choice("size", size, SIZES)
        return cls(**{**SIZES[size], **overrides})

    def __post_init__(self, **unclaimed: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            for name in ("hidden_size", "num_attention_heads"):
                check_count(name, getattr(self, name))
            self._check_divisible("hidden_size", "num_attention_heads")
            self.head_dim = self.hidden_size // self.num_attention_heads
        unclaimed = in_current_words({**unclaimed, "attention": self.attention})
        self.attention = unclaimed.pop("attention")
        super().__post_init__(**unclaimed)
        # transformers keeps attributes it does not know. One that resembles ours is a misspelling,
        # other than a further special token.
        known = [field.name for field in fields(self)]
        for name in unclaimed.keys() & vars(self).keys():
            near = difflib.get_close_matches(name, known, n=1)
            if near and not name.endswith("_token_id") and not hasattr(type(self), name):
                raise ValueError(
                    f"PerformerConfig has no field {name!r}. Did you mean {near[0]!r}?"
                )
        self.check()

    def check(self) -> None:
        """Raise for the first field that does not fit. Models call it again when they are built."""
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "max_position_embeddings",
            "num_projections",
        ):
            check_count(name, getattr(self, name))
        if self.num_decoder_layers is not None:
            check_count("num_decoder_layers", self.num_decoder_layers)
        if self.cross_attention is not None:
            check_choice("cross_attention", self.cross_attention, MECHANISMS)
        check_choice("position", self.position, POSITIONS)
        check_choice("hidden_act", self.hidden_act, ACT2FN)
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        if self.projection is not None:
            check_choice("projection", self.projection, PROJECTIONS)
        self._check_divisible("num_attention_heads", "num_key_value_heads")
        check_attention(self)
        assert self.head_dim is not None, "chosen when the config is made"
        if "rotary" in self.position and self.head_dim % 2:
            raise ValueError(
                "rotary positions turn pairs of coordinates: head_dim, hidden_size / "
                f"num_attention_heads unless given, must be even, got {self.head_dim} "
                f"(hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads})."
            )
        if "sinusoidal" in self.position and self.hidden_size % 2:
            raise ValueError(
                "sinusoidal positions are pairs of sine and cosine: hidden_size must be even, got "
                f"{self.hidden_size}."
            )
        self._check_number("hidden_dropout_prob", lowest=0.0, below=1.0)
        self._check_number("layer_norm_eps", lowest=0.0)
        self._check_number("initializer_range", lowest=0.0)
        self._check_number("kernel_epsilon", lowest=0.0)
        self._check_number("rope_theta", lowest=1.0)
        for name in (
            "tie_word_embeddings",
            "is_decoder",
            "use_cache",
            "norm_first",
            "final_norm",
            "lm_head_bias",
            "reversible",
        ):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(
                    f"{name} must be true or false, got {described(getattr(self, name))}."
                )
        if self.reversible and not self.norm_first:
            raise ValueError(
                "reversible layers must not normalize their residual path, for a norm cannot be "
                "undone: got reversible=True, norm_first=False. Take one of them alone."
            )
        check_whole_number("seed", self.seed)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
            self._check_token(name)
        if self.image_shape is not None:
            self._check_image_shape()
        elif self.position == "image":
            raise ValueError(
                "position='image' is that of bytes in an image: give the config an image_shape, "
                "[height, width, channels]."
            )
        if self.is_encoder_decoder:
            if self.reversible:
                raise ValueError(
                    "the layers of a decoder that reads an encoder are not reversible: leave "
                    "reversible=True out of a config with is_encoder_decoder=True."
                )
            check_attention(decoder_config(self))
            cross_memory(self)

    def _check_image_shape(self) -> None:
        shape = self.image_shape
        if not isinstance(shape, (list, tuple)) or len(shape) != 3:
            raise ValueError(f"image_shape must be [height, width, channels], got {shape!r}.")
        for size in shape:
            check_count("image_shape", size)

    def _check_divisible(self, whole: str, part: str) -> None:
        if getattr(self, whole) % getattr(self, part):
            raise ValueError(
                f"{part} must divide {whole}: got {getattr(self, part)} and {getattr(self, whole)}."
                + (" Or pass head_dim." if whole == "hidden_size" else "")
            )

    def _check_number(self, name: str, lowest: float, below: float = float("inf")) -> None:
        number = getattr(self, name)
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            raise TypeError(
                f"{name} must be a number, got {described(number)}. In YAML write 1.0e-5, not "
                "1e-5, which is a string there."
            )
        if not (lowest <= number < below and is_finite(number)):
            raise ValueError(
                f"{name} must be at least {lowest:g} and below {below:g}, got {described(number)}."
            )

    def _check_token(self, name: str) -> None:
        tokens = getattr(self, name)
        for token in tokens if isinstance(tokens, list) else [tokens]:
            if token is None:
                continue
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"{name} must be None or a token of the vocabulary, 0 to "
                    f"{self.vocab_size - 1}, got {described(token)}."
                )


def changed(config: PerformerConfig, **fields: Any) -> PerformerConfig:
    """A copy of the config with the fields that a model needs; the caller's own does not change."""
    config = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def decoder_config(config: PerformerConfig) -> PerformerConfig:
    """The decoder of an encoder-decoder by itself: a causal model, with ω of its own."""
    return changed(
        config,
        is_encoder_decoder=False,
        is_decoder=True,
        num_hidden_layers=config.num_decoder_layers or config.num_hidden_layers,
        seed=mixed_seed(config.seed, 1, 0),
    )
