"""One table dataset out of several, to train on all of them: what weights/dasc_mitos.pt learned from.

Reads what it finds in --data: mitos14 (official layout) and icpr12 (table of whole fields), whose slides --val and
--test name, brecahad (MIDOG layout, 0.25 um/px assumed; case 10 to train on, the others test or val), mitotic_figures
and tcga_figures (tables of 128 px crops centred on a mitosis).
Writes OUT/fields.csv, annotations.csv and images/.

The crops of one case become one strip, so that the stain is measured on all of them and not on a picture that is
half mitosis. Each is framed by its mirror image, so that no patch shows a seam. A case gives as many negatives as
mitoses, any of the candidates farther than 10 um from the mitosis of their crop (the darkest are often further mitoses,
which nobody marked), one of every crop before a second one of any: mitoses and negatives of every case, scanner and
stain are as many, and style tells nothing about the label. Every mitosis is annotated, for nuclei far from all
annotations, which a mitosis without one would be, are what stage 1 draws random negatives from.
"""

import argparse
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dasc.data.datasets import read_dataset
from dasc.detect.candidates import find_candidates
from dasc.files import write_csv
from dasc.images.read import read_field
from dasc.report.plots import write_png

ASSUMED_UM_PER_PX = 0.25
CLEAR_UM = 10.0  # a candidate this far from the mitosis of its crop is another nucleus
EDGE_UM = 6.0  # a candidate nearer to the edge of its crop would be seen beside its own mirror image
FRAME = 40  # px of mirror image round a crop: half of the largest patch
BRECAHAD_TRAIN = "Case_10"
SLIDES = {"mitos14": "mitos14", "icpr12": "table"}  # sets of whole fields by slide, and their layouts

Rows = list[tuple]


def whole_fields(name: str, root: Path, splits: tuple, out: Path) -> tuple[Rows, Rows]:
    """Copy the fields of a dataset; rows of fields.csv and annotations.csv."""
    dataset = read_dataset(name, root, *splits)
    fields, points = [], []
    for field in tqdm(list(dataset.fields.itertuples()), root.name):
        path = Path("images") / root.name / Path(field.path).name
        shutil.copyfile(root / field.path, out / path)
        um_per_px = ASSUMED_UM_PER_PX if np.isnan(field.um_per_px) else field.um_per_px
        fields.append((f"{root.name}_{field.image}", path.as_posix(), field.case, field.split, um_per_px))
    for point in dataset.annotations.itertuples():
        points.append((f"{root.name}_{point.image}", point.x_px, point.y_px, point.label))
    return fields, points


def strips(root: Path, out: Path) -> tuple[Rows, Rows]:
    """A strip of every case; rows of fields.csv and annotations.csv."""
    fields, points, rng = [], [], np.random.default_rng(0)
    for case, rows in tqdm(read_dataset("table", root).fields.groupby("case"), root.name):
        crops = [read_field(root / path) for path in rows["path"]]
        picture, middles_px = strip(crops)
        found_px = negatives(picture, middles_px, crops[0].shape[0], rng)[: len(crops)]
        path = Path("images") / root.name / f"{case}.png"
        write_png(out / path, picture)
        fields.append((case, path.as_posix(), case, "train", ASSUMED_UM_PER_PX))
        points += [(case, *place, 1) for place in middles_px]
        points += [(case, *place, 0) for place in found_px]
    return fields, points


def strip(crops: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Crops side by side, each in its mirror image, and their middles (N, 2), x and y."""
    framed = [np.pad(crop, ((FRAME, FRAME), (FRAME, FRAME), (0, 0)), "reflect") for crop in crops]
    middles = [((number + 0.5) * framed[0].shape[1], framed[0].shape[0] / 2) for number in range(len(crops))]
    return np.hstack(framed), np.array(middles)


def negatives(picture: np.ndarray, middles_px: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Negatives (N, 2) of a strip, x and y: one of every crop that has one, then second ones, and so on."""
    points_px, _ = find_candidates(picture, ASSUMED_UM_PER_PX, None)
    points_px = rng.permutation(points_px)
    crop = (points_px[:, 0] // (side + 2 * FRAME)).astype(int)
    away = points_px - middles_px[crop]
    clear = np.linalg.norm(away, axis=1) * ASSUMED_UM_PER_PX > CLEAR_UM
    clear &= (np.abs(away) <= side / 2 - EDGE_UM / ASSUMED_UM_PER_PX).all(axis=1)
    found = pd.DataFrame(points_px[clear], columns=["x", "y"])
    order = found.groupby(crop[clear]).cumcount().sort_values(kind="stable").index
    return found.loc[order].to_numpy()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets")
    parser.add_argument("--val", default="H03", help="slides of mitos14 and icpr12 for validation, A,B")
    parser.add_argument("--test", default="H05", help="slides of both for the test; empty: none")
    parser.add_argument("--brecahad", default="test", choices=("val", "test"), help="split of its other cases")
    parser.add_argument("--sets", nargs="+", default=["mitos14", "brecahad", "mitotic_figures"])
    parser.add_argument("--out", type=Path, default=Path("data/combined"))
    args = parser.parse_args()
    fields, points = [], []
    for name in args.sets:
        root = args.data / name
        (args.out / "images" / name).mkdir(parents=True, exist_ok=True)
        if name in SLIDES:
            slides = set(read_dataset(SLIDES[name], root, [], []).fields["case"])
            splits = tuple([case for case in cases.split(",") if case in slides] for cases in (args.val, args.test))
            parts = whole_fields(SLIDES[name], root, splits, args.out)
        elif name == "brecahad":
            cases = sorted(set(read_dataset("midog", root, [], []).fields["case"]) - {BRECAHAD_TRAIN})
            parts = whole_fields("midog", root, (cases, []) if args.brecahad == "val" else ([], cases), args.out)
        else:
            parts = strips(root, args.out)
        fields += parts[0]
        points += parts[1]
    write_csv(args.out / "fields.csv", pd.DataFrame(fields, columns=["image", "path", "case", "split", "um_per_px"]))
    write_csv(args.out / "annotations.csv", pd.DataFrame(points, columns=["image", "x_px", "y_px", "label"]))
    print(pd.DataFrame(fields).groupby(3).size(), pd.DataFrame(points).groupby(3).size())
