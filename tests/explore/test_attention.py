"""What the tab of attention shows is what the model computes."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from performers import PerformerConfig, PerformerForCausalLM, PerformerForMaskedLM
from performers.convert import FavorOptions, linearize
from performers.data.vocabulary import VOCAB_SIZE
from performers.explore import Subject, load_subject
from performers.explore.attention import IN_PLACE, OWN, _example, look, matrices
from performers.explore.subject import Vocabulary

# Reading the sample costs a second.
VOCABULARY = Vocabulary.of_proteins()

PROTEIN = "MKTAYIAKQRQISFVKSHF"


def performer(attention, model_class=PerformerForCausalLM, **options):
    config = PerformerConfig(
        vocab_size=VOCAB_SIZE, attention=attention, hidden_size=12, num_hidden_layers=2,
        num_attention_heads=3, intermediate_size=13, num_projections=7, initializer_range=0.5,
        **options,
    )  # fmt: skip
    return Subject(model_class(config), VOCABULARY, "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of words, with its tokenizer."""
    words = ["[UNK]", "[PAD]", "to", "be", "or", "not"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("bert")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=6, hidden_size=12, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=13, max_position_embeddings=23, initializer_range=0.5,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("attention", "model_class"),
    [("performer-positive", PerformerForCausalLM), ("local", PerformerForMaskedLM)],
)
def test_the_implied_matrix_is_the_one_that_the_model_itself_gives(attention, model_class):
    subject = performer(attention, model_class)
    ids = subject.tokens(PROTEIN)[None]
    options = {"use_cache": False} if subject.continues else {}
    with torch.no_grad():
        given = subject.model(input_ids=ids, output_attentions=True, **options).attentions
    for number, layer in enumerate(subject.layers(PROTEIN)):
        for head in range(3):
            found = matrices(layer, head, OWN, 64, 0)
            torch.testing.assert_close(found.implied, given[number][0, head])


def test_a_model_that_attends_exactly_implies_the_exact_matrix():
    for layer in performer("exact").layers(PROTEIN):
        found = matrices(layer, 2, OWN, 64, 0)
        assert found.distance < 1e-5
        assert matrices(layer, 2, "positive", 5, 0).distance > 0.01


def test_the_exact_matrix_is_softmax_of_the_same_queries_and_keys():
    layer = performer("performer-positive").layers(PROTEIN)[1]
    query, key = layer.captured.query[0, 1], layer.captured.key[0, 1]
    logits = query @ key.T / 2  # the root of a dim of 4
    future = torch.ones_like(logits).triu(1).bool()
    expected = logits.masked_fill(future, -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(matrices(layer, 1, OWN, 64, 0).exact, expected)


@pytest.mark.parametrize("features", IN_PLACE)
def test_a_near_field_of_the_whole_text_in_a_layers_place_is_exact(folder, features):
    subject = load_subject(folder)
    for layer in (*subject.layers("to be or not to be"), *performer("exact").layers(PROTEIN)):
        assert matrices(layer, 1, features, 16, 32).distance < 1e-5
        assert matrices(layer, 1, features, 16, 0).distance > 1e-3


def test_the_layers_of_a_converted_model_imply_what_the_same_options_do_in_their_place(folder):
    exact, converted = load_subject(folder), load_subject(folder)
    options = FavorOptions(num_projections=7, features="positive", window_size=0)
    linearize(converted.model, options)
    text = "not to be or to"
    own = matrices(converted.layers(text)[0], 2, OWN, 64, 0)
    in_place = matrices(exact.layers(text)[0], 2, "positive", 7, 0)
    torch.testing.assert_close(own.implied, in_place.implied)
    torch.testing.assert_close(own.exact, in_place.exact)
    assert len(converted.layers(text)) == 2


def test_a_converted_model_is_opened_as_it_was_saved(folder, tmp_path):
    before = load_subject(folder)
    linearize(before.model, FavorOptions(num_projections=7, window_size=0))
    before.model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    after = load_subject(tmp_path)
    for old, new in zip(before.layers("to be or"), after.layers("to be or"), strict=True):
        found = matrices(old, 0, OWN, 64, 0), matrices(new, 0, OWN, 64, 0)
        torch.testing.assert_close(found[0].implied, found[1].implied)


def test_what_is_read_once_is_kept_until_the_weights_change():
    subject = performer("performer-relu")
    layers = subject.layers(PROTEIN)
    assert subject.layers(PROTEIN) is layers
    subject.forget()
    assert subject.layers(PROTEIN) is not layers


def test_a_protein_is_read_with_or_without_the_header_and_lines_of_fasta():
    tokens = performer("exact").tokens
    assert torch.equal(
        tokens(f">sp|P1|NAME A protein\n{PROTEIN[:7]}\n{PROTEIN[7:]}"), tokens(PROTEIN)
    )


def test_the_page_says_where_it_looks_and_how_far_apart_the_rows_are():
    subject = performer("performer-positive")
    whole, row, sentence = look(subject, PROTEIN, 1, 3, OWN, 64, 0, picked=5, first=2, last=999)
    distance = matrices(subject.layers(PROTEIN)[1], 2, OWN, 64, 0).distance
    assert "layers.1.attention, head 3 of 3**: 21 tokens" in sentence
    assert f"differ by {distance:.3f} on average" in sentence
    assert whole.count("<img") == row.count("<img") == 1
    assert "What A at position 5 attends to" in row  # <bos> is position 1


def test_the_page_says_where_a_near_field_holds_the_whole_text_and_begins_with_another():
    near, far = (performer("performer-positive", window_size=size) for size in (64, 7))
    for subject, text in ((near, VOCABULARY.long_example), (far, VOCABULARY.example)):
        assert _example(subject) == text
        _, _, sentence = look(subject, PROTEIN, 0, 1, OWN, 64, 0, picked=5, first=1, last=21)
        assert ("equal up to rounding" in sentence) == (subject is near)
    few = performer("performer-positive", window_size=64, position="learned")
    few.model.config.max_position_embeddings = 200
    assert _example(few) == VOCABULARY.example


@pytest.mark.usefixtures("without_shape_checks")
class TestRefusals:
    def test_a_layer_that_attends_exactly_has_no_matrix_of_its_own(self, folder):
        layer = load_subject(folder).layers("to be")[0]
        with pytest.raises(ValueError, match="attends exactly: there is nothing of its own"):
            matrices(layer, 0, OWN, 64, 0)

    @pytest.mark.parametrize(("text", "count"), [("", 2), (" ", 2), ("M" * 511, 513)])
    def test_a_text_is_neither_empty_nor_too_long_to_be_drawn(self, text, count):
        with pytest.raises(ValueError, match=f"must have 2 to 512 tokens: got {count}"):
            performer("exact").layers(text)

    def test_a_text_is_no_longer_than_the_models_positions(self, folder):
        with pytest.raises(ValueError, match="2 to 23 tokens: got 24"):
            load_subject(folder).layers("to be or not " * 6)

    def test_a_letter_that_is_no_amino_acid_is_named(self):
        with pytest.raises(ValueError, match="got '1' at position 3"):
            performer("exact").layers("MK1")

    def test_a_folder_that_is_not_there_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
            load_subject(tmp_path / "nowhere")

    def test_a_model_of_another_vocabulary_needs_its_tokenizer(self, tmp_path):
        config = PerformerConfig(
            vocab_size=50, hidden_size=12, num_hidden_layers=1, num_attention_heads=3,
        )  # fmt: skip
        PerformerForCausalLM(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="must hold a whole tokenizer"):
            load_subject(tmp_path)
