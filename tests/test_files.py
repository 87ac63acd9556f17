"""Files are whole or absent."""

import pytest

from guided_diffusion.errors import InputError
from guided_diffusion.files import check_folder, whole_file


def test_a_file_appears_under_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    with whole_file(path) as f:
        f.write("new\n")
        assert not path.exists()
    assert path.read_text() == "new\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path, "wb") as f:
        f.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_a_file_in_a_folders_place_is_named_with_its_flag(tmp_path):
    (tmp_path / "file").write_text("")
    check_folder(tmp_path / "a" / "b", "results_path")
    check_folder(tmp_path, "results_path")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"--results_path .*file is a file"):
            check_folder(path, "results_path")
