import pytest
import torch

from performers.reproduction.books import Books, evaluations, transfer_weights
from performers.train.checkpoints import last_whole_checkpoint

WORDS = ["the", "of", "a", "to", "he", "she", "was", "had", "and", "in", "it", "not"]
MODEL = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 17,
    "num_projections": 7,
}
EXACT, FAVOR = {**MODEL, "attention": "exact"}, {**MODEL, "attention": "performer-positive"}
TRAINER = {
    "max_steps": 4,
    "per_device_train_batch_size": 5,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_on_start": True,
    "save_steps": 2,
    "use_cpu": True,
    "disable_tqdm": True,
}


def book(seed, count=101):
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (count, 7), generator=generator).tolist()
    return " ".join(" ".join(WORDS[i] for i in row).capitalize() + "." for row in picks)


@pytest.fixture(scope="module")
def texts():
    return {"one": book(1), "two": book(2), "three": book(3)}


@pytest.fixture(scope="module")
def books(texts):
    return Books.prepare(texts, "two", "sentences", 61, length=19, num_valid=23, seed=0)


def test_the_held_out_book_is_scored_and_never_trained_on(texts, books):
    def rows(data):
        return {tuple(data[i]["input_ids"].tolist()) for i in range(len(data))}

    assert len(books.valid) == 23
    assert not rows(books.valid) & rows(books.train)
    swapped = Books.prepare(texts, "one", "sentences", 61, length=19, num_valid=23, seed=0)
    assert rows(swapped.valid) != rows(books.valid)


def test_windows_have_one_length(texts):
    windows = Books.prepare(texts, "two", "windows", 61, length=19, num_valid=5, seed=0)
    assert set(windows.train.lengths) == set(windows.valid.lengths) == {19}


@pytest.mark.parametrize(
    ("held_out", "num_valid", "words"),
    [
        ("four", 5, r"held_out must be one of .*'four'"),
        ("two", 999, "at least num_valid sentences"),
    ],
)
def test_what_cannot_be_held_out_is_refused(texts, held_out, num_valid, words):
    with pytest.raises(ValueError, match=words):
        Books.prepare(texts, held_out, "sentences", 61, length=19, num_valid=num_valid, seed=0)


def test_all_weights_are_transferred_and_omega_stays(books):
    exact, performer = books.build_model(EXACT, 0), books.build_model(FAVOR, 1)
    drawn = {n: w.clone() for n, w in performer.state_dict().items() if "omega" in n}
    transfer_weights(exact, performer)
    after = performer.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in exact.state_dict().items())
    assert drawn
    assert all(torch.equal(after[name], omega) for name, omega in drawn.items())


def test_weights_of_another_shape_are_not_transferred_in_part(books):
    deeper = books.build_model({**FAVOR, "num_hidden_layers": 3}, 0)
    with pytest.raises(ValueError, match=r"differ in their mechanism alone.*layers\.2\."):
        transfer_weights(books.build_model(EXACT, 0), deeper)


def test_a_transferred_model_starts_where_the_other_ended(books, tmp_path):
    exact = books.train_model(tmp_path / "exact", EXACT, TRAINER, seed=0)
    again = books.train_model(tmp_path / "again", EXACT, TRAINER, seed=1, start_from=exact.model)
    # Another seed, and still the same tokens are asked.
    assert evaluations(again)[0][1:] == evaluations(exact)[-1][1:]


def test_an_interrupted_training_ends_as_one_that_was_not(books, tmp_path, monkeypatch):
    whole = books.train_model(tmp_path / "whole", FAVOR, TRAINER, seed=0, redraw_every=3)

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("performers.train.redraw.RedrawFeatures.on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            books.train_model(tmp_path / "cut", FAVOR, TRAINER, seed=0, redraw_every=3)
    assert last_whole_checkpoint(tmp_path / "cut/checkpoints").name == "checkpoint-2"
    resumed = books.train_model(tmp_path / "cut", FAVOR, TRAINER, seed=0, redraw_every=3)
    done = books.train_model(tmp_path / "cut", FAVOR, TRAINER, seed=0, redraw_every=3)
    assert done.peak_memory is None
    for trainer in (resumed, done):
        assert evaluations(trainer) == evaluations(whole)
        weights = whole.model.state_dict()
        assert all(torch.equal(weights[n], w) for n, w in trainer.model.state_dict().items())
