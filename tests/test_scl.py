"""Stage 8: it trains, its subclasses belong to the patches, it resumes, and refuses what is wrong."""

import json
import shutil

import cv2
import pandas as pd
import pytest
import torch
from pipeline import LIGHT, call, fails, succeed

from dasc.model.checkpoint import load_detector, read_tensors

SHORT = ["--epochs", 4, "--contrast_labels_share", 0.25, "--cluster_every_share", 0.5, "--subclasses", 2, "--views", 1]


@pytest.fixture(scope="module")
def scl(small_run, tmp_path_factory):
    """SCL.csv of all training patches but every seventh, shuffled, levels dealt out."""
    patches = pd.read_csv(small_run / "patches/patches.csv")
    train = patches.loc[patches["split"] == "train", ["patch", "label"]]
    kept = train[[index % 7 > 0 for index in range(len(train))]].sample(frac=1, random_state=0)
    path = tmp_path_factory.mktemp("scl") / "SCL.csv"
    kept["level"] = [3 if index % 3 else index % 4 % 3 for index in range(len(kept))]
    kept.assign(hardness=(kept["level"] + 1) / 3 * (kept["level"] < 3)).to_csv(path, index=False)
    return path


def flags(small_run, scl, out, *more):
    return [*LIGHT, *SHORT, "--manifest", small_run / "patches/patches.csv", "--scl", scl, "--out", out, *more]


@pytest.fixture(scope="module")
def finished(small_run, scl, tmp_path_factory):
    out = tmp_path_factory.mktemp("stage8") / "DMU_scl"
    succeed("DMU/hard_scl_main.py", *flags(small_run, scl, out))
    return out


def test_outputs(small_run, scl, finished):
    log = pd.read_csv(finished / "log.csv")
    assert list(log["epoch"]) == [0, 1, 2, 3]
    # The sum need not fall: after the warm-up another contrastive loss stands in it. On so few patches a loss wavers.
    assert log["classification"].iloc[1:].min() < log["classification"].iloc[0]
    assert (log[["contrastive", "localisation"]] > 0).all().all()
    kept, found = pd.read_csv(scl), pd.read_csv(finished / "subclasses.csv")
    pd.testing.assert_frame_equal(
        found[["patch", "label", "level"]], kept[["patch", "label", "level"]].reset_index(drop=True)
    )
    assert set(found.groupby("subclass")["label"].nunique()) == {1} and found["subclass"].nunique() == 4
    pictures = {name: cv2.imread(str(finished / f"{name}.png")) for name in ("curves", "embedding", "val_curve")}
    assert all(picture.std() > 5 for picture in pictures.values())
    assert pictures["embedding"].shape == (550, 1500, 3) and pictures["val_curve"].shape[0] > 400
    assert pictures["curves"].shape[1] > 5 * pictures["curves"].shape[0]  # four losses and F1
    sheet = cv2.imread(str(finished / "subclasses.png"))
    assert sheet.shape[1] > 12 * 112 and sheet.shape[0] > 4 * 112  # a row or more of each of four subclasses
    assert json.loads((finished / "run.json").read_text())["patches"] == len(kept)
    detector = load_detector(finished / "model.pt", torch.device("cpu"))
    assert detector.network(torch.rand(2, 3, 64, 64)).shape == (2, 2)
    assert (detector.patch_size, detector.per_mm2, detector.merge_um, detector.views) == (64, 3000, 7.5, 1)


def test_predict_runs_with_its_model(small_run, finished, tmp_path):
    judge = ["--dataset", "sample", "--data_root", small_run / "sample", "--device", "cpu", "--views", 1]
    succeed("predict.py", *judge, "--model_path", finished / "model.pt", "--out", tmp_path / "predict")
    assert json.loads((tmp_path / "predict/metrics.json").read_text())["mitoses"] > 0


def test_resume_of_a_finished_run_and_with_another_table(small_run, scl, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    succeed("DMU/hard_scl_main.py", *flags(small_run, scl, tmp_path / "out", "--resume"))
    assert (tmp_path / "out/subclasses.csv").read_bytes() == (finished / "subclasses.csv").read_bytes()
    whole = scl.read_bytes()
    scl.write_bytes(whole.rsplit(b"\n", 2)[0] + b"\n")
    try:
        fails(
            "DMU/hard_scl_main.py",
            *flags(small_run, scl, tmp_path / "out", "--resume"),
            says="another table than --scl",
        )
    finally:
        scl.write_bytes(whole)


def test_start_share_of_1_keeps_the_start(small_run, scl, tmp_path):
    start = small_run / "NS/model.pt"
    more = ["--epochs", 1, "--init_weights", start, "--start_share", 1]
    succeed("DMU/hard_scl_main.py", *flags(small_run, scl, tmp_path / "out", *more))
    kept, started = (read_tensors(path)["model"] for path in (tmp_path / "out/model.pt", start))
    for name, tensor in started.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(kept[name], tensor)


def change(scl, tmp_path, edit):
    path = tmp_path / "SCL.csv"
    edit(pd.read_csv(scl)).to_csv(path, index=False)
    return path


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t[t["label"] == 0], "no mitosis patch"),
        (lambda t: t.assign(level=t["level"].replace(2, 5)), "hardness"),
        (lambda t: pd.concat([t, t.head(1)]), "stands in it twice"),
        (lambda t: pd.concat([t, t.head(1).assign(patch="train/mitosis/none.png")]), "lacks 1 of"),
        (lambda t: t.assign(label=1 - t["label"]), "has label"),
        (lambda t: t.drop(columns="level"), "column level is missing"),
    ],
)
def test_wrong_scl_is_one_line(small_run, scl, tmp_path, edit, says):
    path = change(scl, tmp_path, edit)
    fails("DMU/hard_scl_main.py", *flags(small_run, path, tmp_path / "out"), says=says)
    assert not (tmp_path / "out").exists()


def test_levels_that_no_patch_has_are_no_error(small_run, scl, tmp_path):
    path = change(scl, tmp_path, lambda t: t.assign(level=3, hardness=0))
    succeed("DMU/hard_scl_main.py", *flags(small_run, path, tmp_path / "out", "--epochs", 2))
    assert (tmp_path / "out/model.pt").is_file()


def test_point_outside_its_patch_and_a_patch_that_is_gone(small_run, scl, tmp_path):
    shutil.copytree(small_run / "patches", tmp_path / "patches")
    path = tmp_path / "patches/patches.csv"
    table = pd.read_csv(path)
    changed = table.copy()
    changed.loc[changed["label"] == 1, "point_x_px"] = 70.0
    changed.to_csv(path, index=False)
    again = [*LIGHT, *SHORT, "--manifest", path, "--scl", scl, "--out", tmp_path / "out"]
    fails("DMU/hard_scl_main.py", *again, says="outside the patch of 64 px")
    table.to_csv(path, index=False)
    (tmp_path / "patches" / pd.read_csv(scl)["patch"][0]).unlink()
    fails("DMU/hard_scl_main.py", *again, says="patch cannot be read")
    assert not (tmp_path / "out").exists()


def test_loss_that_is_not_finite_stops_with_advice(small_run, scl, tmp_path):
    fails(
        "DMU/hard_scl_main.py",
        *flags(small_run, scl, tmp_path / "out", "--lr", 1e30, "--nan_steps", 2),
        says="lower --lr",
    )
    assert not (tmp_path / "out/model.pt").exists()


@pytest.mark.parametrize("flag", [["--temperature", 0], ["--gce_q", 0]])
def test_settings_out_of_range(small_run, scl, tmp_path, flag):
    done = call("DMU/hard_scl_main.py", *flags(small_run, scl, tmp_path / "out", *flag))
    assert done.status != 0 and f"argument {flag[0]}: expected a number above 0" in done.err
