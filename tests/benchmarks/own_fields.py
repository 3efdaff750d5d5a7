"""How many fields to annotate: F1 on a test slide of what the README's "Train on your own fields" makes of so many.

Draws fields of MITOS-ATYPIA-14 at random, some from the training slides and some, to choose epoch and threshold on,
from the val slide; trains and judges on the whole test slide, once per seed, number and share of val, in --out; a step
whose result is there is not run again. Prints one row per run and writes own_fields_SEEDS.csv.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
from negatives import run

from dasc.data.datasets import read_dataset
from dasc.data.splits import parse_cases
from dasc.files import write_csv

NAMES = ["f1", "f1_low", "f1_high", "tp", "fp", "fn", "average_precision", "oracle_f1", "oracle_threshold", "threshold"]


def some_fields(number: int, val_share: float, seed: int, folder: Path, args: argparse.Namespace) -> tuple[Path, int]:
    """A table dataset of so many fields of train and val and all of test; its folder, and its training mitoses.

    The fields of one seed are an order of which a smaller number takes the beginning: more are always some more.
    """
    data_root = Path(args.data_root).resolve()
    dataset = read_dataset("mitos14", data_root, parse_cases(args.val), parse_cases(args.test))
    val = round(val_share * number)
    rng = np.random.default_rng(seed)
    kept = [dataset.fields[dataset.fields["split"] == "test"]]
    for split, count in (("train", number - val), ("val", val)):
        part = dataset.fields[dataset.fields["split"] == split]
        if count > len(part):
            raise SystemExit(f"--fields {number}: {count} of split {split}, which has {len(part)}")
        kept.append(part.iloc[rng.permutation(len(part))[:count]])
    fields = pd.concat(kept)
    points = dataset.annotations[dataset.annotations["image"].isin(fields["image"])]
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / "images").symlink_to(data_root, target_is_directory=True)
        write_csv(folder / "annotations.csv", points[["image", "x_px", "y_px", "label"]])
        write_csv(folder / "fields.csv", fields.assign(path="images/" + fields["path"]))
    train = fields.loc[fields["split"] == "train", "image"]
    return folder, int((points["image"].isin(train) & (points["label"] == 1)).sum())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", required=True, help="MITOS-ATYPIA-14")
    parser.add_argument("--val", default="H03")
    parser.add_argument("--test", default="H05")
    parser.add_argument("--out", default="results/own_fields")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fields", type=int, nargs="+", default=[10, 20, 40, 80, 120], help="of train and val")
    parser.add_argument("--val_shares", type=float, nargs="+", default=[0.5, 0.25], help="of the fields, for val")
    parser.add_argument("--init_weights", default="weights/dasc_figures.pt")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    rows = []
    for val_share in args.val_shares:
        for seed in args.seeds:
            for number in args.fields:
                home = Path(args.out) / f"val_{val_share:g}" / str(seed) / str(number)
                dataset, mitoses = some_fields(number, val_share, seed, home / "dataset", args)
                data = ["--dataset", "table", "--data_root", dataset]
                patches, model = home / "patches/patches.csv", home / "model/model.pt"
                size = ["--patch_size", 64, "--patch_um_per_px", 0.28, "--seed", seed]
                run(patches, "pre/cut_patch_2.py", *data, *size, "--out", patches.parent)
                train = ["--backbone", "tf_efficientnet_lite0", "--stride", 32, "--lr", 5e-4, "--epochs", args.epochs]
                train += ["--init_weights", args.init_weights, "--seed", seed]
                run(model, "NS/sigle.py", *train, "--manifest", patches, "--out", model.parent)
                judge = [*data, "--model_path", model, "--overlays", "False", "--out", home / "test"]
                run(home / "test/metrics.json", "predict.py", *judge)
                metrics = json.loads((home / "test/metrics.json").read_text(encoding="utf-8"))
                row = {"val_share": val_share, "fields": number, "seed": seed, "train_mitoses": mitoses}
                rows.append(row | {name: metrics[name] for name in NAMES})
                print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)
    name = "own_fields_" + "_".join(map(str, args.seeds))
    write_csv(Path(args.out) / f"{name}.csv", pd.DataFrame(rows).round(4))
