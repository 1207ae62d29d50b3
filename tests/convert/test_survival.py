"""What an exact model survives, a converted one survives too, and still attends by FAVOR+."""

import copy
import io
import json
import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import MODELS, TINY, WIDTH, inputs_for, outputs_of
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel
from transformers import BertConfig, BertModel, PreTrainedModel, Trainer, TrainingArguments
from warm import warm_python

from performers import FavorOptions, calibrate, linearize, load_linearized, restore
from performers.convert.cache import FavorMemory
from performers.convert.linearize import converted_layers

OPTIONS = FavorOptions(num_projections=17, window_size=3, num_sinks=1)
TARGETS = {"BERT": ["query", "value"], "Llama": ["q_proj", "v_proj"]}


@pytest.fixture(params=TARGETS)
def name(request) -> str:
    return request.param


@pytest.fixture
def model(name) -> PreTrainedModel:
    return linearize(MODELS[name](), OPTIONS)


def through_a_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_a_file,
    "a queue of processes": lambda model: pickle.loads(ForkingPickler.dumps(model)),
    "AveragedModel": lambda model: AveragedModel(model).module,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_a_converted_model_of_its_own(model, way, tmp_path):
    inputs = inputs_for(model)
    calibrate(model, [inputs])
    expected = outputs_of(model, inputs)
    twin = COPIES[way](model)
    assert torch.equal(outputs_of(twin, inputs), expected)
    exact = outputs_of(restore(model), inputs)
    assert torch.equal(outputs_of(twin, inputs), expected)
    twin.save_pretrained(tmp_path)  # what it has learned, and not what the first model had
    loaded = load_linearized(type(model), tmp_path).eval()
    assert torch.equal(outputs_of(loaded, inputs), expected)
    assert torch.equal(outputs_of(restore(twin), inputs), exact)
    assert not hasattr(twin.config, "favor")


def test_a_copy_generates_from_states_of_its_own():
    model = linearize(MODELS["Llama"](), OPTIONS)
    tokens = torch.randint(5, 90, (2, 7))
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(tokens), "do_sample": False}
    twin = pickle.loads(pickle.dumps(model))
    written = [one.generate(tokens, **options) for one in (model, twin)]
    assert torch.equal(written[0].sequences, written[1].sequences)
    assert all(type(layer) is FavorMemory for layer in written[1].past_key_values.layers)


def test_another_process_needs_nothing_but_the_file(tmp_path):
    models = [linearize(MODELS[name](), OPTIONS) for name in TARGETS]
    inputs = [inputs_for(model) for model in models]
    outputs = [outputs_of(*pair) for pair in zip(models, inputs, strict=True)]
    torch.save((models, inputs, outputs), tmp_path / "models.pt")
    code = (
        "import torch\n"
        f"saved = torch.load({str(tmp_path / 'models.pt')!r}, weights_only=False)\n"
        "for model, inputs, expected in zip(*saved):\n"
        "    out = model(**inputs)[0][inputs['attention_mask'].bool()]\n"
        "    print(torch.equal(out, expected))"
    )
    assert warm_python(code).split() == ["True", "True"]


def test_shared_memory_is_shared(model):
    twin = pickle.loads(ForkingPickler.dumps(model.share_memory()))
    with torch.no_grad():
        next(model.parameters()).zero_()
    inputs = inputs_for(model)
    assert torch.equal(outputs_of(twin, inputs), outputs_of(model, inputs))


def test_weights_in_many_files_come_back(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    inputs = inputs_for(model)
    loaded = load_linearized(type(model), tmp_path, device_map={"": "cpu"}).eval()
    assert torch.equal(outputs_of(loaded, inputs), outputs_of(model, inputs))


def test_uploading_sends_what_was_learned_as_well(model, monkeypatch):
    calibrate(model, [inputs_for(model)])
    sent: set[str] = set()

    class Hub:
        def create_repo(self, repo_id: str, **options: object) -> SimpleNamespace:
            return SimpleNamespace(repo_id=repo_id)

    def upload(self: object, folder: str, *rest: object, **options: object) -> None:
        sent.update(path.name for path in Path(folder).iterdir())

    for module in ("transformers.modeling_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.hf_api", Hub)
    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    model.push_to_hub("someone/model")
    assert {"config.json", "favor.safetensors", "model.safetensors"} <= sent


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_quantized_before_or_after_is_the_same_model(name):
    exact = MODELS[name]()
    inputs = inputs_for(exact)

    def quantized(model: nn.Module) -> nn.Module:
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)

    before = linearize(quantized(exact), OPTIONS)
    after = quantized(linearize(copy.deepcopy(exact), OPTIONS))
    assert torch.equal(outputs_of(before, inputs), outputs_of(after, inputs))
    calibrate(before, [inputs])
    assert len(converted_layers(after)) == 2
    assert torch.equal(outputs_of(restore(before), inputs), outputs_of(quantized(exact), inputs))


def test_adapters_are_added_saved_loaded_merged_and_unloaded(name, model, tmp_path):
    inputs = inputs_for(model)
    bare, plain = copy.deepcopy(model), outputs_of(model, inputs)
    options = LoraConfig(r=4, target_modules=TARGETS[name], init_lora_weights=False)
    adapted = get_peft_model(model, options).eval()
    expected = outputs_of(adapted, inputs)
    assert not torch.allclose(expected, plain, atol=1e-3)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "adapter").eval()
    assert torch.equal(outputs_of(loaded, inputs), expected)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(outputs_of(merged, inputs), expected, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = load_linearized(type(merged), tmp_path / "merged").eval()
    assert torch.equal(outputs_of(again, inputs), outputs_of(merged, inputs))
    twin = pickle.loads(pickle.dumps(adapted))
    assert torch.equal(outputs_of(twin, inputs), expected)
    assert torch.equal(outputs_of(adapted.unload(), inputs), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_as_near_as_its_rounding(model, dtype):
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs).double()
    out = outputs_of(model.to(dtype), inputs)
    assert out.dtype == dtype
    # Eight roundings of this dtype, or of what is compared with.
    rounding = max(torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps)
    assert (out - expected).norm() < 8 * rounding * expected.norm()
    for layer in converted_layers(model).values():
        assert layer.feature_map.omega.dtype == torch.float32


def test_parametrized_weights_act_as_weights(model):
    inputs = inputs_for(model)
    expected = outputs_of(model, inputs)
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            parametrizations.weight_norm(module)
    torch.testing.assert_close(outputs_of(model, inputs), expected, rtol=1e-3, atol=1e-4)
    assert len(converted_layers(model)) == 2


def test_a_class_without_a_text_attends_as_the_class_that_it_derives_from(name, model):
    """FSDP2 and parametrizations put such classes in the place of a module's own."""
    plain = MODELS[name]()
    plain.load_state_dict(model.state_dict())
    for module in list(plain.modules()):
        module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})
    inputs = inputs_for(model)
    linearize(plain, OPTIONS)
    assert torch.equal(outputs_of(plain, inputs), outputs_of(model, inputs))
    assert converted_layers(plain).keys() == converted_layers(model).keys()


def test_a_config_that_asks_for_attentions_is_obeyed_saved_and_loaded(tmp_path):
    config = BertConfig(**TINY, **WIDTH)
    config.output_attentions = True  # which makes attention eager
    model = linearize(BertModel(config).eval(), OPTIONS)
    inputs = inputs_for(model)
    attentions = model(**inputs).attentions
    assert len(attentions) == 2
    model.save_pretrained(tmp_path)
    assert model.config._attn_implementation == "favor"
    assert json.loads((tmp_path / "config.json").read_text())["output_attentions"] is True
    loaded = load_linearized(BertModel, tmp_path).eval()
    assert torch.equal(loaded(**inputs).attentions[1], attentions[1])


def test_training_goes_on_from_a_checkpoint_to_the_same_weights(tmp_path):
    rows = torch.randint(5, 90, (16, 11), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in rows]

    def trained(folder: str, resume: str | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(2)
        arguments = TrainingArguments(
            tmp_path / folder,
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
        )
        model = linearize(MODELS["Llama"](), OPTIONS)
        trainer = Trainer(model, arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = trained("whole")
    resumed = trained("resumed", str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(resumed[key], weight) for key, weight in whole.items())
