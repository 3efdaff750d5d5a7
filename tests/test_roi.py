"""Only what lies in a region counts; what predict.py writes for QuPath, ASAP and COCO is read again as it was found."""

import json

import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
from pipeline import call, fails, succeed

from dasc.data.annotations import read_annotations
from dasc.data.regions import Roi, parts_of
from dasc.data.shapes import areas_of, polygon
from dasc.detect.image import count_mitoses
from dasc.images.read import read_field
from dasc.images.slides import open_slide
from dasc.images.tissue import Tissue
from dasc.report.viewers import outline

UM = 0.25


def features(*rings, name="Tumor", kind="annotation"):
    return [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": kind, "classification": {"name": name}},
        }
        for ring in rings
    ]


def box(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def write(path, *groups):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [one for group in groups for one in group]}))


@pytest.fixture(scope="module")
def scanned(small_run, tmp_path_factory):
    """A field scanned without a region, and the flags of the scan."""
    folder = tmp_path_factory.mktemp("roi")
    pixels = read_field(sorted((small_run / "sample/images").iterdir())[0])
    options = {"photometric": "rgb", "resolution": (1e4 / UM,) * 2, "resolutionunit": 3}
    tifffile.imwrite(folder / "a.tif", pixels, **options)
    flags = ["--model_path", small_run / "NS/model.pt", "--device", "cpu", "--threshold", 0.2]
    flags += ["--images", folder / "a.tif", "--views", 1, "--overlays", "False"]
    succeed("predict.py", *flags, "--export", "asap", "coco", "--out", folder / "whole")
    return folder, flags


def found(out):
    return pd.read_csv(out / "detections.csv"), pd.read_csv(out / "counts.csv").iloc[0]


def test_only_the_region_counts_and_its_area_divides(scanned, tmp_path):
    """Two overlapping polygons of 500 x 700 px together; a detection in both counts once, cells are no regions."""
    folder, flags = scanned
    whole, _ = found(folder / "whole")
    rings = [box(0, 0, 300, 700), box(200, 0, 500, 700)]
    write(tmp_path / "roi/a.tif.geojson", features(*rings), features(box(0, 0, 700, 700), kind="cell"))
    succeed("predict.py", *flags, "--roi", tmp_path / "roi", "--out", tmp_path / "out")
    own, counts = found(tmp_path / "out")
    wanted = whole[whole["x_px"] <= 499.5]
    assert 0 < len(wanted) < len(whole)
    pd.testing.assert_frame_equal(own, wanted.reset_index(drop=True))
    area_mm2 = 500 * 700 * UM**2 / 1e6
    assert counts["mitoses"] == wanted["mitosis"].sum()
    assert counts["region_mm2"] == pytest.approx(area_mm2, abs=1e-6)
    assert np.isnan(counts["mitoses_per_mm2"])  # the region is too small for a density
    assert counts["hotspot_mitoses"] == counts["mitoses"] and counts["hotspot_mm2"] == counts["region_mm2"]
    drawn = {shape.name: shape for shape in read_annotations(tmp_path / "out/a.tif/regions.geojson")[0].shapes}
    assert set(drawn) == {"Hotspot", "Region"} and drawn["Region"].geometry.bounds == (0, 0, 500, 700)


def test_a_class_chooses_the_polygons(scanned, tmp_path):
    _, flags = scanned
    write(tmp_path / "roi/a.geojson", features(box(0, 0, 700, 350)), features(box(0, 0, 700, 700), name="Slide"))
    roi = ["--roi", tmp_path / "roi", "--out", tmp_path / "out"]
    succeed("predict.py", *flags, *roi, "--roi_class", "tumor")
    assert found(tmp_path / "out")[1]["region_mm2"] == pytest.approx(700 * 350 * UM**2 / 1e6, abs=1e-6)
    done = call("predict.py", *flags, *roi, "--roi_class", "Necrosis")
    assert done.status == 1 and "no polygon of class Necrosis; found Slide, Tumor" in done.err


def test_a_class_without_a_folder_is_refused(scanned, tmp_path):
    _, flags = scanned
    fails("predict.py", *flags, "--roi_class", "Tumor", "--out", tmp_path, says="has no effect without --roi FOLDER")


def test_a_slide_is_scanned_in_its_region_alone(scanned, tmp_path):
    """A region in tiles gives detections on the region, and a scan of another region is not gone on with."""
    _, flags = scanned
    write(tmp_path / "roi/a.geojson", features(box(0, 0, 350, 700)))
    slide = ["--whole_px", 1000, "--out", tmp_path / "out"]
    succeed("predict.py", *flags, *slide, "--roi", tmp_path / "roi")
    own, counts = found(tmp_path / "out")
    assert len(own) and (own["x_px"] <= 349.5).all()
    assert counts["region_mm2"] == pytest.approx(350 * 700 * UM**2 / 1e6, abs=1e-6)
    names = [shape.name for shape in read_annotations(tmp_path / "out/a.tif/regions.geojson")[0].shapes]
    assert names[0] == "Hotspot" and names[-1] == "Region" and "Tissue" in names
    succeed("predict.py", *flags, *slide, "--roi", tmp_path / "roi", "--resume")
    pd.testing.assert_frame_equal(found(tmp_path / "out")[0], own)
    write(tmp_path / "roi/a.geojson", features(box(0, 0, 349, 700)))
    done = call("predict.py", *flags, *slide, "--roi", tmp_path / "roi", "--resume")
    assert done.status == 1 and "was begun with roi" in done.err


def test_an_image_without_its_region_is_skipped_and_named(scanned, tmp_path):
    _, flags = scanned
    write(tmp_path / "roi/b.geojson", features(box(0, 0, 350, 700)))
    roi = ["--roi", tmp_path / "roi", "--out", tmp_path / "out"]
    fails(
        "predict.py",
        *flags,
        *roi,
        says=f"0 files of regions in {tmp_path / 'roi'}; expected one: a.tif.geojson or a.geo",
    )
    write(tmp_path / "roi/a.geojson", features(box(900, 0, 950, 700)))
    done = fails("predict.py", *flags, *roi, says="lies outside")
    assert "a.geojson, features[0]" in done.err and "a.tif of 700 x 700 px" in done.err
    fails("predict.py", *flags, "--roi", tmp_path / "none", "--out", tmp_path / "out", says="no such file or folder")


def test_mitoses_that_nobody_was_to_find_are_not_missed(small_run, tmp_path):
    """A dataset judged in regions: annotations beyond them do not count as missed."""
    for path in sorted((small_run / "sample/images").iterdir()):
        write(tmp_path / f"roi/{path.name}.geojson", features(box(0, 0, 1, 1)))
    flags = ["--model_path", small_run / "NS/model.pt", "--device", "cpu", "--report", "False", "--views", 1]
    data = [
        "--dataset",
        "sample",
        "--data_root",
        small_run / "sample",
        "--roi",
        tmp_path / "roi",
        "--out",
        tmp_path / "o",
    ]
    succeed("predict.py", *flags, *data)
    metrics = json.loads((tmp_path / "o/metrics.json").read_text())
    assert metrics["fn"] == 0 and metrics["fp"] == 0


@pytest.mark.parametrize("name", ["a.tif/detections.geojson", "a.tif/detections.xml", "detections.coco.json"])
def test_what_is_exported_comes_back(scanned, name):
    folder, _ = scanned
    (source,) = read_annotations(folder / "whole" / name)
    shapes = [(shape.name, source.in_px(shape, UM, (0, 0))) for shape in source.shapes]
    own, _ = found(folder / "whole")
    read = sorted((point.x, point.y, kind == "Mitotic figure") for kind, point in shapes)
    wanted = sorted(own[["x_px", "y_px", "mitosis"]].itertuples(index=False, name=None))
    assert len(read) == len(wanted) > 5 and np.allclose(read, wanted, atol=0.01)
    assert source.image in (None, "a.tif")


def test_exports_are_written_when_asked_for_and_none_is_stale(scanned, tmp_path):
    folder, flags = scanned
    out = ["--out", tmp_path / "out"]
    succeed("predict.py", *flags, *out, "--export", "asap", "coco", "--qupath", "annotations")
    ours = tmp_path / "out/a.tif/detections.geojson"
    kinds = {one["properties"]["objectType"] for one in json.loads(ours.read_text())["features"]}
    drawn = [shape.geometry for shape in read_annotations(ours)[0].shapes]
    assert max(shape.area for shape in drawn) == pytest.approx((32 / UM) ** 2) and min(s.area for s in drawn) > 0
    assert all(shape.within(shapely.box(0, 0, 700, 700)) for shape in drawn)
    assert kinds == {"annotation"} and (tmp_path / "out/a.tif/detections.xml").is_file()
    succeed("predict.py", *flags, *out, "--resume")
    assert not (tmp_path / "out/a.tif/detections.xml").exists() and not (tmp_path / "out/detections.coco.json").exists()
    assert ours.read_bytes() == (folder / "whole/a.tif/detections.geojson").read_bytes()
    done = call("predict.py", *flags, *out, "--export", "xml")
    assert done.status == 2 and "invalid choice: 'xml'" in done.err


def test_the_border_of_a_region_is_in_it_once():
    roi = Roi(areas_of(polygon([[(0, 0), (10, 0), (10, 10), (0, 10)]], "here")))
    assert roi.at(np.array([[10, 5], [5, 5], [10.001, 5], [0, 0]])).tolist() == [True, True, False, True]
    assert roi.at(np.zeros((0, 2))).tolist() == []
    assert roi.area_mm2(1000.0) == 100 and roi.area_mm2(1000.0, (5, 0, 20, 10)) == 50


def test_the_hotspot_of_a_region_has_the_area_within(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((100, 120, 3), np.uint8), photometric="rgb")
    with open_slide(tmp_path / "a.tif") as slide:
        overview = np.zeros((100, 120, 3), np.uint8)
        table = pd.DataFrame({"x_px": [20.0], "y_px": [20.0], "mitosis": [True]})
        roi = Roi(polygon([[(-0.5, -0.5), (59.5, -0.5), (59.5, 99.5), (-0.5, 99.5)]], "here"))
        facts, hotspot = count_mitoses(slide, "a", table, 1.0, "file", None, overview, roi)
        assert hotspot.whole and facts["hotspot_mm2"] == facts["region_mm2"] == pytest.approx(6000 / 1e6)
        facts, hotspot = count_mitoses(slide, "a", table, 20.0, "file", None, overview, roi)  # the window: 70.7 px wide
        assert facts["mitoses_per_mm2"] == pytest.approx(1 / facts["region_mm2"])
        shown = min(hotspot.x_px + hotspot.width_px, 60) - hotspot.x_px
        assert facts["hotspot_mm2"] == pytest.approx(shown * hotspot.height_px * 400 / 1e6)


def test_a_region_without_a_mitosis_has_its_window_on_it(tmp_path):
    """Elsewhere the window would have no area in the region, and the report divides by it."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((300, 400, 3), np.uint8), photometric="rgb")
    with open_slide(tmp_path / "a.tif") as slide:
        overview = np.zeros((300, 400, 3), np.uint8)
        none = pd.DataFrame({"x_px": [], "y_px": [], "mitosis": np.zeros(0, bool)})
        roi = Roi(polygon([[(380, 280), (398, 280), (398, 298), (380, 298)]], "here"))
        facts, hotspot = count_mitoses(slide, "a", none, 20.0, "file", None, overview, roi)
    assert facts["hotspot_mm2"] == pytest.approx(facts["region_mm2"]) and facts["hotspot_mitoses"] == 0
    assert (facts["hotspot_x_px"], facts["hotspot_y_px"]) == (hotspot.x_px, hotspot.y_px)
    assert hotspot.x_px + hotspot.width_px == 400 and hotspot.y_px + hotspot.height_px == 300


def test_tissue_is_scanned_where_the_region_touches_a_pixel():
    tissue = Tissue(np.ones((20, 20), bool), 10.0)
    roi = Roi(polygon([[(52, 52), (148, 52), (148, 148), (52, 148)]], "here"))
    mask = roi.tissue(tissue).mask
    assert mask[5:15, 5:15].all() and mask.sum() <= 12 * 12
    everywhere = Tissue(np.zeros((20, 20), bool), 10.0)
    assert not roi.tissue(everywhere).mask.any()


def test_the_outline_of_tissue_keeps_holes_and_thin_parts():
    mask = np.zeros((30, 40), bool)
    mask[5:25, 5:25] = True
    mask[10:15, 10:15] = False
    mask[2, 30:38] = True
    polygons = outline(Tissue(mask, 8.0))
    assert len(polygons) == 2 and sorted(len(one.interiors) for one in polygons) == [0, 1]
    whole = max(polygons, key=lambda one: one.area)
    assert whole.area == pytest.approx((20 * 20 - 5 * 5) * 64, rel=0.08)
    assert np.allclose(whole.bounds, (39.5, 39.5, 199.5, 199.5), atol=2.01) and parts_of(whole) == [whole]


def test_a_region_partly_outside_its_image_is_said(scanned, tmp_path, caplog):
    """Half of it lies beyond the left edge; what lies on the image counts."""
    _, flags = scanned
    write(tmp_path / "roi/a.tif.geojson", features(box(-300, 0, 300, 700)))
    succeed("predict.py", *flags, "--roi", tmp_path / "roi", "--out", tmp_path / "out")
    assert "50 % of the region lies outside the image and does not count" in caplog.text
    assert found(tmp_path / "out")[1]["region_mm2"] == pytest.approx(300 * 700 * UM**2 / 1e6, abs=1e-6)
    caplog.clear()
    write(tmp_path / "roi/a.tif.geojson", features(box(-2, 0, 300, 700)))
    succeed("predict.py", *flags, "--roi", tmp_path / "roi", "--out", tmp_path / "again")
    assert "outside" not in caplog.text
