"""Seconds to the first step of stage 2's training and its memory: every patch read from its file, or mapped.

Writes a folder of random patches first and packs it, as stage 1 does. Then a process of its own does what NS/sigle.py
does up to its first step, but for the network; two at once do the same. Memory: at the first step, and after the draws
of one epoch. Private: what no other process shares; shared: pages of files, patches.npy and libraries among them, which
the system takes back where it needs the memory. Cold: patches.npy is not in the page cache.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import cv2
import numpy as np
import pandas as pd
import torch

from dasc.data.cut import Cut, read_cut, write_cut
from dasc.data.pack import PACK, open_patches, write_pack
from dasc.data.patches import load_patches, write_patch
from dasc.data.tables import LABELS, PATCHES, read_patches, write_table
from dasc.model import loop
from dasc.model.transfer import gather

SIZE = 80  # px
DISTINCT = 2000  # patches that are drawn and encoded; the others are copies of their files
GIB = 2**30
CPU = torch.device("cpu")


def make(folder: Path, n: int) -> None:
    """A folder of n patches of blurred noise, all in the training split; every DISTINCT-th is the same."""
    rng = np.random.default_rng(0)
    noise = cv2.GaussianBlur(rng.integers(0, 256, (2048, 2048, 3), dtype=np.uint8), (0, 0), 2)
    noise = cv2.normalize(noise, None, 60, 250, cv2.NORM_MINMAX)
    rows = []
    for number in range(n):
        label, name = number % 2, f"train/{LABELS[number % 2]}/field_{number:07d}_random.png"
        rows.append(
            (name, f"{number // 500}", f"{number // 500}", "train", label, "random", 0, 0, np.nan, np.nan, np.nan)
        )
    for label in LABELS.values():
        (folder / "train" / label).mkdir(parents=True)

    for number, (name, *_) in enumerate(rows):
        if number < DISTINCT:
            y, x = rng.integers(0, 2048 - SIZE, 2)
            write_patch(folder / name, noise[y : y + SIZE, x : x + SIZE].transpose(2, 0, 1))
        else:
            shutil.copyfile(folder / rows[number % DISTINCT][0], folder / name)
    write_table(folder / "patches.csv", pd.DataFrame(rows, columns=list(PATCHES)), PATCHES)
    write_cut(folder, Cut(SIZE, 0.25, True, None))


def memory() -> dict[str, float]:
    """Memory of this process now, in GiB: what is its own, and pages of files."""
    words = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    kib = {name: int(words[name].split()[0]) for name in ("RssAnon", "RssFile", "VmHWM")}
    return {
        "private": kib["RssAnon"] * 1024 / GIB,
        "shared": kib["RssFile"] * 1024 / GIB,
        "peak": kib["VmHWM"] * 1024 / GIB,
    }


def first_step(folder: Path, mapped: bool) -> dict[str, float]:
    """What NS/sigle.py does up to its first step, without the network."""
    start, cpu = time.perf_counter(), time.process_time()
    table = read_patches(folder / "patches.csv")
    names, size = table["patch"].tolist(), read_cut(folder).patch_size
    read = time.perf_counter()
    if mapped:
        patches = open_patches(folder, names, 2, size)
    else:
        patches = load_patches([folder / name for name in names], 2, size)
    labels = torch.tensor(table["label"].to_numpy())
    order = loop.batches(loop.balanced_order(labels, loop.epoch_generator(0, 0)), 128)
    total = int(gather([patches], order[0], CPU)[0].sum())
    found = {"table_s": read - start, "first_step_s": time.perf_counter() - start}
    found["first_step_cpu_s"] = time.process_time() - cpu
    found |= {f"{name}_first": value for name, value in memory().items()}
    for batch in order[1:]:
        total += int(gather([patches], batch, CPU)[0].sum())
    found |= {"epoch_s": time.perf_counter() - start - found["first_step_s"], **memory(), "sum": total}
    return found


def forget(folder: Path) -> None:
    """Take the pack out of the page cache, as on a machine that has just started."""
    with (folder / PACK).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(folder: Path, mapped: bool, processes: int) -> list[dict[str, float]]:
    command = [sys.executable, __file__, "--folder", str(folder), "--child", "mapped" if mapped else "files"]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the patches are written, and deleted at the end"
    )
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--child", choices=["mapped", "files"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(first_step(args.folder, args.child == "mapped")))
        sys.exit()
    start = time.perf_counter()
    make(args.folder, args.n)
    made = time.perf_counter()
    try:
        write_pack(args.folder, read_patches(args.folder / "patches.csv")["patch"].tolist(), 2)
        png = sum(path.stat().st_size for path in args.folder.rglob("*.png"))
        print(
            f"{args.n} patches of {SIZE} px, written in {made - start:.0f} s ({png / GIB:.2f} GiB), packed in "
            f"{time.perf_counter() - made:.0f} s ({(args.folder / PACK).stat().st_size / GIB:.2f} GiB)",
            flush=True,
        )
        for mapped, processes, cold in ((False, 1, 0), (True, 1, 0), (True, 1, 1), (False, 2, 0), (True, 2, 0)):
            if cold:
                forget(args.folder)
                start = time.perf_counter()
                with (args.folder / PACK).open("rb") as file:
                    while file.read(1 << 20):
                        pass
                print(f"cold, read from its first byte to its last: {time.perf_counter() - start:.1f} s")
                forget(args.folder)
            for found in run(args.folder, mapped, processes):
                words = ", ".join(f"{name} {value:.2f}" for name, value in found.items())
                print(f"{'mapped' if mapped else 'files'}{' cold' * cold}, {processes} at once: {words}", flush=True)
    finally:
        shutil.rmtree(args.folder)
