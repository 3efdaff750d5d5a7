"""Faults while a network learns or predicts: losses that are not finite, tiny batches, full memory, broken patches."""

import ast
import functools
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from broken import half, picture
from PIL import Image
from pipeline import LIGHT, SOURCES, fails, succeed

import dasc.model.difficulty
from dasc.data.cut import read_cut, write_cut
from dasc.model.checkpoint import read_checkpoint
from dasc.model.network import CamNetwork

SCRIPTS = {
    "NS/sigle.py": ["--epochs", 1, "--views", 1],
    "DMU/main.py": ["--epochs", 2, "--warmup_share", 0],
    "DMU/hard_main.py": ["--hard", "hard.csv", "--epochs", 1],
    "DMU/hard_scl_main.py": ["--scl", "SCL.csv", "--epochs", 2, "--views", 1, "--per_group", 1],
}


@pytest.fixture(scope="module")
def few(small_run, tmp_path_factory):
    """Five patches per label and split, with tables for stages 6 and 8; no fields of val, so that none is scanned."""
    folder = tmp_path_factory.mktemp("few")
    table = pd.read_csv(small_run / "patches/patches.csv", dtype=str, keep_default_na=False)
    table = table[table["split"] != "test"].groupby(["split", "label"]).head(5).reset_index(drop=True)
    for patch in table["patch"]:
        (folder / patch).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(small_run / "patches" / patch, folder / patch)
    table.to_csv(folder / "patches.csv", index=False)
    for name in ("fields.csv", "annotations.csv"):
        lines = (small_run / "patches" / name).read_text().splitlines(keepends=True)
        (folder / name).write_text(lines[0])
    shutil.copy(small_run / "patches/cut.json", folder)
    train = table.loc[table["split"] == "train", ["patch", "label"]]
    level = np.arange(len(train)) % 4
    train.assign(level=level, hardness=(level + 1) / 3 * (level < 3)).to_csv(folder / "SCL.csv", index=False)
    hard = train.assign(verdict="hard", level=np.arange(len(train)) % 3, hardness=(np.arange(len(train)) % 3 + 1) / 3)
    hard = hard.assign(forget_rate=0.5, centroid_distance=0.5, noise_score=0.5)
    hard.to_csv(folder / "hard.csv", index=False)
    return folder


def flags(few, script, out, *more):
    return [*LIGHT, "--manifest", few / "patches.csv", *SCRIPTS[script], "--out", out, *more]


@pytest.fixture
def here(few, monkeypatch):
    """Work beside the tables."""
    monkeypatch.chdir(few)
    return few


def test_a_loss_that_is_not_finite_once_is_passed_over_and_counted(here, tmp_path, monkeypatch):
    """It is found before the step: the weights stay finite, and run.json says how many patches were not learnt from."""
    whole, calls = F.cross_entropy, []

    def once(*args, **kwargs):
        calls.append(1)
        return whole(*args, **kwargs) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(F, "cross_entropy", once)
    succeed("NS/sigle.py", *flags(here, "NS/sigle.py", tmp_path), "--batch_size", 4)
    assert len(calls) == 3
    assert all(torch.isfinite(tensor).all() for tensor in read_checkpoint(tmp_path / "model.pt")["model"].values())
    assert np.isfinite(pd.read_csv(tmp_path / "log.csv")["loss"]).all()
    assert json.loads((tmp_path / "run.json").read_text())["skipped_patches"] == 4


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_training_that_diverges_stops_with_advice_however_short_it_is(here, tmp_path, script):
    """One step an epoch: the loss is never seen to be wrong ten times, and of one epoch not even once."""
    wild = ["--lr", 1e30, "--batch_size", 1000, *(["--epochs", 3] if script == "DMU/main.py" else [])]
    fails(script, *flags(here, script, tmp_path / "out", *wild), says="lower --lr")
    made = {"model.pt", "memory.csv", "checked.csv", "run.json"}
    assert not made & {one.name for one in tmp_path.glob("out/*")}


@pytest.fixture(scope="module")
def one_by_one(few, tmp_path_factory):
    """Every script with batches of one patch, stage 8 with more subclasses than a label has patches."""
    folder, said = tmp_path_factory.mktemp("one_by_one"), {}
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(few)
        for script in SCRIPTS:
            more = ["--subclasses", 7] if script == "DMU/hard_scl_main.py" else []
            said[script] = succeed(script, *flags(few, script, folder / script), "--batch_size", 1, *more).out
    return folder, said


@pytest.mark.parametrize("script", SCRIPTS)
def test_batches_of_one_patch_give_no_nan(one_by_one, script):
    """Every batch has one label and nothing to compare with."""
    out = one_by_one[0] / script
    log = pd.read_csv(out / "log.csv")
    assert len(log) and np.isfinite(log.select_dtypes("number").to_numpy()).all()
    state = torch.load(out / "last.pt", weights_only=True)["model"]
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_last_batch_of_one_patch_and_one_cell(few, tmp_path, monkeypatch, script):
    """Batch norm refuses to learn from one value per channel; a map of one cell in a batch of one is just that."""
    shutil.copytree(few, tmp_path / "small")
    for patch in (tmp_path / "small").rglob("*.png"):
        patch.write_bytes(picture(np.asarray(Image.open(patch).resize((32, 32))), "PNG"))
    write_cut(tmp_path / "small", read_cut(tmp_path / "small")._replace(patch_size=32))
    table = pd.read_csv(tmp_path / "small/patches.csv")
    table.assign(point_x_px=np.nan, point_y_px=np.nan).to_csv(tmp_path / "small/patches.csv", index=False)
    monkeypatch.chdir(tmp_path / "small")
    size = 4 if script == "DMU/hard_main.py" else 3 if script == "DMU/hard_scl_main.py" else 9
    few_cells = [*flags(tmp_path / "small", script, tmp_path / "out"), "--stride", 32]
    fails(script, *few_cells, "--batch_size", 1, says="--batch_size 1: patches of 32 px")
    succeed(script, *few_cells, "--batch_size", size)


BROKEN = {
    "truncated.png": (lambda data, image: half(data), "not a readable image"),
    "truncated.jpg": (lambda data, image: half(picture(image, "JPEG")), "truncated JPEG"),
    "empty": (lambda data, image: b"", "not a readable image"),
    "gone": (None, "cannot be read"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_broken_patch_is_named(few, tmp_path, monkeypatch, script, fault):
    """Patches are read by threads of the script itself: no worker process takes the path with it when it dies."""
    shutil.copytree(few, tmp_path / "few")
    patch = tmp_path / "few" / pd.read_csv(few / "SCL.csv")["patch"][3]
    spoil, says = BROKEN[fault]
    if spoil:
        patch.write_bytes(spoil(patch.read_bytes(), np.asarray(Image.open(patch))))
    else:
        patch.unlink()
    monkeypatch.chdir(tmp_path / "few")
    done = fails(script, *flags(tmp_path / "few", script, tmp_path / "out"), says=says)
    assert str(patch) in done.err and not (tmp_path / "out").exists()


def test_nothing_is_read_by_worker_processes():
    """What dies in another process buries the path of its file; threads do not."""
    for path in SOURCES:
        names = {node.attr if isinstance(node, ast.Attribute) else node.id for node in walk(path)}
        assert not names & {"DataLoader", "ProcessPoolExecutor", "Process", "Pool", "fork"}, path


def walk(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_full_memory_of_the_device_stops_training_with_advice(here, tmp_path, monkeypatch, script):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 1 GiB.")

    monkeypatch.setattr("dasc.model.network.CamNetwork.features", full)
    done = fails(script, *flags(here, script, tmp_path / "out"), says="lower --batch_size")
    assert "CUDA out of memory" in done.err and len(done.err.strip().splitlines()[-1]) < 200


def test_full_memory_halves_the_batch_of_predict(small_run, tmp_path, monkeypatch, caplog):
    flags = ["--images", small_run / "sample/images/009.tiff", "--model_path", small_run / "NS/model.pt", "--views", 1]
    flags += ["--device", "cpu", "--threshold", 0.3, "--report", "False", "--overlays", "False", "--out"]
    succeed("predict.py", *flags, tmp_path / "whole")
    whole = CamNetwork.forward

    def small_device(network, batch):
        if len(batch) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(network, batch)

    monkeypatch.setattr(CamNetwork, "forward", small_device)
    succeed("predict.py", *flags, tmp_path / "halved")
    assert "the device's memory is full: 8 patches at a time" in caplog.text
    whole, halved = (pd.read_csv(tmp_path / name / "detections.csv") for name in ("whole", "halved"))
    pd.testing.assert_frame_equal(whole, halved, atol=1e-4)
    assert len(whole)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_full_memory_of_a_real_gpu(small_run, few, tmp_path, monkeypatch):
    monkeypatch.chdir(few)
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        fails(
            "NS/sigle.py", *flags(few, "NS/sigle.py", tmp_path / "out"), "--device", "cuda", says="lower --batch_size"
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_fewer_patches_than_subclasses_is_said(one_by_one):
    folder, said = one_by_one
    for word in ("negative", "mitosis"):
        assert f"{word}: 5 subclasses, not 7" in said["DMU/hard_scl_main.py"]
    run = json.loads((folder / "DMU/hard_scl_main.py/run.json").read_text())
    assert run["subclasses"] == {"negative": 5, "mitosis": 5}


def test_a_mixture_that_does_not_converge_is_said(tmp_path, monkeypatch):
    rng, rows = np.random.default_rng(0), []
    for label in (0, 1):
        for number in range(40):
            counts = {"clean": 4, "hard": 15, "noisy": 1, "learned": 20 - number % 19, "forgotten": number % 19}
            row = {"patch": f"{label}_{number}.png", "label": label, "origin": "random", **counts}
            row |= dict.fromkeys(("confidence_weak", "confidence_strong", "confidence_fused"), 0.5)
            rows.append(row | {"centroid_distance": rng.random(), "noise_score": 0.1})
    pd.DataFrame(rows).to_csv(tmp_path / "memory.csv", index=False)
    stopped = functools.partial(dasc.model.difficulty.difficulty_levels, iterations=1)
    monkeypatch.setattr(dasc.model.difficulty, "difficulty_levels", stopped)
    done = succeed("clus_hard.py", "--memory", tmp_path / "memory.csv", "--manifest", "", "--out", tmp_path / "out")
    assert "negative: levels of the 40 hard patches by quantiles: the mixture has not converged in 1" in done.out
    run = json.loads((tmp_path / "out/clus_hard/run.json").read_text())
    assert set(run["quantiles"]) == {"negative", "mitosis"}
    levels = pd.read_csv(tmp_path / "out/hard.csv").groupby(["label", "level"]).size()
    assert levels.min() > 10 and len(levels) == 6
