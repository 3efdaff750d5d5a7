"""What the tests of the scripts share: calling one as a user does, in this process, and a small finished run."""

import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from dasc.files import sha256
from dasc.run import PACKAGES, project_commit

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("*.py", "pre/*.py", "NS/*.py", "DMU/*.py", "dasc/**/*.py")
SOURCES = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]  # what a user runs
LIGHT = [
    "--backbone",
    "mobilenetv3_small_100",
    "--pretrained",
    "False",
    "--lr",
    "1e-3",
    "--device",
    "cpu",
    "--batch_size",
    "32",
]
LIGHTER = {  # the README's commands, so that they end in seconds
    "pre/make_sample.py": ["--size_px", 500, "--mitoses", 4, "--imposters", 4],
    "pre/cut_patch_2.py": ["--patch_size", 64, "--search_above", 0.2],
    "NS/sigle.py": [*LIGHT, "--epochs", 2],
    "DMU/main.py": [*LIGHT, "--epochs", 3],
    "clus_hard.py": [],
    "DMU/hard_main.py": [*LIGHT, "--epochs", 2],
    "clus_scl.py": [],
    "DMU/hard_scl_main.py": [*LIGHT, "--epochs", 2, "--contrast_labels_share", 0.5, "--subclasses", 2],
    "predict.py": ["--device", "cpu"],
}


class Done(NamedTuple):
    status: int
    out: str
    err: str


def call(script: str, *flags: object) -> Done:
    """Run a script of the project with these flags: exit status, standard output and standard error.

    A flag of a test takes the place of the same flag in a list that tests share: no script takes one twice.
    """
    out, err, status = io.StringIO(), io.StringIO(), 0
    argv, sys.argv = sys.argv, [str(ROOT / script), *last_of_each([str(flag) for flag in flags])]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leave:
        status = leave.code or 0
    finally:
        sys.argv = argv
    return Done(status, out.getvalue(), err.getvalue())


def last_of_each(words: list[str]) -> list[str]:
    """Flags with their values, of each flag the last."""
    groups: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0]
            groups[name] = []
        groups.setdefault(name, []).append(word)
    return [word for group in groups.values() for word in group]


def succeed(script: str, *flags: object) -> Done:
    """As `call`, for a run that must end well."""
    done = call(script, *flags)
    assert done.status == 0, f"{script} {flags}\n{done.out}\n{done.err}"
    return done


def check_run_json(path: Path, seed: int | None = 0) -> dict:
    """The content of a run.json, which must say how the results beside it were made."""
    run = json.loads(path.read_text(encoding="utf-8"))
    assert run["command"] and run["arguments"] and run["commit"] == project_commit()
    assert run["arguments"].get("seed") == seed
    assert run["started"] <= run["finished"] and run["seconds"] >= 0 and run["device"] and run["system"]
    assert all(run["versions"][name] for name in ("python", *PACKAGES))
    for name, one in run["inputs"].items():
        assert one["count"] >= 0 and (one["sha256"] == sha256(name) if Path(name).is_file() else not one["sha256"])
    return run


def fails(script: str, *flags: object, says: str) -> Done:
    """As `call`, for a run that must end with one line of error that holds `says`."""
    done = call(script, *flags)
    last = done.err.strip().splitlines()[-1]
    assert done.status != 0, done.out
    assert last.startswith("error: ") and says in last, done.err
    return done


def marked_commands(name: str, path: Path = ROOT / "README.md") -> list[str]:
    """The commands between `<!-- commands: NAME -->` and `<!-- end -->`, in their order, without `python `."""
    section = path.read_text(encoding="utf-8").split(f"<!-- commands: {name} -->")[1].split("<!-- end -->")[0]
    section = re.sub(r"\\\n\s*", "", section)  # a command that goes on in the next line
    return [found.strip() for found in re.findall(r"(?:^|`)python ([^`\n]+)", section, flags=re.MULTILINE)]


def readme_commands() -> list[tuple[str, str, list[object]]]:
    """The README's stages, the sample before them and the shorter way: as typed, the script, its flags lightened."""
    commands = []
    for typed in marked_commands("stages"):
        script, *flags = shlex.split(typed, comments=True)
        commands.append((typed, script, [*flags, *LIGHTER[script]]))
    return commands
