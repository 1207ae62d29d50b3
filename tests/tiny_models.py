"""Tiny models of transformers with random weights, and inputs with padding for them."""

import torch
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

WORDS = 97
LENGTH = 13
TINY = {"vocab_size": WORDS, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDTH = {"hidden_size": 32, "intermediate_size": 48}
# Weights far from 0, so that attention is far from uniform.
LARGE = {"initializer_range": 0.3}
# Of a Performer or a BERT that draws no dropout.
SIZES = {**TINY, **WIDTH, **LARGE, "hidden_dropout_prob": 0.0}


def bert(**changes) -> BertModel:
    return BertModel(BertConfig(**TINY, **WIDTH, **LARGE, **changes)).eval()


def llama(**changes) -> LlamaForCausalLM:
    sizes = TINY | WIDTH | LARGE | {"num_key_value_heads": 2} | changes
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def gpt2() -> GPT2Model:
    tokens = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, **LARGE, **tokens)
    return GPT2Model(config).eval()


def bart() -> BartModel:
    sizes = {
        f"{side}_{size}": number
        for side in ("encoder", "decoder")
        for size, number in {"layers": 2, "ffn_dim": 48, "attention_heads": 4}.items()
    }
    return BartModel(BartConfig(vocab_size=WORDS, d_model=32, init_std=0.3, **sizes)).eval()


def vit() -> ViTModel:
    sizes = TINY | WIDTH | LARGE | {"image_size": 12, "patch_size": 4}
    sizes.pop("vocab_size")
    return ViTModel(ViTConfig(**sizes)).eval()


MODELS = {"BERT": bert, "GPT-2": gpt2, "Llama": llama, "BART": bart, "ViT": vit}


def inputs_for(model: PreTrainedModel, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Two inputs; of text, the first is padded on the left and the second on the right."""
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.randn(2, 3, size, size)}
    ids = torch.randint(5, WORDS - 5, (2, length))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids[:, :11], "decoder_attention_mask": mask[:, :11]}
    return inputs


def outputs_of(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model says at the positions that are no padding."""
    given = model(**inputs)
    out = given.logits if "logits" in given else given.last_hidden_state
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    return out if mask is None else out[mask.bool()]
