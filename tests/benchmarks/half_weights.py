"""Store a checkpoint with its convolutions as float16, half the size: how weights/dasc_mitos.pt was made."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from dasc.network import read_checkpoint
from dasc.run import save_checkpoint

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("weights/dasc_mitos.pt"))
    args = parser.parse_args()
    checkpoint = read_checkpoint(args.model_path)
    # Vectors (biases, BatchNorm's statistics) are small, and a variance can exceed float16's range.
    model = {name: value.half() if value.dim() > 1 else value for name, value in checkpoint["model"].items()}
    save_checkpoint(args.out, {"model": model, "config": checkpoint["config"]})
    largest = max(
        float((value.float() - before).abs().max())
        for value, before in zip(model.values(), checkpoint["model"].values(), strict=True)
        if torch.is_floating_point(before)
    )
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB; weights moved by at most {largest:.1e}")
