"""`performers convert`: what it writes, what it recovers, and what it refuses before it starts."""

import functools
import importlib.util
import json

import pytest
import torch
from columns import columns
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from typer.testing import CliRunner

from performers import FavorOptions, load_linearized
from performers.cli import app
from performers.cli.convert import _table
from performers.convert.fidelity import Fidelity, measure_fidelity
from performers.convert.sequences import Sequences, text_windows
from performers.theory import exact_operations, favor_operations
from performers.train import conversion_choices, conversion_config, conversion_run, fine_tuning
from performers.train.fine_tuning_task import fine_tuning_task

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "to", "be", "or", "not", "that", "is"]
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 29, "max_position_embeddings": 47, "initializer_range": 0.3,
}  # fmt: skip
MODELS = {
    "encoder": (lambda: BertModel(BertConfig(**SIZES)), AutoModel),
    "masked-lm": (lambda: BertForMaskedLM(BertConfig(**SIZES)), AutoModelForMaskedLM),
    "causal-lm": (
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
        AutoModelForCausalLM,
    ),
}
SMALL = (
    "--num-projections", 16, "--length", 31, "--batch-size", 3, "--transfer-steps", 4, "--steps", 5,
    "--far",
)  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr.splitlines()[-1]


def write_text(folder):
    chosen = torch.randint(5, len(WORDS), (600,)).tolist()
    path = folder / "text.txt"
    path.write_text(" ".join(WORDS[number] for number in chosen))
    return path


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


@pytest.fixture
def saved(tmp_path):
    """Save a model with its tokenizer; the words of a text are its tokens."""
    return functools.partial(save, tmp_path)


def save(parent, model):
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = parent / "model"
    named = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name}_token": WORDS[i] for name, i in named.items()}
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MODELS)
def test_a_converted_folder_holds_the_model_and_its_report(kind, saved, text, tmp_path):
    build, auto_class = MODELS[kind]
    output = tmp_path / "converted"
    result = run(saved(build()), "--data", text, "--output", output, *SMALL, "--window", 3)
    assert result.exit_code == 0, result.output
    record = json.loads((output / "conversion.json").read_text())
    stages = ["calibrated", "after attention transfer", "after fine-tuning"]
    assert list(record["stages"]) == stages
    assert len(record["averaging"]) == 2
    for found in record["stages"].values():
        assert found["layers"].keys() == record["averaging"].keys()
    assert record["frontier"] is None
    assert (output / "conversion.png").stat().st_size > 10_000
    assert "averaging" in result.stdout
    # weights are in safetensors alone, and no checkpoint is left
    assert not {path.suffix for path in output.rglob("*")} & {".bin", ".pt", ".pth"}
    assert not (output / "checkpoints").exists()
    tokens = torch.randint(5, len(WORDS), (2, 31))
    model = load_linearized(auto_class, output)
    assert model.config.favor["options"] == record["options"]
    assert model(tokens)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["encoder", "causal-lm"])
def test_every_number_is_that_of_the_saved_model_beside_the_exact_one(kind, saved, text, tmp_path):
    build, auto_class = MODELS[kind]
    folder, output = saved(build()), tmp_path / "converted"
    result = run(folder, "--data", text, "--output", output, *SMALL, "--no-recovery", "--window", 3)
    assert result.exit_code == 0, result.output
    record = json.loads((output / "conversion.json").read_text())
    stage = record["stages"]["calibrated"]
    table = columns(result.stdout.split("\n\n")[0])
    assert table[0] == ["on text that was not trained on", "calibrated"]
    printed = {name: numbers for name, *numbers in table}
    exact = auto_class.from_pretrained(folder, attn_implementation="eager").eval()
    model = load_linearized(auto_class, output)
    rows = held_out_rows(exact, text)
    with torch.no_grad():
        ours, theirs = (one(rows, output_hidden_states=True) for one in (model, exact))
        if kind == "encoder":
            pair = (one.last_hidden_state.mean(dim=1) for one in (ours, theirs))
            cosine = float(torch.cosine_similarity(*pair).mean())
            distance, agreement, loss, perfect = 1 - cosine, None, None, None
            for number in range(2):
                name = f"encoder.layer.{number}.attention.self"
                averaging, error = errors_of_layer(
                    exact.get_submodule(name), model.get_submodule(name),
                    theirs.hidden_states[number],
                )  # fmt: skip
                assert record["averaging"][name] == pytest.approx(averaging, rel=1e-4)
                assert stage["layers"][name] == pytest.approx(error, rel=1e-4)
                title = f"error of {name} (averaging: {averaging:.3f})"
                assert printed[title] == [f"{error:.3f}"]
        else:
            log_p, log_q = (one.logits.log_softmax(dim=-1) for one in (theirs, ours))
            distance = float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())
            agreement = float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
            perfect, loss = (
                -float(x[:, :-1].gather(2, rows[:, 1:, None]).mean()) for x in (log_p, log_q)
            )
            assert printed["positions with its likeliest token"] == [f"{agreement:.4f}"]
    assert stage["fidelity"]["distance"] == pytest.approx(distance, rel=1e-3, abs=1e-6)
    assert stage["fidelity"]["agreement"] == (agreement and pytest.approx(agreement))
    (of_model,) = printed["distance to the exact model (KL, or 1 - cosine)"]
    assert float(of_model) == pytest.approx(distance, abs=1e-4)
    assert stage["task_loss"] == (loss and pytest.approx(loss, rel=1e-4))
    assert record["exact_task_loss"] == (perfect and pytest.approx(perfect, rel=1e-4))
    if loss is not None:
        (of_task,) = printed[f"loss of its task (exact: {record['exact_task_loss']:.4f})"]
        assert float(of_task) == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("agreement", [None, 0.5])
def test_each_stage_has_its_column(agreement):
    stages = {
        stage: {
            "layers": {"0.self": 0.1 + index, "1.self": 0.2 + index},
            "task_loss": 0.3 + index,
            "is_kept": index == 0,
            "fidelity": {
                "distance": 0.4 + index,
                "agreement": agreement and agreement + index,
                "neighbors": None,
            },
        }
        for index, stage in enumerate(["calibrated", "after fine-tuning"])
    }
    record = {
        "averaging": {"0.self": 0.6, "1.self": 0.7}, "stages": stages, "exact_task_loss": 0.8,
    }  # fmt: skip
    agreements = [["positions with its likeliest token", "0.5000", "1.5000"]]
    assert columns(_table(record)) == [
        ["on text that was not trained on", "calibrated", "after fine-tuning (undone)"],
        ["distance to the exact model (KL, or 1 - cosine)", "0.4000", "1.4000"],
        *(agreements if agreement else []),
        ["loss of its task (exact: 0.8000)", "0.3000", "1.3000"],
        ["error of 0.self (averaging: 0.600)", "0.100", "1.100"],
        ["error of 1.self (averaging: 0.700)", "0.200", "1.200"],
    ]


def errors_of_layer(exact, converted, hidden):
    """‖out − exact‖ / ‖exact‖ of averaging all values, and of a converted layer of BERT."""
    query, key, value = (
        getattr(exact, part)(hidden).unflatten(2, (3, 8)).transpose(1, 2)
        for part in ("query", "key", "value")
    )
    outputs = [
        (query @ key.mT / 8**0.5).softmax(dim=-1) @ value,
        value.mean(dim=2, keepdim=True).expand_as(value),
    ]
    whole, averaged = (x.transpose(1, 2).flatten(2) for x in outputs)
    found = converted(hidden)[0]
    return [float((x - whole).norm() / whole.norm()) for x in (averaged, found)]


def test_no_recovery_stops_after_calibration_and_leaves_the_weights_alone(saved, text, tmp_path):
    model = BertModel(BertConfig(**SIZES)).eval()
    folder, output = saved(model), tmp_path / "converted"
    result = run(folder, "--data", text, "--output", output, *SMALL, "--no-recovery", "--window", 3)
    assert result.exit_code == 0, result.output
    record = json.loads((output / "conversion.json").read_text())
    assert list(record["stages"]) == ["calibrated"]
    assert record["options"]["window_size"] == 3
    tokens = torch.randint(5, len(WORDS), (2, 31))
    exact, converted = AutoModel.from_pretrained(output), load_linearized(AutoModel, output)
    assert torch.equal(exact(tokens)[0], model(tokens)[0])
    found = converted(tokens)[0].mean(dim=1)
    cosine = torch.cosine_similarity(found, model(tokens)[0].mean(dim=1)).mean()
    assert 0.5 < cosine < 0.9999
    layers = converted.encoder.layer
    assert all(layer.attention.self.favor.is_calibrated for layer in layers)


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        *((kind, ()) for kind in MODELS),
        ("encoder", ("--far",)),
        ("encoder", ("--no-far",)),
        ("encoder", ("--far-limit", 0.3)),
    ],
)
def test_the_far_field_stays_where_it_brings_the_model_closer_to_the_exact_one(
    kind, asked, saved, text, tmp_path
):
    build, auto_class = MODELS[kind]
    folder, output = saved(build()), tmp_path / "converted"
    options = [option for option in SMALL if option != "--far"]
    result = run(
        folder, "--data", text, "--output", output, *options, "--window", 3, "--no-recovery", *asked
    )
    assert result.exit_code == 0, result.output
    record = json.loads((output / "conversion.json").read_text())
    if asked:
        assert (record["options"]["far"] is False) == (asked == ("--no-far",))
        assert record["options"]["far_limit"] == (0.3 if 0.3 in asked else None)
        assert record["far_field"] is None
    else:
        found = record["far_field"]
        costs = [one["cost"] for one in found.values()]
        assert costs == sorted(costs)
        closest = min(one["distance"] for one in found.values())
        enough = max(closest, 0.0) / 0.95  # rounding may put it below 0
        name = next(name for name, one in found.items() if one["distance"] <= enough)
        chosen = conversion_choices.FAR_FIELDS[name]
        assert record["options"]["far"] is chosen["far"]
        assert record["options"]["num_heavy"] == chosen.get("num_heavy", 0)
        assert record["options"]["far_limit"] == chosen.get("far_limit")
        assert found.keys() == conversion_choices.FAR_FIELDS.keys()
        assert f"{found[name]['cost']:.2f} of the operations of exact attention" in result.stderr
    # what is saved is what was chosen
    model, exact = load_linearized(auto_class, output), auto_class.from_pretrained(folder)
    batch = {"input_ids": held_out_rows(exact, text)}
    held_out = record["stages"]["calibrated"]["fidelity"]["distance"]
    assert held_out == pytest.approx(
        measure_fidelity(model, exact.eval(), [batch]).distance, rel=0.02
    )


def test_larger_blocks_are_tried_where_no_window_was_asked_for(saved, text, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion_choices, "BLOCK_STEP", 1)
    monkeypatch.setattr("performers.convert.options.WINDOW_SIZE", 3)
    folder, output = saved(BertModel(BertConfig(**SIZES))), tmp_path / "converted"
    options = (folder, "--data", text, "--output", output, "--length", 31, "--no-recovery")
    assert run(*options, "--sinks", 0).exit_code == 0
    found = json.loads((output / "conversion.json").read_text())["far_field"]
    larger = found[conversion_choices.LARGER_BLOCKS]
    assert larger["window_size"] > 3 == found["left out"]["window_size"]
    assert found["left out"]["cost"] < larger["cost"] <= found["estimated"]["cost"]
    assert larger["distance"] < found["left out"]["distance"]
    assert run(*options, "--sinks", 0, "--window", 3, "--force").exit_code == 0
    found = json.loads((output / "conversion.json").read_text())["far_field"]
    assert {one["window_size"] for one in found.values()} == {3}


def held_out_rows(exact, text):
    """The last tenth of the sequences of 31 tokens, as the conversion cuts them."""
    rows = text_windows(
        AutoTokenizer.from_pretrained(exact.config.name_or_path), text.read_text(), 31
    )
    return rows[-max(1, len(rows) // 10) :]


def test_the_layer_that_costs_most_stays_exact_and_the_config_names_the_others(
    saved, text, tmp_path, monkeypatch
):
    model = BertModel(BertConfig(**SIZES | {"num_hidden_layers": 3}))
    with torch.no_grad():  # attention of the others is nearly uniform, and easy to estimate
        for number in (0, 2):
            model.encoder.layer[number].attention.self.query.weight.mul_(0.1)
    folder, whole, parts = saved(model), tmp_path / "whole", tmp_path / "parts"
    options = ("--data", text, *SMALL, "--window", 3, "--exact-layers", 1)
    result = run(folder, "--output", whole, *options)
    assert result.exit_code == 0, result.output
    record = json.loads((whole / "conversion.json").read_text())
    costs = record["cost_by_layer"]
    assert list(costs) == ["0", "1", "2"]
    assert max(costs, key=costs.get) == "1"
    assert f"layer 1: by itself an error of {costs['1']:.3f} of the model, stays" in result.stderr
    assert json.loads((whole / "config.json").read_text())["favor"]["options"]["layers"] == [0, 2]
    assert len(record["averaging"]) == 2
    converted = load_linearized(AutoModel, whole).encoder.layer
    kept = [layer.attention.self.favor is None for layer in converted]
    assert kept == [False, True, False]

    def interrupt(*arguments, **names):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(conversion_run, "fine_tune", interrupt)
        assert run(folder, "--output", parts, *options).exit_code == 130
    assert run(folder, "--output", parts, *options, "--resume").exit_code == 0
    record["seconds"] = 0
    assert json.loads((parts / "conversion.json").read_text()) | {"seconds": 0} == record
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(load_file(parts / "model.safetensors")[name], tensor)


def test_a_wanted_error_is_met_by_the_cheapest_setting_that_meets_it(saved, text, tmp_path):
    folder, output = saved(BertModel(BertConfig(**SIZES))), tmp_path / "converted"
    options = (folder, "--data", text, "--output", output, "--length", 41, "--no-recovery")
    line = refused(*options, "--error", 0.2, "--window", 16)
    assert "--error chooses window_size by measuring: give either --error or these" in line
    line = refused(*options, "--error", 1e-9)
    assert "error must be one that a setting meets at length 41: the lowest is" in line
    result = run(*options, "--error", 0.2, "--sinks", 1, "--force")
    assert result.exit_code == 0, result.output
    record = json.loads((output / "conversion.json").read_text())
    found, chosen = record["frontier"]["settings"], record["options"]
    enough = [setting for setting in found if setting["error"] <= 0.2]
    best = min(enough, key=lambda setting: setting["operations"])
    assert chosen["window_size"] == best["window_size"]
    assert chosen["far"] is (best["num_projections"] > 0)
    assert (chosen["num_sinks"], chosen["statistics"]) == (1, "calibrated")
    assert "operations of exact attention" in result.stderr
    assert load_linearized(AutoModel, output).config.favor["options"] == chosen


@pytest.fixture(scope="module")
def uninterrupted(request, tmp_path_factory):
    """A model, the options of its conversion with so much of LoRA, and what that wrote."""
    if request.param:
        pytest.importorskip("peft")
    torch.manual_seed(0)
    parent = tmp_path_factory.mktemp("uninterrupted")
    folder = save(parent, BertForMaskedLM(BertConfig(**SIZES)))
    options = ("--data", write_text(parent), *SMALL, "--window", 3, "--sinks", 0)
    options += ("--lora", request.param)
    with pytest.MonkeyPatch.context() as patch:
        take_all_steps(patch)
        assert run(folder, "--output", parent / "whole", *options).exit_code == 0
    return folder, options, parent / "whole"


def take_all_steps(patch):
    patch.setattr(fine_tuning, "PATIENCE", 10)  # all five steps
    patch.setattr(fine_tuning, "MEASURING", 100)  # after each of them


@pytest.mark.parametrize(
    ("uninterrupted", "stop_at"),
    [(0, "transfer"), (0, "fine-tuning"), (2, "fine-tuning"), (2, "report")],
    indirect=["uninterrupted"],
)
def test_an_interrupted_conversion_goes_on_to_the_same_end(
    uninterrupted, stop_at, tmp_path, monkeypatch
):
    take_all_steps(monkeypatch)
    folder, options, whole = uninterrupted
    parts = tmp_path / "parts"

    def interrupt(*arguments, **names):
        raise KeyboardInterrupt

    def interrupt_after(*arguments, **names):
        fine_tuning.fine_tune(*arguments, **names)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stop_at == "transfer":
            patch.setattr(conversion_run, "transfer_attention", interrupt)
        elif stop_at == "fine-tuning":
            patch.setattr(fine_tuning, "StopWhenDiverged", StopInStepFour)
        else:
            patch.setattr(conversion_run, "fine_tune", interrupt_after)
        result = run(folder, "--output", parts, *options)
    assert result.exit_code == 130, result.output
    assert "--resume" in result.stderr
    assert not (parts / "model.safetensors").exists()
    assert "Add --resume to go on with it" in refused(folder, "--output", parts, *options)
    other = (*options, "--steps", 7)
    assert "was started with steps = 5" in refused(folder, "--output", parts, *other, "--resume")
    last = {"transfer": 0, "fine-tuning": 3, "report": 5}[stop_at]
    checkpoints = list((parts / "checkpoints" / "fine-tuning").glob("*/whole.json"))
    assert max((int(path.parent.name[11:]) for path in checkpoints), default=0) == last
    steps = []
    compute_loss = fine_tuning.FineTuningTrainer.compute_loss

    def count(*arguments, **names):
        steps.append(1)
        return compute_loss(*arguments, **names)

    monkeypatch.setattr(fine_tuning.FineTuningTrainer, "compute_loss", count)
    result = run(folder, "--output", parts, *options, "--resume")
    assert "is finished" in refused(folder, "--output", parts, *options, "--resume")
    assert result.exit_code == 0, result.output
    assert len(steps) == 5 - last
    assert ("after attention transfer" in result.stderr) is (stop_at == "transfer")
    for name, tensor in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(load_file(parts / "model.safetensors")[name], tensor)


def test_choices_that_a_started_conversion_did_not_know_are_the_defaults():
    config = conversion_config.ConversionConfig(model="path", text="book.txt", steps=7)
    written = config.to_dict()
    del written["exact_layers"], written["columns"], written["options"]["window_size"]
    assert conversion_config.ConversionConfig.from_dict(written) == config


@pytest.mark.parametrize("written", ["{", "[]", "{}", '{"model": "m", "options": 3}'])
def test_a_conversion_whose_options_are_damaged_says_which_file(tmp_path, written):
    path = tmp_path / "out" / "checkpoints" / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text(written)
    config = conversion_config.ConversionConfig(model="path", text="book.txt")
    with pytest.raises(ValueError, match=rf"(?s){path} .*Start again with --force"):
        conversion_run.Conversion.prepare(config, tmp_path / "out", resume=True)


class StopInStepFour(TrainerCallback):
    """Stands in for ctrl-c; there are five steps, and a checkpoint after each."""

    def __init__(self, remedy):
        assert "trainer." not in remedy  # a conversion has no such options

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_what_cannot_be_converted_is_refused_before_the_model_is_touched(saved, text, tmp_path):
    folder, output = saved(BertModel(BertConfig(**SIZES))), tmp_path / "converted"
    (folder / "model.safetensors").write_text("whoever reads this fails")
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.touch()
    short.write_text("to be " * 40)
    options = ("--output", output, *SMALL)
    assert "must have at least 31 tokens" in refused(folder, "--data", empty, *options)
    assert "at least 4 sequences of 31 tokens" in refused(folder, "--data", short, *options)
    assert "there is no text file" in refused(folder, "--data", tmp_path / "nothing.txt", *options)
    given = (folder, "--data", text)
    assert "length must be at most 47" in refused(*given, *options, "--length", 53)
    assert "unknown features" in refused(*given, *options, "--features", "sharpe")
    assert "is the model itself" in refused(*given, "--output", folder, "--force")
    assert "learning_rate must be positive and finite" in refused(
        *given, *options, "--learning-rate", 0
    )
    assert "finite, got nan" in refused(*given, *options, "--transfer-learning-rate", "nan")
    assert "seed must be a whole number from 0" in refused(*given, *options, "--seed", -1)
    line = refused(*given, *options, "--exact-layers", 2)
    assert "must leave a layer to convert: this model has 2, and 2 would stay exact" in line
    line = refused(*given, *options, "--window", 16)
    assert "must be longer than two blocks, 32 tokens with a window of 16" in line
    assert "has 31. Give longer ones, with a length of 33 or more, or a smaller window" in line
    assert "give --resume or --force, not both" in refused(*given, *options, "--resume", "--force")
    assert not output.exists()
    output.mkdir()
    (output / "thesis.tex").touch()
    assert "already holds something. Add --force" in refused(*given, *options)
    config = json.loads((folder / "config.json").read_text())
    for architecture in ("BertForSequenceClassification", "BartModel"):
        (folder / "config.json").write_text(
            json.dumps(
                config
                | {"architectures": [architecture], "is_encoder_decoder": "Bart" in architecture}
            )
        )
        line = refused(*given, *options, "--force")
        assert f"this is {architecture}. Convert it from Python" in line
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]


def test_a_tokenizer_with_more_tokens_than_the_model_embeds_is_refused(saved, text, tmp_path):
    folder, output = saved(BertModel(BertConfig(**SIZES))), tmp_path / "converted"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"more{i}" for i in range(SIZES["vocab_size"])])
    tokenizer.save_pretrained(folder)
    line = refused(folder, "--data", text, "--output", output, *SMALL)
    assert f"has {len(tokenizer)} tokens, and the model embeds {SIZES['vocab_size']}" in line
    assert not output.exists()


def test_lora_without_peft_says_how_to_get_it(saved, text, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    folder = saved(BertModel(BertConfig(**SIZES)))
    line = refused(folder, "--data", text, "--output", tmp_path / "converted", "--lora", 2)
    assert "pip install 'performers[lora]'" in line


def test_force_writes_over_a_conversion(saved, text, tmp_path):
    folder, output = saved(BertModel(BertConfig(**SIZES))), tmp_path / "converted"
    options = (folder, "--data", text, "--output", output, *SMALL, "--no-recovery")
    assert run(*options, "--window", 3).exit_code == 0
    (output / "checkpoints").mkdir()  # as if it had been interrupted
    (output / "checkpoints" / "transferred.json").write_text("{}")
    assert run(*options, "--features", "relu", "--force").exit_code == 0
    record = json.loads((output / "conversion.json").read_text())
    assert record["options"]["features"] == "relu"
    assert load_linearized(AutoModel, output).config.favor["options"] == record["options"]


def test_masks_hide_ordinary_tokens_and_are_a_function_of_the_seed(saved):
    tokenizer = AutoTokenizer.from_pretrained(saved(BertForMaskedLM(BertConfig(**SIZES))))
    task = fine_tuning_task(BertConfig(architectures=["BertForMaskedLM"]))
    rows = torch.tensor([[2, *[5, 6, 7] * 997, *[3] * 31]])
    given = Sequences({"input_ids": rows})
    first, again, other = (task.examples(given, tokenizer, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first["input_ids"], again["input_ids"])
    assert not torch.equal(first["input_ids"], other["input_ids"])
    chosen = first["labels"] != -100
    assert not chosen[rows[0] < 5].any()
    assert torch.equal(first["labels"][chosen], rows[0][chosen])
    assert torch.equal(first["input_ids"][~chosen], rows[0][~chosen])
    count = int(chosen.sum())
    assert abs(count - 0.15 * 2991) < 4 * (2991 * 0.15 * 0.85) ** 0.5
    hidden = int((first["input_ids"] == 4).sum())
    assert abs(hidden - 0.8 * count) < 4 * (count * 0.8 * 0.2) ** 0.5 + count * 0.1 / len(WORDS)


def test_records_are_padded_and_not_joined(saved, tmp_path):
    folder, output = saved(BertModel(BertConfig(**SIZES))), tmp_path / "converted"
    data = tmp_path / "pairs.jsonl"
    words = torch.randint(5, len(WORDS), (12, 20)).tolist()
    texts = [" ".join(WORDS[i] for i in row[: 6 + n]) for n, row in enumerate(words)]
    data.write_text("".join(json.dumps({"n": 3, "a": text, "b": "not"}) + "\n" for text in texts))
    options = ("--output", output, *SMALL, "--window", 3, "--column", "a", "--column", "b")
    read = []
    forward = BertModel.forward

    @functools.wraps(forward)  # the Trainer reads which arguments there are
    def watched(self, *arguments, **given):
        read.append({name: x.clone() for name, x in given.items() if torch.is_tensor(x)})
        return forward(self, *arguments, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BertModel, "forward", watched)
        result = run(folder, "--data", data, *options)
    assert result.exit_code == 0, result.output
    for batch in read:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert torch.equal(ids != 0, mask.bool())
        assert (mask.sum(dim=1) >= 6 + 4).all()
        for row, types in zip(ids, batch["token_type_ids"], strict=True):
            assert (row == 2).sum() == 1  # one [CLS] in each: records are not joined
            assert (row == 3).sum() == 2  # and two texts
            assert types.sum() == 2
    record = json.loads((output / "conversion.json").read_text())
    assert record["sequences"] == {"train": 10, "validation": 1, "held_out": 1}
    assert record["config"]["columns"] == ["a", "b"]


def test_recovery_that_moves_the_model_away_is_undone_and_said(saved, text, tmp_path):
    folder, output = saved(BertModel(BertConfig(**SIZES))), tmp_path / "converted"
    options = ("--output", output, *SMALL, "--window", 3, "--transfer-learning-rate", 30)
    result = run(folder, "--data", text, *options, "--learning-rate", 30, "--steps", 2)
    assert result.exit_code == 0, result.output
    record = json.loads((output / "conversion.json").read_text())
    stages = record["stages"]
    assert [found["is_kept"] for found in stages.values()] == [True, False, True]
    start, end = stages["calibrated"], stages["after fine-tuning"]
    assert end["fidelity"]["distance"] == pytest.approx(start["fidelity"]["distance"], abs=1e-6)
    assert "after attention transfer (undone)" in result.stdout
    assert "further from the exact one than before: undone" in result.stderr
    exact, kept = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(output)
    for name, tensor in exact.state_dict().items():
        assert torch.equal(kept.state_dict()[name], tensor)


def test_the_number_of_sinks_is_the_smallest_that_is_about_as_good_as_any(
    saved, text, tmp_path, monkeypatch
):
    folder, output = saved(BertModel(BertConfig(**SIZES))), tmp_path / "converted"
    options = (folder, "--data", text, *SMALL, "--window", 3, "--no-recovery")
    for distances, expected in (
        ({0: 0.3, 1: 0.30001, 4: 0.29}, 0),
        ({0: 0.3, 1: 0.2, 4: 0.195}, 1),
        ({0: 0.3, 1: 0.25, 4: 0.2}, 4),
    ):

        def measured(models, exact, batches, distances=distances):
            given = [(n, model.config.favor["options"]) for n, model in models.items()]
            assert all((x["num_sinks"], x["far"]) == (n, False) for n, x in given)
            return {n: Fidelity(distances[n]) for n in models}

        with monkeypatch.context() as patch:
            patch.setattr(conversion_choices, "compare_fidelity", measured)
            result = run(*options, "--output", output, "--force")
        assert result.exit_code == 0, result.output
        record = json.loads((output / "conversion.json").read_text())
        assert record["options"]["num_sinks"] == expected
        assert record["num_sinks"] == {str(n): x for n, x in distances.items()}
        assert load_linearized(AutoModel, output).config.favor["options"]["num_sinks"] == expected


def test_a_conversion_is_resumed_by_as_many_processes(saved, text, tmp_path, monkeypatch):
    folder, output = saved(BertModel(BertConfig(**SIZES))), tmp_path / "converted"
    options = (folder, "--data", text, "--output", output, *SMALL, "--window", 3)
    place = output / "checkpoints"
    place.mkdir(parents=True)
    config = conversion_config.ConversionConfig(
        model=str(folder), text=str(text), length=31, batch_size=3, transfer_steps=4, steps=5,
        options=FavorOptions(16, window_size=3, far=True),
    )  # fmt: skip
    (place / "config.json").write_text(json.dumps(config.to_dict() | {"processes": 2}))
    assert "was started with processes = 2, and this is 1" in refused(*options, "--resume")
    monkeypatch.setenv("WORLD_SIZE", "2")
    conversion_config.check_output(config, output, resume=True, force=False)


def test_a_setting_that_never_pays_is_said_before_the_work(saved, text, tmp_path):
    folder = saved(BertModel(BertConfig(**SIZES)))
    options = ("--output", tmp_path / "converted", "--length", 31, "--no-recovery", "--window", 3)
    result = run(folder, "--data", text, *options, "--num-projections", 16)
    assert result.exit_code == 0, result.output
    first = next(
        n for n in range(1, 999)
        if favor_operations(n, 8, 16, 3, 4, is_sharp=True) < exact_operations(n, 8)
    )  # fmt: skip
    warning = result.stderr.splitlines()[0]
    assert f"fewer operations than exact attention from {first} tokens on" in warning
    assert "the model reads at most 47" in warning
    result = run(folder, "--data", text, *options, "--num-projections", 1, "--no-far", "--force")
    assert "warning" not in result.stderr
