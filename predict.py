"""Stage 9 of 9: find the mitoses of new images, or of a dataset's fields and judge them by its annotations.

Reads images (TIFF, PNG, JPEG, BMP) and a model.pt of stage 2 or 8.
Writes OUT/detections.csv, counts.csv, run.json; per image a QuPath GeoJSON, mitotic-figures.json and an overlay PNG;
with a dataset metrics.json and metrics_per_field.csv too.
"""

import argparse
import sys
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from tqdm import tqdm

from dasc.datasets import READERS, drop_outside, read_dataset
from dasc.detect import scan_field
from dasc.export import write_detections, write_geojson, write_mitotic_figures
from dasc.fields import find_images, read_field, resolution
from dasc.figures import overlay, write_png
from dasc.manifest import sha256
from dasc.metrics import evaluate
from dasc.network import load_network
from dasc.run import InputError, pick_device, record_run, run_script, true_or_false, write_csv, write_json
from dasc.splits import parse_cases

# Edit here, or override one run with the flag of the same name.
IMAGES = ["data/sample/images"]  # image files, or folders of them
MODEL_PATH = "results/DMU_scl/model.pt"  # the trained network
OUT = "results/predict"  # folder to write
UM_PER_PX = 0.0  # resolution of the images in um/px; 0: as the file or the dataset states it
THRESHOLD = 0.0  # p(mitosis) from which a detection counts; 0: the checkpoint's own, chosen on val
PER_MM2 = 1800.0  # candidates looked at per mm2, best ranked first; fewer is faster and misses more
MERGE_UM = 7.5  # detections nearer than this become the strongest of them
VIEWS = 8  # right-angle views averaged for every likely candidate: 1, 2, 4 or 8
SMALLEST = 0.05  # detections below this probability are not written
OVERLAYS = True  # draw the detections on a copy of every image
DATASET = ""  # judge a dataset instead of reading IMAGES: sample, midog, mitos14, tupac16, tupac16_al or table
DATA_ROOT = ""  # folder of that dataset
SPLIT = "test"  # its fields: train, val or test
VAL = ""  # cases for validation, A,B; empty: the dataset's own split
TEST = ""  # cases for the test
MATCH = "um"  # um: within 7.5 um, one to one; uts: within 30 px, many to one, as the paper counts
DEVICE = "auto"  # auto, cpu, cuda or mps
BATCH_SIZE = 256  # patches scored together; less takes less memory
SEED = 0  # of the bootstrap interval


def build_parser() -> argparse.ArgumentParser:
    """Flags: the constants above in lower case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", default=IMAGES, help="image files, or folders of them")
    parser.add_argument("--model_path", default=MODEL_PATH, help="trained network")
    parser.add_argument("--out", default=OUT, help="folder to write")
    parser.add_argument("--um_per_px", type=float, default=UM_PER_PX, help="resolution of the images; 0: as stated")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, help="p(mitosis); 0: the checkpoint's")
    parser.add_argument("--per_mm2", type=float, default=PER_MM2, help="candidates looked at per mm2")
    parser.add_argument("--merge_um", type=float, default=MERGE_UM, help="nearer detections become one")
    parser.add_argument("--views", type=int, default=VIEWS, choices=(1, 2, 4, 8), help="views averaged per candidate")
    parser.add_argument("--smallest", type=float, default=SMALLEST, help="smallest probability written")
    parser.add_argument("--overlays", type=true_or_false, default=OVERLAYS, help="draw the detections")
    parser.add_argument("--dataset", default=DATASET, choices=["", *READERS], help="judge this dataset's fields")
    parser.add_argument("--data_root", default=DATA_ROOT, help="folder of the dataset")
    parser.add_argument("--split", default=SPLIT, choices=("train", "val", "test"), help="fields of the dataset")
    parser.add_argument("--val", default=VAL, help="cases for validation, A,B")
    parser.add_argument("--test", default=TEST, help="cases for the test, A,B")
    parser.add_argument("--match", default=MATCH, choices=("um", "uts"), help="rule by which a detection is right")
    parser.add_argument("--device", default=DEVICE, help="auto, cpu, cuda or mps")
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="patches scored together")
    parser.add_argument("--seed", type=int, default=SEED)
    return parser


def main(args: argparse.Namespace) -> int:
    fields, annotations = dataset_fields(args) if args.dataset else image_fields(args.images)
    network, config = load_network(Path(args.model_path), pick_device(args.device))
    if not config["um_per_px"]:
        raise InputError(f"{args.model_path}: trained on patches of unknown resolution, so it cannot scan images")
    threshold = args.threshold or config["threshold"]
    out = Path(args.out)
    tables, counts, skipped = [], [], {}
    for field in tqdm(list(fields.itertuples()), desc="fields", unit="field"):
        try:
            image = read_field(Path(field.file))
            um_per_px, source = resolution(Path(field.file), args.um_per_px, field.um_per_px)
            detections = scan_field(
                network,
                config,
                image,
                um_per_px,
                batch_size=args.batch_size,
                per_mm2=args.per_mm2,
                merge_um=args.merge_um,
                views=args.views,
                smallest=args.smallest,
            )
        except InputError as error:
            skipped[field.image] = str(error)
            tqdm.write(f"skipped {field.image}: {error}", file=sys.stderr)
            continue
        detections = detections.assign(
            image=field.image,
            x_um=detections["x_px"] * um_per_px,
            y_um=detections["y_px"] * um_per_px,
            mitosis=detections["probability"] >= threshold,
        )
        height, width = image.shape[:2]
        truth = None
        if annotations is not None:
            annotations, truth = known_points(annotations, field.image, width, height)
        write_field(out, field.image, image, detections, um_per_px, threshold, truth, args)
        mitoses, area_mm2 = int(detections["mitosis"].sum()), width * height * um_per_px**2 / 1e6
        counts.append((field.image, width, height, um_per_px, source, mitoses, area_mm2, mitoses / area_mm2))
        tables.append(detections)

    if not tables:
        raise InputError(f"none of the {len(fields)} fields could be read; the first: {next(iter(skipped.values()))}")
    detections = pd.concat(tables, ignore_index=True)
    write_detections(out / "detections.csv", detections)
    columns = [
        "image",
        "width_px",
        "height_px",
        "um_per_px",
        "um_per_px_source",
        "mitoses",
        "area_mm2",
        "mitoses_per_mm2",
    ]
    counts = pd.DataFrame(counts, columns=columns)
    write_csv(out / "counts.csv", counts.round({"area_mm2": 6, "mitoses_per_mm2": 3}))
    summary = f"{counts['mitoses'].sum()} mitoses in {len(counts)} fields, {counts['area_mm2'].sum():.2f} mm2"
    if annotations is not None:
        resolutions = dict(zip(counts["image"], counts["um_per_px"], strict=True))
        metrics, per_field = evaluate(annotations, detections, resolutions, threshold, args.match, seed=args.seed)
        write_json(out / "metrics.json", metrics)
        write_csv(out / "metrics_per_field.csv", per_field)
        summary += "\nF1 {f1:.3f} ({f1_low:.3f}-{f1_high:.3f}), precision {precision:.3f}, recall {recall:.3f}".format(
            **metrics
        )
    record_run(out, args, model_sha256=sha256(Path(args.model_path)), threshold=threshold, skipped=skipped)
    print(f"{summary}\ndetections, overlays and tables are in {out}; {len(skipped)} fields skipped")
    return 1 if skipped else 0


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


def write_field(out: Path, name: str, image, detections: pd.DataFrame, um_per_px, threshold, truth, args) -> None:
    """Everything that is written per image, in a folder of the image's name."""
    folder = out / quote(name, safe=" ")
    write_geojson(folder / "detections.geojson", detections)
    try:
        write_mitotic_figures(folder / "mitotic-figures.json", detections, um_per_px, threshold, args.smallest)
    except InputError as error:  # the format ends at 10 mm; the other files hold all
        tqdm.write(f"not written: {error}", file=sys.stderr)
    if args.overlays:
        points = None if truth is None else truth[["x_px", "y_px"]].to_numpy(float)
        write_png(folder / "overlay.png", overlay(image, detections, um_per_px, points, args.match))


if __name__ == "__main__":
    run_script(main, build_parser().parse_args())
