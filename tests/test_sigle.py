"""Stage 2: it learns, and says what is wrong with its input."""

import json
import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from pipeline import LIGHT, ROOT, call, fails, succeed

from dasc.model.checkpoint import read_tensors, save_checkpoint


def flags(small_run, out):
    return [*LIGHT, "--manifest", small_run / "patches/patches.csv", "--out", out]


def test_outputs(small_run):
    out = small_run / "NS"
    log = pd.read_csv(out / "log.csv")
    assert list(log["epoch"]) == [0, 1] and log["loss"].between(0, 2).all()
    config = read_tensors(out / "model.pt")["config"]
    assert config["patch_size"] == 64 and config["um_per_px"] == 0.25 and 0 < config["threshold"] < 1
    curve = pd.read_csv(out / "val_curve.csv")
    assert {"threshold", "precision", "recall", "f1"} <= set(curve)
    curves = cv2.imread(str(out / "curves.png"))
    assert curves.shape[1] > 2 * curves.shape[0] and curves.std() > 5  # two panels
    assert json.loads((out / "run.json").read_text())["arguments"]["backbone"] == "mobilenetv3_small_100"


def test_the_loss_falls(small_run, tmp_path):
    """Two epochs on so few patches are too few: one seed of eight ends them with a higher loss."""
    succeed("NS/sigle.py", *flags(small_run, tmp_path), "--epochs", 6)
    loss = pd.read_csv(tmp_path / "log.csv")["loss"]
    assert loss.iloc[-1] < loss.iloc[0]


def test_resume_refuses_another_run(small_run, tmp_path):
    shutil.copytree(small_run / "NS", tmp_path / "NS")
    again = [*flags(small_run, tmp_path / "NS"), "--resume"]
    fails("NS/sigle.py", *again, "--epochs", 2, "--lr", 0.5, says="--lr")
    fails("NS/sigle.py", *flags(small_run, tmp_path / "empty"), "--resume", says="last.pt")
    shutil.copy(tmp_path / "NS/model.pt", tmp_path / "NS/last.pt")
    fails("NS/sigle.py", *again, says="expected the last.pt of an interrupted training")


def test_resume_asks_for_the_same_content_wherever_it_lies(small_run, tmp_path, monkeypatch):
    """Another path to the same tables, another place of the dataset and other threads are the same run."""
    start = [*LIGHT, "--epochs", 1, "--init_weights", small_run / "NS/model.pt"]
    succeed("NS/sigle.py", *start, "--manifest", small_run / "patches/patches.csv", "--out", tmp_path / "NS")
    first = (tmp_path / "NS/val_curve.csv").read_bytes()
    for name in ("sample", "patches"):
        shutil.copytree(small_run / name, tmp_path / "moved" / name)
    shutil.copy(small_run / "NS/model.pt", tmp_path / "moved/start.pt")
    monkeypatch.chdir(tmp_path / "moved")
    again = [*LIGHT, "--epochs", 1, "--init_weights", "start.pt", "--manifest", "patches/patches.csv"]
    again += ["--data_root", "sample", "--workers", 1, "--out", "../NS", "--resume"]
    succeed("NS/sigle.py", *again)
    assert (tmp_path / "NS/val_curve.csv").read_bytes() == first
    content = read_tensors("start.pt")
    save_checkpoint(tmp_path / "moved/start.pt", content | {"config": content["config"] | {"threshold": 0.1}})
    fails("NS/sigle.py", *again, says="other weights than --init_weights")


def test_kept_weights_go_back_to_those_it_started_from(small_run, tmp_path):
    """Nothing is trained again for another share, and share 1 is the start itself."""
    start = small_run / "NS/model.pt"
    again = [*flags(small_run, tmp_path / "NS"), "--epochs", 1, "--init_weights", start]
    kept = {}
    for share, resume in ((0, []), (0.5, ["--resume"]), (1, ["--resume"])):
        succeed("NS/sigle.py", *again, "--start_share", share, *resume)
        kept[share] = read_tensors(tmp_path / "NS/model.pt")["model"]
        assert json.loads((tmp_path / "NS/run.json").read_text())["start_share"] == share
    started = read_tensors(start)["model"]
    floating = [name for name, tensor in started.items() if tensor.is_floating_point()]
    assert any((kept[0][name] - started[name]).abs().max() > 0.01 for name in floating)
    for name in floating:
        torch.testing.assert_close(kept[0.5][name], (kept[0][name] + started[name]) / 2)
        torch.testing.assert_close(kept[1][name], started[name])
    assert "expected a number from 0 to 1" in call("NS/sigle.py", *again, "--start_share", 1.5).err


def changed_manifest(small_run, tmp_path, change):
    """A copy of the patches with a changed manifest."""
    shutil.copytree(small_run / "patches", tmp_path / "patches")
    path = tmp_path / "patches/patches.csv"
    change(pd.read_csv(path)).to_csv(path, index=False)
    return path


CHANGES = {
    "one label": (lambda table: table[table["label"] == 0], "has no mitosis patch"),
    "no val": (lambda table: table[table["split"] != "val"], "split val"),
    "column": (lambda table: table.drop(columns="origin"), "column origin is missing"),
    "label": (lambda table: table.assign(label=2), "label 2"),
    "split": (lambda table: table.assign(split="trian"), "trian"),
    "twice": (lambda table: pd.concat([table, table[:1]]), "twice"),
    "escape": (lambda table: table.assign(patch="../../" + table["patch"]), "leaves the folder"),
    "gone": (lambda table: table.assign(patch="x" + table["patch"]), "cannot be read"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_bad_manifest_is_one_line_and_writes_nothing(small_run, tmp_path, name):
    change, says = CHANGES[name]
    path = changed_manifest(small_run, tmp_path, change)
    fails("NS/sigle.py", *LIGHT, "--manifest", path, "--out", tmp_path / "NS", says=says)
    assert not (tmp_path / "NS").exists()


def test_noisy_patches_are_left_out(small_run, tmp_path):
    """Trained with hard.csv as on a manifest without what it calls noisy, and resumed with no other hard.csv."""
    table = pd.read_csv(small_run / "patches/patches.csv")
    train = table[table["split"] == "train"].reset_index(drop=True)
    noisy = train.index % 3 == 0
    rows = train[["patch", "label"]].assign(verdict=np.where(noisy, "noisy", "clean"), level=np.nan)
    rows = rows.assign(hardness=np.where(noisy, np.nan, 0.0), forget_rate=0.0, centroid_distance=0.0, noise_score=0.0)
    hard, out = tmp_path / "hard.csv", tmp_path / "NS"
    rows.to_csv(hard, index=False)
    done = succeed("NS/sigle.py", *flags(small_run, out), "--epochs", 1, "--hard", hard)
    assert f"{noisy.sum()} of {len(train)} training patches are noisy" in done.out
    left = changed_manifest(small_run, tmp_path, lambda table: table[~table["patch"].isin(train["patch"][noisy])])
    succeed("NS/sigle.py", *LIGHT, "--epochs", 1, "--manifest", left, "--out", tmp_path / "left")
    assert (out / "log.csv").read_bytes() == (tmp_path / "left/log.csv").read_bytes()
    assert str(hard) in json.loads((out / "run.json").read_text())["inputs"]

    again = [*flags(small_run, out), "--epochs", 1, "--hard", hard]
    rows.assign(verdict="clean", hardness=0).to_csv(hard, index=False)
    fails("NS/sigle.py", *again, "--resume", says="another table than --hard")
    rows.assign(verdict="nosy").to_csv(hard, index=False)
    fails("NS/sigle.py", *again, says="expected one of clean, hard, noisy, dropped")
    rows[1:].to_csv(hard, index=False)
    fails("NS/sigle.py", *again, says="lacks 1 of the")


def test_moved_dataset_is_said_before_training(small_run, tmp_path):
    moved = [*flags(small_run, tmp_path / "NS"), "--data_root", tmp_path]
    fails("NS/sigle.py", *moved, says="this val field is gone")
    assert not (tmp_path / "NS").exists()


def test_missing_manifest_names_its_command(tmp_path):
    fails("NS/sigle.py", "--manifest", tmp_path / "patches.csv", says="pre/cut_patch_2.py")


def test_unknown_backbone(small_run, tmp_path):
    fails("NS/sigle.py", *flags(small_run, tmp_path / "NS"), "--backbone", "resnet81", says="unknown backbone")


def test_loss_that_is_not_finite_stops_with_advice(small_run, tmp_path):
    wild = ["--lr", 1e30, "--nan_steps", 2, "--epochs", 30]
    fails("NS/sigle.py", *flags(small_run, tmp_path / "NS"), *wild, says="lower --lr")
    assert not (tmp_path / "NS/model.pt").exists()


def test_absent_device_is_an_error(small_run, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    done = call("NS/sigle.py", *flags(small_run, tmp_path / "NS"), "--device", "cuda")
    assert done.status == 1 and "--device cuda: not available" in done.err


def test_hub_unreachable_is_one_line(small_run, tmp_path):
    command = [sys.executable, ROOT / "NS/sigle.py", "--manifest", small_run / "patches/patches.csv", "--out", tmp_path]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(list(map(str, command)), env=offline, capture_output=True, text=True)
    assert done.returncode == 1 and "--init_weights" in done.stderr
    assert "Traceback" not in done.stderr and len([line for line in done.stderr.splitlines() if line.strip()]) == 1
