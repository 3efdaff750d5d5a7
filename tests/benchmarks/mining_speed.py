"""How long the nearest pool patches of many false positives take, and the memory: drawn features in a file, as pooled.

Writes the file (1.3 GB for a million patches) to --out, where a second run finds it again. Not run on Windows, which
does not tell a process its peak memory this way.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from dasc.weak.mining import METRICS, nearest, taken_once
from dasc.weak.pool import PoolFeatures

CHUNK = 10_000  # records written at a time


def drawn(rng: np.random.Generator, rows: int, width: int) -> np.ndarray:
    """Features that are half zeros, as after a ReLU."""
    return np.maximum(rng.normal(scale=0.5, size=(rows, width)), 0).astype(np.float16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--pool", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="results/mining_speed")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    features = PoolFeatures(Path(args.out), f"{args.width}_{args.pool}", args.width)
    queries = drawn(rng, args.queries, args.width)
    if len(features) != args.pool:
        features.path.parent.mkdir(parents=True, exist_ok=True)
        with features.path.open("wb") as file:
            for start in range(0, args.pool, CHUNK):
                records = np.zeros(min(CHUNK, args.pool - start), features.type)
                records["features"] = drawn(rng, len(records), args.width)
                file.write(records.tobytes())
    allowed = np.ones(args.pool, dtype=bool)
    for metric in METRICS:
        began = time.perf_counter()
        found = nearest(queries, features.read, features.at, allowed, args.k, metric, torch.device("cpu"))
        rows = taken_once(*found)[0]
        seconds, mib = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{metric}: {seconds:.1f} s, {len(rows)} patches, peak {mib:.0f} MiB", flush=True)
