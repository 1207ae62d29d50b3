"""The folder of a run has one writer, and nothing of that is left when it is finished."""

import pytest
from warm import warm_python

from performers.train.folders import check_place, claim, holds_nothing, release

pytestmark = pytest.mark.usefixtures("without_shape_checks")


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path):
    folder = tmp_path / "new" / "run"
    claim(folder)
    claim(folder)  # a process goes on with what it has begun
    assert holds_nothing(folder)
    other = f"""
from pathlib import Path
from performers.train.folders import claim
try:
    claim(Path({str(folder)!r}))
    print("claimed")
except FileExistsError as error:
    print(error)
"""
    assert warm_python(other).startswith(f"another process writes to {folder}. Wait for its end")
    release(folder)
    assert list(folder.iterdir()) == []
    # The other process ends without a word, as if it had been killed, and leaves no lock.
    assert warm_python(other) == "claimed"
    claim(folder)
    release(folder)


@pytest.mark.parametrize("below", ["", "deep/er"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, below):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(FileExistsError, match=r"must be a folder, and .*file is a file"):
        check_place(file / below)
    check_place(tmp_path / "new" / "run")
