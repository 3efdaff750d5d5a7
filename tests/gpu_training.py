"""Train with the paper's epochs on packed patches and judge on their test fields, a command per stage."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from packed import unpack
from pipeline import ROOT, succeed

from dasc.data.tables import read_patches

SAMPLE = {"--size_px": 700, "--mitoses": 4, "--imposters": 6}  # where no patches are given
TABLES = {  # what a stage leaves, of which the log or a count is taken over
    "NS/sigle.py": "log.csv",
    "DMU/main.py": "log.csv",
    "DMU/hard_main.py": "log.csv",
    "DMU/hard_scl_main.py": "log.csv",
}


def prepare(args: argparse.Namespace, folder: Path) -> dict:
    """patches/ and fields/ in a folder: those of --patches, or of the synthetic sample; what is known of them."""
    if args.patches:
        return unpack(Path(args.patches), folder)
    size = [word for pair in SAMPLE.items() for word in pair]
    succeed("pre/make_sample.py", "--out", folder / "fields", *size)
    succeed("pre/cut_patch_2.py", "--data_root", folder / "fields", "--out", folder / "patches", "--device", "cpu")
    return {"source": "the synthetic sample, since no --patches were given"}


def stages(args: argparse.Namespace, home: Path, packed: bool) -> dict[str, tuple[str, list[object], Path]]:
    """The commands by their names: script, flags, folder that it writes. Every setting but these is the default."""
    network = ["--backbone", args.backbone, "--device", args.device, "--seed", args.seed, "--workers", args.workers]
    network += ["--init_weights", args.init_weights] if args.init_weights else ["--pretrained", "False"]
    epochs = ["--epochs", args.epochs] if args.epochs else []  # else the paper's
    manifest, fields = ["--manifest", home / "patches/patches.csv"], ["--data_root", home / "fields"]
    out = {name: home / "results" / name for name in ("NS", "DMU", "DMU_hard", "DMU_scl")}
    memory, hard = ["--memory", out["DMU"] / "memory.csv"], ["--hard", out["DMU"] / "hard.csv"]
    checked, scl = ["--checked", out["DMU_hard"] / "checked.csv"], ["--scl", out["DMU_hard"] / "SCL.csv"]
    judge = ["--dataset", "table" if packed else "sample", *fields, "--overlays", "False", "--report", "False"]
    judge += ["--device", args.device, "--workers", args.workers, "--seed", args.seed]
    commands = {
        "stage 2": ("NS/sigle.py", [*network, *epochs, *manifest, *fields], out["NS"]),
        "stage 2, test fields": ("predict.py", [*judge, "--model_path", out["NS"] / "model.pt"], out["NS"] / "test"),
        "stage 4": ("DMU/main.py", [*network, *epochs, *manifest], out["DMU"]),
        "stage 5": ("clus_hard.py", [*memory, *manifest], out["DMU"]),
        "stage 6": ("DMU/hard_main.py", [*network, *epochs, *manifest, *hard], out["DMU_hard"]),
        "stage 7": ("clus_scl.py", [*memory, *hard, *checked], out["DMU_hard"]),
        "stage 8": ("DMU/hard_scl_main.py", [*network, *epochs, *manifest, *fields, *scl], out["DMU_scl"]),
    }
    test = out["DMU_scl"] / "test"
    commands["stage 8, test fields"] = ("predict.py", [*judge, "--model_path", out["DMU_scl"] / "model.pt"], test)
    return {name: one for name, one in commands.items() if int(name.split(",")[0].split()[1]) <= args.last_stage}


def run_stage(script: str, flags: list[object], out: Path, left_s: float, apart: bool) -> dict:
    """Run one command; its seconds, and what it says of itself.

    left_s: seconds after which it is stopped (TimeoutExpired). apart: in a process of its own, which alone can be.
    """
    flags, start = [*flags, "--out", out], time.perf_counter()
    if apart:
        command = [sys.executable, ROOT / script, *flags]
        done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, timeout=left_s, check=False)
        if done.returncode:
            raise RuntimeError(f"{script}: exit status {done.returncode}; its error stands above")
    else:
        succeed(script, *flags)
    facts: dict = {"command_s": round(time.perf_counter() - start, 1)}
    if (out / "metrics.json").is_file() and script == "predict.py":
        return facts | {"metrics": json.loads((out / "metrics.json").read_text(encoding="utf-8"))}
    if script in TABLES:
        log = pd.read_csv(out / TABLES[script])
        facts |= {"epochs": len(log), "last": log.iloc[-1].to_dict()}
        run = json.loads((out / "run.json").read_text(encoding="utf-8"))
        facts["arguments"] = run["arguments"]
    return facts


def row_of(metrics: dict, about: dict, facts: dict) -> dict:
    """A row of docs/results.csv; facts: its columns date, commit, weights, arm, seed and note."""
    cases = ", ".join(about["test_cases"])
    names = {"precision": "precision", "recall": "recall", "f1": "f1", "f1_low": "f1_low", "f1_high": "f1_high"}
    names |= {"ap": "average_precision", "oracle_f1": "oracle_f1"}
    counts = {name: metrics[name] for name in ("tp", "fp", "fn")}
    scores = {name: round(metrics[key], 3) for name, key in names.items()}
    return {**facts, "set": f"{about['source']} {cases}", **counts, **scores}


def count_patches(home: Path) -> dict[str, int]:
    """Patches per split."""
    return read_patches(home / "patches/patches.csv")["split"].value_counts().to_dict()
