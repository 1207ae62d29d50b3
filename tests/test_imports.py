"""The core needs torch alone, names are imported when used, and imports point down.

The order is proved on the syntax tree of every file, so that an import inside a function, which
runs only on some machine on some day, counts like any other.
"""

import ast
import importlib
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import performers

PACKAGE = Path(performers.__file__).parent
DOOR = "__init__"

# From the top down. A layer may import every layer below it; the names in one set never import
# each other.
LAYERS = (
    {"cli"},
    {"reproduction", "planning", "explore"},
    {"speed"},
    {"train", "viz"},
    {"distributed"},
    {"convert", "migration"},
    {"models", "diagnosis"},
    {"nn", "baselines", "sklearn"},
    {"functional"},
    {"backends"},
    {"theory", "data"},
    {"records"},
    {"state"},
    {"typing", "checks", "kernels"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

CORE = {
    "diagnosis",
    "nn",
    "functional",
    "backends",
    "theory",
    "records",
    "state",
    "typing",
    "checks",
    "kernels",
}
CORE_MAY_IMPORT = {*sys.stdlib_module_names, "torch", "jaxtyping"}

# Packages that only these parts of ours may import.
RESERVED = {
    "transformers": {"models", "convert", "train", "planning", "explore"},
    "matplotlib": {"viz"},
    "typer": {"cli"},
    "Bio": {"data"},
    "sklearn": {"sklearn"},
    "triton": {"backends"},
    "gradio": {"explore"},
}

PRESENT = {path.stem for path in PACKAGE.iterdir()}


def imported_modules(tree: ast.AST, package: str) -> Iterator[str]:
    """Absolute names of all that a file of `package` imports, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            # `from performers import nn` imports performers.nn, so the names count as well.
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
            ("import_module", "__import__")
        ):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def without_type_checking(tree: ast.Module) -> ast.Module:
    """The file without its top-level `if TYPE_CHECKING:` blocks."""
    body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.Module(body, [])


def violations(package: Path) -> list[str]:
    """Every import under `package` that breaks the order, as 'file imports module: rule'."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = ("performers", *path.relative_to(package).with_suffix("").parts)
        part = parts[1]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if part == DOOR:
            tree = without_type_checking(tree)
        elif part not in RANK:
            found.append(f"{path.relative_to(package)}: {part!r} has no place in LAYERS")
            continue
        for module in imported_modules(tree, package=".".join(parts[:-1])):
            rule = broken_rule(part, module)
            if rule:
                found.append(f"{path.relative_to(package)} imports {module}: {rule}")
    return found


def broken_rule(part: str, module: str) -> str | None:
    """What forbids `part` of our package to import `module`; None if nothing does."""
    root, _, rest = module.partition(".")
    if root == "performers":
        target = rest.partition(".")[0]
        if part == DOOR:
            return "the door imports a name when it is first used"
        if target not in RANK:
            return "import from the module a name lives in, not from the door"
        if target != part and RANK[target] <= RANK[part]:
            return f"{target} does not lie below {part}"
    elif root in RESERVED:
        if part not in RESERVED[root]:
            return f"only {', '.join(sorted(RESERVED[root]))} may import {root}"
    elif part in CORE | {DOOR} and root not in CORE_MAY_IMPORT:
        return f"{part} needs torch alone"
    return None


def test_imports_point_down():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source", "rule"),
    [
        (
            "functional/favor.py",
            "from performers.nn import SoftmaxFeatures",
            "nn does not lie below",
        ),
        ("functional/favor.py", "from ..nn import SoftmaxFeatures", "nn does not lie"),
        ("functional/favor.py", "from .. import nn", "nn does not lie"),
        ("functional/favor.py", "def f():\n    import performers.nn.features", "nn does not lie"),
        ("functional/favor.py", "import_module('performers.nn')", "nn does not lie"),
        ("functional/favor.py", "from performers import SoftmaxFeatures", "not from the door"),
        ("functional/favor.py", "import numpy", "functional needs torch alone"),
        (
            "baselines/local.py",
            "from ..nn import FavorAttention",
            "does not lie below baselines",
        ),
        ("train/report.py", "from performers.viz import curves", "does not lie below train"),
        ("data/proteins.py", "from performers import theory", "does not lie below data"),
        ("nn/attention.py", "import transformers.cache_utils", "may import transformers"),
        ("train/report.py", "from matplotlib import pyplot", "only viz may import matplotlib"),
        ("sklearn.py", "from performers.nn import FavorAttention", "does not lie below sklearn"),
        ("__init__.py", "from performers.nn import FavorAttention", "when it is first used"),
        ("helpers.py", "import torch", "'helpers' has no place in LAYERS"),
    ],
)
def test_every_kind_of_forbidden_import_is_found(tmp_path, file, source, rule):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    (violation,) = violations(tmp_path)
    assert file in violation
    assert rule in violation


def import_graph(package: Path, part: str) -> dict[str, set[str]]:
    """Which modules of a part each of its modules imports, for type checkers alone or not."""
    files = {}
    for path in (*package.glob(f"{part}.py"), *(package / part).rglob("*.py")):
        parts = ("performers", *path.relative_to(package).with_suffix("").parts)
        files[".".join(parts[:-1] if parts[-1] == DOOR else parts)] = path
    graph = {}
    for module, path in files.items():
        parent = module if path.stem == DOOR else module.rpartition(".")[0]
        names = imported_modules(ast.parse(path.read_text(encoding="utf-8")), parent)
        graph[module] = {home(name, files) for name in names} - {"", module}
    return graph


def home(name: str, modules: dict[str, Path]) -> str:
    """The module among these that an imported name is, or lies in; empty if none."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def circle(package: Path, part: str) -> list[str]:
    """Modules of a part that import each other, from one of them round to itself; empty if none do.

    Imports for type checkers count: whoever reads one of these files has to read them all. Between
    parts there is no circle, because imports point down.
    """
    try:
        TopologicalSorter(import_graph(package, part)).prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("part", sorted(PRESENT & RANK.keys()))
def test_imports_go_round_no_circle(part):
    assert circle(PACKAGE, part) == []


@pytest.mark.parametrize(
    "back",
    [
        "from performers.nn.first import First",
        "from .first import First",
        "from . import first",
        "import performers.nn.first",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .first import First",
        "def later():\n    from performers.nn.first import First",
        "from performers.nn import First",  # by way of the folder, which imports the first
    ],
)
def test_every_kind_of_circle_is_found(tmp_path, back):
    folder = tmp_path / "nn"
    folder.mkdir()
    (folder / "__init__.py").write_text("from performers.nn.first import First")
    (folder / "first.py").write_text("from performers.nn.second import Second")
    (folder / "second.py").write_text("from performers.nn.third import Third")
    (folder / "third.py").write_text("import torch")
    assert circle(tmp_path, "nn") == []
    (folder / "third.py").write_text(back)
    found = circle(tmp_path, "nn")
    assert found[0] == found[-1]
    assert {"performers.nn.first", "performers.nn.second", "performers.nn.third"} <= set(found)


def test_the_core_imports_without_transformers_and_triton(fresh_python):
    code = "".join(f"import performers.{name}\n" for name in sorted(CORE & PRESENT))
    fresh_python(code, blocked=["transformers", "triton"])


def test_importing_the_package_imports_nothing_heavy(fresh_python):
    printed = fresh_python("import performers; print({'torch', 'transformers'} & set(sys.modules))")
    assert printed == "set()"


@pytest.mark.parametrize("name", performers.__all__)
def test_every_public_name_opens_from_the_door(name):
    assert getattr(performers, name).__name__ == name
    assert name in dir(performers)


def test_the_door_says_the_same_to_type_checkers():
    tree = ast.parse(Path(performers.__file__).read_text(encoding="utf-8"))
    said = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert said == {name: f"performers.{home}" for name, home in performers._HOME.items()}
    assert sorted(said) == sorted(performers.__all__)


def test_an_unknown_name_is_refused_by_name():
    with pytest.raises(AttributeError, match="'performers' has no attribute 'favour_attention'"):
        _ = performers.favour_attention


def test_a_model_without_transformers_says_what_to_install(fresh_python):
    code = "import performers\ntry: performers.PerformerModel\nexcept ImportError as e: print(e)"
    assert "pip install 'performers[hf]'" in fresh_python(code, blocked=["transformers"])


def test_the_version_is_that_of_the_distribution():
    assert performers.__version__ == importlib.metadata.version("performers")
