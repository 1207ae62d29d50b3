"""A run that starts from a model folder trains it in every layout as one process does."""

import json
import random
import shutil

import pytest
import torch
import yaml
from laid_out_runs import check_equal, trained
from tiny_models import SIZES, bert, llama
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
)

from performers import FavorOptions, calibrate, linearize, load_linearized
from performers.convert import converted_layers
from performers.data.masking import MaskedCollator
from performers.data.vocabulary import VOCAB_SIZE
from performers.planning.workload import workload_of
from performers.train import Evaluation, Generation, Run, load_config, results_table
from performers.train.checkpoints import last_whole_checkpoint
from performers.train.layout import Layout
from performers.train.trained import Trained
from performers.viz import write_report

WORDS = [f"w{number}" for number in range(83)]
# Not where proteins have them: padding is not 0, and the mask comes last, as in RoBERTa.
SPECIAL = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}


def tokenizer():
    names = ["<s>", "<pad>", "</s>", *WORDS, "<mask>"]
    whole = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    whole.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=whole, **SPECIAL)


def text_of(words, seed=0):
    """Each word tells the next one, most of the time."""
    draw = random.Random(seed)
    found = [0]
    for _ in range(words - 1):
        found.append((7 * found[-1] + 3) % 83 if draw.random() < 0.8 else draw.randrange(83))
    return " ".join(WORDS[i] for i in found)


def masked_bert(**changes):
    config = BertConfig(**SIZES | changes, attention_probs_dropout_prob=0.0)
    return BertForMaskedLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models by what they are, and a text."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    (place / "book.txt").write_text(text_of(1480))
    for name, model in {
        "llama": llama(vocab_size=89, initializer_range=0.1),
        "bert": masked_bert(),
        "bert of proteins": masked_bert(vocab_size=VOCAB_SIZE),
        "encoder": bert(),
    }.items():
        model.save_pretrained(place / name)
        tokenizer().save_pretrained(place / name)
    model = linearize(llama(), FavorOptions(num_projections=7, window_size=4))
    calibrate(model, [{"input_ids": torch.randint(5, 80, (4, 31))}])
    model.save_pretrained(place / "converted")
    tokenizer().save_pretrained(place / "converted")
    return place


TRAINER = {
    "max_steps": 5,
    "per_device_train_batch_size": 12,
    "per_device_eval_batch_size": 4,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "eval_steps": 3,
    "save_steps": 3,
    "use_cpu": True,
    "disable_tqdm": True,
}


def config_of(folder, name, fasta=None, **changes):
    data = {"text": str(folder / "book.txt"), "length": 22}
    options = {"window_size": 4, "num_projections": 7, "num_sinks": 1}
    if fasta is not None:
        data = {"source": str(fasta), "length": 31, "test_fraction": 0.09}
        options |= {"window_size": 0, "num_sinks": None}
    start = {"model": str(folder / name)}
    if name != "converted":
        start["options"] = options
    return {
        "task": "masked-lm" if "bert" in name else "causal-lm",
        "seed": 5,
        "redraw_every": 2,
        "pretrained": start,
        "data": data,
        "trainer": TRAINER,
        **changes,
    }


def test_a_shipped_config_trains_a_model_folder_on_text_by_overrides_alone(folder):
    start, text = f"pretrained.model={folder / 'llama'}", f"data.text={folder / 'book.txt'}"
    config = load_config(
        "demo", [start, text, "data.length=22", "pretrained.options.window_size=4"]
    )
    assert config.pretrained.model == str(folder / "llama")
    assert (config.model, config.compare) == ({}, [])
    assert (config.data.text, config.data.concatenate) == (str(folder / "book.txt"), False)
    for kept in ("compare=[exact]", "model.hidden_size=12", "data.concatenate=true"):
        with pytest.raises(ValueError, match=r"pretrained\.model|two (sections )?out"):
            load_config("demo", [start, text, "data.length=22", kept])


def written(tree, path):
    path.write_text(yaml.safe_dump(tree))
    return path


def forget_the_end(folder):
    """As if the run had been interrupted after its first checkpoint."""
    for file in ("metrics.json", "result.json"):
        (folder / file).unlink()
    shutil.rmtree(last_whole_checkpoint(folder / "checkpoints"))
    assert last_whole_checkpoint(folder / "checkpoints").name == "checkpoint-3"


HALF = "trainer.per_device_train_batch_size=6"
LAYOUTS = {
    "copies": (2, [HALF]),
    "pieces": (2, ["split_sequences=2"]),
    "shares": (2, ["shard_weights=true", HALF]),
    "heads": (2, ["shard_heads=2"]),
}


@pytest.mark.slow
@pytest.mark.timeout(900)  # seven runs
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", ["llama", "converted", "bert", "bert of proteins"])
def test_every_layout_of_a_pretrained_model_trains_and_resumes_to_the_numbers_of_one_process(
    name, folder, fasta, tmp_path
):
    tree = config_of(folder, name, fasta if "proteins" in name else None)
    path = written(tree, tmp_path / "run.yaml")
    expected = trained(path, tmp_path / "one")
    layouts = {k: v for k, v in LAYOUTS.items() if "bert" not in name or k != "heads"}
    for layout, (processes, keys) in layouts.items():
        check_equal(trained(path, tmp_path / layout, processes, keys), expected)
    orders = [*layouts, "one"]
    for before, (processes, keys) in zip(orders[1:], layouts.values(), strict=True):
        forget_the_end(tmp_path / before)
        check_equal(trained(path, tmp_path / before, processes, keys, resume=True), expected)


@pytest.fixture(scope="module")
def run_of_text(folder, tmp_path_factory):
    """A finished run of the Llama, and its config."""
    place = tmp_path_factory.mktemp("run")
    path = written(config_of(folder, "llama"), place / "run.yaml")
    run = Run.prepare(load_config(path), place / "run")
    run.train()
    return place / "run", path


def test_a_run_leaves_a_model_that_was_converted_redrawn_and_trained(folder, run_of_text):
    place, _ = run_of_text
    model = load_linearized(AutoModelForCausalLM, place / "model")
    for layer in converted_layers(model).values():
        assert int(layer.feature_map.num_redraws) == 2
        assert layer.is_calibrated
    exact = AutoModelForCausalLM.from_pretrained(folder / "llama")
    assert not torch.equal(model.lm_head.weight, exact.lm_head.weight)
    losses = [e["loss"] for e in json.loads((place / "result.json").read_text())["history"]
              if "loss" in e]  # fmt: skip
    assert losses[-1] < losses[0]


def test_evaluate_gives_the_scores_of_the_run_on_the_text_that_it_held_out(
    folder, run_of_text, tmp_path
):
    place, _ = run_of_text
    result = json.loads((place / "result.json").read_text())
    words = (folder / "book.txt").read_text().split()[-7 * 20 :]  # seven windows, the last tenth
    (tmp_path / "end.txt").write_text(" ".join(words))
    evaluation = Evaluation.prepare(place, [tmp_path / "end.txt"], length=22)
    scores = evaluation.run()
    assert scores["sequences"] == 7
    for name, value in result["metrics"]["test"].items():
        assert scores[name] == pytest.approx(value, rel=1e-6), name


def test_generate_goes_on_with_a_text_in_its_words(run_of_text):
    place, _ = run_of_text
    generation = Generation.prepare(place, prompt="w3 w24", count=2, length=9, temperature=0)
    first, second = (generation.written(sample) for sample in generation.run())
    assert first == second
    assert first.startswith("w3 w24 ")
    assert set(first.split()) <= set(WORDS)
    with pytest.raises(ValueError, match="length must exceed that of the prompt: 3 and 3 tokens"):
        Generation.prepare(place, prompt="w3 w24", length=3)


def test_a_report_of_text_speaks_of_tokens(run_of_text):
    place, _ = run_of_text
    page = write_report(place).read_text()
    table = results_table(json.loads((place / "metrics.json").read_text()))
    for text in (page, table):
        assert "bits per token" in text
        assert "character" not in text
    for word in ("amino", "protein", "residue"):
        assert word not in page.partition("<dt>again")[0], word


def test_a_mask_is_of_the_tokenizer_s_own_tokens(folder, tmp_path):
    path = written(config_of(folder, "bert"), tmp_path / "run.yaml")
    run = Run.prepare(load_config(path), tmp_path / "run")
    items = [run.data.train[i] for i in range(40)]
    items[0] = {"input_ids": items[0]["input_ids"][:9]}  # padded
    words, mask, padding = range(3, 86), 86, 1
    whole = torch.nn.utils.rnn.pad_sequence([x["input_ids"] for x in items], True, padding)
    for kind in (run.task.collator(3), run.task.evaluation_collator(3)):
        batch = kind(items)
        labels, ids = batch["labels"], batch["input_ids"]
        assert (batch["attention_mask"] == (whole != padding)).all()
        assert set(labels[labels >= 0].tolist()) <= set(words)
        assert (labels[labels >= 0] == whole[labels >= 0]).all()
        if type(kind) is MaskedCollator:  # evaluations forget some labels
            assert (ids[labels < 0] == whole[labels < 0]).all()
        assert (ids[labels >= 0] == mask).float().mean() > 0.7
        assert set(ids[(labels >= 0) & (ids != mask)].tolist()) <= set(words)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("llama", ["pretrained.model=/nowhere"], "there is no model /nowhere"),
        ("llama", ["pretrained.model=null"], "pretrained.model must be a word"),
        ("llama", ["pretrained.model=''"], "pretrained.model must be a model folder"),
        ("llama", ["task=masked-lm"], "LlamaForCausalLM, a model for causal-lm, and .*: causal-lm"),
        ("encoder", [], "BertModel, a model for encoder, and .* Save it with a head"),
        ("llama", ["data.length=4096"], "data.length must be at most 2048 for this model"),
        ("converted", ["pretrained.options.window_size=5"], "with window_size=4, and pretrained.opt"
         "ions.window_size is 5"),
        ("llama", ["pretrained.options.windows=5"], "unknown option of a conversion"),
        ("llama", ["pretrained.options.num_projections=0"], "num_projections must be"),
        ("llama", ["model.hidden_size=8"], "hidden_size of the section model beside it"),
        ("llama", ["compare=[exact]"], "Give each model a run of its own"),
        ("llama", ["data={source: sample, length: 22}"], "proteins are read with the 29 tokens of"),
        ("llama", ["data.concatenate=true"], "data.concatenate is of proteins"),
        ("llama", ["data={columns: [a], length: 9}"], "data.columns says how data.text is read"),
    ],
)  # fmt: skip
def test_what_does_not_fit_a_pretrained_model_is_refused_by_the_config(
    folder, tmp_path, name, overrides, words
):
    path = written(config_of(folder, name), tmp_path / "run.yaml")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_config(path, overrides)


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def with_more_tokens(folder):
    more = tokenizer()
    more.add_tokens([f"more{i}" for i in range(99)])
    more.save_pretrained(folder)


def without_a_mask(folder):
    less = tokenizer()
    less.mask_token = None
    less.save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "change", "overrides", "words"),
    [
        ("llama", without_weights, [], "must hold the weights of a model"),
        ("llama", with_more_tokens, [], "has 186 tokens, and the model embeds 89"),
        ("bert", without_a_mask, [], "has no mask_token"),
        ("llama", None, ["pretrained.options.window_size=11"], "longer than two blocks, 22 tokens"),
        ("llama", None, ["data.valid_fraction=0.5", "data.test_fraction=0.5"], "have a sequence"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_trained_is_refused_before_work(
    folder, tmp_path, name, change, overrides, words
):
    model = shutil.copytree(folder / name, tmp_path / "model")
    if change is not None:
        change(model)
    path = written(config_of(folder, name), tmp_path / "run.yaml")
    config = load_config(path, [f"pretrained.model={model}", *overrides])
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        Run.prepare(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("bert", ["shard_heads=2"], "its configuration has no plan for tensor parallelism"),
        ("llama", ["shard_heads=4"], "over 1, 2 ranks here, and 4 are asked for"),
        ("llama", ["split_sequences=2", "pretrained.options.layers=[0]"], r"layers\.1\.self_attn "
         r"attends by something else than FAVOR\+"),
        ("llama", ["shard_heads=2", "pretrained.options.exact_heads={0: [1]}"], "has exact heads"),
        ("llama", ["shard_weights=true", "trainer.torch_compile=true"], "would compile whole"),
    ],
)  # fmt: skip
def test_a_layout_that_a_pretrained_model_cannot_have_is_refused(
    folder, tmp_path, name, keys, words
):
    path = written(config_of(folder, name), tmp_path / "run.yaml")
    config = load_config(path, keys)
    with pytest.raises(ValueError, match=words):
        Layout.of(config, 4).check(config)


def test_weights_that_layers_share_are_refused_by_every_layout(tmp_path):
    sizes = SIZES | {"embedding_size": 16}
    config = AlbertConfig(**sizes, attention_probs_dropout_prob=0.0)
    AlbertForMaskedLM(config).save_pretrained(tmp_path / "albert")
    tree = config_of(tmp_path, "albert", task="masked-lm", shard_weights=True)
    config = load_config(written(tree, tmp_path / "run.yaml"))
    with pytest.raises(ValueError, match="layers of AlbertForMaskedLM have weights in common"):
        Layout.of(config, 2).check(config)


def test_an_encoder_without_a_head_is_neither_evaluated_nor_generated_from(folder, tmp_path):
    model = linearize(bert(), FavorOptions(num_projections=7))
    model.save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="an encoder without a head, which predicts nothing"):
        Trained.load(tmp_path / "encoder")


def test_a_plan_of_a_pretrained_model_is_refused(folder, tmp_path):
    config = load_config(written(config_of(folder, "llama"), tmp_path / "run.yaml"))
    with pytest.raises(ValueError, match="none for pretrained models"):
        workload_of(config)
