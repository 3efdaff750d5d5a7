"""Write docs/results.md from docs/results.csv, a table for each version of the weights, and from docs/votes.csv.

One row of results.csv is one result; cells stay empty where a figure was not recorded. Stops where F1, precision or
recall disagree with the counts of their row. votes.csv: nuclei of MITOS-ATYPIA-14 by the annotators' agreement. Given
the results of `make gpu`, it adds their rows to results.csv first:

    python docs/make_results.py results/gpu.json
"""

import csv
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent))

import pandas as pd

from dasc.judge.votes import ceiling

TITLES = {  # by the column `weights`
    "dasc_mitos v7 siblings": "Siblings of `weights/dasc_mitos.pt` (v7), which never saw the laboratory that is judged",
    "dasc_mitos v7": "`weights/dasc_mitos.pt` (v7)",
    "dasc_figures v3": "`weights/dasc_figures.pt` (v3) as a detector, not trained further",
    "from dasc_figures v2": "Trainings on eight slides of MITOS-ATYPIA-14 from `weights/dasc_figures.pt` (v2)",
    "resnet18, the paper's epochs, from random weights": "ResNet18 with the paper's epochs, from random weights",
}
HEAD = """# Results of the shipped weights and of the recommended recipe

Made by `python docs/make_results.py` from [results.csv](results.csv), which has the dates too: add rows there. Older
versions and what was tried: [log.md](log.md). What the weights are: [weights/README.md](../weights/README.md). What to
expect of them: [README](../README.md).

- H03, H05, H07 and H14, "four slides", are slides of MITOS-ATYPIA-14 with 133, 147, 39 and 33 mitoses; its nine slides
  without H05 have 332. ICPR 2012 (35 fields of five slides) has 226 mitoses, BreCaHAD's cases 11 to 13 have 55.
- A detection is right within 7.5 um of a mitosis, one to one; counts are pooled over the fields of a set.
- F1, precision and recall hold at the model's own threshold, or where a row says "by other slides" at one that was
  chosen like it, but without the slide that is judged.
- The interval of F1 is a 95 % bootstrap over fields.
- AP: average precision. Oracle F1: F1 at the best threshold for the very fields judged, which nobody knows beforehand.
- Precision and recall are computed from the counts where they were not recorded. A dash: not recorded.
"""
CEILING = """
## How well the annotators do

A human ceiling for F1 on MITOS-ATYPIA-14. Its confidences are taken for votes: all agree (1.0 and 0.8), two of three
called it a mitosis (0.65, in the consensus), one of three did (0.2, not in it). That is inferred from the data, and so
is who read what. **Taken for true: two annotators read everything, and a third decided where they differ.** Then one of
the two called each contested nucleus a mitosis. The last two columns: if all three had read everything independently.

- *One reader*: expected F1 of one annotator against the consensus. It favours the annotator, whose own vote is in the
  consensus. *Two readers*: expected F1 of two annotators against each other.
- Counted are the fields at hand, each with at least one mitosis of the consensus (290 in all; one mitosis has no
  confidence). In other fields one annotator may have called more; that would lower the figures.

| set | all agree | 2 of 3 | 1 of 3 | one reader | two readers | one reader, if three | two readers, if three |
|---|---|---|---|---|---|---|---|
"""
COLUMNS = "| # | set | arm | seed | F1 (interval) | precision | recall | TP FP FN | AP | oracle F1 | commit |"


def line(number: int, row: pd.Series) -> str:
    """One row of a table; its figures must agree with its counts."""
    tp, fp, fn = row[["tp", "fp", "fn"]].astype(float)
    counted = {"precision": tp / (tp + fp), "recall": tp / (tp + fn), "f1": 2 * tp / (2 * tp + fp + fn)}
    for name, value in counted.items():
        if abs(row[name] - value) > 0.0006:  # a figure has three decimals; not so where either is missing
            what = f"{row['weights']}, {row['set']}: {name} {row[name]}"
            raise SystemExit(f"results.csv, {what}, by its counts {value:.4f}")
    numbers = row.fillna(counted)[["f1", "precision", "recall", "ap", "oracle_f1", "f1_low", "f1_high"]]
    f1, precision, recall, ap, oracle, low, high = ("-" if pd.isna(x) else f"{x:.3f}" for x in numbers)
    f1 = f"{f1} ({low}-{high})" if low != "-" else "not measured yet" if pd.isna(row["date"]) else f1
    counts = "-" if pd.isna(tp) else f"{tp:.0f} {fp:.0f} {fn:.0f}"
    commit = "-" if pd.isna(row["commit"]) else row["commit"]
    cells = [number, row["set"], row["arm"], row["seed"], f1, precision, recall, counts, ap, oracle, commit]
    return f"| {' | '.join(map(str, cells))} |"


def results(table: pd.DataFrame, votes: pd.DataFrame) -> str:
    """The whole document of the two tables."""
    text = HEAD + CEILING
    for row in votes.itertuples(index=False):
        f1 = [f"{value:.2f}" for readers in (2, 3) for value in ceiling(*row[1:], readers)]
        text += f"| {' | '.join(map(str, (*row, *f1)))} |\n"
    for weights, rows in table.groupby("weights", sort=False):
        lines = [line(number, row) for number, (_, row) in enumerate(rows.iterrows(), 1)]
        rows = rows.assign(number=[str(number) for number in range(1, len(rows) + 1)])
        noted = rows.groupby("note", sort=False)["number"].agg(", ".join)
        notes = [f"- Row {numbers}: {note}." for note, numbers in noted.items()]
        section = [f"\n## {TITLES.get(weights, weights)}\n", COLUMNS, "|---" * 11 + "|", *lines, "", *notes]
        text += "\n".join(section).rstrip() + "\n"
    return text


KEY = ("date", "commit", "weights", "set", "arm", "seed")  # rows that agree in these are the same


def read(path: Path) -> pd.DataFrame:
    """results.csv."""
    return pd.read_csv(path, dtype={"commit": str})


def take_over(results_path: Path, table_path: Path) -> int:
    """Add the rows of a results file of tests/gpu.py that results.csv has not yet; how many they are."""
    content = json.loads(results_path.read_text(encoding="utf-8"))
    if content["quick"]:
        raise SystemExit(f"{results_path}: of --quick, which is no measurement")
    table = read(table_path)
    known = {tuple(map(str, row)) for row in table[list(KEY)].itertuples(index=False)}
    new = [row for row in content["rows"] if tuple(str(row[name]) for name in KEY) not in known]
    with table_path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(table), lineterminator="\n")
        for row in new:
            writer.writerow({name: f"{value:.3f}" if type(value) is float else value for name, value in row.items()})
    return len(new)


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(f"{path}: {take_over(Path(path), FOLDER / 'results.csv')} new rows")
    document = results(read(FOLDER / "results.csv"), pd.read_csv(FOLDER / "votes.csv"))
    (FOLDER / "results.md").write_text(document, encoding="utf-8", newline="\n")
