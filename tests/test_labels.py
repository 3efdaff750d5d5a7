"""Labels as people have them: unlabelled images, other numbers, other places, two readers; refused or set right."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import sample_flags
from pipeline import ROOT, call, fails, succeed

from dasc.data.midog import category_labels
from dasc.detect.labels import FEWEST, Labels, check_size, judge_labels, likely_cause
from dasc.errors import InputError

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="real data are not here")


def sample(small_run, folder: Path, change) -> list:
    """Flags for a copy of the small sample whose JSON `change` has changed."""
    shutil.copytree(small_run / "sample", folder)
    content = json.loads((folder / "MIDOG.json").read_text())
    change(content)
    (folder / "MIDOG.json").write_text(json.dumps(content))
    return [*sample_flags(small_run), "--data_root", folder]


def annotations(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "annotations.csv")


# names and numbers


def categories(*names):
    return [{"id": number, "name": name} for number, name in enumerate(names, start=1)]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ((), {1: 1, 2: 0}),
        (("mitotic figure", "hard negative"), {1: 1, 2: 0}),
        (("imposter", "mitosis"), {1: 0, 2: 1}),
        (("Look-alike", "Mitose"), {1: 0, 2: 1}),
        (("Non-Mitotic Figure", "MITOTIC_FIGURE"), {1: 0, 2: 1}),
        (("hard negative look-alikes", "mitotic figures"), {1: 0, 2: 1}),
        (("lymphocyte", "mitosis", "impostor"), {2: 1, 3: 0}),
        (("Mitosis", "Apoptosis", "Tumor_nuclei"), {1: 1, 2: 0}),
        (("Mitosis", "Pyknosis", "Apoptosis"), {1: 1, 2: 0, 3: 0}),
        (("Apoptosis", "mitosis", "hard negative"), {2: 1, 3: 0}),
        (("mitosis",), {1: 1, 2: 0}),
    ],
)
def test_names_decide_over_numbers(names, labels):
    assert category_labels(categories(*names), "a.json")[0] == labels


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (categories("mitosis", "mitotic figure"), ("1 'mitosis'", "2 'mitotic figure'", "both mean a mitosis")),
        (categories("imposter", "mitosis", "look-alike"), ("1 'imposter'", "3 'look-alike'", "hard negative")),
        (categories("class A", "class B"), ("1 'class A'", "mitosis")),
        (categories("mitosis", "class B"), ("2 'class B'", "hard negative")),
        ([{"id": 1, "name": "mitosis"}, {"id": 1, "name": "imposter"}], ("id 1", "'mitosis'", "'imposter'")),
    ],
)
def test_names_that_contradict_are_refused_with_both(content, words):
    with pytest.raises(InputError) as caught:
        category_labels(content, "a.json")
    assert all(word in str(caught.value) for word in ("a.json", *words))


def test_alphabetical_numbers_give_the_same_labels_and_other_classes_are_counted(small_run, tmp_path, caplog):
    def renumber(content):
        content["categories"] = categories("imposter", "mitosis", "vessel")
        for box in content["annotations"]:
            box["category_id"] = {1: 2, 2: 1}[box["category_id"]]
        content["annotations"] += [{"image_id": 1, "category_id": 3, "bbox": [1, 1, 9, 9]}] * 3

    flags = sample(small_run, tmp_path / "sample", renumber)
    succeed("pre/cut_patch_2.py", *flags, "--out", tmp_path / "out")
    assert "3 annotations of other classes left out: vessel 3" in caplog.text
    assert annotations(tmp_path / "out").equals(annotations(small_run / "patches"))


# unlabelled and empty


def without_boxes(first, last):
    """Thirty images more, and no box in those from `first` to `last`."""

    def change(content):
        images = content["images"]
        content["images"] = images + [dict(images[0], id=i, file_name=f"{i:03d}.tiff") for i in range(11, 51)]
        box = content["annotations"][0]
        content["annotations"] += [dict(box, image_id=i) for i in range(11, 51)]
        content["annotations"] = [
            box for box in content["annotations"] if not first <= box["image_id"] <= last and box["image_id"] != 3
        ]

    return change


def test_a_long_run_without_a_box_is_refused_until_somebody_says_what_it_is(small_run, tmp_path, caplog):
    flags = [*sample(small_run, tmp_path / "sample", without_boxes(21, 45)), "--out", tmp_path / "out"]
    done = fails("pre/cut_patch_2.py", *flags, says="no box in 25 images in a row, from 21 to 45, and in 1 of the 25")
    assert "--unlabelled 21-45" in done.err and "--empty 21-45" in done.err and not (tmp_path / "out").exists()
    fails("pre/cut_patch_2.py", *flags, "--empty", "21-45", "--unlabelled", "30", says="both name image '030'")
    fails("pre/cut_patch_2.py", *flags, "--empty", "1", says="which --empty names")
    for number in range(11, 51):
        shutil.copy(tmp_path / "sample/images/001.tiff", tmp_path / f"sample/images/{number:03d}.tiff")
    succeed("pre/cut_patch_2.py", *flags, "--unlabelled", "21-45", "--random_per_positive", 0)
    assert "25 of 50 images are unlabelled and left out" in caplog.text
    assert "1 of 50 images have no box and are taken for empty" in caplog.text
    fields = pd.read_csv(tmp_path / "out/fields.csv", dtype=str)
    assert set(fields["image"]) == {f"{i:03d}" for i in range(1, 51) if not 21 <= i <= 45}


def test_short_runs_are_said_and_counted(small_run, tmp_path, caplog):
    flags = sample(small_run, tmp_path / "sample", lambda content: content.update(annotations=few(content)))
    succeed("pre/cut_patch_2.py", *flags, "--out", tmp_path / "out")
    assert "3 of 10 images have no box and are taken for empty" in caplog.text and "002, 003, 004" in caplog.text


def few(content):
    return [box for box in content["annotations"] if box["image_id"] not in (2, 3, 4)]


# nothing left


def test_a_dataset_without_a_mitosis_is_refused_by_both_scripts(small_run, tmp_path):
    def spoil(content):
        content["annotations"] = [box for box in content["annotations"] if box["category_id"] == 2]

    flags = sample(small_run, tmp_path / "sample", spoil)
    done = fails("pre/cut_patch_2.py", *flags, "--out", tmp_path / "out", says="no mitosis is annotated in the 10")
    assert "MIDOG.json, the list annotations" in done.err
    model = ["--model_path", small_run / "NS/model.pt", "--device", "cpu"]
    data = ["--dataset", "sample", "--data_root", tmp_path / "sample"]
    fails("predict.py", *model, *data, "--out", tmp_path / "out", says="no mitosis is annotated in the 10")
    assert not (tmp_path / "out").exists()


def test_a_split_without_a_mitosis_is_not_judged(small_run, tmp_path):
    def spoil(content):
        content["annotations"] = [box for box in content["annotations"] if box["image_id"] < 9]

    sample(small_run, tmp_path / "sample", spoil)
    model = ["--model_path", small_run / "NS/model.pt", "--device", "cpu", "--out", tmp_path / "out"]
    data = ["--dataset", "sample", "--data_root", tmp_path / "sample"]
    fails("predict.py", *model, *data, says="no mitosis is annotated in the 2 fields of split test")


def test_no_labelled_field_and_labels_of_no_image_are_refused(small_run, tmp_path):
    frames, tables = tmp_path / "A03/frames/x40", tmp_path / "A03/mitosis"
    frames.mkdir(parents=True)
    tables.mkdir()
    shutil.copy(small_run / "sample/images/001.tiff", frames / "A03_00Aa.TIFF")
    flags = ["--dataset", "mitos14", "--data_root", tmp_path, "--out", tmp_path / "out"]
    done = fails("pre/cut_patch_2.py", *flags, says="none of the 1 images has labels")
    assert "FRAME_mitosis.csv" in done.err
    (tables / "A03_00Ab_mitosis.csv").write_text("5,6,1.0\n")
    done = fails("pre/cut_patch_2.py", *flags, says="this label file matches no image")
    assert str(tables / "A03_00Ab_mitosis.csv") in done.err


# TUPAC16 unpacked flat


def tupac16(root: Path, small_run, images, labels) -> list:
    for name in images:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(small_run / "sample/images/001.tiff", root / name)
    for name in labels:
        (root / "mitoses_ground_truth" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "mitoses_ground_truth" / name).write_text("200,100\n")
    return ["--dataset", "tupac16", "--data_root", root, "--val", "2", "--test", "3", "--patch_size", 64]


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (("01/01.tif", "02/01.tif", "03/01.tif"), ("01_01.csv", "02_01.csv", "03_01.csv")),
        (("part_1/01/01.TIF", "part_2/02/01.tif", "part_2/03/01.tif"), ("01_01.CSV", "02/01.CSV", "03/01.csv")),
        (("images/01_01.tif", "images/02_01.tif", "images/03_01.tif"), ("01/01.csv", "02/01.csv", "03/01.csv")),
        (("01_01.tif", "02_01.tif", "03_01.tif"), ("01_01.csv", "02_01.csv", "03_01.csv")),
    ],
)
def test_tupac16_flat_or_in_folders(small_run, tmp_path, images, labels):
    flags = tupac16(tmp_path / "data", small_run, images, labels)
    succeed("pre/cut_patch_2.py", *flags, "--out", tmp_path / "out")
    found = annotations(tmp_path / "out")
    assert list(found["image"]) == ["01_01", "02_01", "03_01"]
    assert (found["x_px"] == 100).all() and (found["y_px"] == 200).all() and (found["label"] == 1).all()


def test_tupac16_labels_that_fit_no_image_or_twice_are_refused(small_run, tmp_path):
    images = ("01/01.tif", "02/01.tif", "03/01.tif")
    flags = tupac16(tmp_path / "a", small_run, images, ("case01-01.csv", "case02-01.csv"))
    done = fails("pre/cut_patch_2.py", *flags, "--out", tmp_path / "out", says="more label files match no image")
    assert "NN/MM.csv or NN_MM.csv" in done.err and "case01-01.csv" in done.err
    flags = tupac16(tmp_path / "b", small_run, images, ("01_01.csv", "01/01.csv"))
    fails("pre/cut_patch_2.py", *flags, "--out", tmp_path / "out", says="both are the labels of")


# where labels fall


def moved(change):
    def spoil(content):
        for box in content["annotations"]:
            box["bbox"] = change(np.array(box["bbox"], dtype=float)).tolist()

    return spoil


WRONG = {
    "x and y are swapped": lambda box: box[[1, 0, 3, 2]],
    "they are in um, not in px": lambda box: box * 0.25,
    "they are mirrored left to right": lambda box: np.array([699 - box[2], box[1], 699 - box[0], box[3]]),
    "they are for an image of another size": lambda box: box * 0.5,
}


@pytest.mark.parametrize("cause", WRONG)
def test_labels_beside_the_nuclei_are_refused_with_the_cause(small_run, tmp_path, cause):
    flags = sample(small_run, tmp_path / "sample", moved(WRONG[cause]))
    flags += ["--um_per_px", 0.25, "--contested", "drop"]  # in um the nuclei of the sample move close together
    done = fails("pre/cut_patch_2.py", *flags, "--out", tmp_path / "out", says=f"probably {cause}")
    assert str(tmp_path / "sample") in done.err and "expected 60% or more" in done.err
    assert not list(tmp_path.glob("out*"))  # nothing is cut


def test_whoever_insists_goes_on(small_run, tmp_path):
    flags = sample(small_run, tmp_path / "sample", moved(WRONG["x and y are swapped"]))
    succeed("pre/cut_patch_2.py", *flags, "--check_labels", "False", "--out", tmp_path / "out")
    right, wrong = annotations(small_run / "patches"), annotations(tmp_path / "out")
    assert (wrong["x_px"] == right["y_px"]).all()


def test_predict_judges_by_no_labels_beside_the_nuclei(small_run, tmp_path):
    sample(small_run, tmp_path / "sample", moved(WRONG["x and y are swapped"]))
    flags = ["--dataset", "sample", "--data_root", tmp_path / "sample", "--split", "train", "--out", tmp_path / "out"]
    flags += ["--model_path", small_run / "NS/model.pt", "--device", "cpu"]
    fails("predict.py", *flags, says="probably x and y are swapped")
    assert not (tmp_path / "out/metrics.json").exists()


def test_candidates_that_were_looked_at_change_no_patch(small_run, tmp_path):
    succeed("pre/cut_patch_2.py", *sample_flags(small_run), "--check_labels", "False", "--out", tmp_path / "out")
    assert (tmp_path / "out/patches.csv").read_bytes() == (small_run / "patches/patches.csv").read_bytes()


def looked(count: int, change) -> list[Labels]:
    """Fields of 2000 x 1500 px whose first candidates are the mitoses, changed."""
    rng = np.random.default_rng(0)
    fields = []
    for _ in range(6):
        candidates = rng.uniform(0, 1, (150, 2)) * [2000, 1500]
        fields.append(Labels(change(candidates[:count]), candidates, 2000, 1500, 0.25))
    return fields


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda points: points / [2000, 1500], "shares of the image"),
        (lambda points: [0, 1499] + points * [1, -1], "upside down"),
        (lambda points: [1999, 1499] - points, "turned by 180 degrees"),
        (lambda points: np.stack([1499 - points[:, 1], points[:, 0]], axis=1), "turned by 90 degrees"),
        (lambda points: points[:, ::-1] * 0.25, "x and y are swapped, and in um"),
        (lambda points: points - 50, "add 50 px to x and 50 px to y"),
        (lambda points: points * 2, "multiply them by 0.50"),
        (lambda points: np.random.default_rng(1).uniform(0, 1500, points.shape), "do they belong to these images"),
    ],
)
def test_causes_are_told_apart(change, words):
    assert words in likely_cause(looked(8, change))


def test_right_labels_pass_and_too_few_are_said(caplog):
    assert judge_labels(looked(8, lambda points: points), Path("data")) == 1
    assert not caplog.text
    few_wrong = looked(1, lambda points: points[:, ::-1])
    assert np.isnan(judge_labels(few_wrong, Path("data"))) and f"6 mitoses, of {FEWEST} needed" in caplog.text


def test_another_size_than_the_labels_state_is_refused_by_name(small_run, tmp_path):
    flags = sample(small_run, tmp_path / "sample", lambda content: content["images"][1].update(width=1400, height=1400))
    done = call("pre/cut_patch_2.py", *flags, "--out", tmp_path / "out")
    assert done.status == 1 and "1 fields skipped" in done.out
    assert "skipped 002: images/002.tiff: the file has 700 x 700 px, its labels are for 1400 x 1400 px" in done.err
    succeed("pre/cut_patch_2.py", *flags, "--check_labels", "False", "--out", tmp_path / "again")
    unstated = pd.DataFrame({"path": ["a"], "width_px": [np.nan], "height_px": [np.nan]})
    check_size(next(unstated.itertuples()), 10, 10)


# one nucleus twice


def twice(label):
    """Every mitosis of the first image marked by a second reader, 2 px beside the first one."""

    def change(content):
        mine = [box for box in content["annotations"] if box["image_id"] == 1 and box["category_id"] == 1]
        again = [dict(box, category_id=label, bbox=[edge + 2 for edge in box["bbox"]]) for box in mine]
        content["annotations"] += again

    return change


def test_a_nucleus_marked_alike_twice_is_one(small_run, tmp_path, caplog):
    flags = sample(small_run, tmp_path / "sample", twice(1))
    succeed("pre/cut_patch_2.py", *flags, "--out", tmp_path / "out")
    assert "4 annotations are left out: an earlier one marks the same nucleus alike" in caplog.text
    assert annotations(tmp_path / "out").equals(annotations(small_run / "patches"))


def test_a_nucleus_with_both_labels_is_refused_with_both_rows_or_left_out(small_run, tmp_path, caplog):
    flags = [*sample(small_run, tmp_path / "sample", twice(2)), "--out", tmp_path / "out"]
    done = fails("pre/cut_patch_2.py", *flags, says="is a mitosis in one and a hard negative, 2.8 px beside it, in the")
    assert done.err.count("MIDOG.json, annotations[") == 2
    succeed("pre/cut_patch_2.py", *flags, "--contested", "drop")
    assert "8 annotations of nuclei with both labels left out" in caplog.text
    before, after = annotations(small_run / "patches"), annotations(tmp_path / "out")
    gone = before[(before["image"] == 1) & (before["label"] == 1)]
    assert (
        len(gone) == 4 and len(after) == len(before) - 4 and not ((after["image"] == 1) & (after["label"] == 1)).any()
    )
    patches = pd.read_csv(tmp_path / "out/patches.csv")
    drawn = patches[(patches["image"] == 1) & (patches["origin"] == "random")][["x_px", "y_px"]].to_numpy()
    um_per_px = pd.read_csv(tmp_path / "out/fields.csv").set_index("image")["um_per_px"][1]
    for place in gone[["x_px", "y_px"]].to_numpy():  # what is contested is no negative either
        assert (np.hypot(*(drawn - place).T) * um_per_px > 20).all()


# real fields


@needs_shared
@pytest.mark.parametrize("wrong", ["x and y are swapped", "they are in um, not in px"])
def test_real_fields_with_wrong_labels_are_refused(tmp_path, wrong):
    source = SHARED / "icpr12"
    fields = pd.read_csv(source / "fields.csv").query("split == 'val'")
    marks = pd.read_csv(source / "annotations.csv").merge(fields[["image"]])
    if "um" in wrong:
        marks[["x_px", "y_px"]] *= 0.2456
    else:
        marks = marks.rename(columns={"x_px": "y_px", "y_px": "x_px"})
    for path in fields["path"]:
        (tmp_path / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / path, tmp_path / "data" / path)
    fields.to_csv(tmp_path / "data/fields.csv", index=False)
    marks.to_csv(tmp_path / "data/annotations.csv", index=False)
    flags = ["--dataset", "table", "--data_root", tmp_path / "data", "--out", tmp_path / "out"]
    fails("pre/cut_patch_2.py", *flags, says=f"probably {wrong}")
    assert not list(tmp_path.glob("out*"))
