"""Stage 9: what is written for images and datasets, and what happens to bad input."""

import json
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image
from pipeline import call, fails, succeed
from test_export import read_sheet

from dasc.data.corrections import UNSURE
from dasc.data.cut import ValFields, read_cut_fields
from dasc.detect.val import fit_to_val
from dasc.errors import WriteError
from dasc.files import sha256
from dasc.images.read import read_field
from dasc.judge.calibration import Calibration
from dasc.judge.metrics import plateau_threshold
from dasc.model.checkpoint import load_detector, read_checkpoint, save_checkpoint


def model(small_run):
    return ["--model_path", small_run / "NS/model.pt", "--device", "cpu", "--threshold", 0.3]


@pytest.fixture(scope="module")
def judged(small_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("judged")
    done = succeed(
        "predict.py", *model(small_run), "--dataset", "sample", "--data_root", small_run / "sample", "--out", out
    )
    return out, done


def test_dataset_is_judged(small_run, judged):
    out, done = judged
    metrics = json.loads((out / "metrics.json").read_text())
    names = {"tp", "fp", "fn", "precision", "recall", "f1", "f1_low", "f1_high", "mitoses", "threshold"}
    assert names <= set(metrics) and metrics["match"] == "um" and metrics["fields"] == 2
    detections = pd.read_csv(out / "detections.csv", dtype={"image": str})
    assert metrics["tp"] + metrics["fp"] == detections["mitosis"].sum()
    fields = pd.read_csv(out / "metrics_per_field.csv")
    assert (fields[["tp", "fp", "fn"]].sum() == [metrics["tp"], metrics["fp"], metrics["fn"]]).all()
    assert f"F1 {metrics['f1']:.3f}" in done.out


def test_curve_tells_what_other_thresholds_give(small_run, judged, tmp_path):
    out, done = judged
    curve, metrics = pd.read_csv(out / "curve.csv"), json.loads((out / "metrics.json").read_text())
    assert curve["f1"].max() == pytest.approx(metrics["oracle_f1"], abs=1e-6) and metrics["oracle_f1"] >= metrics["f1"]
    at = curve[curve["threshold"] >= metrics["threshold"]].iloc[-1]
    assert (at[["precision", "recall"]] - [metrics["precision"], metrics["recall"]]).abs().max() < 1e-6
    assert 0 < metrics["average_precision"] <= curve["recall"].max()
    assert f"average precision {metrics['average_precision']:.3f}" in done.out
    best = metrics["oracle_threshold"]
    assert f"oracle threshold {best:.3f}: F1 {metrics['oracle_f1']:.3f}" in done.out and (out / "curve.png").is_file()
    assert f"--threshold {metrics['plateau_threshold']:.4f}" in done.out
    assert metrics["plateau_threshold"] == pytest.approx(plateau_threshold(curve), abs=1e-3)
    flags = ["--dataset", "sample", "--data_root", small_run / "sample", "--overlays", "False", "--report", "False"]
    succeed("predict.py", *model(small_run), *flags, "--threshold", best, "--smallest", best, "--out", tmp_path)
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert again["f1"] == pytest.approx(metrics["oracle_f1"])
    # what is too weak to be written is judged all the same
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "curve.csv"), curve)
    assert len(pd.read_csv(tmp_path / "detections.csv")) == again["tp"] + again["fp"] < len(curve)
    succeed("predict.py", *model(small_run), *flags, "--match", "uts", "--out", tmp_path)
    assert not {"oracle_f1", "average_precision"} & set(json.loads((tmp_path / "metrics.json").read_text()))
    assert not (tmp_path / "curve.csv").exists()  # the run before this one wrote it


def test_every_output_tells_the_same(judged):
    out, _ = judged
    detections = pd.read_csv(out / "detections.csv", dtype={"image": str})
    counts = pd.read_csv(out / "counts.csv", dtype={"image": str})
    for row in counts.itertuples():
        mine = detections[detections["image"] == row.image]
        assert row.mitoses == mine["mitosis"].sum() and row.um_per_px_source == "file"
        assert row.image_mm2 == pytest.approx(row.width_px * row.height_px * row.um_per_px**2 / 1e6, rel=1e-4)
        assert 0 < row.tissue_mm2 <= row.image_mm2 < 0.5 and np.isnan(row.mitoses_per_mm2)  # too small for a density
        assert row.mitoses_low <= row.mitoses <= row.mitoses_high
        assert np.allclose(mine["x_um"], mine["x_px"] * row.um_per_px, atol=0.01)
        folder = out / row.image
        features = json.loads((folder / "detections.geojson").read_text())["features"]
        points = json.loads((folder / "mitotic-figures.json").read_text())["points"]
        assert len(features) == len(points) == len(mine)
        with Image.open(folder / "overlay.png") as overlay:
            assert overlay.size == (row.width_px, row.height_px)


def test_every_output_names_the_model(small_run, judged):
    out, _ = judged
    model_sha256 = sha256(small_run / "NS/model.pt")
    assert set(pd.read_csv(out / "counts.csv")["model_sha256"]) == {model_sha256}
    for name in ("run.json", "metrics.json", *(path.relative_to(out) for path in out.glob("*/scan.json"))):
        assert model_sha256 in (out / name).read_text(), name
    assert model_sha256 in (out / "report.html").read_text()


def test_the_spreadsheet_holds_what_the_table_holds(judged):
    out, done = judged
    counts, sheet = pd.read_csv(out / "counts.csv", dtype={"image": str}), read_sheet(out / "counts.xlsx")
    assert sheet[0] == list(counts.columns) and len(sheet) == 1 + len(counts)
    for row, cells in zip(counts.itertuples(index=False, name=None), sheet[1:], strict=True):
        for value, cell in zip(row, cells, strict=True):
            assert cell == (pytest.approx(value) if isinstance(value, float) and value == value else value) or (
                cell is None and pd.isna(value)
            )
    assert "leaderboard's average precision" in done.out and "leaderboard" in (out / "report.html").read_text()


def test_a_density_is_given_where_the_tissue_allows_it(small_run, tmp_path):
    """A field of 0.35 mm2, and four of it side by side: a density of the second alone, by its tissue."""
    field = read_field(small_run / "sample/images/009.tiff")
    for name, image in (("small.png", field), ("large.png", np.tile(field, (2, 2, 1)))):
        Image.fromarray(image).save(tmp_path / name)
    flags = ["--images", tmp_path / "small.png", tmp_path / "large.png", "--um_per_px", 0.84, "--views", 1]
    succeed("predict.py", *model(small_run), *flags, "--overlays", "False", "--out", tmp_path / "out")
    counts = pd.read_csv(tmp_path / "out/counts.csv").set_index("image")
    small, large = counts.loc["small.png"], counts.loc["large.png"]
    assert small["tissue_mm2"] < 0.5 <= large["tissue_mm2"] and np.isnan(small["mitoses_per_mm2"])
    assert large["mitoses_per_mm2"] == pytest.approx(large["mitoses"] / large["tissue_mm2"], abs=1e-3)
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert page.count("too little for a density") == 1 and f"{large['mitoses_per_mm2']:.2f} per mm²" in page


def test_same_run_same_bytes(small_run, judged, tmp_path):
    flags = ["--dataset", "sample", "--data_root", small_run / "sample", "--out", tmp_path, "--overlays", "False"]
    succeed("predict.py", *model(small_run), *flags, "--batch_size", 7)
    first = pd.read_csv(judged[0] / "detections.csv")
    pd.testing.assert_frame_equal(first, pd.read_csv(tmp_path / "detections.csv"), atol=1e-4)


def test_folder_with_a_broken_image(small_run, tmp_path):
    folder = tmp_path / "images with blank"
    folder.mkdir()
    shutil.copy(small_run / "sample/images/009.tiff", folder / "=cmd ü.tiff")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n....")
    Image.new("RGB", (300, 200), (240, 240, 240)).save(folder / "blank.jpg")
    done = call("predict.py", *model(small_run), "--images", folder, "--um_per_px", 0.25, "--out", tmp_path / "out")
    assert (
        done.status == 1
        and "broken.png" in done.err
        and "1 images skipped" in done.out
        and "broken.png: skipped" in done.out
    )
    counts = pd.read_csv(tmp_path / "out/counts.csv")
    assert list(counts["um_per_px_source"]) == ["file", "flag"]
    assert counts.set_index("image").loc["blank.jpg", "mitoses"] == 0
    assert json.loads((tmp_path / "out/blank.jpg/detections.geojson").read_text())["features"] == []
    assert counts["image"].str.startswith("'=").any()


def test_no_detection_at_all_is_valid(small_run, tmp_path):
    tifffile.imwrite(tmp_path / "white.tiff", np.full((200, 200, 3), 250, np.uint8))
    flags = ["--images", tmp_path / "white.tiff", "--um_per_px", 0.25, "--out", tmp_path / "out"]
    succeed("predict.py", *model(small_run), *flags)
    assert pd.read_csv(tmp_path / "out/detections.csv").empty
    assert pd.read_csv(tmp_path / "out/counts.csv")["mitoses"].tolist() == [0]
    assert json.loads((tmp_path / "out/white.tiff/detections.geojson").read_text())["features"] == []
    assert json.loads((tmp_path / "out/white.tiff/mitotic-figures.json").read_text())["points"] == []
    assert "No detections." in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_missing_resolution_asks_for_the_flag(small_run, tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    fails("predict.py", *model(small_run), "--images", tmp_path / "a.png", "--out", tmp_path / "o", says="--um_per_px")
    assert not (tmp_path / "o").exists()


def test_a_slide_is_scanned_resumed_and_reported(small_run, tmp_path):
    image = np.concatenate([read_field(path) for path in sorted((small_run / "sample/images").glob("*"))[:2]], axis=1)
    folder = tmp_path / "slides"
    folder.mkdir()
    write = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg"}
    tifffile.imwrite(folder / "a <b>&.svs", image, resolution=(40000, 40000), resolutionunit=3, **write)
    (folder / "broken.ndpi").write_bytes((folder / "a <b>&.svs").read_bytes()[:5000])
    flags = [*model(small_run), "--images", folder, "--out", tmp_path / "out", "--whole_px", 300_000, "--views", 2]
    done = call("predict.py", *flags)
    assert done.status == 1 and "broken.ndpi: skipped" in done.out
    counts = pd.read_csv(tmp_path / "out/counts.csv").iloc[0]
    detections = pd.read_csv(tmp_path / "out/detections.csv")
    assert counts["image_mm2"] == pytest.approx(image.shape[0] * image.shape[1] * 0.25**2 / 1e6)
    assert 0 < counts["tissue_mm2"] <= 1.1 * counts["image_mm2"]  # tissue is found in squares of 8 um
    assert counts["hotspot_of"] == "whole image" and counts["mitoses"] == detections["mitosis"].sum() > 0
    own = tmp_path / "out/a %3Cb%3E%26.svs"
    with Image.open(own / "tissue.png") as mask:
        assert set(np.unique(np.asarray(mask))) <= {0, 255} and mask.size == (44, 22)
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "a &lt;b&gt;&amp;.svs" in page and "<b>&" not in page and "broken.ndpi" in page
    before = (tmp_path / "out/detections.csv").read_bytes()

    scan = json.loads((own / "scan.json").read_text())
    scan["found"] = scan["found"][:3]
    (own / "scan.json").write_text(json.dumps(scan))
    call("predict.py", *flags, "--resume")
    assert len(pd.read_csv(tmp_path / "out/detections.csv")) == 3  # a finished image is not scanned again
    call("predict.py", *flags)
    assert (tmp_path / "out/detections.csv").read_bytes() == before
    done = call("predict.py", *flags, "--resume", "--per_mm2", 900)
    assert done.status == 1 and "per_mm2 3000.0, not 900.0" in done.err
    (own / "scan.json").write_text("{")
    assert "not a scan" in call("predict.py", *flags, "--resume").err


def test_faults_of_images_and_folders(small_run, tmp_path, monkeypatch):
    """Names that are no text, images smaller than a patch, an absurd resolution, a resolution nobody scans at."""
    folder = tmp_path / "images"
    folder.mkdir()
    stain = np.full((20, 30, 3), (200, 150, 200), np.uint8)
    tifffile.imwrite(folder / "tiny.tif", stain, photometric="rgb", resolution=(40000, 40000), resolutionunit=3)
    tifffile.imwrite(folder / "screen.tif", stain, photometric="rgb", resolution=(72, 72), resolutionunit=2)
    if sys.platform == "linux":
        shutil.copy(folder / "tiny.tif", os.fsencode(folder) + b"/\xff.tif")
    done = call("predict.py", *model(small_run), "--images", folder, "--out", tmp_path / "out")
    counts = pd.read_csv(tmp_path / "out/counts.csv")
    assert done.status == 1 and "screen.tif: states no resolution" in done.err
    assert len(counts) == (2 if sys.platform == "linux" else 1) and (counts["mitoses"] == 0).all()
    assert (tmp_path / "out/report.html").is_file()
    flags = ["--images", folder / "tiny.tif", "--um_per_px", 25, "--insist_um_per_px", "--out", tmp_path / "far"]
    fails("predict.py", *model(small_run), *flags, says="--um_per_px")


def test_where_nothing_can_be_written_it_stops(small_run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    flags = ["--images", small_run / "sample/images/009.tiff", "--views", 1]
    done = fails("predict.py", *model(small_run), *flags, "--out", tmp_path / "file/out", says="cannot be written")
    assert "skipped" not in done.err
    monkeypatch.setattr("dasc.detect.resume.write_json", full_disk)
    done = fails("predict.py", *model(small_run), *flags, "--out", tmp_path / "out", says="No space left")
    assert "skipped" not in done.err and not (tmp_path / ".out.lock").exists()


def full_disk(path, content):
    raise WriteError(f"{path}: cannot be written (No space left on device)")


def test_goals_and_numbers_for_the_threshold(small_run, tmp_path):
    flags = [
        "--images",
        small_run / "sample/images/009.tiff",
        "--model_path",
        small_run / "NS/model.pt",
        "--report",
        "False",
    ]
    flags += ["--device", "cpu", "--views", 1, "--overlays", "False", "--out"]
    config = read_checkpoint(small_run / "NS/model.pt")["config"]
    assert {"alignment", "temperature", "offset", "val_curve"} <= config.keys()
    curve = pd.DataFrame(config["val_curve"])
    goal = f"recall={curve['recall'].max():.2f}"[:10]
    succeed("predict.py", *flags, tmp_path / "a", "--threshold", goal)
    threshold = json.loads((tmp_path / "a/run.json").read_text())["threshold"]
    assert curve.loc[curve["threshold"] >= threshold, "recall"].max() >= float(goal[7:])
    succeed("predict.py", *flags, tmp_path / "b")
    assert json.loads((tmp_path / "b/run.json").read_text())["threshold"] == config["threshold"]
    fails("predict.py", *flags, tmp_path / "c", "--threshold", "precise", says="expected best")
    assert not (tmp_path / "c").exists()


def test_an_image_is_not_aligned_when_asked(small_run, tmp_path):
    content = read_checkpoint(small_run / "NS/model.pt")
    content["config"]["alignment"] += 2.0  # so that every image is moved by something
    save_checkpoint(tmp_path / "moved.pt", content)
    content["config"]["alignment"] = None
    save_checkpoint(tmp_path / "without.pt", content)
    flags = ["--images", small_run / "sample/images/009.tiff", "--device", "cpu", "--views", 1, "--threshold", 0.3]
    flags += ["--overlays", "False", "--report", "False"]
    found = {}
    for name, more in {"moved": [], "without": [], "left": ["--score_alignment", "False"]}.items():
        model_path = tmp_path / ("without.pt" if name == "without" else "moved.pt")
        succeed("predict.py", *flags, *more, "--model_path", model_path, "--out", tmp_path / name)
        found[name] = (tmp_path / name / "detections.csv").read_bytes()
    assert found["left"] == found["without"] != found["moved"]
    again = [*flags, "--model_path", tmp_path / "moved.pt", "--out", tmp_path / "moved", "--resume"]
    done = call("predict.py", *again, "--score_alignment", "False")
    assert done.status == 1 and "was begun with alignment" in done.err


def test_other_scan_settings_than_the_threshold_was_chosen_with_are_said(small_run, tmp_path):
    """The flags' default is what the model carries; the same value is no other one."""
    flags = ["--images", small_run / "sample/images/009.tiff", "--model_path", small_run / "NS/model.pt"]
    flags += ["--device", "cpu", "--overlays", "False", "--report", "False"]
    said = succeed("predict.py", *flags, "--out", tmp_path / "a").out
    assert "was chosen with" not in said
    same = ["--views", 8, "--per_mm2", 3000, "--merge_um", 7.5]
    assert "was chosen with" not in succeed("predict.py", *flags, *same, "--out", tmp_path / "b").out
    first, second = ((tmp_path / name / "detections.csv").read_bytes() for name in "ab")
    assert first == second
    other = ["--views", 1, "--per_mm2", 1000, "--merge_um", 5, "--score_alignment", "False"]
    said = succeed("predict.py", *flags, *other, "--out", tmp_path / "c").out
    for flag, value, chosen in (("views", 1, 8), ("per_mm2", 1000, 3000), ("merge_um", 5, 7.5)):
        assert f"--{flag} {value}: the threshold of {small_run / 'NS/model.pt'} was chosen with {chosen}" in said
    assert "was chosen with aligned scores" in said


def val_fields(small_run):
    root, fields, annotations = read_cut_fields(small_run / "patches")
    return ValFields(root, fields[fields["split"] == "val"], annotations)


def detector_of(small_run):
    return replace(load_detector(small_run / "NS/model.pt", torch.device("cpu")), views=1)


def test_what_readers_are_unsure_of_chooses_no_threshold(small_run):
    """A detection on it is neither right nor false; on a look-alike it is false."""
    detector, of_val, settings = detector_of(small_run), val_fields(small_run), {"batch_size": 64, "match_um": 7.5}
    *_, right = fit_to_val(detector, of_val, **settings)
    changed = (of_val.annotations["label"] == 1) & (of_val.annotations["image"] == of_val.fields["image"].iloc[0])
    found = {}
    for label in (0, UNSURE):
        labels = of_val.annotations["label"].mask(changed, label)
        annotations = of_val.annotations.assign(label=labels)
        found[label] = fit_to_val(detector, of_val._replace(annotations=annotations), **settings)[-1]
    missing = right.sum() - found[0].sum()
    assert missing > 0 and len(found[0]) == len(right) and found[UNSURE].sum() == found[0].sum()
    assert (~found[0]).sum() == (~right).sum() + missing and (~found[UNSURE]).sum() <= (~right).sum()


def test_the_threshold_of_a_model_that_aligns_no_image(small_run):
    detector, of_val, settings = detector_of(small_run), val_fields(small_run), {"batch_size": 64, "match_um": 7.5}
    moved, *_ = fit_to_val(detector, of_val, **settings)
    left, *_ = fit_to_val(detector, of_val, **settings, align=False)
    assert moved.calibration.alignment is not None and left.calibration.alignment is None
    assert left.val_curve != moved.val_curve


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_val_fields_that_do_not_calibrate_are_said(small_run, capsys, monkeypatch, temperature):
    fitted = Calibration(temperature=temperature)
    monkeypatch.setattr("dasc.detect.val.fit_calibration", lambda probabilities, right: fitted)
    fit_to_val(detector_of(small_run), val_fields(small_run), batch_size=64, match_um=7.5)
    assert ("do not calibrate" in capsys.readouterr().out) == (temperature == 1.0)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--images", "nowhere.tif"], "nowhere.tif"),
        (["--images", "."], "no image"),
        (["--model_path", "nowhere.pt"], "NS/sigle.py"),
        (["--dataset", "midog", "--data_root", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(small_run, tmp_path, monkeypatch, flags, says):
    monkeypatch.chdir(tmp_path)
    image = [] if "--dataset" in flags else ["--images", small_run / "sample/images/009.tiff"]
    fails("predict.py", *model(small_run), *image, "--out", tmp_path / "out", *flags, says=says)
    assert not (tmp_path / "out").exists()


def test_model_of_other_classes_is_refused(small_run, tmp_path):
    content = read_checkpoint(small_run / "NS/model.pt")
    content["config"]["classes"] = ["mitosis", "negative"]
    save_checkpoint(tmp_path / "model.pt", content)
    flags = ["--images", small_run / "sample/images", "--model_path", tmp_path / "model.pt", "--out", tmp_path / "out"]
    fails("predict.py", *flags, says="classes")
