"""The documents keep to what a reader can take: short, linked, and no figure that its source does not give."""

import importlib.util
import re
import subprocess

import pandas as pd
import pytest
from pipeline import ROOT, marked_commands

LISTED = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True).stdout.split()
DOCUMENTS = [ROOT / name for name in LISTED] or sorted(ROOT.glob("[a-zA-Z]*/**/*.md"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in (link for link in links if not link.startswith(("http", "mailto"))):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lines_are_short(path):
    if path.name == "log.md":
        pytest.skip("entries of the log are never edited again")
    assert not [line for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 120]


def test_readme_is_short_and_names_no_commit():
    assert len(README.splitlines()) <= 180
    assert not [word for word in re.findall(r"`([0-9a-f]{7,40})`", README) if re.search(r"\d", word)]


def test_commands_name_scripts_and_flags_that_exist():
    predict = ROOT / "docs/predict.md"
    for section, *path in (["predict"], ["train"], ["stages"], ["weak"], ["first look", predict]):
        commands = marked_commands(section, *path)
        assert commands
        for command in commands:
            script, *words = command.split("#")[0].split()
            source = (ROOT / script).read_text(encoding="utf-8")
            for flag in (word for word in words if word.startswith("--")):
                assert re.search(rf"^{flag[2:].upper()}\b", source, flags=re.MULTILINE), f"{script} {flag}"


def test_results_are_those_of_their_table():
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs/make_results.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    table, votes = pd.read_csv(ROOT / "docs/results.csv", dtype={"commit": str}), pd.read_csv(ROOT / "docs/votes.csv")
    assert script.results(table, votes) == (ROOT / "docs/results.md").read_text(encoding="utf-8")
    table.loc[table["tp"].notna().idxmax(), "f1"] += 0.01
    with pytest.raises(SystemExit, match="by its counts"):
        script.results(table, votes)
