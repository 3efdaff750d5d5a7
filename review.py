"""Show doubtful cells to readers, and make of their answers agreement, corrections and a better dataset.

Reads memory.csv of stage 4 and the patches it is about, or the detections of predict.py; and the images of both.
Writes OUT/queue.csv (the cells to be judged) and OUT/answers/READER.csv (a row per key), or one file to send (--page);
with --collect agreement.json and agreement.png, corrections.csv, dataset/ (a `table` dataset), IMAGE/reviewed.geojson
and, of detections, counts_reviewed.csv and audit.json. Serves a page to a browser on this computer alone.
"""

from typing import Literal

from dasc.flags import Count, Natural, Share, read_flags

# Edit here, or override one run with the flag of the same name.
MEMORY = ""  # memory.csv of stage 4: review the labels of the training patches
MANIFEST = "data/patches_ns/patches.csv"  # the patches that MEMORY is about
HARD = ""  # hard.csv of stage 5: ask only of what it does not call clean
PREDICT = ""  # folder of predict.py: review its detections
IMAGES: list[str] = ["data/sample/images"]  # the images that predict.py read, or folders of them, known by their names
DATA_ROOT = ""  # folder of the dataset of MANIFEST; empty: where it lay at stage 1
OUT = "results/review"  # folder to write
READER = ""  # name or initials of who answers
QUEUE: Literal["", "noise", "uncertain", "disagree", "contested", "audit"] = ""  # noise: highest noise_score first;
# uncertain: nearest the threshold; disagree: label against model; contested: cells that the readers of OUT called
# differently; audit: a random sample of detections; empty: noise with MEMORY, uncertain with PREDICT
ITEMS: Count = 300  # cells shown
CONTROLS: Share = 0.1  # share of them that nobody doubts
REPEATS: Share = 0.05  # share of them that are shown a second time, turned
BLIND = True  # False: show label and probability below every cell; readers tend to follow them
PASS_NUMBER: Count = 1  # 2: the same reader goes through the whole queue again; --collect takes the last pass
PORT: Natural = 8327  # of the page on this computer; a browser keeps answers that a killed server did not get for the
# same port; 0: any that is free
PAGE = ""  # write this one file to send instead: the page with all its pictures, which saves the answers as CSV
COLLECT: list[str] = []  # answers of all readers: results/review/answers/*.csv
SEED = 0  # of the order, the sample and the intervals

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

from pathlib import Path

import pandas as pd

from dasc.data.corrections import CORRECTIONS
from dasc.data.cut import read_cut, read_cut_fields
from dasc.data.tables import write_table
from dasc.errors import InputError
from dasc.files import file_name, sha256, write_json
from dasc.review import collect, outcome, queue
from dasc.review.answers import AnswerFile, check_reader
from dasc.review.crops import Crops, check_images
from dasc.review.server import Review, Server, typed, write_page
from dasc.run import record_run, run_script


def main(args) -> int:
    if args.collect:
        return collect_answers(args)
    if bool(args.memory) + bool(args.predict) != 1 and (args.queue != queue.CONTESTED or args.memory):
        raise InputError("give --memory or --predict, or else --collect or --queue contested; --help explains them")
    check_reader(args.reader)
    name = args.queue or ("noise" if args.memory else "uncertain")
    out = folder(args)
    table = make_queue(name, args)
    queue.write_queue(out / "queue.csv", table)
    table = queue.read_queue(out / "queue.csv")
    answers = AnswerFile(
        out / "answers" / f"{args.reader}.csv", args.reader, sha256(out / "queue.csv"), len(table), args.pass_number
    )
    source = {args.memory or args.predict or args.out: len(table)}
    check_images(table)
    record_run(out, args, inputs=source, kinds=table["kind"].value_counts().to_dict())
    print(f"{len(table)} cells of {table['image'].nunique()} images in {out / 'queue.csv'}: {count_kinds(table)}")
    with Crops(table) as crops:
        review = Review(name, table, crops, answers, hints(table, args), closing_command(args))
        if args.page:
            write_page(Path(args.page), review)
            print(f"wrote {args.page}; put the answers that it saves in {out / 'answers'}, then {review.command}")
            return 0
        with Server(review, args.port) as server:
            print(f"open {server.url} in a browser on this computer; Ctrl+C ends it", flush=True)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                print()
    print(f"{len(answers.last)} of {len(table)} cells answered in {answers.path}; then {review.command}")
    return 0


def folder(args) -> Path:
    """The folder of the queue: contested cells have one of their own within that of the first queue."""
    return Path(args.out) / "contested" if args.queue == queue.CONTESTED else Path(args.out)


def lock_folder(args) -> Path:
    """What no second run may hold: a reader's answers, or what is collected."""
    return Path(args.out) / "collect" if args.collect else folder(args) / "answers" / file_name(args.reader)


def make_queue(name: str, args) -> pd.DataFrame:
    """The cells to be shown, as queue.csv has them."""
    if name == queue.CONTESTED:
        return queue.contested_queue(first_votes(args), args.seed)
    if args.memory:
        cells = queue.training_cells(Path(args.memory), Path(args.manifest), args.hard, args.data_root)
    else:
        cells = queue.detected_cells(Path(args.predict), args.images)
    return queue.build_queue(cells, name, args.items, args.controls, args.repeats, args.seed)


def first_votes(args) -> pd.DataFrame:
    """The votes on the first queue of OUT."""
    files = sorted((Path(args.out) / "answers").glob("*.csv"))
    return collect.votes_of(*collect.read_all(files, Path(args.out) / "queue.csv"))


def hints(table: pd.DataFrame, args) -> list[str] | None:
    """What a reader who is not blind sees below every cell; of a contested one the votes."""
    if args.blind:
        return None
    if args.queue == queue.CONTESTED:
        cells = table[queue.CELL].merge(first_votes(args), on=queue.CELL)
        return [collect.count_votes(row) for _, row in cells.iterrows()]
    words = ["mitosis" if called else "no mitosis" for called in table["called"]]
    return [f"{word}, p {p:.2f}" for word, p in zip(words, table["probability"], strict=True)]


def count_kinds(table: pd.DataFrame) -> str:
    counts = table["kind"].value_counts()
    return ", ".join(f"{counts.get(kind, 0)} {words}" for kind, words in queue.KINDS.items())


def closing_command(args) -> str:
    """What collects the answers, as it is typed."""
    source = ["--predict", args.predict] if args.predict else ["--manifest", args.manifest] if args.memory else []
    root = ["--data_root", args.data_root] if args.data_root else []
    return typed(["python", "review.py", "--collect", f"{args.out}/answers/*.csv", "--out", args.out, *source, *root])


def collect_answers(args) -> int:
    """Write what the answers of all readers say."""
    from dasc.report.plots import agreement  # a third of the start, which the server and its page do not need

    out = Path(args.out)
    files = collect.named(args.collect)
    table, answers = collect.read_all(files, out / "queue.csv")
    votes, second = collect.votes_of(table, answers), None
    decided = sorted((out / "contested/answers").glob("*.csv"))
    if decided:
        second = collect.votes_of(*collect.read_all(decided, out / "contested/queue.csv"))
    votes = collect.add_consensus(votes, second)
    corrections = collect.corrections_of(votes)
    found = collect.agreement_of(table, answers, args.seed)
    write_json(out / "agreement.json", found)
    measures = collect.measures_of(found)
    agreement(out / "agreement.png", measures)
    write_table(out / "corrections.csv", corrections, CORRECTIONS)
    detected = (table["origin"] == "detection").all()
    lines = collect_detections(out, votes, args) if detected else collect_labels(out, corrections, args)
    for image, cells in votes.groupby("image"):
        outcome.write_geojson(out / file_name(image, safe=" "), cells)
    contested = int(((votes["consensus"] == "") & (votes["readers"] != "")).sum())
    facts = {"corrections": len(corrections), "contested": contested}
    record_run(out / "collect", args, inputs={path: len(answers) for path in [*files, *decided]}, **facts)
    print("\n".join([*collect.lines_of(measures), *lines]))
    print(f"{len(corrections)} corrections in {out / 'corrections.csv'}, {contested} cells without a majority")
    return 0


def collect_labels(out: Path, corrections: pd.DataFrame, args) -> list[str]:
    """The corrected dataset; the command that trains on it."""
    folder = Path(args.manifest).parent
    root, fields, annotations = read_cut_fields(folder, args.data_root)
    outcome.write_dataset(out / "dataset", root, fields, annotations, corrections)
    cut = read_cut(folder)
    known = ["--patch_size", cut.patch_size, "--patch_um_per_px", cut.um_per_px]
    known += ["--normalise_stain", cut.normalise_stain, "--corrections", out / "corrections.csv"]
    return [
        f"train on: {typed(['python', 'pre/cut_patch_2.py', '--data_root', root, *known])}",
        f"and with --dataset, --val, --test and whatever else {folder} was cut with: {folder / 'run.json'} has it",
    ]


def collect_detections(out: Path, votes: pd.DataFrame, args) -> list[str]:
    """Dataset and counts of reviewed detections; the lines to print of them."""
    outcome.write_detected_dataset(out / "dataset", votes)
    if not args.predict:
        return ["no counts_reviewed.csv: give --predict, the folder that the detections are from"]
    counts, audit = outcome.reviewed_counts(votes, *queue.read_predicted(Path(args.predict)), args.seed)
    outcome.write_counts(out / "counts_reviewed.csv", counts)
    if not audit:
        return [counts.to_string(index=False)]
    write_json(out / "audit.json", audit)
    return [
        counts.to_string(index=False),
        *collect.lines_of([(name, *audit[name]) for name in ("mitoses", "precision", "recall")]),
    ]


if __name__ == "__main__":
    run_script(main, args, lock_folder(args))
