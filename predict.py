"""Stage 9 of 9: find the mitoses of new images, or of a dataset's fields and judge them by its annotations.

Reads images (whole slides of OpenSlide's formats, TIFF, PNG, JPEG, BMP) and a model.pt of stage 2 or 8.
Writes OUT/detections.csv, counts.csv (mitoses, density and hotspot of every image), report.html and run.json; per image
a QuPath GeoJSON, mitotic-figures.json, scan.json to resume from and an overlay PNG, for a slide tissue.png instead;
with a dataset metrics.json, metrics_per_field.csv, curve.csv and curve.png (what other thresholds would give) too.
"""

from typing import Literal

from dasc.flags import Amount, Count, Device, Layout, Natural, Share, read_flags

# Edit here, or override one run with the flag of the same name.
IMAGES: list[str] = ["data/sample/images"]  # image files, or folders of them
MODEL_PATH = "results/DMU_scl/model.pt"  # the trained network
OUT = "results/predict"  # folder to write
UM_PER_PX: Amount = 0.0  # resolution of the images in um/px; 0: as the file or the dataset states it
THRESHOLD = "best"  # p(mitosis) from which a detection counts: a number, or by the validation fields: best (by F1),
# precision=0.8, recall=0.9
PER_MM2: Amount = 0.0  # candidates looked at per mm2, best ranked first; 0: as many as the model's threshold is for
MERGE_UM: Amount = 0.0  # detections nearer than this become the strongest of them; 0: as the model's threshold is for
VIEWS: Literal[0, 1, 2, 4, 8] = 0  # test-time augmentation: turned and mirrored views averaged per likely candidate; 0:
# as many as the model's threshold is for
SCORE_ALIGNMENT = True  # move every image's log odds until its ordinary nuclei have those of the validation fields
SMALLEST: Share = 0.05  # detections below this probability are not written
WHOLE_PX: Count = 50_000_000  # images of more pixels are scanned as slides: tile by tile, on their tissue only
OVERLAYS = True  # draw the detections on a copy of every field
REPORT = True  # write report.html
THUMBNAILS: Natural = 24  # detections of every image shown in the report, strongest first
DATASET: Literal["", Layout] = ""  # judge a dataset's fields instead of reading IMAGES; empty: read IMAGES
DATA_ROOT = ""  # folder of that dataset
SPLIT: Literal["train", "val", "test"] = "test"  # which of its fields
VAL = ""  # cases for validation, A,B; empty: the dataset's own split
TEST = ""  # cases for the test
CORRECTIONS = ""  # corrections.csv of review.py, applied to the dataset's annotations; empty: they stay as they are
MATCH: Literal["um", "uts"] = "um"  # um: within 7.5 um, one to one; uts: within 30 px, many to one, as the paper counts
DEVICE: Device = "auto"  # auto takes cuda, else mps, else cpu
BATCH_SIZE: Count = 256  # patches scored together; less takes less memory
WORKERS: Count = 2  # threads that read tiles and find candidates
SEED = 0  # of the bootstrap interval
RESUME = False  # True: skip the images that an earlier run finished, and go on within the one it was at

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from dasc.data.corrections import UNSURE, correct_dataset, without_unsure
from dasc.data.datasets import drop_outside, read_dataset
from dasc.data.splits import parse_cases
from dasc.detect.image import count_mitoses, find_mitoses, look_over
from dasc.errors import InputError, WriteError
from dasc.files import file_name, write_csv, write_json
from dasc.images.read import choose_resolution, find_images
from dasc.images.slides import Slide, open_slide
from dasc.judge.calibration import resolve_threshold
from dasc.judge.metrics import RADIUS_UM, average_precision, choose_threshold, evaluate, fields_in_um, plateau_threshold
from dasc.model.checkpoint import Detector, load_detector
from dasc.report.export import write_counts, write_detections, write_geojson, write_mitotic_figures
from dasc.report.page import report_entry, write_report
from dasc.report.plots import overlay, precision_recall, write_png
from dasc.run import pick_device, record_run, run_script


class Found(NamedTuple):
    """What one image gave: its detections, row of counts.csv, annotated mitoses, and part of the report."""

    detections: pd.DataFrame
    counts: dict
    truth: pd.DataFrame | None
    entry: dict | None


def main(args) -> int:
    model_path, out = Path(args.model_path), Path(args.out)
    fields, annotations, corrections = dataset_fields(args) if args.dataset else (*image_fields(args.images), {})
    detector = as_asked(load_detector(model_path, pick_device(args.device)), model_path, args)
    threshold = resolve_threshold(args.threshold, detector.threshold, detector.val_curve, model_path)
    smallest = min(args.smallest, threshold)
    found, skipped = [], {}
    for field in tqdm(list(fields.itertuples()), desc="images", unit="image"):
        truth = None if annotations is None else annotations[annotations["image"] == field.image]
        try:
            found.append(scan_image(field, truth, detector, threshold, smallest, args))
        except WriteError:  # a full disk: every image after this one would fail too
            raise
        except InputError as error:
            skipped[field.image] = str(error)
            tqdm.write(f"skipped {field.image}: {error}", file=sys.stderr)
    if not found:
        raise InputError(f"none of the {len(fields)} images could be read; the first: {next(iter(skipped.values()))}")

    detections = pd.concat([one.detections for one in found], ignore_index=True)
    counts = pd.DataFrame([one.counts for one in found]).assign(model_sha256=detector.sha256)
    write_detections(out / "detections.csv", detections[detections["probability"] >= smallest])
    write_counts(out / "counts.csv", counts)
    truth = None if annotations is None else pd.concat([one.truth for one in found])
    judged = judge(out, truth, detections, counts, threshold, args)
    run = record_run(
        out,
        args,
        inputs={model_path: 1, args.data_root or "images": len(fields)},
        device=next(detector.network.parameters()).device,
        model_sha256=detector.sha256,
        threshold=threshold,
        skipped=skipped,
        corrections=corrections,
    )
    if args.report:
        calibration = (
            f"probabilities {'' if detector.calibration.fitted else 'not '}calibrated on the validation fields"
        )
        entries = [one.entry for one in found]
        write_report(out / "report.html", entries, skipped, threshold, calibration, run)
    print("\n".join([summary(counts, skipped), *judged]))
    print(f"detections, tables and report.html are in {out}; {len(skipped)} images skipped")
    return 1 if skipped else 0


def as_asked(detector: Detector, path: Path, args) -> Detector:
    """The detector with the scan settings of the flags; says where its threshold was chosen with others."""
    if not detector.patch_um_per_px:
        raise InputError(f"{path}: trained on patches of unknown resolution, so it cannot scan images")
    asked = {name: getattr(args, name) for name in ("per_mm2", "merge_um", "views")}
    asked = {name: value for name, value in asked.items() if value and value != getattr(detector, name)}
    for name, value in asked.items():
        print(f"--{name} {value:g}: the threshold of {path} was chosen with {getattr(detector, name):g}")
    calibration = detector.calibration
    if not args.score_alignment and calibration.alignment is not None:
        print(f"--score_alignment False: the threshold of {path} was chosen with aligned scores")
        calibration = dataclasses.replace(calibration, alignment=None)
    return dataclasses.replace(detector, calibration=calibration, **asked)


def scan_image(field, truth: pd.DataFrame | None, detector: Detector, threshold: float, smallest: float, args) -> Found:
    """Scan one image and write what is written per image, in a folder of the image's name."""
    folder = Path(args.out) / file_name(field.image, safe=" ")
    with open_slide(Path(field.file)) as slide:
        um_per_px, source = choose_resolution(slide.path, args.um_per_px, field.um_per_px, lambda: slide.um_per_px)
        overview, tissue = look_over(slide, um_per_px, args.whole_px, args.workers)
        detections = find_mitoses(
            detector,
            slide,
            um_per_px,
            tissue,
            folder / "scan.json",
            batch_size=args.batch_size,
            # Judged is everything: in another laboratory the best threshold can lie below what is worth writing.
            smallest=smallest if truth is None else 0.0,
            workers=args.workers,
            resume=args.resume,
        )
        detections = detections.assign(
            image=field.image,
            x_um=detections["x_px"] * um_per_px,
            y_um=detections["y_px"] * um_per_px,
            mitosis=detections["probability"] >= threshold,
        )
        facts, hotspot = count_mitoses(slide, field.image, detections, um_per_px, source, tissue)
        if truth is not None:
            truth, outside = drop_outside(truth, slide.width, slide.height)
            if outside:
                tqdm.write(f"{field.image}: {outside} annotations outside the field dropped", file=sys.stderr)
        written = detections[detections["probability"] >= smallest]
        write_image(folder, slide, written, um_per_px, threshold, smallest, tissue, truth, args)
        entry = None
        if args.report:
            entry = report_entry(slide, um_per_px, overview, written, hotspot, facts, args.thumbnails)
    return Found(detections, facts, truth, entry)


def judge(
    out: Path, truth: pd.DataFrame | None, detections: pd.DataFrame, counts: pd.DataFrame, threshold: float, args
) -> list[str]:
    """Write how good the detections are, where there are annotations; the lines to print of it.

    An earlier run's files that these detections were not judged by go.
    """
    stale, lines = {"metrics.json", "metrics_per_field.csv", "curve.csv", "curve.png"}, []
    if truth is not None:
        resolutions = dict(zip(counts["image"], counts["um_per_px"], strict=True))
        truth, detections = without_unsure(truth, detections, resolutions)
        metrics, per_field = evaluate(truth, detections, resolutions, threshold, args.match, seed=args.seed)
        words = "F1 {f1:.3f} ({f1_low:.3f}-{f1_high:.3f}), precision {precision:.3f}, recall {recall:.3f}"
        lines.append(f"{words.format(**metrics)} at threshold {threshold:.3f}")
        if args.match == "um":  # the curve is matched one to one
            best, curve = choose_threshold(fields_in_um(truth, detections, resolutions), RADIUS_UM)
            metrics |= {"oracle_f1": float(curve["f1"].max()) if len(curve) else 0.0, "oracle_threshold": best}
            metrics |= {"plateau_threshold": plateau_threshold(curve), "average_precision": average_precision(curve)}
            lines.append(f"average precision {metrics['average_precision']:.3f}")
            lines[-1] += f"; oracle threshold {best:.3f}: F1 {metrics['oracle_f1']:.3f}"
            if metrics["oracle_f1"]:  # without a mitosis found there is nothing to advise by
                lines.append(f"for other images like these: --threshold {metrics['plateau_threshold']:.4f}")
            write_csv(out / "curve.csv", curve.round(6))
            precision_recall(out / "curve.png", curve, threshold)
            stale -= {"curve.csv", "curve.png"}
        write_json(out / "metrics.json", {**metrics, "model_sha256": counts["model_sha256"].iloc[0]})
        write_csv(out / "metrics_per_field.csv", per_field)
        stale -= {"metrics.json", "metrics_per_field.csv"}
    for name in stale:
        (out / name).unlink(missing_ok=True)
    return lines


def image_fields(paths: list[str]) -> tuple[pd.DataFrame, None]:
    """One row per image: image (its name; its path where a name stands twice), file, um_per_px (unknown)."""
    files = find_images([Path(path) for path in paths])
    names = pd.Series([file.name for file in files])
    names = names.where(~names.duplicated(keep=False), [file.as_posix() for file in files])
    return pd.DataFrame({"image": names, "file": files, "um_per_px": float("nan")}), None


def dataset_fields(args) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """The fields of one split, the mitoses of the dataset and what readers are unsure of, and what was corrected."""
    dataset = read_dataset(
        args.dataset, Path(args.data_root), parse_cases(args.val) or None, parse_cases(args.test) or None
    )
    fields = dataset.fields[dataset.fields["split"] == args.split]
    if fields.empty:
        raise InputError(f"{args.data_root}: no field in split {args.split}; see --val and --test")
    dataset, corrections = correct_dataset(dataset, args.corrections)
    annotations = dataset.annotations[dataset.annotations["label"].isin([1, UNSURE])]
    return fields.assign(file=[dataset.root / path for path in fields["path"]]), annotations, corrections


def write_image(
    folder: Path, slide: Slide, detections: pd.DataFrame, um_per_px, threshold, smallest, tissue, truth, args
) -> None:
    """Everything that is written per image, in a folder of the image's name."""
    write_geojson(folder / "detections.geojson", detections, slide.origin_px)
    try:
        write_mitotic_figures(folder / "mitotic-figures.json", detections, um_per_px, threshold, smallest)
    except InputError as error:  # the format ends at 10 mm; the other files hold all
        (folder / "mitotic-figures.json").unlink(missing_ok=True)  # of an earlier run
        tqdm.write(f"not written: {error}", file=sys.stderr)
    if tissue is not None:
        write_png(folder / "tissue.png", np.repeat(tissue.mask[:, :, None], 3, axis=2).astype(np.uint8) * 255)
    elif args.overlays:
        points = None if truth is None else truth.loc[truth["label"] == 1, ["x_px", "y_px"]].to_numpy(float)
        image = slide.read_region(0, 0, 0, slide.width, slide.height)
        write_png(folder / "overlay.png", overlay(image, detections, um_per_px, points, args.match))


def summary(counts: pd.DataFrame, skipped: dict[str, str]) -> str:
    """The table printed at the end: a line per image, those skipped with the reason."""
    shown = counts[["image", "mitoses", "area_mm2", "mitoses_per_mm2", "hotspot_mitoses", "hotspot_mm2", "hotspot_of"]]
    lines = [shown.round(2).to_string(index=False), *(f"{name}: skipped: {why}" for name, why in skipped.items())]
    lines.append(f"{counts['mitoses'].sum()} mitoses in {len(counts)} images, {counts['area_mm2'].sum():.2f} mm2")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, args)
