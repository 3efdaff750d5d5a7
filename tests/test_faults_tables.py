"""Tables, names and paths from elsewhere: nothing leaves its folder, no cell is a formula, no name breaks a join."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import tifffile
from broken import tissue
from pipeline import LIGHT, ROOT, fails, succeed

from dasc.data.tables import read_cut_fields, read_patches

CUT = ["--patch_size", 32, "--normalise_stain", "False", "--shifts", 0, "--random_per_field", 1, "--workers", 1]
STATED = {"photometric": "rgb", "resolution": (40_000, 40_000), "resolutionunit": 3}


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, tissue(), **STATED)


def write_table(folder, rows, points):
    """A dataset of kind `table`: rows of image, path, case, split and points of image, x, y, label."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = pd.DataFrame(rows, columns=["image", "path", "case", "split"]).assign(um_per_px=0.25)
    fields.to_csv(folder / "fields.csv", index=False)
    pd.DataFrame(points, columns=["image", "x_px", "y_px", "label"]).to_csv(folder / "annotations.csv", index=False)
    return ["--dataset", "table", "--data_root", folder]


def test_known_to_be_empty_is_not_unlabelled(tmp_path):
    """MITOS14: an empty CSV says that there is no mitosis, a missing one that nobody looked."""
    for case, empty in (("A03", True), ("A04", True), ("A05", False), ("A06", True)):
        write_image(tmp_path / f"{case}/frames/x40/{case}_00Aa.tiff")
        (tmp_path / f"{case}/mitosis").mkdir()
        if empty:
            (tmp_path / f"{case}/mitosis/{case}_00Aa_mitosis.csv").touch()
    (tmp_path / "A06/mitosis/A06_00Aa_mitosis.csv").write_text("30,30,1.0\n")
    data = ["--dataset", "mitos14", "--data_root", tmp_path, "--val", "A03", "--test", "A04"]
    succeed("pre/cut_patch_2.py", *data, *CUT, "--out", tmp_path / "out")
    fields = pd.read_csv(tmp_path / "out/fields.csv").set_index("image")["split"]
    assert fields.to_dict() == {"A03_00Aa": "val", "A04_00Aa": "test", "A06_00Aa": "train"}
    assert set(pd.read_csv(tmp_path / "out/annotations.csv")["image"]) == {"A06_00Aa"}
    fails("pre/cut_patch_2.py", *data[:4], "--val", "A05", *CUT, "--out", tmp_path / "no", says="A05: these cases are")


EMPTY = {
    "0 bytes": (lambda path: path.write_bytes(b""), "not a readable CSV"),
    "header only": (lambda path: path.write_text(path.read_text().splitlines()[0] + "\n"), "has no"),
    "missing": (lambda path: path.unlink(), "`python pre/cut_patch_2.py` makes it"),
    "binary": (lambda path: path.write_bytes(b"\xff\xfe\x00\x01" * 50), "not a readable CSV"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_and_missing_manifests_are_one_line(small_run, tmp_path, name):
    path = tmp_path / "patches.csv"
    shutil.copy(small_run / "patches/patches.csv", path)
    spoil, says = EMPTY[name]
    spoil(path)
    if name == "header only":
        fails(
            "DMU/main.py",
            "--manifest",
            path,
            "--out",
            tmp_path / "out",
            says="split train has no mitosis patch (0 in all)",
        )
    done = fails("NS/sigle.py", *LIGHT, "--manifest", path, "--out", tmp_path / "out", says=says)
    assert str(path) in done.err and not (tmp_path / "out").exists()


def test_duplicate_ids_name_both_rows(small_run, tmp_path):
    root = tmp_path / "midog"
    write_image(root / "images/001.tiff")
    images = [{"id": 1, "file_name": "001.tiff"}, {"id": 2, "file_name": "002.tiff"}, {"id": 1, "file_name": "3.tiff"}]
    (root / "MIDOG.json").write_text(json.dumps({"images": images, "annotations": []}))
    out = ["--out", tmp_path / "out"]
    done = fails("pre/cut_patch_2.py", "--dataset", "midog", "--data_root", root, *out, says="both have id 1")
    assert "images[0]" in done.err and "images[2]" in done.err
    table = write_table(tmp_path / "table", [["a", "a.tif", "c", "train"], ["a", "b.tif", "c", "train"]], [])
    write_image(tmp_path / "table/a.tif")
    done = fails("pre/cut_patch_2.py", *table, *out, says="both are image 'a'")
    assert "fields.csv, line 2 and" in done.err and "fields.csv, line 3:" in done.err
    lines = (small_run / "patches/patches.csv").read_text().splitlines()
    (tmp_path / "patches.csv").write_text("\n".join([*lines, lines[4]]) + "\n")
    for script, flag in (("NS/sigle.py", "manifest"), ("pre/split_patches.py", "labelled")):
        says = f"patches.csv, rows 5 and {len(lines) + 1}: patch {lines[4].split(',')[0]} stands in it twice"
        fails(script, f"--{flag}", tmp_path / "patches.csv", *out, says=says)
    assert not (tmp_path / "out").exists()


def test_a_point_with_both_labels_names_both_rows(tmp_path):
    write_image(tmp_path / "a.tif")
    points = [["a", 5, 5, 0], ["a", 60, 40, 1], ["a", 60, 40, 0]]
    table = write_table(tmp_path, [["a", "a.tif", "c", "train"]], points)
    done = fails("pre/cut_patch_2.py", *table, "--out", tmp_path / "out", says="is a mitosis in one and a hard")
    assert "annotations.csv, line 3 and" in done.err and "annotations.csv, line 4:" in done.err


OUTSIDE = ["../secret.tif", "/etc/secret.tif", "a/../../secret.tif", "..\\secret.tif", "C:/secret.tif"]


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_path_that_leaves_its_folder_is_refused(small_run, tmp_path, path):
    """In every table that comes from elsewhere, before anything is read or written."""
    root, out = tmp_path / "root", ["--out", tmp_path / "out"]
    write_image(tmp_path / "secret.tif")
    for row in (["a", path, "c", "train"], [path, "a.tif", "c", "train"]):
        table = write_table(root, [["b", "b.tif", "c", "train"], row], [])
        fails("pre/cut_patch_2.py", *table, *out, says="leads out of the dataset")
    (root / "MIDOG.json").write_text(json.dumps({"images": [{"id": 1, "file_name": path}], "annotations": []}))
    fails("pre/cut_patch_2.py", "--dataset", "midog", "--data_root", root, *out, says="leads out of the dataset")
    for name, column, script in (
        ("patches.csv", "patch", ["NS/sigle.py", "--manifest"]),
        ("patches.csv", "patch", ["pre/split_patches.py", "--labelled"]),
        ("fields.csv", "path", ["NS/sigle.py", "--manifest"]),
    ):
        (tmp_path / "patches").mkdir(exist_ok=True)
        for file in ("patches.csv", "fields.csv", "annotations.csv", "cut.json"):
            shutil.copy(small_run / "patches" / file, tmp_path / "patches")
        changed = pd.read_csv(tmp_path / "patches" / name, dtype=str, keep_default_na=False)
        changed.loc[1, column] = path
        changed.to_csv(tmp_path / "patches" / name, index=False)
        fails(*script, tmp_path / "patches/patches.csv", *out, says=f"path {path!r} leaves the folder")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["patches", "root", "secret.tif"]


def test_no_name_makes_a_file_outside_the_output_folder(small_run, tmp_path):
    """MIDOG: of `...tiff` the part before the suffix is `..`, and predict.py names a folder after it."""
    root, out = tmp_path / "root", tmp_path / "here/out"
    write_image(root / "images/...tiff")
    images = [{"id": 1, "file_name": "...tiff"}, {"id": 2, "file_name": "b.tiff"}]
    marks = [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 60, 60]}]
    (root / "MIDOG.json").write_text(json.dumps({"images": images, "annotations": marks}))
    data = ["--dataset", "midog", "--data_root", root, "--val", "2", "--test", "1"]
    model = ["--model_path", small_run / "NS/model.pt", "--device", "cpu", "--views", 1, "--report", "False"]
    succeed("predict.py", *model, *data, "--out", out)
    assert [one.name for one in out.parent.iterdir()] == ["out"]
    assert (out / "%2E%2E/detections.geojson").is_file() and not (out / "detections.geojson").exists()


FORMULAE = ["=1+1", "+a", "-2", "@sum", "\tb", "'=quoted", "'plain", "A041", 'a,"b"<i>']


def cells(path):
    with path.open(newline="", encoding="utf-8") as file:
        return [cell for row in csv.reader(file) for cell in row]


def is_number(cell):
    try:
        return float(cell) == float(cell)
    except ValueError:
        return False


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Stage 1 on cases and images whose names are formulae."""
    folder = tmp_path_factory.mktemp("named")
    splits = ["train", "train", "train", "val", "val", "test", "test", "train", "train"]
    rows = [
        [name, f"{place}.tif", name, split] for place, (name, split) in enumerate(zip(FORMULAE, splits, strict=True))
    ]
    for _, path, _, _ in rows:
        write_image(folder / path)
    points = [[name, x, 40, label] for name in FORMULAE for x, label in ((-0.25, 1), (60, 0))]
    data = write_table(folder, rows, points)
    succeed("pre/cut_patch_2.py", *data, *CUT, "--out", folder / "patches")
    return folder, data


def test_no_cell_of_any_table_is_a_formula_and_joins_hold(small_run, named, tmp_path):
    folder, data = named
    patches = read_patches(folder / "patches/patches.csv")
    assert set(patches["image"]) == set(patches["case"]) == set(FORMULAE)
    _, fields, annotations = read_cut_fields(folder / "patches")
    assert len(fields.merge(annotations, on="image", validate="one_to_many")) == 2 * len(FORMULAE)
    succeed("pre/split_patches.py", "--labelled", folder / "patches/patches.csv", "--out", tmp_path / "again")
    pd.testing.assert_frame_equal(read_patches(tmp_path / "again/patches.csv"), patches)
    model = ["--model_path", small_run / "NS/model.pt", "--device", "cpu", "--views", 1, "--threshold", 0.01]
    succeed("predict.py", *model, *data, "--split", "train", "--report", "False", "--out", tmp_path / "predict")
    assert len(pd.read_csv(tmp_path / "predict/detections.csv"))
    written = [*(folder / "patches").glob("*.csv"), *tmp_path.rglob("*.csv")]
    written = [path for path in written if path.name != "curve.csv"]  # names nothing, holds numbers only
    names = {"patches.csv", "fields.csv", "annotations.csv", "detections.csv", "counts.csv", "metrics_per_field.csv"}
    assert names == {path.name for path in written}
    for path in written:
        found = cells(path)
        assert "'=1+1" in found, path
        assert not [cell for cell in found if cell.startswith(("=", "+", "-", "@", "\t")) and not is_number(cell)], path
    assert "-0.25" in cells(folder / "patches/annotations.csv")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no names that are not UTF-8")
def test_names_that_are_not_utf_8(small_run, tmp_path):
    """Folders and files in Latin-1: predict.py from start to end, and a manifest that finds its patches again."""
    folder = tmp_path / os.fsdecode(b"M\xfcller")
    write_image(folder / "images" / os.fsdecode(b"Geschw\xfcr.tif"))
    model = ["--model_path", small_run / "NS/model.pt", "--device", "cpu", "--views", 1]
    command = [sys.executable, ROOT / "predict.py", *model, "--images", folder / "images", "--out", folder / "out"]
    # A UTF-8 terminal refuses such names; the tests' own standard output does not.
    environment = {**os.environ, "PYTHONUTF8": "0", "LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(list(map(str, command)), capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert b"M\\udcfcller/out" in done.stdout
    assert pd.read_csv(folder / "out/counts.csv")["image"].tolist() == ["Geschw\\udcfcr.tif"]
    run = json.loads((folder / "out/run.json").read_text(encoding="utf-8"))
    assert run["arguments"]["out"] == str(folder / "out")

    labelled = folder / "labelled"
    labelled.mkdir()
    for number in range(6):
        for label in ("pos", "neg"):
            square = tissue()[:64, :64]
            tifffile.imwrite(labelled / os.fsdecode(b"%s_M\xfc%d_1-%d.tif" % (label.encode(), number, number)), square)
    split = ["--labelled", labelled, "--patch_size", 64, "--folds", 3, "--out", folder / "split"]
    succeed("pre/split_patches.py", *split)
    table = read_patches(folder / "split/patches.csv")
    assert set(table["case"]) == {os.fsdecode(b"M\xfc%d" % number) for number in range(6)}
    assert all((folder / "split" / patch).is_file() for patch in table["patch"])


@pytest.mark.parametrize("folder", ["資料 é", os.fsdecode(b"M\xfcller")])
def test_a_data_root_of_every_alphabet_is_found_again(tmp_path, folder):
    if sys.platform != "linux" and not folder.isprintable():
        pytest.skip("other systems have no names that are not UTF-8")
    write_image(tmp_path / folder / "a.tif")
    data = write_table(tmp_path / folder, [["a", "a.tif", "c", "train"]], [["a", 60, 40, 1]])
    succeed("pre/cut_patch_2.py", *data, *CUT, "--out", tmp_path / folder / "out")
    data_root, fields, _ = read_cut_fields(tmp_path / folder / "out")
    assert (data_root / fields["path"].item()).is_file()
