"""Every field of TrainingArguments is served, and means what it says, or is refused by name."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from performers.train import Run, load_config
from performers.train.options import REFUSED_OPTIONS, TRAINER_OPTIONS, Served
from performers.train.tasks import build_model
from performers.train.trainer import TokenTrainer

FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
SERVED = {name for name, row in TRAINER_OPTIONS.items() if isinstance(row, Served)}

# Those that transformers has from 5.23 on.
NEWEST = {"activation_checkpointing", "activation_checkpointing_kwargs"}

# How a run is done: the numbers are the same. Alone or with others, in a run or in two.
HOW = [
    {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_num_workers": 2,
        "dataloader_prefetch_factor": 3,
        "dataloader_multiprocessing_context": "fork",
        "dataloader_pin_memory": True,
        "ddp_broadcast_buffers": False,
        "ddp_bucket_cap_mb": 7,
        "ddp_find_unused_parameters": False,
        "ddp_static_graph": True,
        "ddp_timeout": 77,
        "eval_delay": 1,
        "eval_steps": 2,
        "eval_strategy": "epoch",
        "logging_first_step": True,
        "logging_steps": 3,
        "log_level": "error",
        "log_level_replica": "error",
        "log_on_each_node": False,
        "per_device_eval_batch_size": 3,
        "save_steps": 7,
        "save_total_limit": 3,
        "tf32": False,
        "torch_empty_cache_steps": 1,
    },
    {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "full_determinism": True,
        "max_steps": None,
        "num_train_epochs": 8 / 7,  # an epoch is 7 steps
    },
]
STEPS = 8

# What is trained: each has its test below, by name.
WHAT = {
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "label_smoothing_factor", "neftune_noise_alpha", "bf16",
}  # fmt: skip
BY_ITSELF = {
    "fp16": "refused on a CPU",
    "torch_compile": "a slow test",
    "torch_compile_backend": "a slow test",
    "torch_compile_mode": "a slow test",
    "max_steps": "every run of the tests",
    "report_to": "test_trackers.py",
    "use_cpu": "every run of the tests",
    "disable_tqdm": "every run of the tests",
}


def test_every_field_of_transformers_has_a_row():
    """One that a later transformers adds fails here: find out what it does to a run."""
    assert TRAINER_OPTIONS.keys() >= FIELDS
    assert TRAINER_OPTIONS.keys() - FIELDS <= NEWEST


def test_every_served_field_is_tested():
    how = {name for options in HOW for name in options}
    assert how | WHAT | BY_ITSELF.keys() == SERVED


@pytest.mark.parametrize("name", sorted(REFUSED_OPTIONS))
def test_a_refused_field_is_refused_by_name(config_file, name):
    with pytest.raises(ValueError, match=rf"trainer.{name} is not to be set: \w+"):
        load_config(config_file, [f"trainer.{name}=1"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=-1", "seed must be a whole number from 0 to 4294967295, got -1"),
        ("seed=4294967296", "seed must be a whole number from 0 to 4294967295"),
        ("trainer.learning_rate=.nan", "learning_rate must be at least 0 and finite, got nan"),
        ("trainer.learning_rate=.inf", "learning_rate must be at least 0 and finite, got inf"),
        ("trainer.learning_rate=-1", "learning_rate must be at least 0 and finite, got -1"),
        ("trainer.per_device_train_batch_size=0", "train_batch_size must be at least 1.*got 0"),
        ("trainer.per_device_eval_batch_size=-3", "eval_batch_size must be at least 1.*got -3"),
        ("trainer.gradient_accumulation_steps=-1", "accumulation_steps must be at least 1"),
        ("trainer.max_steps=0", "got 0. Leave it out to train for trainer.num_train_epochs"),
        ("trainer.num_train_epochs=0", "num_train_epochs must be above 0 and finite, got 0"),
        ("trainer.adam_beta2=1", "adam_beta2 must be at least 0 and below 1, got 1"),
        ("trainer.label_smoothing_factor=1", "must be at least 0 and below 1, got 1"),
        ("trainer.torch_compile_backend=foo", "unknown trainer.torch_compile_backend 'foo'"),
        ("trainer.torch_compile_mode=foo", "unknown trainer.torch_compile_mode 'foo'"),
        ("trainer.gradient_checkpointing_kwargs={foo: 1}", "unknown key of trainer.gradient_check"),
        ("trainer.save_steps=0", "save_steps must be above 0 and finite, got 0"),
        ("trainer.warmup_steps=.nan", "warmup_steps must be at least 0 and finite, got nan"),
        ("trainer.optim=adamw_bnb_8bit", "unknown trainer.optim 'adamw_bnb_8bit': choose one of"),
        ("trainer.per_device_train_batch_size=1" + 20 * "0", "batch_size must be at most 922337"),
        ("trainer.max_steps=1" + 20 * "0", "trainer.max_steps must be at most 9223372036854775807"),
        ("trainer.eval_strategy=yes", "unknown trainer.eval_strategy True: choose one of"),
        ("trainer.report_to=[wandb,fax]", "unknown trainer.report_to 'fax': choose one of"),
        ("trainer.log_level=loud", "unknown trainer.log_level 'loud'"),
        ("trainer.dataloader_num_workers=1000000", "at most .*, got 1000000. That is 16 processes"),
        ("trainer.dataloader_prefetch_factor=1000000", "prefetch_factor must be at least 1 and at"),
        ("trainer.gradient_checkpointing_kwargs=x", "kwargs must be a mapping of keys, got 'x'"),
        (
            "trainer.gradient_checkpointing_kwargs={use_reentrant: 3}",
            "gradient_checkpointing_kwargs.use_reentrant must be true or false, got 3",
        ),
        (
            "trainer.gradient_checkpointing_kwargs={determinism_check: 3}",
            "unknown trainer.gradient_checkpointing_kwargs.determinism_check 3: choose one of",
        ),
    ],
)
def test_a_value_that_no_run_can_train_with_is_refused(config_file, override, words):
    with pytest.raises(ValueError, match=words):
        load_config(config_file, [override])


@pytest.mark.parametrize("text", ["no", "'no'", "off"])
def test_no_evaluation_may_be_asked_for_without_quotes(config_file, text):
    """YAML reads such a word as false."""
    config = load_config(config_file, [f"trainer.eval_strategy={text}"])
    assert config.trainer["eval_strategy"] == "no"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.lr_scheduler_type=cosine_with_min_lr"], "lr_scheduler_kwargs"),
        (["trainer.lr_scheduler_kwargs={a: 1}"], "takes no trainer.lr_scheduler_kwargs, got"),
        (["trainer.lr_scheduler_type=linear", "trainer.lr_scheduler_kwargs={a: 1}"], "'a'"),
        (["trainer.lr_scheduler_type=constant", "trainer.warmup_steps=3"], "takes no trainer.warm"),
        (["trainer.optim=rmsprop", "trainer.optim_args=alpha=-1"], "Invalid alpha value: -1"),
        (["trainer.optim_args=beta1=0.5"], "optim_args must be key=value.*got 'beta1=0.5'"),
        (["trainer.fp16=true"], "fp16 needs an accelerator"),
        (["model.hidden_size=1000000000000"], "must fit into memory, and does not: Storage size"),
        (["model.intermediate_size=1000000000000"], "its weights and gradients take .* GiB, and"),
        (
            ["model.intermediate_size=1000000000000", "shard_weights=true"],
            "its weights take .* GiB",
        ),
        (["model.num_hidden_layers=1000000000"], "its weights and gradients take .* GiB, and"),
        (["model.num_projections=1000000000000"], "must fit into memory, and does not: .*allocate"),
    ],
)
def test_what_torch_refuses_is_refused_before_the_folder_is_made(
    config_file, tmp_path, overrides, words
):
    with pytest.raises(ValueError, match=words):
        Run.prepare(load_config(config_file, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def proteins(config_file, tmp_path_factory):
    return Run.prepare(load_config(config_file), tmp_path_factory.mktemp("proteins") / "run").data


@pytest.fixture
def trainer_of(config_file, proteins, tmp_path):
    """A trainer of a small model with given options; each has a folder of its own."""

    def make(task="masked-lm", **options):
        config = load_config(
            config_file, [f"task={task}", "compare=[]", "model.hidden_dropout_prob=0"]
        )
        options = {"max_steps": 3, "eval_strategy": "no", "save_steps": 100, **options}
        given = {**config.trainer, **options}
        config = dataclasses.replace(
            config, trainer={name: value for name, value in given.items() if value is not None}
        )
        torch.manual_seed(3)
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return TokenTrainer(config, folder, build_model(config), proteins.train, proteins.valid)

    return make


@pytest.fixture
def trained(trainer_of):
    def train(**options):
        trainer = trainer_of(**options)
        trainer.train()
        return trainer

    return train


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_how_a_run_is_done_changes_no_number(trained):
    plain = trained(max_steps=STEPS).model.state_dict()
    try:
        for options in HOW:
            known = {name: value for name, value in options.items() if name in FIELDS}
            weights = trained(**{"max_steps": STEPS, **known}).model.state_dict()
            assert all(torch.equal(weights[name], plain[name]) for name in plain)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm"])
def test_smoothed_labels_are_those_that_the_model_predicts(trainer_of, task):
    trainer = trainer_of(task, label_smoothing_factor=0.25)
    model, proteins = trainer.model.eval(), trainer.train_dataset
    batch = trainer.data_collator([proteins[index] for index in range(5)])
    logits, labels = model(**{**batch, "labels": None}).logits, batch["labels"]
    if task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    smoothed = F.cross_entropy(logits.transpose(1, 2), labels, label_smoothing=0.25)
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), smoothed)
    # So does transformers' own Trainer, and an evaluation has the loss without smoothing.
    own = Trainer(model, trainer.args)
    torch.testing.assert_close(own.compute_loss(model, dict(batch)), smoothed)
    batches = list(trainer.get_eval_dataloader())
    counts = [(batch["labels"] != -100).sum() for batch in batches]
    with torch.no_grad():
        sums = [model(**batch).loss * count for batch, count in zip(batches, counts, strict=True)]
    loss = float(sum(sums) / sum(counts))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)


def test_accumulated_batches_train_as_one_large_batch(trained):
    options = {"adam_epsilon": 1e-3}  # else the sign of a gradient near 0 counts as much as any
    whole = trained(per_device_train_batch_size=12, **options)
    parts = trained(per_device_train_batch_size=4, gradient_accumulation_steps=3, **options)
    weights = parts.model.state_dict()
    torch.testing.assert_close(weights, whole.model.state_dict(), rtol=1e-3, atol=1e-5)


def test_the_optimizer_has_the_numbers_of_the_config(trainer_of):
    adam = trainer_of(
        learning_rate=0.25, adam_beta1=0.5, adam_beta2=0.75, adam_epsilon=0.125,
        weight_decay=0.375, optim="adamw_torch",
    ).create_optimizer()  # fmt: skip
    decayed, other = adam.param_groups
    assert type(adam) is torch.optim.AdamW
    for group in (decayed, other):
        assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.5, 0.75), 0.125)
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.375, 0.0)
    rmsprop = trainer_of(optim="rmsprop", optim_args="alpha=0.625").create_optimizer()
    assert rmsprop.param_groups[0]["alpha"] == 0.625


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"lr_scheduler_type": "linear", "warmup_steps": 2}, [0.0, 0.25, 0.5, 0.25]),
        (
            {
                "lr_scheduler_type": "polynomial",
                "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0},
            },
            [0.5, 0.5 * 0.75**2, 0.5 * 0.5**2, 0.5 * 0.25**2],
        ),
    ],
)
def test_the_learning_rate_follows_its_schedule(trainer_of, options, rates):
    trainer = trainer_of(max_steps=4, learning_rate=0.5, **options)
    trainer.create_optimizer_and_scheduler(4)
    found = []
    for _ in range(4):
        found += trainer.lr_scheduler.get_last_lr()[:1]
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert found == pytest.approx(rates)


def test_a_gradient_that_is_too_long_is_cut_to_its_greatest_norm(trainer_of):
    options = {"optim": "sgd", "weight_decay": 0.0, "learning_rate": 1.0, "max_grad_norm": 0.01}
    trainer = trainer_of(max_steps=1, **options)
    before = [weight.clone() for weight in trainer.model.parameters()]
    trainer.train()
    after = trainer.model.parameters()
    steps = [
        (one - other).detach().square().sum() for one, other in zip(before, after, strict=True)
    ]
    assert float(sum(steps).sqrt()) == pytest.approx(0.01, rel=1e-3)


def test_noise_in_the_embeddings_is_there_in_training_alone(trained):
    options = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
    plain, noisy = trained(**options), trained(neftune_noise_alpha=30.0, **options)
    assert logged(plain, "eval_loss") == logged(noisy, "eval_loss")
    assert abs(logged(plain, "loss")[0] - logged(noisy, "loss")[0]) > 1e-3


def test_a_run_in_bfloat16_has_the_losses_of_float32(trained):
    exact, rounded = logged(trained(), "loss"), logged(trained(bf16=True), "loss")
    assert rounded == pytest.approx(exact, rel=0.01)
    assert rounded != exact


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_one_that_is_not(trained):
    compiled = {"torch_compile_backend": "inductor", "torch_compile_mode": "default"}
    exact = logged(trained(), "loss")
    assert logged(trained(torch_compile=True, **compiled), "loss") == pytest.approx(exact, rel=1e-4)
