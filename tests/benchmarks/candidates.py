"""How many mitoses dasc.detect.candidates keeps, at several numbers per mm2, and how long finding them takes.

Reads what it finds in --data: mitos14 (official layout), brecahad (MIDOG layout, 0.25 um/px assumed) and
mitotic_figures (table of 128 px crops centred on a mitosis). The crops of one case are laid side by side as one field;
as every crop holds a mitosis, only candidates farther than 10 um from all mitoses count towards the number per mm2,
and only the area outside those circles.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dasc.data.datasets import read_dataset
from dasc.detect.candidates import find_candidates
from dasc.images.read import read_field

PER_MM2 = (600, 900, 1200, 1800, 3000, 3600)
HIT_UM = 7.5
CLEAR_UM = 10.0  # a candidate this far from every mitosis of a mosaic is certainly another nucleus
CROPS = 6  # a case with fewer crops makes no mosaic
ASSUMED_UM_PER_PX = 0.25

Field = tuple[str, np.ndarray, float, np.ndarray]  # case, image, um/px, mitoses (N, 2) x, y


def whole_fields(name: str, root: Path) -> Iterator[Field]:
    dataset = read_dataset(name, root, val=[], test=[])
    mitoses = dataset.annotations[dataset.annotations["label"] == 1]
    for field in dataset.fields.itertuples():
        points = mitoses.loc[mitoses["image"] == field.image, ["x_px", "y_px"]].to_numpy()
        um_per_px = ASSUMED_UM_PER_PX if np.isnan(field.um_per_px) else field.um_per_px
        if len(points):
            yield field.case, read_field(root / field.path), um_per_px, points


def mosaics(root: Path) -> Iterator[Field]:
    fields = read_dataset("table", root).fields
    for case, rows in fields.groupby("case"):
        if len(rows) < CROPS:
            continue
        across = int(len(rows) ** 0.5)
        down = len(rows) // across
        crops = [read_field(root / path) for path in rows["path"].iloc[: across * down]]
        lines = [np.hstack(crops[start : start + across]) for start in range(0, across * down, across)]
        side = crops[0].shape[0]
        y, x = np.mgrid[:down, :across].reshape(2, -1) * side + side // 2
        yield str(case), np.vstack(lines), ASSUMED_UM_PER_PX, np.stack([x, y], axis=1).astype(float)


def needed_per_mm2(field: Field, others_only: bool) -> np.ndarray:
    """How many candidates per mm2 must be kept to have one within HIT_UM, for every mitosis; inf: never."""
    _, image, um_per_px, mitoses = field
    points_px, _ = find_candidates(image, um_per_px, per_mm2=None)
    distance_um = np.linalg.norm(points_px[:, None] - mitoses[None], axis=2) * um_per_px
    area_mm2 = image.shape[0] * image.shape[1] * um_per_px**2 / 1e6
    counted = np.ones(len(points_px), bool)
    if others_only:
        counted = distance_um.min(axis=1) > CLEAR_UM
        area_mm2 -= len(mitoses) * np.pi * CLEAR_UM**2 / 1e6
    # The hit itself takes one place beside the counted ones that are ranked before it.
    before = np.cumsum(counted) - counted
    needed = np.where(distance_um <= HIT_UM, (before[:, None] + 1) / area_mm2, np.inf)
    return needed.min(axis=0, initial=np.inf)


def report(name: str, fields: Iterator[Field], others_only: bool) -> None:
    rows = [(field[0], needed) for field in fields for needed in needed_per_mm2(field, others_only)]
    table = pd.DataFrame(rows, columns=["case", "needed"])
    kept = pd.DataFrame({per_mm2: table["needed"] <= per_mm2 for per_mm2 in PER_MM2})
    by_case = kept.groupby(table["case"]).mean()
    print(f"{name}: {len(table)} mitoses of {len(by_case)} cases")
    print("  recall          " + "  ".join(f"{kept[n].mean():.3f} at {n}" for n in PER_MM2))
    print("  its worst cases " + "  ".join(f"{by_case[n].min():.3f} at {n}" for n in PER_MM2), flush=True)


def report_time(image: np.ndarray, um_per_px: float) -> None:
    for height, width in (image.shape[:2], (5412, 7215)):
        repeats = -(-height // image.shape[0]), -(-width // image.shape[1]), 1
        large = np.ascontiguousarray(np.tile(image, repeats)[:height, :width])
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            find_candidates(large, um_per_px)
            seconds.append(time.perf_counter() - start)
        print(f"{width} x {height} at {um_per_px} um/px: {min(seconds):.3f} s, median {np.median(seconds):.3f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mitos14, brecahad, mitotic_figures")
    args = parser.parse_args()
    print(f"OpenCV on {cv2.getNumThreads()} threads")
    if (args.data / "mitos14").is_dir():
        report("mitos14", whole_fields("mitos14", args.data / "mitos14"), False)
        _, image, um_per_px, _ = next(whole_fields("mitos14", args.data / "mitos14"))
        report_time(image, um_per_px)
    if (args.data / "brecahad").is_dir():
        report("brecahad", whole_fields("midog", args.data / "brecahad"), False)
    if (args.data / "mitotic_figures").is_dir():
        report("mitotic_figures, mosaics", mosaics(args.data / "mitotic_figures"), True)
