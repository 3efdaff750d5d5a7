"""Labelled patches become a manifest: slides stay whole, shares are drawn as said, bad names write nothing."""

import json
import shutil

import cv2
import numpy as np
import pytest
from pipeline import LIGHT, fails, succeed
from test_detect import detector_of

from dasc.data.cut import read_cut_fields
from dasc.data.patches import read_patch
from dasc.data.splits import draw_share, draw_slides
from dasc.data.tables import read_patches
from dasc.detect.val import fit_to_patches, judge_patches
from dasc.errors import InputError
from dasc.judge.metrics import counts_to_scores
from dasc.model.checkpoint import read_tensors


def write_image(path, seed, size=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 255, (size, size, 3)).astype(np.uint8))


@pytest.fixture
def labelled(tmp_path):
    """Six slides with two positives and three negatives each, png and jpg."""
    for number in range(30):
        label = "pos" if number % 5 < 2 else "neg"
        kind = "png" if number % 2 else "jpg"
        write_image(tmp_path / f"hard/{label}_A{number // 5:05d}_{number}-7.{kind}", number)
    return tmp_path / "hard"


def split(labelled, out, *flags):
    return ["pre/split_patches.py", "--labelled", labelled, "--out", out, "--patch_size", 32, *flags]


def test_slides_stay_whole(labelled, tmp_path):
    succeed(*split(labelled, tmp_path / "out"))
    table = read_patches(tmp_path / "out/patches.csv")
    assert len(table) == 30 and (table["label"] == 1).sum() == 12
    assert len(table[["case", "split"]].drop_duplicates()) == 6
    assert set(table["split"]) == {"train", "val", "test"}
    assert table["case"].tolist() == table["patch"].str.extract(r"(A\d+)_")[0].tolist()
    assert (table["label"] == table["patch"].str.contains("/mitosis/pos_")).all()
    one = table[table["patch"].str.endswith("_1-7.png")]["patch"].item()
    expected = cv2.resize(read_patch(labelled / "pos_A00000_1-7.png"), (32, 32), interpolation=cv2.INTER_AREA)
    assert (read_patch(tmp_path / "out" / one) == expected).all()
    succeed(*split(labelled, tmp_path / "again"))
    assert (tmp_path / "again/patches.csv").read_bytes() == (tmp_path / "out/patches.csv").read_bytes()


def test_named_slides(labelled, tmp_path):
    succeed(*split(labelled, tmp_path / "out", "--val", "A00002,A00003"))
    table = read_patches(tmp_path / "out/patches.csv")
    assert set(table.loc[table["split"] == "val", "case"]) == {"A00002", "A00003"}
    assert "test" not in set(table["split"])


def test_trained_with_the_threshold_of_the_val_patches(labelled, tmp_path):
    succeed(*split(labelled, tmp_path / "out"))
    manifest = tmp_path / "out/patches.csv"
    done = succeed("NS/sigle.py", *LIGHT, "--manifest", manifest, "--out", tmp_path / "weak", "--epochs", 1)
    assert "validation F1" in done.out
    assert 0 < read_tensors(tmp_path / "weak/model.pt")["config"]["threshold"] < 1
    figures = json.loads((tmp_path / "weak/test.json").read_text())
    test = read_patches(manifest).query("split == 'test'")["label"]
    assert figures["tp"] + figures["fn"] == test.sum() and figures["fp"] + figures["tn"] == (test == 0).sum()
    model = ["--model_path", tmp_path / "weak/model.pt", "--out", tmp_path / "predict"]
    fails("predict.py", "--images", labelled, *model, says="unknown resolution")
    assert not (tmp_path / "predict").exists()


BAD = {
    "name": ("hard/patch_1.png", [], "its name does not say label and slide"),
    "no label": ("hard/A00001_1-7.png", [], "its name does not say label and slide"),
    "no slide": ("hard/pos_1-7.png", [], "its name does not say label and slide"),
    "same name": ("hard/pos_A00000_0-7.png", [], "two patches are called pos_A00000_0-7"),
    "unknown slide": (None, ["--val", "B1"], "no slide B1"),
    "both sides": (None, ["--val", "A00001", "--test", "A00001"], "one slide goes to one side"),
    "share": (None, ["--train_share", 0], "argument --train_share: expected a number above 0, to 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_writes_nothing(labelled, tmp_path, name):
    file, flags, says = BAD[name]
    if file:
        write_image(tmp_path / file, 99)
    fails(*split(labelled, tmp_path / "out", *flags), says=says)
    assert [path.name for path in tmp_path.iterdir()] == ["hard"]


@pytest.mark.parametrize("size", [41, None])
def test_a_patch_of_another_size_or_broken(labelled, tmp_path, size):
    if size:
        write_image(labelled / "pos_A00005_99-7.png", 99, size)
    else:
        (labelled / "pos_A00005_99-7.jpg").write_bytes((labelled / "pos_A00000_0-7.jpg").read_bytes()[:300])
    fails(*split(labelled, tmp_path / "out"), says="pos_A00005_99-7")
    assert [path.name for path in tmp_path.iterdir()] == ["hard"]


def test_one_slide_only(tmp_path):
    for number in range(8):
        write_image(tmp_path / f"hard/{'pos' if number % 2 else 'neg'}_A1_{number}-7.png", number)
    fails(*split(tmp_path / "hard", tmp_path / "out"), says="1 slide (A1)")
    fails(*split(tmp_path / "hard", tmp_path / "out", "--val", "A1"), says="split train has no negative patch")


def test_nothing_there(tmp_path):
    fails(*split(tmp_path / "gone", tmp_path / "out"), says="pos_A00044_5282-12339.png")
    (tmp_path / "hard").mkdir()
    fails(*split(tmp_path / "hard", tmp_path / "out"), says="no image in this folder")


def test_another_folder_is_not_replaced(labelled, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years")
    fails(*split(labelled, tmp_path / "out"), says="holds files but no patches.csv")
    assert (tmp_path / "out/thesis.txt").read_text() == "years"


def test_slides_of_a_side_hold_both_labels():
    rng = np.random.default_rng(0)
    cases = np.repeat([f"S{number}" for number in range(20)], 10)
    labels = (rng.random(200) < 0.2).astype(int)
    for seed in range(5):
        sides = draw_slides(labels, cases, 5, seed)
        assert all(len(set(sides[cases == case])) == 1 for case in set(cases))
        for side in ("train", "val", "test"):
            assert 0.1 < labels[sides == side].mean() < 0.3
        assert (sides == "val").sum() == (sides == "test").sum() == 40


@pytest.fixture
def cut(small_run):
    table = read_patches(small_run / "patches/patches.csv")
    return table[table["split"] == "train"].reset_index(drop=True)


def test_share_of_the_positives(cut):
    kept = draw_share(cut, 0.3, "positives", 0)
    assert kept[cut["label"] == 0].all()
    annotated = cut["origin"] == "annotated"
    assert kept[annotated].sum() == np.ceil(0.3 * annotated.sum())
    shifted = cut["origin"] == "shifted"
    assert kept[shifted].sum() == 3 * kept[annotated].sum()
    for index in np.flatnonzero(shifted):  # a copy goes where its mitosis goes
        here = cut[annotated & (cut["image"] == cut["image"][index])]
        away = np.hypot(here["x_px"] - cut["x_px"][index], here["y_px"] - cut["y_px"][index])
        assert kept[index] == kept[away.idxmin()]


@pytest.mark.parametrize("share_of", ["all", "positives"])
def test_a_smaller_share_lies_in_a_larger_one(cut, share_of):
    for seed in range(3):
        last = np.zeros(len(cut), dtype=bool)
        for share in (0.01, 0.1, 0.5, 0.7, 1.0):
            kept = draw_share(cut, share, share_of, seed).to_numpy()
            assert (kept >= last).all() and kept[cut["label"] == 1].any() and kept[cut["label"] == 0].any()
            last = kept
        assert last.all()
    assert (draw_share(cut, 0.5, share_of, 0) != draw_share(cut, 0.5, share_of, 1)).any()


def test_share_of_all(cut):
    kept = draw_share(cut, 0.5, "all", 0)
    negatives = cut["label"] == 0
    assert kept[negatives].sum() == np.ceil(0.5 * negatives.sum())


def test_share_of_a_cut_dataset_trains(small_run, tmp_path):
    shutil.copytree(small_run / "patches", tmp_path / "patches")
    reduce = ["--labelled", tmp_path / "patches/patches.csv", "--train_share", 0.5, "--share_of", "positives"]
    succeed("pre/split_patches.py", *reduce, "--out", tmp_path / "half")
    whole, half = (read_patches(tmp_path / name / "patches.csv") for name in ("patches", "half"))
    assert half[half["split"] != "train"].equals(
        whole[whole["split"] != "train"].set_axis(half.index[half["split"] != "train"])
    )
    for name in ("fields.csv", "cut.json"):
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "patches" / name).read_bytes()
    assert json.loads((tmp_path / "half/run.json").read_text())["arguments"]["train_share"] == 0.5
    done = succeed(
        "NS/sigle.py", *LIGHT, "--manifest", tmp_path / "half/patches.csv", "--out", tmp_path / "NS", "--epochs", 1
    )
    assert "validation F1" in done.out
    (tmp_path / "patches" / whole["patch"][0]).unlink()
    fails("pre/split_patches.py", *reduce, "--out", tmp_path / "again", "--seed", 0, says="patch is gone")
    assert not (tmp_path / "again").exists()


def test_threshold_on_patches_is_the_best_of_all():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    scores = np.round((rng.random(60) + 0.4 * labels) / 1.4, 2)  # with ties

    def f1(threshold):
        found = scores >= threshold
        return float(
            counts_to_scores(
                (found & (labels == 1)).sum(), (found & (labels == 0)).sum(), (~found & (labels == 1)).sum()
            )[2]
        )

    detector, curve = fit_to_patches(detector_of(None), labels, scores)
    threshold = detector.threshold
    assert f1(threshold) == max(f1(one) for one in np.unique(scores)) == pytest.approx(curve["f1"].max())
    for row in curve.itertuples():
        assert row.f1 == pytest.approx(f1(row.threshold))


def test_judge_patches():
    labels, scores = np.array([1, 1, 1, 0, 0, 0]), np.array([0.9, 0.5, 0.4, 0.6, 0.1, 0.2])
    figures = judge_patches(labels, scores, 0.5)
    assert [figures[name] for name in ("tp", "fp", "fn", "tn")] == [2, 1, 1, 2]
    assert figures["precision"] == figures["recall"] == figures["f1"] == pytest.approx(2 / 3)


def test_a_script_that_needs_fields_says_so(labelled, tmp_path):
    succeed(*split(labelled, tmp_path / "out"))
    with pytest.raises(InputError, match="come from no fields"):
        read_cut_fields(tmp_path / "out")
