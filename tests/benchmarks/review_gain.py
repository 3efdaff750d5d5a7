"""What answers of review.py are worth: labels repaired per key, F1 after retraining; and whom noise_score doubts.

Real fields of MITOS-ATYPIA-14, val H03, test H05, the other eight slides for training. Patches are cut once, as the
Makefile's `mitos14` cuts them, without its search for negatives. Per seed 20 % of the training annotations (mitoses and
look-alikes alike, drawn at random) are flipped; val and test keep their labels. The reader answers by the labels before
the flip and is never wrong. Every training starts from --init_weights, which never saw these slides.

1. Keys. Stage 4 on the flipped labels gives the queues of review.py over all training nuclei, random ones among them:
   `noise` (noise_score) and `disagree` (label against model). Beside them cleanlab (5 folds, out of sample, the same
   start and epochs, cross entropy), and random order. A key repairs a label where it was flipped. Controls and repeats
   are left out of the queue: by default they take 15 % of the keys.
2. Retraining. Stage 2 on the labels after 0, 100 and 300 answers in the order of `noise`, and on the labels before the
   flip, judged on H05; then the same in random order. An answer relabels its patch; nothing is cut anew, so that the
   random nuclei are the same throughout. To be light: 4 epochs of steps of 64 patches (60 steps; the Makefile's 14 of
   128 have 112), fields scanned with 1500 candidates per mm2 and one view.
3. Doubt. Stage 4 on the annotated nuclei of all ten slides (and the random ones of eight), without any flip: is
   noise_score higher where the annotators disagree (a mitosis of two votes of three, confidence 0.65; a look-alike of
   one vote of three, 0.2) than where all agree? --doubt_seeds: one, since it is the slowest. The same of
   the labels that were not flipped in 1.

Stage 4 and cleanlab take 8 epochs, as in label_noise.py. Writes OUT/repaired.csv, retrained.csv, doubted.csv and
review_gain.png. What is there is not run again. Needs cleanlab (requirements-dev.txt).
"""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sorting import parser, run, train

try:
    from cleanlab.rank import get_label_quality_scores
except ImportError as error:
    raise SystemExit("this benchmark compares with cleanlab: pip install -r requirements-dev.txt") from error
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from dasc.data.datasets import read_dataset
from dasc.data.patches import load_patches
from dasc.review.queue import ranked, training_cells

SHARE = 0.2  # of the training annotations that are flipped
ANSWERS = (300, 100)
ORIGINS = {1: "annotated", 0: "hard_negative"}  # of an annotated nucleus, by its label
AGREED = {1: (1.0, 0.8), 0: (0.0,)}  # confidence of a mitosis, of a look-alike, on which the annotators agree
CONTESTED = {1: 0.65, 0: 0.2}


def once(result: Path, script: str, *flags: object) -> None:
    """Run one script unless its result is there."""
    if not result.exists():
        print(f"{result}: {run(script, *flags):.0f} s", flush=True)


def cut(args: Namespace) -> Path:
    """Patches of 64 px at 0.28 um/px, no shifted copies; their folder."""
    folder = Path(args.out) / "patches"
    size = ["--patch_size", 64, "--patch_um_per_px", 0.28, "--shifts", 0, "--random_per_field", 10]
    once(folder / "patches.csv", "pre/cut_patch_2.py", *data_flags(args), *size, "--out", folder)
    return folder


def data_flags(args: Namespace) -> list[str]:
    return ["--dataset", "mitos14", "--data_root", args.data_root, "--val", args.val, "--test", args.test]


def read_manifest(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "patches.csv", dtype={"image": str, "case": str})


def relabelled(table: pd.DataFrame, changed: np.ndarray) -> pd.DataFrame:
    """The manifest with the labels of annotated nuclei swapped where `changed` (N,) is true."""
    label = np.where(changed, 1 - table["label"], table["label"])
    return table.assign(label=label, origin=np.where(changed, [ORIGINS[one] for one in label], table["origin"]))


def flips(table: pd.DataFrame, seed: int) -> np.ndarray:
    """Which rows of the manifest are flipped, (N,) bool."""
    pool = np.flatnonzero((table["split"] == "train") & table["origin"].isin(ORIGINS.values()))
    flipped = np.zeros(len(table), dtype=bool)
    flipped[np.random.default_rng(seed).choice(pool, round(SHARE * len(pool)), replace=False)] = True
    return flipped


def network_flags(args: Namespace, seed: int) -> list:
    network = ["--backbone", args.backbone, "--stride", args.stride, "--init_weights", args.init_weights]
    return [*network, "--seed", seed, "--workers", 1]


def cells_of(args: Namespace, manifest: Path, out: Path, seed: int) -> pd.DataFrame:
    """The training nuclei of a manifest as review.py knows them after stage 4."""
    schedule = ["--lr", args.lr, "--epochs", args.epochs, "--warmup_share", 1 / args.epochs, "--batch_size", 64]
    flags = [*network_flags(args, seed), *schedule, "--manifest", manifest, "--out", out]
    once(out / "memory.csv", "DMU/main.py", *flags)
    return training_cells(out / "memory.csv", manifest, "", "")


def cleanlab_order(args: Namespace, folder: Path, cells: pd.DataFrame, seed: int) -> list[str]:
    """The patches, the one whose label cleanlab trusts least first."""
    path = Path(args.out) / f"cleanlab_{seed}.csv"
    if not path.exists():
        patches = load_patches([folder / patch for patch in cells["patch"]], 1)
        labels, probability = torch.tensor(cells["label"].to_numpy()), np.zeros((len(cells), 2))
        parts = StratifiedKFold(5, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels)
        for inside, outside in parts:
            probability[outside] = train(args, patches, labels, inside, seed, outside)[1]
        quality = get_label_quality_scores(labels.numpy(), probability)
        cells.assign(quality=quality)[["patch", "quality"]].to_csv(path, index=False)
    return pd.read_csv(path).sort_values("quality", kind="stable")["patch"].tolist()


class Flipped:
    """One seed's flip. truth: the manifest before it; flipped: (N,) bool, the wrong rows; cells: as of stage 4."""

    def __init__(self, args: Namespace, folder: Path, seed: int) -> None:
        self.args, self.folder, self.seed, self.home = args, folder, seed, Path(args.out) / str(seed)
        self.truth = read_manifest(folder)
        self.flipped = flips(self.truth, seed)
        self.cells = cells_of(args, self.labelled("flipped", self.flipped), self.home / "DMU", seed)

    def labelled(self, name: str, wrong: np.ndarray) -> Path:
        """The manifest of the labels of which `wrong` (N,) are flipped; beside its patches."""
        path = self.folder / f"{name}_{self.seed}.csv"
        relabelled(self.truth, wrong).to_csv(path, index=False)
        return path

    def order(self, queue: str) -> list[str]:
        """The patches in the order in which a queue asks them."""
        if queue == "random":
            return np.random.default_rng([self.seed, 1]).permutation(self.cells["patch"]).tolist()
        if queue == "cleanlab":
            return cleanlab_order(self.args, self.folder, self.cells, self.seed)
        return ranked(self.cells, queue)["patch"].tolist()

    def repaired(self, queue: str) -> list[dict]:
        """Rows of repaired.csv: how many of the first keys of a queue repair a label."""
        wrong = set(self.truth.loc[self.flipped, "patch"])
        facts = {"seed": self.seed, "queue": queue, "cells": len(self.cells), "flipped": len(wrong)}
        counts = np.cumsum([patch in wrong for patch in self.order(queue)])
        return [facts | {"keys": key, "repaired": count} for key, count in enumerate(counts, start=1)]

    def right(self) -> pd.DataFrame:
        """The cells without the flipped ones."""
        return self.cells[~self.cells["patch"].isin(self.truth.loc[self.flipped, "patch"])]

    def retrained(self, queue: str, answers: int) -> dict:
        """A row of retrained.csv: after so many answers; unflipped: after all that there are to give."""
        seen = self.truth["patch"].isin(self.order(queue)[:answers]) if answers else False
        left = self.flipped & ~np.asarray(seen) & (queue != "unflipped")
        name = f"{queue}_{answers}" if answers else queue
        metrics = retrain(self.args, self.labelled(name, left), self.home / name, self.seed)
        return {"seed": self.seed, "queue": queue, "answers": answers, "wrong_labels": int(left.sum()), **metrics}


def retrain(args: Namespace, manifest: Path, out: Path, seed: int) -> dict:
    """metrics.json of a network trained on a manifest, judged on the test slide."""
    schedule = ["--lr", 5e-4, "--epochs", 4, "--batch_size", 64, "--per_mm2", 1500, "--views", 1]
    flags = [*network_flags(args, seed), *schedule, "--manifest", manifest, "--out", out]
    once(out / "model.pt", "NS/sigle.py", *flags)
    judge = ["--model_path", out / "model.pt", "--out", out / "test", "--overlays", False, "--report", False]
    once(out / "test/metrics.json", "predict.py", *data_flags(args), *judge, "--workers", 1)
    return json.loads((out / "test/metrics.json").read_text(encoding="utf-8"))


def unflipped(args: Namespace, folder: Path, seed: int) -> pd.DataFrame:
    """The annotated nuclei of all slides (and random ones of eight) after stage 4 on the labels as they are."""
    manifest = folder / "all.csv"
    table = read_manifest(folder)
    table = table[table["origin"].isin(ORIGINS.values()) | (table["split"] == "train")]
    table.assign(split="train").to_csv(manifest, index=False)
    return cells_of(args, manifest, Path(args.out) / str(seed) / "DMU_unflipped", seed)


def doubted(args: Namespace, cells: pd.DataFrame, seed: int, labels: str) -> list[dict]:
    """Rows of doubted.csv: of each label, noise_score of contested nuclei against agreed ones."""
    known = read_dataset("mitos14", Path(args.data_root), [args.val], [args.test]).annotations
    known = known.round({"x_px": 2, "y_px": 2})[["image", "x_px", "y_px", "confidence"]]
    cells = cells.merge(known, on=["image", "x_px", "y_px"], how="left", validate="1:1")
    first = set(ranked(cells, "noise").index[:300])
    rows = []
    for label, contested in CONTESTED.items():
        of_label = cells[(cells["label"] == label) & cells["origin"].isin(ORIGINS.values())]
        kinds = {"contested": of_label["confidence"] == contested, "agreed": of_label["confidence"].isin(AGREED[label])}
        both = of_label[kinds["contested"] | kinds["agreed"]]
        auroc = roc_auc_score(both["confidence"] == contested, both["noise_score"])
        row = {
            "labels": labels,
            "seed": seed,
            "label": label,
            "auroc": auroc,
            "without_confidence": len(of_label) - len(both),
        }
        for kind, chosen in kinds.items():
            inside = sum(index in first for index in of_label.index[chosen])
            row |= {kind: int(chosen.sum()), f"{kind}_in_first_300": inside}
            row[f"{kind}_noise_score"] = of_label.loc[chosen, "noise_score"].median()
        rows.append(row)
    return rows


def draw(path: Path, repaired: pd.DataFrame, retrained: pd.DataFrame) -> None:
    """Labels repaired by keys; F1 and average precision by answers: means of the seeds."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for queue, rows in repaired[repaired["keys"] <= max(ANSWERS)].groupby("queue", sort=False):
        rows.groupby("keys")["repaired"].mean().plot(ax=axes[0], label=queue)
    axes[0].set(xlabel="keys", ylabel="labels repaired")
    for axis, measure in zip(axes[1:], ("f1", "average_precision"), strict=True):
        without = retrained[retrained["answers"] == 0]
        for queue, rows in retrained[retrained["answers"] > 0].groupby("queue", sort=False):
            rows = pd.concat([without[without["queue"] == "flipped"], rows])
            rows.groupby("answers")[measure].mean().plot(ax=axis, marker="o", label=queue)
        ceiling = retrained.loc[retrained["queue"] == "unflipped", measure].mean()
        axis.axhline(ceiling, color="gray", linestyle="--", label="unflipped")
        axis.set(xlabel="answers", ylabel=measure.replace("_", " "), ylim=(0, 1))
    for axis in axes:
        axis.legend()
    figure.savefig(path, dpi=120)


def write(args: Namespace, name: str, rows: list[dict]) -> pd.DataFrame:
    """Write the rows so far to OUT/name.csv."""
    table = pd.DataFrame(rows).round(4)
    table.to_csv(Path(args.out) / f"{name}.csv", index=False)
    return table


def report(args: Namespace, repaired: list[dict], retrained: list[dict], doubts: list[dict]) -> None:
    """Write and print the means of the seeds, and draw them."""
    keys, answers = write(args, "repaired", repaired), write(args, "retrained", retrained)
    draw(Path(args.out) / "review_gain.png", keys, answers)
    keys = keys[keys["keys"].isin((100, 200, 300))]
    print(keys.pivot_table(index="queue", columns="keys", values="repaired", aggfunc=["mean", "min", "max"]).round(1))
    print(answers.groupby(["queue", "answers"])[["wrong_labels", "f1", "average_precision"]].mean().round(3))
    print(write(args, "doubted", doubts).round(3).to_string(index=False), flush=True)


if __name__ == "__main__":
    parser = parser(__doc__, "results/review_gain")
    parser.set_defaults(init_weights="weights/dasc_figures.pt")
    parser.add_argument("--doubt_seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 does for the scripts
    folder = cut(args)
    every, repaired, retrained, doubts = [], [], [], []
    for seed in args.seeds:
        every.append(one := Flipped(args, folder, seed))
        repaired += [row for queue in ("noise", "disagree", "cleanlab", "random") for row in one.repaired(queue)]
        write(args, "repaired", repaired)
        doubts += doubted(args, one.right(), seed, "left as annotated among flipped ones")
        write(args, "doubted", doubts)
        for queue, answers in (("flipped", 0), *(("noise", answers) for answers in ANSWERS), ("unflipped", 0)):
            retrained.append(one.retrained(queue, answers))
            write(args, "retrained", retrained)
        if seed in args.doubt_seeds:
            doubts += doubted(args, unflipped(args, folder, seed), seed, "as annotated")
            write(args, "doubted", doubts)
    report(args, repaired, retrained, doubts)
    retrained += [one.retrained("random", answers) for one in every for answers in ANSWERS]
    report(args, repaired, retrained, doubts)
