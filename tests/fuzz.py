"""Broken inputs: valid files of every kind, changed at random, are read as the scripts read them.

    python tests/fuzz.py --seconds 600 --seed 1 --keep found

An input is read or refused by an InputError (a script: by one line and a status that is not 0). Anything else is a
finding: another exception, a crash of the process, a file written outside the output folder, or no end after LIMIT_S.
Reading happens in a child process with limited memory, which is started again after a crash. Every input is drawn from
the seed, its kind and its number alone, so that a finding can be made again: --kind KIND --first NUMBER.
"""

import argparse
import contextlib
import json
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
import sklearn.model_selection  # noqa: F401 older releases of scipy make a folder: before the child is watched
import torch
from fuzz_inputs import (
    BACKBONE,
    Files,
    backbones,
    change_bytes,
    change_checkpoint,
    change_json,
    change_png,
    change_text,
    checkpoints,
    cut_folders,
    difficulty_tables,
    foreign_annotations,
    geojsons,
    midogs,
    mitos14s,
    pictures,
    png_bases,
    pyramids,
    scans,
    tables,
    tiffs,
    tupac16s,
)

import dasc.images.slides
import dasc.report.plots  # here, since matplotlib makes folders of its own before the child is watched
from dasc.data.annotations import find_annotations, read_annotations
from dasc.data.cut import read_cut_fields
from dasc.data.datasets import read_dataset
from dasc.data.patches import load_patches
from dasc.data.shapes import areas_of, places
from dasc.data.tables import read_checked, read_hard, read_memory, read_patches, read_scl
from dasc.detect.image import look_over
from dasc.detect.resume import SavedScan
from dasc.errors import InputError
from dasc.images.find import find_images
from dasc.images.read import read_field
from dasc.images.resolution import read_um_per_px
from dasc.model.network import CamNetwork
from dasc.model.start import load_initial_weights
from dasc.weak.pool import read_pool

LIMIT_S = 30  # for one input
MEMORY = 4 << 30  # bytes of addresses the child may take beside those it starts with
SMALL_PX = 4_000_000  # larger images are not looked over: sound ones of that size may take longer than LIMIT_S


class Kind(NamedTuple):
    """base: sound inputs, files by name. change: how the file named `changed` is broken. read: how it is read."""

    base: Callable[[], list[Files]]
    changed: Callable[[Files], list[str]]
    change: Callable[[random.Random, bytes], bytes]
    read: Callable[[Path], None]


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
    with dasc.images.slides.open_slide(path) as slide:
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
        lambda: read_hard(folder / "hard.csv"),
        lambda: read_checked(folder / "checked.csv"),
        lambda: read_scl(folder / "SCL.csv"),
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


def annotations(folder: Path) -> None:
    """Whatever is done with the objects of an annotation file."""
    for path in find_annotations([folder]):
        for source in read_annotations(path):
            for shape in source.shapes:
                geometry = source.in_px(shape, 0.25, (3, 4))
                assert np.isfinite(places(geometry)).all()
                area = areas_of(geometry)
                assert area is None or area.area > 0


def image(folder: Path) -> None:
    for path in find_images([folder]):
        read_one(path)


KINDS = {
    "MIDOG JSON": Kind(midogs, only("MIDOG.json"), change_json, dataset("midog", "002")),
    "QuPath GeoJSON": Kind(geojsons, only("a.geojson"), change_json, annotations),
    "annotations, XML and tables": Kind(foreign_annotations, only("a.txt"), change_text, annotations),
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
    "cut.json": Kind(cut_folders, only("cut.json"), change_json, read_cut),
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
        lambda folder: load_initial_weights(CamNetwork(BACKBONE, 16), folder / "weights.pt"),
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
    dasc.images.slides.IN_MEMORY = 10_000  # pyramids are read by region
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

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_) -> None:
        if self.process:
            self.end()

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


def fuzz(
    child: Child, seconds: float, seed: int, kinds: list[str], first: int = 0, keep: Path | None = None
) -> tuple[dict, dict]:
    """Have the child try inputs of every kind in turn, `seconds` in all.

    Returns: per kind how many were read, refused and found; per finding's last lines the inputs (kind, number, text).
    """
    bases = {kind: KINDS[kind].base() for kind in kinds}
    counts, findings = {kind: Counter() for kind in kinds}, {}
    spent = Counter(dict.fromkeys(kinds, 0.0))
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
    with Child() as child:
        kinds = [args.kind] if args.kind else list(KINDS)
        counts, findings = fuzz(child, args.seconds, args.seed, kinds, args.first, args.keep)
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
