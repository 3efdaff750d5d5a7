"""Stage 7 of 9: keep the clean patches and the hard ones whose level was validated.

Reads the memory units of stage 4, the verdicts of stage 5 and the validation of stage 6.
Writes OUT/SCL.csv (patch, label, level of every patch that stays; a clean one has level LEVELS), balance.csv (what
became of the patches of each label) and clus_scl/run.json.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from dasc.data.tables import LABELS
from dasc.errors import InputError
from dasc.files import write_csv
from dasc.model.difficulty import join_by_patch, read_checked, read_hard, read_memory, validated
from dasc.run import positive, record_run, run_script

# Edit here, or override one run with the flag of the same name.
MEMORY = "results/DMU/memory.csv"  # memory units of stage 4
HARD = "results/DMU/hard.csv"  # verdicts and levels of stage 5
CHECKED = "results/DMU_hard/checked.csv"  # validation of stage 6
OUT = "results/DMU_hard"  # folder to write
KEEP_SHARE = 0.5  # a hard patch stays when its level was predicted right in at least this share of the epochs
LEVELS = 3  # levels of difficulty, as in clus_hard.py; clean patches get the next one


def build_parser() -> argparse.ArgumentParser:
    """Flags: the constants above in lower case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default=MEMORY, help="memory.csv of stage 4")
    parser.add_argument("--hard", default=HARD, help="hard.csv of stage 5")
    parser.add_argument("--checked", default=CHECKED, help="checked.csv of stage 6")
    parser.add_argument("--out", default=OUT, help="folder to write")
    parser.add_argument("--keep_share", type=float, default=KEEP_SHARE, help="share of right levels that keeps a patch")
    parser.add_argument("--levels", type=positive, default=LEVELS, help="levels of difficulty, as in clus_hard.py")
    return parser


def main(args: argparse.Namespace) -> int:
    memory_path, hard_path, checked_path, out = map(Path, (args.memory, args.hard, args.checked, args.out))
    memory = read_memory(memory_path)
    table = join_by_patch(memory, read_hard(hard_path, args.levels), memory_path, hard_path)
    hard = table.loc[table["verdict"] == "hard", ["patch", "label", "level"]]
    checked = join_by_patch(hard, read_checked(checked_path), hard_path, checked_path)
    passed = checked.loc[validated(checked["seen"], checked["correct"], args.keep_share), "patch"]

    level = table["level"].where(table["verdict"] != "clean", args.levels)
    failed = (table["verdict"] == "hard") & ~table["patch"].isin(passed)
    stays = level.notna() & ~failed
    names = [f"level_{number}" for number in range(args.levels)] + ["clean"]
    reasons = [table["verdict"] == "noisy", table["verdict"] == "dropped", failed]
    reason_names = ["noisy", "never_learned", "failed_validation"]
    fate = np.select([*reasons, *(level == number for number in range(args.levels + 1))], [*reason_names, *names], "")
    balance = balance_sheet(table["label"], fate, reason_names, names)
    print(balance.to_string(index=False))
    for row in balance.itertuples():
        if not row.remain:
            raise InputError(
                f"{hard_path}: no {row.label} patch stays: of {row.came_in} that came in {row.noisy} are noisy, "
                f"{row.never_learned} were never learned, {row.failed_validation} failed validation; raise NOISY_SHARE "
                "of clus_hard.py (it drops the noisy) or lower KEEP_SHARE of clus_scl.py (it validates)"
            )
    write_csv(out / "SCL.csv", table.loc[stays, ["patch", "label"]].assign(level=level[stays].astype(int)))
    write_csv(out / "balance.csv", balance)
    inputs = {memory_path: len(memory), hard_path: len(table), checked_path: len(checked)}
    record_run(out / "clus_scl", args, inputs=inputs, balance=balance.to_dict("records"))  # OUT/run.json is stage 6's
    print(f"{stays.sum()} of {len(table)} patches stay; wrote {out / 'SCL.csv'}")
    return 0


def balance_sheet(labels: pd.Series, fate: np.ndarray, reasons: list[str], names: list[str]) -> pd.DataFrame:
    """One row per label: patches that came in, dropped for each reason, that remain, and at which level."""
    rows = []
    for label, word in LABELS.items():
        counts = {name: int(((labels == label) & (fate == name)).sum()) for name in reasons + names}
        remain = sum(counts[name] for name in names)
        kept = {name: counts[name] for name in names}
        dropped = {name: counts[name] for name in reasons}
        rows.append({"label": word, "came_in": int((labels == label).sum()), **dropped, "remain": remain, **kept})
    return pd.DataFrame(rows)


if __name__ == "__main__":
    run_script(main, build_parser().parse_args())
