"""Stage 7 of 9: keep the clean patches and the hard ones whose level was validated.

Reads the memory units of stage 4, the verdicts of stage 5 and the validation of stage 6.
Writes OUT/SCL.csv (patch, label, level and hardness of every patch that stays), balance.csv (what became of the patches
of each label) and clus_scl/run.json.
"""

from dasc.flags import Share, read_flags

# Edit here, or override one run with the flag of the same name.
MEMORY = "results/DMU/memory.csv"  # memory units of stage 4
HARD = "results/DMU/hard.csv"  # verdicts and levels of stage 5
CHECKED = "results/DMU_hard/checked.csv"  # validation of stage 6
OUT = "results/DMU_hard"  # folder to write
KEEP_SHARE: Share = 0.5  # a hard patch stays when its level was predicted right in at least this share of the epochs

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

from pathlib import Path

import numpy as np
import pandas as pd

from dasc.data.tables import LABELS, SCL, join_by_patch, levels_of, read_checked, read_hard, read_memory, write_table
from dasc.errors import InputError
from dasc.files import write_csv
from dasc.model.difficulty import validated
from dasc.run import record_run, run_script

REASONS = ["noisy", "never_learned", "failed_validation"]  # why a patch is dropped


def main(args) -> int:
    memory_path, hard_path, checked_path, out = map(Path, (args.memory, args.hard, args.checked, args.out))
    memory = read_memory(memory_path)
    table = join_by_patch(memory, read_hard(hard_path), memory_path, hard_path)
    hard = table["verdict"] == "hard"
    levels = levels_of(table, hard)
    checked = read_checked(checked_path)
    checked = join_by_patch(table.loc[hard, ["patch", "label", "level"]], checked, hard_path, checked_path)
    passed = checked.loc[validated(checked["seen"], checked["correct"], args.keep_share), "patch"]

    table["level"] = table["level"].where(table["verdict"] != "clean", levels)
    failed = hard & ~table["patch"].isin(passed)
    kept = table[table["level"].notna() & ~failed].astype({"level": int})
    names = [f"level_{number}" for number in range(levels)] + ["clean"]
    fates = [table["verdict"] == "noisy", table["verdict"] == "dropped", failed]
    fates += [table["level"] == number for number in range(levels + 1)]
    balance = balance_sheet(table["label"], np.select(fates, REASONS + names, ""), names)
    print(balance.to_string(index=False))
    check_remain(balance, hard_path)
    write_table(out / "SCL.csv", kept, SCL)
    write_csv(out / "balance.csv", balance)
    inputs = {memory_path: len(memory), hard_path: len(table), checked_path: len(checked)}
    record_run(out / "clus_scl", args, inputs=inputs, balance=balance.to_dict("records"))  # OUT/run.json is stage 6's
    print(f"{len(passed)} of {len(checked)} hard patches keep their level")
    print(f"{len(kept)} of {len(table)} patches stay; wrote {out / 'SCL.csv'}")
    return 0


def balance_sheet(labels: pd.Series, fate: np.ndarray, names: list[str]) -> pd.DataFrame:
    """One row per label: patches that came in, dropped for each reason, that remain, and at which level."""
    rows = []
    for label, word in LABELS.items():
        counts = {name: int(((labels == label) & (fate == name)).sum()) for name in REASONS + names}
        kept = {name: counts[name] for name in names}
        dropped = {name: counts[name] for name in REASONS}
        came_in = int((labels == label).sum())
        rows.append({"label": word, "came_in": came_in, **dropped, "remain": sum(kept.values()), **kept})
    return pd.DataFrame(rows)


def check_remain(balance: pd.DataFrame, path: Path) -> None:
    """Raise InputError where no patch of a label remains, with where they went."""
    for row in balance.itertuples():
        if not row.remain:
            raise InputError(
                f"{path}: no {row.label} patch stays: of {row.came_in} that came in {row.noisy} are noisy, "
                f"{row.never_learned} were never learned, {row.failed_validation} failed validation; raise NOISY_SHARE "
                "of clus_hard.py (it drops the noisy) or lower KEEP_SHARE of clus_scl.py (it validates)"
            )


if __name__ == "__main__":
    run_script(main, args)
