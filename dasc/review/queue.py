"""Which cells a reader is shown, and in which order: queue.csv.

A list sorted by suspicion gives its answers away. So every block of cells is shuffled, cells that nobody doubts stand
among them (controls), and some cells come a second time, turned (repeats).
"""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import logit

from dasc.data.cut import read_cut_fields
from dasc.data.tables import join_by_patch, read_hard, read_memory, read_patches, read_table
from dasc.errors import InputError
from dasc.files import write_csv
from dasc.images.find import find_images

BLOCK = 48  # cells that are shuffled together: two pages of the gallery
TURNS = 8  # ways to turn and mirror a square; 0 leaves it as it is
UNSUSPICIOUS = 0.5  # share of the cells, the least doubtful ones of each label, that controls are drawn from
STRATA = (3, 4)  # of an audit: above and below the threshold, each of about as many detections

# queue.csv: one row per cell that is shown. label: 1, 0 or empty without an annotation; called: what the cell counts as
# today, by its label or by the detector; probability: of a mitosis, by the model; origin: as in patches.csv, or
# detection; kind: queue, control or repeat; repeat_of: item shown again; stratum: of an audit, 0 the most probable.
QUEUE = {
    "item": int,
    "image": str,
    "path": str,
    "case": str,
    "split": str,
    "x_px": float,
    "y_px": float,
    "um_per_px": float,
    "label": float,
    "called": int,
    "probability": float,
    "noise_score": float,
    "origin": str,
    "block": int,
    "kind": str,
    "repeat_of": float,
    "turn": int,
    "stratum": float,
}
CELL = ["image", "x_px", "y_px"]  # what makes two items one cell
DETECTIONS = {"image": str, "x_px": float, "y_px": float, "probability": float, "mitosis": int}
COUNTS = {"image": str, "width_px": int, "height_px": int, "um_per_px": float, "mitoses": int}
COUNTS |= {f"hotspot_{name}": float for name in ("x_px", "y_px", "width_px", "height_px")}
CONTESTED = "contested"
KINDS = {"queue": "to be judged", "control": "that nobody doubts", "repeat": "shown again"}


def read_queue(path: Path) -> pd.DataFrame:
    """Read a queue.csv. InputError as `read_table`, and where its items are not numbered from 0 on."""
    table = read_table(path, QUEUE, "python review.py")
    if not len(table) or (table["item"] != np.arange(len(table))).any():
        raise InputError(f"{path}: item is not 0, 1, 2 and so on; delete the file and run review.py again")
    wrong = ~table["um_per_px"].gt(0) | table[["x_px", "y_px"]].isna().any(axis=1) | ~table["turn"].between(0, 7)
    if wrong.any():
        raise InputError(f"{path}, row {int(np.argmax(wrong)) + 2}: no place, resolution or turn of a cell")
    return table


def write_queue(path: Path, table: pd.DataFrame) -> None:
    """Write queue.csv, or leave the same one in its place.

    Raises:
        InputError: another queue lies there; answers to it would be lost.
    """
    new = path.with_name(".queue.new.csv")
    write_csv(new, table[list(QUEUE)])
    try:
        if not path.is_file():
            new.replace(path)
        elif path.read_bytes() != new.read_bytes():
            raise InputError(
                f"{path}: another queue, of other patches, another model or other flags; repeat those to go on with "
                "it, or name another --out"
            )
    finally:
        new.unlink(missing_ok=True)


def training_cells(memory_path: Path, manifest: Path, hard_path: str, data_root: str) -> pd.DataFrame:
    """The nuclei of the training patches, one row each, without shifted copies: columns of queue.csv and two more.

    doubt: share of the counted epochs in which the label was noisy. clean_verdict: stage 5 finds no fault with it.

    Raises:
        InputError: tables of different runs; patches that come from no fields.
    """
    patches = read_patches(manifest)
    train = patches[patches["split"] == "train"].reset_index(drop=True)
    memory = read_memory(memory_path)
    cells = join_by_patch(train, memory.drop(columns="origin"), manifest, memory_path)
    cells["clean_verdict"] = False
    if hard_path:
        hard = read_hard(Path(hard_path))
        cells["clean_verdict"] = join_by_patch(train, hard, manifest, Path(hard_path))["verdict"] == "clean"
    counted = cells["clean"] + cells["hard"] + cells["noisy"]
    cells["doubt"] = cells["noisy"] / counted
    cells["probability"] = np.where(cells["label"] == 1, 1 - cells["noise_score"], cells["noise_score"])
    cells["called"] = cells["label"]
    cells = cells[cells["origin"] != "shifted"]
    root, fields, _ = read_cut_fields(manifest.parent, data_root)
    return _with_fields(cells, fields.assign(path=[str(root / path) for path in fields["path"]]), manifest)


def detected_cells(folder: Path, images: list[str]) -> pd.DataFrame:
    """The detections of a predict folder, one row each: columns of queue.csv, split train.

    images: what predict.py was given, or a folder that holds those images; matched by their names.

    Raises:
        InputError: no detection; an image of the folder that is not among these, or is there twice.
    """
    detections, counts = read_predicted(folder)
    if detections.empty:
        raise InputError(f"{folder / 'detections.csv'}: no detection, so there is nothing to review")
    files: dict[str, set[Path]] = {}
    for place in images:
        if not Path(place).exists():
            raise InputError(f"{place}: no such file or folder; --images names what predict.py read")
    for file in find_images([Path(image) for image in images]):
        for name in {file.as_posix(), file.name, file.stem}:
            files.setdefault(name, set()).add(file.resolve())
    for image in counts["image"]:
        found = files.get(image, set())
        if len(found) != 1:
            wrong = "is not among" if not found else f"is there {len(found)} times in"
            raise InputError(
                f"{folder / 'counts.csv'}: image {image} {wrong} --images {' '.join(images)}; "
                "give those that predict.py read"
            )
    fields = counts[["image", "um_per_px"]].assign(
        path=[str(next(iter(files[image]))) for image in counts["image"]], case=counts["image"], split="train"
    )
    cells = detections.assign(label=np.nan, noise_score=np.nan, called=detections["mitosis"], origin="detection")
    return _with_fields(cells.drop(columns="mitosis"), fields, folder / "counts.csv")


def read_predicted(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """detections.csv and counts.csv of a predict folder; InputError as `read_table`, or they contradict each other."""
    detections = read_table(folder / "detections.csv", DETECTIONS, "python predict.py")
    counts = read_table(folder / "counts.csv", COUNTS, "python predict.py")
    called = detections[detections["mitosis"] == 1].groupby("image").size().reindex(counts["image"], fill_value=0)
    if not detections["image"].isin(counts["image"]).all() or (called.to_numpy() != counts["mitoses"]).any():
        raise InputError(f"{folder}: detections.csv and counts.csv are not of one run; run predict.py again")
    return detections, counts


def _with_fields(cells: pd.DataFrame, fields: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The cells with path, case, split and um_per_px of their field."""
    columns = ["image", "path", "case", "split", "um_per_px"]
    cells = cells.drop(columns=[name for name in columns[1:] if name in cells]).merge(
        fields[columns], on="image", how="left"
    )
    if cells["path"].isna().any():
        image = cells.loc[cells["path"].isna(), "image"].iloc[0]
        raise InputError(f"{path}: its field {image} is not in fields.csv beside it; run pre/cut_patch_2.py again")
    return cells.reset_index(drop=True)


def threshold_of(cells: pd.DataFrame) -> float:
    """Between the detections that count and those that do not; beyond all of them where there is one kind only."""
    counts = cells["called"] == 1
    low, high = cells.loc[~counts, "probability"].max(), cells.loc[counts, "probability"].min()
    return float(np.nanmean([low, high]))


def ranked(cells: pd.DataFrame, queue: str) -> pd.DataFrame:
    """The cells of a queue, the first to be asked first.

    Raises:
        InputError: a queue that these cells do not have, or one without any cell.
    """
    labelled = cells["label"].notna().all()
    if queue in ("noise", "disagree") and not labelled:
        raise InputError(f"--queue {queue}: needs labels to doubt, and detections have none; give --memory")
    if queue == "uncertain":
        odds = logit(cells["probability"].clip(1e-6, 1 - 1e-6))
        order = (odds - logit(0.5 if labelled else np.clip(threshold_of(cells), 1e-6, 1 - 1e-6))).abs()
    elif queue == "disagree":
        cells = cells[cells["doubt"] > 0]
        order = -cells["doubt"] - cells["noise_score"] / 1000  # of equal ones the worse
    else:
        order = -cells["noise_score"]
    if "clean_verdict" in cells:
        cells = cells[~cells["clean_verdict"]]
    if cells.empty:
        raise InputError(f"--queue {queue}: no cell of that kind, or --hard calls all of them clean; try another queue")
    return cells.loc[order[cells.index].sort_values(kind="stable").index]


def build_queue(
    cells: pd.DataFrame, queue: str, items: int, controls: float, repeats: float, seed: int
) -> pd.DataFrame:
    """The table of queue.csv.

    Args:
        cells: as `training_cells` or `detected_cells` gives them.
        queue: noise, uncertain, disagree or audit. items: how many are shown, controls and repeats among them.
        controls, repeats: their shares of the items; an audit has no controls, as its sample is random.
    """
    rng = np.random.default_rng(seed)
    again = round(items * repeats)
    if queue == "audit":
        chosen, control = audit_sample(cells, items - again, rng), cells[:0]
    else:
        wanted = round(items * controls)
        chosen = ranked(cells, queue)[: max(items - again - wanted, 1)]
        control = _controls(cells.drop(chosen.index), wanted, rng)
    chosen, control = chosen.assign(kind="queue"), control.assign(kind="control")
    blocks = max(1, -(-(len(chosen) + len(control)) // BLOCK))
    random = queue == "audit"
    chosen["block"] = (rng.permutation(len(chosen)) if random else np.arange(len(chosen))) * blocks // len(chosen)
    control["block"] = rng.permutation(len(control)) * blocks // max(len(control), 1)
    return in_order(pd.concat([chosen, control]), min(again, len(chosen)), rng)


def in_order(cells: pd.DataFrame, repeats: int, rng: np.random.Generator) -> pd.DataFrame:
    """Number the cells block by block, shuffled within; repeats of some, turned, come in the last blocks."""
    cells = cells.iloc[rng.permutation(len(cells))].sort_values("block", kind="stable").reset_index(drop=True)
    cells = cells.assign(turn=0, first=cells.index, again=False)
    drawn = rng.choice(np.flatnonzero(cells["kind"] == "queue"), repeats, replace=False) if repeats else []
    second = cells.loc[drawn].assign(kind="repeat", turn=rng.integers(1, TURNS, repeats), again=True)
    last = cells["block"].max() if len(cells) else 0
    if last:  # in any later block; those of the last block after it
        later = [rng.integers(block + 1, last + 2) for block in second["block"]]
        second["block"] = np.array(later, dtype=int)
    else:
        second["block"] = 1
    shown = pd.concat([cells, second])
    shown = shown.iloc[rng.permutation(len(shown))].sort_values("block", kind="stable")
    original = ~shown["again"].to_numpy()
    item_of = pd.Series(np.flatnonzero(original), index=shown.loc[original, "first"])
    shown["repeat_of"] = np.where(original, np.nan, item_of.reindex(shown["first"]).to_numpy(float))
    shown["item"] = np.arange(len(shown))
    if "stratum" not in shown:
        shown["stratum"] = np.nan
    whole = {name: "Int64" for name in ("label", "repeat_of", "stratum")}
    return shown.astype(whole).round({"probability": 6, "noise_score": 6})[list(QUEUE)].reset_index(drop=True)


def _controls(cells: pd.DataFrame, wanted: int, rng: np.random.Generator) -> pd.DataFrame:
    """Cells that nobody doubts, as many of both kinds as there are: the least suspicious half, drawn at random."""
    if cells["label"].notna().all() and "clean_verdict" in cells and cells["clean_verdict"].any():
        cells = cells[cells["clean_verdict"]]
    calm = []
    for called in (1, 0):
        of_kind = cells[cells["called"] == called]
        doubt = of_kind["noise_score"].where(of_kind["label"].notna(), (called - of_kind["probability"]).abs())
        least = of_kind.loc[doubt.sort_values(kind="stable").index[: max(1, round(UNSUSPICIOUS * len(of_kind)))]]
        calm.append(least.iloc[rng.permutation(len(least))])
    mitoses = min(max(wanted // 2, wanted - len(calm[1])), len(calm[0]))  # half of them, or more where others lack
    return pd.concat([calm[0][:mitoses], calm[1][: wanted - mitoses]])


def strata_of(cells: pd.DataFrame) -> np.ndarray:
    """Stratum (N,) of every detection: by probability, 0 the most probable, none across the threshold.

    Those that count are divided into STRATA[0] parts of about the same size, the others into STRATA[1].
    """
    strata, first = np.zeros(len(cells), dtype=int), 0
    for called, parts in ((1, STRATA[0]), (0, STRATA[1])):
        members = np.flatnonzero(cells["called"].to_numpy() == called)
        members = members[np.argsort(-cells["probability"].to_numpy()[members], kind="stable")]
        parts = max(1, min(parts, len(members) // 2))
        strata[members] = first + np.arange(len(members)) * parts // max(len(members), 1)
        first += parts if len(members) else 0
    return strata


def audit_sample(cells: pd.DataFrame, items: int, rng: np.random.Generator) -> pd.DataFrame:
    """A random sample of the detections, from each stratum the same number, or all of a smaller one."""
    if cells["label"].notna().all():
        raise InputError("--queue audit: is of the detections of new slides; give --predict")
    cells = cells.assign(stratum=strata_of(cells))
    sizes = cells["stratum"].value_counts().sort_index()
    share = np.zeros(len(sizes), dtype=int)
    for _ in range(min(items, len(cells))):  # the next one to the stratum with the fewest that has more
        share[np.argmin(np.where(share < sizes.to_numpy(), share, len(cells) + 1))] += 1
    drawn = [
        members.iloc[rng.permutation(len(members))[:number]]
        for (_, members), number in zip(cells.groupby("stratum"), share, strict=True)
    ]
    return pd.concat(drawn)


def contested_queue(votes: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The cells that readers answered differently, as a queue of their own. votes: as `collect.votes_of`."""
    differ = votes[votes[["M", "L", "U"]].gt(0).sum(axis=1) > 1]
    if differ.empty:
        raise InputError("--queue contested: no cell that two readers answered differently")
    cells = differ.assign(kind="queue", block=np.arange(len(differ)) // BLOCK)
    return in_order(cells, 0, np.random.default_rng(seed))
