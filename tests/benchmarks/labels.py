"""How many annotated mitoses lie at a candidate, when the labels are right and when they are wrong.

`python tests/benchmarks/labels.py FORM ROOT [UM_PER_PX]`: the share of a dataset's mitoses that dasc/detect/labels.py
takes for placed at a nucleus, over all fields with a mitosis, for its labels and for the same labels spoilt; the cause
that is named for each.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from tqdm import tqdm

from dasc.data.datasets import read_dataset
from dasc.detect.labels import PER_MITOSIS, PER_MM2, best_of, find_labels, likely_cause, share_near

SPOILT = {
    "right": lambda one, points: points,
    "x and y swapped": lambda one, points: points[:, ::-1],
    "in um": lambda one, points: points * one.um_per_px,
    "mirrored left to right": lambda one, points: [one.width - 1, 0] + points * [-1, 1],
    "upside down": lambda one, points: [0, one.height - 1] + points * [1, -1],
    "of an image half as large": lambda one, points: points / 2,
    "of an image twice as large": lambda one, points: points * 2,
    "of an image 1.1 times as large": lambda one, points: points * 1.1,
    "shares of the image": lambda one, points: points / [one.width, one.height],
    "moved by 25 px": lambda one, points: points - 25,
    "moved by 50 px": lambda one, points: points - 50,
}


def main(form: str, root: str, um_per_px: str = "0") -> None:
    dataset = read_dataset(form, Path(root), [], [])
    mitoses = dataset.annotations[dataset.annotations["label"] == 1]
    fields = dataset.fields[dataset.fields["image"].isin(mitoses["image"])]
    looked = [find_labels(field, mitoses, dataset.root, float(um_per_px)) for field in tqdm(list(fields.itertuples()))]
    looked = [one._replace(candidates=best_of(one, PER_MM2, PER_MITOSIS * len(one.mitoses))) for one in looked]
    print(f"{root}: {len(mitoses)} mitoses in {len(looked)} fields")
    for words, spoil in SPOILT.items():
        spoilt = [one._replace(mitoses=spoil(one, one.mitoses)) for one in looked]
        share = share_near(spoilt, [one.mitoses for one in spoilt])
        print(f"{words:32} {share:.2f}  {'' if words == 'right' else likely_cause(spoilt)}")
    cases = fields["case"].to_numpy()
    for case in np.unique(cases):
        own = [one for one, name in zip(looked, cases, strict=True) if name == case]
        count = sum(len(one.mitoses) for one in own)
        print(f"{case}: {share_near(own, [one.mitoses for one in own]):.2f} of {count}")


if __name__ == "__main__":
    main(*sys.argv[1:])
