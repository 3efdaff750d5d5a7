"""Broken inputs: valid files of every kind, changed at random, are read as the scripts read them.

    python tests/fuzz.py --seconds 600 --seed 1 --keep found

An input is read or refused by an InputError (a script: by one line and a status that is not 0). Anything else is a
finding: another exception, a crash of the process, a file written outside the output folder, or no end after LIMIT_S.
Reading happens in a child process with limited memory, which is started again after a crash. Every input is drawn from
the seed, its kind and its number alone, so that a finding can be made again: --kind KIND --first NUMBER.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import pickle
import random
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import cv2
import numpy as np
import tifffile
import torch
from PIL import Image

import dasc.slides
from dasc.datasets import read_dataset
from dasc.difficulty import (
    CHECKED_COLUMNS,
    HARD_COLUMNS,
    MEMORY_COLUMNS,
    SCL_COLUMNS,
    read_checked,
    read_hard,
    read_memory,
    read_scl,
)
from dasc.fields import find_images, read_field, read_um_per_px
from dasc.image_scan import look_over
from dasc.manifest import PATCHES, read_cut_fields, read_patches
from dasc.network import SearchNetwork, load_backbone_weights
from dasc.patches import load_patches
from dasc.pool import read_pool
from dasc.run import InputError
from dasc.saved import SavedScan

LIMIT_S = 30  # for one input
MEMORY = 4 << 30  # bytes of addresses the child may take beside those it starts with
SMALL_PX = 4_000_000  # larger images are not looked over: sound ones of that size may take longer than LIMIT_S
BACKBONE = "mobilenetv3_small_050"

Files = dict[str, bytes]


class Kind(NamedTuple):
    """base: sound inputs, files by name. change: how the file named `changed` is broken. read: how it is read."""

    base: Callable[[], list[Files]]
    changed: Callable[[Files], list[str]]
    change: Callable[[random.Random, bytes], bytes]
    read: Callable[[Path], None]


# How files are broken.

TOKENS = ["", " ", "0", "-1", "1", "2", "0.5", "1e309", "-1e-309", "nan", "inf", "NA", "None", "True", "041", "9" * 400]
TOKENS += [
    "99999999999999999999",
    "1.5",
    "\0",
    '"',
    "'",
    ",",
    "\n",
    "\r",
    ";",
    "é",
    "\ufeff",
    "../x",
    "/tmp/x",
    "C:\\x",
]
TOKENS += [
    "a" * 5000,
    "..",
    ".",
    "x/../../y",
    "train",
    "val",
    "test",
    "mitosis",
    "%s",
    "=1+1",
    "<b>",
    "\u202e",
    "\ud800",
]
VALUES = [None, True, 0, 1, 2, -1, 0.5, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../x", [], {}, [1], "001"]


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """One to eight changes of a binary file, half of them near its start, where the headers are."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        if not data:
            break
        place = rng.randrange(min(len(data), 400) if rng.random() < 0.5 else len(data))
        how = rng.randrange(8)
        if how == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[place] = rng.choice((0, 1, 2, 127, 128, 255, rng.randrange(256)))
        elif how == 2:
            form = rng.choice(("<H", ">H", "<I", ">I", "<Q"))
            most = 1 << (8 * struct.calcsize(form))
            number = rng.choice((0, 1, most - 1, most // 2, len(data), rng.randrange(most), rng.randrange(65536)))
            data[place : place + struct.calcsize(form)] = struct.pack(form, number % most)
        elif how == 3:
            del data[place:]
        elif how == 4:
            del data[place : place + rng.randrange(1, 64)]
        elif how == 5:
            data[place:place] = rng.randbytes(rng.randrange(1, 64))
        elif how == 6:
            data[place:place] = data[place : place + rng.randrange(1, 256)]
        else:
            other = rng.randrange(len(data))
            data[place : place + 16] = data[other : other + 16]
    return bytes(data)


def change_png(rng: random.Random, data: bytes) -> bytes:
    """As change_bytes, mostly with check sums made right again, without which no decoder looks further."""
    data = change_bytes(rng, data)
    if rng.random() < 0.2:
        return data
    mended, place = bytearray(data), 8
    while place + 12 <= len(mended):
        length = int.from_bytes(mended[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(mended):
            break
        mended[end : end + 4] = zlib.crc32(mended[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(mended)


def change_text(rng: random.Random, data: bytes) -> bytes:
    """Cells, rows and characters of a CSV replaced, left out, doubled or moved; now and then its bytes."""
    if rng.random() < 0.1:
        return change_bytes(rng, data)
    rows = [row.split(",") for row in data.decode().split("\n")]
    for _ in range(rng.choice((1, 1, 2, 4))):
        row = rng.choice(rows)
        cell = rng.randrange(len(row))
        how = rng.randrange(8)
        if how < 3:
            row[cell] = rng.choice(TOKENS)
        elif how == 3:
            row[cell] = rng.choice(rng.choice(rows))
        elif how == 4:
            row.insert(cell, rng.choice(TOKENS))
        elif how == 5 and len(row) > 1:
            del row[cell]
        elif how == 6:
            rows.insert(rng.randrange(len(rows) + 1), list(row))
        else:
            text = row[cell]
            place = rng.randrange(len(text) + 1)
            row[cell] = text[:place] + rng.choice(TOKENS) + text[place + rng.randrange(2) :]
    return "\n".join(map(",".join, rows)).encode("utf-8", "surrogatepass")


def change_value(rng: random.Random, value, others: list):
    """Something inside nested lists and dicts replaced, left out, doubled or renamed."""
    if not isinstance(value, list | dict) or not value or rng.random() < 0.1:
        return rng.choice(others)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    if rng.random() < 0.7:
        value[key] = change_value(rng, value[key], others)
    elif rng.random() < 0.5:
        del value[key]
    elif isinstance(value, list):
        value.append(value[key])
    else:
        value[rng.choice([*TOKENS[:20], *keys])] = value.pop(key)
    return value


def change_json(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.1:
        return change_bytes(rng, data)
    if rng.random() < 0.02:
        return b"[" * rng.choice((500, 100_000))
    content = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        content = change_value(rng, content, [*VALUES, *TOKENS])
    return json.dumps(content).encode()


class Bomb:
    """What an attacker puts into a pickle: it would write a file."""

    def __reduce__(self):
        return Path.write_text, (Path("bomb"), "went off")


def change_checkpoint(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.3:
        return change_bytes(rng, data)
    content = torch.load(io.BytesIO(data), weights_only=True)
    others = [*VALUES, torch.zeros(0), torch.full((3,), torch.nan), torch.ones(2, 2, dtype=torch.long), Bomb()]
    for _ in range(rng.choice((1, 1, 2))):
        content = change_value(rng, content, others)
    changed = io.BytesIO()
    if rng.random() < 0.05:
        pickle.dump(content, changed)
    else:
        torch.save(content, changed)
    return changed.getvalue()


# Sound inputs.


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    image = np.random.default_rng(0).normal((200, 150, 200), 12, (height, width, 3))
    for x, y in ((12, 20), (40, 30)):
        cv2.circle(image, (x, y), 5, (90, 60, 140), -1)
    return image.clip(0, 255).astype(np.uint8)


def tiffs() -> list[Files]:
    image, found = picture(), []
    resolved = {"resolution": (40000, 40000), "resolutionunit": 3}
    for options in (
        {},
        {"rowsperstrip": 8, "compression": "lzw", "predictor": True},
        {"rowsperstrip": 16, "compression": "jpeg"},
        {"tile": (16, 16), "compression": "deflate"},
        {"tile": (32, 32), "compression": "jpeg"},
        {"tile": (32, 32), "compression": "jpeg2000"},
        {"tile": (32, 32), "compression": "lzw", "bigtiff": True},
        {"compression": "zstd", "byteorder": ">"},
    ):
        found.append(tiff(image, photometric="rgb", **options, **resolved))
    found.append(tiff(np.moveaxis(image, 2, 0), photometric="rgb", planarconfig="separate"))
    found.append(tiff(image.astype(np.uint16) * 16, photometric="rgb", compression="lzw"))
    found.append(tiff(image[..., 0], photometric="miniswhite"))
    colours = np.random.default_rng(0).integers(0, 65535, (3, 256)).astype(np.uint16)
    found.append(tiff(image[..., 0], photometric="palette", colormap=colours))
    found.append(tiff(np.dstack([image, image[..., 0]]), photometric="rgb", extrasamples=["unassalpha"]))
    return [{"image.tif": data} for data in found]


def tiff(image: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, image, **options)
    return file.getvalue()


def pyramids() -> list[Files]:
    """Slides of three kinds: Aperio's (read by OpenSlide), and pyramids in pages and in SubIFDs (read by tifffile)."""
    levels, found = [picture(256, 320), picture(128, 160), picture(64, 80)], []
    for compression, description, nested in (
        ("jpeg", "Aperio Image Library v1\n320x256 |AppMag = 40|MPP = 0.25", False),
        ("lzw", "Aperio Image Library v1\n320x256 |MPP = 0.25", False),
        ("jpeg", None, True),
        ("deflate", None, True),
    ):
        file = io.BytesIO()
        options = {"tile": (64, 64), "photometric": "rgb", "compression": compression, "metadata": None}
        with tifffile.TiffWriter(file) as writer:
            writer.write(levels[0], description=description, subifds=2 if nested else 0, **options)
            for level in levels[1:]:
                writer.write(level, subfiletype=1, description=None if nested else description, **options)
        found.append({"slide.tif": file.getvalue()})
    return found


def pictures(name: str, *changes: tuple[str, dict]) -> list[Files]:
    """One picture saved by Pillow in several modes."""
    found = []
    for mode, options in changes:
        file = io.BytesIO()
        Image.fromarray(picture()).convert(mode).save(file, Path(name).suffix[1:].replace("jpg", "jpeg"), **options)
        found.append({name: file.getvalue()})
    return found


def png_bases() -> list[Files]:
    deep = cv2.imencode(".png", picture().astype(np.uint16) * 200)[1].tobytes()
    return [*pictures("a.png", ("RGB", {}), ("RGBA", {}), ("L", {}), ("P", {}), ("1", {})), {"a.png": deep}]


def table(columns, *rows) -> bytes:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    return file.getvalue().encode()


PNG = b""  # a sound picture, for datasets


def midogs() -> list[Files]:
    images = [{"id": n, "file_name": f"{n:03d}.png", "width": 64, "height": 48} for n in (1, 2, 3)]
    boxes = [{"image_id": n, "category_id": n % 2 + 1, "bbox": [2 * n, 3, 52, 53], "id": n} for n in (1, 2, 3, 1, 2)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "mitotic figure"}]}
    pictures = {f"images/{image['file_name']}": PNG for image in images}
    return [{"MIDOG.json": json.dumps(content).encode(), **pictures}]


def mitos14s() -> list[Files]:
    rows, frame = b"10,20,0.9\n30,12,1.0\n", {"A03/frames/x40/A03_00Aa.png": PNG}
    tables = {"A03/mitosis/A03_00Aa_mitosis.csv": rows, "A03/mitosis/A03_00Aa_not_mitosis.csv": b"5,6,0.2\n"}
    return [{**tables, **frame, "A04/frames/x40/A04_00Aa.png": PNG, "A04/mitosis/A04_00Aa_mitosis.csv": b""}]


def tupac16s() -> list[Files]:
    return [{"mitoses_ground_truth/01/02.csv": b"10,20\n30,12\n", "01/02.png": PNG, "02/01.png": PNG}]


def tables() -> list[Files]:
    fields = [
        ["a", "a.png", "1", "train", 0.25],
        ["b é", "b.png", "041", "val", 0.3],
        ["c", "c/c.png", "NA", "test", 0.25],
    ]
    points = [["a", 10, 20, 1], ["a", 30.5, 12, 0], ["c", 5, 5, 1]]
    names = table(("image", "path", "case", "split", "um_per_px"), *fields)
    places = table(("image", "x_px", "y_px", "label"), *points)
    return [{"fields.csv": names, "annotations.csv": places, **{name: PNG for name in ("a.png", "b.png", "c/c.png")}}]


def cut_folders() -> list[Files]:
    """The tables and patches of stage 1."""
    rows = []
    for number in range(8):
        split, label = ("train", "train", "train", "val")[number % 4], number // 4
        name = f"{split}/{('negative', 'mitosis')[label]}/{number}.png"
        rows.append([name, "a", "041", split, label, "random", 10.5, 20, *([16, 16] if label else ["", ""]), ""])
    patch = cv2.imencode(".png", picture(32, 32))[1].tobytes()
    run = {"data_root": "data", "arguments": {"patch_um_per_px": 0.25, "normalise_stain": True}}
    base = tables()[0]
    files = {
        "patches.csv": table(PATCHES, *rows),
        "run.json": json.dumps(run).encode(),
        **{row[0]: patch for row in rows},
    }
    return [files | {name: base[name] for name in ("fields.csv", "annotations.csv")}]


def difficulty_tables() -> list[Files]:
    rows = [(f"{number}.png", number % 2) for number in range(6)]
    return [
        {
            "memory.csv": table(MEMORY_COLUMNS, *[[*row, 3, 2, 1, 4, 2, 0.5, 0.25] for row in rows]),
            "hard.csv": table(
                HARD_COLUMNS, *[[*row, *(("hard", 1), ("clean", ""))[row[1]], 0.3, 0.5, 0.25] for row in rows]
            ),
            "checked.csv": table(CHECKED_COLUMNS, *[[*row, 1, 4, 3, 1] for row in rows if not row[1]]),
            "SCL.csv": table(SCL_COLUMNS, *[[*row, 1 + 2 * row[1]] for row in rows]),
        }
    ]


def scans() -> list[Files]:
    survey = {"stain": [[0.1, 0.2, 0.3], [0.1, 0.1, 0.1]], "padding_density": [0.2, 1.5], "lowest_score": -1.0}
    survey |= {"middle": [0.0] * 4, "spread": [1.0] * 4, "second_look": 0.5}
    progress = {"settings": {"views": 8}, "finished": False, "survey": survey, "tiles": 5, "found": [[1.5, 2.0, 0.5]]}
    return [
        {"scan.json": json.dumps(one).encode()} for one in (progress, progress | {"finished": True, "survey": None})
    ]


def checkpoints() -> list[Files]:
    torch.manual_seed(0)
    network = SearchNetwork(BACKBONE, 16)
    curve = {"threshold": [0.2, 0.5], "precision": [0.5, 0.8], "recall": [0.9, 0.4], "f1": [0.6, 0.5]}
    config = {"backbone": BACKBONE, "stride": 16, "patch_size": 32, "um_per_px": 0.25, "normalise_stain": True}
    config |= {"classes": ["negative", "mitosis"], "threshold": 0.3, "manifest_sha256": "ab", "temperature": 1.5}
    file = io.BytesIO()
    torch.save({"model": network.state_dict(), "config": config | {"offset": -1.0, "val_curve": curve}}, file)
    return [{"model.pt": file.getvalue(), "a.png": PNG}]


def backbones() -> list[Files]:
    file = io.BytesIO()
    torch.save(SearchNetwork(BACKBONE, 16).backbone.state_dict(), file)
    return [{"weights.pt": file.getvalue()}]


# How they are read.


def read_one(path: Path) -> None:
    """All that reads an image or slide; each reader may refuse it."""
    refused = []
    for read in (read_field, read_um_per_px, read_slide):
        try:
            pixels = read(path)
        except InputError as error:
            refused.append(str(error))
            assert "\n" not in str(error), f"more than one line: {error}"
        else:
            if read is read_field:
                assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.flags.writeable
    if refused:
        raise InputError(refused[0])


def read_slide(path: Path) -> None:
    with dasc.slides.open_slide(path) as slide:
        for level, (width, height) in enumerate(slide.levels):
            for x, y in ((0, 0), (width - 20, height - 20)):
                assert slide.read_region(level, x, y, 64, 48).shape == (48, 64, 3)
        if slide.width * slide.height <= SMALL_PX:
            for whole_px in (0, SMALL_PX):
                look_over(slide, 0.25, whole_px, 1)


def read_cut(folder: Path) -> None:
    train = read_patches(folder / "patches.csv")
    read_cut_fields(folder)
    read_pool(folder / "patches.csv", unknown_slides=False)
    load_patches([folder / patch for patch in train["patch"]], 1)


def run(script: str, *flags: object) -> None:
    """Run a script of the project; what it refuses in one line is an InputError here."""
    import pipeline

    done = pipeline.call(script, *flags, "--out", "results/out")
    if done.status:
        assert isinstance(done.status, int), done.status
        last = done.err.strip().splitlines()[-1]
        assert last.startswith("error: ") or "skipped" in done.err, done.err
        raise InputError(last)


def predict(folder: Path) -> None:
    flags = ["--images", "a.png", "--um_per_px", 0.25, "--model_path", "model.pt", "--views", 1, "--report", "False"]
    run("predict.py", *flags, "--threshold", "recall=0.5", "--device", "cpu")


def cut_table(folder: Path) -> None:
    run("pre/cut_patch_2.py", "--dataset", "table", "--data_root", ".", "--patch_size", 32, "--workers", 1)


def only(name: str) -> Callable[[Files], list[str]]:
    return lambda files: [name]


def ending(*suffixes: str) -> Callable[[Files], list[str]]:
    return lambda files: [name for name in files if name.endswith(suffixes)]


def dataset(name: str, val: str = "") -> Callable[[Path], None]:
    return lambda folder: read_dataset(name, folder, [val] if val else None, [] if val else None) and None


def tables_of_difficulty(folder: Path) -> None:
    refused = None
    for read in (
        lambda: read_memory(folder / "memory.csv"),
        lambda: read_hard(folder / "hard.csv", 3),
        lambda: read_checked(folder / "checked.csv"),
        lambda: read_scl(folder / "SCL.csv", 3),
        lambda: run(
            "clus_scl.py", *[x for name in ("memory", "hard", "checked") for x in (f"--{name}", f"{name}.csv")]
        ),
    ):
        try:
            read()
        except InputError as error:
            refused = error
    if refused:
        raise refused


def image(folder: Path) -> None:
    for path in find_images([folder]):
        read_one(path)


KINDS = {
    "MIDOG JSON": Kind(midogs, only("MIDOG.json"), change_json, dataset("midog", "002")),
    "MITOS14 CSV": Kind(mitos14s, ending(".csv"), change_text, dataset("mitos14", "A04")),
    "TUPAC16 CSV": Kind(tupac16s, ending(".csv"), change_text, dataset("tupac16", "02")),
    "table CSV": Kind(tables, ending(".csv"), change_text, dataset("table")),
    "table CSV, cut": Kind(tables, ending(".csv"), change_text, cut_table),
    "TIFF": Kind(tiffs, ending(".tif"), change_bytes, image),
    "slide": Kind(pyramids, ending(".tif"), change_bytes, image),
    "PNG": Kind(png_bases, ending(".png"), change_png, image),
    "JPEG": Kind(
        lambda: pictures("a.jpg", ("RGB", {}), ("L", {}), ("CMYK", {}), ("RGB", {"progressive": True})),
        ending(".jpg"),
        change_bytes,
        image,
    ),
    "BMP": Kind(
        lambda: pictures("a.bmp", ("RGB", {}), ("P", {}), ("L", {}), ("1", {})), ending(".bmp"), change_bytes, image
    ),
    "patches.csv": Kind(cut_folders, only("patches.csv"), change_text, read_cut),
    "patches": Kind(cut_folders, ending(".png"), change_png, read_cut),
    "fields.csv": Kind(cut_folders, ending("fields.csv", "annotations.csv"), change_text, read_cut),
    "run.json": Kind(cut_folders, only("run.json"), change_json, read_cut),
    "memory, hard, checked, SCL": Kind(difficulty_tables, ending(".csv"), change_text, tables_of_difficulty),
    "scan.json": Kind(
        scans,
        only("scan.json"),
        change_json,
        lambda folder: SavedScan(folder / "scan.json", {"views": 8}, True) and None,
    ),
    "model.pt": Kind(checkpoints, only("model.pt"), change_checkpoint, predict),
    "timm weights": Kind(
        backbones,
        only("weights.pt"),
        change_checkpoint,
        lambda folder: load_backbone_weights(SearchNetwork(BACKBONE, 16), folder / "weights.pt"),
    ),
}

# What the child must survive and tell: no kinds of input, but what inputs might do to it.
TRAPS = {
    "crash": lambda folder: os.abort(),
    "hang": lambda folder: time.sleep(600),
    "memory": lambda folder: np.ones(2 * MEMORY, np.uint8) and None,
    "outside": lambda folder: Path(folder).with_name("outside").mkdir(exist_ok=True),
    "inside": lambda folder: Path("results/a").mkdir(parents=True),
}


def make(kind: str, seed: int, number: int, bases: list[Files]) -> Files:
    """The input of this number."""
    rng = random.Random(f"{seed} {kind} {number}")
    files = dict(rng.choice(bases))
    name = rng.choice(KINDS[kind].changed(files))
    return files | {name: KINDS[kind].change(rng, files[name])}


# The child.


def work() -> None:
    """Read the inputs that standard input names, and answer in JSON: read, refused, or a finding's text."""
    import resource

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dasc.slides.IN_MEMORY = 10_000  # pyramids are read by region
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # decoders print
    size = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 if Path("/proc/self/statm").exists() else 8 << 30
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    wrote: list[str] = []
    watch_writing(wrote)
    for line in sys.stdin:
        kind, folder = json.loads(line)
        os.chdir(folder)
        wrote.clear()
        try:
            (TRAPS[kind] if kind in TRAPS else KINDS[kind].read)(Path(folder))
            answer = "read"
        except InputError as error:
            answer = f"refused: {error}"
        except BaseException:
            answer = traceback.format_exc()
        inside = Path(folder, "results").resolve()
        outside = [path for path in wrote if not Path(path).resolve().is_relative_to(inside)]
        if outside:
            answer = f"written outside the output folder: {outside}"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def watch_writing(wrote: list[str]) -> None:
    """Keep the path of whatever Python opens for writing, makes, moves or removes."""
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"}

    def keep(path, folder: int = -1) -> None:
        if isinstance(path, str | bytes | Path) and path not in (os.devnull, os.devnull.encode()):
            base = Path(f"/proc/self/fd/{folder}").readlink() if folder >= 0 else Path.cwd()
            wrote.append(str(base / os.fsdecode(path)))

    def hook(event: str, args: tuple) -> None:
        if event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            keep(args[0])
        elif event in changes:  # the last argument: the open folder that the path is relative to, or -1
            for path in args[: 2 if event in ("os.rename", "os.symlink", "os.link") else 1]:
                keep(path, args[-1] if isinstance(args[-1], int) else -1)

    sys.addaudithook(hook)


class Child:
    """The process that reads; started again when it is gone."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self.limit_s = limit_s
        self.process: subprocess.Popen | None = None

    def read(self, kind: str, folder: Path) -> str:
        if self.process is None:
            command = [sys.executable, str(Path(__file__)), "--work"]
            quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=quiet
            )
            self._ask("table CSV", folder, 300)  # so that its start does not count
        return self._ask(kind, folder, self.limit_s)

    def _ask(self, kind: str, folder: Path, limit_s: float) -> str:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([kind, str(folder)]) + "\n")
            self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            ready = selector.select(limit_s)
        line = self.process.stdout.readline() if ready else ""
        if line:
            return json.loads(line)
        status = self.end()
        if not ready:
            return f"no end after {limit_s} s"
        return f"the process ended: {signal.Signals(-status).name if status < 0 else status}"

    def end(self) -> int:
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)  # of itself, where its output has ended
        self.process.kill()
        status = self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None
        return status


def fuzz(seconds: float, seed: int, kinds: list[str], first: int = 0, keep: Path | None = None) -> tuple[dict, dict]:
    """Try inputs of every kind in turn, `seconds` in all.

    Returns: per kind how many were read, refused and found; per finding's last lines the inputs (kind, number, text).
    """
    global PNG
    PNG = cv2.imencode(".png", picture())[1].tobytes()
    bases = {kind: KINDS[kind].base() for kind in kinds}
    counts, findings = {kind: Counter() for kind in kinds}, {}
    spent, child = Counter(dict.fromkeys(kinds, 0.0)), Child()
    with tempfile.TemporaryDirectory(prefix="fuzz") as scratch:
        folder = Path(scratch, "input")
        for kind in kinds:
            for files in bases[kind]:
                lay(folder, files)
                answer = child.read(kind, folder)
                assert answer == "read", f"{kind}: the sound input is not read: {answer}"
        while sum(spent.values()) < seconds:
            kind = min(kinds, key=spent.__getitem__)
            number, start = first + counts[kind].total(), time.monotonic()
            files = make(kind, seed, number, bases[kind])
            lay(folder, files)
            answer = child.read(kind, folder)
            result = answer if answer == "read" else "refused" if answer.startswith("refused: ") else "found"
            counts[kind][result] += 1
            if result == "found":
                name = "\n".join(answer.strip().splitlines()[-4:])
                findings.setdefault(name, []).append((kind, number, answer))
                if keep and len(findings[name]) == 1:
                    lay(keep / f"{len(findings)} {kind} {number}", files)
                    (keep / f"{len(findings)} {kind} {number}.txt").write_text(answer)
            spent[kind] += time.monotonic() - start
        if child.process:
            child.end()
    return counts, findings


def lay(folder: Path, files: Files) -> None:
    """Make the folder anew with these files."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS), help="only this kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of every kind")
    parser.add_argument("--keep", type=Path, help="folder for the inputs of findings")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work()
        return 0
    counts, findings = fuzz(args.seconds, args.seed, [args.kind] if args.kind else list(KINDS), args.first, args.keep)
    for kind, count in counts.items():
        print(
            f"{kind}: {count.total()} tried, {count['read']} read, {count['refused']} refused, {count['found']} found"
        )
    for inputs in findings.values():
        kind, number, text = inputs[0]
        print(f"\n{len(inputs)} times, first: --kind {kind!r} --first {number} --seed {args.seed}\n{text.strip()}")
    print(f"\n{sum(count.total() for count in counts.values())} inputs, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
