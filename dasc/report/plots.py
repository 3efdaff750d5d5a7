"""Every plot and picture that is drawn, but for those inside the report's page.

Training curves, precision and recall, reliability, difficulty, embeddings, contact sheets of patches, detections on
their field.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dasc.data.tables import LABELS
from dasc.files import replacing, spelt_out
from dasc.judge.calibration import Calibration
from dasc.judge.metrics import match_field

TRUE, FALSE, MISSED = (0, 210, 0), (255, 220, 0), (40, 120, 255)  # RGB: green, yellow, blue
DETECTION = (0, 220, 220)  # cyan, where no annotation says whether it is right
BOX = (40, 40, 40)  # behind text, which no tissue then makes illegible
CIRCLE_UM = 12.5  # radius of a circle: the figure inside stays visible
TILE_PX, GAP_PX, MARGIN_PX, TITLE_PX, CAPTION_PX = 112, 8, 16, 34, 18  # of a contact sheet
VERDICT_COLORS = {"clean": "#74a9cf", "noisy": "black", "dropped": "#7b3294"}  # hard: yellow to red by level
BINS = 10  # of the reliability plot, equally wide; those with fewer than FEWEST_IN_BIN detections are left out
FEWEST_IN_BIN = 5
DPI = 128  # a power of two, so that a size in inches gives back the exact pixels


def curves(path: Path, log: pd.DataFrame, panels: Mapping[str, Sequence[str]]) -> None:
    """Draw columns of a log against its `epoch` (or row number).

    panels: columns by the title of their panel.
    """
    figure = Figure(figsize=(4.5 * max(len(panels), 1), 3.2), layout="constrained")
    epoch = log["epoch"] if "epoch" in log else range(len(log))
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axis, (title, columns) in zip(axes, panels.items(), strict=False):
        for column in columns:
            axis.plot(epoch, log[column], marker=".", label=_literal(column))
        axis.set(title=_literal(title), xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    _save(path, figure)


def precision_recall(path: Path, curve: pd.DataFrame, threshold: float) -> None:
    """Draw precision against recall, and where the threshold lies.

    curve: threshold, precision, recall, f1, as `metrics.choose_threshold` gives it.
    """
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for f1 in (0.2, 0.4, 0.6, 0.8):
        recall = np.linspace(f1 / (2 - f1), 1, 50)
        axis.plot(recall, f1 * recall / (2 * recall - f1), color="0.85", linewidth=1)
        axis.text(1.01, f1 / (2 - f1), f"F1 {f1}", color="0.6", fontsize=7, verticalalignment="center")
    axis.plot(curve["recall"], curve["precision"])
    reached = curve[curve["threshold"] >= threshold]
    if len(reached):
        chosen = reached.loc[reached["threshold"].idxmin()]
        label = f"threshold {threshold:.3f}: F1 {chosen['f1']:.3f}"
        axis.plot(chosen["recall"], chosen["precision"], "o", color="black", label=label)
        axis.legend(loc="lower left")
    axis.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    _save(path, figure)


def detector_curves(
    out: Path, log: pd.DataFrame, panels: Mapping[str, Sequence[str]], curve: pd.DataFrame, threshold: float
) -> None:
    """Draw how a detector was trained, OUT/curves.png, and how it does on val, OUT/val_curve.png.

    log, panels: as `curves`. curve, threshold: as `precision_recall`.
    """
    curves(out / "curves.png", log, panels)
    precision_recall(out / "val_curve.png", curve, threshold)


def reliability(path: Path, probabilities: np.ndarray, right: np.ndarray, calibration: Calibration) -> None:
    """Draw how many detections of val are right against their probability, before and after calibration.

    probabilities: (N,), aligned but not calibrated. right: (N,) bool.
    """
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="0.8")
    for name, shown in (("network", probabilities), ("calibrated", calibration.calibrate(probabilities))):
        bins = np.minimum((shown * BINS).astype(int), BINS - 1)
        groups = [bins == one for one in range(BINS) if (bins == one).sum() >= FEWEST_IN_BIN]
        axis.plot([shown[one].mean() for one in groups], [right[one].mean() for one in groups], marker="o", label=name)
    axis.set(xlabel="mean probability", ylabel="share of detections that are right", xlim=(0, 1), ylim=(0, 1))
    axis.set_title(f"val fields, {len(right)} detections, {int(right.sum())} right", fontsize=10)
    axis.legend(loc="upper left")
    _save(path, figure)


def difficulty_plane(path: Path, groups: Mapping[tuple[int, str], pd.DataFrame], levels: int) -> None:
    """Draw every patch at its forget rate and centroid distance, one panel per label, coloured by what it is.

    groups: patches (forget_rate, centroid_distance) by label and by name: clean, `hard, level 0` and so on up to
    levels - 1, noisy, dropped; drawn in this order.
    """
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    shades = {f"hard, level {level}": (1.0, 0.85 * (1 - level / max(levels - 1, 1)), 0.0) for level in range(levels)}
    axes = dict(zip(LABELS, figure.subplots(1, len(LABELS), sharey=True), strict=True))
    for (label, name), members in groups.items():
        axes[label].scatter(
            members["forget_rate"],
            members["centroid_distance"],
            s=10,
            alpha=0.6,
            linewidths=0,
            color=(VERDICT_COLORS | shades)[name],
            label=f"{name} ({len(members)})",
        )
    for label, axis in axes.items():
        axis.set(title=LABELS[label], xlabel="forget rate", xlim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
        axis.legend(markerscale=2)
    axes[0].set_ylabel("centroid distance")
    _save(path, figure)


def embedding(path: Path, features: np.ndarray, groups: Mapping[str, Sequence[str]]) -> None:
    """Draw the first two principal components of L2-normalised features, one panel per grouping.

    features: (N, C) float. groups: for the title of each panel, `by ...`, the N names of the patches' groups.
    """
    from sklearn.decomposition import PCA  # half a second, which predict.py does not need

    directions = features / np.linalg.norm(features, axis=1, keepdims=True).clip(min=1e-12)
    places = PCA(2, random_state=0).fit_transform(directions)
    figure = Figure(figsize=(7.5 * len(groups), 5.5), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items(), strict=True):
        names = np.asarray(names, dtype=object)
        for name in sorted(set(names)):
            members = names == name
            axis.scatter(*places[members].T, s=8, alpha=0.6, linewidths=0, label=_literal(f"{name} ({members.sum()})"))
        axis.set(title=_literal(f"by {title}"), xlabel="first component", ylabel="second component")
        axis.legend(markerscale=2, loc="upper left", bbox_to_anchor=(1, 1))  # beside, to hide no patch
    _save(path, figure)


def contact_sheet(
    path: Path,
    groups: Sequence[tuple[str, np.ndarray, Sequence[str] | None]],
    columns: int = 12,
    per_group: int = 24,
) -> None:
    """Draw patches in rows under a title per group, for a pathologist to judge at a glance.

    groups: title, patches (N, H, W, 3) uint8 RGB, a caption per patch or None. per_group: how many are shown of each,
    the first ones; the title says how many there are.
    """
    texts, tiles, top = [], [], MARGIN_PX
    for title, patches, captions in groups:
        shown = min(len(patches), per_group)
        count = f"{shown} of {len(patches)}" if shown < len(patches) else f"{shown}"
        texts.append((MARGIN_PX, top + TITLE_PX - 10, f"{title} ({count})", 11))
        top += TITLE_PX
        row_px = TILE_PX + GAP_PX + (CAPTION_PX if captions else 0)
        for index in range(shown):
            row, column = divmod(index, columns)
            left, above = MARGIN_PX + column * (TILE_PX + GAP_PX), top + row * row_px
            tiles.append((left, above, patches[index]))
            if captions:
                texts.append((left, above + TILE_PX + CAPTION_PX - 4, str(captions[index])[:20], 6.5))
        top += -(-shown // columns) * row_px
    width, height = 2 * MARGIN_PX + columns * (TILE_PX + GAP_PX) - GAP_PX, top + MARGIN_PX
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    for left, baseline, text, size in texts:
        figure.text(left / width, 1 - baseline / height, _literal(text), fontsize=size)
    sheet = _pixels(figure)
    for left, above, patch in tiles:
        shrinks = max(patch.shape[:2]) > TILE_PX
        resized = cv2.resize(patch, (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
        sheet[above : above + TILE_PX, left : left + TILE_PX] = resized
    write_png(path, sheet)


def overlay(
    image: np.ndarray,
    detections: pd.DataFrame,
    um_per_px: float | None,
    truth_px: np.ndarray | None = None,
    match: str = "um",
) -> np.ndarray:
    """Circle the mitoses on a copy of the field, (H, W, 3) uint8 RGB, with a legend in the emptiest corner.

    detections: x_px, y_px, probability, mitosis; rows whose mitosis is false are not drawn.
    truth_px: (T, 2), the annotations: detections are true (green) or false (yellow), annotations missed (blue); None:
    every circle is cyan with its probability.
    um_per_px, match: as `metrics.match_field`, which matches them.
    Raises: InputError: as `metrics.match_field`.
    """
    drawn = detections[detections["mitosis"].astype(bool)]
    points = drawn[["x_px", "y_px"]].to_numpy(np.float64)
    labels = [f"{probability:.2f}" for probability in drawn["probability"]]
    if truth_px is None:
        groups = {"detection": (DETECTION, points, labels)}
    else:
        truth_px = np.asarray(truth_px, dtype=np.float64).reshape(-1, 2)
        found, right = match_field(truth_px, points, um_per_px, match)
        labels = np.array(labels, dtype=object)
        missed = truth_px[~found]
        groups = {
            "true": (TRUE, points[right], labels[right]),
            "false": (FALSE, points[~right], labels[~right]),
            "missed": (MISSED, missed, [""] * len(missed)),
        }
    image = image.copy()
    size = max(image.shape[:2])
    line = max(2, round(size / 500))
    radius = round(CIRCLE_UM / (um_per_px if um_per_px and um_per_px > 0 else 0.25))
    marks = [
        (tuple(centre), color, text)
        for color, centres, texts in groups.values()
        for centre, text in zip(centres.round().astype(int).tolist(), texts, strict=True)
    ]
    for centre, color, _ in marks:
        for shade, thickness in (((0, 0, 0), line + 2), (color, line)):
            cv2.circle(image, centre, radius, shade, thickness, cv2.LINE_AA)
    for (x, y), color, text in marks:  # after the circles, so that none crosses a number
        _write(image, text, (x + radius, y - radius), color, size)
    entries = [(f"{name} {len(centres)}", color) for name, (color, centres, _) in groups.items()]
    _legend(image, entries, np.concatenate([centres for _, centres, _ in groups.values()]), size)
    return image


def agreement(path: Path, measures: Sequence[tuple[str, float | None, float | None, float | None]]) -> None:
    """Draw measures of agreement, one under the other; those that are not defined are left out.

    measures: name, value, low, high.
    """
    shown = [one for one in measures if one[1] is not None][::-1]
    figure = Figure(figsize=(7, 1.2 + 0.3 * len(shown)), layout="constrained")
    axis = figure.subplots()
    for place, (_, value, low, high) in enumerate(shown):
        if low is not None and high is not None:
            axis.plot([low, high], [place, place], color="0.6", linewidth=3)
        axis.plot(value, place, marker="o", color="C0")
    axis.set_yticks(range(len(shown)), [_literal(name) for name, *_ in shown])
    axis.axvline(0, color="0.8", linewidth=1)
    axis.set(xlim=(-1.02, 1.02), ylim=(-0.6, len(shown) - 0.4), xlabel="agreement, with 95 % interval by case")
    _save(path, figure)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an image as PNG.

    image: (H, W, 3) uint8 RGB.
    Raises: InputError: a path that cannot be written.
    """
    encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1]
    with replacing(path) as temporary:
        temporary.write_bytes(encoded.tobytes())


def _save(path: Path, figure: Figure) -> None:
    write_png(path, _pixels(figure))


def _pixels(figure: Figure) -> np.ndarray:
    """The figure as drawn, (H, W, 3) uint8 RGB; savefig would lay it out twice."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return cv2.cvtColor(np.asarray(canvas.buffer_rgba()), cv2.COLOR_RGBA2RGB)


def _literal(text: str) -> str:
    """Show a name as it is spelt: a `$` starts no formula, a byte that is no UTF-8 is spelt out."""
    return spelt_out(str(text)).replace("$", r"\$")


def _text_size(text: str, field_px: int) -> tuple[int, int, float, int]:
    """Width, height, OpenCV scale and stroke of a text that stays legible when the whole field is shown."""
    scale, stroke = max(0.35, field_px / 1800), max(1, round(field_px / 900))
    (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, stroke)
    return width, height, scale, stroke


def _write(image: np.ndarray, text: str, place: tuple[int, int], color: tuple[int, int, int], field_px: int) -> None:
    """Write text on a dark box, its lower left corner at `place`, moved to lie inside the image."""
    if not text:
        return
    width, height, scale, stroke = _text_size(text, field_px)
    pad = max(2, height // 3)
    x = max(pad, min(place[0], image.shape[1] - width - pad))
    y = max(height + pad, min(place[1], image.shape[0] - pad))
    cv2.rectangle(image, (x - pad, y - height - pad), (x + width + pad, y + pad), BOX, cv2.FILLED)
    cv2.putText(image, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, scale, color, stroke, cv2.LINE_AA)


def _legend(
    image: np.ndarray, entries: list[tuple[str, tuple[int, int, int]]], centres: np.ndarray, field_px: int
) -> None:
    """Write the entries on a dark box in the corner whose box is farthest from every centre (N, 2)."""
    sizes = [_text_size(text, field_px) for text, _ in entries]
    row = 2 * max(size[1] for size in sizes)
    width, height = max(size[0] for size in sizes) + row, row * len(entries) + row // 2
    corners = [(x, y) for y in (0, image.shape[0] - height) for x in (0, image.shape[1] - width)]
    middles = np.add(corners, (width / 2, height / 2))
    distance = np.linalg.norm(middles[:, None] - centres[None], axis=2).min(axis=1, initial=np.inf)
    left, top = corners[int(distance.argmax())]
    cv2.rectangle(image, (left, top), (left + width, top + height), BOX, cv2.FILLED)
    for index, (text, color) in enumerate(entries, start=1):
        _write(image, text, (left + row // 2, top + index * row), color, field_px)
