"""Folders and files as people have them: what is read, left out or refused is right, and said."""

import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import tifffile
from broken import tissue
from dicom_slide import write_dicom
from PIL import Image
from pipeline import ROOT, call, fails, succeed

from dasc.errors import InputError
from dasc.files import sha256
from dasc.images.find import list_images
from dasc.images.parts import content_sha256, dicom_series, parts_of
from dasc.images.resolution import read_stated
from dasc.images.slides import open_slide

IMAGE = tissue(200, 300)
QUARTER = {"resolution": (40_000, 40_000), "resolutionunit": 3}  # 0.25 um/px
PIXELS = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}


def write(path, image=IMAGE, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, image, **{"photometric": "rgb", "metadata": None} | options)
    return path


def write_ome(path, *images):
    """Images of an OME-TIFF: pixels, name, um/px."""
    with tifffile.TiffWriter(path, ome=True) as writer:
        for image, name, um_per_px in images:
            sides = {f"PhysicalSize{axis}": um_per_px for axis in "XY"}
            writer.write(image.copy(), photometric="rgb", metadata={"Name": name, **sides})
    return path


def picture(path, side=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(IMAGE[:side, :side].copy()).save(path)


def flags(small_run, out, **more):
    named = ["--model_path", small_run / "NS/model.pt", "--device", "cpu", "--views", 1, "--thumbnails", 1]
    return [*named, "--out", out, *(word for name, value in more.items() for word in (f"--{name}", value))]


def counts_of(out):
    return pd.read_csv(out / "counts.csv", keep_default_na=False).set_index("image")


# Identity


def test_another_image_of_the_same_name_and_length_is_not_resumed(small_run, tmp_path):
    one, other = (write(tmp_path / name / "field1.tif", **QUARTER) for name in "AB")
    data = bytearray(other.read_bytes())
    data[-1000] ^= 64
    other.write_bytes(data)
    assert one.stat().st_size == other.stat().st_size
    out = tmp_path / "out"
    succeed("predict.py", *flags(small_run, out, images=one))
    assert (out / "field1.tif/overlay.png").is_file()
    assert counts_of(out)["image_sha256"].tolist() == [sha256(one)]
    done = fails("predict.py", *flags(small_run, out, images=other), "--resume", says="is the scan of another image")
    assert sha256(one)[:12] in done.err and sha256(other)[:12] in done.err
    assert not (out / "field1.tif/overlay.png").exists()  # of the other image
    scanned = (out / "field1.tif/scan.json").stat().st_mtime_ns
    succeed("predict.py", *flags(small_run, out, images=one), "--resume")
    assert (out / "field1.tif/scan.json").stat().st_mtime_ns == scanned  # gone on with
    succeed("predict.py", *flags(small_run, out, images=other))
    assert counts_of(out)["image_sha256"].tolist() == [sha256(other)]


def test_the_content_of_a_slide_of_many_files_is_all_of_them(tmp_path):
    slide = tmp_path / "a.mrxs"
    slide.write_bytes(b"overview")
    for name in ("Slidedat.ini", "Data0000.dat"):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"one")
    before = content_sha256(slide)
    assert before == content_sha256(slide) != sha256(slide)
    (tmp_path / "a/Data0000.dat").write_bytes(b"two")
    assert content_sha256(slide) != before
    (tmp_path / "b.vms").write_text("[Virtual Microscope Specimen]\nImageFile=b.jpg\nMapFile=../b_map.jpg\n")
    for name in ("b.jpg", "b_map.jpg"):
        picture(tmp_path / name)
    assert parts_of(tmp_path / "b.vms")[1:] == [tmp_path / "b.jpg", tmp_path / "b_map.jpg"]
    listing = list_images([tmp_path])
    assert listing.images == [slide, tmp_path / "b.vms"] and listing.words() == "2 parts of a slide that is read"


def test_an_image_that_is_skipped_keeps_no_files_of_an_earlier_run(small_run, tmp_path):
    image, out = write(tmp_path / "images/a.tif", **QUARTER), tmp_path / "out"
    write(tmp_path / "images/b.tif", **QUARTER)
    succeed("predict.py", *flags(small_run, out, images=image.parent))
    left = {path.name for path in (out / "a.tif").iterdir()}
    assert left == {"detections.geojson", "mitotic-figures.json", "overlay.png", "scan.json"}
    image.write_bytes(image.read_bytes()[:3000])
    assert call("predict.py", *flags(small_run, out, images=image.parent), "--resume").status == 1
    assert {path.name for path in (out / "a.tif").iterdir()} == {"scan.json"}  # it says of which content it is
    os.utime(out / "a.tif/scan.json", (0, 0))  # older than this process, in which all runs of a test are
    assert call("predict.py", *flags(small_run, out, images=image.parent)).status == 1
    assert not list((out / "a.tif").iterdir()) and (out / "b.tif/overlay.png").is_file()


# What lies in a folder


def test_results_are_never_images(small_run, tmp_path, monkeypatch):
    """`cd slides; predict.py --images . --out results`, again and into another folder; patches and plots beside."""
    write(tmp_path / "a.tif", **QUARTER)
    monkeypatch.chdir(tmp_path)
    first = succeed("predict.py", *flags(small_run, "results", images="."))
    assert "left out" not in first.out
    shutil.copytree(small_run / "patches", tmp_path / "patches")
    shutil.copytree(small_run / "NS", tmp_path / "NS")
    left = sum(path.suffix == ".png" for folder in ("patches", "NS") for path in (tmp_path / folder).rglob("*"))
    assert left > 300
    for out, own in (("results", 1), ("second", 1), ("third", 2)):
        done = succeed("predict.py", *flags(small_run, out, images="."))
        assert f"left out of the folders: {left + own} images that DASC wrote\n" in done.out
        assert counts_of(tmp_path / out).index.tolist() == ["a.tif"]
    fails("predict.py", *flags(small_run, ".", images="."), says="a file, where the results of a.tif belong")


def test_tiles_and_thumbnails_are_left_out_and_counted(tmp_path):
    for name in ("a.png", "a_thumbnail.png", "a.png-label.jpg", "b_label.png", "thumbs/c.png", "@eaDir/d.jpg"):
        picture(tmp_path / name)
    for name in ("a_files/0/0_0.png", "a_files/1/0_0.png", "other_files/e.png", "zoom/TileGroup0/0-0-0.jpg"):
        picture(tmp_path / name)
    (tmp_path / "a.dzi").write_text("<Image/>")
    (tmp_path / "zoom/ImageProperties.xml").write_text("<IMAGE_PROPERTIES/>")
    listing = list_images([tmp_path])
    kept = ["a.png", "b_label.png", "other_files/e.png"]
    assert [path.relative_to(tmp_path).as_posix() for path in listing.images] == kept
    assert listing.left_out == {
        "files that are no images": 2,
        "tiles of a viewer": 3,
        "thumbnails, labels or overviews of another image": 4,
    }
    assert not listing.skipped


OTHERS = {
    "slide.VSI": (b"", "a slide of Olympus (.VSI)"),
    "slide.isyntax": (b"", "a slide of Philips (.isyntax)"),
    "photo.webp": (b"RIFF1234WEBPVP8 ", "an image (.webp)"),
    "photo": (b"GIF89a", "an image of another kind"),
    "photo.heic": (b"", "an image (.heic)"),
    "photo.jp2": (b"", "an image (.jp2)"),
    "lfs.tif": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        "a git-lfs pointer, not the image itself",
    ),
    "page.svs": (b"\xef\xbb\xbf\n<!DOCTYPE html><html>Sign in</html>", "a web page (HTML), not an image"),
    "xml.svs": (b'<?xml version="1.0"?>\n<html xmlns="x">', "a web page (HTML), not an image"),
    "empty.svs": (b"", "the file is empty (0 bytes)"),
    "packed.tif": (b"PK\3\4....", "a ZIP archive; unpack it"),
    "scan.dcm": (bytes(128) + b"DICM" + bytes(40), "a DICOM file that OpenSlide does not read as a slide"),
}


def test_what_is_not_read_is_named_counted_and_why(small_run, tmp_path):
    folder = tmp_path / "images"
    write(folder / "a.tif", **QUARTER)
    for name, (data, _) in OTHERS.items():
        (folder / name).write_bytes(data)
    (folder / "store.zarr").mkdir()
    (folder / "gone.svs").symlink_to(tmp_path / "nowhere.svs")
    (folder / "notes.txt").write_text("no image")
    tifffile.imwrite(folder / "gray.tif", np.moveaxis(IMAGE, -1, 0), photometric="minisblack", metadata=None)
    words = {name: says for name, (_, says) in OTHERS.items()}
    words |= {"store.zarr": "OME-Zarr is not read", "gone.svs": "a link that leads nowhere", "gray.tif": "3 gray pages"}
    done = call("predict.py", *flags(small_run, tmp_path / "out", images=folder))
    assert done.status == 1 and f"{len(words)} images skipped" in done.out
    assert "left out of the folders: 1 files that are no images" in done.out
    skipped = json.loads((tmp_path / "out/run.json").read_text())["skipped"]
    assert skipped.keys() == words.keys()
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    for name, says in words.items():
        assert says in skipped[name], skipped[name]
        assert f"{name}: skipped: " in done.out and f"skipped {name}: " in done.err and name in page
    assert counts_of(tmp_path / "out").index.tolist() == ["a.tif"]
    (folder / "a.tif").unlink()
    fails("predict.py", *flags(small_run, tmp_path / "none", images=folder), says=f"none of the {len(words)} images")


def test_a_dicom_slide_is_listed_once(small_run, tmp_path):
    image = np.tile(IMAGE, (2, 2, 1))
    folder = tmp_path / "dicom"
    folder.mkdir()
    write_dicom(folder / "b.dcm", image, "1.2.3.4", "1.2.3.4.1", 0.25)
    write_dicom(folder / "a", image[::4, ::4], "1.2.3.4", "1.2.3.4.2", 1.0)  # known by its bytes
    write_dicom(folder / "c.dcm", IMAGE, "1.2.3.5", "1.2.3.5.1", 0.25)
    assert dicom_series(folder / "b.dcm") == "1.2.3.4"  # not that of the sequence before it
    for asked in ([folder], sorted(folder.iterdir())):
        out = tmp_path / f"out{len(asked)}"
        succeed("predict.py", *flags(small_run, out), "--images", *asked)
        counts = counts_of(out)
        assert counts.index.tolist() == ["a", "c.dcm"] and counts["width_px"].tolist() == [600, 300]
        assert (counts["um_per_px"] == 0.25).all() and counts["reader"].str.contains("dicom").all()
    assert counts.loc["a", "image_sha256"] == content_sha256(folder / "b.dcm")
    with open_slide(folder / "a") as slide:
        region = slide.read_region(0, 50, 60, 200, 100).astype(int)
    assert np.abs(region - image[60:160, 50:250]).mean() < 3


# Several images in one file


def test_the_largest_image_of_a_file_is_read(small_run, tmp_path):
    """The macro photograph first, and one that is larger than the image but says what it is."""
    large = np.tile(IMAGE, (2, 2, 1))
    write_ome(tmp_path / "a.ome.tif", (IMAGE[:100, :120], "overview of it", 16.0), (IMAGE, "scan", 0.5))
    write_ome(tmp_path / "b.ome.tif", (large, "macro", 16.0), (IMAGE, "scan", 0.5))
    succeed(
        "predict.py", *flags(small_run, tmp_path / "out"), "--images", tmp_path / "a.ome.tif", tmp_path / "b.ome.tif"
    )
    counts = counts_of(tmp_path / "out")
    assert counts["width_px"].tolist() == [300, 300] and counts["um_per_px"].tolist() == [0.5, 0.5]


def test_several_images_of_one_order_are_refused_and_named(small_run, tmp_path):
    write_ome(tmp_path / "two.tif", (IMAGE[:150], "left", 0.5), (IMAGE, "right", 0.5))
    tifffile.imwrite(
        tmp_path / "depths.tif", np.stack([IMAGE] * 4), photometric="rgb", metadata={"axes": "ZYXS"}, ome=True
    )
    channels = np.stack([IMAGE[..., 0]] * 4)
    tifffile.imwrite(tmp_path / "dyes.tif", channels, photometric="minisblack", metadata={"axes": "CYX"}, ome=True)
    says = {
        "two.tif": "several images of one order (left: 300 x 150 px, right: 300 x 200 px)",
        "depths.tif": "several images (4 depths (Z), axes ZYXS, shape (4, 200, 300, 3))",
        "dyes.tif": "several images (4 channels (C), axes CYX",
    }
    done = call("predict.py", *flags(small_run, tmp_path / "out", images=tmp_path))
    assert done.status == 1
    for name, words in says.items():
        assert f"{name}: cannot be read: holds {words}" in done.err


# Resolution

APERIO = "Aperio Image Library v11.2.1\r\n{} [0,100 {}] (256x256) JPEG/RGB Q=30|AppMag = 40|MPP = {}"
STATED = {
    "tags": ({**QUARTER}, 0.25, ""),
    "ome": ({"metadata": PIXELS, "ome": True}, 0.5, ""),
    "ome nm": (
        {"metadata": {"PhysicalSizeX": 500.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.5}, "ome": True},
        0.5,
        "",
    ),
    "ome px": ({"metadata": {"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "pixel"}, "ome": True}, None, ""),
    "ome and tags": (
        {"metadata": PIXELS, "ome": True, **QUARTER},
        0.5,
        "OME: 0.5 um/px, the TIFF tags: 0.25; OME is taken",
    ),
    "imagej": ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "um"}}, 0.25, ""),
    "imagej micron": ({"imagej": True, "resolution": (2, 2), "metadata": {"unit": "micron"}}, 0.5, ""),
    "imagej escape": ({"imagej": True, "resolution": (2, 2), "metadata": {"unit": "\\u00B5m"}}, 0.5, ""),
    "imagej mm": ({"imagej": True, "resolution": (4000, 4000), "metadata": {"unit": "mm"}}, 0.25, ""),
    "imagej pixel": ({"imagej": True, "resolution": (4, 4), "metadata": {"unit": "pixel"}}, None, ""),
    "aperio": ({"description": APERIO.format("400x300", "300x200", 0.5)}, 0.5, ""),
    "aperio and tags": (
        {"description": APERIO.format("400x300", "300x200", 0.5), **QUARTER},
        0.5,
        "Aperio's MPP: 0.5 um/px, the TIFF tags: 0.25; Aperio's MPP is taken",
    ),
    "old aperio": (
        {"description": APERIO.format("800x500", "600x400", 0.25)},
        None,
        "Aperio's text is of 600 x 400 px, the image has 300 x 200: its MPP 0.25 may be old",
    ),
    "old aperio, same tags": (
        {"description": APERIO.format("800x500", "600x400", 0.25), **QUARTER},
        None,
        "Aperio's text is of 600 x 400 px, the image has 300 x 200: its MPP 0.25 may be old",
    ),
    "old aperio, own tags": (
        {"description": APERIO.format("800x500", "600x400", 0.125), **QUARTER},
        0.25,
        "Aperio's text is of 600 x 400 px, the image has 300 x 200: its MPP 0.125 may be old; the TIFF tags' 0.25 is "
        "taken",
    ),
    "absurd": ({"resolution": (72, 72), "resolutionunit": 2}, None, "TIFF tags: 352.778 um/px"),
}


@pytest.mark.parametrize("name", STATED)
def test_what_a_file_states(tmp_path, name):
    options, um_per_px, note = STATED[name]
    stated = read_stated(write(tmp_path / "a.tif", **options))
    assert stated.note == note and stated.um_per_px == (um_per_px and pytest.approx(um_per_px))


def test_a_slide_with_an_old_text_asks_for_its_resolution(small_run, tmp_path):
    """OpenSlide takes the MPP of any Aperio text; a smaller copy keeps the text."""
    path = tmp_path / "small.svs"
    write(path, tile=(128, 128), compression="jpeg", description=APERIO.format("800x500", "600x400", 0.25))
    done = fails("predict.py", *flags(small_run, tmp_path / "out", images=path), says="give it with --um_per_px")
    assert (
        "(the file says Aperio's text is of 600 x 400 px, the image has 300 x 200: its MPP 0.25 may be old)" in done.err
    )
    succeed("predict.py", *flags(small_run, tmp_path / "out", images=path, um_per_px=0.5))
    row = counts_of(tmp_path / "out").loc["small.svs"]
    assert "aperio" in row["reader"] and row["um_per_px_source"] == "flag" and "may be old" in row["um_per_px_note"]


def test_the_flag_fills_gaps_and_contradictions_are_said(small_run, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "out"
    write(folder / "states.tif", resolution=(1e4 / 0.499,) * 2, resolutionunit=3)
    write(folder / "near.tif", resolution=(1e4 / 0.252,) * 2, resolutionunit=3)
    picture(folder / "plain.png", 150)

    def run(*more):
        done = succeed("predict.py", *flags(small_run, out, images=folder), *more)
        table = counts_of(out)
        assert table["um_per_px_note"].map(lambda note: not note or note in done.err).all()
        return {
            name: (round(row.um_per_px, 3), row.um_per_px_source, row.um_per_px_note) for name, row in table.iterrows()
        }

    note = "the file states 0.499 um/px, which is taken; the flag says 0.25 (--insist_um_per_px takes that)"
    filled = {"near.tif": (0.252, "file", ""), "plain.png": (0.25, "flag", ""), "states.tif": (0.499, "file", note)}
    assert run("--um_per_px", 0.25) == filled
    insisted = run("--um_per_px", 0.25, "--insist_um_per_px")
    note = "the flag says 0.25 um/px, which is taken; the file states 0.499"
    assert insisted["states.tif"] == (0.25, "flag", note) and insisted["near.tif"] == (0.25, "flag", "")
    table = tmp_path / "resolutions.csv"
    table.write_text(f"image,um_per_px\nplain.png,0.3\n{folder / 'states.tif'},0.5\n")
    assert run("--um_per_px", table) == filled | {"plain.png": (0.3, "flag", ""), "states.tif": (0.499, "file", "")}
    fails("predict.py", *flags(small_run, out, images=folder), "--insist_um_per_px", says="nothing to insist on")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file; expected a number, or a CSV image,um_per_px"),
        ("image,um_per_px\nb.tif,0.25\n", "none of its 1 rows names an image of this run, such as 'a.tif'"),
        ("image,um_per_px\na.tif,0.25\na.tif,0.5\n", "rows 2 and 3: image a.tif stands in it twice"),
        ("image,um_per_px\na.tif,\n", "row 2: um_per_px is nan, expected a number above 0"),
        ("image,um_per_px\na.tif,quarter\n", "row 2: um_per_px is 'quarter', expected a number"),
        ("image\na.tif\n", "column um_per_px is missing"),
    ],
)
def test_a_table_of_resolutions_that_is_none(small_run, tmp_path, content, says):
    image, table = write(tmp_path / "a.tif"), tmp_path / "resolutions.csv"
    if content is not None:
        table.write_text(content)
    fails("predict.py", *flags(small_run, tmp_path / "out", images=image, um_per_px=table), says=says)
    assert not (tmp_path / "out").exists()


def test_a_number_may_stand_in_the_constant(small_run, tmp_path):
    text = (ROOT / "predict.py").read_text(encoding="utf-8")
    edited = ROOT / "tests" / f".{tmp_path.name}.py"
    assert 'UM_PER_PX: NumberOrTable = ""' in text
    try:
        edited.write_text(
            text.replace('UM_PER_PX: NumberOrTable = ""', "UM_PER_PX: NumberOrTable = 0.25"), encoding="utf-8"
        )
        succeed(
            edited.relative_to(ROOT).as_posix(), *flags(small_run, tmp_path / "out", images=write(tmp_path / "a.tif"))
        )
    finally:
        edited.unlink()
    assert counts_of(tmp_path / "out")["um_per_px"].tolist() == [0.25]


# Flags


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--data_root", "x"], "--data_root x: has no effect without --dataset"),
        (["--split", "val"], "--split val: has no effect without --dataset"),
        (["--val", "A"], "--val A: has no effect without --dataset"),
        (["--test", "A"], "--test A: has no effect without --dataset"),
        (["--dataset", "table", "--data_root", "x", "--images", "y"], "--images: has no effect with --dataset"),
    ],
)
def test_a_flag_without_effect_is_refused(small_run, tmp_path, given, says):
    fails("predict.py", *flags(small_run, tmp_path / "out"), *given, says=says)
    assert not (tmp_path / "out").exists()


def test_no_image_is_an_error_that_says_what_was_there(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=r"no image in this folder; expected .*; left out: 1 files that are no images"):
        list_images([tmp_path])
