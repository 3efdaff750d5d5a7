"""What the answers of all readers say: votes, consensus, corrections and agreement."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dasc.data.corrections import CORRECTIONS
from dasc.errors import InputError
from dasc.files import sha256
from dasc.review.agreement import (
    cohen_kappa,
    crosses,
    fleiss_kappa,
    fleiss_sums,
    positive_agreement,
    share_right,
    with_interval,
)
from dasc.review.answers import last_answers, read_answers
from dasc.review.queue import CELL, read_queue

KINDS = ["M", "L", "U"]  # answers that are a vote; X says that there was nothing to judge
ANNOTATED = ("annotated", "hard_negative")  # origins of cells that the dataset has an annotation of
NEW = {"M": "1", "L": "0", "U": "unsure"}

MEASURES = {
    "cohen_kappa": "Cohen's kappa",
    "fleiss_kappa": "Fleiss' kappa of all readers",
    "positive_agreement": "agreement on mitoses",
    "intra_reader_kappa": "kappa with oneself",
    "accuracy_on_controls": "accuracy on controls",
}

Answers = Mapping[str, Mapping[int, str]]  # by reader, then by item


def named(texts: list[str]) -> list[Path]:
    """The files that are named, patterns such as answers/*.csv filled in, which not every shell does."""
    found = [sorted(Path(text).parent.glob(Path(text).name)) if "*" in text else [Path(text)] for text in texts]
    if not all(found):
        raise InputError(f"--collect {' '.join(texts)}: no such file; a reader answers with review.py first")
    return list(dict.fromkeys(file for files in found for file in files))


def read_all(files: list[Path], queue_path: Path) -> tuple[pd.DataFrame, dict[str, dict[int, str]]]:
    """The queue, and of every reader the last pass's answers.

    Raises:
        InputError: a file of another queue, or with rows of two readers; two files of one reader; no answer at all.
    """
    queue = read_queue(queue_path)
    digest = sha256(queue_path)
    answers: dict[str, dict[int, str]] = {}
    for path in files:
        rows, cut = read_answers(path, digest, len(queue))
        if cut:
            print(f"{path}: its last row was cut off and is left out: {cut!r}")
        readers = {row.reader for row in rows}
        if len(readers) > 1 or readers & answers.keys():
            raise InputError(f"{path}: answers of {', '.join(sorted(readers))}; expected one file per reader")
        for reader in readers:
            last = max(row.number for row in rows)
            answers[reader] = last_answers([row for row in rows if row.number == last])
    if not any(answers.values()):
        raise InputError(f"{', '.join(map(str, files))}: no answer in it")
    return queue, answers


def votes_of(queue: pd.DataFrame, answers: Answers) -> pd.DataFrame:
    """Every cell once, as its first showing in the queue, with the number of votes M, L and U, and who gave one.

    A repeat is not a second vote; it stands in where the first showing has no answer.
    """
    cells = queue[queue["kind"] != "repeat"].copy()
    second = {int(first): item for item, first in queue["repeat_of"].dropna().items()}
    given = [
        {name: last.get(item) or last.get(second.get(item, -1), "") for name, last in answers.items()}
        for item in cells.index
    ]
    for kind in KINDS:
        cells[kind] = [sum(vote == kind for vote in one.values()) for one in given]
    cells["readers"] = ["; ".join(sorted(name for name, vote in one.items() if vote in KINDS)) for one in given]
    return cells


def add_consensus(votes: pd.DataFrame, adjudicated: pd.DataFrame | None = None) -> pd.DataFrame:
    """The votes with `consensus`: the answer of more than half of the votes, or empty without such a one.

    adjudicated: votes on contested cells, as `votes_of`; where they have a majority, it is the consensus.
    """
    votes = votes.assign(consensus=_majority(votes))
    if adjudicated is None:
        return votes
    decided = adjudicated.assign(decided=_majority(adjudicated), judges=adjudicated["readers"])
    votes = votes.merge(decided[[*CELL, "decided", "judges"]], on=CELL, how="left")
    settled = votes["decided"].fillna("") != ""
    votes["consensus"] = votes["consensus"].where(~settled, votes["decided"])
    votes["readers"] = votes["readers"].where(~settled, votes["readers"] + "; decided by " + votes["judges"].fillna(""))
    return votes.drop(columns=["decided", "judges"])


def _majority(votes: pd.DataFrame) -> list[str]:
    counts = votes[KINDS].to_numpy()
    most = counts.argmax(axis=1)
    return [KINDS[one] if 2 * row[one] > row.sum() else "" for one, row in zip(most, counts, strict=True)]


def corrections_of(votes: pd.DataFrame) -> pd.DataFrame:
    """Rows of corrections.csv: cells whose consensus is not their annotation.

    A nucleus drawn at random that readers call no mitosis is no correction: it is nobody's look-alike.
    """
    old = votes["called"].astype(str).where(votes["origin"].isin(ANNOTATED), "")
    new = votes["consensus"].map(NEW).fillna("")
    changed = (new != "") & (new != old) & ~((votes["origin"] == "random") & (new == "0"))
    counts = [count_votes(row) for _, row in votes.iterrows()]
    table = votes.assign(old=old, new=new, votes=counts)
    return table.loc[changed, list(CORRECTIONS)].reset_index(drop=True)


def count_votes(row: pd.Series) -> str:
    """The votes on one cell in words: M 2; L 1."""
    return "; ".join(f"{kind} {row[kind]}" for kind in KINDS if row[kind])


def agreement_of(queue: pd.DataFrame, answers: Answers, seed: int) -> dict[str, Any]:
    """The content of agreement.json: every measure as `agreement.with_interval` gives it."""
    cells = queue[queue["kind"] != "repeat"]
    readers = sorted(answers)
    codes = {
        name: np.array([KINDS.index(answers[name][i]) if answers[name].get(i) in KINDS else -1 for i in queue["item"]])
        for name in readers
    }
    cases, first = cells["case"].to_numpy(), cells["item"].to_numpy()
    found: dict[str, Any] = {"readers": readers, "answers": {name: len(answers[name]) for name in readers}}
    pairs = {
        f"{one} and {two}": crosses(codes[one][first], codes[two][first], len(KINDS))
        for one, two in combinations(readers, 2)
    }
    found["cohen_kappa"] = {name: with_interval(cohen_kappa, table, cases, seed) for name, table in pairs.items()}
    found["positive_agreement"] = {
        name: with_interval(positive_agreement, table, cases, seed) for name, table in pairs.items()
    }
    if len(readers) > 1:
        matrix = np.column_stack([codes[name][first] for name in readers])
        whole = (matrix >= 0).all(axis=1)
        sums = fleiss_sums(matrix[whole], len(KINDS))
        found["fleiss_kappa"] = with_interval(lambda one: fleiss_kappa(one, len(readers)), sums, cases[whole], seed)
    repeats = queue[queue["kind"] == "repeat"]
    again = {
        name: crosses(code[repeats["repeat_of"].astype(int)], code[repeats["item"]], len(KINDS))
        for name, code in codes.items()
    }
    found["intra_reader_kappa"] = {
        name: with_interval(cohen_kappa, table, repeats["case"].to_numpy(), seed) for name, table in again.items()
    }
    controls = queue[(queue["kind"] == "control") & queue["label"].notna()]
    right = {}
    for name, code in codes.items():
        given = code[controls["item"]]
        judged = given >= 0
        right[name] = np.column_stack([judged, judged & (given == 1 - controls["label"].to_numpy())]).astype(float)
    found["accuracy_on_controls"] = {
        name: with_interval(share_right, one, controls["case"].to_numpy(), seed) for name, one in right.items()
    }
    return found


def measures_of(found: dict[str, Any]) -> list[tuple[str, float | None, float | None, float | None]]:
    """Every measure of agreement.json: name, value, low, high."""
    rows = []
    for key, words in MEASURES.items():
        measures = found.get(key, {})
        for name, one in ({"": measures} if "value" in measures else measures).items():
            rows.append((f"{words}: {name}" if name else words, one["value"], one["low"], one["high"]))
    return rows


def lines_of(rows: list[tuple[str, float | None, float | None, float | None]]) -> list[str]:
    """Measures in words, a line each: name, value, low, high."""
    lines = []
    for name, value, low, high in rows:
        interval = "" if low is None or high is None else f" ({low:.3g} to {high:.3g})"
        lines.append(f"{name}: {'not defined' if value is None else f'{value:.3g}'}{interval}")
    return lines
