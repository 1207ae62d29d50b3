"""Processes that share sequences, heads or weights train, score and resume as one process does."""

import shutil

import pytest
import yaml
from laid_out_runs import check_equal, trained

from performers.train import load_config
from performers.train.checkpoints import last_whole_checkpoint
from performers.train.layout import Layout
from performers.train.shares import Shares, check_shares

# Windows of two tokens more than pieces and blocks divide; sharp features have buffers per head.
MODELS = {
    "masked-lm": {"attention": "performer-sharp"},
    "causal-lm": {"attention": "performer-positive", "window_size": 4, "num_key_value_heads": 2},
}


@pytest.fixture(scope="module")
def write(fasta, tmp_path_factory):
    """The file of a run of 5 steps of 12 sequences in one epoch, which saves and scores after 3."""

    def config_of(task):
        tree = {
            "task": task,
            "seed": 5,
            "redraw_every": 2,
            "data": {"source": str(fasta), "length": 31, "concatenate": task == "causal-lm"},
            "model": {
                "hidden_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 18,
                "num_projections": 7,
                "hidden_dropout_prob": 0.0,
                **MODELS[task],
            },
            "trainer": {
                "max_steps": 5,
                "per_device_train_batch_size": 12,
                "per_device_eval_batch_size": 4,
                "logging_steps": 1,
                "eval_steps": 3,
                "save_steps": 3,
                "use_cpu": True,
                "disable_tqdm": True,
            },
        }
        path = tmp_path_factory.mktemp("config") / f"{task}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return config_of


LAYOUTS = {
    "pieces": (2, ["split_sequences=2"]),
    "heads": (2, ["shard_heads=2"]),
    "all": (4, ["split_sequences=2", "shard_heads=2", "shard_weights=true"]),
    "pieces of two groups": (
        4,
        ["split_sequences=2", "shard_weights=true", "trainer.per_device_train_batch_size=6"],
    ),
    "heads of two groups": (
        4,
        [
            "shard_heads=2",
            "trainer.per_device_train_batch_size=3",
            "trainer.gradient_accumulation_steps=2",
        ],
    ),
}
# What one layout has saved, another goes on with.
AFTERWARDS = {"heads": (1, []), "all": LAYOUTS["pieces"], "pieces": LAYOUTS["heads"]}


@pytest.mark.slow
@pytest.mark.timeout(1200)  # nine runs
@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("task", MODELS)
def test_every_layout_trains_scores_and_resumes_to_the_numbers_of_one_process(
    task, write, tmp_path
):
    path = write(task)
    expected = trained(path, tmp_path / "one")
    for name, (processes, keys) in LAYOUTS.items():
        check_equal(trained(path, tmp_path / name, processes, keys), expected)
    for name, (processes, keys) in AFTERWARDS.items():
        for file in ("metrics.json", "result.json"):
            (tmp_path / name / file).unlink()
        shutil.rmtree(last_whole_checkpoint(tmp_path / name / "checkpoints"))
        assert last_whole_checkpoint(tmp_path / name / "checkpoints").name == "checkpoint-3"
        check_equal(trained(path, tmp_path / name, processes, keys, resume=True), expected)


@pytest.mark.parametrize(
    ("keys", "processes", "words"),
    [
        (["split_sequences=2"], 3, "split_sequences=2 needs 2, 4, 6, … processes, and this run "
         "has 3. Start it with torchrun --nproc-per-node 2, or leave split_sequences=2 out"),
        (["shard_heads=2", "split_sequences=2"], 5, "needs 4, 8, 12, … processes, .* has 5"),
        (["shard_weights=true"], 1, "shard_weights=true needs 2, 3, 4, … processes"),
        (["shard_heads=3"], 3, "over 1, 2 ranks here, and 3 are asked for: .*_heads=2, .*=512"),
        (["split_sequences=2", "model.attention=exact", "model.window_size=null"], 2,
         r"layers\.0\.attention attends by something else than FAVOR\+"),
        (["shard_heads=2", "model.reversible=true"], 2, "reversible layers compute in halves"),
        (["shard_weights=true", "trainer.optim=adafactor"], 2, "optim=adafactor takes whole"),
        (["shard_heads=2", "trainer.optim=adamw_torch_fused"], 2, "fused takes weights of one cut"),
        (["shard_weights=true", "trainer.fp16=true"], 2, "Take trainer.bf16, or leave shard_w"),
        (["shard_weights=true", "trainer.torch_compile=true"], 2, "would compile whole weights"),
        (["split_sequences=2", "trainer.label_smoothing_factor=0.1"], 2, "takes whole sequences"),
        (["split_sequences=2", "trainer.neftune_noise_alpha=5"], 2, "takes whole sequences"),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_is_refused_with_what_can(keys, processes, words):
    sizes = ["model.num_attention_heads=2", "model.intermediate_size=512"]
    config = load_config("demo", [*sizes, "compare=[]", *keys])
    with pytest.raises(ValueError, match=words):
        Layout.of(config, processes).check(config)


def test_a_run_may_be_laid_out_anew_unless_processes_draw_other_dropout():
    before, none = Shares(2, 1, 6, 1), {"model.hidden_dropout_prob": 0.0}
    for now in (Shares(4, 1, 6, 1, pieces=2), Shares(2, 1, 12, 1, heads=2), Shares(1, 1, 12, 1)):
        check_shares(before, now, none, sequences=72)
        with pytest.raises(ValueError, match="each process draws by itself for"):
            check_shares(before, now, {"model.hidden_dropout_prob": 0.1}, sequences=72)
    pieces, heads = Shares(2, 1, 12, 1, pieces=2), Shares(2, 1, 12, 1, heads=2)
    with pytest.raises(ValueError, match="each process draws by itself for"):
        check_shares(pieces, heads, {"model.hidden_dropout_prob": 0.1}, sequences=72)
    with pytest.raises(ValueError, match="split_sequences=2 · "):
        check_shares(before, Shares(4, 1, 3, 1, pieces=2), none, sequences=72)
