"""What predict.py writes of one image, in a folder of the image's name, and what it prints of all of them."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from dasc.detect.image import warnings_of
from dasc.errors import InputError
from dasc.files import file_name, writing
from dasc.images.slides import Slide
from dasc.images.tissue import Tissue
from dasc.report.export import half_sides, write_geojson, write_mitotic_figures
from dasc.report.plots import overlay, write_png
from dasc.report.viewers import write_asap
from dasc.run import STARTED

# What is written of an image beside scan.json.
OF_AN_IMAGE = ("detections.geojson", "regions.geojson", "detections.xml", "mitotic-figures.json", "overlay.png")
OF_AN_IMAGE += ("tissue.png",)
SQUARE_UM = 32.0  # side of an annotation for QuPath: the figure and its neighbours, as in the report


def image_folder(out: Path, image: str) -> Path:
    """The folder of an image's own files."""
    return out / file_name(image, safe=" ")


def remove_outputs(folder: Path, resume: bool) -> None:
    """Remove what an earlier run wrote of an image that is skipped; its scan too, unless --resume may go on with it."""
    scan = folder / "scan.json"
    with writing(folder):
        for name in OF_AN_IMAGE:
            (folder / name).unlink(missing_ok=True)
        if not resume and scan.is_file() and scan.stat().st_mtime < STARTED:  # what this run began may be gone on with
            scan.unlink()


def write_image(
    folder: Path,
    slide: Slide,
    detections: pd.DataFrame,
    um_per_px: float,
    threshold: float,
    smallest: float,
    tissue: Tissue | None,
    truth: pd.DataFrame | None,
    *,
    qupath: str,
    export: Sequence[str],
    overlays: bool,
    match: str,
) -> None:
    """Write the detections of one image in the formats of other programs, and a picture: its overlay or its tissue.

    detections: image, x_px, y_px, probability, mitosis. smallest: probability from which they are written.
    truth: the annotations, x_px, y_px, label, where there are any. qupath: detections or annotations.
    export: asap, coco. overlays: draw a field's detections. match: the rule by which a detection is right.
    """
    halves = half_sides(detections, slide.width, slide.height, um_per_px, SQUARE_UM)
    halves = halves if qupath == "annotations" else None
    write_geojson(folder / "detections.geojson", detections, slide.origin_px, halves)
    write_asap(folder / "detections.xml", detections, export)
    try:
        write_mitotic_figures(folder / "mitotic-figures.json", detections, um_per_px, threshold, smallest)
    except InputError as error:  # the format ends at 10 mm; the other files hold all
        (folder / "mitotic-figures.json").unlink(missing_ok=True)  # of an earlier run
        tqdm.write(f"not written: {error}", file=sys.stderr)
    if tissue is not None:
        write_png(folder / "tissue.png", np.repeat(tissue.mask[:, :, None], 3, axis=2).astype(np.uint8) * 255)
    elif overlays:
        points = None if truth is None else truth.loc[truth["label"] == 1, ["x_px", "y_px"]].to_numpy(float)
        image = slide.read_region(0, 0, 0, slide.width, slide.height)
        write_png(folder / "overlay.png", overlay(image, detections, um_per_px, points, match))


def summary(counts: pd.DataFrame, skipped: dict[str, str]) -> str:
    """The table printed at the end: a line per image, those skipped with the reason, and the notes on images."""
    columns = ["image", "mitoses", "mitoses_low", "mitoses_high", "tissue_mm2", "mitoses_per_mm2"]
    shown = counts[[*columns, "hotspot_mitoses", "hotspot_mm2", "hotspot_of", "stain"]]
    lines = [shown.round(2).to_string(index=False, na_rep="-")]
    lines += [f"{name}: skipped: {why}" for name, why in skipped.items()]
    lines += [f"{row['image']}: {note}" for row in counts.to_dict("records") for note in warnings_of(row)]
    lines.append(
        f"{counts['mitoses'].sum()} mitoses in {len(counts)} images, {counts['tissue_mm2'].sum():.2f} mm2 of tissue"
    )
    return "\n".join(lines)
