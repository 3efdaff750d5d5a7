"""Every dataset in its true layout, with the quirks found in the real ones."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from dasc.data.datasets import Dataset, drop_outside, read_dataset
from dasc.data.splits import parse_cases
from dasc.errors import InputError

SHARED = Path(__file__).resolve().parents[2] / "shared"


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def fails(name: str, root: Path, *words: str, **sides) -> None:
    with pytest.raises(InputError) as caught:
        read_dataset(name, root, **sides)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def splits(dataset: Dataset) -> dict[str, str]:
    return dict(zip(dataset.fields["image"], dataset.fields["split"], strict=True))


def points(dataset: Dataset, image: str) -> list[tuple[float, float, int]]:
    rows = dataset.annotations[dataset.annotations["image"] == image]
    return list(zip(rows["x_px"], rows["y_px"], rows["label"], strict=True))


# MIDOG


ONE_MITOSIS = ((1, 1, [100, 200, 150, 250]),)


def midog(root: Path, ids=(1, 2, 3), boxes=ONE_MITOSIS, name="MIDOG.json", folder="images", **image_keys) -> Path:
    images = [
        {"id": i, "file_name": f"{i:03d}.tiff", "width": 7215, "height": 5412}
        | {key: value(i) for key, value in image_keys.items()}
        for i in ids
    ]
    annotations = [
        {"id": row, "image_id": image, "category_id": category, "bbox": box}
        for row, (image, category, box) in enumerate(boxes)
    ]
    for image in images:
        write(root / folder / image["file_name"])
    content = {"info": {}, "images": images, "categories": [], "annotations": annotations}
    write(root / name, json.dumps(content))
    return root


def test_midog_boxes_are_corners_and_other_categories_are_ignored(tmp_path):
    boxes = [
        (1, 1, [100, 200, 150, 250]),
        (1, 2, [-12.5, 10, 37.5, 60]),
        (2, 1, [7200, 5400, 7250, 5450]),
        (2, 3, [5, 5, 55, 55]),
    ]
    dataset = read_dataset("midog", midog(tmp_path, boxes=boxes), val=["1"], test=["2"])
    assert points(dataset, "001") == [(125, 225, 1), (12.5, 35, 0)]
    assert points(dataset, "002") == [(7225, 5425, 1)]
    assert points(dataset, "003") == []
    assert splits(dataset) == {"001": "val", "002": "test", "003": "train"}  # 003 is known to be empty
    assert list(dataset.fields["path"]) == ["images/001.tiff", "images/002.tiff", "images/003.tiff"]
    columns = ["image", "path", "case", "split", "um_per_px", "width_px", "height_px"]
    assert list(dataset.fields.columns) == columns
    assert (dataset.fields["width_px"] == 7215).all() and (dataset.fields["height_px"] == 5412).all()
    assert list(dataset.annotations.columns) == ["image", "x_px", "y_px", "label", "confidence"]
    assert dataset.fields["um_per_px"].isna().all() and dataset.annotations["confidence"].isna().all()


def test_midog_under_another_name_with_images_beside_it(tmp_path):
    root = midog(tmp_path, name="training.json", folder=".")
    dataset = read_dataset("midog", root, val=["001"], test=["002"])
    assert list(dataset.fields["path"]) == ["001.tiff", "002.tiff", "003.tiff"]
    write(root / "other.json", "{}")
    fails("midog", root, "MIDOG.json", "other.json, training.json")
    for path in root.glob("*.json"):
        path.unlink()
    fails("midog", root, "MIDOG.json", "no JSON")


def test_midog_slide_is_the_case_and_stays_together(tmp_path):
    root = midog(tmp_path, ids=(1, 2, 3, 4), slide=lambda i: f"Case_{(i + 1) // 2}", tumor_type=lambda i: "human")
    dataset = read_dataset("midog", root, val=["Case_1"], test=[])
    assert splits(dataset) == {"001": "val", "002": "val", "003": "train", "004": "train"}
    assert splits(read_dataset("midog", root, val=["2"], test=[])) == splits(dataset)
    fails("midog", root, "Case_1", "both", val=["1"], test=["002"])


@pytest.mark.parametrize("name", ["2", "02", "002", "2-3"])
def test_midog_image_by_id_stem_or_range(tmp_path, name):
    dataset = read_dataset("midog", midog(tmp_path), val=[name], test=[])
    assert splits(dataset) == {"001": "train", "002": "val", "003": "val" if "-" in name else "train"}


def test_midog21_has_the_split_of_the_paper_and_unlabelled_images(tmp_path):
    boxes = [(i, 1, [10, 10, 60, 60]) for i in range(1, 151) if i != 7]
    dataset = read_dataset("midog", midog(tmp_path, range(1, 201), boxes))
    split = splits(dataset)
    by_split = {side: [int(i) for i in split if split[i] == side] for side in ("val", "test", "train", "unlabelled")}
    assert by_split["val"] == [*range(41, 46), *range(91, 96), *range(141, 146)]
    assert by_split["test"] == [*range(46, 51), *range(96, 101), *range(146, 151)]
    assert by_split["unlabelled"] == list(range(151, 201))
    assert 7 in by_split["train"]
    fails("midog", tmp_path, "--val 160", "unlabelled", val=["160"])
    explicit = splits(read_dataset("midog", tmp_path, val=["46"]))  # what the user says comes before the default
    assert explicit["046"] == "val" and explicit["041"] == "train" and explicit["047"] == "test"


def test_midog22_has_unlabelled_images(tmp_path, caplog):
    boxes = [(i, 1, [10, 10, 60, 60]) for i in range(1, 355)]
    split = splits(read_dataset("midog", midog(tmp_path, range(1, 406), boxes)))
    assert [int(i) for i in split if split[i] == "unlabelled"] == list(range(355, 406))
    assert "taken for MIDOG 2022" in caplog.text and "51 of 405 images are unlabelled" in caplog.text


def test_images_151_to_200_are_labelled_where_one_of_them_is(tmp_path):
    boxes = [(1, 1, [10, 10, 60, 60]), (160, 2, [10, 10, 60, 60])]
    assert "unlabelled" not in splits(read_dataset("midog", midog(tmp_path, range(1, 201), boxes))).values()


def test_midog_form_without_the_ids_of_the_paper_asks_for_a_split(tmp_path):
    fails("midog", midog(tmp_path), "--val and --test", "001, 002, 003")


@pytest.mark.parametrize(
    ("box", "word"),
    [
        ([100, 200, 50, 50], "width, height"),
        ([1, 2, 3], "four numbers"),
        ([1, 2, float("nan"), 4], "four numbers"),
        ([1, 2, "3", 4], "four numbers"),
        (None, "four numbers"),
    ],
)
def test_midog_boxes_that_make_no_sense(tmp_path, box, word):
    boxes = [(1, 1, [1, 2, 3, 4]), (1, 1, box)]
    fails("midog", midog(tmp_path, boxes=boxes), "MIDOG.json, annotations[1]", word, val=["1"])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", "JSON"),
        ("[]", "'images'"),
        ('{"images": []}', "'annotations'"),
        ('{"images": [1], "annotations": []}', "'images'"),
        ('{"images": [{"id": 1}], "annotations": []}', "file_name"),
        ('{"images": [{"id": 1, "file_name": "../a.tiff"}], "annotations": []}', "leads out"),
        ('{"images": [{"id": 1, "file_name": "C:\\\\a.tiff"}], "annotations": []}', "leads out"),
        ('{"images": [], "annotations": [{"image_id": 9}]}', "image_id 9"),
        ('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1}]}', "category_id"),
        ('{"images": [], "annotations": []}', "no image"),
        ('{"images": [{"id": 1, "file_name": "a.tiff"}], "annotations": []}', "no image"),
    ],
)
def test_midog_json_that_is_broken(tmp_path, text, word):
    write(tmp_path / "MIDOG.json", text)
    fails("midog", tmp_path, str(tmp_path), word)


def test_midog_ids_are_unique(tmp_path):
    fails("midog", midog(tmp_path, ids=(1, 2, 1)), "images[0]", "images[2]", "id 1")
    midog(tmp_path, ids=(1, 2), file_name=lambda i: f"scanner_{i}/same.tiff")
    fails("midog", tmp_path, "images[0]", "images[1]", "'same'")


def test_missing_image_of_a_listed_field_is_kept_for_the_stage_to_name(tmp_path):
    (midog(tmp_path) / "images" / "002.tiff").unlink()
    assert len(read_dataset("midog", tmp_path, val=["1"], test=["3"]).fields) == 3


def test_sample_has_its_own_split(tmp_path):
    assert splits(read_dataset("sample", midog(tmp_path, range(1, 11)))) == {
        f"{i:03d}": {7: "val", 8: "val", 9: "test", 10: "test"}.get(i, "train") for i in range(1, 11)
    }
    fails("sample", tmp_path / "nowhere", "pre/make_sample.py")


# MITOS-ATYPIA-14


def frame(slide: Path, stem: str, mitosis: str | None, other: str | None, suffix: str = ".tiff") -> None:
    write(slide / "frames" / "x40" / f"{stem}{suffix}")
    for text, kind in ((mitosis, "mitosis"), (other, "not_mitosis")):
        if text is not None:
            write(slide / "mitosis" / f"{stem}_{kind}.csv", text)


def mitos14(root: Path) -> Path:
    frame(root / "A03" / "A03", "A03_00Aa", "10,20,1.0\n30,40,0.65   \n\n  \n", "5,6,0.2\r\n", ".PNG")
    frame(root / "H03", "H03_00Aa", "", "")
    frame(root / "A04", "A04_01Bb", "7,8,\n", None, ".jpg")
    frame(root / "H05", "H05_01Bb", "\ufeff1,2,None\n", "")
    frame(root / "A05", "A05_01Bb", None, "3,4,0.0\n")
    write(root / "A05" / "frames" / "x40" / "._A05_01Bb.tiff")
    write(root / "A05" / "frames" / "x40" / "notes.txt")
    write(root / "A05" / "frames" / "x20" / "A05_01B.tiff")
    return root


def test_mitos14(tmp_path):
    dataset = read_dataset("mitos14", mitos14(tmp_path))
    assert splits(dataset) == {
        "A03_00Aa": "val",
        "A04_01Bb": "test",
        "A05_01Bb": "unlabelled",
        "H03_00Aa": "val",
        "H05_01Bb": "train",
    }
    assert list(dataset.fields["case"]) == ["A03", "A04", "A05", "H03", "H05"]
    assert list(dataset.fields["um_per_px"]) == [0.2455, 0.2455, 0.2455, 0.2274, 0.2274]
    assert dataset.fields["path"][0] == "A03/A03/frames/x40/A03_00Aa.PNG"
    assert points(dataset, "A03_00Aa") == [(10, 20, 1), (30, 40, 1), (5, 6, 0)]
    assert points(dataset, "A04_01Bb") == [(7, 8, 1)]
    assert points(dataset, "A05_01Bb") == points(dataset, "H03_00Aa") == []
    confidence = dataset.annotations["confidence"]
    assert list(confidence[:3]) == [1.0, 0.65, 0.2] and confidence[3:].isna().all()


@pytest.mark.parametrize("name", ["A03", "H03", "H03_00Aa"])
def test_mitos14_one_glass_on_two_scanners_is_never_divided(tmp_path, name):
    split = splits(read_dataset("mitos14", mitos14(tmp_path), val=[name], test=["H05"]))
    assert split["A03_00Aa"] == split["H03_00Aa"] == "val"
    fails("mitos14", tmp_path, "both", val=["A03"], test=["H03"])


def test_mitos14_csv_beside_a_nested_slide(tmp_path):
    frame(tmp_path / "A03" / "A03", "A03_00Aa", None, None)
    write(tmp_path / "A03" / "mitosis" / "A03_00Aa_mitosis.csv", "1,2,1.0\n")
    assert points(read_dataset("mitos14", tmp_path, val=["A03"], test=[]), "A03_00Aa") == [(1, 2, 1)]


@pytest.mark.parametrize("row", ["1", "1,2,3,4", "1,two,1.0", "1,inf,1.0", "1,nan,1.0", "None,2,1.0", "1;2;1.0"])
def test_mitos14_rows_that_make_no_sense(tmp_path, row):
    frame(tmp_path / "A03", "A03_00Aa", f"1,2,1.0\n\n{row}\n", "")
    fails("mitos14", tmp_path, "A03_00Aa_mitosis.csv, line 3", val=["A03"])


def test_mitos14_csv_that_is_no_text(tmp_path):
    frame(tmp_path / "A03", "A03_00Aa", "", "")
    (tmp_path / "A03" / "mitosis" / "A03_00Aa_mitosis.csv").write_bytes(b"\xff\xfe1\x00")
    fails("mitos14", tmp_path, "A03_00Aa_mitosis.csv", "UTF-8", val=["A03"])


def test_mitos14_frame_twice(tmp_path):
    frame(tmp_path / "A03", "A03_00Aa", "", "")
    frame(tmp_path / "A03", "A03_00Aa", "", "", ".png")
    fails("mitos14", tmp_path, "A03_00Aa.png", "A03_00Aa.tiff", "unique")


def test_csv_without_its_image_is_said(tmp_path, caplog):
    frame(tmp_path / "A03", "A03_00Aa", "5,6,1.0\n", "")
    lost = write(tmp_path / "A03" / "mitosis" / "A03_00Ab_mitosis.csv", "1,2,1.0\n")
    read_dataset("mitos14", tmp_path, val=["A03"], test=[])
    assert str(lost) in caplog.text


# TUPAC16


def tupac16(root: Path) -> Path:
    for place in ("mitoses_image_data_part_1/01/01.tif", "mitoses_image_data_part_1/01/02.tif"):
        write(root / place)
    write(root / "mitoses_image_data_part_2" / "30" / "01.tif")
    write(root / "mitoses_ground_truth" / "01" / "01.csv", "100,7\n200,8\n")
    labels = root / "TUPAC_AL"
    write(labels / "mitoses_ground_truth" / "01" / "01.csv", "100,7\n")
    write(labels / "mitoses_ground_truth" / "01" / "02.csv")
    write(labels / "nonmitoses_ground_truth" / "30" / "01.csv", "300,9\n")
    return root


def test_tupac16_is_row_first_and_a_missing_csv_means_no_mitosis(tmp_path):
    dataset = read_dataset("tupac16", tupac16(tmp_path), val=["30"], test=[])
    assert splits(dataset) == {"01_01": "train", "01_02": "train", "30_01": "val"}
    assert points(dataset, "01_01") == [(7, 100, 1), (8, 200, 1)]
    assert len(dataset.annotations) == 2
    assert list(dataset.fields["case"]) == ["01", "01", "30"] and (dataset.fields["um_per_px"] == 0.25).all()
    assert splits(read_dataset("tupac16", tmp_path, val=["1"], test=[]))["01_02"] == "val"
    fails("tupac16", tmp_path, "--val and --test", "no case or image 37")


def test_tupac16_alternative_labels(tmp_path):
    dataset = read_dataset("tupac16_al", tupac16(tmp_path), val=["30"], test=["01"])
    assert points(dataset, "01_01") == [(7, 100, 1)]
    assert points(dataset, "30_01") == [(9, 300, 0)]


def test_tupac16_split_of_the_paper(tmp_path):
    for case in range(1, 74):
        write(tmp_path / f"{case:02d}" / "01.tif")
    write(tmp_path / "mitoses_ground_truth/01/01.csv", "1,2\n")
    split = splits(read_dataset("tupac16", tmp_path))
    assert [i for i in split if split[i] == "val"] == [f"{i}_01" for i in (30, 37, 44, 51, 58, 65, 72)]
    assert [i for i in split if split[i] == "test"] == [f"{i}_01" for i in (31, 38, 45, 52, 59, 66, 73)]
    fails("tupac16_al", tmp_path, "TUPAC_AL")
    fails("tupac16", tmp_path / "01", "mitoses_ground_truth")


def test_tupac16_errors_name_the_line(tmp_path):
    write(tupac16(tmp_path) / "mitoses_ground_truth" / "01" / "02.csv", "1,2\n3,4,5\n")
    fails("tupac16", tmp_path, "02.csv, line 2", "row,col")


# table

FIELDS = "image,path,case,split,um_per_px\n"
ANNOTATIONS = "image,x_px,y_px,label\n"


def table(root: Path, fields: str, annotations: str = "") -> Path:
    write(root / "a.png")
    write(root / "fields.csv", FIELDS + fields)
    write(root / "annotations.csv", ANNOTATIONS + annotations)
    return root


def test_table_keeps_its_names_and_its_split(tmp_path):
    fields = "NA,sub/a.png,041,val,\n041,a.png,41,train,0.25\n9,b.png,NA,unlabelled,0.5\n10,c.png,7,test,\n"
    annotations = "NA,30,4,0\nNA,1.5,2,1\n041,9,9,1.0\n"
    dataset = read_dataset("table", table(tmp_path, fields, annotations))
    assert splits(dataset) == {"041": "train", "10": "test", "9": "unlabelled", "NA": "val"}
    assert list(dataset.fields["case"]) == ["41", "7", "NA", "041"]
    assert dataset.fields["um_per_px"][0] == 0.25 and math.isnan(dataset.fields["um_per_px"][3])
    assert points(dataset, "NA") == [(30, 4, 0), (1.5, 2, 1)]  # in the order of the file
    assert points(dataset, "10") == []


def test_table_split_is_overridden_by_what_is_asked(tmp_path):
    fields = "a,a.png,1,train,\nb,b.png,2,val,\nc,c.png,3,test,\nd,d.png,1,unlabelled,\n"
    root = table(tmp_path, fields, "a,5,6,1\n")
    assert splits(read_dataset("table", root, val=["1"])) == {"a": "val", "b": "train", "c": "test", "d": "unlabelled"}
    assert list(splits(read_dataset("table", root, val=["3"], test=["1"])).values())[:3] == ["test", "train", "val"]
    assert list(splits(read_dataset("table", root, val=[], test=[])).values())[:3] == ["train"] * 3


def test_exact_name_comes_before_the_same_number(tmp_path):
    root = table(tmp_path, "a,a.png,041,train,\nb,b.png,41,train,\nc,c.png,1-2,train,\n", "a,5,6,1\n")
    assert splits(read_dataset("table", root, val=["41"], test=[])) == {"a": "train", "b": "val", "c": "train"}
    assert splits(read_dataset("table", root, val=["1-2"], test=["041"])) == {"a": "test", "b": "train", "c": "val"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("a,/tmp/a.png,1,train,\n", ("line 2", "leads out")),
        ("a,sub/../../a.png,1,train,\n", ("line 2", "leads out")),
        ("a,sub\\..\\a.png,1,train,\n", ("line 2", "leads out")),
        ("../a,a.png,1,train,\n", ("line 2", "leads out")),
        ("a,a.png,1,train,\n\nb,a.png,1,train,\na,b.png,1,train,\n", ("line 2", "line 5", "'a'")),
        ("a,a.png,1,dev,\n", ("line 2", "'dev'")),
        ("a,a.png,1,,\n", ("line 2", "split")),
        (",a.png,1,train,\n", ("line 2", "image is empty")),
        ("a,a.png,,train,\n", ("line 2", "case is empty")),
        ("a,a.png,1,train,x\n", ("line 2", "'x'")),
        ("a,a.png,1,train,352.8\n", ("line 2", "352.8")),
        ("a,a.png,1,train\n", ("line 2", "5 cells")),
        ("a,a.png,1,train,,\n", ("line 2", "5 cells")),
        ('a,a.png,1,train,"\n', ("fields.csv, line 2", "end of data")),
        ("a,a.png,1,train,\nb,b.png,1,val,\n", ("line 2", "line 3", "case '1'")),
        ("", ("no image",)),
        ("a,elsewhere.png,1,train,\n", ("no image",)),
    ],
)
def test_table_fields_that_make_no_sense(tmp_path, fields, words):
    fails("table", table(tmp_path, fields), *words)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("b,1,2,1\n", ("line 2", "'b'")),
        ("a,1,2,2\n", ("line 2", "label 2")),
        ("a,1,2,1\na,nan,2,1\n", ("line 3", "'nan'")),
        ("a,1,,1\n", ("line 2", "''")),
        ("a,1,2,1\na,3,4,1\na,1.0,2,0\n", ("line 2", "line 4", "1, 2")),
    ],
)
def test_table_annotations_that_make_no_sense(tmp_path, rows, words):
    fails("table", table(tmp_path, "a,a.png,1,train,\n", rows), "annotations.csv", *words)


def test_table_with_missing_parts(tmp_path):
    root = table(tmp_path, "a,a.png,1,train,\n")
    write(root / "annotations.csv", "image,x_px,y,label\n")
    fails("table", root, "annotations.csv", "y_px is missing")
    write(root / "annotations.csv", "")
    fails("table", root, "image, x_px, y_px, label is missing")
    write(root / "annotations.csv", "image;x_px;y_px;label\na;1,5;2;1\n")
    fails("table", root, "separated by commas", "found 'image;x_px;y_px;label'")
    (root / "annotations.csv").unlink()
    fails("table", root, "annotations.csv", "no such file")


# all


def test_exact_duplicates_are_dropped_and_counted(tmp_path, caplog):
    rows = "a,5,6,1\na,1,20,0\na,5.0,6,1\nb,5,6,0\na,1,20,0\n"
    dataset = read_dataset("table", table(tmp_path, "a,a.png,1,train,\nb,b.png,1,train,\n", rows))
    assert dataset.duplicates == 2 and "2 annotations" in caplog.text
    assert points(dataset, "a") == [(5, 6, 1), (1, 20, 0)] and points(dataset, "b") == [(5, 6, 0)]


def test_annotations_keep_their_order_inside_an_image(tmp_path):
    rows = [f"{'ba'[n % 2]},{(n * 37) % 100},{n},1\n" for n in range(200)]
    dataset = read_dataset("table", table(tmp_path, "a,a.png,1,train,\nb,b.png,1,train,\n", "".join(rows)))
    assert list(dataset.annotations["image"]) == ["a"] * 100 + ["b"] * 100
    assert list(dataset.annotations["y_px"]) == [*range(1, 200, 2), *range(0, 200, 2)]


def test_point_with_both_labels_names_both_files(tmp_path):
    frame(tmp_path / "A03", "A03_00Aa", "90,9,1\n1,2,1.0\n", "1,2,0.0\n")
    words = ("A03_00Aa_mitosis.csv, line 2", "A03_00Aa_not_mitosis.csv, line 1")
    fails("mitos14", tmp_path, *words, val=["A03"], test=[])


def test_annotations_outside_the_image_are_dropped_and_counted(tmp_path):
    rows = "a,-0.5,0,1\na,-0.6,9,1\na,99.5,49.5,0\na,100,10,1\na,10,50,0\n"
    annotations = read_dataset("table", table(tmp_path, "a,a.png,1,train,\n", rows)).annotations
    kept, dropped = drop_outside(annotations, width=100, height=50)
    assert list(kept["x_px"]) == [-0.5, 99.5] and dropped == 3


def test_no_annotation_at_all_is_refused_with_where_it_was_looked_for(tmp_path):
    fails("table", table(tmp_path, "a,a.png,1,train,\n"), "no mitosis", str(tmp_path / "annotations.csv"))
    assert drop_outside(pd.DataFrame({"x_px": [], "y_px": []}), 10, 10)[1] == 0


def test_unknown_names_list_what_there_is(tmp_path):
    fields = "".join(f"i{n},a.png,case{n:03d},train,\n" for n in range(200))
    root = table(tmp_path, fields, "i0,5,5,1\n")
    fails("table", root, "--test case7:", "200 cases", "case000", "...", "case199", test=["case7"])
    fails("table", root, "--val 1-999999999999", val=["1-999999999999"])
    fails("midog", midog(tmp_path / "m"), "low to high", val=["3-1"])
    fails("midogg", root, "midog, mitos14, tupac16", "table, sample")
    fails("table", root / "missing", "missing", "--data_root")


@pytest.mark.parametrize("name", ["midog", "mitos14", "tupac16", "tupac16_al", "table", "sample"])
def test_empty_folder_is_an_error(tmp_path, name):
    fails(name, tmp_path, str(tmp_path))


def test_parse_cases():
    assert parse_cases("A, B,41-45,") == ["A", "B", "41-45"] and parse_cases("") == []


# real data

needs_shared = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="real data are not here")


@needs_shared
def test_real_mitos14():
    dataset = read_dataset("mitos14", SHARED / "data" / "mitos14", val=["H03"], test=["A05"])
    assert dataset.fields["split"].value_counts().to_dict() == {"train": 159, "test": 68, "val": 63}
    assert dataset.annotations["label"].value_counts().to_dict() == {0: 1009, 1: 479}
    assert drop_outside(dataset.annotations, 1663, 1485)[1] == 0
    assert dataset.annotations["confidence"].isna().sum() == 1


@needs_shared
def test_the_votes_of_the_results_are_those_of_the_real_mitos14():
    dataset = read_dataset("mitos14", SHARED / "data" / "mitos14", val=["H03"], test=["A05"])
    table = dataset.annotations.merge(dataset.fields[["image", "case"]], on="image")
    for row in pd.read_csv(Path(__file__).resolve().parents[1] / "docs/votes.csv").itertuples():
        confidence = table.loc[table["case"].eq(row.set) | ("all" in row.set), "confidence"]
        agreed, two, one = ((confidence == value).sum() for value in (1.0, 0.65, 0.2))
        assert [agreed + (confidence == 0.8).sum(), two, one] == [row.agreed, row.two_of_three, row.one_of_three]


@needs_shared
def test_real_brecahad_and_mitotic_figures():
    dataset = read_dataset("midog", SHARED / "data" / "brecahad", val=["Case_12"], test=["Case_13"])
    assert dataset.fields["split"].value_counts().to_dict() == {"train": 15, "val": 12, "test": 3}
    assert dataset.annotations["label"].value_counts().to_dict() == {0: 73, 1: 67}
    dataset = read_dataset("table", SHARED / "data" / "mitotic_figures")
    assert len(dataset.fields) == 3601 and dataset.annotations["label"].sum() == 3601
    assert dataset.fields["case"].nunique() == 201
