"""Patches and the fields to judge them by in one file, to train on a machine that has nothing but this project.

A ZIP archive: patches/ (patches.csv, cut.json and the PNG files of train and val), fields/ (a `table` dataset of the
val and test fields) and about.json.
"""

import json
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from tqdm import tqdm

from dasc.data.cut import read_cut_fields
from dasc.data.tables import ANNOTATIONS, FIELDS, PATCHES, read_patches
from dasc.errors import InputError
from dasc.files import replacing
from dasc.images.read import read_field

MIB = 2**20


def pack(folder: Path, out: Path, data_root: str, most_mib: float) -> dict:
    """Write `out` from a folder of patches of stage 1 or 3; what about.json says of it.

    Of the val and test fields as many are packed as fit, drawn at random, each split with half of the room.
    data_root: dataset folder; empty: as `read_cut_fields`. Raises: InputError: the patches alone are too large.
    """
    table = read_patches(folder / "patches.csv")
    table = table[table["split"] != "test"]  # the test fields judge
    root, fields, annotations = read_cut_fields(folder, data_root)
    data = {patch: (folder / patch).read_bytes() for patch in tqdm(table["patch"], "patches", leave=False)}
    size = sum(map(len, data.values()))
    if size > most_mib * MIB:
        raise InputError(
            f"{folder}: {size / MIB:.0f} MiB of patches, more than {most_mib:g}; cut fewer or smaller ones"
        )
    packed, images = [], {}
    for split, parts in (("val", 2), ("test", 1)):
        room = (most_mib * MIB - size) / parts
        taken = 0
        for field in fields[fields["split"] == split].sample(frac=1, random_state=0).itertuples(index=False):
            name, content = as_small_as_can_be(root / field.path, len(images))
            if taken + len(content) <= room:
                images[name], taken = content, taken + len(content)
                packed.append(field._replace(path=name))
        size += taken
    kept = pd.DataFrame(packed, columns=fields.columns)
    about = {
        "source": Path(root).resolve().name,
        "patches": table.groupby(["split", "label"]).size().rename("patches").reset_index().to_dict("records"),
        "fields": kept["split"].value_counts().to_dict(),
        "fields_left_out": int((fields["split"] != "train").sum() - len(kept)),
        "test_cases": sorted(kept.loc[kept["split"] == "test", "case"].astype(str).unique()),
    }
    texts = {"about.json": json.dumps(about, indent=1), "patches/cut.json": (folder / "cut.json").read_text("utf-8")}
    marked = annotations[annotations["image"].isin(kept["image"])]
    for name, one, columns in (
        ("patches/patches.csv", table, PATCHES),
        ("patches/fields.csv", kept, FIELDS),
        ("patches/annotations.csv", marked, ANNOTATIONS),
        ("fields/fields.csv", kept, FIELDS),
        ("fields/annotations.csv", marked, ANNOTATIONS),
    ):
        texts[name] = one[list(columns)].to_csv(index=False, lineterminator="\n")
    with replacing(out) as temporary, zipfile.ZipFile(temporary, "w") as whole:  # PNG and JPEG are compressed already
        for name, content in texts.items():
            whole.writestr(name, content, zipfile.ZIP_DEFLATED)
        for name, content in [(f"patches/{name}", one) for name, one in data.items()]:
            whole.writestr(name, content)
        for name, content in [(f"fields/{name}", one) for name, one in images.items()]:
            whole.writestr(name, content)
    return about | {"mib": round(out.stat().st_size / MIB, 1)}


def as_small_as_can_be(path: Path, number: int) -> tuple[str, bytes]:
    """Name and bytes of a field for the archive: the file's own, or PNG where that is smaller."""
    own = path.read_bytes()
    png = cv2.imencode(".png", cv2.cvtColor(read_field(path), cv2.COLOR_RGB2BGR))[1]
    suffix, content = (".png", np.asarray(png).tobytes()) if len(png) < len(own) else (path.suffix, own)
    return f"{number}{suffix}", content


def unpack(path: Path, folder: Path) -> dict:
    """Write patches/ and fields/ of an archive of `pack` to a folder; return its about.json.

    Raises: InputError: no such file, or another one.
    """
    try:
        with zipfile.ZipFile(path) as whole:
            whole.extractall(folder)
        return json.loads((folder / "about.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: no file of `python tests/gpu.py --pack` ({error})") from error
