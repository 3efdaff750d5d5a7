"""Before stage 2, in place of stage 1: labelled patches, or a share of them, as a manifest split by slide.

Reads a folder of patches whose label and slide stand in their names (pos_A00044_5282-12339.png), or a patches.csv.
Writes OUT: {train,val,test}/{mitosis,negative}/*.png, patches.csv, patches.npy (all patches in one file), cut.json and
run.json; of a patches.csv its fields.csv and annotations.csv too. Label 1, elsewhere called mitosis, is whatever pos_
stands for.
"""

import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dasc.flags import Amount, Count, SomeShare, read_flags

# Edit here, or override one run with the flag of the same name.
LABELLED = "data/hard_labeled_dataset"  # folder of named patches, or a patches.csv, which keeps its own split
OUT = "data/patches_weak"  # folder to write
VAL = ""  # slides for validation, A,B; with TEST empty too: drawn
TEST = ""  # slides for the test; empty: drawn, or none where VAL is set
FOLDS: Count = 5  # of how many parts of the slides validation is one and the test one, where they are drawn
PATCH_SIZE: Count = 224  # side of the patches written, in px; named patches are brought to it
PATCH_UM_PER_PX: Amount = (
    0.0  # resolution of the patches written; 0: unknown, then no image can be scanned by the model
)
TRAIN_SHARE: SomeShare = 1.0  # share of the training patches that stays: what if fewer had been annotated
SHARE_OF: Literal["all", "positives"] = "all"  # all: of both labels; positives: every negative stays
SEED = 0  # of the slides and the share
PACK = True  # also write patches.npy, which trainings map: 3 S^2 bytes per patch of S px; False: they read every file
WORKERS: Count = 2  # threads that read and write patches

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
from tqdm import tqdm

from dasc.data.cut import Cut, write_cut
from dasc.data.pack import write_pack
from dasc.data.patches import copy_patches, write_patch
from dasc.data.splits import draw_share, draw_slides, parse_cases
from dasc.data.tables import LABELS, PATCHES, SPLITS, read_patches, write_table
from dasc.errors import InputError
from dasc.files import check_replaceable, replacing_folder
from dasc.images.read import read_field
from dasc.run import record_run, run_script
from dasc.weak.named import FORM, labelled_images, read_square


def main(args) -> int:
    out, labelled = Path(args.out), Path(args.labelled)
    if not labelled.exists():
        raise InputError(f"{labelled}: not there; expected a folder of patches called {FORM}, or a patches.csv")
    check_replaceable(out, "patches.csv")
    table = named_patches(labelled, args) if labelled.is_dir() else read_patches(labelled)
    train = table[table["split"] == "train"]
    kept = draw_share(train, args.train_share, args.share_of, args.seed)
    table = table.drop(index=kept.index[~kept]).reset_index(drop=True)

    with replacing_folder(out, "patches.csv") as partial:
        for split in SPLITS:
            for word in LABELS.values():
                (partial / split / word).mkdir(parents=True)
        if labelled.is_dir():
            write_named(table, partial, args)
        else:
            copy_patches(labelled.parent, partial, table["patch"])
        write_table(partial / "patches.csv", table, PATCHES)
        if args.pack:
            write_pack(partial, table["patch"].tolist(), args.workers)
        record_run(partial, args, inputs={args.labelled: len(table)}, patches=len(table))
    counts = table.groupby(["split", "label"]).size().rename("patches")
    print(counts.to_string())
    slides = ", ".join(f"{table.loc[table['split'] == split, 'case'].nunique()} in {split}" for split in SPLITS)
    print(f"slides: {slides}; wrote {out / 'patches.csv'}")
    return 0


def named_patches(folder: Path, args) -> pd.DataFrame:
    """Rows of patches.csv for a folder of named patches, with the column path beside."""
    found = labelled_images(folder)
    cases = found["case"].to_numpy()
    val, test = parse_cases(args.val), parse_cases(args.test)
    unknown = [name for name in (*val, *test) if name not in set(cases)]
    if unknown or set(val) & set(test):
        reason = f"no slide {unknown[0]}" if unknown else "one slide goes to one side"
        raise InputError(f"--val {args.val} --test {args.test}: {reason}; found {', '.join(sorted(set(cases)))}")
    if val or test:
        found["split"] = np.select([np.isin(cases, val), np.isin(cases, test)], ["val", "test"], "train")
    else:
        found["split"] = draw_slides(found["label"].to_numpy(), cases, args.folds, args.seed)
    for split in ("train", "val"):
        for label, word in LABELS.items():
            if not ((found["split"] == split) & (found["label"] == label)).any():
                per_slide = found.groupby("case")["label"].agg(["sum", "size"])
                counts = ", ".join(f"{slide} {row['sum']} of {row['size']}" for slide, row in per_slide[:12].iterrows())
                raise InputError(
                    f"{folder}: split {split} has no {word} patch (label {label}); positives per slide: {counts}; "
                    "name --val and --test so that training and val have both"
                )
    names = [f"{row.split}/{LABELS[row.label]}/{row.path.stem}.png" for row in found.itertuples()]
    twice = pd.Series(names)[pd.Series(names).duplicated()]
    if len(twice):
        raise InputError(f"{folder}: two patches are called {Path(twice.iloc[0]).stem}; rename one")
    unknown_place = dict.fromkeys(("x_px", "y_px", "point_x_px", "point_y_px", "score"), np.nan)
    return found.assign(patch=names, image=cases, origin="annotated", **unknown_place)


def write_named(table: pd.DataFrame, partial: Path, args) -> None:
    """Write the patches at --patch_size, all from files of one size."""
    source_px = read_field(table["path"].iloc[0]).shape[0]

    def write(row) -> None:
        write_patch(partial / row.patch, read_square(row.path, source_px, args.patch_size).transpose(2, 0, 1))

    with ThreadPoolExecutor(max(1, args.workers)) as pool:
        list(tqdm(pool.map(write, table.itertuples()), "patches", len(table)))
    write_cut(partial, Cut(args.patch_size, args.patch_um_per_px or None, False, None, source_px))


if __name__ == "__main__":
    run_script(main, args)
