"""Records side by side are what they are one by one."""

import pytest
import torch
from tiny_models import bert, llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from performers.convert.sequences import Sequences, text_windows

NAMES = ["[PAD]", "[UNK]", *(f"w{n}" for n in range(2, 90))]


@pytest.fixture(params=[None, "[PAD]"])
def tokenizer(request):
    words = Tokenizer(models.WordLevel({name: n for n, name in enumerate(NAMES)}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token=request.param)


@pytest.mark.parametrize("build", [bert, llama])
@torch.no_grad()
def test_a_padded_record_gives_what_it_gives_alone(build, tokenizer):
    model = build()
    numbers = [torch.randint(5, 90, (n,)).tolist() for n in (13, 5, 19, 7, 11)]
    records = [(" ".join(NAMES[n] for n in row),) for row in numbers]
    found = Sequences.of(tokenizer, records, length=17)
    assert found.lengths.tolist() == [13, 5, 17, 7, 11]  # the third is cut off
    batches = found.batches(2)
    assert [batch["input_ids"].shape for batch in batches] == [(2, 13), (2, 17), (1, 11)]
    for number, row in enumerate(numbers):
        batch, place = batches[number // 2], number % 2
        out = model(**batch)[0][place, : len(row[:17])]
        alone = model(input_ids=torch.tensor([row[:17]]))[0][0]
        torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-4)


def test_the_longest_records_are_cut_to_one_length_and_have_no_padding(tokenizer):
    records = [(" ".join(NAMES[5 : 5 + n]),) for n in (3, 13, 7, 11)]
    rows = Sequences.of(tokenizer, records, length=50).longest(2)
    assert rows.tolist() == [list(range(5, 16))] * 2


def test_windows_of_a_text_are_full(tokenizer):
    found = Sequences.of(tokenizer, " ".join(NAMES[5:36]), length=7)
    assert list(found.inputs) == ["input_ids"]
    assert found.inputs["input_ids"].flatten().tolist() == list(range(5, 33))
    assert found.lengths.tolist() == [7] * 4
    assert found[1:3].batches(1)[1]["input_ids"].tolist() == [list(range(19, 26))]


def test_a_tokenizer_that_is_written_in_python_cuts_a_text_into_the_same_windows():
    tokenizer, text = ByT5Tokenizer(), "Dž und 語, " * 9
    rows = text_windows(tokenizer, text, 11)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert rows[:, :-1].flatten().tolist() == tokens[: len(rows) * 10]
    assert (rows[:, -1] == tokenizer.eos_token_id).all()
    assert len(rows) == len(tokens) // 10
    with pytest.raises(ValueError, match="the text must have at least 999 tokens, got "):
        text_windows(tokenizer, text, 999)
