"""Store a checkpoint with its convolutions as float16, half the size: how the files in weights/ were made.

A network that has trained on every laboratory has none left to choose its threshold on. With --operating_point it gets
score alignment, calibration and threshold of siblings, each trained without one laboratory and judged on it: what
tests/benchmarks/lab_out.py writes. With --first_look it gets the first look of another model.pt, and looks at as many
candidates as that.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from dasc.judge.calibration import Calibration
from dasc.model.checkpoint import Detector, load_detector, read_checkpoint, save_detector, sources_of


def with_operating_point(detector: Detector, path: Path) -> Detector:
    """The detector with the alignment, calibration and threshold in a file."""
    point = json.loads(path.read_text(encoding="utf-8"))
    calibration = Calibration(point["temperature"], point["offset"], point["alignment"])
    return replace(detector, calibration=calibration, threshold=point["threshold"], val_curve=point["val_curve"])


def halved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with its convolutions as float16.

    Vectors (biases, BatchNorm's statistics) are small, and a variance can exceed float16's range.
    """
    return {name: value.half() if value.dim() > 1 else value for name, value in weights.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("weights/dasc_mitos.pt"))
    parser.add_argument("--operating_point", type=Path, help="operating_point.json of tests/benchmarks/lab_out.py")
    parser.add_argument("--first_look", type=Path, help="model.pt of NS/first_look.py")
    args = parser.parse_args()
    checkpoint, detector = read_checkpoint(args.model_path), load_detector(args.model_path, torch.device("cpu"))
    if args.operating_point:
        detector = with_operating_point(detector, args.operating_point)
    weights = {"model": checkpoint["model"]}
    if args.first_look:
        other = load_detector(args.first_look, torch.device("cpu"))
        detector = replace(detector, first_look=other.first_look, per_mm2=other.per_mm2)
    if detector.first_look is not None:
        weights["first_look"] = read_checkpoint(args.first_look or args.model_path)["first_look"]["model"]
    halves = {name: halved(each) for name, each in weights.items()}
    save_detector(args.out, detector, halves["model"], halves.get("first_look"), **sources_of(checkpoint["config"]))
    largest = max(
        float((value.float() - before).abs().max())
        for name, each in halves.items()
        for value, before in zip(each.values(), weights[name].values(), strict=True)
        if torch.is_floating_point(before)
    )
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB; weights moved by at most {largest:.1e}")
