"""The tab of generation: a model writes token by token, and what it remembers does not grow."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from transformers.cache_utils import Cache, DynamicCache

from performers.checks import check_count, check_number, check_seed
from performers.convert.options import FAVOR
from performers.convert.saved_states import new_cache
from performers.explore.parts import picture, progress, stoppable
from performers.explore.practice import SECONDS, train
from performers.explore.subject import Subject
from performers.models import PerformerForCausalLM
from performers.models.memory import LinearMemory, SideBySide
from performers.models.naming import CACHE
from performers.viz.explorer import memory_figure

__all__ = ["Written", "exact_bytes", "generation_tab", "remembered_bytes", "write"]

# A picture costs more than a token, so there is one for so many tokens.
TOKENS_PER_PICTURE = 25


@dataclass(frozen=True)
class Written:
    """A text so far. `read`: tokens that the model has taken in, those of the prompt included.

    `remembered`: bytes of the model's memory. `exact`: those of the keys and values that exact
    attention would keep instead.
    """

    words: tuple[str, ...]
    read: int
    remembered: int
    exact: int


@torch.no_grad()
def write(
    subject: Subject, prompt: str, length: int, temperature: float, seed: int
) -> Iterator[Written]:
    """Let the model write at most `length` tokens after the prompt, one at a time.

    `temperature`: 0 always takes the likeliest token.

    Raises ValueError for a model that is not causal, a prompt without tokens, and numbers out of
    range.
    """
    model, vocabulary = subject.model, subject.vocabulary
    if not subject.continues:
        raise ValueError(
            f"a model that writes must be causal, and {type(model).__name__} is not. Open a causal "
            "one, for example that of performers train protein-clm."
        )
    check_count("length", length)
    check_seed(seed)
    check_number("temperature", temperature, or_zero=True)
    new = vocabulary.begin(prompt)[None]
    if not new.numel():
        raise ValueError("a prompt must have at least one token for this model, got none.")
    generator, cache = Generator().manual_seed(seed), _new_cache(subject)
    words: list[str] = []
    read = 0
    for _ in range(length):
        with subject.lock:
            logits = model(input_ids=new, **{CACHE: cache}, use_cache=True).logits[0, -1]
        read += new.shape[1]
        logits[list(vocabulary.never)] = -torch.inf
        token = logits.argmax()[None]
        if temperature:
            token = (logits / temperature).softmax(dim=0).multinomial(1, generator=generator)
        if int(token) == vocabulary.end:
            break
        words.append(vocabulary.token(int(token)))
        yield Written(tuple(words), read, remembered_bytes(cache), exact_bytes(subject, read))
        new = token[None]


def remembered_bytes(cache: Cache) -> int:
    """Bytes of the states, or keys and values, of all layers."""
    return sum(map(_bytes, cache.layers))


def exact_bytes(subject: Subject, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens, in the dtype of the model."""
    config = subject.model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = next(subject.model.parameters()).element_size()
    return 2 * config.num_hidden_layers * heads * dim * size * tokens


def _new_cache(subject: Subject) -> Cache:
    own = isinstance(subject.model, PerformerForCausalLM)
    if own or hasattr(subject.model.config, FAVOR):
        return new_cache(subject.model)
    return DynamicCache(config=subject.model.config)


def _bytes(memory: Any) -> int:
    """Of one layer of a cache."""
    if isinstance(memory, SideBySide):
        return sum(map(_bytes, memory.memories))
    if isinstance(memory, LinearMemory):
        return 0 if memory.state is None else sum(x.nbytes for x in memory.state.parts().values())
    kept = (getattr(memory, name, None) for name in ("keys", "values"))
    return sum(x.nbytes for x in kept if isinstance(x, Tensor))


def shown(
    subject: Subject, prompt: str, length: int, temperature: float, seed: int
) -> Iterator[tuple[str, str, str]]:
    """A bar, the text so far, and from time to time the picture of what is remembered."""
    tokens: list[int] = []
    sizes: dict[str, list[float]] = {"this model": [], "keys and values": []}
    text, drawn = "", ""

    def draw() -> str:
        return picture(
            f"Kilobytes remembered after {tokens[-1]} tokens: {sizes['this model'][-1] / 1024:.0f} "
            f"by this model, {sizes['keys and values'][-1] / 1024:.0f} as keys and values.",
            memory_figure,
            tokens,
            sizes,
        )

    for count, written in enumerate(write(subject, prompt, length, temperature, seed), 1):
        tokens.append(written.read)
        sizes["this model"].append(float(written.remembered))
        sizes["keys and values"].append(float(written.exact))
        new = html.escape(subject.vocabulary.separator.join(written.words))
        text = f'<p class="written">{html.escape(prompt)}<b>{new}</b></p>'
        if count % TOKENS_PER_PICTURE == 1:
            drawn = draw()
        yield progress(count, length, f"{count} tokens are written"), text, drawn
    if not tokens:
        yield progress(1, 1, "the model ends the text at once"), "", ""
        return
    yield progress(1, 1, f"done: {len(tokens)} tokens are written"), text, draw()


def generation_tab(gr: Any, subject: Subject) -> None:
    """Lay out the tab, on a page that is being built."""
    gr.Markdown(
        "A causal Performer reads and writes with a state of constant size, where exact attention "
        "keeps the key and the value of every token."
    )
    if subject.is_sample:
        with gr.Accordion("Train this model, whose weights are random", open=True):
            seconds = gr.Slider(
                5, 120, SECONDS, step=5, label="seconds, on the proteins that come with the package"
            )
            with gr.Row():
                begin = gr.Button("Train it")
                end = gr.Button("Stop training")
            lesson = gr.HTML(elem_id="training-bar")
        stoppable(begin, end, partial(train, subject), [seconds], [lesson])
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            prompt = gr.Textbox(subject.vocabulary.prompt, label="prompt", elem_id="prompt")
            length = gr.Slider(10, 1000, 200, step=10, label="tokens at most")
            temperature = gr.Slider(0, 2, 1, step=0.1, label="temperature")
            seed = gr.Number(0, label="seed", precision=0, minimum=0)
            start = gr.Button("Write", variant="primary")
            stop = gr.Button("Stop writing")
        with gr.Column(scale=3, min_width=280):
            outputs = [
                gr.HTML(elem_id="writing-bar"),
                gr.HTML(elem_id="written"),
                gr.HTML(elem_id="memory"),
            ]
    controls = [prompt, length, temperature, seed]
    stoppable(start, stop, partial(shown, subject), controls, outputs)
