"""What mining a weakly labelled pool is worth on MITOS-ATYPIA-14, when few, some and all mitoses are annotated.

The pool are the candidate nuclei of the training slides that lie away from every mitosis, their labels hidden. Runs
the scripts as a user would (stage 1, split_patches, weak model, mining, strong model, predict) per share of the
mitoses, seed and arm; none is the weak model itself. A finished run is a line of OUT/runs.csv and is not run again, so
that the same command goes on where it was stopped. Then writes weak_mining.png and summary.csv, per share and arm: F1
of the seeds, pooled F1 with a 95 % bootstrap over fields, the difference from random, the same fields drawn for both.
Several processes may share OUT, each with --seeds of its own, once OUT/pool is there.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from dasc.judge.metrics import counts_to_scores

ARMS = ("none", "random", "l2", "cosine", "searched")
REPEATS = 2000  # of the bootstrap


def run(result: Path, script: str, *flags: object) -> None:
    """Run one script unless its result is there."""
    if not result.exists():
        command = [sys.executable, str(ROOT / script), *map(str, flags)]
        print(" ".join(command), flush=True)
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            sys.exit(f"{script} failed:\n{done.stderr[-2000:]}")


def cut_pool(args: argparse.Namespace, home: Path) -> Path:
    """All candidates of the training slides away from every mitosis; the manifest, without labels."""
    held = {args.val, args.test}
    slides = sorted(path.name for path in Path(args.data_root).iterdir() if path.is_dir() and path.name not in held)
    everything = ["--test", ",".join(slides), "--random_per_field", 1_000_000, "--hard_negatives", False]
    data = ["--dataset", "mitos14", "--data_root", args.data_root, "--val", args.val, "--patch_size", args.patch_size]
    run(home / "pool/patches.csv", "pre/cut_patch_2.py", *data, *everything, "--out", home / "pool")
    pool = home / "pool/pool.csv"
    if not pool.exists():
        table = pd.read_csv(home / "pool/patches.csv", dtype={"image": str, "case": str})
        hidden = table[(table["split"] == "test") & (table["origin"] == "random")]
        hidden[["patch", "image", "case", "x_px", "y_px"]].to_csv(pool, index=False)
    return pool


def train(args: argparse.Namespace, patches: Path, out: Path, seed: int) -> int:
    """Train on a manifest for about --visits patches, and judge on the test slide; the epochs."""
    epochs = max(2, round(args.visits / (pd.read_csv(patches)["split"] == "train").sum()))
    network = [
        "--backbone",
        args.backbone,
        "--init_weights",
        args.init_weights,
        "--stride",
        args.stride,
        "--lr",
        args.lr,
    ]
    scan = ["--per_mm2", args.per_mm2, "--views", args.views]
    common = ["--manifest", patches, "--out", out, "--epochs", epochs, "--seed", seed, "--workers", 1]
    run(out / "model.pt", "NS/sigle.py", *network, *common, *scan)
    data = ["--dataset", "mitos14", "--data_root", args.data_root, "--val", args.val, "--test", args.test]
    judge = [*data, "--model_path", out / "model.pt", "--out", out / "test", "--overlays", False, "--report", False]
    run(out / "test/metrics.json", "predict.py", *judge, *scan)
    return epochs


def one_run(args: argparse.Namespace, home: Path, pool: Path, share: float, seed: int, arm: str) -> dict:
    """One share, seed and arm: its row of runs.csv."""
    whole, weak = home / f"patches_{seed}", home / f"{share:g}_{seed}"
    data = ["--dataset", "mitos14", "--data_root", args.data_root, "--val", args.val, "--test", args.test]
    cut = [*data, "--patch_size", args.patch_size, "--hard_negatives", False, "--seed", seed, "--out", whole]
    run(whole / "patches.csv", "pre/cut_patch_2.py", *cut)
    split = ["--labelled", whole / "patches.csv", "--train_share", share, "--share_of", "positives", "--seed", seed]
    patches = weak / "patches/patches.csv"
    run(patches, "pre/split_patches.py", *split, "--out", patches.parent)
    out, facts = weak / arm, {"false_positives": 0, "mined": 0}
    if arm != "none":
        mined = weak / f"patches_{arm}"
        mine = ["--manifest", patches, "--model_path", weak / "none/model.pt", "--pool", pool, "--out", mined]
        mine += [
            "--query",
            arm,
            "--k",
            args.k,
            "--fp_above",
            args.fp_above,
            "--features",
            weak / "features",
            "--seed",
            seed,
        ]
        run(mined / "patches.csv", "NS/weak_mining.py", *mine)
        facts |= {name: json.loads((mined / "run.json").read_text())[name] for name in facts}
        patches = mined / "patches.csv"
    epochs = train(args, patches, out, seed)
    table = pd.read_csv(patches)
    table = table[table["split"] == "train"]
    facts |= {"train_mitoses": int((table["label"].eq(1) & table["origin"].eq("annotated")).sum())}
    facts |= {"train_negatives": int(table["label"].eq(0).sum()), "epochs": epochs}
    metrics = json.loads((out / "test/metrics.json").read_text())
    del metrics["model_sha256"]  # of this run, and its folder says it
    if arm != "none":
        shutil.rmtree(patches.parent)  # thousands of small files
    return {"share": share, "seed": seed, "arm": arm, **facts, **metrics}


def summarise(home: Path, runs: pd.DataFrame) -> pd.DataFrame:
    """Per share and arm: F1 of the seeds, of their pooled counts, and the difference from random, with intervals."""
    rows = []
    for share, of_share in runs.groupby("share"):
        counts = {}
        for arm, of_arm in of_share.groupby("arm"):
            fields = [
                pd.read_csv(home / f"{share:g}_{seed}" / arm / "test/metrics_per_field.csv") for seed in of_arm["seed"]
            ]
            counts[arm] = pd.concat(fields).groupby("image")[["tp", "fp", "fn"]].sum().sort_index()
        size = len(next(iter(counts.values())))
        drawn = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=REPEATS)
        f1 = {arm: counts_to_scores(*(drawn @ table.to_numpy()).T)[2] for arm, table in counts.items()}
        for arm in (arm for arm in ARMS if arm in counts):
            of_arm = of_share[of_share["arm"] == arm]
            low, high = np.quantile(f1[arm], [0.025, 0.975])
            row = {
                "share": share,
                "arm": arm,
                "train_mitoses": of_arm["train_mitoses"].mean(),
                "mined": of_arm["mined"].mean(),
            }
            row |= {"seeds": " ".join(f"{one:.3f}" for one in of_arm.sort_values("seed")["f1"])}
            row |= {"f1": float(counts_to_scores(*counts[arm].sum())[2]), "f1_low": low, "f1_high": high}
            if "random" in f1 and set(of_arm["seed"]) == set(of_share.loc[of_share["arm"] == "random", "seed"]):
                row["from_random"] = row["f1"] - float(counts_to_scores(*counts["random"].sum())[2])
                row["from_random_low"], row["from_random_high"] = np.quantile(f1[arm] - f1["random"], [0.025, 0.975])
            rows.append(row)
    return pd.DataFrame(rows)


def draw(path: Path, summary: pd.DataFrame, runs: pd.DataFrame) -> None:
    """Pooled F1 with its interval per arm and share, and the seeds as dots."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    shares = sorted(summary["share"].unique())
    for index, arm in enumerate(arm for arm in ARMS if arm in set(summary["arm"])):
        mine = summary[summary["arm"] == arm]
        places = np.array([shares.index(share) for share in mine["share"]]) + 0.13 * (index - 2)
        bars = np.abs(mine[["f1_low", "f1_high"]].to_numpy().T - mine["f1"].to_numpy())
        axis.errorbar(places, mine["f1"], bars, fmt="o", capsize=3, color=f"C{index}", label=arm)
        dots = runs[runs["arm"] == arm]
        at = [shares.index(share) + 0.13 * (index - 2) + 0.04 for share in dots["share"]]
        axis.plot(at, dots["f1"], ".", color=f"C{index}", alpha=0.5, markersize=5)
    axis.set_xticks(range(len(shares)), [f"{100 * share:g} %" for share in shares])
    axis.set(xlabel="share of the training mitoses", ylabel="F1 on the test slide")
    axis.grid(axis="y", alpha=0.3)
    figure.legend(title="mined", ncols=len(ARMS), fontsize=8, loc="outside upper center")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", required=True, help="MITOS-ATYPIA-14")
    parser.add_argument("--val", default="H03")
    parser.add_argument("--test", default="H05")
    parser.add_argument("--out", default="results/weak_mining")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3, 1.0], help="of the training mitoses")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--k", type=int, default=20, help="pool patches per false positive")
    parser.add_argument("--fp_above", type=float, default=0.1, help="probability of a false positive on val")
    parser.add_argument("--visits", type=int, default=15_000, help="patches seen in one training")
    parser.add_argument("--per_mm2", type=float, default=1800, help="candidates per mm2 in the val and test fields")
    parser.add_argument(
        "--views", type=int, default=8, help="views of each; fewer of both: faster, lower for every arm"
    )
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--init_weights", default="data/lite0.pt", help="see lite0_weights.py")
    parser.add_argument("--patch_size", type=int, default=64)
    parser.add_argument("--stride", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    args = parser.parse_args()
    home = Path(args.out)
    home.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(args).items() if name not in ("seeds", "shares", "arms", "out")}
    note = home / "settings.json"
    if note.is_file() and json.loads(note.read_text()) != settings:
        sys.exit(f"{note}: this folder was begun with other settings; name another --out")
    note.write_text(json.dumps(settings))
    pool = cut_pool(args, home)
    runs = home / "runs.csv"
    # The weak model of a share and seed is what every other arm of it starts from.
    wanted = [(share, seed, arm) for seed in args.seeds for share in args.shares for arm in ("none", *args.arms)]
    for share, seed, arm in dict.fromkeys(wanted):
        finished = pd.read_csv(runs) if runs.is_file() else pd.DataFrame(columns=["share", "seed", "arm"])
        if (finished[["share", "seed", "arm"]] == [share, seed, arm]).all(axis=1).any():
            continue
        row = pd.DataFrame([one_run(args, home, pool, share, seed, arm)])
        row.to_csv(runs, mode="a", header=not runs.is_file(), index=False)
        print(
            row[["share", "seed", "arm", "train_mitoses", "mined", "epochs", "tp", "fp", "fn", "f1"]].to_string(),
            flush=True,
        )
    finished = pd.read_csv(runs)
    summary = summarise(home, finished)
    summary.round(3).to_csv(home / "summary.csv", index=False)
    draw(home / "weak_mining.png", summary, finished)
    print(summary.round(3).to_string(index=False))
