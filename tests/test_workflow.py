"""workflow/Snakefile calls the README's commands, in their order; Snakemake, where it is installed, plans and runs it.

Snakemake is in no requirements file: with what it needs, it takes longer to install than these tests are worth. They
run it where the PATH has a `snakemake`, such as that of an environment of its own (docs/cluster.md).
"""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml  # timm brings it along
from pipeline import ROOT, marked_commands

CLUSTER = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
MINE, PROFILE = re.findall(r"```yaml\n(.+?)```", CLUSTER, re.DOTALL)
CONFIG = yaml.safe_load((ROOT / "workflow/config.yaml").read_text(encoding="utf-8"))
SNAKEFILE = (ROOT / "workflow/Snakefile").read_text(encoding="utf-8")
RULES = re.findall(r"^rule (\w+):\n(?:.+\n|\n(?=    ))*?    shell:\n((?: {8}.+\n)+)", SNAKEFILE, re.MULTILINE)
CALLED = {rule: "".join(re.findall(r'"([^"]*)"', text)).removeprefix("{PYTHON} ") for rule, text in RULES}
STAGES = ["sample", "cut", "NS", "cut_ns", "DMU", "clus_hard", "DMU_hard", "clus_scl", "DMU_scl"]
PREDICTION = ["predict_shard", "predict_shard", "predict"]


def snakemake(folder, *words: str) -> subprocess.CompletedProcess:
    """Run Snakemake in a folder that sees the scripts, as it is run in the project's."""
    program = shutil.which("snakemake")
    if program is None:
        pytest.skip("needs snakemake")
    for name in ("pre", "NS", "DMU", "dasc", "workflow", "clus_hard.py", "clus_scl.py", "predict.py"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return subprocess.run([program, "--cores", "1", *words], cwd=folder, capture_output=True, text=True)


def planned(folder, *words: str) -> tuple[list[str], list[str]]:
    """The rules of a dry run, in their order, and their commands."""
    done = snakemake(folder, "--dry-run", "--printshellcmds", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    out = done.stdout + done.stderr
    return re.findall(r"^(?:local)?rule (\w+):", out, re.MULTILINE), re.findall(
        r"^Shell command: (.*python.+)", out, re.MULTILINE
    )


def check_flags(script: str, words: list[str]) -> None:
    """Fail where a flag is none of the script's, or is given twice, which every script refuses."""
    source = (ROOT / script).read_text(encoding="utf-8")
    flags = [word for word in words if word.startswith("--")]
    assert len(flags) == len(set(flags)), f"{script} {flags}"
    for flag in flags:
        assert re.search(rf"^{flag[2:].upper()}\b", source, re.MULTILINE), f"{script} {flag}"


def test_every_command_of_the_stage_table_is_called_by_a_rule():
    assert [*CALLED] == [*STAGES[:4], "NS_searched", *STAGES[4:], "predict_shard", "predict"]
    *stages, shorter, _ = marked_commands("stages")
    for typed, rule in zip([*stages, shorter], [*STAGES, "predict", "NS_searched"], strict=True):
        assert CALLED[rule].startswith(f"{typed.split(' --manifest')[0]} "), f"{typed}: {CALLED[rule]}"
    for command in CALLED.values():
        script, *words = command.split()
        check_flags(script, words)


def test_what_a_stage_writes_is_no_output_but_its_log():
    """Snakemake removes outputs before a rule runs: patches.csv, by which a folder is known for ours, and last.pt."""
    outputs = re.findall(r"output:\n +(.+),\n", SNAKEFILE)
    assert len(outputs) == len(CALLED)
    assert all("/run.json" in output or "touch(" in output for output in outputs)


@pytest.mark.parametrize("flags", [CONFIG["light"], yaml.safe_load(MINE)["flags"]], ids=["sample", "docs"])
def test_flags_of_the_config_are_those_of_the_scripts(flags):
    assert {*flags} <= {*CONFIG["flags"]}
    for rule, command in CALLED.items():
        stages = ["cut"] if rule.startswith("cut") else ["train", rule] if "until_done" in dict(RULES)[rule] else [rule]
        check_flags(command.split()[0], [word for stage in stages for word in flags.get(stage, "").split()])


def test_a_dry_run_lists_the_stages_in_their_order(tmp_path):
    rules, commands = planned(tmp_path)
    assert rules == [*STAGES, *PREDICTION, "all"]
    assert all("--resume" in command for command in commands if "last.pt" in command)
    for command in commands:
        script, *words = shlex.split(command.partition(" && rm ")[0])[1:]
        check_flags(script, [word for word in words if word != "--resume)"])


def test_what_is_not_needed_is_not_run(tmp_path):
    shorter, commands = planned(tmp_path, "--config", "model=NS_searched", "gpu=1", "python=python3.12")
    assert shorter == ["sample", "cut", "NS", "cut_ns", "NS_searched", *PREDICTION, "all"]
    assert all("--device cuda" in command for command in commands[2:])
    assert all(command.startswith("python3.12 ") for command in commands)
    (tmp_path / "my model.pt").touch()
    rules, commands = planned(
        tmp_path, "--config", "model=my model.pt", "images=['a slide', b]", "shards=3", "results=out"
    )
    assert rules == ["predict_shard", "predict_shard", "predict_shard", "predict", "all"]
    assert all("--model_path 'my model.pt' --out out/predict" in command for command in commands)
    assert all("--images 'a slide' b" in command for command in commands)


def test_what_the_documentation_shows_is_planned(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/config.yaml").write_text(PROFILE.replace("executor: slurm", "executor: local"))
    (tmp_path / "my.yaml").write_text(MINE.replace("/scratch/me/", f"{tmp_path}/"))
    rules, commands = planned(tmp_path, "--profile", "slurm", "--configfile", "my.yaml")
    assert rules == ["cut", "NS", "cut_ns", "NS_searched", *["predict_shard"] * 8, "predict", "all"]
    assert all(command.startswith("/project/DASC/.venv/bin/python ") for command in commands)


def test_a_wrong_config_is_refused(tmp_path):
    for config, says in {
        "shard=2": "shard: no key of workflow/config.yaml",
        "flags={'Ns': ''}": "flags: Ns: no key of workflow/config.yaml",
        "shards=none": "shards none: expected a whole number of 1 or more",
    }.items():
        done = snakemake(tmp_path, "--dry-run", "--config", config)
        assert done.returncode == 1 and says in done.stdout + done.stderr
    done = snakemake(tmp_path, "--config", "dataset=nonsense", f"python={sys.executable}")
    assert done.returncode == 1 and "--dataset: invalid choice: 'nonsense'" in done.stdout + done.stderr
    assert not (tmp_path / "data/patches/patches.csv").exists() and not (tmp_path / "results").exists()
