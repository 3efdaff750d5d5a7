"""The README's commands, in its order and with its paths, lightened so that they end in seconds."""

import re
import shlex

from pipeline import LIGHT, ROOT, check_run_json, succeed

LIGHTER = {
    "pre/make_sample.py": ["--size_px", 500, "--mitoses", 4, "--imposters", 4],
    "pre/cut_patch_2.py": ["--patch_size", 64],
    "NS/sigle.py": [*LIGHT, "--epochs", 1],
    "DMU/main.py": [*LIGHT, "--epochs", 3, "--count_after", 1, "--warmup", 0],
    "clus_hard.py": [],
    "DMU/hard_main.py": [*LIGHT, "--epochs", 2, "--seen_after", 0],
    "clus_scl.py": [],
    "DMU/hard_scl_main.py": [*LIGHT, "--epochs", 2, "--warmup", 1, "--subclasses", 2],
    "predict.py": ["--device", "cpu"],
}

RUNS = ["data/sample", "data/patches", "results/NS", "data/patches_ns", "results/DMU", "results/DMU/clus_hard"]
RUNS += ["results/DMU_hard", "results/DMU_hard/clus_scl", "results/DMU_scl", "results/NS_searched", "results/predict"]


def commands() -> list[str]:
    """The nine commands of the table, after stage 0, and the two lines that follow the table."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## The stages") : readme.index("ImageNet weights come")]
    table = [row for row in section.splitlines() if row.startswith("| ")]
    staged = [found for row in table for found in re.findall(r"`python ([^`]+)`", row)]
    after = re.findall(r"^python (.+)$", section, flags=re.MULTILINE)
    return ["pre/make_sample.py", *staged, *after]


def test_readme_commands_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = commands()
    assert typed[:4] == [
        "pre/make_sample.py",
        "pre/cut_patch_2.py",
        "NS/sigle.py",
        "pre/cut_patch_2.py --fp_mdoel True",
    ]
    assert typed[4:8] == ["DMU/main.py", "clus_hard.py", "DMU/hard_main.py", "clus_scl.py"]
    assert typed[8:10] == ["DMU/hard_scl_main.py", "predict.py"]
    for command in typed:
        script, *flags = shlex.split(command)
        succeed(script, *flags, *LIGHTER[script])
    for name in RUNS:
        check_run_json(tmp_path / name / "run.json", None if name.endswith("clus_scl") else 0)
    assert (tmp_path / "results/DMU_scl/subclasses.csv").is_file()
    for made in ("data/patches/patches.csv", "data/patches_ns/patches.csv", "results/NS_searched/model.pt"):
        assert (tmp_path / made).is_file()
    assert (tmp_path / "results/predict/metrics.json").is_file()
    assert list((tmp_path / "results/predict").glob("*/overlay.png"))
