"""report.html: what was found in every image, in one page that needs no network and no other file."""

import base64
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np
import pandas as pd

from dasc.detect.image import warnings_of
from dasc.files import spelt_out, write_text
from dasc.images.slides import Slide, read_resized, read_square
from dasc.judge.density import SMALLEST_MM2
from dasc.judge.hotspot import WINDOW_MM2, Hotspot
from dasc.report.plots import DETECTION

PICTURE_PX = 800  # longest side of the heat map and of the hotspot's picture
THUMBNAIL_PX = 112  # side of a detection's picture
THUMBNAIL_UM = 32.0  # tissue it shows: the figure and its neighbours
HEAT_UM = 200.0  # Gaussian over which the density of mitoses is averaged; less in images that are not ten times as wide
CIRCLE_UM = 15.0  # radius of the circle round a mitosis in the hotspot
QUALITY = 85  # of the JPEGs in the page
TEMPLATE = Path(__file__).with_name("page.html")


def report_entry(
    slide: Slide,
    um_per_px: float,
    overview: np.ndarray,
    detections: pd.DataFrame,
    hotspot: Hotspot,
    facts: dict[str, Any],
    thumbnails: int,
) -> dict[str, Any]:
    """One image's part of the report, with its pictures: plain values and data URIs.

    overview: the whole image (h, w, 3) uint8, at any size. detections: x_px, y_px, probability, mitosis, strongest
    first. facts: its row of counts.csv. thumbnails: how many detections are shown.
    """
    mitoses_px = detections.loc[detections["mitosis"], ["x_px", "y_px"]].to_numpy(float)
    heat_map, densest = draw_heat_map(overview, mitoses_px, hotspot, slide.width, um_per_px)
    shown = [
        {
            "picture": _data_uri(read_square(slide, x, y, THUMBNAIL_UM / um_per_px, THUMBNAIL_PX)),
            "probability": probability,
            "x_px": x,
            "y_px": y,
            "mitosis": mitosis,
        }
        for x, y, probability, mitosis in detections[["x_px", "y_px", "probability", "mitosis"]]
        .head(thumbnails)
        .itertuples(index=False, name=None)
    ]
    pictures = {
        "heat_map": _data_uri(heat_map),
        "hotspot": _data_uri(draw_hotspot(slide, mitoses_px, hotspot, um_per_px)),
    }
    narrow = min(slide.width, slide.height) * um_per_px < 10 * HEAT_UM  # averaged over too small an area for a density
    found = {"detections": len(detections), "thumbnails": shown, "densest_per_mm2": None if narrow else densest}
    dense = None if np.isnan(facts["mitoses_per_mm2"]) else facts["mitoses_per_mm2"]
    return facts | pictures | found | {"whole": hotspot.whole, "dense": dense, "warnings": warnings_of(facts)}


def write_report(
    path: Path,
    entries: list[dict],
    skipped: dict[str, str],
    judged: list[str],
    threshold: float,
    calibration: str,
    settings: dict,
) -> None:
    """Write the page. Names and messages are escaped; the page forbids itself scripts and anything from outside.

    entries: as `report_entry`. skipped: images and why. judged: lines on how good the detections are; empty without
    annotations.
    """
    warnings: dict[str, list[str]] = {}
    for entry in entries:
        for text in entry["warnings"]:
            warnings.setdefault(text, []).append(entry["image"])
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        entries=entries,
        warnings=warnings,
        skipped=skipped,
        judged=judged,
        threshold=threshold,
        calibration=calibration,
        settings=settings,
        window_mm2=f"{WINDOW_MM2:g}",
        smallest_mm2=f"{SMALLEST_MM2:g}",
    )
    write_text(path, spelt_out(page))


def draw_heat_map(
    overview: np.ndarray, mitoses_px: np.ndarray, hotspot: Hotspot, width_px: int, um_per_px: float
) -> tuple[np.ndarray, float]:
    """The overview with the density of the mitoses (N, 2) laid over it and the hotspot framed; the highest density.

    width_px, um_per_px: of the image at full resolution, in whose pixels the mitoses and the hotspot are.
    """
    scale = min(1.0, PICTURE_PX / max(overview.shape[:2]))
    size = max(1, round(overview.shape[1] * scale)), max(1, round(overview.shape[0] * scale))
    picture = cv2.resize(overview, size, interpolation=cv2.INTER_AREA)
    zoom = size[0] / width_px
    pixel_mm2 = (um_per_px / zoom) ** 2 / 1e6
    sigma = min(HEAT_UM / um_per_px * zoom, min(size) / 10)
    density = np.zeros(picture.shape[:2], np.float32)
    column, row = np.floor((mitoses_px + 0.5) * zoom).astype(int).T
    np.add.at(density, (row.clip(0, size[1] - 1), column.clip(0, size[0] - 1)), 1 / pixel_mm2)
    density = cv2.GaussianBlur(density, (0, 0), max(sigma, 1.0), borderType=cv2.BORDER_REFLECT)
    densest = float(density.max())
    share = (density / densest if densest else density)[:, :, None]
    heated = picture * (1 - 0.75 * share) + np.array([200, 0, 0]) * 0.75 * share
    picture = np.ascontiguousarray(heated.round().astype(np.uint8))
    left, top = round(hotspot.x_px * zoom), round(hotspot.y_px * zoom)
    right, bottom = left + round(hotspot.width_px * zoom) - 1, top + round(hotspot.height_px * zoom) - 1
    cv2.rectangle(picture, (left, top), (right, bottom), (20, 20, 160), 2)
    return picture, densest


def draw_hotspot(slide: Slide, mitoses_px: np.ndarray, hotspot: Hotspot, um_per_px: float) -> np.ndarray:
    """The hotspot with its mitoses (N, 2) circled, at most PICTURE_PX wide and high."""
    zoom = min(1.0, PICTURE_PX / max(hotspot.width_px, hotspot.height_px))
    corner = np.array([hotspot.x_px, hotspot.y_px])
    size = max(1, round(hotspot.width_px * zoom)), max(1, round(hotspot.height_px * zoom))
    picture = read_resized(slide, corner, (hotspot.width_px, hotspot.height_px), size)
    for x, y in ((mitoses_px + 0.5 - corner) * zoom).round().astype(int).tolist():
        for shade, line in (((0, 0, 0), 4), (DETECTION, 2)):
            cv2.circle(picture, (x, y), max(4, round(CIRCLE_UM / um_per_px * zoom)), shade, line, cv2.LINE_AA)
    return picture


def _data_uri(picture: np.ndarray) -> str:
    data = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode("ascii")
