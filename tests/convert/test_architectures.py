"""Every architecture that is named in the documents is switched, trained on, saved and reloaded.

What is checked is said in the survey, which tries all the others too.
"""

import json

import pytest
import survey_architectures as survey

PAIRS = "attends with a mask of pairs of its own (an indexer, or a mask that depends on the input)"
REFUSED = {
    "bloom": "attention of its own, not the AttentionInterface",
    "deepseek_v32": PAIRS,
    "doge": PAIRS,
    "falcon": "attention of its own, not the AttentionInterface",
    "gemma2": "attends with a soft cap on its logits (softcap=)",
    "mpt": "attention of its own, not the AttentionInterface",
    "t5": "attends with a bias for each pair of positions (position_bias=)",
}


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("name", survey.NAMED)
def test_the_architecture_works_or_is_refused_with_the_reason(name):
    found = survey.run(name)
    if name in REFUSED:
        assert found == {"result": "refused", "reason": REFUSED[name]}
    else:
        assert found == {"result": "works"}


def test_the_last_survey_found_nothing_wrong():
    record = json.loads(survey.RESULTS.read_text(encoding="utf-8"))
    results = record["architectures"]
    assert not [name for name, found in results.items() if found["result"] == "wrong"]
    for name in survey.NAMED:
        assert results[name]["result"] == ("refused" if name in REFUSED else "works")
