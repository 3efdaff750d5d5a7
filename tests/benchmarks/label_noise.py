"""Does stage 4 find wrong labels? Flips a known share of them, runs stages 4 and 5, and asks who ranks those highest.

Patches: as many annotated mitoses, annotated look-alikes and random nuclei of MITOS-ATYPIA-14, all slides. Beside the
scripts' own ranking (`noise_score`), on the same patches, backbone, weak views and epochs, with cross entropy: cleanlab
(5-fold out-of-sample probabilities), and one plain network with its mean probability over training and its last
epoch's loss. With --paper True also stages 4 and 5 with the paper's constants. One row per seed, noise and method in
OUT/label_noise_*.csv. Needs cleanlab.
"""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from cleanlab.rank import get_label_quality_scores
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sorting import cut, drawn, parser, stages, train

from dasc.data.patches import load_patches
from dasc.flags import true_or_false

NOISES = {"10": (0.1, False), "20": (0.2, False), "40": (0.4, False), "mitoses": (0.2, True)}  # share; mitoses only


def flipped_manifest(args, folder: Path, noise: str, seed: int) -> tuple[Path, pd.DataFrame]:
    """Write the manifest of one cell, every patch in training, a share of the labels wrong; its path and rows."""
    share, mitoses_only = NOISES[noise]
    rng = np.random.default_rng(seed)
    table = drawn(args, folder, rng)
    pool = np.flatnonzero((table["label"] == 1) | (not mitoses_only))
    flipped = np.zeros(len(table), dtype=bool)
    flipped[rng.choice(pool, round(share * len(pool)), replace=False)] = True
    table["label"] = np.where(flipped, 1 - table["label"], table["label"])
    path = folder / f"patches_{noise}_{seed}.csv"
    table.to_csv(path, index=False)
    return path, table.assign(flipped=flipped)


def judged(truth: np.ndarray, score: np.ndarray, seconds: float, flagged: np.ndarray | None = None) -> dict:
    """One row of figures: ranking, and precision and recall of what is flagged, where there is a rule."""
    row = {"ap": average_precision_score(truth, score), "auroc": roc_auc_score(truth, score), "seconds": seconds}
    if flagged is not None:
        right = (flagged & truth).sum()
        row |= {"precision": right / max(flagged.sum(), 1), "recall": right / truth.sum(), "flagged": flagged.sum()}
    return row


def cell(args, folder: Path, noise: str, seed: int) -> dict[str, dict]:
    """Figures of every method on one set of flipped labels."""
    manifest, table = flipped_manifest(args, folder, noise, seed)
    truth, labels = table["flipped"].to_numpy(), torch.tensor(table["label"].to_numpy())
    out = Path(args.out) / f"{noise}_{seed}"
    rows = {}
    memory, seconds = stages(args, manifest, out / "dasc", seed, noisy_share=0.5)
    rows["stages 4-5"] = judged(truth, memory["noise_score"], seconds, memory["verdict"].eq("noisy").to_numpy())
    if args.paper:
        paper = ("--loss_q", 0, "--bias_correction", "False")
        memory, seconds = stages(args, manifest, out / "paper", seed, *paper, noisy_share=0)
        counts = memory["noisy"] / (memory["clean"] + memory["hard"] + memory["noisy"])
        rows["paper: noisy epochs"] = judged(truth, counts, seconds, memory["verdict"].eq("noisy").to_numpy())
        rows["paper's constants: noise_score"] = judged(truth, memory["noise_score"], seconds)

    patches = load_patches([folder / patch for patch in table["patch"]], 2)
    everything = np.arange(len(labels))
    began = time.perf_counter()
    history, _ = train(args, patches, labels, everything, seed)
    seconds = time.perf_counter() - began
    rows["mean probability"] = judged(truth, 1 - history.mean(axis=0), seconds)
    rows["last epoch's loss"] = judged(truth, 1 - history[-1], seconds)
    began, probability = time.perf_counter(), np.zeros((len(labels), 2))
    for inside, outside in StratifiedKFold(5, shuffle=True, random_state=seed).split(everything, labels):
        probability[outside] = train(args, patches, labels, inside, seed, outside)[1]
    quality = get_label_quality_scores(labels.numpy(), probability)
    rows["cleanlab"] = judged(truth, 1 - quality, time.perf_counter() - began)
    return rows


if __name__ == "__main__":
    parser = parser(__doc__, "results/label_noise")
    parser.add_argument("--noises", nargs="+", choices=NOISES, default=list(NOISES))
    parser.add_argument("--paper", type=true_or_false, default=True, help="the paper's constants too")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the same for every method; the scripts take theirs from OMP_NUM_THREADS
    folder = cut(args)
    rows = []
    for noise in args.noises:
        for seed in args.seeds:
            figures = cell(args, folder, noise, seed)
            rows += [{"noise": noise, "seed": seed, "method": name, **row} for name, row in figures.items()]
            print(pd.DataFrame(rows[-len(figures) :]).round(3).to_string(index=False), flush=True)
            name = f"label_noise_{'_'.join(args.noises)}.csv"
            pd.DataFrame(rows).round(4).to_csv(Path(args.out) / name, index=False)
