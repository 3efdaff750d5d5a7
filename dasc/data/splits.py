"""Put every case of a dataset on one side: train, val or test. Fields of one case are never divided."""

import math
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

from dasc.errors import InputError

SAMPLE_VAL, SAMPLE_TEST = ("7", "8"), ("9", "10")  # image ids of the synthetic sample
MIDOG_VAL, MIDOG_TEST = ("41-45", "91-95", "141-145"), ("46-50", "96-100", "146-150")  # image ids, as in the paper
MITOS14_VAL, MITOS14_TEST = ("A03", "H03"), ("A04", "H04")
TUPAC16_VAL = ("30", "37", "44", "51", "58", "65", "72")
TUPAC16_TEST = ("31", "38", "45", "52", "59", "66", "73")
DEFAULT_SPLITS = {  # val, test
    "midog": (MIDOG_VAL, MIDOG_TEST),
    "mitos14": (MITOS14_VAL, MITOS14_TEST),
    "tupac16": (TUPAC16_VAL, TUPAC16_TEST),
    "tupac16_al": (TUPAC16_VAL, TUPAC16_TEST),
    "sample": (SAMPLE_VAL, SAMPLE_TEST),
}


@dataclass
class Field:
    """One field as a reader finds it: its row of the field table, and what a user may call it."""

    image: str
    path: str
    case: str
    where: str  # file and row it was read from, for messages
    um_per_px: float = math.nan
    split: str = ""
    group: str = ""  # what must not be divided: the case, or one glass on two scanners
    names: tuple[str, ...] = ()  # what --val and --test may call it beside its case
    width_px: float = math.nan  # as the labels state it
    height_px: float = math.nan
    silent: bool = False  # nothing is annotated in it, and nobody said whether it is empty or unlabelled


def parse_cases(text: str) -> list[str]:
    """Split `A,B` of --val and --test into its names; an empty text gives none."""
    return [part.strip() for part in text.split(",") if part.strip()]


def assign_splits(name: str, fields: list[Field], val: list[str] | None, test: list[str] | None) -> None:
    """Set the split of every field of dataset `name`: val and test as named, else the default, the rest train.

    Errors: InputError for a name that no field has, a case on both sides, a side that is unlabelled.
    """
    side_of: dict[str, str] = {}
    for side, names in (("val", val), ("test", test)):
        for group in _find_groups(fields, names or [], side):
            if side_of.setdefault(group, side) != side:
                raise InputError(f"--val and --test both name case {group}; one case goes to one side")
    for side, names in (("val", val), ("test", test)):
        if names is not None:
            continue
        if name == "table":
            groups = {field.group for field in fields if field.split == side}
        elif name in DEFAULT_SPLITS:
            try:
                groups = _find_groups(fields, DEFAULT_SPLITS[name][side == "test"], side)
            except InputError as error:
                raise InputError(f"{error}; the paper's split does not fit: name --val and --test") from error
        for group in groups:
            side_of.setdefault(group, side)
    for field in fields:
        if field.split != "unlabelled":
            field.split = side_of.get(field.group, "train")
    for side, names in (("val", val), ("test", test)):
        if names and all(field.split != side for field in fields):
            raise InputError(f"--{side} {','.join(names)}: these cases are unlabelled; name cases with annotations")


def draw_slides(labels: np.ndarray, cases: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Draw a side for every slide of labelled patches: one of `folds` parts is val, one test, the rest train.

    Args:
        labels: (N,) 0 or 1; the parts have as even a share of both as whole slides allow. cases: slide (N,) of each.

    Returns: side (N,) of each patch.

    Raises:
        InputError: fewer slides or patches than three sides need.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # a second, which only dealing out at random needs

    slides, counts = sorted(set(cases)), np.bincount(labels, minlength=2)
    if len(slides) < 3 or counts.max() < 3:
        raise InputError(
            f"{len(slides)} slide{'s' * (len(slides) != 1)} ({', '.join(slides[:3])}) with {counts[1]} positive and "
            f"{counts[0]} negative patches: train, val and test each need a slide of their own, as no slide is "
            "divided; add slides, or name --val and leave out the test"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a label with fewer patches than folds: the caller checks
        drawn = StratifiedGroupKFold(max(3, min(folds, len(slides), counts.max())), shuffle=True, random_state=seed)
        parts = list(drawn.split(labels, labels, cases))
    sides = np.full(len(labels), "train", dtype=object)
    for side, (_, members) in zip(("val", "test"), parts, strict=False):
        sides[members] = side
    return sides


def nucleus_of(train: pd.DataFrame) -> pd.Series:
    """The patch that stands for each patch's nucleus: of a shifted copy its mitosis, of any other patch itself.

    Args:
        train: rows of patches.csv. A copy belongs to the annotated mitosis nearest to it, or to itself without one.
    """
    owner = train["patch"].copy()
    copies = train["origin"] == "shifted"
    for image, moved in train[copies].groupby("image"):
        annotated = train[(train["image"] == image) & (train["label"] == 1) & ~copies]
        if annotated.empty:
            continue
        nearest = cKDTree(annotated[["x_px", "y_px"]]).query(moved[["x_px", "y_px"]])[1]
        owner[moved.index] = annotated["patch"].to_numpy()[nearest]
    return owner


def draw_share(train: pd.DataFrame, share: float, share_of: str, seed: int) -> pd.Series:
    """Which training patches stay when only a share is annotated: bool, with the index of `train`.

    The shifted copies of a mitosis stay or go with it. A smaller share of the same seed lies inside a larger one.

    Args:
        train: rows of patches.csv. share: above 0, to 1; of each label at least one patch stays.
        share_of: all, or positives (every negative stays).
    """
    owner = nucleus_of(train)
    kept = pd.Series(True, index=train.index)
    for label in (0, 1) if share_of == "all" else (1,):
        members = owner[train["label"] == label]
        drawn = np.random.default_rng([seed, label]).permutation(sorted(set(members)))
        kept[members.index] = members.isin(drawn[: math.ceil(share * len(drawn))])
    return kept


def find_images_named(fields: list[Field], names: Iterable[str], flag: str) -> set[str]:
    """Return the images that `names` mean: an image or its id, or all of a case; ranges included.

    Errors: InputError for a name that no field has.
    """
    return _find(fields, names, flag, lambda field: field.image)


def _find_groups(fields: list[Field], names: Iterable[str], side: str) -> set[str]:
    """Return the groups that `names` mean."""
    return _find(fields, names, side, lambda field: field.group)


def _find(fields: list[Field], names: Iterable[str], side: str, wanted: Callable[[Field], str]) -> set[str]:
    """Return what is wanted of the fields that `names` mean: as case, as image or id, then with 041 read as 41."""
    by_name: list[dict[str, set[str]]] = [{}, {}, {}, {}]
    for field in fields:
        for level, called in enumerate(((field.case,), (field.image, *field.names))):
            for one in called:
                by_name[level].setdefault(one, set()).add(wanted(field))
                by_name[level + 2].setdefault(_plain_number(one), set()).add(wanted(field))
    found: set[str] = set()
    for name in names:
        span = re.fullmatch(r"(\d+)-(\d+)", name, re.ASCII)
        is_range = span and not any(name in level for level in by_name)
        for one in map(str, range(int(span[1]), int(span[2]) + 1)) if is_range else (name,):
            meant = next((level[one] for level in by_name[:2] if one in level), None)
            plain = _plain_number(one)
            meant = meant or next((level[plain] for level in by_name[2:] if plain in level), None)
            if not meant:
                cases = sorted({field.case for field in fields})
                known = ", ".join(cases if len(cases) <= 12 else [*cases[:6], "...", *cases[-3:]])
                raise InputError(f"--{side} {name}: no case or image {one}; the {len(cases)} cases are {known}")
            found |= meant
        if is_range and int(span[1]) > int(span[2]):
            raise InputError(f"--{side} {name}: a range goes from low to high")
    return found


def _plain_number(name: str) -> str:
    return (name.lstrip("0") or "0") if name.isdecimal() else name
