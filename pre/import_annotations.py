"""Make a `table` dataset of annotations that other programs wrote: QuPath, ASAP, ImageScope, COCO, SlideRunner.

Reads annotation files and the images that they are of. Writes OUT/fields.csv, annotations.csv, run.json and
OUT/images: with --region every region cut out of its image as a TIFF, otherwise links to the images.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from typing import Literal

from dasc.flags import Count, NumberOrTable, read_flags

# Edit here, or override one run with the flag of the same name.
ANNOTATIONS: list[str] = ["annotations"]  # annotation files, or folders of them; each is named after its image
IMAGES: list[str] = ["images"]  # the images, or folders of them
OUT = "data/imported"  # folder to write
FORMAT: Literal["auto", "geojson", "tsv", "asap", "imagescope", "coco", "sliderunner"] = "auto"  # auto: by content
MITOSIS: list[str] = ["Mitotic figure"]  # classes of mitoses; capitals do not count
LOOK_ALIKE: list[str] = ["Non-mitotic figure"]  # classes of hard negatives: look-alikes that are none
REGION: list[str] = []  # classes of the regions that become fields; none: every image is a field as it is
IGNORE: list[str] = []  # classes to leave out; objects without a class are Unclassified
EMPTY = False  # True: an image without any object is known to hold no mitosis; False: it is left out as not annotated
UM_PER_PX: NumberOrTable = ""  # um/px of the images that state none: a number, or a CSV image,um_per_px
INSIST_UM_PER_PX = False  # True: UM_PER_PX counts for images that state another resolution, too
WHOLE_PX: Count = 50_000_000  # most pixels of a field; larger images need regions
VAL = ""  # images (cases) for validation, A,B; the rest is train
TEST = ""  # images (cases) for the test

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

import math
import shutil
from collections import Counter

import numpy as np
import pandas as pd
import shapely
from tqdm import tqdm

from dasc.data.annotations import check_classes, find_annotations, image_of, key, read_annotations, stem
from dasc.data.datasets import drop_outside
from dasc.data.regions import Roi, box_of, cut_region, inside, parts_of, write_region
from dasc.data.resolutions import asked_um_per_px
from dasc.data.shapes import Source, areas_of, places
from dasc.data.splits import Field, assign_splits, parse_cases
from dasc.data.tables import ANNOTATIONS as ANNOTATION_COLUMNS
from dasc.data.tables import FIELDS
from dasc.errors import InputError
from dasc.files import check_replaceable, replacing_folder, write_csv, writing
from dasc.images.find import find_images
from dasc.images.resolution import choose_resolution
from dasc.images.slides import Slide, open_slide
from dasc.run import record_run, run_script

LABELS = {"mitosis": 1, "look_alike": 0}


def main(args) -> None:
    """Write the dataset beside --out and put it there when it is whole."""
    out = Path(args.out)
    check_replaceable(out, "fields.csv")
    sources, left_out = find_sources(args)
    names, paths = [image.name for image in sources], [str(image) for image in sources]
    asked = dict(zip(paths, asked_um_per_px(args.um_per_px, names, paths, args.insist_um_per_px), strict=True))
    fields, tables, counts = [], [], Counter({"images left out as not annotated": left_out})
    with replacing_folder(out, "fields.csv") as partial:
        for image, said in tqdm(sorted(sources.items()), desc="images", unit="image"):
            with open_slide(image) as slide:
                um_per_px = resolution_of(image, slide, asked[str(image)], args)
                objects, regions = sort_objects(said, slide, um_per_px, args)
                if not args.region:
                    regions = [None]
                elif not regions:
                    counts["images left out without a region"] += 1
                counts["images of several annotation files, which all count"] += len({path for path, _ in said}) > 1
                counts["regions that overlap an earlier one: their nuclei are in both"] += overlaps(regions)
                used = np.zeros(len(objects), bool)
                for number, region in enumerate(regions, start=1):
                    name = stem(image.name) if region is None else f"{stem(image.name)}_{number}"
                    path, own, within = lay_field(partial / "images", name, slide, um_per_px, region, objects, args)
                    used |= within
                    case = stem(image.name)
                    fields.append(Field(name, f"images/{path}", case, str(image), um_per_px, group=case))
                    tables.append(own.assign(image=name))
                counts["objects left out, outside the image or its regions"] += int((~used).sum())
        check_fields(fields, tables, args)
        fields.sort(key=lambda field: field.image)
        assign_splits("imported", fields, parse_cases(args.val), parse_cases(args.test))
        annotations = write_tables(partial, fields, tables)
        record_run(partial, args, inputs={path: 1 for path in sources}, left_out=counts)
    labels = annotations["label"]
    print("\n".join(f"{count} {what}" for what, count in counts.items() if count))
    print(f"{len(fields)} fields with {(labels == 1).sum()} mitoses and {(labels == 0).sum()} hard negatives: {out}")


def resolution_of(image: Path, slide: Slide, asked: float, args) -> float:
    """The um/px of an image; says what contradicts it."""
    um_per_px, _, note = choose_resolution(image, slide.stated, math.nan, asked, args.insist_um_per_px)
    if note:
        tqdm.write(f"{image.name}: {note}", file=sys.stderr)
    return um_per_px


def find_sources(args) -> tuple[dict[Path, list[tuple[Path, Source]]], int]:
    """What the annotation files say of every image, and how many images without an object are left out.

    Raises: InputError: a file that cannot be read or is of no image; a class that is named nowhere.
    """
    images = find_images([Path(path) for path in args.images])
    read = [
        (path, source) for path in find_annotations(args.annotations) for source in read_annotations(path, args.format)
    ]
    named = [name for name in (*args.mitosis, *args.look_alike, *args.region) if key(name) not in ignored(args)]
    twice = [name for name, count in Counter(map(key, named)).items() if count > 1]
    if twice:
        raise InputError(f"class {twice[0]!r} is named twice; each goes to one of the flags")
    check_classes([shape for _, source in read for shape in source.shapes], [*named, *args.ignore])
    sources: dict[Path, list] = {}
    for path, source in read:
        if source.shapes or args.empty:
            image = image_of(source, path, images, " ".join(args.images))
            sources.setdefault(image, []).append((path, source))
    if not sources:
        raise InputError(f"{' '.join(args.annotations)}: no object in these files; annotate, or say --empty True")
    return sources, sum(not source.shapes for _, source in read) if not args.empty else 0


def sort_objects(said: list, slide: Slide, um_per_px: float, args) -> tuple[pd.DataFrame, list]:
    """The nuclei of an image (x_px, y_px, label, votes) and its regions, in the image's own pixels."""
    rows, regions = [], []
    named = {key(name): label for flag, label in LABELS.items() for name in getattr(args, flag)}
    wanted = {key(name) for name in args.region}
    for _, source in said:
        for shape in source.shapes:
            geometry = source.in_px(shape, um_per_px, slide.origin_px)
            if key(shape.name) in ignored(args):
                continue
            if key(shape.name) in named:
                rows += [(x, y, named[key(shape.name)], shape.votes) for x, y in places(geometry)]
            elif key(shape.name) in wanted:
                area = areas_of(geometry)
                if area is None:
                    raise InputError(f"{shape.where}: {shape.name} is a region, but has no area; draw a polygon")
                regions += parts_of(inside(area, slide, shape.where))
    objects = pd.DataFrame(rows, columns=["x_px", "y_px", "label", "votes"])
    return objects.astype({"x_px": float, "y_px": float, "label": int}), regions


def overlaps(regions: list) -> int:
    """How many regions share area with an earlier one."""
    pairs = [(one, regions[:number]) for number, one in enumerate(regions)]
    return sum(any(shapely.intersection(one, other).area > 0 for other in before) for one, before in pairs)


def ignored(args) -> set[str]:
    """The classes left out, also where another flag's default names them."""
    return {key(name) for name in args.ignore}


def lay_field(
    folder: Path, name: str, slide: Slide, um_per_px: float, region: shapely.Polygon | None, objects: pd.DataFrame, args
) -> tuple[str, pd.DataFrame, np.ndarray]:
    """Cut a region into the folder, or link the image there; file name, the field's nuclei, which of all they are."""
    left, top, right, bottom = (0, 0, slide.width, slide.height) if region is None else box_of(region, slide)
    if (right - left) * (bottom - top) > args.whole_px:
        what = "the image" if region is None else "a region"
        raise InputError(
            f"{slide.path}: {what} of {right - left} x {bottom - top} px is more than --whole_px {args.whole_px}; "
            f"{'annotate regions and name their class: --region NAME' if region is None else 'draw a smaller one'}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if region is None:
        own, _ = drop_outside(objects, slide.width, slide.height)
        with writing(folder):
            link(slide.path.resolve(), folder / slide.path.name)
        return slide.path.name, own, objects.index.isin(own.index)
    within = Roi(region).at(objects[["x_px", "y_px"]].to_numpy())
    own = objects[within]
    write_region(folder / f"{name}.tif", cut_region(slide, region), um_per_px)
    return f"{name}.tif", own.assign(x_px=own["x_px"] - left, y_px=own["y_px"] - top), within


def link(image: Path, path: Path) -> None:
    """Link an image into the dataset; copy it where the system makes no links for this user, as Windows does."""
    try:
        path.symlink_to(image)
    except OSError:
        shutil.copyfile(image, path)
        print(f"{image}: copied, since no link can be made here")


def check_fields(fields: list[Field], tables: list[pd.DataFrame], args) -> None:
    """Raise InputError where two images give one field, or where no field or no mitosis is left."""
    if not fields:
        raise InputError(f"no region of class {', '.join(args.region)} in these files; name the class: --region NAME")
    twice = [name for name, count in Counter(field.image for field in fields).items() if count > 1]
    if twice:
        where = " and ".join(field.where for field in fields if field.image == twice[0])
        raise InputError(f"{where}: both would be field {twice[0]}; give them names that differ without the suffix")
    if not sum((table["label"] == 1).sum() for table in tables):
        raise InputError(
            f"no mitosis (class {', '.join(args.mitosis)}) on the {len(fields)} fields; check --mitosis, --region and "
            "that the annotations are of these images"
        )


def write_tables(folder: Path, fields: list[Field], tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Write fields.csv and annotations.csv; votes are a column where there are any."""
    rows = pd.DataFrame([[getattr(field, column) for column in FIELDS] for field in fields], columns=list(FIELDS))
    write_csv(folder / "fields.csv", rows)
    annotations = pd.concat(tables, ignore_index=True).sort_values("image", kind="stable", ignore_index=True)
    columns = [*ANNOTATION_COLUMNS, *(["votes"] if annotations["votes"].any() else [])]
    write_csv(folder / "annotations.csv", annotations[columns].round({"x_px": 3, "y_px": 3}))
    return annotations


if __name__ == "__main__":
    run_script(main, args)
