"""Stage 5 of 9: sort the training patches into clean, hard and noisy, and the hard ones by difficulty.

Reads the memory units of stage 4 and, for the contact sheet, the patches.
Writes OUT/hard.csv (a verdict per patch, a level per hard patch), difficulty.png (the patches in the plane of forget
rate and centroid distance), contact_sheet.png (patches per verdict and level) and clus_hard/run.json.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from dasc.data.patches import load_patches
from dasc.data.tables import LABELS, read_patches
from dasc.files import write_csv
from dasc.model.difficulty import VERDICTS, difficulty_levels, forget_rate, join_by_patch, read_memory, verdicts
from dasc.report.plots import contact_sheet, difficulty_plane
from dasc.run import positive, record_run, run_script, true_or_false

# Edit here, or override one run with the flag of the same name.
MEMORY = "results/DMU/memory.csv"  # memory units of stage 4
MANIFEST = "data/patches_ns/patches.csv"  # the patches they are about; empty: no contact sheet
OUT = "results/DMU"  # folder to write
NOISY_SHARE = 0.5  # noisy: flagged so in more than this share of the counted epochs; 0.0: in any (the paper)
HARD_SHARE = 0.5  # hard: not noisy, and not clean in more than this share of the counted epochs; 0.0: in any (paper)
TRUST_MITOSES = False  # True: a mitosis is hard at worst, never noisy or dropped; for labels of which few are wrong
LEVELS = 3  # components of the mixture, which are the levels of difficulty of each label
PER_GROUP = 24  # patches shown per verdict and level
SEED = 0
WORKERS = 2  # threads that read patches


def build_parser() -> argparse.ArgumentParser:
    """Flags: the constants above in lower case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default=MEMORY, help="memory.csv of stage 4")
    parser.add_argument("--manifest", default=MANIFEST, help="patches.csv it is about; empty: no contact sheet")
    parser.add_argument("--out", default=OUT, help="folder to write")
    parser.add_argument("--noisy_share", type=float, default=NOISY_SHARE, help="noisy in more than this share: noisy")
    parser.add_argument("--hard_share", type=float, default=HARD_SHARE, help="not clean in more than this share: hard")
    parser.add_argument(
        "--trust_mitoses", type=true_or_false, default=TRUST_MITOSES, help="drop no mitosis: it is hard at worst"
    )
    parser.add_argument("--levels", type=positive, default=LEVELS, help="levels of difficulty per label")
    parser.add_argument("--per_group", type=int, default=PER_GROUP, help="patches shown per verdict and level")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=positive, default=WORKERS, help="threads that read patches")
    return parser


def main(args: argparse.Namespace) -> int:
    out = Path(args.out)
    memory = read_memory(Path(args.memory))
    if args.manifest:
        patches = read_patches(Path(args.manifest))
        train = patches.loc[patches["split"] == "train", ["patch", "label"]]
        join_by_patch(memory, train, Path(args.memory), Path(args.manifest))

    table = memory[["patch", "label"]].assign(
        verdict=verdicts(memory, args.noisy_share, args.hard_share, args.trust_mitoses),
        level=pd.array([pd.NA] * len(memory), dtype="Int64"),
        forget_rate=forget_rate(memory).round(6),
        centroid_distance=memory["centroid_distance"],
        noise_score=memory["noise_score"],
    )
    fallbacks = {}
    for label, word in LABELS.items():
        hard = (table["label"] == label) & (table["verdict"] == "hard")
        rates, distances = (table.loc[hard, name].to_numpy() for name in ("forget_rate", "centroid_distance"))
        levels, reason = difficulty_levels(rates, distances, args.levels, args.seed)
        table.loc[hard, "level"] = levels
        if not hard.any():
            print(
                f"{word}: no hard patch: none of {(table['label'] == label).sum()} was unclean in more than "
                f"HARD_SHARE {args.hard_share:g} of its epochs without being noisy (NOISY_SHARE {args.noisy_share:g})"
            )
        elif reason:
            fallbacks[word] = reason
            print(f"{word}: levels of the {hard.sum()} hard patches by quantiles: {reason}")

    groups = grouped(table, args.levels)
    sheet = sheet_groups(groups, args) if args.manifest else []
    write_csv(out / "hard.csv", table)
    difficulty_plane(out / "difficulty.png", groups, args.levels)
    if args.manifest:
        contact_sheet(out / "contact_sheet.png", sheet, per_group=args.per_group)
    counts = {f"{LABELS[label]} {name}": len(members) for (label, name), members in groups.items()}
    inputs = {args.memory: len(memory)} | ({args.manifest: len(patches)} if args.manifest else {})
    record_run(out / "clus_hard", args, inputs=inputs, patches=counts, quantiles=fallbacks)  # OUT/run.json is stage 4's
    columns = {word: [counts[f"{word} {name}"] for name in names(args.levels)] for word in LABELS.values()}
    print(pd.DataFrame(columns, index=names(args.levels)).to_string())
    print(f"{len(table)} patches sorted; wrote {out / 'hard.csv'}")
    return 0


def names(levels: int) -> list[str]:
    """What a patch can be, from the easiest to the worst."""
    return ["clean", *(f"hard, level {level}" for level in range(levels)), *VERDICTS[2:]]


def grouped(table: pd.DataFrame, levels: int) -> dict[tuple[int, str], pd.DataFrame]:
    """The rows of hard.csv by label and `names`, empty groups too."""
    name = table["verdict"].where(table["verdict"] != "hard", "hard, level " + table["level"].astype(str))
    return {(label, one): table[(table["label"] == label) & (name == one)] for label in LABELS for one in names(levels)}


def sheet_groups(groups: dict[tuple[int, str], pd.DataFrame], args: argparse.Namespace) -> list[tuple]:
    """Groups of the contact sheet: drawn at random, but the most suspicious first where the verdict is noisy."""
    rng = np.random.default_rng(args.seed)
    folder, sheet = Path(args.manifest).parent, []
    for (label, name), members in groups.items():
        by = "noise_score" if name in VERDICTS[2:] else "forget_rate"
        order = rng.permutation(len(members)) if by == "forget_rate" else np.argsort(-members[by], kind="stable")
        shown = members.iloc[order[: args.per_group]]
        patches = load_patches([folder / patch for patch in shown["patch"]], args.workers)
        captions = [f"{by.replace('_', ' ')} {value:.2f}" for value in shown[by]]
        title = f"{LABELS[label]}: {name}, {len(members)} patches, shown here"
        sheet.append((title, patches.permute(0, 2, 3, 1).numpy(), captions))
    return sheet


if __name__ == "__main__":
    run_script(main, build_parser().parse_args())
