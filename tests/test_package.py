"""The wheel is the package, whole and alone, and code that uses it passes strict type checks."""

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement

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
