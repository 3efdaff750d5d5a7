"""The house keeps its rules: constants are flags, imports point one way, scripts are short, names exist."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dasc.flags import build_parser, settings

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    path
    for pattern in ("*.py", "pre/*.py", "NS/*.py", "DMU/*.py")
    for path in sorted(ROOT.glob(pattern))
    if "read_flags" in path.read_text(encoding="utf-8")
]


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT))
    spec.loader.exec_module(module)
    return module


def parser_of(path: Path):
    return build_parser(vars(load(path)))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_stage_script_is_found():
    names = {path.relative_to(ROOT).as_posix() for path in SCRIPTS}
    assert {"pre/make_sample.py", "pre/cut_patch_2.py", "NS/sigle.py", "predict.py"} <= names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_flags_are_the_constants(path):
    """Every constant of the block is a flag with its default, and its comment is the help."""
    script = load(path)
    text = path.read_text(encoding="utf-8")
    block = text[text.index("# Edit here") :].split("\n\n")[0]
    constants = re.findall(r"^([A-Z][A-Z0-9_]*)(?:: [^=]+)? = ", block, flags=re.MULTILINE)
    flags = vars(build_parser(vars(script)).parse_args([]))
    assert constants and list(flags) == [name.lower() for name in constants]
    assert flags == {name.lower(): getattr(script, name) for name in constants}
    help_text = " ".join(build_parser(vars(script)).format_help().split())
    for name, _, comment in settings(text):
        assert comment, f"{name} has no comment"
        assert f"{' '.join(comment.split())} (default: " in help_text.replace("- ", "-") or comment in help_text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_counts_are_whole_numbers_of_one_or_more(path, capsys):
    parser = parser_of(path)
    counts = {"epochs", "batch_size", "workers", "patch_size", "k", "levels", "subclasses"}
    for flag in counts & vars(parser.parse_args([])).keys():
        for text in ("0", "-1", "1.5", "many"):
            with pytest.raises(SystemExit) as left:
                parser.parse_args([f"--{flag}={text}"])
            assert left.value.code != 0 and f"argument --{flag}: expected a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short(path):
    """A reader follows `main` on one screen."""
    functions = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert functions["main"] <= 45


def test_no_script_imports_a_script():
    scripts = {"predict", "clus_hard", "clus_scl", "pre", "NS", "DMU"}
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("pre/*.py"),
        *ROOT.glob("NS/*.py"),
        *ROOT.glob("DMU/*.py"),
        *ROOT.glob("dasc/**/*.py"),
    ]:
        assert not {name.split(".")[0] for name in imports(path)} & scripts, path


ROOMS = ["errors", "files", "flags", "run", "images", "judge", "data", "model", "detect", "report", "weak", "review"]


def room_of(module: str) -> str:
    return module.split(".")[1]


def test_a_room_imports_only_rooms_before_it():
    """The rooms of dasc stand in the order of the data's way; within a room no module imports itself in a circle."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.glob("dasc/**/[a-z]*.py")}
    assert {room_of(name) for name in modules} == set(ROOMS)
    needs = {name: imports(path) & modules.keys() for name, path in modules.items()}
    for name, below in needs.items():
        later = [other for other in below if ROOMS.index(room_of(other)) > ROOMS.index(room_of(name))]
        assert not later, f"{name} imports {later}"
    while needs:
        ground = {name for name, below in needs.items() if not below & needs.keys()}
        assert ground, f"a circle among {sorted(needs)}"
        needs = {name: below for name, below in needs.items() if name not in ground}


EVERY_HELP = """
import runpy, sys
path = sys.path[1:]
for script in sys.argv[1:]:
    sys.path[:] = [script.rpartition("/")[0], *path]  # as Python has it when it is given the script
    for name in [name for name in sys.modules if name.partition(".")[0] == "dasc"]:
        del sys.modules[name]
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as leave:
        assert leave.code == 0, script
"""


def test_help_works_from_anywhere(tmp_path):
    """Every script finds dasc by itself; one interpreter for all, since importing torch takes most of the time."""
    command = [sys.executable, "-c", EVERY_HELP, *(path.as_posix() for path in SCRIPTS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    helps = done.stdout.split("usage: ")[1:]
    assert [text.split()[0] for text in helps] == [path.name for path in SCRIPTS]
    assert all("--out" in text for text in helps)


def test_readme_names_only_what_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"python ([\w/]+\.py)", readme))
    assert named and not {name for name in named if not (ROOT / name).is_file()}
