"""Store a checkpoint with its convolutions as float16, half the size: how weights/dasc_mitos.pt was made.

A network that has trained on every slide has none left to choose its threshold on. With --sibling it gets score
alignment, calibration and threshold of a model that was trained the same way without some cases, judged on those.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from dasc.data.cut import ValFields, read_cut_fields
from dasc.detect.val import fit_to_val
from dasc.flags import true_or_false
from dasc.model.checkpoint import Detector, load_detector, read_checkpoint, save_detector
from dasc.report.plots import reliability


def fitted_on(model_path: Path, cut_folder: Path, cases: list[str], align: bool) -> Detector:
    """The detector fitted to all fields of these cases as stage 2 fits it to the val fields."""
    root, fields, annotations = read_cut_fields(cut_folder)
    of_cases = ValFields(root, fields[fields["case"].isin(cases)], annotations)
    detector = load_detector(model_path, torch.device("cpu"))
    detector, curve, probabilities, right = fit_to_val(
        detector, of_cases, batch_size=256, match_um=detector.merge_um, align=align
    )
    reliability(model_path.with_name("sibling_reliability.png"), probabilities, right, detector.calibration)
    print(f"{model_path} on {' '.join(cases)}: F1 {curve['f1'].max():.3f} at best; threshold {detector.threshold:.3f}")
    return detector


def sources_of(config: dict) -> dict[str, str]:
    """The hashes of a config that its detector does not hold."""
    return {name: value for name, value in config.items() if name.endswith("_sha256") and name != "manifest_sha256"}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("weights/dasc_mitos.pt"))
    parser.add_argument("--sibling", type=Path, help="model whose calibration and threshold the file gets")
    parser.add_argument("--patches", type=Path, default=Path("data/patches"), help="stage 1's folder of the sibling")
    parser.add_argument("--cases", nargs="+", default=["H03", "H05"], help="that the sibling has not trained on")
    parser.add_argument("--score_alignment", type=true_or_false, default=True, help="align images with the sibling's")
    args = parser.parse_args()
    checkpoint, detector = read_checkpoint(args.model_path), load_detector(args.model_path, torch.device("cpu"))
    if args.sibling:
        fitted = fitted_on(args.sibling, args.patches, args.cases, args.score_alignment)
        names = ("calibration", "threshold", "val_curve", "per_mm2", "merge_um", "views")
        detector = replace(detector, **{name: getattr(fitted, name) for name in names})
    # Vectors (biases, BatchNorm's statistics) are small, and a variance can exceed float16's range.
    model = {name: value.half() if value.dim() > 1 else value for name, value in checkpoint["model"].items()}
    save_detector(args.out, detector, model, **sources_of(checkpoint["config"]))
    largest = max(
        float((value.float() - before).abs().max())
        for value, before in zip(model.values(), checkpoint["model"].values(), strict=True)
        if torch.is_floating_point(before)
    )
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB; weights moved by at most {largest:.1e}")
