"""Say whether an image looks like hematoxylin and eosin, and whether its stain is one that the models have seen.

Hematoxylin and eosin both absorb green most. Hematoxylin absorbs red too, eosin hardly; blue passes both alike. So the
share of red in the optical density varies over tissue more than the share of blue does.

The bounds were chosen from 6 collections of real H&E (docs/log.md, "What real H&E looks like to the stain check").
"""

from typing import NamedTuple

import numpy as np

from dasc.images.stain import DENSITY, TISSUE

FEWEST = 100  # pixels of tissue at tissue.UM_PER_PX (0.006 mm2) without which nothing can be told
MOST = 250_000  # pixels that are looked at: evenly spread over a larger overview
DARK = 5.0  # median of the summed optical density of all pixels: grey level 48; the darkest real field has 2.7
COLOURED = 0.06  # mean of (largest - smallest density), of the mean sum: below, an image is gray; real ones have 0.19
GREEN = (
    0.12  # (green - mean of red and blue) / sum: real ones have 0.14 to 0.38, most other orders of channels below 0.05
)
BROWN = 0.05  # share of tissue that absorbs blue most, as brown does: real ones have 0 to 0.02
TURNED = -0.1  # log of the spread of red's share to that of blue's: real ones have -0.08 to 1.6, and with red and blue
# swapped minus that. Hematoxylin without eosin has no contrast to tell it by, so that there the bound is lower:
TURNED_BLUE_ALONE = -0.5
BLUE_ALONE = 0.12  # (red - blue) / sum: hematoxylin alone has more
BLUE_ALONE_GREEN = 0.25  # as GREEN: hematoxylin alone has less
# Optical density of red, green and blue over tissue. What real H&E spans: mean 0.16-0.71, 0.33-1.40, 0.15-0.72, spread
# 0.04-0.30, 0.07-0.73, 0.04-0.27. The bounds are three quarters (of the spread half) and one and a half times that.
MEANS = {"red": (0.12, 1.06), "green": (0.25, 2.10), "blue": (0.11, 1.08)}
SPREADS = {"red": (0.02, 0.45), "green": (0.03, 1.09), "blue": (0.02, 0.40)}

ADVICE = "the model knows only H&E, so this count means little"


class Stain(NamedTuple):
    """What an image looks like. name: for the column `stain`. note: what a user must know, empty where nothing."""

    name: str
    note: str = ""


class Colours(NamedTuple):
    """What tells H&E from other stains, by the optical density of tissue; the constants above say what is expected.

    dark: median of the sum over the whole image. mean, spread: (3,), of red, green and blue. The rest has no unit.
    """

    dark: float
    mean: np.ndarray
    spread: np.ndarray
    coloured: float
    greener: float
    brown: float
    redder: float
    turn: float


def check_stain(image: np.ndarray, mask: np.ndarray | None = None) -> Stain:
    """The stain of an image (h, w, 3) uint8 RGB at about tissue.UM_PER_PX.

    mask: (h, w) bool, the pixels that count, as of a slide's tissue without pen marks; None: all.
    """
    pixels = image[mask] if mask is not None and mask.sum() >= FEWEST else image.reshape(-1, 3)
    density = DENSITY[pixels[:: 1 + len(pixels) // MOST]]
    if np.median(density.sum(axis=1)) > DARK:
        return Stain("dark background", f"dark background, as of fluorescence or an inverted image: {ADVICE}")
    colours = measure_colours(density)
    if colours is None:
        return Stain("too little tissue to tell")
    if colours.coloured < COLOURED:
        return Stain("gray", f"the image is gray: {ADVICE}")
    blue_alone = colours.redder > BLUE_ALONE and colours.greener < BLUE_ALONE_GREEN and colours.turn > TURNED_BLUE_ALONE
    swapped = colours.turn < TURNED and not blue_alone
    if colours.greener < GREEN or colours.brown > BROWN or swapped:
        return Stain(
            "not H&E", f"the colours are not those of H&E (another stain, or channels in another order): {ADVICE}"
        )
    for name, values, bounds in (("mean", colours.mean, MEANS), ("spread", colours.spread, SPREADS)):
        for (colour, (low, high)), found in zip(bounds.items(), values, strict=True):
            if not low <= found <= high:
                what = f"{name} of the optical density of {colour} {found:.2f}, expected {low:g} to {high:g}"
                return Stain(
                    "far from the training's stain",
                    f"the stain is far from what the model was trained on ({what}): look at every detection",
                )
    return Stain("H&E")


def measure_colours(density: np.ndarray) -> Colours | None:
    """The colours of an image's pixels, by their optical density (N, 3); None where hardly any is tissue."""
    total = density.sum(axis=1)
    tissue = density[total > TISSUE].astype(np.float64)
    if len(tissue) < FEWEST:
        return None
    mean, sums = tissue.mean(axis=0), tissue.sum(axis=1)
    red, green, blue = mean / mean.sum()
    varies = np.sqrt(sums @ (tissue / sums[:, None] - mean / mean.sum()) ** 2) + 1e-9  # of a gray image 0
    return Colours(
        dark=float(np.median(total)),
        mean=mean,
        spread=tissue.std(axis=0),
        coloured=float((tissue.max(axis=1) - tissue.min(axis=1)).mean() / mean.sum()),
        greener=float(green - (red + blue) / 2),
        brown=float((tissue[:, 2] > np.maximum(tissue[:, 0], tissue[:, 1])).mean()),
        redder=float(red - blue),
        turn=float(np.log(varies[0] / varies[2])),
    )
