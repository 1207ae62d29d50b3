"""The fields of a `PerformerConfig`, for those who read them: mechanisms and positions."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from performers.models.naming import CACHE

__all__ = ["PerformerFields"]


class PerformerFields(PreTrainedConfig):
    """What `PerformerConfig` says and checks. It looks words up in the tables of mechanisms and
    positions, whose rows take these fields.
    """

    model_type = "performer"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [CACHE]

    vocab_size: int = 32
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 2048
    max_position_embeddings: int = 8192
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    is_decoder: bool = False
    use_cache: bool = True
    num_decoder_layers: int | None = None
    decoder_start_token_id: int | None = None
    cross_attention: str | None = None
    image_shape: list[int] | None = None

    attention: str | dict[str, int] | list[str | dict[str, int]] = "performer-relu"
    attention_options: dict[str, Any] | None = None
    num_projections: int = 256
    projection: str | None = "orthogonal"
    distribution: str = "gaussian"
    kernel_epsilon: float = 1e-3
    window_size: int | None = None
    seed: int = 0
    position: str = "rotary"
    rope_theta: float = 10000.0
    reversible: bool = False

    norm_first: bool = True
    final_norm: bool = True
    lm_head_bias: bool = False
    dialect: dict[str, Any] | None = None
    origin: dict[str, Any] | None = None
