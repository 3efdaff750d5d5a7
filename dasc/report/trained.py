"""What a finished training of a detector leaves: the model, the curve of its thresholds, the plots."""

from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from dasc.files import write_csv
from dasc.model.checkpoint import Detector, save_detector
from dasc.report.plots import detector_curves


def write_detector(
    out: Path,
    detector: Detector,
    weights: dict[str, Tensor],
    curve: pd.DataFrame,
    log: list[dict[str, Any]],
    panels: dict[str, list[str]],
    **sources: str | None,
) -> dict[str, Any]:
    """Write OUT/model.pt, val_curve.csv, curves.png and val_curve.png; return what run.json says of the training.

    curve: of the thresholds on validation. log: of the epochs, with val_f1 and skipped. panels: of curves.png, each
    with its columns of the log. sources: hashes of the tables beside the manifest that it was trained on.
    """
    save_detector(out / "model.pt", detector, weights, **sources)
    write_csv(out / "val_curve.csv", curve.round(6))
    detector_curves(out, pd.DataFrame(log), panels, curve, detector.threshold)
    epoch = max(range(len(log)), key=lambda index: log[index]["val_f1"])
    f1 = curve["f1"].max() if len(curve) else 0.0
    print(f"best epoch {epoch}; validation F1 {f1:.3f} at best; threshold {detector.threshold:.3f}")
    print(f"wrote {out / 'model.pt'}")
    skipped = sum(row["skipped"] for row in log)  # patches of steps without a finite loss
    return {"best_epoch": epoch, "threshold": detector.threshold, "skipped_patches": skipped}
