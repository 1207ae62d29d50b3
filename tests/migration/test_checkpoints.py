"""Where checkpoints come from, what is recorded of them, and which are refused, with what words."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import restated
import torch
from restated import DIM, HEADS, HIDDEN, ROWS
from safetensors.torch import save_file
from typer.testing import CliRunner

from performers import PerformerForMaskedLM, import_checkpoint
from performers.cli import app

pytestmark = pytest.mark.usefixtures("without_shape_checks")


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return restated.performer_pytorch_weights(layers=1)


def assert_same(model, other):
    for (name, tensor), (_, found) in zip(
        other.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert torch.equal(found, tensor), name


def refusal(checkpoint, library, **told):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        import_checkpoint(checkpoint, library, **told)
    return str(caught.value)


def test_every_kind_of_file_gives_the_same_model(weights, tmp_path):
    tree = import_checkpoint(weights, "performer-pytorch")
    torch.save(weights, tmp_path / "model.pt")
    save_file({name: x.clone() for name, x in weights.items()}, tmp_path / "model.safetensors")
    np.savez(tmp_path / "model.npz", **{name: x.numpy() for name, x in weights.items()})
    for name in ("model.pt", "model.safetensors", "model.npz"):
        model = import_checkpoint(tmp_path / name, "performer-pytorch")
        assert_same(model, tree)
        digest = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert model.config.origin["file"] == name
        assert model.config.origin["sha256"] == digest


def test_a_checkpoint_inside_another_is_read_by_its_prefix(weights, tmp_path):
    path = tmp_path / "last.ckpt"
    inner = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"epoch": 3, "model_state_dict": inner, "optimizer": {"state": {}}}, path)
    line = refusal(path, "performer-pytorch")
    assert "pass prefix='model_state_dict.module.'" in line
    model = import_checkpoint(path, "performer-pytorch", prefix="model_state_dict.module.")
    assert_same(model, import_checkpoint(weights, "performer-pytorch"))
    assert model.config.origin["prefix"] == "model_state_dict.module."


def test_what_was_imported_is_saved_and_loaded_with_its_origin(weights, tmp_path):
    model = import_checkpoint(weights, "performer-pytorch", features="relu", scale=0.3)
    model.save_pretrained(tmp_path)
    loaded = PerformerForMaskedLM.from_pretrained(tmp_path)
    assert_same(loaded, model)
    assert loaded.config.origin == {
        "library": "performer-pytorch",
        "is_causal": False,
        "features": "relu",
        "scale": 0.3,
    }
    assert loaded.config.dialect == model.config.dialect
    tokens = torch.arange(7).unsqueeze(0)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_omega_is_loaded_bit_for_bit_and_redrawn_on_demand():
    tree = restated.google_tree(omega="shared")
    model = import_checkpoint(tree, "google-jax")
    maps = [layer.attention.mechanism.feature_map for layer in model.performer.layers]
    assert all(torch.equal(phi.omega, tree["projection_matrix"]) for phi in maps)
    model.redraw_features()
    assert not torch.equal(maps[0].omega, maps[1].omega)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_file_runs_code(weights, tmp_path):
    made = str(tmp_path / "made")
    torch.save({**weights, "extra": Evil(made)}, tmp_path / "evil.pt")
    np.savez(tmp_path / "evil.npz", extra=np.array([Evil(made)], dtype=object))
    assert "which could run code" in refusal(tmp_path / "evil.pt", "performer-pytorch")
    assert "without objects" in refusal(tmp_path / "evil.npz", "performer-pytorch")
    assert not Path(made).exists()


@pytest.mark.parametrize("suffix", ["pt", "npz", "safetensors"])
def test_a_damaged_file_is_named(weights, tmp_path, suffix):
    path = tmp_path / f"model.{suffix}"
    assert f"{path} must be a file" in refusal(path, "performer-pytorch")
    whole = tmp_path / f"whole.{suffix}"
    if suffix == "pt":
        torch.save(weights, whole)
    elif suffix == "npz":
        np.savez(whole, **{name: x.numpy() for name, x in weights.items()})
    else:
        save_file({name: x.clone() for name, x in weights.items()}, whole)
    for damaged in (whole.read_bytes()[:5000], b"", b"no checkpoint"):
        path.write_bytes(damaged)
        assert str(path) in refusal(path, "performer-pytorch")


def renamed(weights, before, after):
    return {name.replace(before, after): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: renamed(w, "0.norm.weight", "0.g"), "ScaleNorm (use_scalenorm)"),
        (lambda w: w | {"performer.net.layers.0.0.g": torch.tensor(0.5)}, "ReZero (use_rezero)"),
        (lambda w: renamed(w, ".0.fn.to_q", ".0.fn.fn.to_q"), "shifted tokens"),
        (lambda w: renamed(w, "layers.0.0.", "blocks.0.f.net."), "reversible layers"),
        (
            lambda w: (
                w
                | {"performer.net.layers.0.0.fn.local_attn.rel_pos.inv_freq": torch.ones(DIM // 2)}
            ),
            "heads of local attention",
        ),
        (
            lambda w: (
                w | {"performer.net.layers.0.1.fn.fn.w1.weight": torch.ones(8 * HIDDEN, HIDDEN)}
            ),
            "gated feed-forward layers (ff_glu=True)",
        ),
        (lambda w: {f"enc.{name}": x for name, x in w.items()}, "an encoder and a decoder"),
    ],
)
def test_what_no_model_here_has_is_refused_by_name(weights, change, words):
    line = refusal(change(weights), "performer-pytorch")
    assert words in line
    assert "import these layers one at a time" in line


def test_the_library_calls_these_parts_by_these_names():
    """The names that the refusals above go by."""
    build = pytest.importorskip("performer_pytorch").PerformerLM
    for options in (
        {"use_scalenorm": True},
        {"use_rezero": True},
        {"shift_tokens": True},
        {"reversible": True},
        {"local_attn_heads": 1, "local_window_size": 8},
        {"ff_glu": True},
    ):
        model = build(num_tokens=7, max_seq_len=16, dim=12, depth=1, heads=2, dim_head=8, **options)
        line = refusal(model.state_dict(), "performer-pytorch")
        (name, *_) = options
        assert "which no model here has" in line
        assert name in line or "reversible" in line


def test_a_decoder_with_cross_attention_is_refused_by_name():
    encoder = restated.fast_transformers_weights()
    decoder = renamed(encoder, ".attention.", ".cross_attention.")
    assert "has cross-attention (TransformerDecoder)" in refusal(decoder, "fast-transformers")


def test_positions_that_a_tree_does_not_have_are_asked_for():
    tree = restated.google_tree(omega="shared")
    del tree["AddLearnedPositionalEncodings_1"]
    assert "Add the array that was added as" in refusal(tree, "google-jax")


@pytest.mark.parametrize(
    ("library", "make", "told", "words"),
    [
        ("performer", dict, {}, "unknown library 'performer'"),
        ("performer-pytorch", dict, {}, "nothing is not"),
        ("google-jax", restated.performer_pytorch_weights, {}, "or its library= if it is of"),
        ("performer-pytorch", restated.performer_pytorch_weights, {"features": "hyperbolic"},
         "unknown features of this library 'hyperbolic'"),
        ("performer-pytorch", restated.performer_pytorch_weights, {"num_heads": 4},
         f"num_heads must be {HEADS} in this checkpoint"),
        ("performer-pytorch", restated.performer_pytorch_weights, {"num_projections": 7},
         f"has ω of {ROWS} rows, which is loaded as it is: got num_projections=7"),
        ("performer-pytorch", restated.performer_pytorch_weights, {"hidden_act": "gelo"},
         "unknown hidden_act 'gelo'"),
        ("fast-transformers", lambda: restated.fast_transformers_weights(False), {},
         "num_heads must be given"),
        ("fast-transformers", lambda: restated.fast_transformers_weights(False), {"num_heads": 3},
         "num_heads must be a divisor of all coordinates of queries in this checkpoint"),
        ("fast-transformers", lambda: restated.fast_transformers_weights(False),
         {"num_heads": HEADS, "features": "exact", "scale": 0.3}, "scale belongs to linear"),
        ("fast-transformers", lambda: restated.fast_transformers_weights(False),
         {"num_heads": HEADS, "features": "hyperbolic"}, "need ω, and this checkpoint has none"),
        ("google-jax", restated.google_tree, {}, "to a tree of JAX as projection_matrix"),
        ("google-jax", lambda: restated.google_tree(omega="own"), {"scale": -1.0},
         "scale must be positive"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_must_hold(library, make, told, words):
    assert words in refusal(make(), library, **told)


def test_a_checkpoint_with_a_weight_too_few_or_of_another_size_is_refused(weights):
    name = "performer.net.layers.0.1.fn.fn.w2.weight"
    few = {n: x for n, x in weights.items() if n != name}
    assert "mlp.down_proj.weight is absent in the checkpoint" in refusal(few, "performer-pytorch")
    other = weights | {name: torch.ones(HIDDEN, 7)}
    assert f"is ({HIDDEN}, 7) in the checkpoint" in refusal(other, "performer-pytorch")
    more = weights | {"classifier.weight": torch.ones(3)}
    assert "classifier.weight is not" in refusal(more, "performer-pytorch")


def test_tensors_of_another_rank_are_refused(weights):
    for name, words in (
        ("performer.net.layers.0.0.fn.to_q.weight", "shape"),
        ("performer.net.layers.0.0.fn.fast_attention.projection_matrix", "shape"),
        ("token_emb.weight", "in the checkpoint and must be"),
    ):
        assert words in refusal(weights | {name: torch.ones(DIM)}, "performer-pytorch")
    tree = restated.google_tree(omega="own")
    tree["Transformer1DBlock_2"]["SelfAttention_1"]["query"]["kernel"] = torch.ones(HIDDEN)
    assert "shape" in refusal(tree, "google-jax")


def test_a_new_omega_is_drawn_only_where_it_is_asked_for():
    tree = restated.google_tree()
    model = import_checkpoint(tree, "google-jax", num_projections=19)
    assert model.performer.layers[0].attention.mechanism.feature_map.omega.shape == (19, DIM)
    assert model.config.origin["num_projections"] == 19


def run(*arguments):
    return CliRunner().invoke(app, ["import-checkpoint", *map(str, arguments)])


def test_the_command_writes_a_model_folder(weights, tmp_path):
    source, output = tmp_path / "model.pt", tmp_path / "imported"
    torch.save(weights, source)
    options = (source, "--library", "performer-pytorch", "--output", output)
    result = run(*options)
    assert result.exit_code == 0, result.output
    assert "a PerformerForMaskedLM of" in result.stdout
    model = PerformerForMaskedLM.from_pretrained(output)
    assert_same(model, import_checkpoint(weights, "performer-pytorch"))
    assert not [path for path in output.iterdir() if path.suffix in (".bin", ".pt")]
    again = run(*options)
    assert again.exit_code == 2
    assert "already holds something. Add --force" in again.stderr
    assert run(*options, "--force").exit_code == 0


def test_the_command_refuses_an_attention_layer_alone(weights, tmp_path):
    start = "performer.net.layers.0.0.fn."
    torch.save(weights, tmp_path / "model.pt")
    result = run(
        tmp_path / "model.pt", "--library", "performer-pytorch", "--prefix", start,
        "--output", tmp_path / "imported",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "an attention layer alone" in result.stderr
    assert not (tmp_path / "imported").exists()
