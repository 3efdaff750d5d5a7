"""What a threshold chosen on a few counted fields is worth on the other fields of the same slide.

Reads what predict.py wrote for one split of MITOS-ATYPIA-14. Draws so many of its fields at random, chooses the
threshold with the best F1 on them (f1_best) and the middle of its plateau (f1_plateau, what predict.py prints), and
judges the others by both; beside them the same at the model's own threshold.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd

from dasc.data.datasets import read_dataset
from dasc.judge.metrics import (
    RADIUS_UM,
    choose_threshold,
    counts_to_scores,
    fields_in_um,
    match_detections,
    plateau_threshold,
)


def pooled_f1(fields: list[tuple], threshold: float) -> float:
    """F1 of fields (truth_um, detections_um, probability) at a threshold."""
    counts = np.zeros(3, dtype=int)
    for truth_um, detections_um, probability in fields:
        called_um = detections_um[probability >= threshold]
        right = int((match_detections(truth_um, called_um, RADIUS_UM) >= 0).sum())
        counts += (right, len(called_um) - right, len(truth_um) - right)
    return float(counts_to_scores(*counts)[2])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="MITOS-ATYPIA-14")
    parser.add_argument("--val", default="H03")
    parser.add_argument("--test", default="H05")
    parser.add_argument("--predicted", type=Path, nargs="+", required=True, help="--out of predict.py, split test")
    parser.add_argument("--fields", type=int, nargs="+", default=[3, 5, 10, 20], help="fields that were counted")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    mitoses = read_dataset("mitos14", args.data_root, [args.val], [args.test]).annotations.query("label == 1")
    rows = []
    for folder in args.predicted:
        detections = pd.read_csv(folder / "detections.csv", dtype={"image": str})
        resolutions = pd.read_csv(folder / "counts.csv", dtype={"image": str}).set_index("image")["um_per_px"]
        own = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["threshold"]
        fields = fields_in_um(mitoses, detections, resolutions)
        best = choose_threshold(fields, RADIUS_UM)[1]["f1"].max()
        rng = np.random.default_rng(args.seed)
        for number in args.fields:
            f1 = {"best": [], "plateau": [], "model": []}
            for _ in range(args.draws):
                order = rng.permutation(len(fields))
                peak, curve = choose_threshold([fields[place] for place in order[:number]], RADIUS_UM)
                others = [fields[place] for place in order[number:]]
                thresholds = {"best": peak, "plateau": plateau_threshold(curve), "model": own}
                for name, threshold in thresholds.items():
                    f1[name].append(pooled_f1(others, threshold))
            row = {"predicted": str(folder), "fields": number}
            row |= {f"f1_{name}": np.mean(values) for name, values in f1.items()}
            row |= {f"f1_{name}_lowest_tenth": np.quantile(values, 0.1) for name, values in f1.items()}
            rows.append(row | {"oracle_f1_all_fields": best})
    print(pd.DataFrame(rows).round(3).to_string(index=False))
