"""What negatives are worth: F1 on a test slide with random ones, with searched ones, with the annotated ones too.

Runs the scripts as a user would (stages 1, 2, 3, 2, 9) on MITOS-ATYPIA-14, once per seed and arm, in --out; a step
whose result is there is not run again. Prints one row per run and writes negatives.csv.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
ARMS = ("random", "searched", "searched and annotated")


def run(result: Path, script: str, *flags: object) -> None:
    """Run one script unless its result is there."""
    if not result.exists():
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", required=True, help="MITOS-ATYPIA-14")
    parser.add_argument("--val", default="H03")
    parser.add_argument("--test", default="H05")
    parser.add_argument("--out", default="results/negatives")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--init_weights", default="data/lite0.pt", help="see lite0_weights.py")
    parser.add_argument("--patch_size", type=int, default=64)
    parser.add_argument("--patch_um_per_px", type=float, default=0.25)
    parser.add_argument("--stride", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--epochs", type=int, nargs=2, default=[20, 10], help="of the first training and the others")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, help="random's network searches for the rest")
    args = parser.parse_args()
    if args.arms[0] != "random":
        parser.error("--arms: random comes first, its network searches for the others")
    data = ["--dataset", "mitos14", "--data_root", args.data_root, "--val", args.val, "--test", args.test]
    rows = []
    for seed in args.seeds:
        home = Path(args.out) / str(seed)
        cut = [*data, "--patch_size", args.patch_size, "--patch_um_per_px", args.patch_um_per_px, "--seed", seed]
        train = ["--backbone", args.backbone, "--init_weights", args.init_weights, "--stride", args.stride]
        train += ["--lr", args.lr, "--seed", seed]
        search = ["--fp_mdoel", "True", "--model_path", home / "random/model.pt"]
        settings = {
            "random": (["--hard_negatives", "False"], args.epochs[0]),
            "searched": (["--hard_negatives", "False", *search], args.epochs[1]),
            "searched and annotated": (search, args.epochs[1]),
        }
        for arm in args.arms:
            negatives, epochs = settings[arm]
            folder = home / arm.replace(" ", "_")
            patches = home / f"patches_{folder.name}"
            run(patches, "pre/cut_patch_2.py", *cut, *negatives, "--out", patches)
            manifest = ["--manifest", patches / "patches.csv", "--out", folder, "--epochs", epochs]
            run(folder / "model.pt", "NS/sigle.py", *train, *manifest)
            judge = [*data, "--model_path", folder / "model.pt", "--out", folder / "test", "--overlays", "False"]
            run(folder / "test/metrics.json", "predict.py", *judge)
            metrics = json.loads((folder / "test/metrics.json").read_text(encoding="utf-8"))
            table = pd.read_csv(patches / "patches.csv", usecols=["split", "label"])
            negatives = int(((table["split"] == "train") & (table["label"] == 0)).sum())
            rows.append({"seed": seed, "arm": arm, "train_negatives": negatives, **metrics})
            print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)
    pd.DataFrame(rows).to_csv(Path(args.out) / f"negatives_{'_'.join(map(str, args.seeds))}.csv", index=False)
