"""Hard negative mining: the pool patches nearest to a network's false positives, exactly and in little memory."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dasc.errors import InputError

METRICS = ("l2", "cosine")
BLOCK = 16_384  # pool patches compared at a time: 1,000 queries make 64 MiB of scores
SPARE = 16  # neighbours kept beyond k until their distances are computed again in double precision


@torch.inference_mode()
def nearest(
    queries: np.ndarray,
    read: Callable[[int, int], np.ndarray],
    at: Callable[[np.ndarray], np.ndarray],
    allowed: np.ndarray,
    k: int,
    metric: str,
    device: torch.device,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest allowed pool patches of every query, by comparing each query with each of them.

    queries: (Q, C), features. allowed: (N,) bool, the rows of the pool that may be taken.
    read: gives features (stop - start, C) of the pool's rows from start to stop. at: those (R, C) of given rows (R,).
    metric: l2 (Euclidean distance) or cosine (1 - cosine similarity, so that the most similar are the nearest).
    Returns: rows (Q, k) int64 and distances (Q, k) float64, nearest first; of equally near ones the lower row, unless
    more than SPARE of them compete for the last place.
    Raises: InputError: features that do not have the queries' width, or fewer than k allowed rows.
    """
    if k > allowed.sum():
        raise InputError(f"k {k}: only {allowed.sum()} pool patches may be mined; lower --k")
    wanted = torch.from_numpy(np.asarray(queries, dtype=np.float32)).to(device)
    # Distances do not change when both sides move; near 0 the squares below lose fewer digits.
    centre = wanted.mean(dim=0) if metric == "l2" else torch.zeros_like(wanted[0])
    wanted = wanted - centre if metric == "l2" else F.normalize(wanted)
    kept = k + SPARE
    best = torch.full((len(wanted), kept), -torch.inf, device=device)
    rows = torch.zeros((len(wanted), kept), dtype=torch.long, device=device)
    for start in tqdm(range(0, len(allowed), BLOCK), "nearest", leave=False, disable=len(allowed) <= BLOCK):
        takeable = allowed[start : start + BLOCK]
        if not takeable.any():
            continue
        block = torch.from_numpy(np.ascontiguousarray(read(start, start + len(takeable)))).to(device).float()
        if block.shape != (len(takeable), wanted.shape[1]):
            raise InputError(f"pool features {tuple(block.shape)}, expected {(len(takeable), wanted.shape[1])}")
        block = block - centre if metric == "l2" else F.normalize(block)
        scores = wanted @ block.T  # the largest is the nearest: |q - x|^2 = |q|^2 - 2 (q x - |x|^2 / 2)
        if metric == "l2":
            scores -= block.square().sum(dim=1) / 2
        scores[:, torch.from_numpy(~takeable).to(device)] = -torch.inf
        top, place = scores.topk(min(kept, len(takeable)), dim=1)
        best, order = torch.cat([best, top], dim=1).topk(kept, dim=1)
        rows = torch.cat([rows, place + start], dim=1).gather(1, order)

    found = (rows.cpu().numpy(), torch.isfinite(best).cpu().numpy())
    neighbours, distances = np.empty((len(queries), k), np.int64), np.empty((len(queries), k))
    for index, (candidates, real) in enumerate(zip(*found, strict=True)):
        candidates = candidates[real]
        exact = distance(queries[index], at(candidates), metric)
        order = np.lexsort((candidates, exact))[:k]
        neighbours[index], distances[index] = candidates[order], exact[order]
    return neighbours, distances


def distance(query: np.ndarray, features: np.ndarray, metric: str) -> np.ndarray:
    """Distances (N,) float64 of features (N, C) from one query (C,).

    metric: as `nearest`.
    """
    query, features = np.asarray(query, np.float64), np.asarray(features, np.float64)
    if metric == "l2":
        return np.linalg.norm(features - query, axis=1)
    lengths = np.linalg.norm(features, axis=1) * np.linalg.norm(query)
    return 1 - features @ query / lengths.clip(min=1e-12)


def taken_once(neighbours: np.ndarray, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every row of neighbours (Q, k) once, in ascending order, with the query it is nearest to.

    Returns: rows (M,), the nearest query (M,), the distance to it (M,), and how many queries have it (M,).
    """
    k = neighbours.shape[1]
    order = np.lexsort((np.repeat(np.arange(len(neighbours)), k), distances.ravel(), neighbours.ravel()))
    rows, first, count = np.unique(neighbours.ravel()[order], return_index=True, return_counts=True)
    return rows, order[first] // k, distances.ravel()[order[first]], count
