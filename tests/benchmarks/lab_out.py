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

How much of the score alignment is done (SHARES) is judged on the same scan, and so is what chooses the threshold
(--by): `other`, the other laboratory, as above; `both`, all judged fields of both laboratories but those of the slide
that is judged, each scanned by the network that has not seen its laboratory. `both` is the operating point that a
network trained on all laboratories gets; with it OUT/operating_point.json is written (weights/make/half_weights.py).

Whatever a run has finished is not done again. Writes OUT/lab_out.csv: a row per laboratory, --by and share, with the
difference from the first row of the laboratory, or, with --against, from the same row of another OUT, and a paired
95 % bootstrap over the fields.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pandas as pd
import torch
from negatives import run
from scipy.special import expit, logit
from tqdm import tqdm

from dasc.data.datasets import Dataset, read_dataset
from dasc.detect.field import look_at, merge
from dasc.detect.val import SMALLEST
from dasc.files import write_csv, write_json
from dasc.images.read import read_field
from dasc.judge.calibration import ALIGNMENT_PRIOR, Calibration, fit_calibration, ordinary_odds, right_detections
from dasc.judge.metrics import (
    RADIUS_UM,
    bootstrap_f1,
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


SHARES = (0.0, 0.5, 1.0)  # how much of the score alignment is done


def train(name: str, out: Path, args: argparse.Namespace) -> Path:
    """The model that has not seen a laboratory, trained by the scripts in the folder `out`."""
    last = out / ("first_look" if args.first_look else "model") / "model.pt"
    if last.exists():
        return last
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
    if args.first_look:
        flags = ["--manifest", out / "patches/patches.csv", "--seed", args.seed]
        run(out / "look/model.pt", "NS/first_look.py", *flags, "--model_path", args.start, "--out", out / "look")
        taken = ["--model_path", out / "model/model.pt", "--first_look", out / "look/model.pt"]
        run(last, "NS/first_look.py", *flags, *taken, "--out", last.parent)
    return last


class Scan(NamedTuple):
    """What a network makes of fields.

    fields: image, case, um_per_px, level (`ordinary_odds`), candidates (how many). detections: image, x_px, y_px, odds,
    merged as `scan_field` merges them: an alignment moves all of a field alike and leaves the order. truth: mitoses.
    """

    fields: pd.DataFrame
    detections: pd.DataFrame
    truth: pd.DataFrame

    def of(self, chosen: pd.Series) -> "Scan":
        """The scan of some of the fields. chosen: (N,) bool, by field."""
        images = self.fields.loc[chosen, "image"]
        return Scan(self.fields[chosen], *(table[table["image"].isin(images)] for table in self[1:]))


def look(model_path: Path, dataset: Dataset, cases: tuple[str, ...], folder: Path) -> Scan:
    """Scan the fields of these cases; what is written in `folder` is not scanned again."""
    if not (folder / "fields.csv").exists():
        detector = load_detector(model_path, torch.device("cpu"))
        fields, found = [], []
        for field in tqdm(list(dataset.fields[dataset.fields["case"].isin(cases)].itertuples()), folder.name):
            image = read_field(dataset.root / field.path)
            looked = look_at(detector, image, field.um_per_px, batch_size=256)
            kept = merge(looked.points_px, looked.odds, detector.merge_um / field.um_per_px)
            fields.append((field.image, field.case, field.um_per_px, ordinary_odds(looked.first), len(looked.first)))
            places = pd.DataFrame(looked.points_px[kept], columns=["x_px", "y_px"])
            found.append(places.assign(image=field.image, odds=looked.odds[kept]))
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "detections.csv", pd.concat(found))
        names = ["image", "case", "um_per_px", "level", "candidates"]
        write_csv(folder / "fields.csv", pd.DataFrame(fields, columns=names))
    fields, detections = (pd.read_csv(folder / name) for name in ("fields.csv", "detections.csv"))
    truth = dataset.annotations[dataset.annotations["image"].isin(fields["image"])]
    return Scan(fields, detections, truth[truth["label"] == 1])


def aligned(fields: pd.DataFrame, detections: pd.DataFrame, level: float, share: float) -> pd.DataFrame:
    """The detections with their probabilities, every field moved by this share of the way to a level."""
    weight = fields["candidates"] / (fields["candidates"] + ALIGNMENT_PRIOR)
    shift = (share * weight * (level - fields["level"])).set_axis(fields["image"])
    moved = detections.assign(probability=expit(detections["odds"] + detections["image"].map(shift)))
    return moved[moved["probability"] >= SMALLEST]


def operating_point(labs: list[Scan], share: float) -> dict:
    """Alignment, calibration, threshold and curve by the fields of one or more laboratories.

    The laboratories count alike, however many fields and mitoses they have: detections when the calibration is fitted,
    precision, recall and F1 in the curve that chooses the threshold.
    """
    level = float(np.mean([lab.fields["level"].mean() for lab in labs]))
    founds = [found_in(lab, level, share) for lab in labs]
    scores = [np.concatenate([probability for *_, probability in found]) for found in founds]
    right = np.concatenate([right_detections(found, RADIUS_UM) for found in founds])
    weights = np.concatenate([np.full(len(each), 1 / len(each)) for each in scores])
    calibration = dataclasses.replace(fit_calibration(np.concatenate(scores), right, weights), alignment=level)
    thresholds = np.unique(calibration.calibrate(np.concatenate(scores)))[::-1]
    mean = pd.DataFrame(0.0, index=range(len(thresholds)), columns=["precision", "recall", "f1"])
    for found in founds:
        curve = choose_threshold(calibrated(found, calibration), RADIUS_UM)[1]
        reached = np.searchsorted(-curve["threshold"].to_numpy(), -thresholds, side="right") - 1
        mean += np.where(reached[:, None] < 0, 0.0, curve[mean.columns].to_numpy()[reached]) / len(founds)
    curve = mean.assign(threshold=thresholds)[["threshold", *mean.columns]]
    return {"calibration": calibration, "threshold": plateau_threshold(curve), "val_curve": curve.to_dict("list")}


def found_in(lab: Scan, level: float, share: float) -> list[tuple]:
    """The fields of a scan as `choose_threshold` takes them, every one moved by this share of the way to a level."""
    moved = aligned(lab.fields, lab.detections, level, share)
    return fields_in_um(lab.truth, moved, lab.fields.set_index("image")["um_per_px"])


def calibrated(found: list[tuple], calibration: Calibration) -> list[tuple]:
    return [(*places, calibration.calibrate(probability)) for *places, probability in found]


def judged_at(lab: Scan, point: dict, share: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Counts of every field at an operating point (image, tp, fp, fn), and its detections (image, odds, right).

    Of detections of several operating points the odds alone can be compared: before calibration, over the level.
    """
    calibration = point["calibration"]
    found = found_in(lab, calibration.alignment, share)
    rows = []
    for image, (truth_um, places_um, probability) in zip(
        lab.fields["image"], calibrated(found, calibration), strict=True
    ):
        called = probability >= point["threshold"]
        tp = int((match_detections(truth_um, places_um[called], RADIUS_UM) >= 0).sum())
        rows.append((image, tp, int(called.sum()) - tp, len(truth_um) - tp))
    image = np.repeat(lab.fields["image"].to_numpy(), [len(places) for _, places, _ in found])
    odds = logit(np.concatenate([probability for *_, probability in found])) - share * calibration.alignment
    detections = pd.DataFrame({"image": image, "odds": odds, "right": right_detections(found, RADIUS_UM)})
    return pd.DataFrame(rows, columns=["image", "tp", "fp", "fn"]), detections


class Judged(NamedTuple):
    """counts: image, tp, fp, fn, a row per field. detections: image, odds, right. threshold: the mean, if several."""

    counts: pd.DataFrame
    detections: pd.DataFrame
    threshold: float

    def figures(self) -> dict[str, float]:
        tp, fp, fn = self.counts[["tp", "fp", "fn"]].sum()
        precision, recall, f1 = counts_to_scores(tp, fp, fn)
        right = self.detections.sort_values("odds", ascending=False, kind="stable")["right"].cumsum()
        oracle = counts_to_scores(right, np.arange(1, len(right) + 1) - right, tp + fn - right)[2].max()
        ap = precision_of(self, np.ones(len(self.counts), int))
        low, high = bootstrap_f1(*(self.counts[name] for name in ("tp", "fp", "fn")))
        figures = {"threshold": self.threshold, "tp": tp, "fp": fp, "fn": fn, "f1": f1, "f1_low": low, "f1_high": high}
        return figures | {"precision": precision, "recall": recall, "ap": ap, "oracle_f1": oracle}


def by_other(lab: Scan, other: Scan, share: float) -> Judged:
    """A laboratory at the operating point that the other one chooses."""
    point = operating_point([other], share)
    return Judged(*judged_at(lab, point, share), point["threshold"])


def by_both(lab: Scan, labs: list[Scan], share: float) -> Judged:
    """A laboratory, slide by slide, at the operating point that all other slides of all laboratories choose."""
    parts, thresholds = [], []
    for case in lab.fields["case"].unique():
        point = operating_point([each.of(each.fields["case"] != case) for each in labs], share)
        parts.append(judged_at(lab.of(lab.fields["case"] == case), point, share))
        thresholds.append(point["threshold"])
    counts, detections = (pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
    return Judged(counts, detections, float(np.mean(thresholds)))


def spread(one: Judged, other: Judged, seed: int = 0, repeats: int = 1000) -> dict[str, float]:
    """Differences (one minus other) of F1 and average precision over the same fields: 95 % paired bootstrap."""
    number = len(one.counts)
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=repeats)
    f1 = [counts_to_scores(*(drawn @ each.counts[["tp", "fp", "fn"]].to_numpy()).T)[2] for each in (one, other)]
    ap = [[precision_of(each, times) for times in drawn] for each in (one, other)]
    ends = {}
    for name, (a, b) in (("f1", f1), ("ap", ap)):
        ends[f"{name}_gain_low"], ends[f"{name}_gain_high"] = np.quantile(np.subtract(a, b), [0.025, 0.975])
    return ends


def precision_of(judged: Judged, times: np.ndarray) -> float:
    """Average precision where every field counts so many times, (N,)."""
    found = judged.detections.sort_values("odds", ascending=False, kind="stable")
    weight = found["image"].map(dict(zip(judged.counts["image"], times, strict=True))).to_numpy()
    right = (weight * found["right"].to_numpy()).cumsum()
    total = times @ (judged.counts["tp"] + judged.counts["fn"]).to_numpy()
    return float((np.diff(right, prepend=0) * right / np.maximum(weight.cumsum(), 1)).sum() / max(total, 1))


def results(out: Path, args: argparse.Namespace) -> tuple[dict[tuple, Judged], dict[str, Scan]]:
    """By laboratory, what chooses and share of alignment; the judged fields. Trains and scans what is missing."""
    judged, scans = {}, {}
    for name in args.labs:
        lab, home = LABS[name], out / name
        model_path = train(name, home, args)

        def scan(set_name: str, layout: str, cases: tuple, home=home, model=model_path) -> Scan:
            dataset = read_dataset(layout, args.data / set_name, [], [])
            return look(model, dataset, cases, home / f"looked_{set_name}")

        scans[name] = scan(name, lab.layout, lab.judged)
        if "other" in args.by:
            other = scan(lab.other, lab.other_layout, lab.chosen_by)
            judged |= {(name, "other", share): by_other(scans[name], other, share) for share in SHARES}
    if "both" in args.by and len(scans) == len(LABS):
        labs = list(scans.values())
        judged |= {(name, "both", share): by_both(scans[name], labs, share) for share in SHARES for name in scans}
    return judged, scans


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets that combine.py reads")
    parser.add_argument("--start", default="weights/dasc_figures.pt", help="model that both begin from")
    parser.add_argument("--out", type=Path, default=Path("results/lab_out"))
    parser.add_argument("--against", type=Path, help="OUT of another recipe, to compare with")
    parser.add_argument("--labs", nargs="+", choices=LABS, default=list(LABS))
    parser.add_argument("--by", nargs="+", choices=("other", "both"), default=["other", "both"], help="what chooses")
    parser.add_argument("--cut_flags", default="", help="more flags of pre/cut_patch_2.py, in one string")
    parser.add_argument("--train_flags", default="", help="more flags of NS/sigle.py, in one string")
    parser.add_argument(
        "--first_look", action="store_true", help="train first looks, too, from the backbone of --start"
    )
    parser.add_argument("--share", type=float, choices=SHARES, default=1.0, help="alignment of operating_point.json")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    args = parser.parse_args()
    if args.by == ["both"] and len(args.labs) < len(LABS):
        parser.error("--by both: needs both laboratories")
    judged, scans = results(args.out, args)
    base = {}
    if args.against:  # with first looks if it has some
        has_look = (args.against / args.labs[0] / "first_look").exists()
        base = results(args.against, argparse.Namespace(**vars(args) | {"first_look": has_look}))[0]
    rows = []
    for key, one in judged.items():
        reference = base.get(key) or next(first for (lab, *_), first in judged.items() if lab == key[0])
        figures, before = one.figures(), reference.figures()
        gains = {f"{name}_gain": figures[name] - before[name] for name in ("f1", "ap")}
        rows.append(dict(zip(("lab", "by", "share"), key, strict=True)) | figures | gains | spread(one, reference))
    table = pd.DataFrame(rows)
    write_csv(args.out / "lab_out.csv", table)
    if "both" in args.by and len(scans) == len(LABS):
        point = operating_point(list(scans.values()), args.share)
        calibration = dataclasses.asdict(point.pop("calibration"))
        calibration["alignment"] = calibration["alignment"] if args.share else None
        write_json(args.out / "operating_point.json", point | calibration)
    print(table.round(3).to_string(index=False))
    print(table.groupby(["by", "share"], sort=False)[["f1", "ap", "oracle_f1"]].mean().round(3).to_string())
