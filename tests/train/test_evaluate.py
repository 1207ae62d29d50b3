"""An evaluation asks for what a model cannot see, and its numbers are those of the definition."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from performers.data import MASK_TOKEN_ID, crop_sequences, mask_tokens
from performers.data.vocabulary import VOCAB_SIZE
from performers.train import Evaluation
from performers.train.tasks import TASKS

pytestmark = pytest.mark.usefixtures("without_shape_checks")  # `Told` is no Performer

PROTEINS = [("MKVLAWYTRNDCQ"[start:] + "ACEFGHI") * 4 for start in range(13)]


class Told(nn.Module):
    """Logits that a function of the input ids gives, and nothing to learn."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.logits(input_ids))


def evaluate(logits, task, batch_size=2, seed=3):
    return Evaluation(Told(logits), task, crop_sequences(PROTEINS, 61), batch_size, seed).run()


def test_copying_what_is_seen_is_never_right():
    scores = evaluate(lambda ids: 9.0 * F.one_hot(ids, VOCAB_SIZE), "masked-lm")
    assert scores["num_scored"] > 0
    assert scores["accuracy"] == 0


@pytest.mark.parametrize("task", TASKS)
def test_every_score_is_that_of_its_definition(task):
    """Recomputed protein by protein, position by position."""
    torch.manual_seed(1)
    table = torch.randn(VOCAB_SIZE, VOCAB_SIZE)
    scores = evaluate(lambda ids: table[ids], task)
    right, nats = [], []
    for protein in crop_sequences(PROTEINS, 61):
        ids = protein["input_ids"][None]
        seen, answers = ids[0], ids[0]
        if task == "masked-lm":
            seen = mask_tokens(ids, 3)[0][0]
            asked = [i for i, token in enumerate(seen) if token == MASK_TOKEN_ID]
        else:  # the position before says what comes
            seen, answers = ids[0, :-1], ids[0, 1:]
            asked = range(len(seen))
        for i in asked:
            log_p = table[seen[i]].double().log_softmax(dim=0)
            right.append(int(log_p.argmax() == answers[i]))
            nats.append(-float(log_p[answers[i]]))
    loss = sum(nats) / len(nats)
    assert scores == {
        "task": task,
        "proteins": len(crop_sequences(PROTEINS, 61)),
        "accuracy": pytest.approx(sum(right) / len(right)),
        "loss": pytest.approx(loss, rel=1e-5),
        "perplexity": pytest.approx(math.exp(loss), rel=1e-5),
        "bits_per_character": pytest.approx(loss / math.log(2), rel=1e-5),
        "num_scored": len(nats),
    }
