"""What real H&E looks like to the stain check, and what it says of images that are none: real ones, recoloured.

    python tests/benchmarks/stain_spans.py ../shared/data

Reads the collections below the folder that are there. Single figures (128 px) are too small to be judged alone: those
of one slide, or 36 neighbours where the slide is not known, are laid side by side.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dasc.detect.image import shrink
from dasc.images.read import read_field
from dasc.images.slides import open_slide
from dasc.images.stain import DENSITY
from dasc.images.stain_check import check_stain, measure_colours
from dasc.images.tissue import UM_PER_PX, find_tissue

HEMATOXYLIN, EOSIN, DAB = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78)  # Ruifrok and Johnston 2001
FIGURES_OF_A_SLIDE = 9  # slides with fewer are left out
NEIGHBOURS = 36


def images(root: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Collection and image, at 1 um/px."""
    for name, pattern, um_per_px in (
        ("mitos14 (Hamamatsu)", "mitos14/H*/frames/x40/*.jpg", 0.2274),
        ("icpr12 (Aperio)", "icpr12/images/*.jpg", 0.2456),
        ("brecahad", "brecahad/images/*.jpg", 0.25),
        ("lymphatic_invasion", "lymphatic_invasion/*.png", 0.5),
    ):
        for path in sorted(root.glob(pattern)):
            yield name, at_one_um(read_field(path), um_per_px)
    for path in sorted(root.glob("wsi/cmu-1-small-region.svs")):
        with open_slide(path) as slide:
            yield "CMU-1 (Aperio)", at_one_um(slide.read_region(0, 0, 0, slide.width, slide.height), slide.um_per_px)
    for folder in ("mitotic_figures", "tcga_figures"):
        if (root / folder / "fields.csv").is_file():
            table = pd.read_csv(root / folder / "fields.csv")
            slides = table["case"] if folder == "mitotic_figures" else np.arange(len(table)) // NEIGHBOURS
            for _, figures in table.groupby(slides):
                side = int(min(len(figures), NEIGHBOURS) ** 0.5)
                if side**2 >= FIGURES_OF_A_SLIDE:
                    crops = [read_field(root / folder / path) for path in figures["path"][: side**2]]
                    rows = [np.hstack(crops[start : start + side]) for start in range(0, side**2, side)]
                    source = figures["case"].iloc[0][:7] if folder == "mitotic_figures" else "TCGA"
                    yield f"figures of {source}", at_one_um(np.vstack(rows), 0.25)


def at_one_um(image: np.ndarray, um_per_px: float) -> np.ndarray:
    return cv2.resize(image, None, fx=um_per_px, fy=um_per_px, interpolation=cv2.INTER_AREA)


def recoloured(image: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The image (h, w, 3) uint8, and what it would be with other colours."""
    yield "as it is", image
    yield "gray", np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None], 3, axis=2)
    yield "inverted", 255 - image
    for order in ("bgr", "grb", "gbr", "rbg", "brg"):
        yield f"channels {order}", np.ascontiguousarray(image[:, :, ["rgb".index(channel) for channel in order]])
    stains = np.array([HEMATOXYLIN, EOSIN, DAB])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    nuclei = np.clip(DENSITY[image] @ np.linalg.inv(stains).astype(np.float32), 0, None)[:, :, 0]
    patches = cv2.GaussianBlur(np.random.default_rng(0).normal(size=nuclei.shape), (0, 0), 12)
    for share in (0.5, 0.1):  # of the tissue that is brown
        brown = np.where(patches > np.quantile(patches, 1 - share), nuclei, 0)
        blue = 0.8 * np.where(brown, 0.3 * nuclei, nuclei) + 0.03
        density = blue[:, :, None] * stains[0] + 1.2 * brown[:, :, None] * stains[2]
        yield f"DAB on {share:.0%}", np.clip(256 * np.exp(-density) - 1, 0, 255).astype(np.uint8)
    bright = np.clip(nuclei / np.quantile(nuclei, 0.995), 0, 1)
    green = np.clip(DENSITY[image][:, :, 1] / 1.5, 0, 1)
    yield "fluorescence", np.stack([0 * bright, 150 * green, 220 * bright], axis=2).astype(np.uint8)


def main(root: Path) -> None:
    spans, said, seconds = [], [], []
    for name, image in images(root):
        for colours, shown in recoloured(image):
            small = shrink(shown, image.shape[1], image.shape[0])
            begun = time.perf_counter()
            stain = check_stain(small)
            mask = find_tissue(small, UM_PER_PX)
            seconds.append(time.perf_counter() - begun)
            said.append({"collection": name, "colours": colours, "stain": stain.name})
            found = measure_colours(DENSITY[small.reshape(-1, 3)])
            if colours == "as it is" and found is not None:
                row = {f"mean {c}": value for c, value in zip("rgb", found.mean, strict=True)}
                row |= {f"spread {c}": value for c, value in zip("rgb", found.spread, strict=True)}
                names = ("dark", "coloured", "greener", "green_most", "redder", "turn")
                row |= {one: getattr(found, one) for one in names} | {"tissue": mask.mean()}
                spans.append({"collection": name} | row)
    pd.set_option("display.width", 200, "display.max_columns", 30)
    low, high = (getattr(pd.DataFrame(spans).groupby("collection"), which)() for which in ("min", "max"))
    print((low.map("{:.2f}".format) + " to " + high.map("{:.2f}".format)).T.to_string())
    said = pd.DataFrame(said)
    print(pd.crosstab(said["colours"], said["stain"]).to_string())
    print(said[(said["colours"] == "as it is") & (said["stain"] != "H&E")].to_string())
    missed = said[(said["colours"] != "as it is") & (said["stain"] == "H&E")]
    print(pd.crosstab(missed["collection"], missed["colours"]).to_string())
    print(
        f"{len(pd.DataFrame(spans))} images; check and tissue: median {np.median(seconds) * 1000:.1f} ms, "
        f"at most {max(seconds) * 1000:.1f} ms"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
