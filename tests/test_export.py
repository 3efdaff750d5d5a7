"""Every written file is read back as the program it is meant for would read it."""

import csv
import json
import uuid
import zipfile
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from dasc.errors import InputError
from dasc.report.export import write_counts, write_detections, write_geojson, write_mitotic_figures

COLUMNS = ["image", "x_px", "y_px", "x_um", "y_um", "probability", "mitosis"]


def detections():
    return pd.DataFrame(
        [
            ("a/b.tiff", 100.0, 40.0, 25.0, 10.0, 0.93456789, True),
            ("a/b.tiff", 8.0, 2000.5, 2.0, 500.125, 0.3, False),
            ("a/b.tiff", 0.0, 1.0, 0.0, 0.25, 0.01, False),
        ],
        columns=COLUMNS,
    )


def test_detections_come_back(tmp_path):
    write_detections(tmp_path / "detections.csv", detections())
    read = pd.read_csv(tmp_path / "detections.csv")
    assert list(read.columns) == COLUMNS
    assert read["probability"].tolist() == [0.934568, 0.3, 0.01]
    assert read["mitosis"].tolist() == [1, 0, 0]
    assert read["x_px"].tolist() == [100, 8, 0]
    assert read["y_um"].tolist() == [10, 500.125, 0.25]


def test_micrometres_stay_empty_where_unknown(tmp_path):
    table = detections()
    table.loc[1, ["x_um", "y_um"]] = np.nan
    write_detections(tmp_path / "some.csv", table)
    write_detections(tmp_path / "none.csv", table.drop(columns=["x_um", "y_um"]))
    assert (tmp_path / "some.csv").read_text().splitlines()[2] == "a/b.tiff,8.0,2000.5,,,0.3,0"
    assert (tmp_path / "none.csv").read_text().splitlines()[1] == "a/b.tiff,100.0,40.0,,,0.934568,1"


def test_no_cell_is_a_formula_and_numbers_stay_numbers(tmp_path):
    names = ["=1+1", "+a", "-a", "@a", "\ta", "\ra", 'a,"b"\nc', "a=b", "\udcffa", "mitose \u00e9.png"]
    table = pd.DataFrame({"image": names, "x_px": -0.5, "y_px": 1.0, "probability": 0.5, "mitosis": True})
    write_detections(tmp_path / "detections.csv", table)
    with (tmp_path / "detections.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    escaped = [*(f"'{name}" for name in names[:5]), "\\ra"]
    assert [row["image"] for row in rows] == [*escaped, 'a,"b"\nc', "a=b", "\\udcffa", "mitose \u00e9.png"]
    assert {row["x_px"] for row in rows} == {"-0.5"}


def test_a_table_without_a_column_is_refused(tmp_path):
    with pytest.raises(InputError, match="probability"):
        write_detections(tmp_path / "detections.csv", detections().drop(columns="probability"))
    assert not list(tmp_path.iterdir())


def test_mitotic_figures_are_millimetres(tmp_path):
    path = tmp_path / "mitotic-figures.json"
    write_mitotic_figures(path, detections(), 0.25, threshold=0.5, smallest=0.05)
    assert json.loads(path.read_text()) == {
        "name": "Points of interest",
        "type": "Multiple points",
        "points": [
            {"name": "mitotic figure", "point": [0.025, 0.01, 0], "probability": 0.934568},
            {"name": "non-mitotic figure", "point": [0.002, 0.500125, 0], "probability": 0.3},
        ],
        "version": {"major": 1, "minor": 0},
    }


@pytest.mark.parametrize("um_per_px", [None, float("nan"), 0.0])
def test_mitotic_figures_need_a_resolution(tmp_path, um_per_px):
    with pytest.raises(InputError, match="--um_per_px"):
        write_mitotic_figures(tmp_path / "points.json", detections(), um_per_px, 0.5, 0.05)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("x_px", "accepted"), [(40000, True), (40001, False), (-30, True), (-31, False)])
def test_mitotic_figures_are_for_regions_only(tmp_path, x_px, accepted):
    table = detections()
    table.loc[0, "x_px"] = x_px
    path = tmp_path / "points.json"
    if accepted:
        write_mitotic_figures(path, table, 0.25, 0.5, 0.05)
        assert json.loads(path.read_text())["points"][0]["point"][0] == pytest.approx(x_px * 0.25 / 1000)
    else:
        with pytest.raises(InputError, match="regions only"):
            write_mitotic_figures(path, table, 0.25, 0.5, 0.05)
        assert not path.exists()


def test_geojson_is_what_qupath_reads(tmp_path):
    path = tmp_path / "b.geojson"
    write_geojson(path, detections())
    content = json.loads(path.read_text())
    assert content["type"] == "FeatureCollection"
    first, second, _ = content["features"]
    ids = {str(uuid.UUID(feature["id"])) for feature in content["features"]}
    assert len(ids) == 3
    assert first == {
        "type": "Feature",
        "id": first["id"],
        "geometry": {"type": "Point", "coordinates": [100.5, 40.5]},
        "properties": {
            "objectType": "detection",
            "classification": {"name": "Mitotic figure", "color": [200, 0, 0]},
            "measurements": {"Probability": 0.934568},
        },
    }
    assert second["geometry"]["coordinates"] == [8.5, 2001.0]
    assert second["properties"]["classification"]["name"] == "Non-mitotic figure"
    assert second["properties"]["classification"]["color"] != [200, 0, 0]


def test_geojson_counts_from_where_the_viewer_begins(tmp_path):
    write_geojson(tmp_path / "b.geojson", detections(), origin_px=(60, 30))
    first = json.loads((tmp_path / "b.geojson").read_text())["features"][0]
    assert first["geometry"]["coordinates"] == [40.5, 10.5]


def test_counts_keep_their_names_and_digits(tmp_path):
    table = pd.DataFrame(
        {"image": ["=a", "b"], "um_per_px": [0.22741234, 0.25], "tissue_mm2": 1.23456789, "x_px": 1.23456}
    )
    write_counts(tmp_path / "counts.csv", table)
    read = pd.read_csv(tmp_path / "counts.csv")
    assert read.iloc[0].tolist() == ["'=a", 0.22741234, 1.234568, 1.235]


def read_sheet(path):
    """The cells of a spreadsheet's one sheet: texts as str, numbers as float, empty ones as None; no formula."""
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    with zipfile.ZipFile(path) as file:
        assert [name for name in file.namelist() if name.startswith("xl/worksheets/")] == ["xl/worksheets/sheet1.xml"]
        texts = ElementTree.fromstring(file.read("xl/sharedStrings.xml")).findall(f"{space}si")
        sheet = ElementTree.fromstring(file.read("xl/worksheets/sheet1.xml"))
    assert sheet.find(f".//{space}pane").get("state") == "frozen" and sheet.find(f".//{space}f") is None
    assert sheet.find(f".//{space}hyperlink") is None
    texts = ["".join(text.itertext()) for text in texts]
    rows = []
    for row in sheet.iter(f"{space}row"):
        cells = {}
        for cell in row:
            value = cell.find(f"{space}v").text
            column = 0
            for letter in cell.get("r").rstrip("0123456789"):
                column = column * 26 + ord(letter) - ord("A") + 1
            cells[column - 1] = texts[int(value)] if cell.get("t") == "s" else float(value)
        rows.append([cells.get(column) for column in range(len(rows[0]) if rows else len(cells))])
    return rows


def test_a_spreadsheet_holds_texts_as_texts_and_numbers_as_numbers(tmp_path):
    names = ["=1+1", "+a", "-5", "@a", "007", "https://a.b", "{=a}", "mitose \u00e9.png", "\udcffa", ""]
    table = pd.DataFrame({"image": names, "mitoses": 3, "tissue_mm2": 0.5, "mitoses_per_mm2": np.nan})
    table.loc[1, "mitoses_per_mm2"] = 6.25
    write_counts(tmp_path / "counts.csv", table)
    header, *rows = read_sheet(tmp_path / "counts.xlsx")
    assert header == list(table)
    assert [row[0] for row in rows] == [*names[:8], "\\udcffa", None]
    assert {tuple(row[1:3]) for row in rows} == {(3.0, 0.5)}
    assert [row[3] for row in rows] == [None, 6.25, *[None] * 8]
    first = (tmp_path / "counts.xlsx").read_bytes()
    write_counts(tmp_path / "counts.csv", table)
    assert (tmp_path / "counts.xlsx").read_bytes() == first


def test_geojson_ids_depend_on_image_and_place_alone(tmp_path):
    write_geojson(tmp_path / "first.geojson", detections())
    write_geojson(tmp_path / "again.geojson", detections())
    write_geojson(tmp_path / "other.geojson", detections().assign(image="\udcff.tiff"))
    first, again, other = ((tmp_path / f"{name}.geojson").read_bytes() for name in ("first", "again", "other"))
    assert first == again
    ids = [{feature["id"] for feature in json.loads(text)["features"]} for text in (first, other)]
    assert not ids[0] & ids[1]


def test_no_detections_give_valid_files(tmp_path):
    none = detections()[:0]
    write_detections(tmp_path / "d.csv", none)
    write_detections(tmp_path / "plain.csv", pd.DataFrame(columns=COLUMNS))
    write_mitotic_figures(tmp_path / "m.json", none, 0.25, 0.5, 0.05)
    write_geojson(tmp_path / "g.geojson", none)
    assert (tmp_path / "d.csv").read_text() == (tmp_path / "plain.csv").read_text() == ",".join(COLUMNS) + "\n"
    assert json.loads((tmp_path / "m.json").read_text())["points"] == []
    assert json.loads((tmp_path / "g.geojson").read_text()) == {"type": "FeatureCollection", "features": []}
