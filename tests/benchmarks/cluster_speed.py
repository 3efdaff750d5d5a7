"""How long stage 8's subclasses of many patches take: drawn features, as unordered as can be and in groups."""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from dasc.model.clusters import concentration, subclasses

GROUPS = 40  # directions that the features of the second run lie about

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patches", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--number", type=int, nargs="+", default=[4, 10, 100], help="subclasses per label")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(args.patches, args.width)).astype(np.float32)
    centres = 3 * rng.normal(size=(GROUPS, args.width)).astype(np.float32)
    labels = rng.integers(0, 2, args.patches)
    for name, features in (
        ("no groups", noise),
        (f"{GROUPS} groups", noise + centres[rng.integers(0, GROUPS, args.patches)]),
    ):
        for number in args.number:
            began = time.perf_counter()
            concentration(features, subclasses(features, labels, number, 0))
            print(f"{name}, {number} per label: {time.perf_counter() - began:.1f} s", flush=True)
