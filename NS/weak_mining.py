"""Hard negative mining in a weakly labelled pool: what looks like the weak model's errors joins the training split.

Reads patches.csv (stage 1, 3 or pre/split_patches.py), the model of NS/sigle.py trained on it, and a pool of patches
known to be negative only from their slide: a folder, or a CSV with the columns patch and case.
Writes OUT, a copy of the patches with the mined ones as negatives of the training split: patches.csv to train the
strong model on and patches.npy (all patches in one file), mined.csv (a row per mined patch), contact_sheet.png,
false_positives.csv and run.json.
The pool's features stay in FEATURES for the next run.
"""

import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dasc.flags import Count, Device, Natural, Share, read_flags

# Edit here, or override one run with the flag of the same name.
MANIFEST = "data/patches_weak/patches.csv"  # labelled patches that the weak model was trained on
MODEL_PATH = "results/weak/model.pt"  # the weak model
POOL = "data/weakly_labeled_dataset"  # weakly labelled patches: a folder, or a CSV with the columns patch and case
OUT = "data/patches_mined"  # folder to write
FEATURES = "results/pool_features"  # folder that keeps the pool's features, about 1.3 KB a patch and model
QUERY: Literal["l2", "cosine", "random", "searched"] = (
    "l2"  # l2 or cosine: nearest to a false positive; random: as many
)
# as l2 takes; searched: p above SEARCH_ABOVE
K: Count = 20  # pool patches taken per false positive
FP_ABOVE: Share = 0.1  # a negative of validation with at least this probability is a false positive
SEARCH_ABOVE: Share = 0.5  # probability above which `searched` takes a pool patch: the rule of stage 3
SAME_CORRELATION: Share = 0.95  # thumbnails that correlate by this much show the same tissue, which is not mined again
UNKNOWN_SLIDES = False  # True: take pool patches whose slide is not known
SHEET_ROWS: Natural = 40  # false positives on the contact sheet, the most probable first
DEVICE: Device = "auto"  # auto takes cuda, else mps, else cpu
BATCH_SIZE: Count = 64  # patches embedded together; less takes less memory
PACK = True  # also write patches.npy, which trainings map: 3 S^2 bytes per patch of S px; False: they read every file
SEED = 0  # of the query `random`
WORKERS: Count = 2  # threads that read patches

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

import numpy as np
import pandas as pd
from tqdm import tqdm

from dasc.data.cut import read_cut
from dasc.data.pack import write_pack
from dasc.data.patches import copy_patches, load_patches, read_patch, write_patch
from dasc.data.tables import PATCHES, read_patches, write_table
from dasc.errors import InputError
from dasc.files import check_replaceable, replacing_folder, sha256, write_csv
from dasc.model.checkpoint import load_detector
from dasc.model.inference import embed_patches
from dasc.report.plots import contact_sheet
from dasc.run import only_run, pick_device, record_run, run_script
from dasc.weak.duplicates import near_duplicates, thumbnails
from dasc.weak.mining import METRICS, nearest, taken_once
from dasc.weak.named import read_square
from dasc.weak.pool import PoolFeatures, read_pool

MINED = "train/negative/mined_"  # how the names of mined patches begin
COLUMNS = 12  # of the contact sheet: a false positive and its nearest neighbours


def main(args) -> int:
    out, manifest, model = Path(args.out), Path(args.manifest), Path(args.model_path)
    check_replaceable(out, "mined.csv")
    device = pick_device(args.device)
    table = read_patches(manifest)
    detector = load_detector(model, device)
    if detector.manifest_sha256 != sha256(manifest):
        raise InputError(f"{model}: was not trained on {manifest}, so its errors on that val split say nothing")
    sizes = pool_sizes(manifest, Path(args.pool), detector.patch_size)
    pool_folder, pool = read_pool(Path(args.pool), args.unknown_slides)
    allowed = other_slides(table, pool, args)
    false_positives, queries = find_false_positives(table, detector.network, args)
    protected = thumbnails([manifest.parent / patch for patch in table["patch"]], args.workers)
    features = PoolFeatures(Path(args.features), detector.sha256, queries.shape[1])
    with only_run(Path(args.features)):  # several runs may share them
        features.embed(detector.network, pool_folder, pool["patch"].tolist(), sizes, args.batch_size, args.workers)
    mined, neighbours, distances, same = mine(features, allowed, protected, queries, args, device)
    mined = named(mined, pool, table, false_positives, features)

    def from_pool(patch: str) -> np.ndarray:
        return read_square(pool_folder / patch, *sizes)

    if args.query in METRICS:
        groups = neighbour_groups(false_positives, pool["patch"].to_numpy()[neighbours], distances, from_pool, args)
    else:
        groups = drawn_groups(false_positives, mined, from_pool, args)
    left_out = {"of val or test slides": int((~allowed).sum()), "near-duplicates of labelled patches": same}
    facts = {"false_positives": len(false_positives), "pool": len(pool), "mined": len(mined), "left_out": left_out}
    with replacing_folder(out, "mined.csv") as partial:
        write_mined(partial, manifest, table, mined, from_pool, args)
        write_csv(partial / "false_positives.csv", false_positives.round(6))
        contact_sheet(partial / "contact_sheet.png", groups, columns=COLUMNS)
        record_run(partial, args, inputs={manifest: len(table), model: 1, args.pool: len(pool)}, device=device, **facts)
    print(f"{len(false_positives)} false positives with p >= {args.fp_above:g} on val")
    print(f"{len(pool)} pool patches; left out: {', '.join(f'{count} {why}' for why, count in left_out.items())}")
    print(f"mined {len(mined)} ({args.query}) into the training split; wrote {out / 'patches.csv'}")
    return 0


def other_slides(table: pd.DataFrame, pool: pd.DataFrame, args) -> np.ndarray:
    """Which pool patches lie on other slides than validation and test, (N,) bool: a slide is never on two sides."""
    allowed = ~pool["case"].isin(set(table.loc[table["split"] != "train", "case"])).to_numpy()
    if args.query != "searched" and args.k > allowed.sum():
        raise InputError(
            f"--k {args.k}: only {allowed.sum()} of the {len(pool)} pool patches lie on other slides than val and "
            "test; lower --k, or enlarge the pool"
        )
    return allowed


def named(mined: pd.DataFrame, pool: pd.DataFrame, table: pd.DataFrame, false_positives, features) -> pd.DataFrame:
    """The mined patches with their names in OUT, what they are in the pool, and the false positive nearest to each."""
    mined = pd.concat([mined, pool.iloc[mined["row"]].reset_index(drop=True)], axis=1)
    mined = mined.rename(columns={"patch": "pool_patch"})
    before = int(table["patch"].str.startswith(MINED).sum())
    mined["patch"] = [f"{MINED}{before + number:06d}.png" for number in range(len(mined))]
    mined["false_positive"] = false_positives["patch"].reindex(mined["query"]).fillna("").to_numpy()
    mined["score"] = features.scores(features.rows[mined["row"]]).round(6)
    return mined


def write_mined(partial: Path, manifest: Path, table: pd.DataFrame, mined: pd.DataFrame, from_pool, args) -> None:
    """Write the labelled patches and the mined ones, patches.csv and patches.npy of both, and mined.csv."""
    copy_patches(manifest.parent, partial, table["patch"])
    for row in tqdm(mined.itertuples(), "mined patches", len(mined), leave=False):
        write_patch(partial / row.patch, from_pool(row.pool_patch).transpose(2, 0, 1))
    rows = mined.assign(split="train", label=0, origin="mined", point_x_px=np.nan, point_y_px=np.nan)
    both = pd.concat([table, rows[list(PATCHES)]], ignore_index=True)
    write_table(partial / "patches.csv", both, PATCHES)
    if args.pack:
        write_pack(partial, both["patch"].tolist(), args.workers)
    columns = ["patch", "distance", "false_positive", "answers", "score", "pool_patch", "case"]
    write_csv(partial / "mined.csv", mined[columns].round({"distance": 6}))


def pool_sizes(manifest: Path, pool: Path, patch_size: int) -> tuple[int, int]:
    """Side of a pool patch in px as it must be on disk, and as the network takes it; checks a pool that was cut."""
    cut = read_cut(manifest.parent)
    if pool.is_file() and (pool.parent / "cut.json").is_file():
        pool_cut = read_cut(pool.parent)
        for name in ("um_per_px", "normalise_stain"):
            found, expected = getattr(pool_cut, name), getattr(cut, name)
            if found != expected:
                raise InputError(f"{pool}: cut with {name} {found}, the labelled patches with {expected}")
    return cut.source_px or patch_size, patch_size


def find_false_positives(table: pd.DataFrame, network, args) -> tuple[pd.DataFrame, np.ndarray]:
    """The false positives of val, most probable first (patch, case, probability), and their features (Q, C)."""
    negatives = table[(table["split"] == "val") & (table["label"] == 0)]
    if negatives.empty:
        raise InputError(f"{args.manifest}: split val has no negative patch; see --val")
    patches = load_patches([Path(args.manifest).parent / patch for patch in negatives["patch"]], args.workers)
    features, scores = embed_patches(network, patches, args.batch_size)
    order = np.argsort(-scores, kind="stable")
    order = order[scores[order] >= args.fp_above]
    if not len(order) and args.query != "searched":
        raise InputError(
            f"no false positive: of {len(negatives)} val negatives none reaches p >= {args.fp_above:g} (the highest "
            f"has {scores.max():.4f}); lower --fp_above (FP_ABOVE)"
        )
    found = negatives.iloc[order][["patch", "case"]].assign(probability=scores[order]).reset_index(drop=True)
    return found, features[order].astype(np.float16)  # the precision of the pool's


def mine(features: PoolFeatures, allowed: np.ndarray, protected: np.ndarray, queries, args, device) -> tuple:
    """Choose pool patches, none of which shows what a labelled patch shows.

    Near-duplicates are looked for among the chosen only, and the choice is made again without them until there is
    none: the same result as leaving them out at first, for much less work.

    Returns: a table with row (of the pool), query (the false positive it is nearest to, -1 for none), distance (NaN for
        none) and answers (how many false positives have it among their k nearest); the neighbours (Q, k) as rows of the
        pool and their distances (Q, k); how many near-duplicates were found.
    """
    allowed, same, looked_at = allowed.copy(), 0, np.zeros(len(allowed), dtype=bool)
    row_of = np.full(len(features), -1)
    row_of[features.rows] = np.arange(len(features.rows))
    while True:
        record_allowed = np.zeros(len(features), dtype=bool)
        record_allowed[features.rows[allowed]] = True
        neighbours, distances = np.empty((0, 0), int), np.empty((0, 0))
        if args.query == "searched":
            rows = np.flatnonzero(allowed & (features.scores(features.rows) > args.search_above))
            table = pd.DataFrame({"row": rows, "query": -1, "distance": np.nan, "answers": 0})
        else:
            metric = args.query if args.query in METRICS else "l2"
            found, distances = nearest(queries, features.read, features.at, record_allowed, args.k, metric, device)
            neighbours = row_of[found]
            columns = taken_once(neighbours, distances)
            table = pd.DataFrame(dict(zip(("row", "query", "distance", "answers"), columns, strict=True)))
        if args.query == "random":
            drawn = np.random.default_rng(args.seed).permutation(len(allowed))
            rows = np.sort(drawn[allowed[drawn]][: len(table)])
            table = pd.DataFrame({"row": rows, "query": -1, "distance": np.nan, "answers": 0})
        chosen = np.union1d(table["row"], neighbours.ravel()).astype(int)
        chosen = chosen[~looked_at[chosen]]
        looked_at[chosen] = True
        twins = chosen[near_duplicates(features.thumbnails(features.rows[chosen]), protected, args.same_correlation)]
        if not len(twins):
            break
        allowed[twins], same = False, same + len(twins)
    if table.empty:
        raise InputError(f"no pool patch has p > {args.search_above:g}; lower --search_above (SEARCH_ABOVE)")
    return table, neighbours, distances, same


def neighbour_groups(false_positives: pd.DataFrame, neighbours, distances, from_pool, args) -> list:
    """Groups of the contact sheet: each false positive, then its nearest pool patches."""
    groups = []
    for query, row in enumerate(false_positives.head(args.sheet_rows).itertuples()):
        near = neighbours[query][: COLUMNS - 1]
        patches = [read_patch(Path(args.manifest).parent / row.patch), *map(from_pool, near)]
        captions = [f"p {row.probability:.2f}", *(f"{args.query} {one:.3f}" for one in distances[query][: len(near)])]
        groups.append((f"false positive {row.patch} and its nearest", np.stack(patches), captions))
    return groups


def drawn_groups(false_positives: pd.DataFrame, mined: pd.DataFrame, from_pool, args) -> list:
    """Groups of the contact sheet where no patch answers a false positive: some of both."""
    groups = []
    if len(false_positives):
        some = false_positives.head(2 * COLUMNS)
        patches = np.stack([read_patch(Path(args.manifest).parent / patch) for patch in some["patch"]])
        groups.append((f"{len(false_positives)} false positives", patches, [f"p {p:.2f}" for p in some["probability"]]))
    some = mined.sample(min(len(mined), 2 * COLUMNS), random_state=args.seed)
    patches = np.stack([from_pool(patch) for patch in some["pool_patch"]])
    groups.append((f"{len(mined)} mined ({args.query})", patches, [f"p {score:.2f}" for score in some["score"]]))
    return groups


if __name__ == "__main__":
    run_script(main, args)
