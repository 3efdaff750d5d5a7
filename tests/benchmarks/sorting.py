"""What label_noise.py and difficulty.py share: real patches, stages 4 and 5 on them, a plain network beside them."""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from dasc.model.augment import to_float
from dasc.model.network import CamNetwork
from dasc.model.start import load_initial_weights
from dasc.model.views import weak_view

BATCH_SIZE = 64


def parser(doc: str, out: str) -> argparse.ArgumentParser:
    """Flags of both benchmarks."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", required=True, help="MITOS-ATYPIA-14")
    parser.add_argument("--val", default="H03")
    parser.add_argument("--test", default="H05")
    parser.add_argument("--out", default=out)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--per_origin", type=int, default=250, help="mitoses, look-alikes and random nuclei, each")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--stride", type=int, default=32)
    parser.add_argument("--init_weights", default="data/lite0.pt", help="see lite0_weights.py")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--epochs", type=int, default=8)
    return parser


def run(script: str, *flags: object) -> float:
    """Run one script; the seconds it took."""
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / script), *map(str, flags)], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - began


def cut(args: argparse.Namespace) -> Path:
    """Patches of all annotated and of random nuclei, 48 px that show 16 um, no shifted copies; their folder."""
    folder = Path(args.out) / "patches"
    if not folder.exists():
        data = ["--dataset", "mitos14", "--data_root", args.data_root, "--val", args.val, "--test", args.test]
        size = ["--patch_size", 48, "--patch_um_per_px", 0.3333, "--shifts", 0]
        run("pre/cut_patch_2.py", *data, *size, "--out", folder)
    return folder


def drawn(args: argparse.Namespace, folder: Path, rng: np.random.Generator) -> pd.DataFrame:
    """Rows of patches.csv, every one in training: as many annotated mitoses, look-alikes and random nuclei."""
    table = pd.read_csv(folder / "patches.csv", dtype={"image": str, "case": str})
    origins = [np.flatnonzero(table["origin"] == origin) for origin in ("annotated", "hard_negative", "random")]
    rows = np.sort(np.concatenate([rng.choice(rows, args.per_origin, replace=False) for rows in origins]))
    return table.iloc[rows].reset_index(drop=True).assign(split="train")


def train(args, patches, labels, rows, seed: int, held_out=()) -> tuple[np.ndarray, np.ndarray]:
    """A plain network on `rows`: p(label) of every row per epoch (epochs, rows), and p (held out, 2) at the end."""
    torch.manual_seed(seed)
    network = CamNetwork(args.backbone, args.stride)
    load_initial_weights(network, Path(args.init_weights))
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    rows, steps = torch.as_tensor(rows), -(-len(rows) // BATCH_SIZE)
    weights = len(rows) / (2 * labels[rows].bincount(minlength=2))
    history = np.zeros((args.epochs, len(labels)))
    for epoch in range(args.epochs):
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        for step, batch in enumerate(rows[torch.randperm(len(rows), generator=generator)].tensor_split(steps)):
            optimizer.param_groups[0]["lr"] = args.lr * min(1.0, epoch + (step + 1) / steps)
            logits = network(weak_view(patches[batch], generator))
            losses = F.cross_entropy(logits, labels[batch], reduction="none")
            loss = (losses * weights[labels[batch]]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history[epoch, batch] = (-losses.detach()).exp()
    network.eval()
    with torch.inference_mode():
        logits = [
            network(to_float(patches[part])).softmax(dim=1)
            for part in torch.as_tensor(held_out, dtype=torch.long).split(256)
        ]
    return history, torch.cat([torch.empty(0, 2), *logits]).numpy()


def stages(
    args, manifest: Path, out: Path, seed: int, *flags: object, noisy_share: object
) -> tuple[pd.DataFrame, float]:
    """memory.csv with the verdicts of stages 4 and 5, and their seconds."""
    common = ["--manifest", manifest, "--out", out, "--seed", seed]
    network = ["--backbone", args.backbone, "--stride", args.stride, "--init_weights", args.init_weights]
    schedule = ["--epochs", args.epochs, "--warmup_share", 1 / args.epochs, "--count_after_share", 2 / args.epochs]
    schedule += ["--batch_size", BATCH_SIZE, "--lr", args.lr]
    seconds = run("DMU/main.py", *common, *network, *schedule, *flags)
    seconds += run("clus_hard.py", *common, "--memory", out / "memory.csv", "--noisy_share", noisy_share)
    memory = pd.read_csv(out / "memory.csv")
    return memory.assign(verdict=pd.read_csv(out / "hard.csv")["verdict"]), seconds
