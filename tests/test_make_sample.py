"""Stage 0: the synthetic dataset has MIDOG's form, says what it is, and comes out the same every time."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile

from dasc.data.datasets import read_dataset
from dasc.detect.candidates import find_candidates
from dasc.errors import InputError
from dasc.flags import read_flags
from dasc.images.resolution import read_um_per_px

SCRIPT = Path(__file__).resolve().parents[1] / "pre" / "make_sample.py"
SMALL = {"cases": 2, "size_px": 512, "mitoses": 6, "imposters": 8, "label_noise": 0.4}


def _load_script():
    spec = importlib.util.spec_from_file_location("make_sample", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


script = _load_script()


def make(out: Path, **flags) -> Path:
    words = [word for name, value in {**SMALL, **flags}.items() for word in (f"--{name}", str(value))]
    script.main(read_flags(vars(script), ["--out", str(out), *words]))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(folder: Path) -> dict:
    return json.loads((folder / "MIDOG.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("data") / "sample")


def test_same_seed_gives_the_same_bytes_whatever_the_workers(sample, tmp_path):
    first, again = contents(sample), contents(make(tmp_path / "other name", workers=1))
    assert first.pop("run.json") and again.pop("run.json")  # holds the time
    assert again == first
    assert set(again) == {
        "MIDOG.json",
        "README.txt",
        "label_noise.csv",
        "images/001.tiff",
        "images/002.tiff",
    }


def test_another_seed_or_case_gives_another_field_and_more_cases_leave_the_first(sample, tmp_path):
    first = (sample / "images" / "001.tiff").read_bytes()
    assert (make(tmp_path / "a", cases=1) / "images" / "001.tiff").read_bytes() == first
    assert (make(tmp_path / "b", cases=1, seed=1) / "images" / "001.tiff").read_bytes() != first
    assert (sample / "images" / "002.tiff").read_bytes() != first


def test_json_has_the_form_of_midog_and_says_synthetic(sample):
    content = load(sample)
    assert "synthetic" in content["info"]["description"]
    assert "synthetic" in (sample / "README.txt").read_text(encoding="utf-8")
    assert [image["id"] for image in content["images"]] == [1, 2]
    for image in content["images"]:
        picture = tifffile.imread(sample / "images" / image["file_name"])
        assert picture.dtype == np.uint8
        assert picture.shape == (image["height"], image["width"], 3)
    assert {category["id"] for category in content["categories"]} == {1, 2}
    assert len({annotation["id"] for annotation in content["annotations"]}) == len(content["annotations"])
    for annotation in content["annotations"]:
        assert annotation["image_id"] in (1, 2)
        assert annotation["category_id"] in (1, 2)
        left, top, right, bottom = annotation["bbox"]
        assert (right - left, bottom - top) == (50, 50)
        assert min(left, top) >= 0
        assert max(right, bottom) <= SMALL["size_px"]


def test_every_annotation_lies_on_something_dark(sample):
    content = load(sample)
    for image in content["images"]:
        path = sample / "images" / image["file_name"]
        red, um_per_px = tifffile.imread(path)[..., 0].astype(float), read_um_per_px(path)
        rows, columns = np.mgrid[: image["height"], : image["width"]]
        on_figures = np.zeros(red.shape, bool)
        for annotation in content["annotations"]:
            if annotation["image_id"] == image["id"]:
                x, y = np.mean(np.reshape(annotation["bbox"], (2, 2)), axis=0)
                near = np.hypot(columns - x, rows - y) * um_per_px < 5
                assert np.quantile(red[near], 0.05) < 0.6 * np.median(red), (image["file_name"], x, y)
                on_figures |= near
        dark = red < 0.6 * np.median(red)
        assert dark[on_figures].mean() > 1.5 * dark[~on_figures].mean()


def test_candidates_reach_the_annotations(sample):
    content = load(sample)
    distances = []
    for image in content["images"]:
        path = sample / "images" / image["file_name"]
        um_per_px = read_um_per_px(path)
        points, _ = find_candidates(tifffile.imread(path), um_per_px)
        boxes = [each["bbox"] for each in content["annotations"] if each["image_id"] == image["id"]]
        centres = np.reshape(boxes, (-1, 2, 2)).mean(axis=1)
        distances.extend(np.linalg.norm(points[:, None] - centres, axis=2).min(axis=0) * um_per_px)
    assert np.mean(np.array(distances) < 7.5) >= 0.85


def test_resolution_tags_and_splits_of_ten_cases(tmp_path):
    small = make(tmp_path / "sample", cases=10, size_px=256, mitoses=2, imposters=2, label_noise=0)
    with tifffile.TiffFile(small / "images" / "001.tiff") as tiff:
        tags = tiff.pages[0].tags
        numerator, denominator = tags["XResolution"].value
        assert tags["ResolutionUnit"].value == 3  # centimetre
        assert tags["YResolution"].value == tags["XResolution"].value
        assert 1e4 * denominator / numerator == pytest.approx(0.25, abs=1e-4)
    fields = read_dataset("sample", small).fields
    scanner = [round(read_um_per_px(small / path), 3) for path in fields["path"]]
    by_split = {
        split: {um for um, of in zip(scanner, fields["split"], strict=True) if of == split}
        for split in ("train", "val", "test")
    }
    assert by_split["train"] == by_split["val"] == {0.23, 0.25}
    assert 0.28 in by_split["test"] and by_split["test"] & by_split["train"]


def test_label_noise_file_accounts_for_every_wrong_label(sample):
    content = load(sample)
    recorded = {}
    for annotation in content["annotations"]:
        x, y = annotation["bbox"][0] + 25, annotation["bbox"][1] + 25
        recorded[f"{annotation['image_id']:03d}.tiff", x, y] = annotation["category_id"]
    noise = pd.read_csv(sample / "label_noise.csv")
    assert {"missed", "flipped"} <= set(noise["kind"]) <= {"missed", "flipped", "spurious"}
    number = {"neither": 0, "mitosis": 1, "hard negative": 2}
    truth = dict(recorded)
    for row in noise.itertuples():
        key = row.file_name, row.x_px, row.y_px
        assert recorded.get(key, 0) == number[row.recorded] != number[row.truth]
        assert row.kind == {"neither": "spurious"}.get(row.truth, "missed" if key not in recorded else "flipped")
        truth[key] = number[row.truth]
    counts = [list(truth.values()).count(label) for label in (1, 2)]
    assert counts == [SMALL["cases"] * SMALL["mitoses"], SMALL["cases"] * SMALL["imposters"]]


def test_without_label_noise_every_figure_is_annotated_right(tmp_path):
    exact = make(tmp_path / "sample", cases=1, label_noise=0)
    labels = [annotation["category_id"] for annotation in load(exact)["annotations"]]
    assert (labels.count(1), labels.count(2)) == (SMALL["mitoses"], SMALL["imposters"])
    assert pd.read_csv(exact / "label_noise.csv").empty


def test_an_earlier_sample_is_replaced_whole(tmp_path):
    out = make(tmp_path / "sample", size_px=300, mitoses=1, imposters=1)
    make(out, cases=1, size_px=300, mitoses=1, imposters=1)
    assert [path.name for path in (out / "images").iterdir()] == ["001.tiff"]
    assert len(list((tmp_path / "sample.previous/images").iterdir())) == SMALL["cases"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sample", "sample.previous"]


@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {"MIDOG.json": '{"info": {"description": "MIDOG 2021"}}', "images/001.tiff": "real"},
        {"MIDOG.json": "[1, 2"},
        {"MIDOG.json": '{"info": {"description": "synthetic"}}', "images/mine.png": "mine"},
    ],
)
def test_a_folder_with_anything_else_in_it_is_refused_and_left_alone(tmp_path, files):
    out = tmp_path / "sample"
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(InputError, match="--out"):
        make(out)
    assert contents(tmp_path) == before


def test_what_cannot_be_drawn_is_said_and_leaves_nothing(tmp_path, capsys):
    with pytest.raises(InputError, match=r"--mitoses 500 .* --size_px 512"):
        make(tmp_path / "sample", mitoses=500)
    with pytest.raises(SystemExit):
        make(tmp_path / "sample", cases=0)
    assert "argument --cases: expected a whole number from 1 to 999" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="--out"):
        make(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
