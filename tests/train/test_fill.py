"""Hidden residues are filled with what the model finds likeliest among amino acids."""

import pytest
import torch
from train.test_embed import saved

from performers.data import MASK_TOKEN_ID, encode
from performers.data.vocabulary import AMINO_ACIDS, BOS_TOKEN_ID, EOS_TOKEN_ID
from performers.models import PerformerForCausalLM, PerformerForMaskedLM
from performers.train import Filling


def test_probabilities_are_those_of_the_model_over_amino_acids(tmp_path):
    checkpoint = saved(tmp_path / "model")
    found = Filling.prepare(checkpoint, "MK?YI<mask>K", top=25).run()
    ids = encode("MKXYIXK")
    ids[[2, 5]] = MASK_TOKEN_ID
    ids = torch.cat([torch.tensor([BOS_TOKEN_ID]), ids, torch.tensor([EOS_TOKEN_ID])])
    with torch.no_grad():
        logits = PerformerForMaskedLM.from_pretrained(checkpoint).eval()(ids[None]).logits[0]
    filled = list("MK?YI?K")
    for residue, place in zip(found["residues"], (2, 5), strict=True):
        assert residue["position"] == place + 1
        weights = logits[place + 1, 4:].double().exp()
        expected = dict(zip(AMINO_ACIDS, (weights / weights.sum()).tolist(), strict=True))
        assert residue["likely"] == pytest.approx(expected, rel=1e-5)
        assert list(residue["likely"]) == sorted(expected, key=expected.get, reverse=True)
        filled[place] = max(expected, key=expected.get)
    assert found["sequence"] == "".join(filled)


def test_as_many_as_asked_are_listed_but_no_more_than_there_are(tmp_path):
    checkpoint = saved(tmp_path / "model")
    for top, count in ((1, 1), (3, 3), (99, 25)):
        (residue,) = Filling.prepare(checkpoint, "?", top).run()["residues"]
        assert len(residue["likely"]) == count


@pytest.mark.parametrize(
    ("sequence", "top", "words"),
    [
        ("MKTAY", 5, r"must hide a residue: write \? or <mask>"),
        ("MK?1", 5, "got '1' at position 4"),
        ("MK?", 0, "top must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_filled_is_refused(sequence, top, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Filling.prepare(saved(tmp_path / "model"), sequence, top)


def test_a_causal_model_fills_nothing(tmp_path):
    checkpoint = saved(tmp_path / "model", PerformerForCausalLM)
    with pytest.raises(ValueError, match="must hold a masked model, which sees both sides"):
        Filling.prepare(checkpoint, "MK?")
