"""Do verdicts and levels mean difficulty? Runs stages 4 and 5 on real patches and asks those who did not train on them.

Patches as label_noise.py, with their annotated labels. Prints and writes to OUT (and SEED/patches.csv, every patch):
- error.csv: per label, verdict and level the error of an independent plain network trained on the other half of the
  slides, and how many of the patches are annotated look-alikes;
- disputed.csv: how well noise_score, verdict with level, and the independent network's probability tell cells that the
  annotators disputed (mitosis with confidence below 1, look-alike with one above 0) from those they agreed on: AUROC.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from sorting import cut, drawn, parser, stages, train

from dasc.data.datasets import read_dataset
from dasc.data.patches import load_patches
from dasc.data.tables import LABELS


def slide_halves(table: pd.DataFrame) -> np.ndarray:
    """Half (N,) 0 or 1 of every patch: slides dealt out, the richest in mitoses first, to the half that has fewer."""
    half, mitoses = {}, [0, 0]
    for case, count in table.groupby("case")["label"].sum().sort_values(ascending=False).items():
        half[case] = int(mitoses[1] < mitoses[0])
        mitoses[half[case]] += count
    return table["case"].map(half).to_numpy()


def one_seed(args, folder: Path, confidences: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Every patch with its verdict, level, noise_score, the annotators' confidence and the independent p(label)."""
    table = drawn(args, folder, np.random.default_rng(seed))
    manifest = folder / f"patches_difficulty_{seed}.csv"
    table.to_csv(manifest, index=False)
    out = Path(args.out) / str(seed)
    stages(args, manifest, out, seed, noisy_share=args.noisy_share)
    hard = pd.read_csv(out / "hard.csv")[["patch", "verdict", "level", "noise_score"]]
    table = table.merge(hard, on="patch", validate="one_to_one")
    table = table.merge(confidences, on=["image", "x_px", "y_px"], how="left", validate="one_to_one")

    labels, half = torch.tensor(table["label"].to_numpy()), slide_halves(table)
    patches = load_patches([folder / patch for patch in table["patch"]], 2)
    probability = np.zeros((len(table), 2))
    for held_out in (0, 1):
        rows, others = np.flatnonzero(half != held_out), np.flatnonzero(half == held_out)
        probability[others] = train(args, patches, labels, rows, seed + 1000, others)[1]
    table = table.assign(independent=probability[np.arange(len(table)), labels.numpy()], seed=seed)
    table.to_csv(out / "patches.csv", index=False)
    return table


def errors(table: pd.DataFrame) -> pd.DataFrame:
    """Per label and group: patches, the independent network's error and mean probability, share of look-alikes."""
    group = table["verdict"].where(table["verdict"] != "hard", "hard " + table["level"].astype(str).str[0])
    rows = table.assign(
        group=group, error=table["independent"] < 0.5, look_alike=table["origin"] == "hard_negative", patches=1
    ).groupby(["label", "group"])
    return rows.agg(
        patches=("patches", "sum"),
        error=("error", "mean"),
        p=("independent", "mean"),
        look_alike=("look_alike", "mean"),
    ).reset_index()


def disputed(table: pd.DataFrame) -> list[dict]:
    """AUROC of disputed against agreed cells, per label and measure."""
    rank = table["verdict"].map({"clean": 0, "hard": 1, "noisy": 5, "dropped": 5}) + table["level"].fillna(0)
    measures = {
        "noise_score": table["noise_score"],
        "verdict and level": rank,
        "independent network": 1 - table["independent"],
    }
    rows = []
    for label, agreed in ((1, 1.0), (0, 0.0)):
        mine = (table["label"] == label) & table["confidence"].notna()
        truth = table.loc[mine, "confidence"] != agreed
        aurocs = {name: roc_auc_score(truth, measure[mine]) for name, measure in measures.items()}
        rows.append({"label": LABELS[label], "disputed": truth.sum(), "agreed": (~truth).sum(), **aurocs})
    return rows


if __name__ == "__main__":
    parser = parser(__doc__, "results/difficulty")
    parser.add_argument("--noisy_share", type=float, default=0.5, help="as in clus_hard.py")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = cut(args)
    points = read_dataset("mitos14", Path(args.data_root), [args.val], [args.test]).annotations
    confidences = points[["image", "x_px", "y_px", "confidence"]]
    tables = [one_seed(args, folder, confidences, seed) for seed in args.seeds]
    result = pd.concat([errors(table).assign(seed=table["seed"][0]) for table in tables])
    pooled = errors(pd.concat(tables))
    result.round(4).to_csv(Path(args.out) / "error.csv", index=False)
    print(pooled.round(3).to_string(index=False))
    told = pd.DataFrame([{"seed": table["seed"][0], **row} for table in tables for row in disputed(table)])
    told.round(4).to_csv(Path(args.out) / "disputed.csv", index=False)
    print(told.round(3).to_string(index=False))
