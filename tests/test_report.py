"""The report is one page that a browser shows without a network, with every name escaped and every picture in it."""

import base64
import io
import re
import shutil
import subprocess

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from dasc.images.slides import open_slide, read_overview
from dasc.judge.hotspot import Hotspot, find_hotspot
from dasc.report.page import PICTURE_PX, draw_heat_map, read_square, report_entry, write_report

NAME = "<script>alert(1)</script> & \"quoted\" 'ü'.svs"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    image = np.full((900, 1200, 3), (230, 190, 215), np.uint8)
    for x, y in ((300, 200), (330, 260), (1000, 700)):
        cv2.circle(image, (x, y), 20, (20, 200, 20), -1)
    path = tmp_path_factory.mktemp("report") / "a.png"
    Image.fromarray(image).save(path)
    with open_slide(path) as slide:
        yield slide


def entry_of(slide, detections, um_per_px=2.0):
    mitoses = detections.loc[detections["mitosis"], ["x_px", "y_px"]].to_numpy(float)
    hotspot = find_hotspot(mitoses, slide.width, slide.height, um_per_px)
    facts = {"image": NAME, "mitoses": len(mitoses), "area_mm2": 4.32, "mitoses_per_mm2": len(mitoses) / 4.32}
    facts |= {"area_of": "image", "width_px": slide.width, "height_px": slide.height, "um_per_px": um_per_px}
    facts |= {"um_per_px_source": "flag", "reader": slide.reader, "hotspot_mitoses": hotspot.mitoses}
    facts |= {"hotspot_mm2": hotspot.area_mm2(um_per_px), "hotspot_x_px": hotspot.x_px, "hotspot_y_px": hotspot.y_px}
    overview, _ = read_overview(slide, 1, 1)
    return report_entry(slide, um_per_px, overview, detections, hotspot, facts, thumbnails=3)


def detections_of(*rows):
    table = pd.DataFrame(rows, columns=["x_px", "y_px", "probability", "mitosis"])
    return table.astype({"x_px": float, "y_px": float, "probability": float, "mitosis": bool})


@pytest.fixture(scope="module")
def page(slide, tmp_path_factory):
    found = detections_of((300, 200, 0.97, True), (1000, 700, 0.9, True), (330, 260, 0.4, False), (5, 5, 0.1, False))
    path = tmp_path_factory.mktemp("page") / "report.html"
    entries = [entry_of(slide, found), entry_of(slide, found[:0], um_per_px=0.25)]
    settings = {"seconds": 8, "command": ["predict.py", "--out", "a <i>b"], "versions": {"torch": "<i>2"}}
    write_report(path, entries, {"<b>broken</b>.svs": "cannot be <i>read</i>"}, 0.5, "not calibrated", settings)
    return path


def pictures(text):
    return [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    ]


def test_names_are_escaped_and_nothing_is_fetched(page):
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "<i>" not in text and "&lt;script&gt;alert(1)" in text
    assert "&lt;b&gt;broken&lt;/b&gt;.svs" in text
    sources = re.findall(r'(?:src|href)="([^"]{1,12})', text)
    assert sources and all(source.startswith(("data:image/j", "#image")) for source in sources)
    assert "http:" not in text and "https:" not in text and "url(" not in text


def test_settings_can_be_read(page):
    text = page.read_text(encoding="utf-8")
    for shown in ("<dd>8</dd>", "<dd>predict.py --out a &lt;i&gt;b</dd>", "<dd>torch: &lt;i&gt;2</dd>"):
        assert shown in text


def test_every_picture_can_be_seen(page):
    shown = pictures(page.read_text(encoding="utf-8"))
    assert len(shown) == 2 + 3 + 2  # heat map and hotspot of each image, three thumbnails of the first
    for picture in shown:
        picture.load()
        assert max(picture.size) <= PICTURE_PX
    for thumbnail in shown[2:5]:
        red, green, blue = np.asarray(thumbnail)[56, 56]
        assert green > red and green > blue  # the detection is in the middle


def test_a_small_image_says_that_it_has_no_hotspot(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("there is no hotspot to choose") == 1 and "No detections." in text


def test_thumbnails_show_the_place_at_every_level(slide):
    for side_px, size in ((40, 80), (100, 100), (400, 50)):
        square = read_square(slide, 300, 200, side_px, size)
        assert square.shape == (size, size, 3) and (square[size // 2, size // 2] == (20, 200, 20)).all()
    corner = read_square(slide, 0, 0, 100, 100)
    assert (corner[:49, :49] == 255).all() and (corner[52:, 52:] == (230, 190, 215)).all()


def test_the_heat_map_is_reddest_where_mitoses_are_densest(slide):
    overview, _ = read_overview(slide, 1, 1)
    points = np.array([[300.0, 200], [330, 260], [1000, 700]])
    heated, densest = draw_heat_map(overview, points, Hotspot(0, 0, 1200, 900, 3, True), 1200, 2.0)
    plain, none = draw_heat_map(overview, np.empty((0, 2)), Hotspot(0, 0, 1200, 900, 0, True), 1200, 2.0)
    row, column = np.unravel_index((plain.astype(int) - heated)[:, :, 2].argmax(), plain.shape[:2])
    assert np.hypot(column / 800 * 1200 - 315, row / 800 * 1200 - 230) < 60
    assert densest > 2 and none == 0


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium, or Chrome")
def test_a_browser_shows_it_without_a_network(page, tmp_path):
    shot = tmp_path / "shot.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1200,1500", f"--screenshot={shot}"]
    subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(shot) as picture:
        seen = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    for colour, least in (((230, 190, 215), 20_000), ((20, 200, 20), 500), ((255, 255, 255), 100_000)):
        assert (np.abs(seen - colour).max(axis=1) < 25).sum() > least, colour
    command[-1] = "--dump-dom"
    dom = subprocess.run([*command, page.as_uri()], check=True, capture_output=True, timeout=120, text=True).stdout
    assert dom.count("<tr>") == 3 and "&lt;script&gt;alert(1)&lt;/script&gt;" in dom and "<script" not in dom
