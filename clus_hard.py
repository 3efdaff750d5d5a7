"""Stage 5 of 9: sort the training patches into clean, hard and noisy, and the hard ones by difficulty.

Reads the memory units of stage 4 and, for the contact sheet, the patches.
Writes OUT/hard.csv (verdict and hardness of every patch, level of a hard one), difficulty.png (the patches in the plane
of forget rate and centroid distance), contact_sheet.png (patches per verdict and level) and clus_hard/run.json.
"""

from dasc.flags import Count, Natural, Share, read_flags

# Edit here, or override one run with the flag of the same name.
MEMORY = "results/DMU/memory.csv"  # memory units of stage 4
MANIFEST = "data/patches_ns/patches.csv"  # the patches they are about; empty: no contact sheet
OUT = "results/DMU"  # folder to write
NOISY_SHARE: Share = 0.5  # noisy: flagged so in more than this share of the counted epochs; 0: in any (the paper)
HARD_SHARE: Share = (
    0.5  # hard: not noisy, and not clean in more than this share of the counted epochs; 0: in any (paper)
)
TRUST_MITOSES = False  # True: a mitosis is hard at worst, never noisy or dropped; for labels of which few are wrong
LEVELS: Count = 3  # components of the mixture, which are the levels of difficulty of each label
PER_GROUP: Natural = 24  # patches shown per verdict and level
SEED = 0  # of the mixture and the contact sheet
WORKERS: Count = 2  # threads that read patches

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

from pathlib import Path

import numpy as np
import pandas as pd

from dasc.data.patches import load_patches
from dasc.data.tables import HARD, LABELS, VERDICTS, join_by_patch, read_memory, read_patches, write_table
from dasc.model.difficulty import difficulty_levels, forget_rate, hardness, verdicts
from dasc.report.plots import contact_sheet, difficulty_plane
from dasc.run import record_run, run_script


def main(args) -> int:
    out = Path(args.out)
    memory = read_memory(Path(args.memory))
    inputs = {args.memory: len(memory)}
    if args.manifest:
        patches = read_patches(Path(args.manifest))
        inputs[args.manifest] = len(patches)
        train = patches.loc[patches["split"] == "train", ["patch", "label"]]
        join_by_patch(memory, train, Path(args.memory), Path(args.manifest))

    table = memory[["patch", "label", "centroid_distance", "noise_score"]].assign(
        verdict=verdicts(memory, args.noisy_share, args.hard_share, args.trust_mitoses),
        level=pd.array([pd.NA] * len(memory), dtype="Int64"),
        forget_rate=forget_rate(memory).round(6),
    )
    quantiles = grade(table, args)
    table["hardness"] = hardness(table["verdict"], table["level"].astype("Float64"), args.levels)
    groups = grouped(table, args.levels)
    sheet = sheet_groups(groups, args) if args.manifest else []
    write_table(out / "hard.csv", table, HARD)
    difficulty_plane(out / "difficulty.png", groups, args.levels)
    if args.manifest:
        contact_sheet(out / "contact_sheet.png", sheet, per_group=args.per_group)
    counts = {f"{LABELS[label]} {name}": len(members) for (label, name), members in groups.items()}
    # OUT/run.json is stage 4's
    record_run(out / "clus_hard", args, inputs=inputs, patches=counts, quantiles=quantiles)
    columns = {word: [counts[f"{word} {name}"] for name in names(args.levels)] for word in LABELS.values()}
    print(pd.DataFrame(columns, index=names(args.levels)).to_string())
    print(f"{len(table)} patches sorted; wrote {out / 'hard.csv'}")
    return 0


def grade(table: pd.DataFrame, args) -> dict[str, str]:
    """Fill in the level of every hard patch; why they are quantiles and no components, of the labels where they are."""
    quantiles = {}
    for label, word in LABELS.items():
        hard = (table["label"] == label) & (table["verdict"] == "hard")
        rates, distances = (table.loc[hard, name].to_numpy() for name in ("forget_rate", "centroid_distance"))
        table.loc[hard, "level"], reason = difficulty_levels(rates, distances, args.levels, args.seed)
        if not hard.any():
            print(
                f"{word}: no hard patch: none of {(table['label'] == label).sum()} was unclean in more than "
                f"HARD_SHARE {args.hard_share:g} of its epochs without being noisy (NOISY_SHARE {args.noisy_share:g})"
            )
        elif reason:
            quantiles[word] = reason
            print(f"{word}: levels of the {hard.sum()} hard patches by quantiles: {reason}")
    return quantiles


def names(levels: int) -> list[str]:
    """What a patch can be, from the easiest to the worst."""
    return ["clean", *(f"hard, level {level}" for level in range(levels)), *VERDICTS[2:]]


def grouped(table: pd.DataFrame, levels: int) -> dict[tuple[int, str], pd.DataFrame]:
    """The rows of hard.csv by label and `names`, empty groups too."""
    name = table["verdict"].where(table["verdict"] != "hard", "hard, level " + table["level"].astype(str))
    return {(label, one): table[(table["label"] == label) & (name == one)] for label in LABELS for one in names(levels)}


def sheet_groups(groups: dict[tuple[int, str], pd.DataFrame], args) -> list[tuple]:
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
    run_script(main, args)
