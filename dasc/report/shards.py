"""Several runs that share the images of one folder (--shard), and the run that merges what they left in OUT."""

import contextlib
import hashlib
import heapq
import json
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from dasc.detect.resume import is_finished
from dasc.errors import InputError
from dasc.files import sha256, write_json, writing
from dasc.flags import Shard
from dasc.images.parts import content_bytes
from dasc.report.outputs import image_folder
from dasc.run import this_process

# Flags in which shards and the run that merges them may differ: where and how fast they run, what only the last writes.
MAY_DIFFER = ("shard", "resume", "out", "images", "data_root", "device", "engine", "batch_size")
MAY_DIFFER += ("workers", "report", "thumbnails", "seed")
FILES = ("model_path", "um_per_px", "corrections")  # flags that name a file, whose content counts
ANEW = "or remove {} and run all shards again (with --resume their scans stay)"


def deal(sizes: Sequence[int], of: int) -> list[int]:
    """The shard, from 1, of each image: the largest first, each to the shard that has the fewest bytes by then.

    Of several such shards, the one of the fewest images; then the first.
    """
    shards = [(0, 0, number) for number in range(1, of + 1)]
    dealt = [0] * len(sizes)
    for image in sorted(range(len(sizes)), key=lambda image: -sizes[image]):
        total, images, dealt[image] = shards[0]
        heapq.heapreplace(shards, (total + sizes[image], images + 1, dealt[image]))
    return dealt


class Shards:
    """What shards have left in OUT/shards, one record each, and the place of this run among them.

    fields: the images of all shards: image (name), file. A record holds the settings of its shard, a hash of the names
    and sizes of all images, and whether it came to its end. A run without shard that finds records merges them.
    Attributes: by: of the shards to merge, which process each was.
    Raises: InputError: a record of other settings, images or another number of shards than this run's, or a broken
    one; a run that would begin anew where there are records.
    """

    def __init__(self, args: Any, fields: pd.DataFrame) -> None:
        self.out, self.shard, self.fields = Path(args.out), args.shard, fields
        self.folder = self.out / "shards"
        records = [_read(path) for path in sorted(self.folder.glob("*_of_*.json"))]
        self.by = {record["shard"]: record["by"] for record in records}
        if not self.shard and not records:
            return
        if not self.shard and not args.resume:
            raise InputError(
                f"{self.folder}: holds what {len(records)} shards did; --resume merges it; remove it to begin anew"
            )
        sizes = [content_bytes(Path(file)) for file in fields["file"]]
        listed = json.dumps([list(fields["image"]), sizes])
        self.record = {
            "shard": self.shard,
            "by": this_process(),
            "settings": {name: _setting(name, value) for name, value in vars(args).items() if name not in MAY_DIFFER},
            "images": len(fields),
            "images_sha256": hashlib.sha256(listed.encode()).hexdigest(),
        }
        of = (self.shard or records[0]["shard"]).of
        self._check([record for record in records if args.resume or record["shard"] != self.shard], of)
        self.dealt = deal(sizes, of)
        self.bytes = sum(size for size, number in zip(sizes, self.dealt, strict=True) if self._is_mine(number))
        if not self.shard:
            self._name_unfinished({record["shard"].number: record["finished"] for record in records}, of)

    def _is_mine(self, number: int) -> bool:
        return not self.shard or number == self.shard.number

    def _check(self, records: list[dict], of: int) -> None:
        """Raise InputError where a record does not go with this run."""
        anew = ANEW.format(self.folder)
        for record in records:
            if record["shard"].of != of:
                raise InputError(
                    f"{self.folder}: holds shard {record['shard']}, expected shards of {of}; name another --out, {anew}"
                )
            for name, value in self.record["settings"].items():
                if record["settings"].get(name) != value:
                    theirs = record["settings"].get(name)
                    raise InputError(
                        f"shard {record['shard']} ran with {name} {theirs}, not {value}; give all the same, {anew}"
                    )
        odd = [record for record in records if record["images_sha256"] != self.record["images_sha256"]]
        if odd:
            names = " and ".join(f"shard {record['shard']} ({record['images']} images)" for record in odd)
            here = f"{self.record['images']} images here: their names or sizes differ"
            raise InputError(f"{names} saw another list of images than this run ({here}); give all the same, {anew}")

    def _name_unfinished(self, finished: dict[int, bool], of: int) -> None:
        """Say which shards have not come to their end, and how many of their images are to be scanned yet."""
        for number in (number for number in range(1, of + 1) if not finished.get(number)):
            own = [name for name, its in zip(self.fields["image"], self.dealt, strict=True) if its == number]
            left = sum(not is_finished(image_folder(self.out, name) / "scan.json") for name in own)
            if own:
                why = "did not come to its end" if number in finished else "left no record"
                print(f"shard {number}/{of} {why}: {left} of its {len(own)} images are scanned now")

    def begin(self) -> pd.DataFrame:
        """The rows of this shard's images; leaves a record that it is at them."""
        own = self.fields[[self._is_mine(number) for number in self.dealt]]
        print(f"shard {self.shard}: {len(own) or 'none'} of {len(self.fields)} images, {self.bytes / 1e9:.2f} GB")
        self._write(finished=False)
        return own

    def end(self, scanned: int, skipped: int) -> int:
        """Leave a record that this shard is done, and say so; its exit status.

        It is 0 even where images were skipped: torchrun would end the other shards. The run that merges skips them too.
        """
        self._write(finished=True)
        print(f"shard {self.shard}: {scanned} images scanned, {skipped} skipped")
        print("when all shards are done, the same command with --resume, as no shard, writes tables and report")
        return 0

    def _path(self, shard: Shard) -> Path:
        return self.folder / f"{shard.number}_of_{shard.of}.json"

    def _write(self, finished: bool) -> None:
        write_json(self._path(self.shard), self.record | {"finished": finished})

    def merged(self) -> None:
        """Remove the records: OUT is now what one run would have written."""
        if self.by:
            with writing(self.folder):
                for path in self.folder.glob("*_of_*.json*"):  # and what a killed shard left of one
                    path.unlink()
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # where nothing else lies in it


def _setting(name: str, value: Any) -> Any:
    return f"of SHA-256 {sha256(Path(value))[:12]}" if name in FILES and Path(value).is_file() else value


def _read(path: Path) -> dict[str, Any]:
    """A record, its shard as a Shard."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"by": str, "settings": dict, "images": int, "images_sha256": str, "finished": bool}
        if f"{record['shard'].replace('/', '_of_')}.json" != path.name or not record["shard"]:
            raise ValueError(record["shard"])
        if wrong := [name for name, kind in kinds.items() if type(record[name]) is not kind]:
            raise ValueError(wrong)
        return record | {"shard": Shard(record["shard"])}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArgumentTypeError, RecursionError) as error:
        raise InputError(f"{path}: not the record of a shard; remove it and run that shard again") from error
