"""The wheel is the package, whole and alone, and code that uses it passes strict type checks."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import performers
from performers.models.requirements import TRANSFORMERS, check_transformers

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "performers"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    (path,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    assert path.endswith("-py3-none-any.whl"), "it needs no compiler, and serves every platform"
    return zipfile.ZipFile(path)


def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel):
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = (path for path in SOURCE.rglob("*") if path.is_file())
    expected = {
        f"performers/{path.relative_to(SOURCE).as_posix()}"
        for path in files
        if "__pycache__" not in path.parts
    }
    assert packed == expected
    assert "performers/py.typed" in packed


def test_the_extra_all_is_all_extras_of_users(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    packages = {}  # by extra
    for line in metadata.get_all("Requires-Dist"):
        requirement, _, extra = line.partition("extra == ")
        packages.setdefault(extra.strip("'"), set()).add(
            Requirement(requirement.split(";")[0]).name
        )
    assert {"hf", "bio", "viz", "sklearn", "triton", "lora", "onnx"} <= packages.keys()
    others = packages.keys() - {"", "all", "dev", "docs", "release"}
    assert packages["all"] == set().union(*(packages[extra] for extra in others))
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="there is no git to say what it tracks")
def test_the_sdist_has_every_file_that_git_tracks(tmp_path):
    (path,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(path) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split("\0")) - {"", ".gitignore"} <= packed


# The door opens without torch, every file is compiled, and what needs torch says so.
OPENED = """
import compileall, pathlib, sys, performers
assert len(dir(performers)) > 20
assert compileall.compile_dir(pathlib.Path(performers.__file__).parent, quiet=1)
try:
    performers.favor_attention
except ModuleNotFoundError as error:
    print(performers.__version__, error.name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_the_wheel_installs_and_imports_without_torch(version, wheel, tmp_path):
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"there is no python{version} here")
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    run(python, "-m", "venv", "--without-pip", tmp_path)
    inside = tmp_path / "bin" / "python"
    offline = ("--no-index", "--no-deps", "--quiet")
    run(sys.executable, "-m", "pip", "--python", inside, "install", *offline, wheel.filename)
    assert run(inside, "-c", OPENED) == f"{performers.__version__} torch"


def test_the_oldest_versions_are_the_lower_bounds(tmp_path):
    file = tmp_path / "constraints.txt"
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    command = ["make", "--silent", f"OLDEST={tmp_path}", str(file)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    lines = file.read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if "==" in line)
    assert oldest.keys() == {"torch", "transformers"}
    bounds = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{name}>={version}' in bounds for name, version in oldest.items())


def test_no_transformers_is_allowed_that_is_newer_than_the_tested_one():
    bound = re.search(r'"transformers(.+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    tested = re.search(r"\ntransformers==(.+)", (ROOT / "constraints.txt").read_text("utf-8"))
    allowed, newest = SpecifierSet(bound[1]), Version(tested[1])
    assert newest in allowed
    assert f"{newest.major}.{newest.minor + 1}.0" not in allowed
    assert allowed == TRANSFORMERS


@pytest.mark.parametrize("version", ["5.19.4", "5.25.0"])
def test_another_transformers_is_refused_by_name(version):
    with pytest.raises(ImportError, match=rf"needs .*, and {version} is installed.*pip install"):
        check_transformers(version)


CONSUMER = """
import torch
from torch import Tensor

from performers import LinearState, SoftmaxFeatures, favor_attention

phi = SoftmaxFeatures(64)
query = torch.randn(1, 2, 5, 64)
out: Tensor = favor_attention(query, query, query, phi)
more: tuple[Tensor, LinearState] = favor_attention(
    query, query, query, phi, is_causal=True, return_state=True
)
"""


@pytest.mark.slow
def test_code_that_uses_the_package_is_strictly_typed(tmp_path):
    (tmp_path / "consumer.py").write_text(CONSUMER)
    command = [sys.executable, "-m", "mypy", "--strict", "consumer.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
