"""Files appear whole or not at all, also after a killed run."""

import hashlib
import os
from pathlib import Path

import pytest

from dasc.errors import WriteError
from dasc.files import PIECE_BYTES, put_in_place, replacing, replacing_folder, sha256, write_text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(WriteError, match=r"a\.txt: cannot be written"), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_a_killed_run_left_is_written_over(tmp_path):
    (tmp_path / ".a.txt.tmp").write_text("longer than what is written now")
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp/older.png").touch()
    write_text(tmp_path / "a.txt", "new")
    with replacing_folder(tmp_path / "out", "mark") as partial:
        (partial / "mark").touch()
    assert (tmp_path / "a.txt").read_text() == "new"
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["a.txt", "out", "out/mark"]


def test_files_and_folders_are_brought_to_disk_before_they_take_their_place(tmp_path, monkeypatch):
    events = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: events.append("fsync") or fsync(handle))
    monkeypatch.setattr(os, "sync", lambda: events.append("sync"), raising=False)
    monkeypatch.setattr(Path, "replace", lambda self, to: events.append("replace") or replace(self, to))
    monkeypatch.setattr(Path, "rename", lambda self, to: events.append("rename") or rename(self, to))
    write_text(tmp_path / "a.txt", "new")
    (tmp_path / "partial").mkdir()
    put_in_place(tmp_path / "partial", tmp_path / "out")
    names = ["fsync"] if os.name != "nt" else []  # of the folder
    assert events == ["fsync", "replace", *names, "sync", "rename", *names]


def test_an_empty_folder_takes_no_older_ones_place(tmp_path):
    for name in ("out.previous", "out", "partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "out.previous/kept.csv").touch()
    (tmp_path / "partial/new.csv").touch()
    put_in_place(tmp_path / "partial", tmp_path / "out")
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")} == {
        "out/new.csv",
        "out.previous/kept.csv",
    }


@pytest.mark.parametrize("size", [0, 5, PIECE_BYTES, 2 * PIECE_BYTES + 7])
def test_a_hash_is_that_of_the_whole_file(tmp_path, size):
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    (tmp_path / "a").write_bytes(content)
    assert sha256(tmp_path / "a") == hashlib.sha256(content).hexdigest()
