"""generate(): every way to write, and every way to come to the same text."""

import pytest
import torch
from behavior_table import GENERATING, LENGTH, NAMES, Refused, behavior
from torch.nn import functional as F
from transformers import PreTrainedModel, TextStreamer
from transformers.generation import StoppingCriteria

from performers import FavorCache
from performers.models import PerformerCache

SECTION = "Generation"
CANNOT_WRITE = {name: "does not generate" for name in NAMES if name not in GENERATING}
NEW = 5
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 7, "top_p": 0.9, "temperature": 0.7},
    "beams": {"do_sample": False, "num_beams": 3, "length_penalty": 2.0},
    "sampled beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "processors": {"do_sample": False, "repetition_penalty": 1.2, "bad_words_ids": [[9, 7]]},
}


def everywhere(*refusal: object) -> dict[str, Refused]:
    return dict.fromkeys(GENERATING, Refused(*refusal))


CANNOT_FORGET = everywhere(
    "a linear state sums over all tokens and cannot give the last ones back; converted models do "
    "it from all keys, with a DynamicCache",
    NotImplementedError,
    "cannot give the last ones back",
)
FIXED_LENGTH = everywhere(
    "FAVOR+ would count the empty places of a cache of fixed length; the state has a fixed size "
    "as it is",
    ValueError,
    "cache_implementation=",
)
NO_KEYS = everywhere(
    "the matrix needs the keys of the whole sequence, and a state does not keep them; with "
    "`use_cache=False` it is given",
    ValueError,
    "needs the keys of the whole sequence",
)


def written(model: PreTrainedModel, tokens: torch.Tensor, **options):
    torch.manual_seed(29)
    given = {"attention_mask": torch.ones_like(tokens), "eos_token_id": None, "pad_token_id": 0}
    return model.generate(tokens, max_new_tokens=NEW, **given | {"do_sample": False} | options)


def tokens_of(subject) -> torch.Tensor:
    return subject.inputs()["input_ids"]


def cache_of(subject, model):
    return (FavorCache if subject.is_converted else PerformerCache)(model.config)


@pytest.mark.parametrize("mode", MODES)
@behavior(SECTION, "every mode writes the same with a cache and without", without=CANNOT_WRITE)
def test_modes(subject, mode):
    model, tokens = subject.model(), tokens_of(subject)
    cached = written(model, tokens, **MODES[mode])
    assert torch.equal(cached, written(model, tokens, **MODES[mode], use_cache=False))
    rows = 3 * MODES[mode].get("num_return_sequences", 1)
    assert cached.shape == (rows, LENGTH + NEW)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
@behavior(SECTION, "scores, logits and hidden states of each step", without=CANNOT_WRITE)
def test_dictionaries(subject, mode):
    asked = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    model, tokens = subject.model(), tokens_of(subject)
    out = written(model, tokens, **asked, output_hidden_states=True, **MODES[mode])
    rows = 3 * MODES[mode].get("num_beams", 1)
    assert len(out.scores) == len(out.logits) == len(out.hidden_states) == NEW
    assert out.logits[0].shape[1] == 97
    assert [states[0].shape[:2] for states in out.hidden_states] == [
        (rows, LENGTH if step == 0 else 1) for step in range(NEW)
    ]
    assert out.past_key_values.get_seq_length() == LENGTH + NEW - 1


@behavior(SECTION, "attentions of each step, from a state", NO_KEYS, CANNOT_WRITE)
def test_attentions(subject):
    asked = {"return_dict_in_generate": True, "output_attentions": True}
    written(subject.model(), tokens_of(subject), **asked)


@behavior(SECTION, "attentions of each step, without a cache", without=CANNOT_WRITE)
def test_attentions_without_a_cache(subject):
    asked = {"return_dict_in_generate": True, "output_attentions": True, "use_cache": False}
    out = written(subject.model(), tokens_of(subject), **asked)
    lengths = range(LENGTH, LENGTH + NEW)
    assert [step[0].shape for step in out.attentions] == [(3, 4, n, n) for n in lengths]


@behavior(SECTION, "from nothing but the first token", without=CANNOT_WRITE)
def test_without_input(subject):
    model = subject.model()
    out = model.generate(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 1 + NEW)
    assert out[0, 0] == model.config.bos_token_id


@behavior(SECTION, "inputs_embeds of a prompt write what its tokens write", without=CANNOT_WRITE)
def test_from_embeddings(subject):
    model, tokens = subject.model(), tokens_of(subject)
    embeddings = model.get_input_embeddings()(tokens)
    for mode in ("greedy", "beams"):
        torch.manual_seed(29)
        out = model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
            **MODES[mode],
        )
        assert torch.equal(out, written(model, tokens, **MODES[mode])[:, LENGTH:])


@behavior(SECTION, "padding on the left changes nothing that is written", without=CANNOT_WRITE)
def test_padding(subject):
    model, tokens = subject.model(), tokens_of(subject)
    padded = F.pad(tokens, (4, 0), value=7)
    mask = F.pad(torch.ones_like(tokens), (4, 0))
    for mode in ("greedy", "beams"):
        out = written(model, padded, attention_mask=mask, **MODES[mode])
        assert torch.equal(out[:, -NEW:], written(model, tokens, **MODES[mode])[:, -NEW:])


@behavior(SECTION, "a cache continues where it stopped", without=CANNOT_WRITE)
def test_continuing(subject):
    model, tokens = subject.model(), tokens_of(subject)
    whole = written(model, tokens)
    cache = cache_of(subject, model)
    options = {"eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    first = model.generate(tokens, max_new_tokens=2, past_key_values=cache, **options)
    rest = model.generate(first, max_new_tokens=NEW - 2, past_key_values=cache, **options)
    assert torch.equal(rest, whole)


@behavior(SECTION, "a prompt in chunks is the prompt at once", without=CANNOT_WRITE)
def test_chunks(subject):
    model, tokens = subject.model(), tokens_of(subject)
    assert torch.equal(written(model, tokens, prefill_chunk_size=4), written(model, tokens))


@behavior(SECTION, "position_ids may be given", without=CANNOT_WRITE)
def test_positions(subject):
    model, tokens = subject.model(), tokens_of(subject)
    positions = torch.arange(LENGTH).expand(3, -1)
    assert torch.equal(written(model, tokens, position_ids=positions), written(model, tokens))


@behavior(SECTION, "rows of a cache can be chosen, reordered and repeated", without=CANNOT_WRITE)
def test_rows(subject):
    model, tokens = subject.model(), tokens_of(subject)
    whole = model(tokens, use_cache=False).logits[:, -1]
    changes = {
        (2, 0): lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
        (2, 0, 0): lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
        (0, 0, 1, 1, 2, 2): lambda cache: cache.batch_repeat_interleave(2),
    }
    for rows, change in changes.items():
        cache = cache_of(subject, model)
        model(tokens[:, :-1], past_key_values=cache)
        change(cache)
        out = model(tokens[list(rows), -1:], past_key_values=cache).logits[:, -1]
        torch.testing.assert_close(out, whole[list(rows)], rtol=1e-3, atol=1e-3)


@behavior(SECTION, "streamers and stopping criteria see each token", without=CANNOT_WRITE)
def test_streaming(subject):
    class Words:
        seen: list[int]

        def decode(self, ids, **options) -> str:
            self.seen = [int(i) for i in ids]
            return ""

    class AfterThree(StoppingCriteria):
        def __call__(self, ids, scores, **options):
            return torch.full((len(ids),), ids.shape[1] >= LENGTH + 3)

    words, model, tokens = Words(), subject.model(), tokens_of(subject)[:1]
    out = written(model, tokens, streamer=TextStreamer(words, skip_prompt=True))
    assert words.seen == out[0, LENGTH:].tolist()
    stopped = written(model, tokens, stopping_criteria=[AfterThree()])
    assert torch.equal(stopped, out[:, : LENGTH + 3])


@behavior(SECTION, "the last token of a text is eos", without=CANNOT_WRITE)
def test_ends(subject):
    model, tokens = subject.model(), tokens_of(subject)[:1]
    text = written(model, tokens)[0]
    end = text[LENGTH + 2].item()
    first = (text[LENGTH:] == end).nonzero()[0].item()
    out = written(model, tokens, eos_token_id=end)
    assert torch.equal(out[0], text[: LENGTH + first + 1])


@behavior(SECTION, "an assistant drafts tokens, from a state", CANNOT_FORGET, CANNOT_WRITE)
def test_assistant(subject):
    model = subject.model()
    written(model, tokens_of(subject)[:1], assistant_model=model)


@behavior(SECTION, "tokens are drafted from the prompt, from a state", CANNOT_FORGET, CANNOT_WRITE)
def test_prompt_lookup(subject):
    written(subject.model(), tokens_of(subject)[:1], prompt_lookup_num_tokens=3)


@behavior(SECTION, "a cache is cropped", CANNOT_FORGET, CANNOT_WRITE)
def test_cropping(subject):
    model = subject.model()
    cache = cache_of(subject, model)
    model(tokens_of(subject), past_key_values=cache)
    cache.crop(-2)


@behavior(SECTION, "a cache of fixed length", FIXED_LENGTH, CANNOT_WRITE)
def test_static_cache(subject):
    written(subject.model(), tokens_of(subject), cache_implementation="static")


@behavior(SECTION, "a forward pass that is compiled whole writes the same", without=CANNOT_WRITE)
@pytest.mark.slow
def test_compiled(subject):
    model, tokens = subject.model(), tokens_of(subject)
    expected = written(model, tokens)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(written(model, tokens), expected)
