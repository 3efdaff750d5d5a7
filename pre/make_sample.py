"""Stage 0: make a small synthetic dataset in the form of MIDOG, so that every stage runs without a download.

Writes to --out: MIDOG.json, images/001.tiff ... (one field per case, its resolution in the TIFF tags), README.txt,
run.json and label_noise.csv (the labels that are wrong on purpose, with the truth; no stage reads it).
Nothing in it is real tissue: it shows that the pipeline runs, not how well it does on patients.
"""

import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dasc.flags import Count, Range, Share, read_flags

Seed = Annotated[int, Range("a whole number from 0 to 2^32", 0, 2**32)]
Cases = Annotated[int, Range("a whole number from 1 to 999", 1, 999)]
Size = Annotated[int, Range("a whole number from 256 to 10000", 256, 10_000)]
Number = Annotated[int, Range("a whole number from 0 to 10000", 0, 10_000)]

# Edit here, or override one run with the flag of the same name.
OUT = "data/sample"  # folder of the dataset; an earlier sample stays as OUT.previous, anything else is refused
SEED: Seed = 0  # another seed draws other tissue; the same seed gives the same files, whatever WORKERS is
CASES: Cases = 10  # cases, numbered from 1, one field each; 7 and 8 are validation, 9 and 10 test
SIZE_PX: Size = 1200  # width and height of a field in px; time and disk grow with its square
MITOSES: Number = 20  # mitoses drawn per field; more of them make training easier
IMPOSTERS: Number = 28  # hard negatives drawn per field, which look like mitoses, and annotated as such
LABEL_NOISE: Share = 0.05  # share of mitoses and of hard negatives whose label is wrong; 0 gives perfect labels
WORKERS: Count = 2  # threads that draw fields; changes the time only

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

import json
from multiprocessing.pool import ThreadPool

import numpy as np
import pandas as pd
import tifffile
from tqdm import tqdm

from dasc.data.synthetic import (
    HARD_NEGATIVE,
    MARGIN_UM,
    MITOSIS,
    SCANNERS,
    draw_figure,
    draw_nucleus,
    draw_tissue,
    place_nuclei,
    scan,
)
from dasc.errors import InputError
from dasc.files import replacing_folder, write_csv, write_json, write_text
from dasc.run import record_run, run_script

NAMES = {0: "neither", MITOSIS: "mitosis", HARD_NEGATIVE: "hard negative"}
BOX_PX = 50  # MIDOG's boxes are 50 x 50 whatever the scanner
README = """This dataset is synthetic: pre/make_sample.py drew every image, and no real tissue is in it.
It is there to run the pipeline without a download. Figures measured on it say nothing about patients.
label_noise.csv lists the labels that are wrong on purpose; no stage reads it.
"""


def draw_case(case: int, path: Path, args) -> list[tuple[int, int, int, int]]:
    """Write one field; return x, y, true and recorded label of everything that is or should be annotated."""
    rng = np.random.default_rng([args.seed, case])
    scanner = SCANNERS[2 if case % 10 == 0 else case % 2]
    margin = round(MARGIN_UM / scanner.um_per_px)
    side = args.size_px + 2 * margin
    points = place_nuclei(rng, side, scanner.um_per_px)
    field, nest, gap = draw_tissue(rng, side, scanner.um_per_px, points)
    column, row = points.astype(int).T
    in_nest, in_tissue = nest[row, column] > 0.5, gap[row, column] < 0.3

    reach = margin + BOX_PX // 2 + 10  # keeps the boxes inside the field
    free = in_tissue & ((points > reach) & (points < side - reach)).all(axis=1)
    if free.sum() < args.mitoses + args.imposters:
        raise InputError(
            f"--mitoses {args.mitoses} --imposters {args.imposters}: found room for {free.sum()} together in a "
            f"field of --size_px {args.size_px}; lower them or enlarge the field"
        )
    order = np.argsort(~free * 2 + ~in_nest, kind="stable")  # shuffled by place_nuclei; mitoses lie in nests
    truth = np.zeros(len(points), int)
    truth[order[: args.mitoses]] = MITOSIS
    truth[rng.permutation(order[args.mitoses : free.sum()])[: args.imposters]] = HARD_NEGATIVE
    wrong = free & (rng.random(len(points)) < np.where(truth > 0, args.label_noise, args.label_noise / 40))
    not_mitosis = rng.choice([0, HARD_NEGATIVE], len(points))
    recorded = np.where(wrong, np.where(truth == MITOSIS, not_mitosis, MITOSIS), truth)

    for i in np.argsort(truth, kind="stable"):  # figures last, so that no neighbour lies over one
        if truth[i]:
            draw_figure(field, *points[i], truth[i])
        elif recorded[i]:
            draw_nucleus(field, *points[i], "epithelial", darkness=2.5)
        elif in_tissue[i] and rng.random() < (0.92 if in_nest[i] else 0.4):
            lymphocyte = rng.random() < (0.06 if in_nest[i] else 0.4)
            draw_nucleus(field, *points[i], "lymphocyte" if lymphocyte else "epithelial" if in_nest[i] else "spindle")
    per_cm = 1e4 / scanner.um_per_px
    picture, tags = scan(field, scanner, margin), {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, picture, photometric="rgb", compression="zlib", metadata=None, **tags)
    centres = np.round(points - margin + rng.normal(0, 0.4 / scanner.um_per_px, points.shape)).astype(int)
    return np.column_stack([centres, truth, recorded])[(truth > 0) | (recorded > 0)].tolist()


def write_tables(folder: Path, found: list[list[tuple[int, int, int, int]]], args) -> None:
    """Write MIDOG.json, label_noise.csv and README.txt; found: what draw_case returned for case 1, 2, ..."""
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "workers")}
    info = {"description": "synthetic, made by pre/make_sample.py, no real tissue", **settings}
    images, annotations, noise = [], [], []
    for case, figures in enumerate(found, start=1):
        name = f"{case:03d}.tiff"
        images.append({"id": case, "file_name": name, "width": args.size_px, "height": args.size_px})
        for x, y, truth, recorded in figures:
            if recorded:
                left, top = x - BOX_PX // 2, y - BOX_PX // 2
                box = {"bbox": [left, top, left + BOX_PX, top + BOX_PX], "category_id": recorded}
                annotations.append({"id": len(annotations) + 1, "image_id": case, **box})
            if truth != recorded:
                kind = "missed" if not recorded else "flipped" if truth else "spurious"
                noise.append((name, x, y, NAMES[truth], NAMES[recorded], kind))
    categories = [{"id": number, "name": NAMES[number]} for number in (MITOSIS, HARD_NEGATIVE)]
    tables = {"images": images, "annotations": annotations, "categories": categories}
    write_json(folder / "MIDOG.json", {"info": info, **tables})
    columns = ["file_name", "x_px", "y_px", "truth", "recorded", "kind"]
    write_csv(folder / "label_noise.csv", pd.DataFrame(noise, columns=columns))
    write_text(folder / "README.txt", README)
    mitoses = sum(each["category_id"] == MITOSIS for each in annotations)
    print(f"{mitoses} mitoses and {len(annotations) - mitoses} hard negatives annotated, {len(noise)} labels wrong")


def check_folder(out: Path) -> None:
    """Raise InputError when `out` holds what no earlier run wrote; hidden files do not count."""
    try:
        description = json.loads((out / "MIDOG.json").read_text(encoding="utf-8"))["info"]["description"]
        ours = "synthetic" in description
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    for path in [out] if out.is_file() else sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        files = ("images", "MIDOG.json", "label_noise.csv", "README.txt", "run.json")
        own = name in files or path.match("images/*.tiff")
        if not (path.name.startswith(".") or (ours and own)):
            raise InputError(
                f"{path}: found a file that is not of this script's dataset, expected {out} absent, empty or an "
                "earlier sample, because it is replaced; move the file or name another folder with --out"
            )


def main(args) -> None:
    """Draw the dataset beside --out and put it there when it is whole."""
    out = Path(args.out).resolve()
    check_folder(out)
    with replacing_folder(out, "MIDOG.json") as fresh:
        (fresh / "images").mkdir()
        with ThreadPool(max(args.workers, 1)) as pool:
            cases = range(1, args.cases + 1)
            drawn = pool.imap(lambda case: draw_case(case, fresh / "images" / f"{case:03d}.tiff", args), cases)
            found = list(tqdm(drawn, total=args.cases, unit="field"))
        write_tables(fresh, found, args)
        record_run(fresh, args, inputs={})
    print(f"{args.cases} synthetic fields: {out}")


if __name__ == "__main__":
    run_script(main, args)
