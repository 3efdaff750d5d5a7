"""A setting stands once: a constant at the top of a script, with its comment, is a flag with its default and its help.

A script holds its constants in one block that begins with MARK and ends with the first empty line. The flag has the
constant's name in lower case. Its type is the annotation (`EPOCHS: Count = 25`), or else the type of the value. A line
that holds nothing but a comment goes on with the help of the constant above it.
"""

import argparse
import ast
import builtins
import io
import math
import re
import sys
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

MARK = "# Edit here"


class Range(NamedTuple):
    """Which numbers a flag takes: from `low` (or above it) to `high`; `words` says so."""

    words: str
    low: float = -math.inf
    high: float = math.inf
    above: bool = False


Count = Annotated[int, Range("a whole number of 1 or more", 1)]
Natural = Annotated[int, Range("a whole number of 0 or more", 0)]
Amount = Annotated[float, Range("a number of 0 or more", 0)]
Positive = Annotated[float, Range("a number above 0", 0, above=True)]
Share = Annotated[float, Range("a number from 0 to 1", 0, 1)]
SomeShare = Annotated[float, Range("a number above 0, to 1", 0, 1, above=True)]
NumberOrTable = Annotated[str, Range("a number of 0 or more, or a CSV file", 0)]
Device = Literal["auto", "cpu", "cuda", "mps"]
Engine = Literal["auto", "torch", "openvino"]
Layout = Literal["sample", "midog", "mitos14", "tupac16", "tupac16_al", "table"]  # of a dataset: data/readers.py


class Shard(str):
    """Which of several runs that share their images this is: 2/3 is the second of three; empty: a run of its own."""

    def __new__(cls, text: str) -> "Shard":
        found = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", text)
        if text and not (found and 1 <= int(found[1]) <= int(found[2])):
            raise argparse.ArgumentTypeError(f"expected 1/3 for the first of three, up to 3/3, found {text!r}")
        return super().__new__(cls, f"{int(found[1])}/{int(found[2])}" if found else "")

    @property
    def number(self) -> int:
        """From 1."""
        return int(self.partition("/")[0])

    @property
    def of(self) -> int:
        return int(self.partition("/")[2])


# Flags of earlier versions and what stands in their place. A script that still has one of them takes it.
GONE = {
    "warmup": "--warmup_share in stage 4, --contrast_labels_share in stage 8: a share of EPOCHS",
    "count_after": "--count_after_share, a share of EPOCHS",
    "score_after": "--score_after_share, a share of EPOCHS",
    "seen_after": "--seen_after_share, a share of EPOCHS",
    "cluster_every": "--cluster_every_share, a share of EPOCHS",
    "levels": "a setting of clus_hard.py alone; hard.csv carries what later stages need",
    "keep_share": "a setting of clus_scl.py alone",
    "background": "--score_alignment",
    "average": "--ema",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as those of a run are."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; {self.prog} --help lists all flags\n")


def read_flags(script: dict[str, Any], argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of one run of a script: its constants, overridden by its flags. Leaves on --help and a wrong flag.

    script: the script's globals(). argv: the flags; None: those of the command line.
    """
    parser = build_parser(script)
    given = [word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv) if word.startswith("--")]
    for flag in given:
        if given.count(flag) > 1:  # argparse would take the last one and not say so
            parser.error(f"{flag} is given {given.count(flag)} times; give it once, with all that belongs to it")
    args, unknown = parser.parse_known_args(argv)
    for flag in unknown:
        name = flag.partition("=")[0].removeprefix("--")
        if flag.startswith("--") and name in GONE:
            parser.error(f"--{name} is now {GONE[name]}")
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args


def build_parser(script: dict[str, Any]) -> argparse.ArgumentParser:
    """The parser of a script with these globals(): a flag for every constant of its block."""
    parser = Parser(
        prog=Path(script["__file__"]).name,
        description=script["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --warmup must not pass for --warmup_share
    )
    for name, annotation, comment in settings(Path(script["__file__"]).read_text(encoding="utf-8")):
        value = script[name]
        kind = resolve(annotation, script) if annotation else type(value)
        shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        text = f"{comment} (default: {shown or 'empty'})".replace("%", "%%")
        parser.add_argument(f"--{name.lower()}", default=value, help=text, **options(kind))
    return parser


def settings(source: str) -> list[tuple[str, ast.expr | None, str]]:
    """The constants in the block of a script's source: name, annotation where there is one, comment."""
    first = source[: source.index(MARK)].count("\n") + 2
    lines = source.splitlines()
    last = next((number for number in range(first, len(lines)) if not lines[number - 1].strip()), len(lines) + 1)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {one.start[0]: one.string.lstrip("# ") for one in tokens if one.type == tokenize.COMMENT}
    nodes = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign | ast.AnnAssign) and first <= node.lineno < last
    ]
    found = []
    for node, after in zip(nodes, [*(node.lineno for node in nodes[1:]), last], strict=True):
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        annotation = node.annotation if isinstance(node, ast.AnnAssign) else None
        comment = " ".join(comments[number] for number in range(node.lineno, after) if number in comments)
        found.append((target.id, annotation, comment))
    return found


def resolve(node: ast.expr, script: dict[str, Any]) -> Any:
    """The type that an annotation names: a name, or one with others or constants in brackets."""
    if isinstance(node, ast.Name):
        return script[node.id] if node.id in script else getattr(builtins, node.id)
    if isinstance(node, ast.Subscript):
        return resolve(node.value, script)[resolve(node.slice, script)]
    if isinstance(node, ast.Tuple):
        return tuple(resolve(part, script) for part in node.elts)
    return ast.literal_eval(node)


def options(kind: Any) -> dict[str, Any]:
    """What argparse must know of a type: how to read it, which values it takes, how many."""
    if kind is bool:
        return {"type": true_or_false, "nargs": "?", "const": True, "metavar": "{True,False}"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind), "type": type(get_args(kind)[0])}
    if get_origin(kind) is list:
        return {"nargs": "+", **options(get_args(kind)[0])}
    if get_origin(kind) is Annotated:
        number, limits = get_args(kind)
        if number is str:
            return {"type": number_or_path(limits), "metavar": "X|FILE"}
        return {"type": number_in(number, limits), "metavar": "N" if number is int else "X"}
    return {"type": number_in(kind, Range("a number"))} if kind in (int, float) else {"type": kind}


def true_or_false(text: str) -> bool:
    """Argparse type for a flag that takes True or False; bool("False") would be True."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise argparse.ArgumentTypeError(f"expected True or False, found {text!r}")


def number_in(kind: type, limits: Range) -> Callable[[str], float]:
    """Argparse type for an int or a float within limits; NaN and infinity are no numbers."""

    def read(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        low = number > limits.low if limits.above else number >= limits.low
        if not (math.isfinite(number) and low and number <= limits.high):
            raise argparse.ArgumentTypeError(f"expected {limits.words}, found {text!r}")
        return number

    return read


def number_or_path(limits: Range) -> Callable[[str], str]:
    """Argparse type for a text that names a file, or is a number within limits."""

    def read(text: str) -> str:
        try:
            float(text)
        except ValueError:
            return text
        number_in(float, limits)(text)
        return text

    return read
