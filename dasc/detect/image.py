"""Scan one image, be it a field or a slide, and say what was counted in it."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd

from dasc.data.regions import Roi
from dasc.detect.field import scan_field
from dasc.detect.resume import SavedScan
from dasc.detect.slide import scan_slide
from dasc.images.slides import Slide, read_overview
from dasc.images.stain_check import check_stain
from dasc.images.tissue import UM_PER_PX as TISSUE_UM_PER_PX
from dasc.images.tissue import Tissue, find_tissue
from dasc.judge.density import per_mm2, poisson_interval
from dasc.judge.hotspot import Hotspot, find_hotspot
from dasc.model.checkpoint import Detector

OVERVIEW_PX = 800  # longest side of a field's overview; a slide's has the resolution its tissue is looked for at


def look_over(slide: Slide, um_per_px: float, whole_px: int, workers: int) -> tuple[np.ndarray, Tissue | None]:
    """The image at low magnification, (h, w, 3) uint8, and where its tissue is if it has more than whole_px pixels."""
    if slide.width * slide.height <= whole_px:
        return read_overview(slide, max(1.0, max(slide.width, slide.height) / OVERVIEW_PX), workers)[0], None
    overview, pixel_px = read_overview(slide, TISSUE_UM_PER_PX / um_per_px, workers)
    return overview, Tissue(find_tissue(overview, pixel_px * um_per_px), pixel_px)


def find_mitoses(
    detector: Detector,
    slide: Slide,
    um_per_px: float,
    tissue: Tissue | None,
    saved_path: Path,
    image_sha256: str,
    *,
    batch_size: int,
    smallest: float,
    workers: int,
    resume: bool,
    roi: Roi | None = None,
) -> pd.DataFrame:
    """Detections of one image, as `field.scan_field`: on its tissue, or on all of a field (tissue None).

    saved_path: where the scan is kept. image_sha256: hash of the image's content, by which a kept scan is known.
    resume: go on from there. roi: only detections on this part of the image; of a slide only its tissue is scanned.
    The rest: as `slide.scan_slide`.
    Raises: InputError: a region that cannot be read, or a kept scan of other settings.
    """
    settings = {  # all that the detections depend on: no batch size, which only changes the speed
        "model_sha256": detector.sha256,
        "alignment": detector.calibration.alignment,
        "per_mm2": detector.per_mm2,
        "merge_um": detector.merge_um,
        "views": detector.views,
        "smallest": smallest,
        "um_per_px": um_per_px,
        "image_sha256": image_sha256,
        "as_slide": tissue is not None,
        "roi": roi and roi.sha256,
    }
    saved = SavedScan(saved_path, settings, resume)
    if saved.detections is not None:
        return saved.detections
    if tissue is None:
        image = slide.read_region(0, 0, 0, slide.width, slide.height)
        detections = scan_field(detector, image, um_per_px, batch_size=batch_size, smallest=smallest)
    else:
        detections = scan_slide(
            detector,
            slide,
            um_per_px,
            roi.tissue(tissue) if roi else tissue,
            batch_size=batch_size,
            smallest=smallest,
            workers=workers,
            progress=saved.progress,
            save=saved.save,
        )
    if roi:  # after merging, so that a nucleus on the border counts once
        detections = detections[roi.at(detections[["x_px", "y_px"]].to_numpy())].reset_index(drop=True)
    saved.finish(detections)
    return detections


def count_mitoses(
    slide: Slide,
    name: str,
    detections: pd.DataFrame,
    um_per_px: float,
    source: str,
    tissue: Tissue | None,
    overview: np.ndarray,
    roi: Roi | None = None,
) -> tuple[dict, Hotspot]:
    """The image's row of counts.csv, and its hotspot.

    detections: x_px, y_px, mitosis. source: where um_per_px comes from. tissue, overview: as `look_over` gives them.
    roi: the part of the image that counts. Columns that end in `_note` hold what a user must know of the image
    (`warnings_of`); empty: nothing.
    """
    mitoses_px = detections.loc[detections["mitosis"], ["x_px", "y_px"]].to_numpy(float)
    hotspot = find_hotspot(mitoses_px, slide.width, slide.height, um_per_px)
    low, high = poisson_interval(len(mitoses_px))
    image_mm2 = slide.width * slide.height * um_per_px**2 / 1e6
    if tissue is None:  # all of a field is scanned, so all of it is checked
        small = shrink(overview, slide.width * um_per_px, slide.height * um_per_px)
        stain, tissue_mm2 = check_stain(small), find_tissue(small, TISSUE_UM_PER_PX).mean() * image_mm2
    else:
        stain, tissue_mm2 = check_stain(overview, tissue.mask), tissue.area_mm2(um_per_px)
    region_mm2 = roi.area_mm2(um_per_px) if roi else float("nan")
    facts = {
        "image": name,
        "width_px": slide.width,
        "height_px": slide.height,
        "um_per_px": um_per_px,
        "um_per_px_source": source,
        "reader": slide.reader,
        "stain": stain.name,
        "mitoses": len(mitoses_px),
        "mitoses_low": low,
        "mitoses_high": high,
        "tissue_mm2": tissue_mm2,
        "image_mm2": image_mm2,
        "region_mm2": region_mm2,
        "mitoses_per_mm2": per_mm2(len(mitoses_px), region_mm2 if roi else tissue_mm2),
        "hotspot_mitoses": hotspot.mitoses,
        "hotspot_mm2": hotspot.area_mm2(um_per_px),
        "hotspot_of": "whole image" if hotspot.whole else "window",
        "hotspot_x_px": hotspot.x_px,
        "hotspot_y_px": hotspot.y_px,
        "hotspot_width_px": hotspot.width_px,
        "hotspot_height_px": hotspot.height_px,
        "stain_note": stain.note,
    }
    if roi:
        if not hotspot.mitoses:  # any place in the region is as good, none outside it
            hotspot = hotspot.moved_to(roi.place, slide.width, slide.height)
            facts |= {"hotspot_x_px": hotspot.x_px, "hotspot_y_px": hotspot.y_px}
        corner = hotspot.x_px - 0.5, hotspot.y_px - 0.5
        window = (*corner, corner[0] + hotspot.width_px, corner[1] + hotspot.height_px)
        facts["hotspot_mm2"] = roi.area_mm2(um_per_px, window)
    return facts, hotspot


def shrink(overview: np.ndarray, width_um: float, height_um: float) -> np.ndarray:
    """The overview (h, w, 3) uint8 of an image of these sides at the resolution at which tissue is looked for."""
    size = tuple(max(1, round(side / TISSUE_UM_PER_PX)) for side in (width_um, height_um))
    return cv2.resize(overview, size, interpolation=cv2.INTER_AREA) if size[0] < overview.shape[1] else overview


def warnings_of(facts: dict[str, Any]) -> list[str]:
    """What a user must know of an image: the notes in its row of counts.csv."""
    return [text for name, text in facts.items() if name.endswith("_note") and isinstance(text, str) and text]
