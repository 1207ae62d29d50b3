"""A config means what it says, and what it cannot mean is named before any work."""

import pytest
import yaml

from performers.train import load_config, shipped_configs
from performers.train.tasks import model_config


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_loads_and_describes_a_model(name):
    config = load_config(name)
    assert model_config(config).attention == config.attention
    assert shipped_configs()[name]


def test_the_papers_hyperparameters_are_the_defaults(config_file):
    trainer = load_config(config_file).trainer
    assert (trainer["adam_beta1"], trainer["adam_beta2"]) == (0.9, 0.98)
    assert trainer["adam_epsilon"] == 1e-9
    assert trainer["learning_rate"] == 1e-3
    assert trainer["weight_decay"] == 0.1
    assert trainer["max_grad_norm"] == 0.5
    assert model_config(load_config(config_file)).hidden_dropout_prob == 0.1


def test_the_papers_protein_model_is_the_paper_s():
    model = model_config(load_config("protein-mlm"))
    shape = (
        model.num_attention_heads,
        model.num_hidden_layers,
        model.intermediate_size,
        model.hidden_size,
    )
    assert shape == (8, 36, 1024, 512)
    assert (model.attention, model.num_projections) == ("performer-relu", 256)


def test_overrides_reach_every_section(config_file):
    config = load_config(
        config_file, ["seed=3", "model.attention=exact", "trainer.learning_rate=2e-4", "compare=[]"]
    )
    assert (config.seed, config.attention, config.compare) == (3, "exact", [])
    assert config.trainer["learning_rate"] == 2e-4


def test_a_config_survives_being_written_and_read(config_file, tmp_path):
    config = load_config(config_file)
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("redraw_evry=3", "unknown key 'redraw_evry'.*Did you mean 'redraw_every'"),
        ("model.hiden_size=3", "unknown key 'model.hiden_size'.*Did you mean 'hidden_size'"),
        ("trainer.learning_rat=3", "'trainer.learning_rat'.*Did you mean 'learning_rate'"),
        ("data.lenght=3", "unknown key 'data.lenght'.*Did you mean 'length'"),
        ("trainer.qqqqq=3", "unknown key 'trainer.qqqqq'.*See the fields of TrainingArguments"),
        ("trainer.output_dir=x", "trainer.output_dir is not to be set: use --output"),
        ("model.vocab_size=7", "model.vocab_size is not to be set"),
        ("trainer.max_steps=many", "trainer.max_steps must be a whole number, got 'many'"),
        ("trainer.learning_rate=fast", "trainer.learning_rate must be a number, got 'fast'"),
        ("model.num_hidden_layers=2.5", "model.num_hidden_layers must be a whole number, got 2.5"),
        ("data.concatenate=1", "data.concatenate must be true or false, got 1"),
        ("seed=true", "seed must be a whole number, got True"),
        ("task=masked", "unknown task 'masked'.*Did you mean 'masked-lm'"),
        ("compare=[exakt]", "unknown attention in compare 'exakt'.*Did you mean 'exact'"),
        ("compare=exact", "compare must be a list, got 'exact'"),
        ("redraw_every=-1", "redraw_every must be at least 0"),
        ("data.length=1", "data.length must be at least 2"),
        ("data.valid_fraction=0", "data.valid_fraction must be above 0"),
        ("max_seconds=0", "max_seconds must be positive and finite, got 0"),
        ("max_seconds=.inf", "max_seconds must be positive and finite, got inf"),
        (f"trainer.max_steps={10**400}", "trainer.max_steps must be at most .*, got 1000"),
        (f"trainer.max_steps={-(10**400)}", "trainer.max_steps must be .*got -1000"),
        ("trainer.save_total_limit=1", "save_total_limit must be at least 2"),
        ("model=3", "model must be a mapping of keys, got 3"),
        ("seed.deep=3", "sets a key inside 'seed', which holds one value"),
        ("seed", "an override must be key=value"),
        ("data.source=[", "must be YAML"),
        ("data.source=[3]", "data.source must be a list of words, got .3."),
        ("data.source=[]", "data.source must be sample, or FASTA files: .*, got none"),
        ("data.source=''", "data.source must be sample, or FASTA files: .*, got none"),
        ("compare=[[exact]]", "compare must be a list of words"),
        ("model.dtype=bfloat16", "model.dtype is not to be set: .*trainer.bf16=true"),
        ("trainer.learning_rate=1" + 400 * "0", r"must be a number, got 10+\.\.\.0+\."),
        ("model.id2label={}", "model.id2label is not to be set: it is transformers'"),
    ],
)
def test_a_wrong_key_or_value_is_named(config_file, override, words):
    with pytest.raises(ValueError, match=words):
        load_config(config_file, [override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.lr_scheduler_kwargs={}", "trainer.lr_scheduler_kwargs counts in steps"),
        ("trainer.warmup_steps=20", "warmup_steps must be below 1 beside max_seconds.*got 20"),
        ("trainer.lr_scheduler_type=inverse_sqrt", "unknown trainer.lr_scheduler_type"),
    ],
)
def test_what_counts_in_steps_is_refused_beside_a_time(override, words):
    with pytest.raises(ValueError, match=words):
        load_config("demo", [override])


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("demo", "trainer.max_steps=9"),
        ("demo", "trainer.num_train_epochs=2"),
        ("protein-mlm", "max_seconds=9"),
        ("protein-mlm", "trainer.num_train_epochs=2"),
    ],
)
def test_the_end_that_an_override_gives_a_run_replaces_that_of_the_file(name, override):
    config = load_config(name, [override])
    ends = {"max_seconds": config.max_seconds} | {
        f"trainer.{key}": config.trainer.get(key) for key in ("max_steps", "num_train_epochs")
    }
    key, value = override.split("=")
    assert {end: x for end, x in ends.items() if x is not None} == {key: float(value)}


def test_two_ends_of_a_run_that_are_asked_for_are_refused_and_none_takes_nothing_out(config_file):
    for name in (config_file, "demo"):
        with pytest.raises(ValueError, match=r"max_seconds says how long .* leave one of the two"):
            load_config(name, ["max_seconds=9", "trainer.max_steps=3"])
    config = load_config(config_file, ["max_seconds=null"])
    assert config.trainer["max_steps"] == load_config(config_file).trainer["max_steps"]


def test_the_demo_compares_a_performer_with_exact_attention_and_none_for_equal_time():
    config = load_config("demo")
    assert config.compare == ["performer-relu", "exact", "identity"]
    assert config.max_seconds is not None
    assert (config.data.length, config.data.concatenate) == (8192, True)
    for attention in (config.attention, *config.compare):
        assert model_config(config.with_attention(attention)).attention == attention


def test_only_what_a_mechanism_takes_reaches_it(config_file):
    config = load_config(config_file, ["model.attention=performer-positive", "model.window_size=5"])
    assert model_config(config).window_size == 5
    for attention in ("exact", "identity", "performer-relu"):
        assert model_config(config.with_attention(attention)).window_size is None


def test_a_window_is_refused_where_it_means_nothing_and_left_with_the_attention_that_it_was_for(
    config_file,
):
    for window in (-1, 5):
        own = ["model.attention=performer-relu", f"model.window_size={window}"]
        with pytest.raises(ValueError, match="window_size"):
            model_config(load_config(config_file, own))
    near = load_config(config_file, ["model.attention=performer-positive", "model.window_size=5"])
    file = config_file.with_name("near.yaml")
    file.write_text(near.to_yaml())
    file.write_text(near.to_yaml().replace("performer-positive", "performer-relu"))
    beside = load_config(file)
    with pytest.raises(ValueError, match="window_size puts exact softmax scores beside"):
        model_config(beside)
    file.write_text(near.to_yaml())
    for word, window in (("performer-relu", None), ("exact", None), ("performer-hyperbolic", 5)):
        config = load_config(file, [f"model.attention={word}"])
        assert model_config(config).window_size == window
        assert config.model.get("window_size") == window


def test_a_mix_is_compared_with_mechanisms_that_are_none(config_file):
    config = load_config(config_file, ["model.attention={exact: 1, local: 1}", "compare=[exact]"])
    assert config.attention == "1 exact + 1 local"
    assert config.with_attention(config.attention) == config
    assert config.with_attention("exact").attention == "exact"


def test_options_of_a_mechanism_are_for_it_alone(config_file):
    config = load_config(
        config_file,
        ["model.attention=linformer", "model.attention_options.num_projections=5"],
    )
    assert model_config(config).attention_options == {"num_projections": 5}
    assert model_config(config.with_attention("linformer")).attention_options is not None
    assert model_config(config.with_attention("reformer")).attention_options is None
    wrong = load_config(config_file, ["model.attention=local", "model.attention_options.size=5"])
    with pytest.raises(ValueError, match=r"'size': choose one of \['window_size'\]"):
        model_config(wrong)


def test_a_run_in_old_words_is_read_with_a_warning(config_file):
    old = ["model.attention=performer-softmax", "model.estimator=hyperbolic"]
    with pytest.warns(FutureWarning, match="this is attention='performer-hyperbolic'"):
        assert load_config(config_file, old).attention == "performer-hyperbolic"
    with pytest.warns(FutureWarning, match="this is attention='performer-positive'"):
        config = load_config(config_file, ["compare=[performer-softmax, exact]"])
    assert config.compare == ["performer-positive", "exact"]


def test_a_missing_config_names_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match=r"no config file runs/x.yaml.*demo"):
        load_config("runs/x.yaml")
    with pytest.raises(ValueError, match=r"unknown config 'demmo'.*Did you mean 'demo'"):
        load_config("demmo")


@pytest.mark.parametrize("text", ["- a list", "task: [", ""])
def test_a_file_that_is_no_config_is_refused(tmp_path, text):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"wrong.yaml must be a YAML"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("trainer: {max_steps: 3}\nmodel: {}\ntrainer: {learning_rate: 1}", "trainer", (1, 3)),
        ("model:\n  hidden_size: 8\n  attention: exact\n  hidden_size: 9", "hidden_size", (2, 4)),
        ("data: {length: 7,\n  length: 9}", "length", (1, 2)),
        ("compare: [{a: 1, b: 2}, {a: 1,\n'a': 2}]", "a", (1, 2)),
    ],
)
def test_a_key_that_is_given_twice_is_refused_with_both_lines(tmp_path, text, key, lines):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    words = f"twice.yaml: .*{key!r} is given in line {lines[0]} and in line {lines[1]}"
    with pytest.raises(ValueError, match=words):
        load_config(path)


def test_a_key_may_come_again_in_another_section_and_under_a_merged_one(tmp_path):
    text = "model: &m {hidden_size: 16}\ndata: {length: 7}\n"
    path = tmp_path / "merged.yaml"
    path.write_text(text + "trainer: {lr_scheduler_kwargs: {<<: *m, hidden_size: 8, length: 9}}")
    kwargs = load_config(path).trainer["lr_scheduler_kwargs"]
    assert kwargs == {"hidden_size": 8, "length": 9}


@pytest.mark.parametrize("text", ["[" * 3000 + "]" * 3000, "{a: " * 999 + "}" * 999])
def test_a_yaml_that_is_too_deep_is_refused(config_file, tmp_path, text):
    (tmp_path / "deep.yaml").write_text(f"data: {text}")
    with pytest.raises(ValueError, match=r"deep.yaml: a YAML text must not be nested deeper"):
        load_config(tmp_path / "deep.yaml")
    with pytest.raises(ValueError, match=r"a YAML text must not be nested deeper"):
        load_config(config_file, [f"data={text}"])


def test_heads_of_another_dim_are_a_choice_of_the_model(config_file):
    config = load_config(config_file, ["model.head_dim=10"])
    assert model_config(config).head_dim == 10
    assert model_config(load_config(config_file)).head_dim == 6


def test_yaml_floats_without_a_dot_are_numbers(config_file):
    assert yaml.safe_load("1e-3") == "1e-3"  # why the config converts
    assert load_config(config_file, ["trainer.learning_rate=1e-3"]).trainer["learning_rate"] == 1e-3
