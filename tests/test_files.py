"""Files are whole or absent."""

import errno
import os
import re

import pytest

from guided_diffusion.console import InputError
from guided_diffusion.files import atomic_write, check_folder


def test_a_file_appears_under_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as f:
        f.write("new\n")
        assert not path.exists()
    assert path.read_text() == "new\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "wb") as f:
        f.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as first:
        first.write("first")
        with atomic_write(path) as second:
            second.write("second, longer")
        assert path.read_text() == "second, longer"
        temporary = [entry.name for entry in tmp_path.iterdir() if entry != path]
        assert len(temporary) == 1 and re.fullmatch(r"a\.txt\.[0-9a-f]{8}\.tmp", temporary[0])
    assert path.read_text() == "first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_in_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with atomic_write("a.txt") as f:
        f.write("x")
    assert (tmp_path / "a.txt").read_text() == "x"


def test_the_file_reaches_the_disk_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace

    def note_sync(number):
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{number}") else "file")
        sync(number)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), replace(*names)))
    with atomic_write(tmp_path / "a.txt") as f:
        f.write("x")
    assert done == ["file", "rename", "folder"]


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.EACCES, True), (errno.EIO, False)])
def test_only_a_platforms_refusal_to_sync_a_folder_is_passed_over(tmp_path, monkeypatch, number, passes):
    sync = os.fsync

    def refuse_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    if passes:
        with atomic_write(tmp_path / "a.txt") as f:
            f.write("x")
    else:
        with pytest.raises(OSError, match="Input/output error"), atomic_write(tmp_path / "a.txt") as f:
            f.write("x")


def test_a_file_in_a_folders_place_is_named_with_its_flag(tmp_path):
    (tmp_path / "file").write_text("")
    check_folder(tmp_path / "a" / "b", "results_path")
    check_folder(tmp_path, "results_path")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"--results_path .*file is a file"):
            check_folder(path, "results_path")
