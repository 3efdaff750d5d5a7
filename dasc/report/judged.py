"""How good detections are, where there are annotations: the files, and the lines on the screen."""

from pathlib import Path

import pandas as pd

from dasc.data.corrections import without_unsure
from dasc.files import write_csv, write_json
from dasc.judge.metrics import RADIUS_UM, average_precision, choose_threshold, evaluate, fields_in_um, plateau_threshold
from dasc.judge.votes import judge_by_votes
from dasc.report.plots import precision_recall

OTHER_METRICS = (
    "these are of points; a leaderboard's average precision (of boxes, or over several distances) is another quantity"
)


def write_judgement(
    out: Path,
    truth: pd.DataFrame | None,
    detections: pd.DataFrame,
    counts: pd.DataFrame,
    threshold: float,
    match: str,
    seed: int,
) -> list[str]:
    """Write OUT/metrics.json, metrics_per_field.csv, curve.csv and curve.png; the lines to print of it.

    An earlier run's files that these detections were not judged by go.

    truth: annotations, and what readers are unsure of: image, x_px, y_px, label, confidence; None: nothing is
    annotated.
    detections: all, the weak ones too. counts: rows of counts.csv. match, seed: as `metrics.evaluate`.
    """
    stale, lines = {"metrics.json", "metrics_per_field.csv", "curve.csv", "curve.png"}, []
    if truth is not None:
        resolutions = dict(zip(counts["image"], counts["um_per_px"], strict=True))
        truth, detections = without_unsure(truth, detections, resolutions)
        metrics, per_field = evaluate(truth, detections, resolutions, threshold, match, seed=seed)
        words = "F1 {f1:.3f} ({f1_low:.3f}-{f1_high:.3f}), precision {precision:.3f}, recall {recall:.3f}"
        lines.append(f"{words.format(**metrics)} at threshold {threshold:.3f}")
        metrics |= (votes := judge_by_votes(truth, detections, resolutions, threshold, match))
        lines += lines_of(votes)
        if match == "um":  # the curve is matched one to one
            mitoses = truth[truth["label"] == 1]
            best, curve = choose_threshold(fields_in_um(mitoses, detections, resolutions), RADIUS_UM)
            metrics |= {"oracle_f1": float(curve["f1"].max()) if len(curve) else 0.0, "oracle_threshold": best}
            metrics |= {"plateau_threshold": plateau_threshold(curve), "average_precision": average_precision(curve)}
            lines.append(f"average precision {metrics['average_precision']:.3f}")
            lines[-1] += f"; oracle threshold {best:.3f}: F1 {metrics['oracle_f1']:.3f}"
            if metrics["oracle_f1"]:  # without a mitosis found there is nothing to advise by
                lines.append(f"for other images like these: --threshold {metrics['plateau_threshold']:.4f}")
            write_csv(out / "curve.csv", curve.round(6))
            precision_recall(out / "curve.png", curve, threshold)
            stale -= {"curve.csv", "curve.png"}
        lines.append(OTHER_METRICS)
        write_json(out / "metrics.json", {**metrics, "model_sha256": counts["model_sha256"].iloc[0]})
        write_csv(out / "metrics_per_field.csv", per_field)
        stale -= {"metrics.json", "metrics_per_field.csv"}
    for name in stale:
        (out / name).unlink(missing_ok=True)
    return lines


def lines_of(votes: dict) -> list[str]:
    """What `judge_by_votes` gives in words; no line where it gives nothing."""
    if not votes:
        return []
    parts = []
    for kind, words in (("agreed", "that all annotators agree on"), ("contested", "that they do not agree on")):
        recall, found, of = (votes[f"{name}_{kind}"] for name in ("recall", "found", "mitoses"))
        parts.append(f"{'-' if recall is None else f'{recall:.3f}'} ({found} of {of}) of mitoses {words}")
    false = f"{votes['fp_one_reader']} on cells that one annotator called a mitosis, {votes['fp_no_reader']} others"
    return [f"recall {', '.join(parts)}", f"false positives: {false}"]
