"""Atomic writes, output folders, and the SHA-256 of files."""

import hashlib
import os
import re

import pytest

from guided_diffusion.console import InputError
from guided_diffusion.files import atomic_write, check_folder, file_digest


def test_atomic_write_keeps_the_old_file_after_a_failure(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "wb") as f:
        f.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_atomic_write_shows_a_file_when_it_is_complete_and_keeps_two_writers_apart(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as first:
        first.write("first\n")
        assert not path.exists()
        with atomic_write(path) as second:
            second.write("second, longer")
        assert path.read_text() == "second, longer"
        temporary = [entry.name for entry in tmp_path.iterdir() if entry != path]
        assert len(temporary) == 1 and re.fullmatch(r"a\.txt\.[0-9a-f]{8}\.tmp", temporary[0])
    assert path.read_text() == "first\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_atomic_write_syncs_the_file_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace

    def note_sync(number):
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{number}") else "file")
        sync(number)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("rename"), replace(*names)))
    with atomic_write(tmp_path / "a.txt") as f:
        f.write("x")
    assert done == ["file", "rename", "folder"]


def test_check_folder_names_a_file_in_a_folders_place(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    check_folder(tmp_path / "a" / "b", "results_path")
    check_folder(tmp_path, "results_path")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"--results_path .*file is a file"):
            check_folder(path, "results_path")
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))  # root may write everywhere
    with pytest.raises(InputError, match=f"--results_path .*: no right to write in {tmp_path}"):
        check_folder(tmp_path / "a", "results_path")


def test_file_digest_reads_a_file_once_and_one_that_changed_again(tmp_path, monkeypatch):
    reads, sha256 = [], hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda: reads.append(1) or sha256())
    path, other = tmp_path / "weights.pt", tmp_path / "other"
    path.write_bytes(b"one" * 10**6)
    assert file_digest(path) == file_digest(str(path)) == sha256(b"one" * 10**6).digest()
    assert len(reads) == 1
    # Put in its place, with the same size and date.
    other.write_bytes(b"two" * 10**6)
    before = os.stat(path)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)
    assert file_digest(path) == sha256(b"two" * 10**6).digest()
