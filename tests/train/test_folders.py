"""The folder of a run has one writer, and nothing of that is left when it is finished."""

import pytest
from warm import warm_python

from performers.train.folders import check_file, check_place, claim, holds_nothing, release

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


def test_a_place_that_may_not_be_written_to_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)
    for output in (tmp_path, tmp_path / "new" / "run"):
        with pytest.raises(PermissionError, match=f"and {tmp_path} is not. Choose another"):
            check_place(output)


def test_a_file_to_write_may_be_no_folder_and_in_none_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    check_file(tmp_path / "file")
    with pytest.raises(
        IsADirectoryError, match=r"must be a file, and is a folder\. Name a file in"
    ):
        check_file(tmp_path)
    for output in (tmp_path / "file" / "one", tmp_path / "file" / "deep" / "one"):
        with pytest.raises(FileExistsError, match=f"{tmp_path / 'file'} is a file. Choose another"):
            check_file(output)


def test_a_link_to_nothing_is_in_the_place_of_a_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match=r"link is a file"):
        check_place(tmp_path / "link" / "run")
