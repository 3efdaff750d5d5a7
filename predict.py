"""Stage 9 of 9: find the mitoses of new images, or of a dataset's fields and judge them by its annotations.

Reads images (whole slides of OpenSlide's formats, TIFF, PNG, JPEG, BMP) and a model.pt of stage 2 or 8.
Writes OUT/detections.csv, counts.csv and counts.xlsx (mitoses, density, hotspot and stain of every image), report.html
and run.json; per image detections.geojson and regions.geojson for QuPath, mitotic-figures.json, scan.json to resume
from and an overlay PNG, for a slide tissue.png instead; with a dataset metrics.json, metrics_per_field.csv, curve.csv
and curve.png (what other thresholds would give) too.
"""

from typing import Literal

from dasc.flags import Amount, Count, Device, Engine, Layout, Natural, NumberOrTable, Shard, Share, read_flags

# Edit here, or override one run with the flag of the same name.
IMAGES: list[str] = ["data/sample/images"]  # image files, or folders of them
MODEL_PATH = "results/DMU_scl/model.pt"  # the trained network
OUT = "results/predict"  # folder to write
UM_PER_PX: NumberOrTable = ""  # um/px of the images that state none: a number, or a CSV image,um_per_px
INSIST_UM_PER_PX = False  # True: UM_PER_PX counts for images that state another resolution, too
THRESHOLD = "best"  # p(mitosis) from which a detection counts: a number, or by the validation fields: best (by F1),
# precision=0.8, recall=0.9
PER_MM2: Amount = 0.0  # candidates looked at per mm2, best ranked first; 0: as many as the model's threshold is for
MERGE_UM: Amount = 0.0  # detections nearer than this become the strongest of them; 0: as the model's threshold is for
VIEWS: Literal[0, 1, 2, 4, 8] = 0  # test-time augmentation: turned and mirrored views averaged per likely candidate; 0:
# as many as the model's threshold is for
SCORE_ALIGNMENT = True  # move every image's log odds until its ordinary nuclei have those of the validation fields
SMALLEST: Share = 0.05  # detections below this probability are not written
WHOLE_PX: Count = 50_000_000  # images of more pixels are scanned as slides: tile by tile, on their tissue only
ROI = ""  # folder of QuPath GeoJSON files, one per image: only what lies in their polygons counts; empty: all counts
ROI_CLASS: list[str] = []  # classes of the polygons that count; none: every annotated polygon
QUPATH: Literal["detections", "annotations"] = "detections"  # what detections.geojson holds: points as detections, or
# squares as annotations, which QuPath's grid view shows and sorts
EXPORT: list[Literal["asap", "coco"]] = []  # write detections for other programs too: IMAGE/detections.xml of ASAP,
# OUT/detections.coco.json
OVERLAYS = True  # draw the detections on a copy of every field
REPORT = True  # write report.html
THUMBNAILS: Natural = 24  # detections of every image shown in the report, strongest first
DATASET: Literal["", Layout] = ""  # judge a dataset's fields instead of reading IMAGES; empty: read IMAGES
DATA_ROOT = ""  # folder of that dataset
SPLIT: Literal["train", "val", "test"] = "test"  # which of its fields
VAL = ""  # cases for validation, A,B; empty: the dataset's own split
TEST = ""  # cases for the test
CORRECTIONS = ""  # corrections.csv of review.py, applied to the dataset's annotations; empty: they stay as they are
UNLABELLED = ""  # images of the dataset that carry no labels, A,B or 355-405
EMPTY = ""  # images in which there is nothing to annotate, where nothing else says so
CONTESTED: Literal["refuse", "drop"] = "refuse"  # a nucleus with both labels: refuse, or drop its annotations
CHECK_LABELS = True  # refuse labels that do not lie at nuclei, and sizes of images other than the labels state
MATCH: Literal["um", "uts"] = "um"  # um: within 7.5 um, one to one; uts: within 30 px, many to one, as the paper counts
DEVICE: Device = "auto"  # auto takes cuda, else mps, else cpu
ENGINE: Engine = "auto"  # auto takes OpenVINO on a CPU if it is installed and the images are large enough, else torch
BATCH_SIZE: Count = 1024  # patches scored together on a GPU; less takes less memory
WORKERS: Count = 2  # threads that read tiles and find candidates
SEED = 0  # of the bootstrap interval
RESUME = False  # True: skip the images that an earlier run finished, and go on within the one it was at
SHARD: Shard = (
    ""  # share of the images to scan, 2/3: the second of three; empty: torchrun's or a SLURM array's, else all
)

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from tqdm import tqdm

from dasc.data.corrections import correct_dataset
from dasc.data.datasets import Dataset, drop_outside, read_as_asked
from dasc.data.regions import find_roi
from dasc.data.resolutions import asked_um_per_px
from dasc.detect.image import count_mitoses, find_mitoses, look_over
from dasc.detect.labels import check_labels, check_size
from dasc.detect.resume import is_finished
from dasc.errors import InputError, WriteError
from dasc.images.find import list_images
from dasc.images.parts import content_sha256
from dasc.images.resolution import choose_resolution
from dasc.images.slides import open_slide
from dasc.judge.calibration import resolve_threshold
from dasc.model.checkpoint import Detector, load_detector
from dasc.model.engine import PatchEngine
from dasc.report.export import write_counts, write_detections
from dasc.report.judged import write_judgement
from dasc.report.outputs import image_folder, remove_outputs, summary, write_image
from dasc.report.page import report_entry, write_report
from dasc.report.shards import Shards
from dasc.report.viewers import write_coco, write_regions
from dasc.run import pick_device, record_run, run_script


class Found(NamedTuple):
    """What one image gave: its detections, row of counts.csv, annotations, and part of the report."""

    detections: pd.DataFrame
    counts: dict
    truth: pd.DataFrame | None
    entry: dict | None


def main(args) -> int:
    model_path, out = Path(args.model_path), Path(args.out)
    fields, annotations, skipped, corrections = fields_to_scan(args, out)
    shards = Shards(args, fields)
    detector = as_asked(load_detector(model_path, pick_device(args.device, args.shard)), model_path, args)
    threshold = resolve_threshold(args.threshold, detector.threshold, detector.val_curve, model_path)
    smallest = min(args.smallest, threshold)
    if args.shard:  # what cannot be read at all is named by the run that merges
        fields, skipped = shards.begin(), {}
    images = count_unfinished(fields, out, args.resume)
    engine = PatchEngine(detector.network, args.engine, detector.patch_size, images, detector.first_look)
    found = scan_images(fields, annotations, skipped, detector, engine, threshold, smallest, args)
    if args.shard:
        return shards.end(len(found), len(skipped))
    if not found:
        raise InputError(f"none of the {len(skipped)} images could be read; the first: {next(iter(skipped.values()))}")

    detections = pd.concat([one.detections for one in found], ignore_index=True)
    counts = pd.DataFrame([one.counts for one in found]).assign(model_sha256=detector.sha256)
    write_detections(out / "detections.csv", detections[detections["probability"] >= smallest])
    write_counts(out / "counts.csv", counts)
    write_coco(out / "detections.coco.json", detections[detections["probability"] >= smallest], counts, args.export)
    truth = None if annotations is None else pd.concat([one.truth for one in found])
    judged = write_judgement(out, truth, detections, counts, threshold, args.match, args.seed)
    run = record_run(
        out,
        args,
        inputs={model_path: 1, args.data_root or "images": len(found) + len(skipped)},
        device=next(detector.network.parameters()).device,
        engine=engine.used,
        model_sha256=detector.sha256,
        threshold=threshold,
        skipped=skipped,
        corrections=corrections,
        shards=shards.by,
    )
    if args.report:
        calibration = f"probabilities {'' if detector.calibration.fitted else 'not '}calibrated on validation"
        entries = [one.entry for one in found]
        write_report(out / "report.html", entries, skipped, judged, threshold, calibration, run)
    print("\n".join([summary(counts, skipped), *judged]))
    print(f"detections, tables and report.html are in {out}; {len(skipped)} images skipped")
    shards.merged()
    return 1 if skipped else 0


def as_asked(detector: Detector, path: Path, args) -> Detector:
    """The detector with the scan settings of the flags; says where its threshold was chosen with others."""
    if not detector.patch_um_per_px:
        raise InputError(f"{path}: trained on patches of unknown resolution, so it cannot scan images")
    asked = {name: getattr(args, name) for name in ("per_mm2", "merge_um", "views")}
    asked = {name: value for name, value in asked.items() if value and value != getattr(detector, name)}
    for name, value in asked.items():
        print(f"--{name} {value:g}: the threshold of {path} was chosen with {getattr(detector, name):g}")
    if detector.first_look is None:
        print(f"{path} has no first look: candidates are ranked by stain and contrast; NS/first_look.py trains one")
    calibration = detector.calibration
    if not args.score_alignment and calibration.alignment is not None:
        print(f"--score_alignment False: the threshold of {path} was chosen with aligned scores")
        calibration = dataclasses.replace(calibration, alignment=None)
    return dataclasses.replace(detector, calibration=calibration, **asked)


def count_unfinished(fields: pd.DataFrame, out: Path, resume: bool) -> int:
    """How many of the images no earlier run has finished."""
    return sum(not (resume and is_finished(image_folder(out, name) / "scan.json")) for name in fields["image"])


def scan_images(fields, annotations, skipped, detector, engine, threshold, smallest, args) -> list[Found]:
    """Scan the images; adds those skipped to `skipped`, with the reason, and removes an earlier run's files of them."""
    found = []
    for field in tqdm(list(fields.itertuples()), desc="images", unit="image"):
        truth = None if annotations is None else annotations[annotations["image"] == field.image]
        try:
            found.append(scan_image(field, truth, detector, engine, threshold, smallest, args))
        except WriteError:  # a full disk: every image after this one would fail too
            raise
        except InputError as error:
            skipped[field.image] = str(error)
            tqdm.write(f"skipped {field.image}: {error}", file=sys.stderr)
    for name in skipped:
        remove_outputs(image_folder(Path(args.out), name), args.resume)
    return found


def scan_image(
    field, truth: pd.DataFrame | None, detector: Detector, engine: PatchEngine, threshold: float, smallest: float, args
) -> Found:
    """Scan one image and write what is written per image, in a folder of the image's name."""
    folder = image_folder(Path(args.out), field.image)
    with open_slide(Path(field.file)) as slide:
        if truth is not None and args.check_labels:
            check_size(field, slide.width, slide.height)
        um_per_px, source, note = choose_resolution(
            slide.path, slide.stated, field.um_per_px, field.asked_um_per_px, args.insist_um_per_px
        )
        if note:
            tqdm.write(f"{field.image}: {note}", file=sys.stderr)
        roi = find_roi(Path(args.roi), args.roi_class, slide) if args.roi else None
        image_sha256 = content_sha256(slide.path)
        overview, tissue = look_over(slide, um_per_px, args.whole_px, args.workers)
        network = engine.network_for(slide.width * slide.height)
        detections = find_mitoses(
            dataclasses.replace(detector, network=network, first_look=engine.first_look),
            slide,
            um_per_px,
            tissue,
            folder / "scan.json",
            image_sha256,
            batch_size=args.batch_size,
            # Judged is everything: in another laboratory the best threshold can lie below what is worth writing.
            smallest=smallest if truth is None else 0.0,
            workers=args.workers,
            resume=args.resume,
            roi=roi,
        )
        detections = detections.assign(
            image=field.image,
            x_um=detections["x_px"] * um_per_px,
            y_um=detections["y_px"] * um_per_px,
            mitosis=detections["probability"] >= threshold,
        )
        facts, hotspot = count_mitoses(slide, field.image, detections, um_per_px, source, tissue, overview, roi)
        facts |= {"um_per_px_note": note, "image_sha256": image_sha256}
        if truth is not None:
            truth, outside = drop_outside(truth, slide.width, slide.height)
            if outside:
                tqdm.write(f"{field.image}: {outside} annotations outside the field dropped", file=sys.stderr)
            truth = truth[roi.at(truth[["x_px", "y_px"]].to_numpy())] if roi else truth
        written = detections[detections["probability"] >= smallest]
        write_regions(folder / "regions.geojson", slide, hotspot, tissue, roi)
        write_image(
            folder,
            slide,
            written,
            um_per_px,
            threshold,
            smallest,
            tissue,
            truth,
            qupath=args.qupath,
            export=args.export,
            overlays=args.overlays,
            match=args.match,
        )
        entry = None
        if args.report and not args.shard:
            entry = report_entry(slide, um_per_px, overview, written, hotspot, facts, args.thumbnails)
    return Found(detections, facts, truth, entry)


def check_flags(args) -> None:
    """Raise InputError where a flag would have no effect."""
    of_a_dataset = {"data_root": DATA_ROOT, "split": SPLIT, "val": VAL, "test": TEST, "match": MATCH}
    for name, default in of_a_dataset.items():
        if not args.dataset and (value := getattr(args, name)) and (value != default or name == "data_root"):
            raise InputError(f"--{name} {value}: has no effect without --dataset; name the form of the dataset with it")
    if args.roi_class and not args.roi:
        raise InputError(f"--roi_class {' '.join(args.roi_class)}: has no effect without --roi FOLDER; give both")
    if args.dataset and args.images != IMAGES:
        raise InputError("--images: has no effect with --dataset, whose fields are read; leave out one of the two")


def fields_to_scan(args, out: Path) -> tuple[pd.DataFrame, pd.DataFrame | None, dict[str, str], dict[str, int]]:
    """The images to scan, the annotations in them if they are a dataset's, those skipped beforehand, corrections.

    The first: image, file, um_per_px (of the dataset's table) and asked_um_per_px (of --um_per_px), NaN where unknown.
    """
    check_flags(args)
    dataset, skipped, corrections = None, {}, {}
    if args.dataset:
        dataset, fields, corrections = dataset_fields(args)
    else:
        fields, skipped = image_fields(args.images, out)
    for name in fields["image"]:
        if (folder := image_folder(out, name)).is_file():  # --out is where the images lie
            raise InputError(f"{folder}: a file, where the results of {name} belong; name another --out")
    asked = asked_um_per_px(args.um_per_px, fields["image"], list(map(str, fields["file"])), args.insist_um_per_px)
    fields = fields.assign(asked_um_per_px=asked)
    if dataset is None:
        return fields, None, skipped, corrections
    if args.check_labels:
        mitoses = dataset.annotations[dataset.annotations["label"] == 1]
        check_labels(fields, mitoses, dataset.root, args.insist_um_per_px)
    return fields, dataset.annotations, skipped, corrections


def image_fields(paths: list[str], out: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """One row per image: image (its name; its path where a name stands twice), file, um_per_px (unknown).

    The last: the images among `paths` that cannot be read here, by name, with the reason. Says what is left out.
    """
    listing = list_images([Path(path) for path in paths], out)
    files = [*listing.images, *listing.skipped]
    names = pd.Series([file.name for file in files], dtype=object)
    names = names.where(~names.duplicated(keep=False), [file.as_posix() for file in files]).tolist()
    skipped = dict(zip(names[len(listing.images) :], listing.skipped.values(), strict=True))
    for name, why in skipped.items():
        print(f"skipped {name}: {why}", file=sys.stderr)
    if listing.words():
        print(f"left out of the folders: {listing.words()}")
    fields = {"image": names[: len(listing.images)], "file": listing.images, "um_per_px": float("nan")}
    return pd.DataFrame(fields), skipped


def dataset_fields(args) -> tuple[Dataset, pd.DataFrame, dict[str, int]]:
    """The dataset, the fields of one split, corrections."""
    dataset, corrections = correct_dataset(read_as_asked(args), args.corrections)
    fields = dataset.fields[dataset.fields["split"] == args.split]
    if fields.empty:
        raise InputError(f"{args.data_root}: no field in split {args.split}; see --val and --test")
    if not dataset.annotations.loc[dataset.annotations["label"] == 1, "image"].isin(fields["image"]).any():
        raise InputError(
            f"{args.data_root}: no mitosis is annotated in the {len(fields)} fields of split {args.split}, so nothing "
            f"can be judged; looked for {dataset.looked_for}; see --split, --val and --test"
        )
    return dataset, fields.assign(file=[dataset.root / path for path in fields["path"]]), corrections


if __name__ == "__main__":
    run_script(main, args)
