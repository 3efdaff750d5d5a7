"""Detections judged by the annotators' agreement, and how well annotators do by the same measure."""

import json
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from pipeline import succeed

from dasc.data.datasets import read_dataset
from dasc.judge.metrics import evaluate
from dasc.judge.votes import ceiling, judge_by_votes


def points(rows, columns):
    return pd.DataFrame(rows, columns=columns).astype({"x_px": float, "y_px": float})


ANNOTATIONS = points(
    [
        ["a", 0, 0, 1, 1.0],
        ["a", 100, 0, 1, 0.8],
        ["a", 200, 0, 1, 0.65],
        ["b", 300, 0, 1, 0.65],
        ["b", 400, 0, 1, np.nan],
        ["a", 500, 0, 0, 0.2],
        ["b", 600, 0, 0, 0.2],
        ["a", 700, 0, 0, 0.0],
        ["elsewhere", 0, 0, 1, 1.0],
    ],
    ["image", "x_px", "y_px", "label", "confidence"],
)
DETECTIONS = points(
    [
        ["a", 1, 0, 0.9],  # of the mitosis that all agree on
        ["a", 100, 0, 0.2],  # too weak
        ["b", 300, 28, 0.9],  # 7 um from a contested one
        ["a", 500, 0, 0.9],  # one annotator called it a mitosis
        ["a", 505, 0, 0.8],  # the same cell again is another false positive
        ["b", 600, 31, 0.9],  # too far from it
        ["a", 700, 0, 0.9],  # no annotator did
    ],
    ["image", "x_px", "y_px", "probability"],
)
UM_PER_PX = {"a": 0.25, "b": 0.25}


def test_recall_and_false_positives_by_votes():
    found = judge_by_votes(ANNOTATIONS, DETECTIONS, UM_PER_PX, 0.5)
    assert found == {
        "mitoses_agreed": 2,
        "found_agreed": 1,
        "recall_agreed": 0.5,
        "mitoses_contested": 2,
        "found_contested": 1,
        "recall_contested": 0.5,
        "fp_one_reader": 1,
        "fp_no_reader": 3,
    }
    whole, _ = evaluate(ANNOTATIONS[:-1], DETECTIONS, UM_PER_PX, 0.5)
    assert whole["fp"] == found["fp_one_reader"] + found["fp_no_reader"]
    assert whole["tp"] == found["found_agreed"] + found["found_contested"]  # and the one without a confidence is missed
    many = judge_by_votes(ANNOTATIONS, DETECTIONS, UM_PER_PX, 0.5, "uts")  # within 30 px, many to one
    assert (many["fp_one_reader"], many["fp_no_reader"], many["found_contested"]) == (2, 2, 1)


def test_a_kind_without_a_mitosis_has_no_recall():
    found = judge_by_votes(ANNOTATIONS[:2], DETECTIONS, UM_PER_PX, 0.5)
    assert found["recall_agreed"] == 0.5 and found["mitoses_contested"] == 0 and found["recall_contested"] is None
    found = judge_by_votes(ANNOTATIONS, DETECTIONS, UM_PER_PX, 1.1)
    assert found["recall_agreed"] == found["fp_one_reader"] == found["fp_no_reader"] == 0


def test_without_confidences_there_is_nothing_to_tell():
    assert judge_by_votes(ANNOTATIONS.assign(confidence=np.nan), DETECTIONS, UM_PER_PX, 0.5) == {}


@pytest.mark.parametrize("readers", [2, 3])
def test_the_ceiling_is_that_of_votes_counted_one_by_one(readers):
    """Every nucleus in every way that its votes can fall on three readers, as often as each way is."""
    agreed, two, one = 44, 103, 20
    weights = {3: agreed, 2: two, 1: one}
    ways = {n: [set(way) for way in combinations(range(3), n)] for n in weights}
    if readers == 2:  # readers 0 and 1; the third is asked where they differ
        ways = {n: [way for way in ways[n] if n == 3 or len(way & {0, 1}) == 1] for n in ways}
    pairs = list(product(range(readers), repeat=2))
    counts = {"reader": 0.0, "consensus": 0.0, "right": 0.0, "both": 0.0}
    for votes, number in weights.items():
        for way in ways[votes]:
            share = number / len(ways[votes])
            counts["consensus"] += share * (votes > 1)
            for reader in range(readers):
                counts["reader"] += share * (reader in way) / readers
                counts["right"] += share * (reader in way and votes > 1) / readers
            two_readers = [pair for pair in pairs if pair[0] < pair[1]]
            counts["both"] += share * np.mean([set(pair) <= way for pair in two_readers])
    alone, between = ceiling(agreed, two, one, readers)
    assert alone == pytest.approx(2 * counts["right"] / (counts["reader"] + counts["consensus"]))
    assert between == pytest.approx(counts["both"] / counts["reader"])  # 2 both / (reader + reader)
    assert ceiling(7, 0, 0, readers) == (1, 1)


@pytest.fixture(scope="module")
def voted(small_run, tmp_path_factory):
    """The fields of the sample in the layout of MITOS-ATYPIA-14, with votes."""
    root, sample = tmp_path_factory.mktemp("mitos14"), read_dataset("sample", small_run / "sample")
    labelled = sample.fields[sample.fields["split"] != "unlabelled"]
    slides = ["A03", "A04", "A05"]
    for (_, fields), slide in zip(labelled.groupby("case"), slides, strict=False):
        (root / slide / "frames/x40").mkdir(parents=True)
        (root / slide / "mitosis").mkdir()
        for number, field in enumerate(fields.itertuples()):
            path = sample.root / field.path
            frame = f"{slide}_{number:02d}Aa"
            (root / slide / "frames/x40" / f"{frame}{path.suffix}").write_bytes(path.read_bytes())
            here = sample.annotations[sample.annotations["image"] == field.image].reset_index(drop=True)
            for kind, label, votes in (("mitosis", 1, ("0.65", "1.0")), ("not_mitosis", 0, ("0.2", "0.0"))):
                rows = here[here["label"] == label]
                lines = [
                    f"{x},{y},{votes[n % 2]}" for n, (x, y) in enumerate(zip(rows["x_px"], rows["y_px"], strict=True))
                ]
                (root / slide / "mitosis" / f"{frame}_{kind}.csv").write_text("\n".join(lines))
    return root


def predicted(small_run, root, out):
    flags = ["--dataset", "mitos14", "--data_root", root, "--val", "A03", "--test", "A04", "--overlays", False]
    flags += ["--model_path", small_run / "NS/model.pt", "--device", "cpu", "--per_mm2", 600, "--views", 1]
    done = succeed("predict.py", *flags, "--threshold", 0.1, "--check_labels", False, "--out", out)
    return done.out, json.loads((out / "metrics.json").read_text()), (out / "report.html").read_text()


def test_predict_reports_votes(small_run, voted, tmp_path):
    out, metrics, report = predicted(small_run, voted, tmp_path)
    assert metrics["mitoses_agreed"] > 0 < metrics["mitoses_contested"]
    assert metrics["mitoses_agreed"] + metrics["mitoses_contested"] == metrics["mitoses"]
    assert metrics["found_agreed"] + metrics["found_contested"] == metrics["tp"] > 0
    assert metrics["fp_one_reader"] + metrics["fp_no_reader"] == metrics["fp"]
    counts = f"({metrics['found_agreed']} of {metrics['mitoses_agreed']})"
    line = f"recall {metrics['recall_agreed']:.3f} {counts} of mitoses that all annotators agree on"
    assert line in out and line in report
    assert f"false positives: {metrics['fp_one_reader']} on cells that one annotator called a mitosis" in out


def test_predict_reports_no_votes_where_there_are_none(small_run, voted, tmp_path):
    for path in voted.glob("*/mitosis/*.csv"):
        copy = tmp_path / "data" / path.relative_to(voted)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text("\n".join(line.rpartition(",")[0] for line in path.read_text().splitlines()))
    for path in voted.glob("*/frames"):
        (tmp_path / "data" / path.relative_to(voted)).symlink_to(path)
    out, metrics, report = predicted(small_run, tmp_path / "data", tmp_path / "out")
    assert not [name for name in metrics if "agreed" in name or "contested" in name or "reader" in name]
    assert "annotator" not in out + report and metrics["mitoses"] > 0
