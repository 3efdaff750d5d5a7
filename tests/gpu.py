"""Everything that needs a GPU, in one command of some minutes: `make gpu` (tests/README.md, "On a GPU").

The parts, in this order: checks against the CPU; a field of 7215 x 5412 px, a slide of a gigapixel, the steps of stages
2 and 8, each with what takes the time; then a training with the paper's epochs, judged on its test fields. A part that
fails is recorded with its error and the next one goes on. OUT, a JSON file, is written after every part; beside it
stands the same as an entry for docs/log.md. Exit status 1 where a part failed or had no time left.

    python tests/gpu.py --pack data/patches_ns --out data/packed.zip    # on a machine with the data
    python tests/gpu.py --patches data/packed.zip                       # on the one with the GPU
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from gpu_checks import CHECKS, NEEDS_CUDA, WEIGHTS, Case
from gpu_speed import NO_GPU, UM_PER_PX, name_kernels, time_field, time_slide, time_subclass_loss, time_training
from gpu_training import count_patches, prepare, row_of, run_stage, stages
from packed import pack
from pipeline import ROOT
from predict_speed import HEIGHT, NETWORKS, WIDTH, mosaic, random_detector
from tqdm import tqdm

from dasc.data.readers import MITOS14_UM_PER_PX
from dasc.errors import InputError
from dasc.files import write_json, write_text
from dasc.images.read import read_field
from dasc.model.checkpoint import load_detector
from dasc.run import pick_device, project_commit, run_script

EXAMPLE = ROOT / "docs/example/Case_13-01.jpg"
REAL = "mitos14/H03/frames/x40"  # of the shared data: its first field is the one that is checked
SHARED = (ROOT.parent / "shared/data", ROOT / "shared/data")
PARTS = ("checks", "speed", "training")
FULL = {  # the sizes that goals are set for
    "field": {"width": WIDTH, "height": HEIGHT},
    "rounds": 3,
    "slide": {"width": 32_000, "height": 32_000, "tissue_px": 16_384, "corner": 8192},
    "steps": {"patch_size": 80, "batch_size": 128, "stride": 16, "rounds": 12},
    "subclass": {"patch_size": 80, "batch_size": 1024, "stride": 16, "rounds": 6},
    "backbones": ["resnet18", "tf_efficientnet_lite0"],
    "crop_px": None,
}
QUICK = {  # as small as can be, to see that every part works
    "field": {"width": 300, "height": 300},
    "rounds": 1,
    "slide": {"width": 512, "height": 512, "tissue_px": 512, "corner": 0},
    "steps": {"patch_size": 32, "batch_size": 8, "stride": 16, "rounds": 1},
    "subclass": {"patch_size": 32, "batch_size": 16, "stride": 16, "rounds": 1},
    "backbones": ["mobilenetv3_small_100"],
    "crop_px": 600,
}


class Results:
    """What is known so far, kept on disk."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.path, self.start, self.minutes = Path(args.out), time.perf_counter(), args.minutes
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}: {NO_GPU}"
        self.content = {
            "command": " ".join(["python", "tests/gpu.py", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            "commit": args.commit or project_commit(),
            "device": name,
            "cpus": os.cpu_count(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
            "quick": args.quick,
            "seed": args.seed,
            "parts": {},
            "rows": [],
        }

    def left_s(self) -> float:
        return 60 * self.minutes - (time.perf_counter() - self.start)

    def run(self, name: str, work: Callable[[], dict]) -> bool:
        """Run a part and write what it gave; whether it went well."""
        tqdm.write(f"{name} ...")
        start, facts = time.perf_counter(), {"status": "ok"}
        try:
            if self.left_s() <= 0:
                raise subprocess.TimeoutExpired(name, 0)
            facts |= work()
        except subprocess.TimeoutExpired:
            facts = {"status": "out of time", "error": f"the {self.minutes:g} minutes of --minutes are over"}
        except (Exception, SystemExit) as error:  # whatever it is, the next part goes on
            facts = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
        self.content["parts"][name] = {**facts, "seconds": round(time.perf_counter() - start, 2)}
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the stages run in processes of their own
        tqdm.write(f"  {facts['status']}{': ' + facts['error'] if 'error' in facts else ''}")
        self.write()
        return facts["status"] == "ok"

    def leave(self, name: str, status: str) -> None:
        """Record a part that is not run."""
        self.content["parts"][name] = {"status": status}
        self.write()

    def write(self) -> None:
        self.content["seconds"] = round(time.perf_counter() - self.start, 1)
        write_json(self.path, self.content)
        write_text(self.path.with_suffix(".md"), entry(self.content))

    def unfinished(self) -> list[str]:
        return [name for name, part in self.content["parts"].items() if part["status"] not in ("ok", NO_GPU)]


def entry(content: dict) -> str:
    """The results as an entry for docs/log.md."""
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    lines = [f"## {content['date']} On a GPU", "", f"`{content['command']}`, commit `{content['commit']}`,"]
    lines += [f"seed {content['seed']}, {content['device']}, {content['cpus']} CPUs, {versions}."]
    lines += ["Sizes of --quick: no figure counts." if content["quick"] else "", "", "| part | result |", "|---|---|"]
    for name, part in content["parts"].items():
        facts = {key: value for key, value in part.items() if key not in ("profile", "arguments", "last")}
        words = ", ".join(f"{key} {json.dumps(value)}" for key, value in facts.items())
        lines.append(f"| {name} | {words.replace('|', '/').replace(chr(10), ' ')} |")
    return "\n".join(lines) + "\n"


def real_field(args: argparse.Namespace) -> tuple[Path, float]:
    """A field of real tissue and its um/px: of the shared data where it is there, else of docs/example."""
    folders = [Path(args.data)] if args.data else SHARED
    fields = [path for folder in folders for path in sorted((folder / REAL).glob("*_00Aa.*"))]
    return (fields[0], MITOS14_UM_PER_PX["H"]) if fields else (EXAMPLE, UM_PER_PX)


def main(args: argparse.Namespace) -> int:
    if args.pack:
        print(json.dumps(pack(Path(args.pack), Path(args.out), args.data_root, args.pack_mib), indent=1))
        return 0
    if args.patches and not Path(args.patches).is_file():
        raise InputError(f"{args.patches}: no such file; python tests/gpu.py --pack FOLDER --out FILE writes it")
    device, sizes = pick_device(args.device), QUICK if args.quick else FULL
    results = Results(args, device)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        results.run("patches", lambda: unpacked(results, args, home))
        if "checks" in args.parts:
            check(results, args, device, sizes, home)
        if "speed" in args.parts:
            measure(results, args, device, sizes, home)
        if "training" in args.parts:
            train(results, args, home)
    unfinished = results.unfinished()
    print(f"{args.out}: {len(results.content['parts'])} parts, {len(unfinished)} not finished: {', '.join(unfinished)}")
    return 1 if unfinished else 0


def unpacked(results: Results, args: argparse.Namespace, home: Path) -> dict:
    """The data of the checks and the trainings."""
    results.content["about"] = prepare(args, home)
    return results.content["about"] | {"splits": count_patches(home)}


def check(results: Results, args: argparse.Namespace, device: torch.device, sizes: dict, home: Path) -> None:
    """The checks against the CPU."""
    field, um_per_px = real_field(args)
    image = read_field(field)[: sizes["crop_px"], : sizes["crop_px"]].copy()
    results.content["field"] = field.name
    for name, work in CHECKS.items():
        if name in NEEDS_CUDA and device.type != "cuda":
            results.leave(f"check: {name}", NO_GPU)
        else:
            results.run(f"check: {name}", lambda work=work: work(Case(image, um_per_px, device, home)))


def measure(results: Results, args: argparse.Namespace, device: torch.device, sizes: dict, home: Path) -> None:
    """A field, a slide, the steps of the trainings."""
    image = mosaic(str(EXAMPLE), **sizes["field"])
    detectors = {WEIGHTS.name: load_detector(WEIGHTS, device)}
    for name in () if args.quick else NETWORKS:
        backbone, size, stride = name.split(":")
        detectors[name] = random_detector(backbone, int(size), int(stride), 3000, device)
    results.run("field", lambda: time_field(detectors, image, device, home, sizes["rounds"]))
    if device.type == "cuda":
        results.run("field: kernels, ms and calls", lambda: name_kernels(detectors[WEIGHTS.name], image, device))
    else:
        results.leave("field: kernels, ms and calls", NO_GPU)
    results.run("slide", lambda: time_slide(WEIGHTS, image, device, home, args.workers, **sizes["slide"]))
    results.run("steps", lambda: time_training(device, sizes["backbones"], **sizes["steps"]))
    results.run("subclass loss", lambda: time_subclass_loss(device, sizes["backbones"][0], **sizes["subclass"]))


def train(results: Results, args: argparse.Namespace, home: Path) -> None:
    """The stages one after another; without one, those after it are left out."""
    commands = stages(args, home, bool(args.patches))
    for name, (script, flags, out) in commands.items():
        if not results.run(name, lambda: run_stage(script, flags, out, results.left_s(), not args.quick)):  # noqa: B023
            for later in list(commands)[list(commands).index(name) + 1 :]:
                results.leave(later, f"left out: {name} is not done")
            return
        metrics = results.content["parts"][name].get("metrics")
        if metrics and args.patches and not args.quick:
            start = f"from {Path(args.init_weights).name}" if args.init_weights else "from random weights"
            facts = {name: results.content[name] for name in ("date", "commit", "seed")}
            epochs = f"{args.epochs} epochs" if args.epochs else "the paper's epochs"
            facts |= {"weights": f"{args.backbone}, {epochs}, {start}", "arm": name.split(",")[0]}
            facts["commit"], facts["note"] = str(facts["commit"])[:7], results.content["device"]
            results.content["rows"].append(row_of(metrics, results.content["about"], facts))
            results.write()


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/gpu.json", help="results; with --pack the file to pack into")
    parser.add_argument("--patches", default="", help="a file of --pack; empty: the synthetic sample")
    parser.add_argument("--data", default="", help="folder that holds mitos14; empty: the shared one, if any")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, one epoch: to see that it works")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is run")
    parser.add_argument("--minutes", type=float, default=8.0, help="after so many no further part begins")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--init_weights", default="", help="as of the scripts; empty: random weights")
    parser.add_argument("--epochs", type=int, default=0, help="of every training; 0: the paper's")
    parser.add_argument("--last_stage", type=int, default=8, help="2: the search network only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--commit", default="", help="where this is no git checkout")
    parser.add_argument(
        "--pack", default="", help="folder of patches (stage 1 or 3) to pack into --out; nothing is run"
    )
    parser.add_argument("--data_root", default="", help="of --pack: the dataset, if it lies elsewhere than at stage 1")
    parser.add_argument("--pack_mib", type=float, default=40.0, help="of --pack: largest size")
    args = parser.parse_args(words)
    if args.quick:
        args.epochs, args.backbone = args.epochs or 1, QUICK["backbones"][0]
    return args


if __name__ == "__main__":
    run_script(main, read_arguments())
