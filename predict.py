"""Stage 9 of 9: find the mitoses of new images, or of a dataset's fields and judge them by its annotations.

Reads images (whole slides of OpenSlide's formats, TIFF, PNG, JPEG, BMP) and a model.pt of stage 2 or 8.
Writes OUT/detections.csv, counts.csv (mitoses, density and hotspot of every image), report.html and run.json; per image
a QuPath GeoJSON, mitotic-figures.json, scan.json to resume from and an overlay PNG, for a slide tissue.png instead;
with a dataset metrics.json, metrics_per_field.csv, curve.csv and curve.png (what other thresholds would give) too.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from dasc.data.datasets import drop_outside, read_dataset
from dasc.data.readers import READERS
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
from dasc.run import pick_device, positive, record_run, run_script, true_or_false

# Edit here, or override one run with the flag of the same name.
IMAGES = ["data/sample/images"]  # image files, or folders of them
MODEL_PATH = "results/DMU_scl/model.pt"  # the trained network
OUT = "results/predict"  # folder to write
UM_PER_PX = 0.0  # resolution of the images in um/px; 0: as the file or the dataset states it
THRESHOLD = (
    "best"  # p(mitosis) from which a detection counts: a number, or by val: best (by F1), precision=0.8, recall=0.9
)
PER_MM2 = 3000.0  # candidates looked at per mm2, best ranked first; fewer is faster and misses more
MERGE_UM = 7.5  # detections nearer than this become the strongest of them
VIEWS = 8  # right-angle views averaged for every likely candidate: 1, 2, 4 or 8
BACKGROUND = True  # score alignment: move every image's log odds to those of the model's val fields; False: as they are
SMALLEST = 0.05  # detections below this probability are not written
WHOLE_PX = 50_000_000  # images of more pixels are scanned as slides: tile by tile, on their tissue only
OVERLAYS = True  # draw the detections on a copy of every field
REPORT = True  # write report.html
THUMBNAILS = 24  # detections of every image shown in the report, strongest first
DATASET = ""  # judge a dataset instead of reading IMAGES: sample, midog, mitos14, tupac16, tupac16_al or table
DATA_ROOT = ""  # folder of that dataset
SPLIT = "test"  # its fields: train, val or test
VAL = ""  # cases for validation, A,B; empty: the dataset's own split
TEST = ""  # cases for the test
MATCH = "um"  # um: within 7.5 um, one to one; uts: within 30 px, many to one, as the paper counts
DEVICE = "auto"  # auto, cpu, cuda or mps
BATCH_SIZE = 256  # patches scored together; less takes less memory
WORKERS = 2  # threads that read tiles and find candidates
SEED = 0  # of the bootstrap interval
RESUME = False  # True: skip the images that an earlier run finished, and go on within the one it was at


def build_parser() -> argparse.ArgumentParser:
    """Flags: the constants above in lower case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", default=IMAGES, help="image files, or folders of them")
    parser.add_argument("--model_path", default=MODEL_PATH, help="trained network")
    parser.add_argument("--out", default=OUT, help="folder to write")
    parser.add_argument("--um_per_px", type=float, default=UM_PER_PX, help="resolution of the images; 0: as stated")
    parser.add_argument("--threshold", default=THRESHOLD, help="p(mitosis): 0.4, best, precision=0.8 or recall=0.9")
    parser.add_argument("--per_mm2", type=float, default=PER_MM2, help="candidates looked at per mm2")
    parser.add_argument("--merge_um", type=float, default=MERGE_UM, help="nearer detections become one")
    parser.add_argument("--views", type=int, default=VIEWS, choices=(1, 2, 4, 8), help="views averaged per candidate")
    parser.add_argument("--background", type=true_or_false, default=BACKGROUND, help="score alignment with val")
    parser.add_argument("--smallest", type=float, default=SMALLEST, help="smallest probability written")
    parser.add_argument("--whole_px", type=int, default=WHOLE_PX, help="larger images are scanned tile by tile")
    parser.add_argument("--overlays", type=true_or_false, default=OVERLAYS, help="draw the detections")
    parser.add_argument("--report", type=true_or_false, default=REPORT, help="write report.html")
    parser.add_argument("--thumbnails", type=int, default=THUMBNAILS, help="detections per image in the report")
    parser.add_argument("--dataset", default=DATASET, choices=["", *READERS], help="judge this dataset's fields")
    parser.add_argument("--data_root", default=DATA_ROOT, help="folder of the dataset")
    parser.add_argument("--split", default=SPLIT, choices=("train", "val", "test"), help="fields of the dataset")
    parser.add_argument("--val", default=VAL, help="cases for validation, A,B")
    parser.add_argument("--test", default=TEST, help="cases for the test, A,B")
    parser.add_argument("--match", default=MATCH, choices=("um", "uts"), help="rule by which a detection is right")
    parser.add_argument("--device", default=DEVICE, help="auto, cpu, cuda or mps")
    parser.add_argument("--batch_size", type=positive, default=BATCH_SIZE, help="patches scored together")
    parser.add_argument("--workers", type=positive, default=WORKERS, help="threads that read tiles")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--resume", type=true_or_false, nargs="?", const=True, default=RESUME)
    return parser


def main(args: argparse.Namespace) -> int:
    fields, annotations = dataset_fields(args) if args.dataset else image_fields(args.images)
    model_path = Path(args.model_path)
    detector = load_detector(model_path, pick_device(args.device))
    if not detector.patch_um_per_px:
        raise InputError(f"{model_path}: trained on patches of unknown resolution, so it cannot scan images")
    threshold = resolve_threshold(args.threshold, detector.threshold, detector.val_curve, model_path)
    detector = replace(detector, per_mm2=args.per_mm2, merge_um=args.merge_um, views=args.views)
    if not args.background:
        detector = replace(detector, calibration=replace(detector.calibration, alignment=None))
    return predict(fields, annotations, detector, threshold, args)


def predict(fields: pd.DataFrame, annotations: pd.DataFrame | None, detector: Detector, threshold: float, args) -> int:
    """Scan every image, write what is found and judge it where there are annotations; 1 if an image was skipped."""
    model_path, out = Path(args.model_path), Path(args.out)
    smallest = min(args.smallest, threshold)
    # Judged is everything: on another laboratory's stain the best threshold can lie below what is worth writing.
    looked_for = smallest if annotations is None else 0.0
    tables, counts, entries, skipped = [], [], [], {}
    for field in tqdm(list(fields.itertuples()), desc="images", unit="image"):
        folder = out / file_name(field.image, safe=" ")
        try:
            with open_slide(Path(field.file)) as slide:
                um_per_px, source = choose_resolution(
                    slide.path, args.um_per_px, field.um_per_px, lambda slide=slide: slide.um_per_px
                )
                overview, tissue = look_over(slide, um_per_px, args.whole_px, args.workers)
                detections = find_mitoses(
                    detector,
                    slide,
                    um_per_px,
                    tissue,
                    folder / "scan.json",
                    batch_size=args.batch_size,
                    smallest=looked_for,
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
                truth = None
                if annotations is not None:
                    annotations, truth = known_points(annotations, field.image, slide.width, slide.height)
                written = detections[detections["probability"] >= smallest]
                write_image(folder, slide, written, um_per_px, threshold, smallest, tissue, truth, args)
                if args.report:
                    entries.append(report_entry(slide, um_per_px, overview, written, hotspot, facts, args.thumbnails))
        except WriteError:  # a full disk: every image after this one would fail too
            raise
        except InputError as error:
            skipped[field.image] = str(error)
            tqdm.write(f"skipped {field.image}: {error}", file=sys.stderr)
            continue
        counts.append(facts)
        tables.append(detections)

    if not tables:
        raise InputError(f"none of the {len(fields)} images could be read; the first: {next(iter(skipped.values()))}")
    detections, counts = pd.concat(tables, ignore_index=True), pd.DataFrame(counts).assign(model_sha256=detector.sha256)
    write_detections(out / "detections.csv", detections[detections["probability"] >= smallest])
    write_counts(out / "counts.csv", counts)
    judged = judge(out, annotations, detections, counts, threshold, args, detector.sha256)
    run = record_run(
        out,
        args,
        inputs={model_path: 1, args.data_root or "images": len(fields)},
        device=next(detector.network.parameters()).device,
        model_sha256=detector.sha256,
        threshold=threshold,
        skipped=skipped,
    )
    if args.report:
        fitted = detector.calibration.fitted
        calibration = "probabilities calibrated on val" if fitted else "probabilities not calibrated"
        write_report(out / "report.html", entries, skipped, threshold, calibration, run)
    print(summary(counts, skipped))
    if judged:
        print(judged)
    print(f"detections, tables and report.html are in {out}; {len(skipped)} images skipped")
    return 1 if skipped else 0


def judge(
    out: Path,
    annotations: pd.DataFrame | None,
    detections: pd.DataFrame,
    counts: pd.DataFrame,
    threshold: float,
    args: argparse.Namespace,
    model_sha256: str,
) -> str:
    """Write how good the detections are, where there are annotations; what to print of it.

    An earlier run's files that these detections were not judged by go.
    """
    stale, judged = {"metrics.json", "metrics_per_field.csv", "curve.csv", "curve.png"}, ""
    if annotations is not None:
        resolutions = dict(zip(counts["image"], counts["um_per_px"], strict=True))
        metrics, per_field = evaluate(annotations, detections, resolutions, threshold, args.match, seed=args.seed)
        judged = "F1 {f1:.3f} ({f1_low:.3f}-{f1_high:.3f}), precision {precision:.3f}, recall {recall:.3f}".format(
            **metrics
        )
        if args.match == "um":  # the curve is matched one to one
            best, curve = choose_threshold(fields_in_um(annotations, detections, resolutions), RADIUS_UM)
            metrics |= {"best_f1": float(curve["f1"].max()) if len(curve) else 0.0, "best_threshold": best}
            metrics |= {"plateau_threshold": plateau_threshold(curve), "average_precision": average_precision(curve)}
            judged += f" at threshold {threshold:.3f}; in hindsight F1 {metrics['best_f1']:.3f} at {best:.3f}"
            judged += f"; average precision {metrics['average_precision']:.3f}"
            if metrics["best_f1"]:  # without a mitosis found there is nothing to advise by
                judged += f"; for other images like these --threshold {metrics['plateau_threshold']:.4f}"
            write_csv(out / "curve.csv", curve.round(6))
            precision_recall(out / "curve.png", curve, threshold)
            stale -= {"curve.csv", "curve.png"}
        write_json(out / "metrics.json", {**metrics, "model_sha256": model_sha256})
        write_csv(out / "metrics_per_field.csv", per_field)
        stale -= {"metrics.json", "metrics_per_field.csv"}
    for name in stale:
        (out / name).unlink(missing_ok=True)
    return judged


def image_fields(paths: list[str]) -> tuple[pd.DataFrame, None]:
    """One row per image: image (its name; its path where a name stands twice), file, um_per_px (unknown)."""
    files = find_images([Path(path) for path in paths])
    names = pd.Series([file.name for file in files])
    names = names.where(~names.duplicated(keep=False), [file.as_posix() for file in files])
    return pd.DataFrame({"image": names, "file": files, "um_per_px": float("nan")}), None


def dataset_fields(args: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The fields of one split, and the mitoses annotated in the dataset."""
    dataset = read_dataset(
        args.dataset, Path(args.data_root), parse_cases(args.val) or None, parse_cases(args.test) or None
    )
    fields = dataset.fields[dataset.fields["split"] == args.split]
    if fields.empty:
        raise InputError(f"{args.data_root}: no field in split {args.split}; see --val and --test")
    annotations = dataset.annotations[dataset.annotations["label"] == 1]
    return fields.assign(file=[dataset.root / path for path in fields["path"]]), annotations


def known_points(annotations: pd.DataFrame, image: str, width: int, height: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All annotations less those outside this field, and this field's own."""
    here, outside = drop_outside(annotations[annotations["image"] == image], width, height)
    if outside:
        tqdm.write(f"{image}: {outside} annotations outside the field dropped", file=sys.stderr)
    return pd.concat([annotations[annotations["image"] != image], here]), here


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
        points = None if truth is None else truth[["x_px", "y_px"]].to_numpy(float)
        image = slide.read_region(0, 0, 0, slide.width, slide.height)
        write_png(folder / "overlay.png", overlay(image, detections, um_per_px, points, args.match))


def summary(counts: pd.DataFrame, skipped: dict[str, str]) -> str:
    """The table printed at the end: a line per image, those skipped with the reason."""
    shown = counts[["image", "mitoses", "area_mm2", "mitoses_per_mm2", "hotspot_mitoses", "hotspot_mm2", "hotspot_of"]]
    lines = [shown.round(2).to_string(index=False), *(f"{name}: skipped: {why}" for name, why in skipped.items())]
    lines.append(f"{counts['mitoses'].sum()} mitoses in {len(counts)} images, {counts['area_mm2'].sum():.2f} mm2")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, build_parser().parse_args())
