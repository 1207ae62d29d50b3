"""What the explorer looks at: a model, how it reads what one types, and what its attention layers
were called with.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from performers.convert import capture_attention, converted_layers, load_linearized
from performers.convert.options import FAVOR
from performers.convert.source import check_source_weights, source_config, source_tokenizer
from performers.data.proteins import read_proteins
from performers.data.tokens import frame_tokens
from performers.data.vocabulary import BOS_TOKEN_ID, EOS_TOKEN_ID, TOKENS, VOCAB_SIZE, encode
from performers.diagnosis.captured import Captured
from performers.models import PerformerConfig, PerformerForCausalLM
from performers.models.layers import PerformerAttention
from performers.train.checkpoints import load_model

__all__ = ["MOST_TOKENS", "Layer", "Subject", "Vocabulary", "load_subject", "sample_subject"]

# Matrices are drawn whole, and are quadratic in the length.
MOST_TOKENS = 512

# Texts whose layers are kept, so that another head of the same text costs no pass of the model.
KEPT_TEXTS = 4

# Bovine pancreatic trypsin inhibitor, the protein of the paper's Figure 10; it is in the sample.
ACCESSION = "P00974"
# Betaine aldehyde dehydrogenase of Bacillus subtilis: long enough for near fields and costs.
LONG_ACCESSION = "P71016"

SENTENCE = (
    "Attention compares every word of a text with every other word, and a long text has many "
    "words. A Performer adds all words up to one sum, and every word reads this sum. "
)

PROMPT = "Attention compares every"

# Of a model that is made in a second and trained in another twenty.
TINY = {
    "attention": "performer-positive",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_projections": 64,
    "hidden_dropout_prob": 0.0,
    "initializer_range": 0.1,
}


@dataclass(frozen=True)
class Layer:
    """One call of self-attention, of a batch of one.

    `attend`: the output of the layer for these queries and keys and any values; None for a layer
    that attends exactly.
    """

    captured: Captured
    attend: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Vocabulary:
    """What one types as token ids, and tokens as one reads them.

    `begin`: what a sequence begins with when the model continues it. `end`: the token after which
    it is whole, if there is one. `never`: ids that are no part of a text.
    """

    encode: Callable[[str], Int64[Tensor, " length"]]
    begin: Callable[[str], Int64[Tensor, " length"]]
    token: Callable[[int], str]
    end: int | None
    never: tuple[int, ...]
    example: str
    long_example: str
    prompt: str
    separator: str

    @classmethod
    def of_proteins(cls) -> Vocabulary:
        """The vocabulary of the amino acids."""
        first = torch.tensor([BOS_TOKEN_ID])
        sample = {protein.identifier.split("|")[1]: protein for protein in read_proteins()[0]}
        return cls(
            encode=lambda text: frame_tokens(encode(_letters(text))),
            begin=lambda text: torch.cat([first, encode(_letters(text))]),
            token=lambda token: TOKENS[token],
            end=EOS_TOKEN_ID,
            never=tuple(x for x in range(4) if x != EOS_TOKEN_ID),
            example=sample[ACCESSION].sequence,
            long_example=sample[LONG_ACCESSION].sequence,
            prompt="MKTAYIAK",
            separator="",
        )

    @classmethod
    def of_tokenizer(cls, tokenizer: Any) -> Vocabulary:
        """The vocabulary of a tokenizer of transformers."""

        def ids(text: str) -> Int64[Tensor, " length"]:
            return torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64)

        def token(number: int) -> str:
            return str(tokenizer.decode([number])).strip() or "␣"

        return cls(ids, ids, token, tokenizer.eos_token_id, (), SENTENCE, SENTENCE * 8, PROMPT, " ")


class Subject:
    """A model, and what it does with a text.

    `is_sample`: the tiny model that comes with the page, which may be trained there.
    """

    def __init__(
        self, model: PreTrainedModel, vocabulary: Vocabulary, name: str, is_sample: bool = False
    ) -> None:
        self.model = model.eval()
        self.vocabulary = vocabulary
        self.name = name
        self.is_sample = is_sample
        # Pages have threads, and a model that is trained or hooked serves one at a time.
        self.lock = threading.RLock()
        self._layers: OrderedDict[str, list[Layer]] = OrderedDict()

    @property
    def description(self) -> str:
        """The model in a sentence."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        what = f"{self.name}: {type(self.model).__name__} with {count:,} parameters"
        if self.is_sample:
            return f"{what} and random weights, which the tab Generation can train."
        return f"{what}."

    @property
    def own_layers(self) -> Mapping[str, nn.Module]:
        """What computes attention in each layer that does not attend by softmax alone, by name."""
        if hasattr(self.model.config, FAVOR):
            layers = converted_layers(self.model)
            return {name: layer for name, layer in layers.items() if not layer.is_cross}
        return {
            name: module.mechanism
            for name, module in self.model.named_modules()
            if isinstance(module, PerformerAttention)
        }

    @property
    def continues(self) -> bool:
        """Whether the model writes a text on, token by token."""
        return isinstance(self.model, PerformerForCausalLM) or (
            type(self.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        )

    def forget(self) -> None:
        """The weights have changed, so what layers were called with has, too."""
        self._layers.clear()

    def tokens(self, text: str) -> Int64[Tensor, " length"]:
        """The token ids of a text that is short enough to be drawn.

        Raises ValueError for a text that is empty, too long, or of other letters.
        """
        ids = self.vocabulary.encode(text)
        most = min(MOST_TOKENS, getattr(self.model.config, "max_position_embeddings", MOST_TOKENS))
        if not text.strip() or not 2 <= len(ids) <= most:
            raise ValueError(
                f"what is looked at must have 2 to {most} tokens: got {len(ids)}. Give a shorter "
                "or longer piece of it."
            )
        return ids

    def words(self, text: str) -> list[str]:
        """The tokens of a text as one reads them."""
        return [self.vocabulary.token(token) for token in self.tokens(text).tolist()]

    def layers(self, text: str) -> list[Layer]:
        """What each layer of self-attention is called with when the model reads this text.

        Raises ValueError for a text that `tokens` refuses, and for a model without such layers.
        """
        with self.lock:
            if text not in self._layers:
                self._layers[text] = self._read(self.tokens(text)[None])
                while len(self._layers) > KEPT_TEXTS:
                    self._layers.popitem(last=False)
            return self._layers[text]

    def _read(self, input_ids: Int64[Tensor, "one length"]) -> list[Layer]:
        modules = self.own_layers
        if modules:
            # What is read with a cache goes through its memories, past the layers' forward.
            uncached = {"use_cache": False} if self.continues else {}
            layers = _called_with(modules, partial(self.model, input_ids=input_ids, **uncached))
        else:
            captured = capture_attention(self.model, input_ids=input_ids)
            layers = [Layer(call, None) for call in captured]
        layers = [x for x in layers if x.captured.query.shape[2] == x.captured.key.shape[2]]
        if not layers:
            raise ValueError(
                f"{type(self.model).__name__} must have a layer of self-attention to look at, and "
                "has none. Give a Performer, a model of transformers, or one that was converted."
            )
        return layers


@torch.no_grad()
def _called_with(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> list[Layer]:
    """What these mechanisms are called with while the model runs."""
    layers: list[Layer] = []

    def keep(name: str, module: nn.Module, given: tuple[Tensor, ...], options: Any) -> None:
        query, key, value = (x.detach() for x in given)
        # `forward`, which calls no hooks.
        attend = partial(_attend, module.forward, query, key, options)
        captured = Captured(
            name, query, key, value, options.get("scale"), options.get("is_causal", False)
        )
        layers.append(Layer(captured, attend))

    handles = [
        module.register_forward_pre_hook(partial(keep, name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return layers


def _attend(
    forward: Callable[..., Tensor],
    query: Float[Tensor, "batch heads length dim"],
    key: Float[Tensor, "batch key_heads length dim"],
    options: Mapping[str, Any],
    value: Float[Tensor, "batch key_heads length columns"],
) -> Float[Tensor, "batch heads length columns"]:
    return forward(query, key, value, **options)


def sample_subject() -> Subject:
    """A tiny causal Performer with random weights, for proteins."""
    torch.manual_seed(0)
    config = PerformerConfig(
        **TINY,
        vocab_size=VOCAB_SIZE,
        pad_token_id=0,
        bos_token_id=BOS_TOKEN_ID,
        eos_token_id=EOS_TOKEN_ID,
        is_decoder=True,
    )
    model = PerformerForCausalLM(config)
    return Subject(model, Vocabulary.of_proteins(), "a tiny Performer", is_sample=True)


def load_subject(source: str | Path) -> Subject:
    """A run, a Performer, a model of transformers or a converted one, from a folder.

    Raises FileNotFoundError where there is no model, ValueError for one that is damaged, or that
    has another vocabulary than that of proteins and no tokenizer.
    """
    folder = Path(source)
    if (folder / "model").is_dir():
        folder = folder / "model"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}. Give a run of performers train or a folder that "
            "save_pretrained wrote, or nothing, for a tiny model of proteins."
        )
    config = source_config(folder)
    if isinstance(config, PerformerConfig):
        model = load_model(folder)[0]
        if config.vocab_size != VOCAB_SIZE:
            return Subject(model, Vocabulary.of_tokenizer(source_tokenizer(folder)), str(source))
        return Subject(model, Vocabulary.of_proteins(), str(source))
    if config.is_encoder_decoder:
        raise ValueError(
            f"{folder} must hold an encoder or a decoder, and holds an encoder-decoder. Save one "
            "of its parts, with model.get_encoder().save_pretrained(...)."
        )
    vocabulary = Vocabulary.of_tokenizer(source_tokenizer(folder))
    check_source_weights(folder)
    architecture = (config.architectures or [""])[0]
    is_causal = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    auto_class: Any = AutoModelForCausalLM if is_causal else AutoModel
    if hasattr(config, FAVOR):
        return Subject(load_linearized(auto_class, folder), vocabulary, str(source))
    return Subject(auto_class.from_pretrained(folder), vocabulary, str(source))


def _letters(text: str) -> str:
    """A protein without the white space and the header of a FASTA record."""
    lines = [line for line in text.splitlines() if not line.startswith(">")]
    return "".join("".join(lines).split())
