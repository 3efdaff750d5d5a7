"""One run of a script: its folder is held against a second run, and run.json says how it was."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from pipeline import ROOT, fails, succeed

from dasc.errors import InputError
from dasc.files import sha256
from dasc.run import only_run, project_commit

SCRIPTS = [
    "pre/make_sample.py",
    "pre/cut_patch_2.py",
    "pre/split_patches.py",
    "NS/sigle.py",
    "NS/weak_mining.py",
    "DMU/main.py",
    "clus_hard.py",
    "DMU/hard_main.py",
    "clus_scl.py",
    "DMU/hard_scl_main.py",
    "predict.py",
]
HOLD = """
import sys, time
from dasc.run import only_run
with only_run(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def another_run(out: Path):
    """A process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_every_script_refuses_a_folder_that_another_run_holds(tmp_path):
    with another_run(tmp_path / "out") as process:
        for script in SCRIPTS:
            done = fails(script, "--out", tmp_path / "out", says=f"writes here (process {process.pid} on ")
            assert len(done.err.strip().splitlines()) == 1
        assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


def test_the_lock_of_a_killed_run_is_taken(tmp_path):
    lock = tmp_path / ".out.lock"
    with another_run(tmp_path / "out") as process:
        process.kill()
        process.wait()
        assert f"process {process.pid} on " in lock.read_text()
        with only_run(tmp_path / "out"):
            assert lock.read_text() == f"process {os.getpid()} on {platform.node()}"
    assert not list(tmp_path.iterdir())


def test_stages_1_and_3_hold_their_own_default_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, name in ([], "patches"), (["--fp_mdoel"], "patches_ns"):
        with only_run(tmp_path / "data" / name):
            fails("pre/cut_patch_2.py", *flags, says=f"{name}: another run writes here")


def test_a_lock_names_its_run_and_goes_with_it(tmp_path):
    with only_run(tmp_path / "new/out"):
        assert (tmp_path / "new/.out.lock").read_text() == f"process {os.getpid()} on {platform.node()}"
        assert not (tmp_path / "new/out").exists()
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="of the user"), only_run(tmp_path / "out"):
        raise InputError("of the user")
    assert not list(tmp_path.iterdir())


def test_of_many_runs_at_once_one_goes_on(tmp_path):
    for _ in range(20):
        start, leave, inside, refused = threading.Barrier(8), threading.Event(), [], []

        def run(start=start, leave=leave, inside=inside, refused=refused):
            start.wait()
            try:
                with only_run(tmp_path / "out"):
                    inside.append(1)
                    leave.wait(10)
            except InputError:
                refused.append(1)
                if len(refused) == 7:
                    leave.set()

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(inside), len(refused)) == (1, 7)


def test_where_the_folder_above_cannot_be_written_the_lock_lies_within(tmp_path, monkeypatch):
    monkeypatch.setattr("dasc.run.os.access", lambda path, mode: path != tmp_path)
    (tmp_path / "out").mkdir()
    with only_run(tmp_path / "out"):
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".out.lock"]


def test_run_json_says_how_the_results_were_made(small_run):
    run = json.loads((small_run / "NS/run.json").read_text())
    manifest = small_run / "patches/patches.csv"
    rows = len(manifest.read_text().splitlines()) - 1
    assert run["inputs"] == {str(manifest): {"count": rows, "sha256": sha256(manifest)}}
    assert run["command"][0] == "sigle.py" and run["command"][-2:] == ["--epochs", "2"]
    assert run["arguments"]["seed"] == 0 and run["device"] == "cpu"
    assert run["started"] < run["finished"] and run["seconds"] > 0
    assert run["versions"]["torch"] and run["versions"]["timm"]
    assert run["commit"] == project_commit()


def test_the_commit_is_that_of_these_files(monkeypatch, tmp_path):
    if not (ROOT / ".git").exists():
        assert project_commit() is None
    else:
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert project_commit().removesuffix("-dirty") == git.stdout.strip()
    monkeypatch.setattr("dasc.run.ROOT", tmp_path)
    assert project_commit() is None
    monkeypatch.setenv("PATH", "")
    assert project_commit() is None


def test_a_stage_that_replaces_its_folder_keeps_its_lock(small_run, tmp_path):
    """The lock lies beside the folder, so that a second run finds it whenever it comes."""
    flags = ["--dataset", "sample", "--data_root", small_run / "sample", "--patch_size", 64, "--random_per_field", 5]
    for _ in range(2):
        succeed("pre/cut_patch_2.py", *flags, "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.previous"]
