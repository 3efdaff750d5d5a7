"""Read a MIDOG JSON: images, boxes, and categories whose names decide over their numbers."""

import json
import logging
import math
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from dasc.data.rows import Content, Point, check_relative, find_file
from dasc.data.splits import Field
from dasc.errors import InputError

# Blocks of images that the challenges published without labels: ids of the whole set, ids of the block.
UNLABELLED_BLOCKS = {
    "MIDOG 2021": (range(1, 201), range(151, 201)),  # the fourth scanner
    "MIDOG 2022": (range(1, 406), range(355, 406)),  # human melanomas
}
NUMBERS = {1: 1, 2: 0}  # category_id of MIDOG: label
MEANING = {1: "mitosis", 0: "hard negative"}
# Names of categories, in lower case and without whatever is no letter: a mitosis by the whole name, a hard negative by
# a part of it.
MITOSES = ("mitosis", "mitoses", "mitotic", "mitoticfigure", "mitoticfigures", "mitoticcell", "mitoticcells")
MITOSES += ("mitose", "mitosen", "mitosefigur", "mitosefiguren", "truemitosis", "truemitoticfigure")
HARD_NEGATIVES = ("nonmito", "notmito", "nomito", "nichtmito", "keinemito", "hardneg", "imposter", "impostor", "mimic")
HARD_NEGATIVES += ("lookalike", "mitosislike", "mitoticlike", "pseudomito", "falsemito")
# Look-alikes by their nature: hard negatives where no other category is named as such.
LIKELY = ("apopto", "pykno")

logger = logging.getLogger(__name__)


def read_midog(root: Path) -> Content:
    """Read MIDOG 2021, 2022 or ++: one JSON, boxes [x1, y1, x2, y2], a mitosis or a hard negative by category."""
    path, content = _read_json(root)
    labels, names = category_labels(content.get("categories"), str(path))
    by_id: dict[Any, Field] = {}
    for row, entry in enumerate(content["images"]):
        field = _field(root, entry, f"{path}, images[{row}]")
        identity = entry["id"]
        if identity in by_id:
            raise InputError(
                f"{by_id[identity].where} and {field.where}: both have id {identity!r}; ids must be unique"
            )
        by_id[identity] = field
    points, annotated, others = [], set(), Counter()
    for row, entry in enumerate(content["annotations"]):
        where = f"{path}, annotations[{row}]"
        identity, category, box = entry.get("image_id"), entry.get("category_id"), entry.get("bbox")
        if not isinstance(identity, int | str) or identity not in by_id:
            raise InputError(f"{where}: image_id {identity!r} is not among the images")
        if not isinstance(category, int):
            raise InputError(f"{where}: category_id {category!r}; expected 1 for a mitosis, 2 for a hard negative")
        annotated.add(identity)
        if category not in labels:
            others[names.get(category, str(category))] += 1
            continue
        x1, y1, x2, y2 = _box(box, where)
        points.append(Point(by_id[identity].image, (x1 + x2) / 2, (y1 + y2) / 2, labels[category], where))
    if others:
        counts = ", ".join(f"{name} {count}" for name, count in others.most_common())
        logger.warning("%s: %d annotations of other classes left out: %s", path, others.total(), counts)
    _mark_unlabelled(by_id, annotated, path)
    return Content(list(by_id.values()), points, f"{path}, the list annotations")


def category_labels(categories: Any, path: str) -> tuple[dict[int, int], dict[int, str]]:
    """Label of each category_id that is a mitosis (1) or a hard negative (0), and the names of all that have one.

    A name decides over the number; without names 1 is a mitosis and 2 a hard negative, as in MIDOG.
    Errors: InputError where names contradict each other, or leave open what MIDOG's numbers mean.
    """
    names: dict[int, str] = {}
    for entry in categories if isinstance(categories, list) else ():
        number, name = (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if not isinstance(number, int) or not isinstance(name, str) or not name.strip():
            continue
        if names.setdefault(number, name) != name:
            raise InputError(f"{path}, categories: id {number} is {names[number]!r} and {name!r}; one id has one name")
    plain = {number: "".join(filter(str.isalpha, name.lower())) for number, name in names.items()}
    labels = {number: 0 for number, name in plain.items() if any(part in name for part in HARD_NEGATIVES)}
    labels |= {number: 1 for number, name in plain.items() if name in MITOSES}
    for label, meaning in MEANING.items():
        same = [f"{number} {names[number]!r}" for number in labels if labels[number] == label]
        if len(same) > 1:
            raise InputError(
                f"{path}, categories: {' and '.join(same)} both mean a {meaning}; expected one; give them one id, or "
                "rename the one that means something else"
            )
    if 0 not in labels.values():
        labels |= {number: 0 for number, name in plain.items() if name.startswith(LIKELY)}
    for number, label in NUMBERS.items():
        if number in labels or label in labels.values():
            continue
        if number in names:
            raise InputError(
                f"{path}, categories: found {number} {names[number]!r}, where MIDOG has {number} for a "
                f"{MEANING[label]}, and no other name means one; expected a name such as {MEANING[label]!r}; rename "
                f"the category, or give it another number if it is none"
            )
        labels[number] = label
    if any(labels.get(number, label) != label for number, label in NUMBERS.items()):
        told = ", ".join(f"{number} {names[number]!r}" for number in sorted(labels) if number in names)
        logger.warning("%s: categories are told by their names, which differ from MIDOG's numbers: %s", path, told)
    return labels, names


def _read_json(root: Path) -> tuple[Path, dict[str, Any]]:
    path = find_file(root / "MIDOG.json")
    if not path.is_file():
        others = sorted(other for other in root.glob("*") if other.suffix.lower() == ".json")
        if len(others) != 1:
            found = ", ".join(other.name for other in others) or "no JSON"
            raise InputError(f"{root}: expected MIDOG.json or a single other JSON, found {found}")
        path = others[0]
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    for key in ("images", "annotations"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InputError(f"{path}: expected a list {key!r} of objects, as in MIDOG.json")
    return path, content


def _field(root: Path, entry: dict[str, Any], where: str) -> Field:
    identity, file_name = entry.get("id"), entry.get("file_name")
    if not isinstance(identity, int | str) or not isinstance(file_name, str):
        raise InputError(f"{where}: expected an id and a file_name, found {identity!r} and {file_name!r}")
    check_relative(file_name, where)
    stem = PurePosixPath(file_name).stem
    case = str(entry.get("slide") or stem)
    places = [root / "images" / file_name, root / file_name] if stem else []
    found = next((find_file(place) for place in places if find_file(place).is_file()), root / "images" / file_name)
    field = Field(stem, found.relative_to(root).as_posix(), case, where)
    field.group, field.names = case, (str(identity),)
    sides = [entry.get(key) for key in ("width", "height")]
    if all(isinstance(side, int | float) and math.isfinite(side) and side > 0 for side in sides):
        field.width_px, field.height_px = sides
    return field


def _box(box: Any, where: str) -> list[float]:
    is_box = isinstance(box, list) and len(box) == 4
    if not is_box or not all(isinstance(edge, int | float) and math.isfinite(edge) for edge in box):
        raise InputError(f"{where}: bbox {box!r}; expected four numbers [x1, y1, x2, y2]")
    if box[2] < box[0] or box[3] < box[1]:
        raise InputError(f"{where}: bbox {box!r} looks like [x, y, width, height]; expected [x1, y1, x2, y2]")
    return box


def _mark_unlabelled(by_id: dict[Any, Field], annotated: set, path: Path) -> None:
    """Set the split of images in a known unlabelled block; of others without a box nothing is known yet."""
    for name, (whole, block) in UNLABELLED_BLOCKS.items():
        if annotated and set(block) <= by_id.keys() <= set(whole) and annotated.isdisjoint(block):
            logger.warning(
                "%s: taken for %s by its image ids: %d to %d carry no labels and are left out",
                *(path, name, block[0], block[-1]),
            )
            for identity in block:
                by_id[identity].split = "unlabelled"
    for identity, field in by_id.items():
        field.silent = identity not in annotated and field.split != "unlabelled"
