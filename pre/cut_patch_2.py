"""Stages 1 and 3 of 9: cut nucleus patches from annotated fields; with a search network, its false positives too.

Reads a dataset (README, "Datasets"); with --fp_mdoel True also the model of stage 2.
Writes OUT/{train,val,test}/{mitosis,negative}/*.png, patches.csv, patches.npy (all patches in one file), fields.csv,
annotations.csv, cut.json and run.json.
All patches show the same width of tissue; every coordinate stays in the field's own pixels.
"""

import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dasc.flags import Amount, Count, Device, Engine, Layout, Natural, NumberOrTable, Positive, Share, read_flags

# Edit here, or override one run with the flag of the same name.
DATASET: Layout = "sample"  # form of the dataset
DATA_ROOT = "data/sample"  # folder of the dataset
OUT = ""  # folder to write; empty: data/patches, or data/patches_ns with --fp_mdoel True
VAL = ""  # cases or ids for validation, A,B; empty: the dataset's own (the paper's) split
TEST = ""  # cases or ids for the test
UNLABELLED = ""  # images that carry no labels, A,B or 355-405; they are left out
EMPTY = ""  # images in which there is nothing to annotate, where nothing else says so
CONTESTED: Literal["refuse", "drop"] = "refuse"  # a nucleus with both labels: refuse, or drop its annotations
CHECK_LABELS = True  # refuse labels that do not lie at nuclei, and sizes of images other than the labels state; False:
# believe them
UM_PER_PX: NumberOrTable = ""  # um/px of the fields that state none: a number, or a CSV image,um_per_px
INSIST_UM_PER_PX = False  # True: UM_PER_PX counts for fields that state another resolution, too
PATCH_SIZE: Count = 80  # side of a patch in px
PATCH_UM_PER_PX: Positive = 0.25  # resolution of the patches: 80 px show 20 um
NORMALISE_STAIN = True  # bring every field to one mean and spread of stain before patches are cut
PER_MM2: Positive = (
    1800.0  # candidate nuclei per mm2, best ranked first, that negatives are drawn from and searched in;
)
# fewer than the 3000 that prediction looks at: what a network finds hardly differs (docs/log.md, "Candidates"), and the
# faint nuclei beyond would dilute the random negatives
SHIFTS: Natural = 3  # moved copies of every mitosis of the training split
SHIFT_SHARE: Share = 0.2  # largest move of a copy, in parts of the patch
TURN_PROBABILITY: Share = 0.8  # share of the copies that are also turned, by 60 to 180 degrees
EXCLUDE_UM: Amount = 20.0  # candidates nearer than this to a mitosis are never negatives
SAME_UM: Amount = 7.5  # candidates nearer than this to an annotated hard negative are the same nucleus
RANDOM_PER_POSITIVE: Amount = 1.0  # random negatives per mitosis patch of a training field
RANDOM_PER_FIELD: Natural = 40  # random negatives in every field of validation and test
CORRECTIONS = ""  # corrections.csv of review.py: what readers made of the annotations; empty: they stay as they are
HARD_NEGATIVES = True  # cut the annotated hard negatives too; False: as if nobody had annotated any
FP_MDOEL = False  # True: stage 3, search the training fields with the model for false positives
MODEL_PATH = "results/NS/model.pt"  # the search network of stage 2
SEARCH_ABOVE: Share = 0.5  # p(mitosis) above which a candidate away from every mitosis is a false positive
SEARCH_BELOW: Share = 1.0  # p(mitosis) above which it is left out: it may be a mitosis that nobody marked
RANDOM_PER_SEARCHED: Amount = 1.0  # random negatives kept beside every searched one
DEVICE: Device = "auto"  # auto takes cuda, else mps, else cpu; only the search uses it
ENGINE: Engine = "auto"  # of the search; auto takes OpenVINO on a CPU if it is installed and the fields are large
# enough, else torch
BATCH_SIZE: Count = 1024  # patches scored together on a GPU in the search; less takes less memory
SEED = 0  # of the shifted copies and the random negatives
WORKERS: Count = 2  # fields cut at the same time; each holds one field in memory
PACK = True  # also write patches.npy, which trainings map: 3 S^2 bytes per patch of S px; False: they read every file
RESUME = False  # True: go on with an interrupted run of the same settings

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

import hashlib
import json
import shutil
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from dasc.data.corrections import UNSURE, correct_dataset
from dasc.data.cut import Cut, write_cut
from dasc.data.datasets import Dataset, drop_outside, read_as_asked
from dasc.data.pack import write_pack
from dasc.data.patches import write_patch
from dasc.data.resolutions import asked_um_per_px
from dasc.data.tables import ANNOTATIONS, FIELDS, LABELS, PATCHES, SPLITS, write_table
from dasc.detect.candidates import find_candidates
from dasc.detect.cutter import CutPatch, PatchCutter, at_point, away_from, negatives, shifted
from dasc.detect.field import score_points
from dasc.detect.labels import check_labels, check_size
from dasc.errors import InputError, WriteError
from dasc.files import check_replaceable, file_name, put_in_place, sha256, write_csv, write_json, writing
from dasc.images.read import read_field
from dasc.images.resolution import choose_resolution, read_stated
from dasc.images.stain import normalise_stain
from dasc.model.checkpoint import Detector, load_detector
from dasc.model.engine import PatchEngine
from dasc.run import pick_device, record_run, run_script

RESOLUTION = ("um_per_px", "um_per_px_source", "um_per_px_note")  # of a field: the number, where from, what contradicts
# No patch depends on these: where things lie (hashes decide), and how fast they are read and scored.
PASSING = ("out", "data_root", "model_path", "device", "engine", "batch_size", "workers", "check_labels", "pack")
PASSING += ("resume",)


def main(args) -> int:
    dataset, corrections = correct_dataset(read_as_asked(args), args.corrections)
    asked = asked_um_per_px(args.um_per_px, dataset.fields["image"], dataset.fields["path"], args.insist_um_per_px)
    dataset.fields["asked_um_per_px"] = asked
    fields = dataset.fields[dataset.fields["split"].isin(SPLITS)].reset_index(drop=True)
    engine = device = None
    if args.fp_mdoel:
        device = pick_device(args.device)
        detector = load_detector(Path(args.model_path), device)
        check_model(detector, args)
        searched = (fields["split"] == "train").sum()
        engine = PatchEngine(detector.network, args.engine, detector.patch_size, searched)
    out = out_folder(args)
    known = what_is_known(dataset, fields, args)
    partial = start(out, args, dataset)
    turn = threading.Lock()
    skipped = {}

    def cut(field) -> None:
        try:
            cut_field(field, known[field.image], dataset.root, partial, args, engine, turn)
        except WriteError:  # a full disk: every field after this one would fail too
            raise
        except InputError as error:
            skipped[field.image] = str(error)
            tqdm.write(f"skipped {field.image}: {error}", file=sys.stderr)

    with ThreadPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(cut, field) for field in fields.itertuples()]
        try:
            for job in tqdm(jobs, desc="fields", unit="field"):
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)
    if len(skipped) == len(fields):
        raise InputError(f"none of the {len(fields)} fields could be cut; the first: {next(iter(skipped.values()))}")
    cut_fields = fields[~fields["image"].isin(list(skipped))]
    finish(out, partial, cut_fields, dataset.root, skipped, args, device, engine, corrections)
    return 1 if skipped else 0


def out_folder(args) -> Path:
    """The folder to write: --out, or that of the stage."""
    return Path(args.out or ("data/patches_ns" if args.fp_mdoel else "data/patches"))


def check_model(detector: Detector, args) -> None:
    """Raise InputError where the search network was trained on other patches than these, or the limits contradict."""
    for name in ("patch_size", "patch_um_per_px", "normalise_stain"):
        trained, value = getattr(detector, name), getattr(args, name)
        if trained != value:
            raise InputError(f"{args.model_path}: trained at {name} {trained}, these patches have {value}")
    if args.search_below < args.search_above:
        raise InputError(f"--search_below {args.search_below:g}: lower than --search_above {args.search_above:g}")


class Known(NamedTuple):
    """Of a field before it is cut: annotations, those with both labels, points_px (N, 2) of candidates if searched."""

    annotations: pd.DataFrame
    contested: pd.DataFrame
    candidates: np.ndarray | None


def what_is_known(dataset: Dataset, fields: pd.DataFrame, args) -> dict[str, Known]:
    """What is known of every field; raises InputError where the labels do not lie at nuclei."""
    candidates = {}
    if args.check_labels:
        mitoses = dataset.annotations[dataset.annotations["label"] == 1]
        with ThreadPoolExecutor(args.workers) as pool:
            share, candidates = check_labels(
                fields, mitoses, dataset.root, args.insist_um_per_px, args.per_mm2, each=pool.map
            )
        if share == share:  # no number where mitoses are too few, which is said
            print(f"labels looked at in {len(candidates)} fields: {share:.0%} of the mitoses lie at a nucleus")
    annotations, contested = (dict(tuple(table.groupby("image"))) for table in (dataset.annotations, dataset.contested))
    none = dataset.annotations[:0]
    return {
        image: Known(annotations.get(image, none), contested.get(image, none), candidates.get(image))
        for image in fields["image"]
    }


def start(out: Path, args, dataset: Dataset) -> Path:
    """The folder to work in, beside `out`, which it replaces at the end: a killed run leaves `out` as it was.

    It is gone on with only where settings, annotations and model are those it was begun with.
    """
    check_replaceable(out, "patches.csv")
    partial = out.with_name(out.name + ".partial")
    settings = {key: str(value) for key, value in vars(args).items() if key not in PASSING}
    tables = repr([table.to_dict("records") for table in (dataset.fields, dataset.annotations, dataset.contested)])
    settings["annotations"] = hashlib.sha256(tables.encode()).hexdigest()
    settings["model"] = sha256(Path(args.model_path)) if args.fp_mdoel else None
    note = partial / "settings.json"
    going_on = args.resume and note.is_file()
    if going_on:
        check_settings(note, settings)
    with writing(partial):
        if partial.exists() and not going_on:  # without a note nobody knows what its patches are
            shutil.rmtree(partial)
        for left in partial.glob(".*.tmp"):  # what a killed run was writing
            left.unlink()
        for folder in ("fields", *(f"{split}/{label}" for split in SPLITS for label in LABELS.values())):
            (partial / folder).mkdir(parents=True, exist_ok=True)
    write_json(note, settings)
    return partial


def check_settings(note: Path, settings: dict[str, str | None]) -> None:
    try:
        begun = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{note}: not a note of this script; leave out --resume to begin anew") from error
    for name, value in settings.items():
        if begun.get(name) != value:
            raise InputError(
                f"{note.parent}: was begun with other settings ({name} {begun.get(name)}, not {value}); "
                "repeat those or leave out --resume"
            )


def cut_field(field, known: Known, root: Path, partial: Path, args, engine, turn) -> None:
    """Cut one field into `partial`; its record is written last and stands for a whole field."""
    record = partial / "fields" / f"{file_name(field.image)}.json"
    if record.is_file():
        return
    path = root / field.path
    image = read_field(path)
    if args.check_labels:
        check_size(field, image.shape[1], image.shape[0])
    um_per_px, source, note = choose_resolution(
        path, read_stated(path), field.um_per_px, field.asked_um_per_px, args.insist_um_per_px
    )
    if note:
        tqdm.write(f"{field.image}: {note}", file=sys.stderr)
    annotations, outside = drop_outside(known.annotations, image.shape[1], image.shape[0])
    if outside:
        tqdm.write(f"{field.image}: {outside} annotations outside the field dropped", file=sys.stderr)
    mitoses = annotations.loc[annotations["label"] == 1, ["x_px", "y_px"]].to_numpy(float)
    hard_negatives = annotations.loc[annotations["label"] == 0, ["x_px", "y_px"]].to_numpy(float)
    hard_negatives = hard_negatives if args.hard_negatives else hard_negatives[:0]
    rng = np.random.default_rng([args.seed, zlib.crc32(field.image.encode("utf-8", "surrogatepass"))])
    shown = normalise_stain(image) if args.normalise_stain else image
    cutter = PatchCutter(shown, um_per_px, args.patch_um_per_px, args.patch_size)

    cuts = [at_point(cutter, 1, "annotated", point) for point in mitoses]
    if field.split == "train":
        cuts += [shifted(cutter, point, image.shape, args, rng) for point in mitoses for _ in range(args.shifts)]
    wanted = round(args.random_per_positive * len(cuts)) if field.split == "train" else args.random_per_field
    cuts += [at_point(cutter, 0, "hard_negative", point) for point in hard_negatives]

    points_px = known.candidates
    if points_px is None:
        points_px, _ = find_candidates(image, um_per_px, args.per_mm2)
    for others in (mitoses, known.contested[["x_px", "y_px"]].to_numpy(float)):
        points_px = points_px[away_from(points_px, others, args.exclude_um / um_per_px)]
    points_px = points_px[away_from(points_px, hard_negatives, args.same_um / um_per_px)]
    unsure = annotations.loc[annotations["label"] == UNSURE, ["x_px", "y_px"]].to_numpy(float)
    points_px = points_px[away_from(points_px, unsure, args.same_um / um_per_px)]
    points_px = rng.permutation(points_px)  # drawn before the search: stage 3 keeps stage 1's random negatives
    if engine is not None and field.split == "train":
        with turn:  # one scan at a time: every core works on it, and one batch lies in memory
            network = engine.network_for(image.shape[0] * image.shape[1])
            scores = score_points(network, cutter, points_px, args.batch_size)
        searched = (scores > args.search_above) & (scores <= args.search_below)
        cuts += negatives(cutter, points_px[searched], "searched", scores[searched])
        wanted += round(args.random_per_searched * searched.sum())
        points_px = points_px[scores <= args.search_above]
    cuts += negatives(cutter, points_px[:wanted], "random")
    rows = [write_one(cut, number, field, partial) for number, cut in enumerate(cuts)]
    content = {
        "um_per_px": um_per_px,
        "um_per_px_source": source,
        "um_per_px_note": note,
        "annotations": annotations[list(ANNOTATIONS)].to_dict("records"),
        "outside": outside,
        "patches": rows,
    }
    write_json(record, content)


def write_one(cut: CutPatch, number: int, field, partial: Path) -> dict:
    """Write one patch; its row of patches.csv."""
    name = f"{field.split}/{LABELS[cut.label]}/{file_name(field.image)}_{number:05d}_{cut.origin}.png"
    write_patch(partial / name, cut.patch)
    (x, y), (point_x, point_y) = np.round(cut.centre, 2), np.round(cut.point, 2)
    score = round(float(cut.score), 6)
    values = (name, field.image, field.case, field.split, cut.label, cut.origin, x, y, point_x, point_y, score)
    row = dict(zip(PATCHES, values, strict=True))
    return {key: None if value != value else value for key, value in row.items()}  # JSON knows no NaN


def finish(
    out: Path, partial: Path, fields: pd.DataFrame, root: Path, skipped: dict, args, device, engine, corrections
) -> None:
    """Write the tables and put the folder in its place."""
    records = [
        json.loads((partial / "fields" / f"{file_name(image)}.json").read_text(encoding="utf-8"))
        for image in fields["image"]
    ]
    patches = pd.DataFrame([row for record in records for row in record["patches"]], columns=list(PATCHES))
    annotations = [row for record in records for row in record["annotations"]]
    write_table(partial / "patches.csv", patches, PATCHES)
    resolutions = {name: [record[name] for record in records] for name in RESOLUTION}
    write_csv(partial / "fields.csv", fields[list(FIELDS)].assign(**resolutions))
    write_table(partial / "annotations.csv", pd.DataFrame(annotations, columns=list(ANNOTATIONS)), ANNOTATIONS)
    data_root = str(root.resolve())
    write_cut(partial, Cut(args.patch_size, args.patch_um_per_px, args.normalise_stain, data_root))
    if args.pack:
        write_pack(partial, patches["patch"].tolist(), args.workers)
    counts = patches.groupby(["split", "label", "origin"]).size()
    outside = {image: record["outside"] for image, record in zip(fields["image"], records, strict=True)}
    record_run(
        partial,
        args,
        inputs={root: len(fields) + len(skipped)} | ({args.model_path: 1} if args.fp_mdoel else {}),
        device=device,
        engine=engine and engine.used,
        data_root=data_root,
        fields=len(fields),
        patches={" ".join(map(str, key)): int(count) for key, count in counts.items()},
        skipped=skipped,
        corrections=corrections,
        annotations_outside={image: count for image, count in outside.items() if count},
    )
    with writing(out):
        shutil.rmtree(partial / "fields")
        (partial / "settings.json").unlink()
        put_in_place(partial, out)
    print(counts.rename("patches").to_string())
    print(f"{len(patches)} patches of {len(fields)} fields in {out}; {len(skipped)} fields skipped")


if __name__ == "__main__":
    run_script(main, args, out_folder(args))
