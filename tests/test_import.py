"""Annotations of other programs: the same points whatever they were written with, and refusals that say why."""

import gzip
import json
import sqlite3
import zipfile

import numpy as np
import pandas as pd
import pytest
import tifffile
from broken import tissue
from pipeline import fails, succeed

from dasc.data.annotations import match_image, read_annotations
from dasc.data.datasets import read_dataset
from dasc.images.read import read_field, read_um_per_px
from dasc.report.export import half_sides, write_geojson

SCRIPT = "pre/import_annotations.py"
UM = 0.25
MITOSES, LOOK_ALIKES = [(20.25, 30.5), (60.0, 44.0)], [(80.5, 70.25)]  # px, (0, 0) the centre of the first pixel
NAMES = ["--mitosis", "Mitosis", "--look_alike", "Non-mitosis"]


def image(folder, name="a.tif", width=120, height=90):
    folder.mkdir(parents=True, exist_ok=True)
    options = {"photometric": "rgb", "resolution": (1e4 / UM,) * 2, "resolutionunit": 3}
    tifffile.imwrite(folder / name, tissue(height, width), **options)


def square(x, y, half=4.0):
    """A ring about a point, in pixels as viewers count."""
    x, y = x + 0.5, y + 0.5
    ring = [[x - half, y - half], [x + half, y - half], [x + half, y + half], [x - half, y + half]]
    return [*ring, ring[0]]


def feature(geometry, classification=None, **more):
    properties = {"objectType": "annotation"} | more.pop("properties", {})
    if classification is not None:
        properties["classification"] = classification
    return {"type": "Feature", "geometry": geometry, "properties": properties} | more


def dot(x, y):
    return {"type": "Point", "coordinates": [x + 0.5, y + 0.5]}


def geojson_now():
    """QuPath 0.4 and later: class with name or names, cells with a nucleus, objects within objects, point sets."""
    far = {"type": "Polygon", "coordinates": [square(90, 20, 8)]}
    cell = feature(
        far,
        {"name": "Mitosis", "color": [200, 0, 0]},
        nucleusGeometry={"type": "Polygon", "coordinates": [square(*MITOSES[0])]},
        properties={"objectType": "cell"},
    )
    spots = {"type": "MultiPoint", "coordinates": [[x + 0.5, y + 0.5] for x, y in MITOSES[1:]]}
    inner = feature(dot(*LOOK_ALIKES[0]), {"names": ["Non-mitosis"], "color": [0, 0, 200]})
    region = feature(far, {"name": "Tumor"}, properties={"childObjects": [feature(spots, {"name": "Mitosis"}), inner]})
    return {"type": "FeatureCollection", "features": [cell, region]}


def geojson_before():
    """QuPath before 0.4: a plain list, the kind of object as id, colours as one number, classes as plain strings."""
    old = {"name": "Mitosis", "colorRGB": -3670016}
    polygon = {"type": "Polygon", "coordinates": [square(*MITOSES[1])]}
    return [
        {"type": "Feature", "id": "PathAnnotationObject", "geometry": dot(*MITOSES[0]),
         "properties": {"classification": old, "isLocked": False, "measurements": []}},
        {"type": "Feature", "id": "PathAnnotationObject", "geometry": polygon,
         "properties": {"classification": "Mitosis"}},
        {"type": "Feature", "id": "PathDetectionObject", "geometry": dot(*LOOK_ALIKES[0]),
         "properties": {"classification": "Non-mitosis"}},
    ]  # fmt: skip


def write_geojsons(path, kind):
    text = json.dumps(geojson_before() if kind == "before" else geojson_now())
    if kind == "gz":
        path.with_name("a.geojson.gz").write_bytes(gzip.compress(text.encode()))
    elif kind == "zip":
        with zipfile.ZipFile(path.with_name("a.zip"), "w") as archive:
            archive.writestr("a.geojson", text)
    else:
        path.with_name("a.tif.geojson").write_text(text, encoding="utf-8-sig" if kind == "bom" else "utf-8")


def write_tsv(path, unit="µm", encoding="utf-8", name="Class"):
    scale = 1 if unit == "px" else UM
    rows = [f"Image\tName\t{name}\tParent\tROI\tCentroid X {unit}\tCentroid Y {unit}"]
    for kind, points in (("Mitosis", MITOSES), ("Non-mitosis", LOOK_ALIKES)):
        rows += [f"a.tif\t\t{kind}\tRoot\tPoints\t{(x + 0.5) * scale}\t{(y + 0.5) * scale}" for x, y in points]
    path.with_name("measurements.tsv").write_bytes(("\r\n".join(rows) + "\r\n").encode(encoding))


def write_asap_file(path):
    (x, y), corners = MITOSES[0], square(*MITOSES[1])[:4]
    shapes = [f'<Coordinate Order="0" X="{x + 0.5}" Y="{y + 0.5}" />']
    shapes += ["".join(f'<Coordinate Order="{n}" X="{a}" Y="{b}" />' for n, (a, b) in reversed([*enumerate(corners)]))]
    shapes += [f'<Coordinate Order="0" X="{LOOK_ALIKES[0][0] + 0.5}" Y="{LOOK_ALIKES[0][1] + 0.5}" />']
    kinds = [("Dot", "Mitosis"), ("Polygon", "Mitosis"), ("PointSet", "Non-mitosis")]
    body = "".join(
        f'<Annotation Name="x" Type="{kind}" PartOfGroup="{group}"><Coordinates>{shape}</Coordinates></Annotation>'
        for (kind, group), shape in zip(kinds, shapes, strict=True)
    )
    text = f'<?xml version="1.0"?>\n<ASAP_Annotations><Annotations>{body}</Annotations></ASAP_Annotations>'
    path.with_name("a.xml").write_text(text)


def write_imagescope(path):
    def region(points, kind):
        vertices = "".join(f'<Vertex X="{a}" Y="{b}" Z="0" />' for a, b in points)
        return f'<Region Id="1" Type="{kind}" Text="" NegativeROA="0"><Vertices>{vertices}</Vertices></Region>'

    ring = square(*MITOSES[0])
    first = region(ring[:4], 0) + region([square(*MITOSES[1])[n] for n in (0, 2)], 2)
    second = region([[LOOK_ALIKES[0][0] + 0.5, LOOK_ALIKES[0][1] + 0.5]], 5)
    described = '<Attributes><Attribute Name="Description" Id="0" Value="Non-mitosis" /></Attributes>'
    text = (
        f'<Annotations MicronsPerPixel="0.25"><Annotation Id="1" Name="Mitosis"><Regions>{first}</Regions></Annotation>'
    )
    text += f'<Annotation Id="2" Name="">{described}<Regions>{second}</Regions></Annotation></Annotations>'
    path.with_name("a.xml").write_text(text)


def coco():
    boxes = [(1, *point) for point in MITOSES] + [(2, *point) for point in LOOK_ALIKES]
    annotations = [
        {"id": n, "image_id": 7, "category_id": kind, "bbox": [x + 0.5 - 5, y + 0.5 - 5, 10, 10]}
        for n, (kind, x, y) in enumerate(boxes)
    ]
    images = [{"id": 7, "file_name": "images/a.tif", "width": 120, "height": 90}]
    names = [{"id": 1, "name": "Mitosis"}, {"id": 2, "name": "Non-mitosis"}]
    return {"images": images, "annotations": annotations, "categories": names}


def write_sliderunner(path):
    with sqlite3.connect(path.with_name("all.sqlite")) as database:
        database.executescript(
            """CREATE TABLE Slides (uid INTEGER PRIMARY KEY, filename TEXT, width INTEGER, height INTEGER);
            CREATE TABLE Classes (uid INTEGER PRIMARY KEY, name TEXT, color TEXT);
            CREATE TABLE Annotations (uid INTEGER PRIMARY KEY, slide INTEGER, type INTEGER, agreedClass INTEGER,
                deleted INTEGER DEFAULT 0);
            CREATE TABLE Annotations_coordinates (uid INTEGER PRIMARY KEY, coordinateX INTEGER, coordinateY INTEGER,
                slide INTEGER, annoId INTEGER, orderIdx INTEGER);
            CREATE TABLE Annotations_label (uid INTEGER PRIMARY KEY, person INTEGER, class INTEGER, annoId INTEGER);
            INSERT INTO Slides VALUES (1, 'a.tif', 120, 90);
            INSERT INTO Classes VALUES (1, 'Mitosis', ''), (2, 'Non-mitosis', '');
            INSERT INTO Annotations VALUES (1, 1, 1, 1, 0), (2, 1, 5, 1, 0), (3, 1, 4, 0, 0), (4, 1, 1, 1, 1);
            INSERT INTO Annotations_label (person, class, annoId)
                VALUES (1, 1, 1), (2, 2, 1), (3, 1, 1), (1, 2, 3), (2, 2, 3);
            """
        )
        places = [
            (1, *MITOSES[0]),
            (2, MITOSES[1][0] - 25, MITOSES[1][1] - 25),
            (2, MITOSES[1][0] + 25, MITOSES[1][1] + 25),
        ]
        places += [(3, *LOOK_ALIKES[0]), (4, 5, 5)]
        rows = [(x, y, 1, uid, order) for order, (uid, x, y) in enumerate(places)]
        text = (
            "INSERT INTO Annotations_coordinates (coordinateX, coordinateY, slide, annoId, orderIdx) VALUES (?,?,?,?,?)"
        )
        database.executemany(text, rows)
    database.close()


WRITERS = {
    "QuPath": lambda path: write_geojsons(path, "now"),
    "QuPath before 0.4": lambda path: write_geojsons(path, "before"),
    "QuPath with a BOM": lambda path: write_geojsons(path, "bom"),
    "QuPath, gz": lambda path: write_geojsons(path, "gz"),
    "QuPath, zip": lambda path: write_geojsons(path, "zip"),
    "table in um": write_tsv,
    "table since 0.5": lambda path: write_tsv(path, name="Classification"),
    "table in px": lambda path: write_tsv(path, unit="px"),
    "table in Latin-1": lambda path: write_tsv(path, encoding="cp1252"),
    "ASAP": write_asap_file,
    "ImageScope": write_imagescope,
    "COCO": lambda path: path.with_name("boxes.json").write_text(json.dumps(coco())),
    "SlideRunner": write_sliderunner,
}


def imported(tmp_path, *flags):
    given = ["--annotations", tmp_path / "annotations", "--images", tmp_path / "images", "--out", tmp_path / "out"]
    return succeed(SCRIPT, *given, *flags)


def refused(tmp_path, *flags, says):
    given = ["--annotations", tmp_path / "annotations", "--images", tmp_path / "images", "--out", tmp_path / "out"]
    done = fails(SCRIPT, *given, *flags, says=says)
    assert not (tmp_path / "out").exists()
    return done


@pytest.fixture
def folders(tmp_path):
    image(tmp_path / "images")
    (tmp_path / "annotations").mkdir()
    return tmp_path


def points_of(folder, label):
    annotations = read_dataset("table", folder).annotations
    return sorted(map(tuple, annotations.loc[annotations["label"] == label, ["x_px", "y_px"]].to_numpy()))


@pytest.mark.parametrize("program", WRITERS)
def test_every_program_gives_the_same_points(program, folders):
    WRITERS[program](folders / "annotations/a")
    flags = ["--ignore", "Tumor"] if "QuPath" in program else ["--format", "coco"] if program == "COCO" else []
    done = imported(folders, *NAMES, *flags)
    assert "1 fields with 2 mitoses and 1 hard negatives" in done.out
    assert np.allclose(points_of(folders / "out", 1), MITOSES, atol=0.01)
    assert np.allclose(points_of(folders / "out", 0), LOOK_ALIKES, atol=0.01)
    fields = read_dataset("table", folders / "out").fields
    assert fields.iloc[0][["image", "case", "split", "um_per_px"]].tolist() == ["a", "a", "train", pytest.approx(UM)]
    assert (read_field(folders / "out" / fields["path"][0]) == read_field(folders / "images/a.tif")).all()


def test_votes_of_single_readers_are_kept(folders):
    write_sliderunner(folders / "annotations/a")
    imported(folders, *NAMES)
    votes = pd.read_csv(folders / "out/annotations.csv", keep_default_na=False)["votes"].tolist()
    assert votes == ["Mitosis;Non-mitosis;Mitosis", "", "Non-mitosis;Non-mitosis"]


def test_readers_that_disagree_are_a_class_of_their_own(folders):
    write_sliderunner(folders / "annotations/a")
    with sqlite3.connect(folders / "annotations/all.sqlite") as database:
        database.execute("UPDATE Annotations SET agreedClass = 0 WHERE uid = 1")
    database.close()
    refused(folders, *NAMES, says="'Disagreed': 1")


def test_our_own_geojson_comes_back(folders):
    """What predict.py writes for QuPath, read again without naming a class."""
    rng = np.random.default_rng(0)
    points = rng.uniform([0, 0], [119, 89], (40, 2))
    table = pd.DataFrame({"image": "a.tif", "x_px": points[:, 0], "y_px": points[:, 1], "probability": 0.5})
    table["mitosis"] = np.arange(40) < 25
    for halves in (None, half_sides(table, 120, 90, UM, 32.0)):
        write_geojson(folders / "annotations/a.tif/detections.geojson", table, halves=halves)
        imported(folders)
        for label in (0, 1):
            wanted = sorted(map(tuple, points[table["mitosis"] == bool(label)]))
            assert np.allclose(points_of(folders / "out", label), wanted, atol=0.01)


def test_a_cropped_slide_counts_from_where_its_scan_begins(folders):
    table = pd.DataFrame({"image": ["a"], "x_px": [70.0], "y_px": [50.0], "probability": [0.5], "mitosis": [True]})
    write_geojson(folders / "annotations/a.geojson", table, origin_px=(60, 30))
    (source,) = read_annotations(folders / "annotations/a.geojson")
    assert source.in_px(source.shapes[0], UM, (60, 30)).coords[0] == (70, 50)


def test_a_class_named_nowhere_is_listed_with_its_count(folders):
    write_geojsons(folders / "annotations/a", "now")
    done = refused(folders, "--mitosis", "mitosis ", says="class 'Non-mitosis', 'Tumor' is named nowhere")
    assert "'Mitosis': 2, 'Non-mitosis': 1, 'Tumor': 1" in done.err
    refused(folders, *NAMES, "--region", "mitosis", says="class 'mitosis' is named twice")
    refused(folders, "--mitosis", "Tumor", "--ignore", "Mitosis", "Non-mitosis", "--region", "x", says="no region of")
    refused(folders, "--mitosis", "x", "--ignore", "Mitosis", "Non-mitosis", "Tumor", says="no mitosis (class x)")


def test_a_file_of_no_image_says_what_was_looked_for(folders):
    (folders / "annotations/b.svs.geojson").write_text(json.dumps(geojson_now()))
    says = f"no image is called b.svs in {folders / 'images'}; expected one: b.svs, or b with a suffix of images"
    refused(folders, *NAMES, "--ignore", "Tumor", says=says)


def test_names_with_dots_are_not_taken_for_others(folders):
    image(folders / "images", "a.1.tif")
    names = ["a.tif", "a.1.tif"]
    files = [folders / "images" / name for name in names]
    assert match_image("a", files) == files[:1] and match_image("a.1", files) == files[1:]
    assert match_image("a.svs", files) == files[:1] and match_image("a.2", files) == []


def test_an_image_without_objects_is_not_annotated_unless_said(folders):
    image(folders / "images", "b.tif")
    write_geojsons(folders / "annotations/a", "now")
    (folders / "annotations/b.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    flags = [*NAMES, "--ignore", "Tumor"]
    assert "1 images left out as not annotated" in imported(folders, *flags).out
    assert read_dataset("table", folders / "out").fields["image"].tolist() == ["a"]
    assert "2 fields" in imported(folders, *flags, "--empty", "--val", "b").out
    assert read_dataset("table", folders / "out").fields["split"].tolist() == ["train", "val"]


def test_regions_become_fields(folders):
    """A rectangle as it is; of another shape what lies beyond it is white, and no annotation of it is kept."""
    box = [[10, 20], [70, 20], [70, 60], [10, 60], [10, 20]]
    triangle = [[70, 60], [110, 60], [110, 85], [70, 60]]
    features = [feature({"type": "Polygon", "coordinates": [ring]}, {"name": "Hotspot"}) for ring in (box, triangle)]
    features += [feature(dot(*point), {"name": "Mitosis"}) for point in [*MITOSES, (100, 70), (75, 80), (5, 5)]]
    (folders / "annotations/a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    done = imported(folders, "--mitosis", "Mitosis", "--region", "Hotspot")
    assert "2 fields with 3 mitoses" in done.out and "2 objects left out, outside the image or its regions" in done.out
    dataset, whole = read_dataset("table", folders / "out"), tissue()
    assert dataset.fields[["image", "case"]].to_numpy().tolist() == [["a_1", "a"], ["a_2", "a"]]
    first, second = (folders / "out" / path for path in dataset.fields["path"])
    assert (read_field(first) == whole[20:60, 10:70]).all() and read_um_per_px(first) == pytest.approx(UM)
    cut, seen = read_field(second), whole[60:85, 70:110]
    assert cut.shape == seen.shape and (cut[-1, 0] == 255).all() and (cut[3, 20] == seen[3, 20]).all()
    assert 0.45 < (cut == seen).all(axis=2).mean() < 0.6
    own = dataset.annotations.set_index("image")[["x_px", "y_px"]]
    assert np.allclose(own.loc["a_1"], np.array(MITOSES) - [10, 20]) and np.allclose(own.loc["a_2"], [30, 10])


def test_a_region_of_a_slide_never_needs_the_whole_slide(folders, monkeypatch):
    import dasc.images.slides as slides

    monkeypatch.setattr(slides, "IN_MEMORY", 100_000)
    options = {"photometric": "rgb", "tile": (64, 64), "resolution": (1e4 / UM,) * 2, "resolutionunit": 3}
    tifffile.imwrite(folders / "images/a.tif", tissue(640, 768), **options)
    read, own = [], slides.TiffSlide._read

    def watched(self, level, x, y, width, height):
        read.append(width * height)
        return own(self, level, x, y, width, height)

    monkeypatch.setattr(slides.TiffSlide, "_read", watched)
    features = [feature({"type": "Polygon", "coordinates": [square(299.5, 299.5, 50)]}, {"name": "Hotspot"})]
    features.append(feature(dot(300, 300), {"name": "Mitosis"}))
    (folders / "annotations/a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    flags = ["--mitosis", "Mitosis", "--whole_px", 20000]
    refused(folders, *flags, "--ignore", "Hotspot", says="annotate regions and name their class: --region NAME")
    imported(folders, *flags, "--region", "Hotspot")
    assert sum(read) == 10000 and points_of(folders / "out", 1) == [(50, 50)]
    small = ["--region", "Hotspot", "--mitosis", "Mitosis", "--whole_px", 9999, "--out", folders / "b"]
    paths = ["--annotations", folders / "annotations", "--images", folders / "images"]
    refused_out = fails(SCRIPT, *paths, *small, says="draw a smaller one")
    assert "100 x 100 px" in refused_out.err


def test_a_region_outside_its_image_names_both(folders):
    features = [feature({"type": "Polygon", "coordinates": [square(500, 500, 50)]}, {"name": "Hotspot"})]
    (folders / "annotations/a.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    done = refused(folders, "--region", "Hotspot", says="lies outside")
    assert "a.geojson, features[0]" in done.err and "a.tif of 120 x 90 px" in done.err


BOMB = """<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>
<ASAP_Annotations><Annotations><Annotation Name="&b;" /></Annotations></ASAP_Annotations>"""
BROKEN = {
    "entities": ("a.xml", BOMB, "EntitiesForbidden"),
    "other XML": ("a.xml", "<html></html>", "XML of 'html'"),
    "half XML": ("a.xml", "<ASAP_Annotations><Annotations>", "cannot be read as XML"),
    "no JSON": ("a.geojson", '{"type": "FeatureColl', "cannot be read as JSON"),
    "deep": ("a.geojson", "[" * 100_000, "nested too deeply"),
    "no geometry": ("a.geojson", '[{"type": "Feature", "geometry": null}]', "features[0]: expected a feature"),
    "infinite": ("a.geojson", '[{"geometry": {"type": "Point", "coordinates": [1e999, 1]}}]', "is no coordinate"),
    "two points": ("a.geojson", '[{"geometry": {"type": "Polygon", "coordinates": [[[1, 1], [2, 2]]]}}]', "of fewer"),
    "other geometry": ("a.geojson", '[{"geometry": {"type": "Circle", "coordinates": [1, 1]}}]', "geometry 'Circle'"),
    "unknown text": ("a.txt", "hello", "no annotations known here"),
    "half a table": ("a.tsv", "Image\tCentroid X px\n", "expected the columns Image, Class"),
    "a set of points": ("a.tsv", "Image\tClass\tCentroid X px\tCentroid Y px\tNum points\na.tif\tMitosis\t9\t9\t3\n",
                        "a set of points"),
    "half gz": ("a.geojson.gz", gzip.compress(b"[]" * 9999)[:-20], "cannot be read"),
    "no database": ("a.sqlite", b"SQLite format 3\0" + bytes(200), "cannot be read as a database"),
    "MIDOG's corners": ("a.json", json.dumps(coco() | {"annotations": [
        {"image_id": 7, "category_id": 1, "bbox": [10, 10, 60, 60]}]}), "give --format coco"),
    "boxes that leave": ("a.json", json.dumps(coco() | {"annotations": [
        {"image_id": 7, "category_id": 1, "bbox": [80, 20, 110, 50]}]}), "leaves its image"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_annotations_are_one_line(fault, folders):
    name, content, says = BROKEN[fault]
    data = content if isinstance(content, bytes) else content.encode()
    (folders / "annotations" / name).write_bytes(data)
    refused(folders, *NAMES, says=says)


def test_a_format_that_is_not_the_files_is_refused(folders):
    write_asap_file(folders / "annotations/a")
    refused(folders, *NAMES, "--format", "coco", says="--format coco, but its content is asap")
    (folders / "annotations/a.xml").unlink()
    refused(folders, *NAMES, says="no annotations in this folder")


def test_images_are_copied_where_no_link_can_be_made(folders, monkeypatch):
    def refuse(self, target):
        raise OSError("a required privilege is not held")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    write_asap_file(folders / "annotations/a")
    assert "a.tif: copied, since no link can be made here" in imported(folders, *NAMES).out
    copied = folders / "out/images/a.tif"
    assert not copied.is_symlink() and copied.read_bytes() == (folders / "images/a.tif").read_bytes()


def test_the_dataset_is_cut_by_stage_1(folders):
    """What was imported goes on as any dataset does."""
    write_asap_file(folders / "annotations/a")
    imported(folders, *NAMES)
    flags = ["--dataset", "table", "--data_root", folders / "out", "--out", folders / "patches", "--patch_size", 32]
    succeed("pre/cut_patch_2.py", *flags)
    patches = pd.read_csv(folders / "patches/patches.csv")
    cut = patches.groupby("origin").size()
    assert cut["annotated"] == 2 and cut["hard_negative"] == 1


def test_what_counts_twice_is_said(folders):
    """Two files of one image, and regions that share tissue."""
    write_asap_file(folders / "annotations/a")
    rings = [[[10, 20], [70, 20], [70, 60], [10, 60]], [[60, 20], [110, 20], [110, 85], [60, 85]]]
    regions = [feature({"type": "Polygon", "coordinates": [ring]}, {"name": "Hotspot"}) for ring in rings]
    (folders / "annotations/a.geojson").write_text(json.dumps(regions))
    done = imported(folders, *NAMES, "--region", "Hotspot")
    assert "1 images of several annotation files, which all count" in done.out
    assert "1 regions that overlap an earlier one: their nuclei are in both" in done.out
    assert "2 fields with 3 mitoses and 1 hard negatives" in done.out
