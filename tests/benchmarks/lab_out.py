"""Leave one laboratory out: how a detector does on a laboratory that it has never seen, at the threshold it would ship.

The protocol by which changes of the shipped weights are chosen. Two laboratories have whole fields:

icpr12    judged on all its fields (226 mitoses); learns from mitos14 and the single figures, chooses by H03 and H05
mitos14   judged on H03, H05, H07 and H14 (352); learns from icpr12 and the single figures, chooses by A02 and A04

The epoch is chosen by the patches of the first slide (H03) or both (A02, A04), alignment, calibration and threshold by
the fields of both. BreCaHAD chooses nothing; its case 10 is trained on. The single figures are the start that both
trainings begin from (--start, which also says how large the patches are) and part of both trainings. Levers are tried
with weights/dasc_figures.pt, whose patches of 64 px cost less than half of those of 96 px.

Headline: F1 at that threshold on the laboratory left out, mean of the two. A change is kept where the headline gains
and neither laboratory loses more than one point of it; with three seeds where it gains less than three points.

Every way to set the operating point (RULES) is judged on the same scan. Whatever a run has finished is not done again.
Writes OUT/lab_out.csv (with --quality lab_out_jpegQ.csv), a row per laboratory and rule. --against another OUT: the
difference of F1 and of average precision, rule by rule, with a paired 95 % bootstrap over the fields; without it the
difference from the rule `not aligned`. With both laboratories OUT/operating_point.json too: alignment, calibration and
threshold for a network trained on all of them (weights/make/half_weights.py).
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import torch
from negatives import run
from scipy.spatial import cKDTree
from scipy.special import expit
from tqdm import tqdm

from dasc.data.datasets import read_dataset
from dasc.data.patches import as_jpeg
from dasc.detect.field import look_at, merge
from dasc.detect.val import SMALLEST
from dasc.files import write_csv, write_json
from dasc.images.read import read_field
from dasc.judge.calibration import ALIGNMENT_PRIOR, fit_calibration, ordinary_odds, right_detections
from dasc.judge.metrics import (
    RADIUS_UM,
    average_precision,
    choose_threshold,
    counts_to_scores,
    fields_in_um,
    match_detections,
    plateau_threshold,
)
from dasc.model.checkpoint import load_detector


class Lab(NamedTuple):
    """A laboratory left out: what is judged of it, and the other one, which the training and its choices come from."""

    layout: str
    judged: tuple[str, ...]
    other: str
    other_layout: str
    val: str  # slides that choose the epoch
    chosen_by: tuple[str, ...]  # slides that choose the operating point


LABS = {
    "icpr12": Lab("table", ("A00", "A01", "A02", "A03", "A04"), "mitos14", "mitos14", "H03", ("H03", "H05")),
    "mitos14": Lab("mitos14", ("H03", "H05", "H07", "H14"), "icpr12", "table", "A02,A04", ("A02", "A04")),
}
CUT = ["--dataset", "table", "--shifts", 0, "--exclude_um", 40]
TRAIN = ["--backbone", "tf_efficientnet_lite0", "--stride", 32, "--lr", 5e-4, "--batch_size", 64, "--epochs", 5]


class Rule(NamedTuple):
    """A way to set the operating point.

    aligned: how much of the score alignment is done, 0 to 1. contested: whether nuclei that not all annotators called
    the same (confidence 0.65 and 0.2) count when calibration and threshold are chosen; they always count when judged.
    """

    aligned: float
    contested: bool


RULES = {
    "not aligned": Rule(0.0, True),
    "half aligned": Rule(0.5, True),
    "aligned": Rule(1.0, True),
    "not aligned, agreed": Rule(0.0, False),
    "half aligned, agreed": Rule(0.5, False),
    "aligned, agreed": Rule(1.0, False),
}


def train(name: str, out: Path, args: argparse.Namespace) -> Path:
    """The model that has not seen a laboratory, trained by the scripts in the folder `out`."""
    if (out / "model/model.pt").exists():
        return out / "model/model.pt"
    lab, start = LABS[name], ["--init_weights", args.start]
    combine = ["--data", args.data, "--sets", lab.other, "brecahad", "mitotic_figures", "--val", lab.val]
    rest = ",".join(case for case in lab.chosen_by if case not in lab.val)
    run(out / "data", "weights/make/combine.py", *combine, "--test", rest, "--out", out / "data")
    detector = load_detector(Path(args.start), torch.device("cpu"))
    patch = ["--patch_size", detector.patch_size, "--patch_um_per_px", detector.patch_um_per_px]
    search = ["--fp_mdoel", "True", "--model_path", args.start, "--random_per_searched", 0.5]
    cut = [*CUT, *patch, "--data_root", out / "data", *search, *args.cut_flags.split()]
    run(out / "patches", "pre/cut_patch_2.py", *cut, "--out", out / "patches")
    flags = [*TRAIN, *start, "--manifest", out / "patches/patches.csv", "--seed", args.seed, *args.train_flags.split()]
    run(out / "model/model.pt", "NS/sigle.py", *flags, "--out", out / "model")
    return out / "model/model.pt"


def look(
    model_path: Path, dataset, cases: tuple[str, ...], folder: Path, quality: int | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What a network makes of the fields of these cases: fields and detections; written, so that it is done once.

    Fields: image, case, um_per_px, level (`ordinary_odds`), candidates (how many). Detections: image, x_px, y_px, odds,
    merged as `scan_field` merges them: an alignment moves all of a field alike and leaves the order.

    quality: JPEG quality that the fields are compressed at once more; None: they are shown as they are.
    """
    if not (folder / "fields.csv").exists():
        detector = load_detector(model_path, torch.device("cpu"))
        fields, found = [], []
        for field in tqdm(list(dataset.fields[dataset.fields["case"].isin(cases)].itertuples()), folder.name):
            image = read_field(dataset.root / field.path)
            image = image if quality is None else as_jpeg(image, quality)
            looked = look_at(detector, image, field.um_per_px, batch_size=256)
            kept = merge(looked.points_px, looked.odds, detector.merge_um / field.um_per_px)
            fields.append((field.image, field.case, field.um_per_px, ordinary_odds(looked.first), len(looked.first)))
            places = pd.DataFrame(looked.points_px[kept], columns=["x_px", "y_px"])
            found.append(places.assign(image=field.image, odds=looked.odds[kept]))
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "detections.csv", pd.concat(found))
        write_csv(
            folder / "fields.csv", pd.DataFrame(fields, columns=["image", "case", "um_per_px", "level", "candidates"])
        )
    return pd.read_csv(folder / "fields.csv"), pd.read_csv(folder / "detections.csv")


def aligned(fields: pd.DataFrame, detections: pd.DataFrame, level: float, share: float) -> pd.DataFrame:
    """The detections with their probabilities, every field moved by this share of the way to a level."""
    weight = fields["candidates"] / (fields["candidates"] + ALIGNMENT_PRIOR)
    shift = (share * weight * (level - fields["level"])).set_axis(fields["image"])
    moved = detections.assign(probability=expit(detections["odds"] + detections["image"].map(shift)))
    return moved[moved["probability"] >= SMALLEST]


def without(truth: pd.DataFrame, detections: pd.DataFrame, um_per_px: pd.Series) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The agreed annotations, and the detections but those within RADIUS_UM of a contested nucleus."""
    contested = truth["confidence"].isin([0.65, 0.2])
    kept = np.ones(len(detections), bool)
    for image, rows in truth[contested].groupby("image"):
        here = np.flatnonzero(detections["image"] == image)
        places = detections.iloc[here][["x_px", "y_px"]].to_numpy()
        away, _ = cKDTree(rows[["x_px", "y_px"]].to_numpy()).query(places) if len(here) else (np.empty(0), None)
        kept[here[away * um_per_px[image] <= RADIUS_UM]] = False
    return truth[~contested], detections[kept]


def mitoses(truth: pd.DataFrame) -> pd.DataFrame:
    return truth[truth["label"] == 1]


def judged_by(rule: Rule, val: tuple, judged: tuple) -> tuple[dict, tuple[pd.DataFrame, pd.DataFrame]]:
    """Figures of one rule; tp, fp and fn of every field, and all detections: field, probability, right.

    val, judged: fields, detections and annotations of the fields that choose, and of those that are judged.
    """
    fields, detections, truth = val
    level = float(fields["level"].mean())
    um_per_px = fields.set_index("image")["um_per_px"]
    moved = aligned(fields, detections, level, rule.aligned)
    if not rule.contested:
        truth, moved = without(truth, moved, um_per_px)
    found = fields_in_um(mitoses(truth), moved, um_per_px)
    probabilities = np.concatenate([probability for *_, probability in found])
    calibration = fit_calibration(probabilities, right_detections(found, RADIUS_UM))
    found = [(*places, calibration.calibrate(probability)) for *places, probability in found]
    threshold = plateau_threshold(choose_threshold(found, RADIUS_UM)[1])

    fields, detections, truth = judged
    moved = aligned(fields, detections, level, rule.aligned)
    moved["probability"] = calibration.calibrate(moved["probability"].to_numpy())
    found = fields_in_um(mitoses(truth), moved, fields.set_index("image")["um_per_px"])
    oracle, curve = choose_threshold(found, RADIUS_UM)
    rows = []
    for image, (truth_um, places_um, probability) in zip(fields["image"], found, strict=True):
        called = probability >= threshold
        tp = int((match_detections(truth_um, places_um[called], RADIUS_UM) >= 0).sum())
        rows.append((image, tp, int(called.sum()) - tp, len(truth_um) - tp))
    counts = pd.DataFrame(rows, columns=["image", "tp", "fp", "fn"])
    tp, fp, fn = counts[["tp", "fp", "fn"]].sum()
    precision, recall, f1 = counts_to_scores(tp, fp, fn)
    figures = {"threshold": threshold, "tp": tp, "fp": fp, "fn": fn, "f1": f1, "precision": precision, "recall": recall}
    figures |= {"ap": average_precision(curve), "oracle_f1": curve["f1"].max(), "oracle_threshold": oracle}
    right = right_detections(found, RADIUS_UM)
    image = np.repeat(np.arange(len(found)), [len(places) for _, places, _ in found])
    scores = np.concatenate([probability for *_, probability in found])
    return figures, (counts, pd.DataFrame({"field": image, "probability": scores, "right": right}))


def operating_point(labs: list[tuple], share: float) -> dict:
    """What a network trained on all laboratories gets of its siblings, each judged on the laboratory it never saw.

    The laboratories count alike, however many fields and mitoses they have: detections when the calibration is fitted,
    precision, recall and F1 in the curve that chooses the threshold.

    labs: fields, detections and annotations of each, as scanned by its sibling. share: of the score alignment.
    """
    level = float(np.mean([fields["level"].mean() for fields, _, _ in labs]))
    founds = []
    for fields, detections, truth in labs:
        moved = aligned(fields, detections, level, share)
        founds.append(fields_in_um(mitoses(truth), moved, fields.set_index("image")["um_per_px"]))
    scores = [np.concatenate([probability for *_, probability in found]) for found in founds]
    right = np.concatenate([right_detections(found, RADIUS_UM) for found in founds])
    weights = np.concatenate([np.full(len(each), 1 / len(each)) for each in scores])
    calibration = fit_calibration(np.concatenate(scores), right, weights)
    thresholds = np.unique(calibration.calibrate(np.concatenate(scores)))[::-1]
    mean = pd.DataFrame(0.0, index=range(len(thresholds)), columns=["precision", "recall", "f1"])
    for found in founds:
        found = [(*places, calibration.calibrate(probability)) for *places, probability in found]
        curve = choose_threshold(found, RADIUS_UM)[1]
        reached = np.searchsorted(-curve["threshold"].to_numpy(), -thresholds, side="right") - 1
        mean += np.where(reached[:, None] < 0, 0.0, curve[mean.columns].to_numpy()[reached]) / len(founds)
    curve = mean.assign(threshold=thresholds)[["threshold", *mean.columns]]
    return {
        "temperature": calibration.temperature,
        "offset": calibration.offset,
        "alignment": level if share else None,
        "threshold": plateau_threshold(curve),
        "val_curve": curve.to_dict("list"),
    }


def spread(one: tuple, other: tuple, seed: int = 0, repeats: int = 1000) -> dict[str, float]:
    """Differences (one minus other) of F1 and average precision over the same fields: 95 % paired bootstrap."""
    rng = np.random.default_rng(seed)
    number = len(one[0])
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=repeats)
    f1 = [counts_to_scores(*(drawn @ counts[["tp", "fp", "fn"]].to_numpy()).T)[2] for counts, _ in (one, other)]
    ap = [[weighted_precision(counts, found, times) for times in drawn] for counts, found in (one, other)]
    ends = {}
    for name, (a, b) in (("f1", f1), ("ap", ap)):
        ends[f"{name}_low"], ends[f"{name}_high"] = np.quantile(np.subtract(a, b), [0.025, 0.975])
    return ends


def weighted_precision(counts: pd.DataFrame, found: pd.DataFrame, times: np.ndarray) -> float:
    """Average precision where every field counts so many times."""
    found = found.sort_values("probability", ascending=False, kind="stable")
    weight = times[found["field"].to_numpy()]
    right = (weight * found["right"].to_numpy()).cumsum()
    total = float(times @ (counts["tp"] + counts["fn"]).to_numpy())
    precision = right / np.maximum(weight.cumsum(), 1)
    return float((np.diff(right, prepend=0) * precision).sum() / max(total, 1))


def results(out: Path, args: argparse.Namespace) -> tuple[dict[tuple[str, str], tuple], list[tuple]]:
    """Figures and counts by laboratory and rule, and the judged laboratories; trains and scans what is missing."""
    found, labs = {}, []
    for name in args.labs:
        lab, home = LABS[name], out / name
        model_path = train(name, home, args)
        sides = []
        for set_name, layout, cases, quality in (
            (lab.other, lab.other_layout, lab.chosen_by, None),
            (name, lab.layout, lab.judged, args.quality),
        ):
            dataset = read_dataset(layout, args.data / set_name, [], [])
            folder = home / (f"looked_{set_name}" + (f"_jpeg{quality}" if quality else ""))
            fields, detections = look(model_path, dataset, cases, folder, quality)
            truth = dataset.annotations[dataset.annotations["image"].isin(fields["image"])]
            sides.append((fields, detections, truth))
        for rule_name, rule in RULES.items():
            found[name, rule_name] = judged_by(rule, *sides)
        labs.append(sides[1])
    return found, labs


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets that combine.py reads")
    parser.add_argument("--start", default="weights/dasc_figures.pt", help="model that both begin from")
    parser.add_argument("--out", type=Path, default=Path("results/lab_out"))
    parser.add_argument("--against", type=Path, help="OUT of another recipe, to compare with")
    parser.add_argument("--labs", nargs="+", choices=LABS, default=list(LABS))
    parser.add_argument("--quality", type=int, help="compress the judged fields once more, as JPEG of this quality")
    parser.add_argument("--cut_flags", default="", help="more flags of pre/cut_patch_2.py, in one string")
    parser.add_argument("--train_flags", default="", help="more flags of NS/sigle.py, in one string")
    parser.add_argument("--rule", default="aligned", help="rule of operating_point.json")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    args = parser.parse_args()
    found, labs = results(args.out, args)
    base = results(args.against, args)[0] if args.against else {key: found[key[0], "not aligned"] for key in found}
    rows = []
    for (lab, rule), (figures, counted) in found.items():
        reference = base[lab, rule]
        difference = {f"{name}_gain": figures[name] - reference[0][name] for name in ("f1", "ap")}
        rows.append({"lab": lab, "rule": rule, **figures, **difference, **spread(counted, reference[1])})
    table = pd.DataFrame(rows)
    write_csv(args.out / (f"lab_out_jpeg{args.quality}.csv" if args.quality else "lab_out.csv"), table)
    if len(labs) == len(LABS) and not args.quality:
        write_json(args.out / "operating_point.json", operating_point(labs, RULES[args.rule].aligned))
    print(table.round(3).to_string(index=False))
    print(table.groupby("rule", sort=False)[["f1", "ap", "oracle_f1"]].mean().round(3).to_string())
