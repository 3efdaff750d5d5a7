"""Stages 1 and 3: what is cut, where, and what happens to bad input."""

import json
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import sample_flags
from pipeline import ROOT, call, fails, succeed

from dasc.data.cut import read_cut_fields
from dasc.data.patches import read_patch
from dasc.data.tables import read_patches

SHARED = ROOT.parent / "shared" / "data"


def tables(folder):
    return read_patches(folder / "patches.csv"), *read_cut_fields(folder)[1:]


def test_every_patch_is_there_and_of_its_size(small_run):
    patches, _, _ = tables(small_run / "patches")
    on_disk = {path.relative_to(small_run / "patches").as_posix() for path in (small_run / "patches").rglob("*.png")}
    assert on_disk == set(patches["patch"])
    assert {read_patch(small_run / "patches" / patch).shape for patch in patches["patch"][::7]} == {(64, 64, 3)}


def test_counts_follow_the_method(small_run):
    patches, fields, annotations = tables(small_run / "patches")
    train = patches[patches["split"] == "train"]
    mitoses = annotations[annotations["label"] == 1].merge(fields, on="image")
    in_train = int((mitoses["split"] == "train").sum())
    origins = train["origin"].value_counts()
    assert origins["annotated"] == in_train and origins["shifted"] == 3 * in_train
    assert origins["random"] == 4 * in_train
    held_out = patches[patches["split"] != "train"]
    assert "shifted" not in set(held_out["origin"])
    assert (held_out[held_out["origin"] == "random"].groupby("image").size() == 20).all()
    assert (patches["label"] == patches["origin"].isin(["annotated", "shifted"])).all()


def test_no_negative_near_a_mitosis(small_run):
    patches, fields, annotations = tables(small_run / "patches")
    resolution = fields.set_index("image")["um_per_px"]
    for image, mitoses in annotations[annotations["label"] == 1].groupby("image"):
        random = patches[(patches["image"] == image) & (patches["origin"] == "random")]
        offsets = random[["x_px", "y_px"]].to_numpy()[:, None] - mitoses[["x_px", "y_px"]].to_numpy()
        if len(random):
            assert np.hypot(*offsets.transpose(2, 0, 1)).min() * resolution[image] > 20


def test_the_annotated_point_is_dark_in_its_patch(small_run):
    """Moved and turned copies too: their point lies on chromatin, darker than the patch on the whole."""
    patches, _, _ = tables(small_run / "patches")
    darker = []
    for row in patches[patches["origin"].isin(["annotated", "shifted"])].itertuples():
        patch = cv2.GaussianBlur(read_patch(small_run / "patches" / row.patch), (0, 0), 3)[:, :, 0].astype(float)
        darker.append(patch[round(row.point_y_px), round(row.point_x_px)] < np.median(patch) - 15)
    assert np.mean(darker) > 0.8  # the middle of an anaphase pair is light


def test_same_seed_same_bytes_and_workers_do_not_matter(small_run, tmp_path):
    succeed("pre/cut_patch_2.py", *sample_flags(small_run), "--out", tmp_path / "again", "--workers", 1)
    for name in ("patches.csv", "fields.csv", "annotations.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (small_run / "patches" / name).read_bytes()
    for patch in (tmp_path / "again").rglob("*.png"):
        relative = patch.relative_to(tmp_path / "again")
        assert patch.read_bytes() == (small_run / "patches" / relative).read_bytes()


def test_stage_3_adds_false_positives_and_keeps_the_rest(small_run, tmp_path):
    flags = [*sample_flags(small_run), "--fp_mdoel", "True", "--model_path", small_run / "NS/model.pt"]
    succeed("pre/cut_patch_2.py", *flags, "--search_above", 0.3, "--device", "cpu", "--out", tmp_path / "ns")
    before, after = tables(small_run / "patches")[0], tables(tmp_path / "ns")[0]
    searched = after[after["origin"] == "searched"]
    assert len(searched) and (searched["split"] == "train").all() and (searched["label"] == 0).all()
    assert (searched["score"] > 0.3).all() and after[after["origin"] != "searched"]["score"].isna().all()
    places = ["image", "origin", "x_px", "y_px"]
    kept = before[before["origin"] != "random"][places].merge(after[places])
    assert len(kept) == (before["origin"] != "random").sum()
    assert not after.duplicated(["image", "label", "x_px", "y_px"]).any()


def test_what_the_search_is_too_sure_of_is_no_negative(small_run, tmp_path):
    flags = [
        *sample_flags(small_run),
        "--fp_mdoel",
        "True",
        "--model_path",
        small_run / "NS/model.pt",
        "--device",
        "cpu",
    ]
    flags += ["--search_above", 0.2, "--random_per_positive", 100]  # every candidate that is left is drawn
    succeed("pre/cut_patch_2.py", *flags, "--out", tmp_path / "all")
    whole = tables(tmp_path / "all")[0]
    scores = whole.loc[whole["origin"] == "searched", "score"].sort_values()
    limit = scores.iloc[len(scores) // 2 :][:2].mean()  # between two of them, which are rounded in the table
    succeed("pre/cut_patch_2.py", *flags, "--search_below", limit, "--out", tmp_path / "below")
    places = ["image", "label", "origin", "x_px", "y_px"]
    left_out = whole.merge(tables(tmp_path / "below")[0][places], how="left", indicator=True)["_merge"] == "left_only"
    assert (left_out == (whole["score"] > limit)).all() and 0 < left_out.sum() < len(scores)
    nothing = [*flags, "--search_above", 1, "--search_below", 1, "--out", tmp_path / "nothing"]
    succeed("pre/cut_patch_2.py", *nothing)  # a limit of 1 searches for nothing
    assert "searched" not in set(tables(tmp_path / "nothing")[0]["origin"])
    says = "--search_below 0.1: lower than --search_above 0.2"
    fails("pre/cut_patch_2.py", *flags, "--search_below", 0.1, "--out", tmp_path / "none", says=says)


def test_an_older_result_is_kept_and_a_foreign_folder_refused(small_run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "my notes.txt").write_text("mine")
    fails("pre/cut_patch_2.py", *sample_flags(small_run), "--out", out, says="holds files but no patches.csv")
    assert (out / "my notes.txt").read_text() == "mine"
    (out / "patches.csv").write_text("older")
    succeed("pre/cut_patch_2.py", *sample_flags(small_run), "--out", out)
    assert (tmp_path / "out.previous/my notes.txt").read_text() == "mine"


def test_unreadable_field_is_skipped_named_and_counted(small_run, tmp_path):
    shutil.copytree(small_run / "sample", tmp_path / "sample")
    broken = tmp_path / "sample/images/002.tiff"
    broken.write_bytes(broken.read_bytes()[:2000])
    done = call("pre/cut_patch_2.py", "--data_root", tmp_path / "sample", "--patch_size", 64, "--out", tmp_path / "out")
    assert done.status == 1 and "002.tiff" in done.err and "1 fields skipped" in done.out
    assert "002.tiff" in json.dumps(json.loads((tmp_path / "out/run.json").read_text())["skipped"])
    assert len(pd.read_csv(tmp_path / "out/fields.csv")) == 9


def test_no_readable_field_writes_nothing(small_run, tmp_path):
    shutil.copytree(small_run / "sample", tmp_path / "sample")
    for image in (tmp_path / "sample/images").iterdir():
        image.write_bytes(b"not an image")
    fails("pre/cut_patch_2.py", "--data_root", tmp_path / "sample", "--out", tmp_path / "out", says="none of the 10")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data_root", "nowhere"], "pre/make_sample.py"),
        (["--val", "77"], "77"),
        (["--fp_mdoel", "--model_path", "nowhere/model.pt"], "NS/sigle.py"),
        (["--um_per_px", "5", "--insist_um_per_px"], "0.1-1.0"),
    ],
)
def test_bad_input_is_one_line(small_run, tmp_path, flags, says):
    fails("pre/cut_patch_2.py", *sample_flags(small_run), "--out", tmp_path / "out", *flags, says=says)
    assert not (tmp_path / "out").exists()


def test_model_of_another_patch_size_is_refused(small_run, tmp_path):
    flags = [*sample_flags(small_run), "--patch_size", 80, "--fp_mdoel", "--model_path", small_run / "NS/model.pt"]
    fails("pre/cut_patch_2.py", *flags, "--out", tmp_path / "out", says="trained at patch_size 64")


@pytest.mark.skipif(not SHARED.is_dir(), reason="real fields are not here")
def test_real_fields_and_annotation_outside(tmp_path):
    for slide, name in (("H03", "H03_00Aa"), ("H03", "H03_00Ab"), ("H12", "H12_*")):
        frame = min((SHARED / "mitos14" / slide / "frames/x40").glob(f"{name}.jpg"))
        marks = tmp_path / "data" / slide / "mitosis"
        (tmp_path / "data" / slide / "frames/x40").mkdir(parents=True, exist_ok=True)
        marks.mkdir(exist_ok=True)
        shutil.copy(frame, tmp_path / "data" / slide / "frames/x40")
        for kind in ("mitosis", "not_mitosis"):
            shutil.copy(SHARED / f"mitos14/{slide}/mitosis/{frame.stem}_{kind}.csv", marks)
    with (tmp_path / "data/H03/mitosis/H03_00Ab_mitosis.csv").open("a") as file:
        file.write("\n5000,20,1.0\n")
    flags = ["--dataset", "mitos14", "--data_root", tmp_path / "data", "--val", "H03", "--test", "H12"]
    done = succeed("pre/cut_patch_2.py", *flags, "--out", tmp_path / "out")
    assert "H03_00Ab: 1 annotations outside the field dropped" in done.err
    patches, fields, annotations = tables(tmp_path / "out")
    assert (fields["um_per_px"] == 0.2274).all() and annotations["x_px"].max() < 1663
    assert (patches["origin"] == "annotated").sum() == (annotations["label"] == 1).sum() > 0
