"""How much memory and time predict.py takes for a whole slide that is written first: a JPEG pyramid, mostly glass.

The tissue is one synthetic tile over and over, so that a slide of any size is written in seconds. The tissue's area
decides the time, the slide's sides the memory, if anything does.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pandas as pd
import tifffile

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from dasc.images.read import read_field

TILE = 512  # px; stored tiles, and the period of the tissue
FACTORS = (1, 4, 16)  # stored resolutions
CORNER = 8192  # px; where the tissue begins, on the coarsest level's tiles


def texture() -> np.ndarray:
    """One tile of synthetic tissue, as `mirrored`."""
    with tempfile.TemporaryDirectory() as folder:
        command = [ROOT / "pre/make_sample.py", "--out", folder, "--size_px", "700"]
        subprocess.run([sys.executable, *map(str, command)], check=True, capture_output=True)
        return mirrored(read_field(sorted(Path(folder, "images").glob("*"))[0]))


def mirrored(image: np.ndarray) -> np.ndarray:
    """A tile (TILE, TILE, 3) uint8 of an image's corner, mirrored so that it goes on at its edges."""
    quarter = image[: TILE // 2, : TILE // 2]
    half = np.concatenate([quarter, quarter[:, ::-1]], axis=1)
    return np.concatenate([half, half[::-1]])


def tiles(
    width: int, height: int, factor: int, tissue_px: int, tile: np.ndarray, corner: int = CORNER
) -> Iterator[bytes]:
    """The JPEG tiles of one level, row by row."""
    small = cv2.resize(tile, (TILE // factor, TILE // factor), interpolation=cv2.INTER_AREA)
    options = {"level": 85, "colorspace": "rgb", "outcolorspace": "ycbcr", "subsampling": "420"}
    tissue = imagecodecs.jpeg8_encode(np.tile(small, (factor, factor, 1)), **options)
    glass = imagecodecs.jpeg8_encode(np.full_like(tile, 243), **options)
    for y in range(0, height // factor, TILE):
        for x in range(0, width // factor, TILE):
            inside = all(corner <= place * factor < corner + tissue_px for place in (x, y))
            yield tissue if inside else glass


def write_slide(path: Path, width: int, height: int, tissue_px: int, tile: np.ndarray, corner: int = CORNER) -> None:
    """A slide of tissue of one tile over and over, from `corner` on in x and y, and glass.

    width, height, tissue_px, corner: px, multiples of the coarsest factor. tile: as `mirrored`.
    """
    options = {"tile": (TILE, TILE), "dtype": np.uint8, "compression": "jpeg", "photometric": "ycbcr"}
    options |= {"subsampling": (2, 2), "resolution": (40000, 40000), "resolutionunit": 3}
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for factor in FACTORS:
            shape = (height // factor, width // factor, 3)
            sub = {"subifds": len(FACTORS) - 1} if factor == 1 else {"subfiletype": 1}
            writer.write(tiles(width, height, factor, tissue_px, tile, corner), shape=shape, **options, **sub)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model.pt")
    parser.add_argument("--width", type=int, default=20_000)
    parser.add_argument("--height", type=int, default=20_000)
    parser.add_argument("--tissue_px", type=int, default=8192, help="side of the square of tissue")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        slide = Path(folder, "slide.tiff")
        write_slide(slide, args.width // 16 * 16, args.height // 16 * 16, args.tissue_px, texture())
        print(f"{args.width} x {args.height} px, {slide.stat().st_size / 2**20:.0f} MiB, tissue {args.tissue_px}^2 px")
        flags = ["--images", slide, "--model_path", args.model, "--out", Path(folder, "out"), "--threshold", 0.5]
        start = time.perf_counter()
        subprocess.run([sys.executable, *map(str, [ROOT / "predict.py", *flags])], check=True, capture_output=True)
        seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        counts = pd.read_csv(Path(folder, "out/counts.csv")).iloc[0]
        print(
            f"{counts['tissue_mm2']:.2f} mm2 of tissue, {counts['mitoses']} detections: {seconds:.0f} s, "
            f"{used.ru_utime + used.ru_stime:.0f} s of CPU, peak memory {used.ru_maxrss / 2**20:.2f} GiB"
        )
