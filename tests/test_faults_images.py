"""Broken and unusual images through stage 1 and predict.py: right pixels, or named, skipped, counted, status 1."""

import json

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
from broken import tissue, write_broken, write_unusual
from pipeline import call, fails, succeed

from dasc.data.patches import read_patch

SIZE = 32
CUT = ["--dataset", "table", "--patch_size", SIZE, "--normalise_stain", "False", "--shifts", 0, "--workers", 1]
CUT += ["--random_per_field", 1]
POINTS = {"middle": (60, 45), "corner": (0, 0), "far corner": (119, 89), "outside": (-5, 40)}
SMALL = np.ascontiguousarray(tissue(14, 20))


def write_table(folder, images, points, um_per_px=""):
    """A dataset of kind `table`: every image a case of val."""
    rows = [["image", "path", "case", "split", "um_per_px"], *([one, one, one, "val", um_per_px] for one in images)]
    marks = [["image", "x_px", "y_px", "label"], *([one, x, y, 1] for one in images for x, y in points(one))]
    for name, table in (("fields.csv", rows), ("annotations.csv", marks)):
        pd.DataFrame(table[1:], columns=table[0]).to_csv(folder / name, index=False)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    right, says = write_unusual(folder), write_broken(folder)
    tifffile.imwrite(folder / "small.tif", SMALL, photometric="rgb")
    return folder, {**right, "small.tif": SMALL}, says


@pytest.fixture(scope="module")
def cut(images, tmp_path_factory):
    """Stage 1 on all of them."""
    folder, right, says = images
    write_table(folder, [*right, *says], lambda one: [(8, 6)] if one == "small.tif" else POINTS.values())
    out = tmp_path_factory.mktemp("cut") / "out"
    done = call("pre/cut_patch_2.py", *CUT, "--data_root", folder, "--um_per_px", 0.25, "--out", out)
    table = pd.read_csv(out / "patches.csv", dtype=str).replace({"image": {"'=1+1.tif": "=1+1.tif"}})
    return out, done, table


@pytest.fixture(scope="module")
def predicted(small_run, images, tmp_path_factory):
    """predict.py on all of them."""
    folder, _, _ = images
    out = tmp_path_factory.mktemp("predicted") / "out"
    flags = ["--model_path", small_run / "NS/model.pt", "--device", "cpu", "--views", 1, "--thumbnails", 1]
    done = call("predict.py", *flags, "--images", folder, "--um_per_px", 0.25, "--out", out)
    return out, done


def around(image, x, y):
    """The pixels of a patch about a point, mirrored at the edge."""
    padded = np.pad(image, ((SIZE, SIZE), (SIZE, SIZE), (0, 0)), mode="symmetric")
    top, left = y + SIZE - SIZE // 2, x + SIZE - SIZE // 2
    return padded[top : top + SIZE, left : left + SIZE]


def test_broken_images_are_named_skipped_and_counted_by_stage_1(images, cut):
    _, right, says = images
    out, done, table = cut
    run = json.loads((out / "run.json").read_text())
    assert done.status == 1 and f"{len(says)} fields skipped" in done.out
    assert set(run["skipped"]) == set(says) and run["fields"] == len(right)
    for name, words in says.items():
        assert name in run["skipped"][name] and words in run["skipped"][name], run["skipped"][name]
        assert f"skipped {name}: " in done.err
    assert set(table["image"]) == set(right)
    assert not list(out.parent.glob("*.partial"))


def test_broken_images_are_named_skipped_and_counted_by_predict(images, predicted):
    _, right, says = images
    out, done = predicted
    run = json.loads((out / "run.json").read_text())
    assert done.status == 1 and f"{len(says)} images skipped" in done.out
    assert set(run["skipped"]) == set(says)
    page = (out / "report.html").read_text(encoding="utf-8")
    for name, words in says.items():
        assert name in run["skipped"][name] and words in run["skipped"][name], run["skipped"][name]
        assert f"{name}: skipped: " in done.out and name in page
    names = pd.read_csv(out / "counts.csv")["image"].replace("'=1+1.tif", "=1+1.tif")
    assert set(names) == set(right) and not set(pd.read_csv(out / "detections.csv")["image"]) & set(says)


NAMES = ["plain.tif", "jpeg2000.tif", "alpha.tif", "alpha.png", "16bit.tif", "12bit.tif", "16bit.png", "gray.tif"]
NAMES += [
    "palette.png",
    "planar.tif",
    "turned.jpg",
    "turned.tif",
    "Geschwür 腫瘍.tif",
    "腫瘍" * 30 + ".tif",
    "=1+1.tif",
]


@pytest.mark.parametrize("name", NAMES)
def test_unusual_images_give_their_right_pixels(images, cut, name):
    """Every patch of stage 1, those at the corners too, is the image's own pixels about its annotated point."""
    image = images[1][name]
    out, _, table = cut
    mine = table[(table["image"] == name) & (table["origin"] == "annotated")]
    inside = {word: point for word, point in POINTS.items() if word != "outside"}
    assert len(mine) == len(inside)
    for row, (x, y) in zip(mine.itertuples(), inside.values(), strict=True):
        assert (float(row.x_px), float(row.y_px)) == (x, y)
        patch = read_patch(out / row.patch)
        assert patch.shape == (SIZE, SIZE, 3) and patch.dtype == np.uint8
        np.testing.assert_allclose(patch.astype(int), around(image, x, y), atol=1 if name == "12bit.tif" else 0)


def test_every_unusual_image_was_tried(images):
    assert set(NAMES) | {"small.tif"} == set(images[1])


def test_image_smaller_than_a_patch_is_mirrored(cut):
    out, _, table = cut
    patch = table.loc[(table["image"] == "small.tif") & (table["label"] == "1"), "patch"].item()
    np.testing.assert_array_equal(read_patch(out / patch), around(SMALL, 8, 6))


def test_annotations_outside_are_dropped_said_and_counted(images, cut):
    out, done, _ = cut
    outside = json.loads((out / "run.json").read_text())["annotations_outside"]
    assert outside == {name: 1 for name in images[1] if name != "small.tif"}
    assert "plain.tif: 1 annotations outside the field dropped" in done.err
    assert pd.read_csv(out / "annotations.csv")["x_px"].min() == 0


def test_more_than_8_bits_are_said(images, tmp_path, caplog):
    folder, _, _ = images
    write_table(tmp_path, ["12bit.tif"], lambda one: [(60, 45)])
    (tmp_path / "12bit.tif").write_bytes((folder / "12bit.tif").read_bytes())
    succeed("pre/cut_patch_2.py", *CUT, "--data_root", tmp_path, "--um_per_px", 0.25, "--out", tmp_path / "out")
    assert "12bit.tif: 16 bits, scaled so that its highest value 4095 becomes 255" in caplog.text


def test_resolution_is_stated_plausible_or_asked_for(tmp_path):
    image = tissue()
    stated = {"stated.tif": (40_000, 3), "screen.tif": (72, 2), "absurd.tif": (400_000, 3), "none.tif": (1, 1)}
    for name, (per_unit, unit) in stated.items():
        options = {"photometric": "rgb", "resolution": (per_unit, per_unit), "resolutionunit": unit}
        tifffile.imwrite(tmp_path / name, image, **options)
    write_table(tmp_path, stated, lambda one: [(60, 45)])
    done = call("pre/cut_patch_2.py", *CUT, "--data_root", tmp_path, "--out", tmp_path / "out")
    assert done.status == 1 and "3 fields skipped" in done.out
    for name in ("screen.tif", "absurd.tif", "none.tif"):
        assert f"{name}: states no resolution between 0.1 and 2.0 um/px; give it with --um_per_px" in done.err
    assert sources(tmp_path / "out") == {"stated.tif": (0.25, "file")}
    write_table(tmp_path, ["stated.tif", "none.tif"], lambda one: [(60, 45)], um_per_px=0.3)
    succeed("pre/cut_patch_2.py", *CUT, "--data_root", tmp_path, "--out", tmp_path / "two")
    assert sources(tmp_path / "two") == {"stated.tif": (0.3, "dataset"), "none.tif": (0.3, "dataset")}
    half = [*CUT, "--data_root", tmp_path, "--um_per_px", 0.5, "--out", tmp_path / "three"]
    done = succeed("pre/cut_patch_2.py", *half)  # fills gaps, and here is none
    assert set(sources(tmp_path / "three").values()) == {(0.3, "dataset")}
    says = "none.tif: the dataset states 0.3 um/px, which is taken; the flag says 0.5 (--insist_um_per_px takes that)"
    assert says in done.err
    notes = pd.read_csv(tmp_path / "three/fields.csv")["um_per_px_note"]
    assert notes.str.contains("the flag says 0.5").all() and notes.str.contains("the file states 0.25").sum() == 1
    succeed("pre/cut_patch_2.py", *half, "--insist_um_per_px")
    assert set(sources(tmp_path / "three").values()) == {(0.5, "flag")}
    flags = [*CUT, "--data_root", tmp_path, "--um_per_px", -0.25, "--out", tmp_path / "four"]
    fails("pre/cut_patch_2.py", *flags, says="argument --um_per_px: expected a number of 0 or more")
    assert not (tmp_path / "four").exists()


def sources(out):
    table = pd.read_csv(out / "fields.csv").set_index("image")
    return dict(zip(table.index, zip(table["um_per_px"], table["um_per_px_source"], strict=True), strict=True))


def test_no_jpeg2000_reaches_opencv(images, small_run, tmp_path, monkeypatch):
    """A patch that is a JPEG2000 under another name, as of a manifest from elsewhere."""
    seen = []
    decode = cv2.imdecode

    def watched(data, flags):
        seen.append(bytes(data[:12]))
        return decode(data, flags)

    monkeypatch.setattr(cv2, "imdecode", watched)
    monkeypatch.setattr(cv2, "imread", None)
    folder = tmp_path / "patches"
    folder.mkdir()
    table = pd.read_csv(small_run / "patches/patches.csv").groupby(["split", "label"]).head(2)
    for patch in table["patch"]:
        (folder / patch).parent.mkdir(parents=True, exist_ok=True)
        (folder / patch).write_bytes((small_run / "patches" / patch).read_bytes())
    first = table.loc[table["split"] == "train", "patch"].iloc[1]
    (folder / first).write_bytes((images[0] / "jpeg2000.png").read_bytes())
    table.to_csv(folder / "patches.csv", index=False)
    (folder / "cut.json").write_bytes((small_run / "patches/cut.json").read_bytes())
    done = call("DMU/main.py", "--manifest", folder / "patches.csv", "--out", tmp_path / "out", "--device", "cpu")
    assert done.status == 1 and f"{first}: cannot be read: not a TIFF, PNG, JPEG or BMP image" in done.err
    assert seen and all(start.startswith(b"\x89PNG") for start in seen)
