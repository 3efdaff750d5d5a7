"""What is made of the readers' consensus: a dataset, a layer for QuPath, and counts with intervals."""

from pathlib import Path

import numpy as np
import pandas as pd

from dasc.data.corrections import UNSURE, correct
from dasc.data.tables import ANNOTATIONS, FIELDS, write_table
from dasc.errors import InputError
from dasc.files import file_name, replacing_folder, spelt_out, write_csv, write_json
from dasc.images.slides import open_slide
from dasc.judge.hotspot import find_hotspot
from dasc.review.audit import Strata, estimate, estimate_within
from dasc.review.collect import KINDS
from dasc.review.queue import CELL, strata_of

NAMES = {"M": "Mitotic figure", "L": "Non-mitotic figure", "U": "Unsure"}
COLOURS = {"M": [200, 0, 0], "L": [60, 90, 200], "U": [150, 150, 150]}


def write_dataset(
    out: Path, root: Path, fields: pd.DataFrame, annotations: pd.DataFrame, corrections: pd.DataFrame
) -> None:
    """A `table` dataset of corrected fields, whose images are links to those of the dataset.

    Cells that readers are unsure of are left out of its annotations. fields: as fields.csv of stage 1.
    """
    strange = corrections.loc[~corrections["image"].isin(fields["image"]), "image"]
    if len(strange):
        raise InputError(
            f"--manifest: no field {strange.iloc[0]}, of which there are answers; name the queue's patches"
        )
    annotations, _ = correct(annotations, corrections)
    _write_table_dataset(out, fields.assign(file=[root / path for path in fields["path"]]), annotations)


def write_detected_dataset(out: Path, votes: pd.DataFrame) -> None:
    """A `table` dataset of the detections that readers agree on, all of them split train."""
    fields = votes.drop_duplicates("image").assign(file=lambda table: table["path"].map(Path))
    sure = votes[votes["consensus"].isin(["M", "L"])]
    _write_table_dataset(out, fields, sure.assign(label=sure["consensus"].map({"M": 1, "L": 0})))


def _write_table_dataset(out: Path, fields: pd.DataFrame, annotations: pd.DataFrame) -> None:
    with replacing_folder(out, "fields.csv") as partial:
        (partial / "images").mkdir()
        paths = []
        for image, file in zip(fields["image"], fields["file"], strict=True):
            file = file.resolve()
            name = file_name(image.removesuffix(file.suffix)) + file.suffix
            _link(partial / "images" / name, file)
            if file.with_suffix("").is_dir():  # an MRXS has its pixels in a folder of its name
                _link((partial / "images" / name).with_suffix(""), file.with_suffix(""))
            paths.append(f"images/{name}")
        write_table(partial / "fields.csv", fields.assign(path=paths), FIELDS)
        annotations = annotations[annotations["label"] != UNSURE].sort_values("image", kind="stable")
        write_table(partial / "annotations.csv", annotations, ANNOTATIONS)


def _link(path: Path, file: Path) -> None:
    try:
        path.symlink_to(file)
    except OSError:  # Windows allows only developers to make them
        path.hardlink_to(file)


def write_geojson(folder: Path, votes: pd.DataFrame) -> None:
    """IMAGE/reviewed.geojson for QuPath: the consensus of every cell of one image, with its votes."""
    path = Path(votes["path"].iloc[0])
    try:
        with open_slide(path) as slide:  # QuPath counts from the scanned area, and from a pixel's corner
            origin = slide.origin_px
    except InputError as error:
        print(f"not written: {folder / 'reviewed.geojson'}: {error}")
        return
    features = []
    for row in votes[votes["consensus"] != ""].itertuples():
        place = [round(value - start + 0.5, 3) for value, start in zip((row.x_px, row.y_px), origin, strict=True)]
        properties = {
            "objectType": "detection",
            "classification": {"name": NAMES[row.consensus], "color": COLOURS[row.consensus]},
            "measurements": {f"Votes {NAMES[kind].lower()}": int(getattr(row, kind)) for kind in KINDS},
            "metadata": {"Readers": spelt_out(row.readers)},
        }
        geometry = {"type": "Point", "coordinates": place}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    write_json(folder / "reviewed.geojson", {"type": "FeatureCollection", "features": features})


def reviewed_counts(
    votes: pd.DataFrame, detections: pd.DataFrame, counts: pd.DataFrame, seed: int
) -> tuple[pd.DataFrame, dict]:
    """Rows of counts_reviewed.csv, and the content of audit.json, empty without an audit.

    A detection nobody has a consensus on stays what the detector called it; an audit adds estimates of all of them.

    Raises:
        InputError: the queue is of other detections.
    """
    cells = _judged(votes, detections)
    audited = votes["stratum"].notna().any()
    by_stratum = cells.groupby("stratum")
    strata = Strata(
        by_stratum.size().to_numpy(),
        by_stratum["judged"].sum().to_numpy(),
        by_stratum["true"].sum().to_numpy(),
        by_stratum["mitosis"].first().to_numpy(),
    )
    rows = []
    for image in counts.itertuples():
        members = cells[cells["image"] == image.image]
        row = _counted(image, members)
        if audited:
            for name, part in (("mitoses", members), ("hotspot", _within_hotspot(image, members))):
                unseen = np.bincount(part.loc[~part["judged"], "stratum"], minlength=len(strata.size))
                three = estimate_within(strata, int(part["true"].sum()), unseen, seed)
                row |= dict(zip((f"{name}_estimate", f"{name}_low", f"{name}_high"), three, strict=True))
        rows.append(row)
    if not audited:
        return pd.DataFrame(rows), {}
    facts = {name: column.tolist() for name, column in strata._asdict().items()}
    return pd.DataFrame(rows), {**estimate(strata, seed), "strata": facts}


def _judged(votes: pd.DataFrame, detections: pd.DataFrame) -> pd.DataFrame:
    """The detections with their stratum, and what readers say: judged, true, and reviewed, what counts now."""
    cells = detections.assign(stratum=strata_of(detections.rename(columns={"mitosis": "called"})))
    cells = cells.merge(votes[[*CELL, "consensus", "stratum"]], on=CELL, how="left", suffixes=("", "_asked"))
    asked = cells["consensus"].notna()
    other = cells["stratum_asked"].notna() & (cells["stratum"] != cells["stratum_asked"])
    if asked.sum() != len(votes) or other.any():
        raise InputError("--predict: the queue is of other detections than these; name the folder that it was made of")
    cells["judged"] = cells["consensus"].isin(["M", "L"])
    cells["true"] = cells["consensus"] == "M"
    cells["reviewed"] = cells["true"] | (~cells["judged"] & (cells["mitosis"] == 1))
    return cells


def _counted(image, cells: pd.DataFrame) -> dict:
    """One image's row of counts_reviewed.csv, less what an audit estimates."""
    points_px = cells.loc[cells["reviewed"], ["x_px", "y_px"]].to_numpy()
    hotspot = find_hotspot(points_px, image.width_px, image.height_px, image.um_per_px)
    return {
        "image": image.image,
        "mitoses": image.mitoses,
        "judged": int(cells["judged"].sum()),
        "rejected": int((cells["judged"] & ~cells["true"] & (cells["mitosis"] == 1)).sum()),
        "added": int((cells["true"] & (cells["mitosis"] == 0)).sum()),
        "mitoses_reviewed": int(cells["reviewed"].sum()),
        "hotspot_mitoses_reviewed": hotspot.mitoses,
    }


def _within_hotspot(image, cells: pd.DataFrame) -> pd.DataFrame:
    """The detections within the hotspot that the detector found; its corner is that of a pixel, not its middle."""
    left, top = image.hotspot_x_px - 0.5, image.hotspot_y_px - 0.5
    within = cells["x_px"].between(left, left + image.hotspot_width_px)
    return cells[within & cells["y_px"].between(top, top + image.hotspot_height_px)]


def write_counts(path: Path, table: pd.DataFrame) -> None:
    """Write counts_reviewed.csv."""
    write_csv(path, table.round(2))
