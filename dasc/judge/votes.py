"""Detections judged by how far the annotators agreed, where a dataset says so as a confidence.

MITOS-ATYPIA-14 gives every annotation one: 1.0 and 0.8 where all annotators call it a mitosis, 0.65 where two of three
do, 0.2 where one does, 0 where none does. That is inferred: no document of the dataset at hand says so.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from dasc.judge.metrics import match_field

ALL_AGREE = 0.8  # confidence from which all annotators call it a mitosis


def judge_by_votes(
    annotations: pd.DataFrame,
    detections: pd.DataFrame,
    um_per_px: Mapping[str, float],
    threshold: float,
    match: str = "um",
) -> dict[str, int | float | None]:
    """Recall of mitoses by the annotators' agreement; false positives by whether one annotator saw a mitosis there.

    Args: as `metrics.evaluate`; annotations have label and confidence, look-alikes (label 0) among them.

    Returns: mitoses, found and recall of each kind (`agreed`, `contested`; recall None without any), and
    fp_one_reader, fp_no_reader; empty where no mitosis has a confidence. A mitosis without one is of neither kind.
    """
    annotations = annotations[annotations["image"].isin(list(um_per_px))].reset_index(drop=True)
    confidence, mitosis = annotations["confidence"], annotations["label"] == 1
    if confidence[mitosis].isna().all():
        return {}
    kinds = {"agreed": mitosis & (confidence >= ALL_AGREE), "contested": mitosis & (confidence < ALL_AGREE)}
    doubtful = (annotations["label"] == 0) & (confidence > 0)
    found, one_reader, false = pd.Series(False, index=annotations.index), 0, 0
    for image, resolution in um_per_px.items():
        here = annotations["image"] == image
        called = (detections["image"] == image) & (detections["probability"] >= threshold)
        places = detections.loc[called, ["x_px", "y_px"]].to_numpy(float)
        truth, look_alikes = (annotations.loc[here & part, ["x_px", "y_px"]] for part in (mitosis, doubtful))
        hit, right = match_field(truth.to_numpy(float), places, resolution, match)
        found[truth.index[hit]] = True
        one_reader += int(match_field(look_alikes.to_numpy(float), places[~right], resolution, match)[1].sum())
        false += int((~right).sum())
    figures: dict[str, int | float | None] = {}
    for name, members in kinds.items():
        figures |= {f"mitoses_{name}": int(members.sum()), f"found_{name}": int(found[members].sum())}
        figures[f"recall_{name}"] = float(found[members].mean()) if members.any() else None
    return figures | {"fp_one_reader": one_reader, "fp_no_reader": false - one_reader}


def ceiling(agreed: int, two_of_three: int, one_of_three: int, readers: int) -> tuple[float, float]:
    """Expected F1 of one annotator against the consensus, and of two annotators against each other.

    Args:
        agreed, two_of_three, one_of_three: nuclei that so many call mitoses; the consensus has the first two.
        readers: who read everything. 2: two did and a third decided where they differ, so that one of the two called
            each contested nucleus a mitosis; 3: all did, independently.
    """
    contested = np.array([two_of_three, one_of_three])
    by_one = np.array([1 / 2, 1 / 2]) if readers == 2 else np.array([2 / 3, 1 / 3])  # share that one reader calls so
    by_both = np.zeros(2) if readers == 2 else np.array([1 / 3, 0])
    called = agreed + (contested * by_one).sum()
    right = agreed + two_of_three * by_one[0]
    return float(2 * right / (called + agreed + two_of_three)), float((agreed + (contested * by_both).sum()) / called)
