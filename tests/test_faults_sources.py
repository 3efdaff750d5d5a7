"""What holds of every line: files appear whole, checkpoints run no code, holes are kept out, faults have tests."""

import ast
import re

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from pipeline import ROOT, SOURCES

# Calls that write a file, each with the place of its path: -1 is what it is called on, 0 its first argument.
WRITERS = {"write_text": -1, "write_bytes": -1, "savefig": 0, "imwrite": 0, "to_csv": 0, "to_json": 0, "tofile": 0}
WRITERS |= {"save": 1, "savez": 0, "savetxt": 0, "copyfile": 1, "copy2": 1, "copytree": 1, "move": 1, "dump": 1}
# Writers that need no `with replacing`: file, function, why.
ALLOWED = {
    ("dasc/files.py", "replacing"): "opened to be synced",
    ("dasc/files.py", "write_csv"): "to_csv without a path gives the text that write_text writes",
    ("dasc/run.py", "_locked"): "the lock names its process; it is no output",
    ("dasc/run.py", "_unheard"): "the null device",
    ("dasc/model/checkpoint.py", "save_checkpoint"): "torch.save into memory",
    ("dasc/data/patches.py", "write_patch"): "into a folder that replaces another as a whole",
    ("dasc/data/patches.py", "copy_patches"): "into a folder that replaces another as a whole",
    ("dasc/weak/pool.py", "_append"): "records are appended, each with its key; half of one is cut off by the next run",
    ("dasc/review/answers.py", "_append"): "one row per key; half of one is cut off when it fails or by the next run",
    ("dasc/review/answers.py", "_cut"): "cuts off half a row that a killed run left",
    ("pre/make_sample.py", "draw_case"): "into a folder that replaces another as a whole",
    ("pre/import_annotations.py", "link"): "into a folder that replaces another as a whole",
}
# The functions above that write into a folder in the making, and who may call them.
CALLERS = {
    "write_patch": {"pre/cut_patch_2.py", "pre/split_patches.py", "NS/weak_mining.py"},
    "copy_patches": {"pre/split_patches.py", "NS/weak_mining.py"},
    "draw_case": {"pre/make_sample.py"},
    "link": {"pre/import_annotations.py"},
}


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def called(node):
    """The last word of what is called: write_text of path.write_text(...)."""
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def writes(node):
    """Whether a call opens a file for writing or writes one."""
    if called(node) == "open":
        modes = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
        return any(
            isinstance(mode, ast.Constant) and re.fullmatch("[rbt]*[wax+][wabxt+]*", str(mode.value)) for mode in modes
        )
    return called(node) in WRITERS and isinstance(node.func, ast.Attribute)  # run.write_text(path, text) is held itself


def target(node):
    place = WRITERS.get(called(node), -1)
    if place < 0:
        return node.func.value if isinstance(node.func, ast.Attribute) else None
    return node.args[place] if len(node.args) > place else None


def open_writers(tree):
    """Function and line of every call that writes to a path which no `with replacing(...) as path` gave."""
    found = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        temporary = {
            item.optional_vars.id
            for block in ast.walk(function)
            if isinstance(block, ast.With)
            for item in block.items
            if isinstance(item.context_expr, ast.Call) and called(item.context_expr) == "replacing"
        }
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and writes(node):
                path = target(node)
                if not (isinstance(path, ast.Name) and path.id in temporary):
                    found.append((function.name, node.lineno))
    return found


def test_every_file_appears_whole_or_not_at_all():
    found = {(name_of(path), function) for path in SOURCES for function, _ in open_writers(parse(path))}
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    "line",
    [
        "path.write_text('x')",
        "figure.savefig(path)",
        "table.to_csv(path)",
        "cv2.imwrite(path, image)",
        "torch.save(content, path)",
        "open(path, 'w').write('x')",
        "path.open('ab')",
        "path.open(mode='r+b')",
        "shutil.copyfile(one, path)",
    ],
)
def test_a_writer_is_seen(line):
    assert open_writers(ast.parse(f"def main():\n    {line}"))
    held = line.replace("path", "temporary")
    wrapped = f"def main():\n    with replacing(path) as temporary:\n        {held}"
    assert bool(open_writers(ast.parse(wrapped))) == ("open(temporary" in held)  # of open() the file is what counts


def test_what_is_written_into_a_folder_in_the_making_is_written_nowhere_else():
    for function, callers in CALLERS.items():
        found = {
            name_of(path)
            for path in SOURCES
            for node in ast.walk(parse(path))
            if isinstance(node, ast.Call) and function in (called(node), *(getattr(arg, "id", "") for arg in node.args))
        }
        assert found == callers, function
    for script in set().union(*CALLERS.values()) - {"pre/cut_patch_2.py"}:
        assert "with replacing_folder(" in (ROOT / script).read_text(encoding="utf-8")
    assert "put_in_place(partial, out)" in (ROOT / "pre/cut_patch_2.py").read_text(encoding="utf-8")


def test_nothing_from_elsewhere_runs_code():
    loads = 0
    for path in SOURCES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"pickle", "dill", "joblib", "shelve", "marshal", "yaml"}, path
            if not isinstance(node, ast.Call):
                continue
            given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            assert called(node) not in ("read_pickle", "system", "popen"), path
            assert getattr(node.func, "id", "") not in ("eval", "exec", "compile", "__import__"), path
            assert not given.get("shell") and not given.get("allow_pickle"), path
            if called(node) == "load" and getattr(node.func.value, "id", "") == "torch":
                loads += 1
                assert given.get("weights_only") is True and given.get("map_location") == "cpu", path
    assert loads == 1


def test_opencv_is_given_no_file_but_our_own_png():
    """Its JPEG2000 and its silent ways with broken JPEG, 16 bits and alpha are met by never asking it."""
    found = {
        (name_of(path), called(node))
        for path in SOURCES
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and called(node) in ("imread", "imdecode", "imreadmulti", "VideoCapture")
    }
    assert found == {
        ("dasc/data/patches.py", "imdecode"),
        ("dasc/data/synthetic.py", "imdecode"),
    }  # the sample's own JPEG


FLOORS = {  # below them known holes
    "torch": "2.10",
    "opencv-python-headless": "4.12.0.88",
    "tqdm": "4.66.3",
    "pillow": "13.0.0",
    "openslide-bin": "4.0.1.1",
    "filelock": "4.0.0",
    "jinja2": "3.1.6",
}


def requirements(name):
    """Name, specifier and reason of every line of a file of requirements or constraints."""
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        text, _, reason = line.partition("#")
        if text.strip() and not text.startswith("-r"):
            requirement = Requirement(text.strip())
            yield requirement.name.lower(), requirement.specifier, reason.strip()


def test_versions_with_known_holes_are_kept_out_and_the_reason_is_said():
    lines = {name: (specifier, reason) for name, specifier, reason in requirements("requirements.txt")}
    assert {name for name, (_, reason) in lines.items() if "known holes" in reason} == FLOORS.keys()
    for name, floor in FLOORS.items():
        specifier, _ = lines[name]
        assert specifier.contains(floor) and not specifier.contains(just_below(floor)), name


def test_the_lowest_versions_are_the_floors():
    """What `make test-lowest` tests is what requirements.txt allows; any other pin says why it is there."""
    floors = {}
    for name, specifier, _ in requirements("requirements.txt"):
        versions = [Version(part.version) for part in specifier if part.operator == ">="]
        assert len(versions) == len(specifier) <= 1, name
        floors[name] = versions[0] if versions else None
    pins = {}
    for name, specifier, reason in requirements("constraints-lowest.txt"):
        (pin,) = specifier
        assert pin.operator == "==" and (floors.get(name) or reason), name
        pins[name] = Version(pin.version)
    assert floors.keys() <= pins.keys()
    assert {name: pins[name] for name, floor in floors.items() if floor} == {n: f for n, f in floors.items() if f}


def just_below(floor):
    *front, last = Version(floor).release
    return f"{'.'.join(map(str, front))}.{last - 1}" if last else f"{front[0] - 1}.99"


def rows():
    """The faults of tests/README.md: each with its tests."""
    text = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    for fault, tests in re.findall(r"^\*\*(.+?)\*\*: .+?\n((?:- `.+`\n)*)", text, flags=re.MULTILINE):
        yield fault, re.findall(r"^- `(.+)`$", tests, flags=re.MULTILINE)


def test_every_fault_has_tests_that_exist():
    matrix = dict(rows())
    assert len(matrix) == 69
    for fault, tests in matrix.items():
        assert tests, fault
        for test in tests:
            path, name = test.split("::")
            tree = parse(ROOT / path)
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (fault, test)
