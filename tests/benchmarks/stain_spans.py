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

sys.path[:0] = [str(Path(__file__).resolve().parents[number]) for number in (2, 1)]
from recoloured import recoloured

from dasc.detect.image import shrink
from dasc.images.read import read_field
from dasc.images.slides import open_slide
from dasc.images.stain import DENSITY
from dasc.images.stain_check import check_stain, measure_colours
from dasc.images.tissue import UM_PER_PX, find_tissue

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
                names = ("dark", "coloured", "greener", "brown", "redder", "turn")
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
