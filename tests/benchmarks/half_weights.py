"""Store a checkpoint with its convolutions as float16, half the size: how weights/dasc_mitos.pt was made.

A network that has trained on every slide has none left to choose its threshold on. With --sibling it gets
background, calibration and threshold of a model that was trained the same way without some cases, judged on those.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from dasc.data.tables import read_cut_fields
from dasc.detect.val import threshold_on_val
from dasc.model.checkpoint import load_network, read_checkpoint, save_checkpoint
from dasc.run import true_or_false


def decided_on(model_path: Path, cut_folder: Path, cases: list[str], **options: Any) -> dict:
    """What stage 2 takes from the val fields, from all fields of these cases; options of `threshold_on_val`."""
    network, config = load_network(model_path, torch.device("cpu"))
    data_root, fields, annotations = read_cut_fields(cut_folder)
    fields["split"] = fields["case"].isin(cases).map({True: "val", False: "train"})
    stage_2 = json.loads(model_path.with_name("run.json").read_text(encoding="utf-8"))["arguments"]
    settings = {name: stage_2[name] for name in ("batch_size", "per_mm2", "match_um", "views")}
    facts, curve = threshold_on_val(network, config, data_root, fields, annotations, **settings, **options)
    print(f"{model_path} on {' '.join(cases)}: F1 {curve['f1'].max():.3f} at best; threshold {facts['threshold']:.3f}")
    return facts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("weights/dasc_mitos.pt"))
    parser.add_argument("--sibling", type=Path, help="model whose calibration and threshold the file gets")
    parser.add_argument("--patches", type=Path, default=Path("data/patches"), help="stage 1's folder of the sibling")
    parser.add_argument("--cases", nargs="+", default=["H03", "H05"], help="that the sibling has not trained on")
    parser.add_argument("--background", type=true_or_false, default=True, help="move images to the sibling's")
    args = parser.parse_args()
    checkpoint = read_checkpoint(args.model_path)
    if args.sibling:
        reliability_path = args.sibling.with_name("sibling_reliability.png")
        checkpoint["config"].pop("background", None)
        options = {"reliability_path": reliability_path, "use_background": args.background}
        checkpoint["config"] |= decided_on(args.sibling, args.patches, args.cases, **options)
    # Vectors (biases, BatchNorm's statistics) are small, and a variance can exceed float16's range.
    model = {name: value.half() if value.dim() > 1 else value for name, value in checkpoint["model"].items()}
    save_checkpoint(args.out, {"model": model, "config": checkpoint["config"]})
    largest = max(
        float((value.float() - before).abs().max())
        for value, before in zip(model.values(), checkpoint["model"].values(), strict=True)
        if torch.is_floating_point(before)
    )
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB; weights moved by at most {largest:.1e}")
