"""A page explains the words of this library that it uses, or links to where they are explained."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GLOSSARY = (DOCS / "glossary.md").read_text(encoding="utf-8")
WORDS = [heading.lower() for heading in re.findall(r"^## (.+)$", GLOSSARY, re.MULTILINE)]

# The glossary, the page on the method to which its entries lead, and lists to look things up in.
OTHERS = ("glossary", "explained", "errors", "behaviors", "paper-map", "reproduction")
PAGES = [
    ROOT / "README.md",
    *(path for path in sorted(DOCS.glob("*.md")) if path.stem not in OTHERS),
    *sorted((DOCS / "tutorials").glob("*.md")),
]

# Words that mean something else on a page: kernels of a GPU, frames of sound, weights of a layer.
OTHERWISE = {
    "README.md": {"kernel"},
    "planning.md": {"kernel"},
    "conversion.md": {"frame"},
    "migration.md": {"projection"},
}

# What is no prose: blocks of code, inline code, comments, headings, pictures, where links lead.
NO_PROSE = re.compile(
    r"```.*?```|`[^`]*`|<!--.*?-->|^#.*?$|(!\[[^\]]*)?\]\([^)]*\)|^ {4}.*?$|hidden states?",
    re.DOTALL | re.MULTILINE,
)


def unexplained(page: str, name: str = "") -> list[str]:
    """The words of the glossary that a page uses, and neither links nor explains in *emphasis*."""
    prose = NO_PROSE.sub("", page)
    lacking = []
    for word in WORDS:
        spelled = rf"\b{word.removesuffix('s')}(s|d)?\b"
        is_used = re.search(spelled, prose, re.IGNORECASE) and word not in OTHERWISE.get(name, ())
        is_linked = f"glossary.md#{word.replace(' ', '-')})" in page
        is_explained = re.search(rf"\*[^*\n]*{spelled}[^*\n]*\*", prose, re.IGNORECASE)
        if is_used and not is_linked and not is_explained:
            lacking.append(word)
    return lacking


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_explains_its_jargon_or_links_to_the_glossary(path: Path) -> None:
    assert unexplained(path.read_text(encoding="utf-8"), path.name) == []


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("A sum has a frame, and the frames agree.", ["frame"]),
        ("A sum has a [frame](glossary.md#frame).", []),
        ("Its *frame* is the largest exponent. A frame is kept.", []),
        ("`frame` is a variable.\n\n## The frame\n\n```\nframe = 3\n```\n", []),
        ("With landmarks and a near field", ["near field", "landmark"]),
        ("The last hidden states are vectors.", []),
    ],
)
def test_a_word_that_is_not_explained_is_found(page: str, words: list[str]) -> None:
    assert unexplained(page) == words
