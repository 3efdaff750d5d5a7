"""Corrections of annotations: the nearest one is relabelled, what is missing is added, what is unsure is left out."""

import numpy as np
import pandas as pd
import pytest
from pipeline import call, check_run_json, fails, succeed

from dasc.data.corrections import CORRECTIONS, UNSURE, correct, read_corrections, without_unsure
from dasc.data.datasets import read_dataset
from dasc.data.tables import write_table


def corrections_of(*rows, um_per_px=0.25):
    """Corrections from image, x_px, y_px and new."""
    table = pd.DataFrame(rows, columns=["image", "x_px", "y_px", "new"])
    return table.assign(um_per_px=um_per_px, old="", votes="M 1", readers="AB").astype({"x_px": float, "y_px": float})


ANNOTATIONS = pd.DataFrame(
    [["a", 100, 100, 1, 0.8], ["a", 150, 100, 0, np.nan], ["b", 100, 100, 1, np.nan]],
    columns=["image", "x_px", "y_px", "label", "confidence"],
).astype({"x_px": float, "y_px": float})


def test_the_nearest_annotation_within_the_radius_is_relabelled():
    found, changes = correct(ANNOTATIONS, corrections_of(("a", 129, 100, "0"), ("b", 100, 131, "0")))
    assert found.loc[found["image"] == "a", "label"].tolist() == [1, 0]  # 21 px to the second, 29 to the first
    assert found.loc[found["image"] == "b", ["y_px", "label"]].to_numpy().tolist() == [[100, 1], [131, 0]]
    assert changes["already so"] == 1 and changes["look-alikes added"] == 1  # 30 px are 7.5 um
    found, changes = correct(ANNOTATIONS, corrections_of(("b", 100, 130, "0")))
    assert found["label"].tolist() == [1, 0, 0] and changes["relabelled as look-alikes"] == 1
    found, changes = correct(ANNOTATIONS, corrections_of(("b", 100, 130, "0"), um_per_px=0.5))
    assert len(found) == 4 and found["confidence"].isna().sum() == 3


def test_the_confidence_goes_with_the_label_that_it_was_given_for():
    table = corrections_of(("a", 100, 100, "1"), ("a", 150, 100, "1"))
    assert correct(ANNOTATIONS, table)[0]["confidence"].tolist()[:1] == [0.8]
    assert correct(ANNOTATIONS, corrections_of(("a", 100, 100, "0")))[0]["confidence"].isna().all()
    assert ANNOTATIONS["confidence"].notna().sum() == 1


def test_every_annotation_is_taken_once_by_the_nearest_correction():
    found, changes = correct(ANNOTATIONS[:1], corrections_of(("a", 110, 100, "1"), ("a", 101, 100, "0")))
    assert found[["x_px", "label"]].to_numpy().tolist() == [[100, 0], [110, 1]]
    assert changes["relabelled as look-alikes"] == changes["mitoses added"] == 1


def test_unsure_is_neither_and_all_changes_are_counted():
    table = corrections_of(("a", 100, 100, "unsure"), ("a", 150, 101, "1"), ("b", 900, 9, "unsure"), ("c", 5, 5, "1"))
    found, changes = correct(ANNOTATIONS, table)
    assert found["label"].tolist() == [UNSURE, 1, 1, UNSURE, 1] and found["image"].tolist() == list("aabbc")
    assert changes["unsure"] == 2 and changes["relabelled as mitoses"] == 1 and changes["mitoses added"] == 1
    assert sum(changes.values()) == len(table)
    assert ANNOTATIONS["label"].tolist() == [1, 0, 1]


def test_nothing_unsure_is_judged():
    annotations = pd.DataFrame({"image": "a", "x_px": [10.0, 100.0], "y_px": 10.0, "label": [1, UNSURE]})
    detections = pd.DataFrame({"image": list("aaaab"), "x_px": [12.0, 75, 54, 200, 100], "y_px": 10.0})
    mitoses, judged = without_unsure(annotations, detections, {"a": 0.25, "b": 0.25})
    assert mitoses["label"].tolist() == [1] and judged.index.tolist() == [0, 2, 3, 4]  # 46 px are too far, b another
    assert len(without_unsure(annotations[:1], detections, {"a": 0.25})[1]) == 5
    assert len(without_unsure(annotations, detections[:0], {"a": 0.25})[1]) == 0


@pytest.mark.parametrize(
    "change",
    [{"new": "2"}, {"new": ""}, {"old": "x"}, {"um_per_px": 0.0}, {"um_per_px": np.nan}, {"x_px": np.nan}],
    ids=str,
)
def test_wrong_corrections_are_one_line(tmp_path, small_run, change):
    table = corrections_of(("001", 1, 1, "1")).assign(**change)
    write_table(tmp_path / "corrections.csv", table, CORRECTIONS)
    flags = ["--dataset", "sample", "--data_root", small_run / "sample", "--out", tmp_path / "patches"]
    fails("pre/cut_patch_2.py", *flags, "--corrections", tmp_path / "corrections.csv", says="row 2: old ")
    assert not (tmp_path / "patches").exists()


def test_corrections_of_another_dataset_are_refused(tmp_path, small_run):
    write_table(tmp_path / "corrections.csv", corrections_of(("elsewhere", 1, 1, "1")), CORRECTIONS)
    flags = ["--dataset", "sample", "--data_root", small_run / "sample", "--out", tmp_path / "patches"]
    says = "none of its 1 corrections is of an image of"
    fails("pre/cut_patch_2.py", *flags, "--corrections", tmp_path / "corrections.csv", says=says)
    fails("pre/cut_patch_2.py", *flags, "--corrections", tmp_path / "none.csv", says="no such file")


def test_predict_judges_by_the_corrected_annotations(tmp_path, small_run):
    """A mitosis called a look-alike is no longer missed, one that was missing is; one that is unsure is neither."""
    dataset = read_dataset("sample", small_run / "sample")
    test = set(dataset.fields.loc[dataset.fields["split"] == "test", "image"])
    mitoses = dataset.annotations[dataset.annotations["image"].isin(test) & (dataset.annotations["label"] == 1)]
    rows = [(*mitoses.iloc[n][["image", "x_px", "y_px"]], new) for n, new in ((0, "0"), (1, "unsure"))]
    rows.append((mitoses.iloc[0]["image"], 350, 350, "1"))
    write_table(tmp_path / "corrections.csv", corrections_of(*rows), CORRECTIONS)
    assert len(read_corrections(tmp_path / "corrections.csv")) == 3
    flags = ["--dataset", "sample", "--data_root", small_run / "sample", "--model_path", small_run / "NS/model.pt"]
    flags += ["--device", "cpu", "--report", False, "--per_mm2", 600, "--threshold", 0]
    succeed("predict.py", *flags, "--out", tmp_path / "before")
    done = succeed("predict.py", *flags, "--out", tmp_path / "after", "--corrections", tmp_path / "corrections.csv")
    assert "1 relabelled as look-alikes, 1 mitoses added, 1 unsure" in done.out
    assert check_run_json(tmp_path / "after/run.json")["corrections"]["unsure"] == 1
    before, after = (pd.read_csv(tmp_path / name / "metrics_per_field.csv") for name in ("before", "after"))
    assert (before["tp"] + before["fn"]).sum() == len(mitoses)
    assert (after["tp"] + after["fn"]).sum() == len(mitoses) - 1
    detections = pd.read_csv(tmp_path / "after/detections.csv", dtype={"image": str})
    place = mitoses.iloc[1]
    near = detections[detections["image"] == place["image"]]
    near = np.hypot(near["x_px"] - place["x_px"], near["y_px"] - place["y_px"]) * 0.25 <= 7.5
    assert near.any() and (after["tp"] + after["fp"]).sum() == len(detections) - near.sum()
    assert call("predict.py", *flags, "--corrections", tmp_path / "none.csv", "--out", tmp_path / "x").status == 1
