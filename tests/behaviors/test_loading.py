"""Saving, loading and moving weights."""

import copy

import pytest
import torch
from accelerate import disk_offload
from behavior_table import CLASSIFIERS, OURS, Refused, Subject, behavior
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

SECTION = "Loading and saving"
UNTIED = dict.fromkeys(CLASSIFIERS, "a classifier shares no weights")


def output(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def same(first: PreTrainedModel, second: PreTrainedModel, subject: Subject) -> bool:
    inputs = subject.inputs()
    return torch.equal(output(first, inputs), output(second, inputs))


@behavior(SECTION, "a saved model comes back equal, and once more after that")
def test_saving(subject, tmp_path):
    model = subject.model()
    model.save_pretrained(tmp_path / "first")
    assert (tmp_path / "first" / "generation_config.json").exists() == subject.generates
    again = subject.loaded(tmp_path / "first")
    assert same(again, model, subject)
    again.save_pretrained(tmp_path / "second")
    assert same(subject.loaded(tmp_path / "second"), model, subject)
    assert all(weight.is_contiguous() for weight in again.parameters())


@behavior(SECTION, "weights cut into several files come back equal")
def test_shards(subject, tmp_path):
    model = subject.model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert same(subject.loaded(tmp_path), model, subject)


@behavior(SECTION, "a state dict by torch.save fits another model of its class")
def test_state_dict(subject, tmp_path):
    model, other = subject.model(), subject.model()
    for weight in other.parameters():
        nn.init.zeros_(weight)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert same(other, model, subject)


@behavior(SECTION, "from_pretrained(None) takes a config and weights without a file")
def test_no_checkpoint(subject):
    model = subject.model()
    given = {"config": subject.config(), "state_dict": model.state_dict()}
    loaded = subject.convert(subject.model_class.from_pretrained(None, **given)).eval()
    assert same(loaded, model, subject)


@behavior(SECTION, "weights that a checkpoint lacks start as in a new model")
def test_missing_weights(subject, monkeypatch):
    initialize = PreTrainedModel._initialize_weights

    def seeded(self: PreTrainedModel, *args: object, **options: object) -> None:
        torch.manual_seed(7)  # for each module, because the order of modules may differ
        initialize(self, *args, **options)

    monkeypatch.setattr(PreTrainedModel, "_initialize_weights", seeded)
    given = {"config": subject.config(), "state_dict": {}}
    loaded = subject.convert(subject.model_class.from_pretrained(None, **given)).eval()
    expected = subject.model().state_dict()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, expected[name]), name


@behavior(SECTION, "missing, unexpected and misshapen weights are reported or refused")
def test_reports(subject, tmp_path):
    model = subject.model()
    model.save_pretrained(tmp_path)
    _, report = subject.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    wider = subject.config(**{("n_inner" if subject.name == "GPT-2" else "intermediate_size"): 56})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        subject.model_class.from_pretrained(tmp_path, config=wider)
    options = {"config": wider, "ignore_mismatched_sizes": True, "output_loading_info": True}
    loaded, report = subject.model_class.from_pretrained(tmp_path, **options)
    assert report["mismatched_keys"]
    assert output(subject.convert(loaded).eval(), subject.inputs()).isfinite().all()


@behavior(SECTION, "with and without its head the weights have their places")
def test_base_model(subject, tmp_path):
    model = subject.model()
    model.save_pretrained(tmp_path)
    base_class = type(model.base_model)
    base, report = base_class.from_pretrained(tmp_path, output_loading_info=True)
    assert all("pooler" in key for key in report["missing_keys"])  # which these heads do without
    for name, weight in model.base_model.state_dict().items():
        assert torch.equal(base.state_dict()[name], weight), name
    base.save_pretrained(tmp_path / "base")
    head = subject.model_class.from_pretrained(tmp_path / "base")
    for name, weight in head.base_model.state_dict().items():
        assert torch.equal(weight, base.state_dict()[name]), name


@behavior(SECTION, "tied weights are saved once and tied again", without=UNTIED)
def test_tied(subject, tmp_path):
    model = subject.model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert not saved.keys() & set(model.all_tied_weights_keys)
    loaded = subject.loaded(tmp_path)
    embeddings = loaded.get_input_embeddings().weight
    assert embeddings is loaded.get_output_embeddings().weight
    assert same(loaded, model, subject)


@behavior(SECTION, "weights that are not tied stay apart", without=UNTIED)
def test_untied(subject, tmp_path):
    model = subject.model(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded = subject.loaded(tmp_path)
    head = loaded.get_output_embeddings().weight
    assert not torch.equal(head, loaded.get_input_embeddings().weight)
    assert same(loaded, model, subject)


@behavior(SECTION, "in float16 and bfloat16 random features stay float32")
def test_half(subject, tmp_path):
    model = subject.model()
    expected = output(model, subject.inputs())
    model.save_pretrained(tmp_path)
    for dtype in (torch.float16, torch.bfloat16):
        loaded = subject.loaded(tmp_path, dtype=dtype)
        cast = copy.deepcopy(model).to(dtype)
        for half in (loaded, cast):
            inputs = {
                name: x.to(dtype) if x.is_floating_point() else x
                for name, x in subject.inputs().items()
            }
            logits = output(half, inputs)
            assert logits.dtype == dtype
            assert (logits - expected).norm() < 32 * torch.finfo(dtype).eps * expected.norm()
            omegas = [x for name, x in half.named_buffers() if name.endswith("omega")]
            assert len(omegas) == 2
            assert all(omega.dtype == torch.float32 for omega in omegas)


@behavior(SECTION, "a model of the meta device is a new model once it is initialized")
def test_meta(subject):
    with torch.device("meta"):
        model = subject.model()
    assert all(weight.is_meta for weight in model.parameters())
    model.to_empty(device="cpu").init_weights()
    expected = subject.model()
    model.load_state_dict(dict(expected.named_parameters()), strict=False)
    model.tie_weights()
    assert same(model, expected, subject)


@behavior(SECTION, "from_pretrained under torch.device('meta') is refused by transformers")
def test_meta_loading(subject, tmp_path):
    subject.model().save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(RuntimeError, match="meta device context manager"):
        subject.loaded(tmp_path)


@behavior(SECTION, "weights on disk give the same outputs")
def test_offload(subject, tmp_path):
    model = subject.model()
    expected = output(model, subject.inputs())
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert torch.equal(output(model, subject.inputs()), expected)


@behavior(SECTION, "device_map loads onto a device")
def test_device_map(subject, tmp_path):
    model = subject.model()
    model.save_pretrained(tmp_path)
    loaded = subject.loaded(tmp_path, device_map={"": "cpu"})
    assert {weight.device.type for weight in loaded.parameters()} == {"cpu"}
    assert same(loaded, model, subject)


OWN_WORD = Refused(
    "the configuration names the attention of a Performer, and no switch changes it",
    ValueError,
    "attends as its configuration says",
)


@behavior(
    SECTION,
    "another attention implementation can be chosen, and this one again",
    refused=dict.fromkeys(OURS, OWN_WORD),
)
def test_switch(subject):
    model = subject.model()
    expected = output(model, subject.inputs())
    model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "sdpa"
    assert not torch.allclose(output(model, subject.inputs()), expected, atol=1e-4)
    model.set_attn_implementation("favor")
    assert torch.equal(output(model, subject.inputs()), expected)


@behavior(SECTION, "an attention implementation that does not exist is refused")
def test_no_such_attention(subject):
    with pytest.raises(ValueError, match="foo"):
        subject.model().set_attn_implementation("foo")
