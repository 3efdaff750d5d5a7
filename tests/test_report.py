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

from dasc.images.slides import open_slide, read_overview, read_square
from dasc.judge.density import per_mm2, poisson_interval
from dasc.judge.hotspot import Hotspot, find_hotspot
from dasc.report.page import PICTURE_PX, draw_heat_map, report_entry, write_report

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


def entry_of(slide, detections, um_per_px=2.0, note=""):
    mitoses = detections.loc[detections["mitosis"], ["x_px", "y_px"]].to_numpy(float)
    hotspot = find_hotspot(mitoses, slide.width, slide.height, um_per_px)
    tissue_mm2 = 0.9 * slide.width * slide.height * um_per_px**2 / 1e6
    low, high = poisson_interval(len(mitoses))
    facts = {"image": NAME, "mitoses": len(mitoses), "mitoses_low": low, "mitoses_high": high, "tissue_mm2": tissue_mm2}
    facts |= {"image_mm2": tissue_mm2 / 0.9, "mitoses_per_mm2": per_mm2(len(mitoses), tissue_mm2), "stain": "gray"}
    facts |= {"width_px": slide.width, "height_px": slide.height, "um_per_px": um_per_px, "um_per_px_source": "flag"}
    facts |= {"reader": slide.reader, "hotspot_mitoses": hotspot.mitoses, "stain_note": note}
    facts |= {"um_per_px_note": "", "hotspot_mm2": hotspot.area_mm2(um_per_px)}
    facts |= {"hotspot_x_px": hotspot.x_px, "hotspot_y_px": hotspot.y_px}
    overview, _ = read_overview(slide, 1, 1)
    return report_entry(slide, um_per_px, overview, detections, hotspot, facts, thumbnails=3)


def detections_of(*rows):
    table = pd.DataFrame(rows, columns=["x_px", "y_px", "probability", "mitosis"])
    return table.astype({"x_px": float, "y_px": float, "probability": float, "mitosis": bool})


@pytest.fixture(scope="module")
def page(slide, tmp_path_factory):
    found = detections_of((300, 200, 0.97, True), (1000, 700, 0.9, True), (330, 260, 0.4, False), (5, 5, 0.1, False))
    path = tmp_path_factory.mktemp("page") / "report.html"
    entries = [entry_of(slide, found), entry_of(slide, found[:0], um_per_px=0.25, note="it is <i>gray")]
    settings = {"seconds": 8, "command": ["predict.py", "--out", "a <i>b"], "versions": {"torch": "<i>2"}}
    write_report(
        path, entries, {"<b>broken</b>.svs": "cannot be <i>read</i>"}, ["F1 <i>0.5"], 0.5, "not calibrated", settings
    )
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


def test_a_small_image_has_neither_hotspot_nor_density(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("there is no hotspot to choose") == 1 and "No detections." in text
    large, small = (" ".join(part.split()) for part in text.split("</h2>\n")[-3:-1])
    assert "2 mitoses (95 % interval 0.2 to 7.2) in 3.89 mm² of tissue, 0.51 per mm². The whole image has 4.32" in large
    assert "0 mitoses (95 % interval 0.0 to 3.7) in 0.06 mm² of tissue: too little for a density." in small
    assert "per mm²" not in small


def test_warnings_stand_first_and_beside_their_image(page):
    text = page.read_text(encoding="utf-8")
    assert text.index('id="warnings"') < text.index("<table") and text.count("it is &lt;i&gt;gray") == 2
    beside = text.split("</h2>")
    assert ["it is &lt;i&gt;gray" in part for part in beside] == [True] + [False] * (len(beside) - 3) + [True, False]


def test_how_good_the_detections_are_is_shown(page):
    assert "<li>F1 &lt;i&gt;0.5</li>" in page.read_text(encoding="utf-8")


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


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium, or Chrome")
def test_a_phone_shows_all_of_it_and_breaks_no_short_name(slide, tmp_path):
    """390 px wide: nothing but the table reaches beyond the screen, and that scrolls; a name of one line stays one."""
    found = detections_of((300, 200, 0.97, True))
    entries = [entry_of(slide, found) | {"image": name} for name in ("H05_00Aa.tiff", "long_name_" * 30)]
    write_report(tmp_path / "report.html", entries, {}, [], 0.5, "not calibrated", {"command": "a" * 300})
    measure = """<iframe src="report.html" style="width:390px;height:900px"></iframe><pre id="said"></pre><script>
    document.querySelector("iframe").onload = event => { const page = event.target.contentDocument
    const names = [...page.querySelectorAll(".name")].map(name => name.getClientRects()[0].height)
    document.getElementById("said").textContent = [page.documentElement.scrollWidth, page.documentElement.clientWidth,
    page.querySelector(".wide").scrollWidth > page.querySelector(".wide").clientWidth, ...names].join(" ") }</script>"""
    (tmp_path / "phone.html").write_text(measure)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--allow-file-access-from-files", "--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "phone.html").as_uri()], capture_output=True, timeout=120, text=True)
    wide, screen, scrolls, short, long = re.search(r'<pre id="said">(.+?)</pre>', done.stdout)[1].split()
    assert int(wide) <= int(screen) <= 390 and scrolls == "true"
    assert float(short) < 30 < float(long)


@pytest.mark.skipif(CHROMIUM is None or not shutil.which("pdftotext"), reason="needs chromium and poppler-utils")
def test_no_heading_stands_alone_at_the_end_of_a_printed_page(slide, tmp_path):
    found = detections_of(*((x, 200, 0.9, True) for x in range(100, 1100, 70)))
    entries = [entry_of(slide, found) | {"image": f"Heading {number}"} for number in range(8)]
    write_report(tmp_path / "report.html", entries, {}, [], 0.5, "not calibrated", {"command": "a"})
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'report.pdf'}"]
    subprocess.run([*command, (tmp_path / "report.html").as_uri()], check=True, capture_output=True, timeout=120)
    text = subprocess.run(["pdftotext", "-layout", tmp_path / "report.pdf", "-"], capture_output=True, text=True).stdout
    pages = [page.split("\n") for page in text.split("\f") if page.strip()]
    last = [[line for line in page if line.strip()][-1] for page in pages]
    assert len(pages) > 3 and not [
        line for line in last if re.match("Heading|The .* strongest|Red frame|Settings", line)
    ]
    for page in pages:  # the sentence under a heading has its pictures on the same page
        lines = "\n".join(page)
        assert lines.count("of tissue,") == lines.count("Where the mitoses lie")
