"""What each stage is worth: F1 on a test slide as the chain grows, with the labels as they are and with some flipped.

Runs the scripts as a user would on MITOS-ATYPIA-14, once per seed, share of flipped labels and arm, in --out; a step
whose result is there is not run again. Every arm is judged on the test fields at the threshold chosen on val:

random       stage 2 on random negatives
searched     stage 2 again on the patches of stage 3: searched, annotated and random negatives
memory       the same without the patches that stages 4 and 5 call noisy
levels       stage 8 on SCL.csv of stage 7, classification loss by level only
full         stage 8 as it is

Flipped are labels of annotated nuclei of the training fields, mitoses and look-alikes; val and test keep theirs.
Every arm but the first is shown the same number of patches, however many of them stay.
Writes ablation.csv and ablation.png, named after the seeds.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from negatives import run

from dasc.data.datasets import read_dataset
from dasc.data.splits import parse_cases
from dasc.files import replacing, write_csv
from dasc.judge.metrics import average_precision

ARMS = ("random", "searched", "memory", "levels", "full")


def dataset_with(share: float, seed: int, folder: Path, args: argparse.Namespace) -> Path:
    """A table dataset of the same fields where this share of the training annotations have the other label."""
    if not folder.exists():
        folder.mkdir(parents=True)
        data_root = Path(args.data_root).resolve()
        dataset = read_dataset("mitos14", data_root, parse_cases(args.val), parse_cases(args.test))
        (folder / "images").symlink_to(data_root, target_is_directory=True)
        points = dataset.annotations.merge(dataset.fields[["image", "split"]], on="image")
        rng = np.random.default_rng(seed)
        for _, rows in points[points["split"] == "train"].groupby("label"):
            wrong = rng.choice(rows.index, round(share * len(rows)), replace=False)
            points.loc[wrong, "label"] = 1 - points.loc[wrong, "label"]
        write_csv(folder / "annotations.csv", points[["image", "x_px", "y_px", "label"]])
        write_csv(folder / "fields.csv", dataset.fields.assign(path="images/" + dataset.fields["path"]))
    return folder


def epochs(table: Path, visits: int, least: int) -> int:
    """Passes over the patches of a table that are trained on that show about this many.

    Those of the split train in a manifest, those that are not noisy in hard.csv, all of SCL.csv.
    """
    rows = pd.read_csv(table)
    if "split" in rows:
        rows = rows[rows["split"] == "train"]
    elif "verdict" in rows:
        rows = rows[rows["verdict"] != "noisy"]
    return max(least, round(visits / len(rows)))


def chain(home: Path, share: float, seed: int, args: argparse.Namespace) -> None:
    """All nine stages and the arms that leave some of them out, in the folder `home`."""
    data = ["--dataset", "mitos14", "--data_root", args.data_root, "--val", args.val, "--test", args.test]
    labelled = dataset_with(share, seed, home / "dataset", args)
    cut = [
        "--dataset",
        "table",
        "--data_root",
        labelled,
        "--patch_size",
        args.patch_size,
        "--patch_um_per_px",
        args.patch_um_per_px,
        "--shifts",
        args.shifts,
        "--seed",
        seed,
    ]
    network = ["--backbone", args.backbone, "--init_weights", args.init_weights, "--stride", args.stride]
    network += ["--seed", seed]
    train = [*network, "--lr", args.lr]

    patches = home / "patches"
    run(patches, "pre/cut_patch_2.py", *cut, "--hard_negatives", "False", "--out", patches)
    manifest = patches / "patches.csv"
    flags = [*train, "--epochs", epochs(manifest, args.search_visits, 1), "--manifest", manifest]
    run(home / "random/model.pt", "NS/sigle.py", *flags, "--out", home / "random")
    patches = home / "patches_ns"
    search = ["--fp_mdoel", "True", "--model_path", home / "random/model.pt"]
    run(patches, "pre/cut_patch_2.py", *cut, *search, "--out", patches)
    manifest = patches / "patches.csv"
    flags = [*train, "--epochs", epochs(manifest, args.visits, 5), "--manifest", manifest]
    run(home / "searched/model.pt", "NS/sigle.py", *flags, "--out", home / "searched")

    memory = home / "memory_units"
    passes = epochs(manifest, args.memory_visits, 6)
    schedule = ["--epochs", passes, "--warmup_share", 1 / passes, "--count_after_share", 2 / passes]
    schedule += ["--batch_size", 64]
    flags = [*network, "--lr", args.memory_lr, *schedule, "--manifest", manifest, "--out", memory]
    run(memory / "memory.csv", "DMU/main.py", *flags)
    between = ["--manifest", manifest, "--seed", seed, "--trust_mitoses", args.trust_mitoses]
    run(memory / "hard.csv", "clus_hard.py", *between, "--memory", memory / "memory.csv", "--out", memory)
    passes = epochs(memory / "hard.csv", args.visits, 5)
    flags = [*train, "--epochs", passes, "--manifest", manifest, "--hard", memory / "hard.csv"]
    run(home / "memory/model.pt", "NS/sigle.py", *flags, "--out", home / "memory")

    levels = [*network, "--lr", args.memory_lr, "--epochs", args.level_epochs, "--seen_after_share", 0.25]
    flags = [*levels, "--manifest", manifest, "--hard", memory / "hard.csv", "--out", memory]
    run(memory / "checked.csv", "DMU/hard_main.py", *flags)
    tables = [flag for name in ("memory", "hard", "checked") for flag in (f"--{name}", memory / f"{name}.csv")]
    run(memory / "SCL.csv", "clus_scl.py", *tables, "--out", memory)
    passes = epochs(memory / "SCL.csv", args.visits, 5)
    scl = [*train, "--epochs", passes, "--manifest", manifest, "--scl", memory / "SCL.csv"]
    scl += ["--contrast_labels_share", 0.2, "--cluster_every_share", 0.2]
    alone = ["--contrastive_weight", 0, "--localisation_weight", 0]
    run(home / "levels/model.pt", "DMU/hard_scl_main.py", *scl, *alone, "--out", home / "levels")
    run(home / "full/model.pt", "DMU/hard_scl_main.py", *scl, "--out", home / "full")

    for arm in ARMS:
        judge = [*data, "--model_path", home / arm / "model.pt", "--overlays", "False"]
        for split in args.splits:
            out = home / arm / split
            run(out / "metrics.json", "predict.py", *judge, "--split", split, "--out", out)


def judged(home: Path, split: str, arm: str) -> dict:
    """Metrics of one arm at the threshold chosen on val, its average precision, and both on val."""
    out = home / arm / split
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    curve = pd.read_csv(home / arm / "val_curve.csv")
    return {
        **{name: metrics[name] for name in ("tp", "fp", "fn", "precision", "recall", "f1", "f1_low", "f1_high")},
        **{name: metrics[name] for name in ("threshold", "average_precision", "oracle_f1")},
        "f1_val": curve["f1"].max(),
        "average_precision_val": average_precision(curve),
    }


def draw(path: Path, table: pd.DataFrame) -> None:
    """F1 of every arm, a point per seed and a bar at the mean; one panel per share of flipped labels."""
    shares = sorted(table["flipped"].unique())
    figure = Figure(figsize=(5 * len(shares), 4), layout="constrained")
    for axis, share in zip(np.atleast_1d(figure.subplots(1, len(shares), sharey=True)), shares, strict=True):
        part = table[table["flipped"] == share]
        for place, arm in enumerate(ARMS):
            f1 = part.loc[part["arm"] == arm, "f1"]
            axis.bar(place, f1.mean(), color="#b8c4d6")
            axis.plot(np.full(len(f1), place), f1, "o", color="#27364d")
        axis.set_xticks(range(len(ARMS)), ARMS)
        axis.set(title=f"{share:.0%} of the annotations flipped", ylabel="F1", ylim=(0, 1.1 * table["f1"].max()))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", required=True, help="MITOS-ATYPIA-14")
    parser.add_argument("--val", default="H03", help="cases, as for stage 1")
    parser.add_argument("--test", default="H05")
    parser.add_argument("--out", default="results/ablation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--flipped", type=float, nargs="+", default=[0.0, 0.2], help="shares of the annotations")
    parser.add_argument("--splits", nargs="+", default=["test"], help="fields judged; val while settings are chosen")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--init_weights", default="data/lite0.pt", help="see lite0_weights.py")
    parser.add_argument("--patch_size", type=int, default=64)
    parser.add_argument("--patch_um_per_px", type=float, default=0.25, help="resolution of the patches")
    parser.add_argument("--stride", type=int, default=32)
    parser.add_argument("--shifts", type=int, default=3, help="shifted copies of every mitosis, as of stage 1")
    parser.add_argument("--lr", type=float, default=5e-4, help="of stages 2 and 8")
    parser.add_argument("--visits", type=int, default=63000, help="patches shown in the training of each arm")
    parser.add_argument("--search_visits", type=int, default=32000, help="of the first arm, which has fewer patches")
    parser.add_argument("--memory_lr", type=float, default=3e-4, help="of stages 4 and 6")
    parser.add_argument("--memory_visits", type=int, default=40000, help="of stage 4, which looks at each twice")
    parser.add_argument("--trust_mitoses", default="False", help="True: no mitosis is left out, as of stage 5")
    parser.add_argument("--level_epochs", type=int, default=12, help="of stage 6")
    args = parser.parse_args()
    out, rows = Path(args.out), []
    for seed in args.seeds:
        for share in args.flipped:
            home = out / f"flipped_{share:g}" / str(seed)
            began = time.perf_counter()
            chain(home, share, seed, args)
            print(f"{home}: {time.perf_counter() - began:.0f} s", flush=True)
            for split in args.splits:
                of_run = {"flipped": share, "seed": seed, "split": split}
                rows += [{**of_run, "arm": arm, **judged(home, split, arm)} for arm in ARMS]
            print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)
    table = pd.DataFrame(rows)
    name = "ablation_" + "_".join(map(str, args.seeds))
    write_csv(out / f"{name}.csv", table.round(4))
    draw(out / f"{name}.png", table[table["split"] == args.splits[-1]])
