"""Full disks, folders that cannot be written, and locks of dead runs: one clear line, and the old file as it was."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from pipeline import LIGHT, fails, succeed

MOUNT = shutil.which("mount")


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of so many bytes in memory; skips where this user may not mount one."""
    folder.mkdir()
    command = [MOUNT or "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if sys.platform != "linux" or MOUNT is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # lazily: a file may be left open where a test fails


@contextlib.contextmanager
def small_files(size):
    """No file of this process may grow beyond so many bytes: the same refusal as a full disk's, on every Unix."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def tables(small_run, tmp_path_factory):
    """What stages 5 and 7 read."""
    folder = tmp_path_factory.mktemp("tables")
    train = pd.read_csv(small_run / "patches/patches.csv").query("split == 'train'")[["patch", "label"]]
    counts = {"clean": 5, "hard": 0, "noisy": 0, "learned": 5, "forgotten": 0, "centroid_distance": 0.5}
    counts |= {f"confidence_{view}": 0.5 for view in ("weak", "strong", "fused")}
    train.assign(**counts, origin="annotated", noise_score=0.1).to_csv(folder / "memory.csv", index=False)
    verdict = {"verdict": "clean", "level": "", "hardness": 0, "forget_rate": 0.0}
    train.assign(**verdict, centroid_distance=0.5, noise_score=0.1).to_csv(folder / "hard.csv", index=False)
    (folder / "checked.csv").write_text("patch,label,level,seen,correct\n")
    return folder


def commands(small_run, tables):
    """Every script that writes, with quick settings."""
    patches = small_run / "patches/patches.csv"
    image = small_run / "sample/images/009.tiff"
    sample = ["--size_px", 300, "--cases", 3, "--mitoses", 1, "--imposters", 1]
    return {
        "pre/make_sample.py": sample,
        "pre/cut_patch_2.py": ["--data_root", small_run / "sample", "--patch_size", 64, "--random_per_field", 40],
        "pre/split_patches.py": ["--labelled", patches],
        "NS/sigle.py": [*LIGHT, "--manifest", patches, "--epochs", 1],
        "DMU/main.py": [*LIGHT, "--manifest", patches, "--epochs", 2],
        "clus_hard.py": ["--memory", tables / "memory.csv", "--manifest", patches],
        "clus_scl.py": [f"--{name}={tables / name}.csv" for name in ("memory", "hard", "checked")],
        "predict.py": ["--images", image, "--model_path", small_run / "NS/model.pt", "--device", "cpu", "--views", 1],
    }


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OLD = {
    "pre/make_sample.py": {"MIDOG.json": '{"info": {"description": "synthetic"}}'},
    "pre/cut_patch_2.py": {"patches.csv": "older"},
    "pre/split_patches.py": {"patches.csv": "older"},
    "NS/sigle.py": {"last.pt": "older", "model.pt": "older"},
    "DMU/main.py": {"last.pt": "older", "memory.csv": "older"},
    "clus_hard.py": {"hard.csv": "older", "contact_sheet.png": "older"},
    "clus_scl.py": {"SCL.csv": "older"},
    "predict.py": {"detections.csv": "older", "009.tiff/scan.json": "{}"},
}


def older_run(out, script):
    for name, text in OLD[script].items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    return snapshot(out)


@pytest.mark.parametrize("script", OLD)
def test_a_full_disk_is_one_line_and_leaves_the_old_files(small_run, tables, tmp_path, script):
    """A real file system with a few pages left."""
    with small_disk(tmp_path / "disk", 65_536) as disk:
        before = older_run(disk / "out", script)
        with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(disk / "filler", (disk / "filler").stat().st_size - 4096)  # room for the lock, and little else
        done = fails(script, *commands(small_run, tables)[script], "--out", disk / "out", says="cannot be written (No")
        assert "No space left on device" in done.err and str(disk) in done.err and "skipped" not in done.err
        assert snapshot(disk / "out") == before
        left = {path.name for path in disk.iterdir()} - {"filler", "out", "out.partial"}  # stage 1 goes on with it
        assert left <= {".out.lock"}


@pytest.mark.parametrize("script", ["NS/sigle.py", "pre/cut_patch_2.py", "predict.py"])
def test_a_file_that_may_not_grow_is_one_line_and_leaves_the_old_files(small_run, tables, tmp_path, script):
    before = older_run(tmp_path / "out", script)
    flags = commands(small_run, tables)[script]
    with small_files(2_000):
        done = fails(script, *flags, "--out", tmp_path / "out", says="cannot be written (File too large)")
    assert "skipped" not in done.err
    after = snapshot(tmp_path / "out")
    after.pop("log.csv", None)  # of the first epoch, small enough
    assert after == before


@contextlib.contextmanager
def read_only(folder):
    """The folder on a file system that takes no writing; without one, its permissions taken away."""
    if os.geteuid():
        modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*")) if path.is_dir()}
        for path in modes:
            path.chmod(0o555)
        try:
            yield
        finally:
            for path, mode in modes.items():
                path.chmod(mode)
        return
    command = [MOUNT or "mount", "--bind", str(folder), str(folder)]
    if MOUNT is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        if subprocess.run([MOUNT, "-o", "remount,ro,bind", str(folder)], capture_output=True).returncode:
            pytest.skip("no file system can be made read-only here")
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # lazily: a file may be left open where a test fails


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of another kind")
@pytest.mark.parametrize("script", OLD)
def test_a_read_only_folder_is_one_line_and_stays_as_it_was(small_run, tables, tmp_path, script):
    before = older_run(tmp_path / "archive/out", script)
    with read_only(tmp_path / "archive"):
        flags = [*commands(small_run, tables)[script], "--out", tmp_path / "archive/out"]
        done = fails(script, *flags, says=f"{tmp_path / 'archive/out'}: cannot be written")
        assert len(done.err.strip().splitlines()) == 1  # before anything is computed
    assert snapshot(tmp_path / "archive/out") == before
    assert [path.name for path in (tmp_path / "archive").iterdir()] == ["out"]


def test_the_lock_file_of_a_dead_run_hinders_nobody(small_run, tables, tmp_path):
    """The lock is the system's, which frees it when a run is killed; what the file says is only for people."""
    (tmp_path / ".out.lock").write_text("process 4194303 on another-machine")
    succeed("clus_scl.py", *commands(small_run, tables)["clus_scl.py"], "--out", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert json.loads((tmp_path / "out/clus_scl/run.json").read_text())["balance"]


def test_the_pool_cache_is_refused_in_one_line(small_run, tmp_path):
    patches = small_run / "patches/patches.csv"
    flags = ["--manifest", patches, "--model_path", small_run / "NS/model.pt", "--pool", patches, "--k", 1]
    Path(tmp_path / "file").write_text("")
    flags += ["--device", "cpu", "--features", tmp_path / "file/features", "--fp_above", 0]
    fails("NS/weak_mining.py", *flags, "--out", tmp_path / "out", says="cannot be written")
    assert not (tmp_path / "out").exists()
