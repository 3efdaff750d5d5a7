"""A setting stands once: constants, their annotations and comments become flags."""

import subprocess
import sys

import pytest
from pipeline import ROOT

from dasc.data.readers import READERS
from dasc.flags import GONE, Layout, build_parser, get_args, read_flags

SCRIPT = '''"""Says 100 % of what it does."""
from typing import Literal
from dasc.flags import Amount, Count, Natural, NumberOrTable, Positive, Share, SomeShare
# Edit here, or override one run with the flag of the same name.
PLACE = ""  # folder to write
NAMES: list[str] = ["a", "b"]  # what to read
EPOCHS: Count = 25  # passes over all patches
MOVES: Natural = 3  # copies
WEIGHT: Amount = 0.1  # of a loss
RATE: Positive = 1e-4  # step
PART: Share = 0.5  # 50 % of it, or
# more
SOME: SomeShare = 1.0  # share that stays
VIEWS: Literal[1, 2, 4, 8] = 8  # turned views
UM_PER_PX: NumberOrTable = ""  # of all images
RESUME = False  # go on
SEED = 0  # of the draws

OTHER = 1  # no setting
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    namespace = {"__file__": str(path), "__doc__": "Says 100 % of what it does."}
    exec(SCRIPT, namespace)
    return namespace


def test_constants_are_the_defaults(script):
    args = vars(read_flags(script, []))
    assert args == {
        "place": "",
        "names": ["a", "b"],
        "epochs": 25,
        "moves": 3,
        "weight": 0.1,
        "rate": 1e-4,
        "part": 0.5,
        "some": 1.0,
        "views": 8,
        "um_per_px": "",
        "resume": False,
        "seed": 0,
    }


def test_an_edited_constant_is_the_default(script):
    script["EPOCHS"] = 7
    assert read_flags(script, []).epochs == 7


def test_help_shows_comment_and_default(script):
    text = " ".join(build_parser(script).format_help().split())
    assert "Says 100 % of what it does." in text
    assert "folder to write (default: empty)" in text and "what to read (default: a b)" in text
    assert "50 % of it, or more (default: 0.5)" in text and "turned views (default: 8)" in text
    assert "no setting" not in text


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--epochs", "3"], "epochs", 3),
        (["--moves", "0"], "moves", 0),
        (["--weight", "0"], "weight", 0.0),
        (["--rate=2"], "rate", 2.0),
        (["--part", "1"], "part", 1.0),
        (["--views", "2"], "views", 2),
        (["--resume"], "resume", True),
        (["--resume", "True"], "resume", True),
        (["--resume", "false"], "resume", False),
        (["--names", "x", "y"], "names", ["x", "y"]),
        (["--seed", "-4"], "seed", -4),
        (["--um_per_px", "0.25"], "um_per_px", "0.25"),
        (["--um_per_px", "a.csv"], "um_per_px", "a.csv"),
    ],
)
def test_flags_are_read(script, flags, name, value):
    assert getattr(read_flags(script, flags), name) == value


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--epochs", "0"], "expected a whole number of 1 or more, found '0'"),
        (["--epochs", "1.5"], "expected a whole number of 1 or more, found '1.5'"),
        (["--moves", "-1"], "expected a whole number of 0 or more"),
        (["--weight", "-0.1"], "expected a number of 0 or more"),
        (["--weight", "nan"], "expected a number of 0 or more"),
        (["--rate", "0"], "expected a number above 0"),
        (["--rate", "inf"], "expected a number above 0"),
        (["--part", "1.1"], "expected a number from 0 to 1"),
        (["--some", "0"], "expected a number above 0, to 1"),
        (["--seed", "x"], "expected a number, found 'x'"),
        (["--views", "3"], "invalid choice: 3"),
        (["--resume", "yes"], "expected True or False, found 'yes'"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--epochs", "3", "--seed", "1", "--epochs=4"], "--epochs is given 2 times; give it once"),
        (["--names", "x", "--names", "y"], "--names is given 2 times; give it once, with all that belongs to it"),
        (["--um_per_px", "-0.25"], "expected a number of 0 or more, or a CSV file, found '-0.25'"),
        (["--um_per_px", "nan"], "expected a number of 0 or more, or a CSV file, found 'nan'"),
    ],
)
def test_a_wrong_flag_is_refused(script, flags, says, capsys):
    with pytest.raises(SystemExit) as left:
        read_flags(script, flags)
    assert left.value.code != 0 and says in capsys.readouterr().err


@pytest.mark.parametrize("name", GONE)
def test_an_old_flag_names_what_is_in_its_place(script, name, capsys):
    with pytest.raises(SystemExit):
        read_flags(script, [f"--{name}", "1"])
    assert f"--{name} is now {GONE[name]}" in capsys.readouterr().err


def test_a_script_that_has_a_flag_of_an_old_name_takes_it():
    done = subprocess.run(
        [sys.executable, ROOT / "clus_scl.py", "--keep_share", "2"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode != 0 and "argument --keep_share: expected a number from 0 to 1" in done.stderr


@pytest.mark.parametrize(("text", "value"), [([], False), (["--fp_mdoel"], True), (["--fp_mdoel", "True"], True)])
def test_fp_mdoel(text, value):
    path = ROOT / "pre/cut_patch_2.py"
    namespace = {"__file__": str(path), "__name__": "cut_patch_2"}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    assert read_flags(namespace, text).fp_mdoel is value


def test_layouts_are_those_that_are_read():
    assert set(get_args(Layout)) == set(READERS)


def test_help_answers_before_the_slow_imports(tmp_path):
    """--help needs no package but Python's own: those that a script imports are made to fail."""
    for name in ("torch", "numpy", "pandas", "cv2"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported too early')")
    for script in ("predict.py", "NS/sigle.py", "DMU/main.py", "clus_hard.py", "pre/make_sample.py"):
        done = subprocess.run(
            [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
        )
        assert done.returncode == 0 and "--out" in done.stdout, done.stderr
