"""Digests of files: right, and read once where nothing changed."""

import hashlib
import os

import pytest

from guided_diffusion import files as digests
from guided_diffusion.files import digest, digest_once


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that were read from here on, all of which count as settled."""
    found, read = [], digests.digest_of
    monkeypatch.setattr(digests, "digest_of", lambda f: found.append(f.name) or read(f))
    monkeypatch.setattr(digests, "SETTLED", -(10**12))
    return found


def sha(contents):
    return hashlib.sha256(contents).digest()


def test_digests_are_sha_256(tmp_path):
    (tmp_path / "f").write_bytes(b"weights" * 300_000)
    assert digest(tmp_path / "f") == digest_once(tmp_path / "f") == sha(b"weights" * 300_000)


def test_a_file_is_read_once_by_path_or_open(tmp_path, reads):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"one")
    with open(path, "rb") as f:
        f.read(2)  # wherever it stands
        assert digest_once(path) == digest_once(f) == digest_once(str(path)) == sha(b"one")
    assert len(reads) == 1
    assert digest(path) == sha(b"one") and len(reads) == 2


def test_a_file_that_changed_is_read_again(tmp_path, reads):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"one")
    digest_once(path)
    path.write_bytes(b"three")
    assert digest_once(path) == sha(b"three") and len(reads) == 2


def test_a_file_put_in_its_place_is_read_though_size_and_date_are_the_same(tmp_path, reads):
    path, other = tmp_path / "weights.pt", tmp_path / "other"
    path.write_bytes(b"one")
    digest_once(path)
    other.write_bytes(b"two")
    before = os.stat(path)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)
    assert digest_once(path) == sha(b"two")


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED", 10**15)
    path = tmp_path / "weights.pt"
    path.write_bytes(b"one")
    assert digest_once(path) == digest_once(path) and len(reads) == 2
