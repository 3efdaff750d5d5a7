"""Synthetic tissue for the sample of stage 0: stroma, nests, nuclei, mitoses, hard negatives, as scanned."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

MITOSIS, HARD_NEGATIVE = 1, 2  # category_id of MIDOG; 0 stands for an ordinary nucleus and for no annotation
NUCLEUS_UM = 11.0  # half the window a nucleus is drawn in
MARGIN_UM = NUCLEUS_UM + 6  # tissue drawn beyond the field and cut away, so that the edge cuts through nuclei


class Scanner(NamedTuple):
    """A slide scanner: resolution, each stain's optical density (R, G, B) per unit, light, optics, camera."""

    um_per_px: float
    hematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    white: tuple[float, float, float]
    blur_um: float
    sharpen: float
    noise: float  # grey levels
    jpeg_quality: int


# Every tenth case, so the last one of the test split, is on the third scanner, which training never sees.
SCANNERS = (
    Scanner(0.23, (0.45, 0.81, 0.37), (0.09, 0.92, 0.37), (246, 244, 246), 0.22, 0.5, 2.0, 88),
    Scanner(0.25, (0.53, 0.77, 0.35), (0.05, 0.90, 0.30), (243, 240, 243), 0.30, 0.3, 2.5, 82),
    Scanner(0.28, (0.49, 0.79, 0.36), (0.10, 0.86, 0.46), (249, 244, 238), 0.32, 0.0, 3.5, 90),
)
SHARES = {  # how often a figure is of each kind
    MITOSIS: {"prometaphase": 0.38, "metaphase": 0.42, "anaphase": 0.13, "telophase": 0.07},
    HARD_NEGATIVE: {"pyknotic": 0.32, "apoptotic": 0.22, "crushed": 0.16, "unfocused": 0.16, "hyperchromatic": 0.14},
}
# Condensed chromatin is a union of balls, scattered or in line. Kind: fewest and most balls, spread, radius (um).
CLUMPS = {
    "prometaphase": (8, 14, 1.7, 0.7, 1.3),
    "pyknotic": (1, 4, 1.0, 1.2, 2.4),
    "apoptotic": (3, 7, 2.0, 0.4, 1.5),
    "unfocused": (4, 9, 1.3, 0.9, 1.5),
}
# Kind: length of the plate, radius of its balls, distance of each of two plates from the middle (um).
PLATES = {
    "metaphase": (5, 10, 0.7, 1.25, 0, 0),
    "anaphase": (5.5, 7, 0.6, 0.85, 1.6, 2.8),
    "telophase": (4, 5.5, 0.6, 0.85, 3.2, 4.5),
    "crushed": (4, 11, 0.9, 1.7, 0, 0),
}


@dataclass
class Field:
    """One field while it is drawn, margin included; the maps are float32 [y, x]."""

    rng: np.random.Generator
    um_per_px: float
    hematoxylin: np.ndarray  # amount of stain
    eosin: np.ndarray
    across: np.ndarray  # grows across the fibres of the stroma
    texture: np.ndarray  # graininess, mean 0, standard deviation 1

    def window(self, x: float, y: float, radius_um: float):
        """Return a square round (x, y): its slices, offsets dx and dy in um, and as large a piece of texture."""
        radius = math.ceil(radius_um / self.um_per_px)
        offset, size = np.arange(-radius, radius + 1), 2 * radius + 1
        top, left = int(y) - radius, int(x) - radius
        dx, dy = (offset + int(x) - x) * self.um_per_px, (offset + int(y) - y) * self.um_per_px
        i, j = self.rng.integers(0, len(self.texture) - size, 2)
        where = np.s_[top : top + size, left : left + size]
        return where, dx[None, :], dy[:, None], self.texture[i : i + size, j : j + size]

    def paint(self, where, mask: np.ndarray, hematoxylin, eosin) -> None:
        """Replace both stains where `mask`, 0..1, says so."""
        self.hematoxylin[where] += mask * (hematoxylin - self.hematoxylin[where])
        self.eosin[where] += mask * (eosin - self.eosin[where])


def sigmoid(values: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-values))."""
    return 1 / (1 + np.exp(-np.clip(values, -30, 30)))


def smooth_noise(rng: np.random.Generator, side: int, grain_x_px: float, grain_y_px: float) -> np.ndarray:
    """Return noise with grains of the given size, float32 (side, side), mean 0, standard deviation 1."""
    step_x, step_y = max(grain_x_px / 2, 1), max(grain_y_px / 2, 1)  # drawn small and enlarged, for speed
    low = rng.standard_normal((math.ceil(side / step_y) + 2, math.ceil(side / step_x) + 2), dtype=np.float32)
    low = cv2.GaussianBlur(low, (0, 0), sigmaX=grain_x_px / step_x / 2, sigmaY=grain_y_px / step_y / 2)
    noise = cv2.resize(low, (side, side), interpolation=cv2.INTER_CUBIC)
    return (noise - noise.mean()) / noise.std()


def wavy(rng: np.random.Generator, theta: np.ndarray, amplitude: float) -> np.ndarray:
    """Return the factor, around 1, that makes a circle's radius irregular at the angles theta."""
    return 1 + sum(rng.normal(0, amplitude / k) * np.cos(k * theta + rng.uniform(0, 6.3)) for k in (2, 3, 5))


def draw_tissue(rng: np.random.Generator, side: int, um_per_px: float, nuclei: np.ndarray):
    """Draw all but the nuclei: nests of cells with borders midway between nuclei (N, 2), stroma, gaps.

    Returns the Field and two maps (side, side) in 0..1, nest and gap.
    """

    def noise(grain_um: float, across_um: float | None = None) -> np.ndarray:
        return smooth_noise(rng, side, grain_um / um_per_px, (across_um or grain_um) / um_per_px)

    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    outline = noise(70) + 0.25 * noise(12)
    outline -= np.quantile(outline, 0.35)
    nest = sigmoid(outline / 0.06)
    texture = noise(0.9)

    angle = rng.uniform(0, math.pi)
    along, across = (
        columns * math.cos(turned) + rows * math.sin(turned) + 12 / um_per_px * (noise(45) + 0.12 * noise(10))
        for turned in (angle, angle + math.pi / 2)
    )
    fibre, bundle = (
        cv2.remap(noise(*size_um), along, across, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)
        for size_um in ((22, 0.9), (45, 5))
    )
    stroma = (0.72 + 0.2 * fibre + 0.14 * bundle) * (1 + 0.1 * texture)

    seeds = np.ones((side, side), np.uint8)
    seeds[tuple(nuclei.astype(int).T[::-1])] = 0
    _, cell = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    wobbly = columns + noise(5) / um_per_px, rows + noise(5) / um_per_px
    cell = cv2.remap(cell.astype(np.float32), *wobbly, cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT)
    border = (cv2.morphologyEx(cell, cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0).astype(np.float32)
    border = cv2.GaussianBlur(border, (0, 0), 0.35 / um_per_px)
    foamy, pink, blue = rng.standard_normal((3, len(nuclei) + 1), dtype=np.float32)[:, cell.astype(int)]
    bubble = sigmoid((noise(1.9) + 0.9 * foamy - 1.1) / 0.3)
    epithelium = (0.62 + 0.13 * pink) * (1 - 0.75 * bubble) * (1 + 0.2 * texture) + 0.35 * border

    lumen = sigmoid((noise(28) + 0.2 * noise(4) - 1.75) / 0.05)
    cleft = sigmoid((-0.8 * bundle - 0.6 * fibre + 0.5 * noise(30) - 1.6) / 0.2) * (1 - nest)
    ragged = np.exp(-(((outline + 0.1 * noise(6) + 0.1) / 0.07) ** 2)) * sigmoid((noise(20) - 0.7) / 0.3)
    parted = np.clip(2.2 * border, 0, 1) * sigmoid((noise(9) - 0.9) / 0.3) * nest
    gap = np.max([lumen, cleft, ragged, parted], axis=0)
    eosin = np.clip(nest * epithelium + (1 - nest) * stroma, 0.03, None) * (1 - 0.96 * gap)
    hematoxylin = np.clip(nest * (0.2 + 0.06 * blue + 0.05 * texture), 0.03, None) * (1 - gap)
    return Field(rng, um_per_px, hematoxylin, eosin, across, texture), nest, gap


def draw_nucleus(field: Field, x: float, y: float, kind: str, darkness: float = 1.0) -> None:
    """Draw an ordinary nucleus: epithelial (pale, rim, nucleoli), lymphocyte (small, dense) or spindle."""
    rng = field.rng
    where, dx, dy, grain = field.window(x, y, NUCLEUS_UM)
    angle, nucleoli, rim = rng.uniform(0, 2 * math.pi), 0, 0.3
    if kind == "epithelial":
        long_um, ratio, base = rng.uniform(3.6, 6.4), rng.uniform(0.65, 0.98), rng.uniform(0.3, 1.3)
        nucleoli, rim = rng.integers(0, 5), 1.0
    elif kind == "lymphocyte":
        long_um, ratio, base = rng.uniform(2.6, 3.5), rng.uniform(0.85, 1), rng.uniform(1.9, 3)
    else:  # a spindle lies along the fibres
        long_um, ratio, base = rng.uniform(4, 8), rng.uniform(0.2, 0.42), rng.uniform(1.2, 2.6)
        slope_y, slope_x = np.gradient(field.across[where])
        angle = rng.normal(math.atan2(-slope_x.mean(), slope_y.mean()), 0.2)
    u, v = dx * math.cos(angle) + dy * math.sin(angle), dy * math.cos(angle) - dx * math.sin(angle)
    distance = np.hypot(u, v / ratio) / (long_um * wavy(rng, np.arctan2(v, u * ratio), 0.09))  # 1 on the rim
    chromatin = base * (1 + rng.uniform(0.2, 0.5) * grain) + rim * np.exp(-(((distance - 0.92) / 0.1) ** 2))
    for _ in range(nucleoli):
        at_x, at_y = rng.uniform(-0.5, 0.5, 2) * long_um * ratio
        spot = ((dx - at_x) ** 2 + (dy - at_y) ** 2) / (2 * rng.uniform(0.35, 0.6) ** 2)
        chromatin += rng.uniform(0.8, 2) * np.exp(-spot)
    mask = sigmoid((1 - distance) * long_um * math.sqrt(ratio) / 0.18)
    field.paint(where, mask, np.clip(darkness * chromatin, 0.1, 4.2), rng.uniform(0.3, 0.6))


def draw_body(field: Field, x: float, y: float, radius_um: float, hematoxylin: float, eosin: float) -> None:
    """Draw the cell body, or the empty space, that a figure lies in."""
    where, dx, dy, grain = field.window(x, y, 1.5 * radius_um)
    radius = radius_um * wavy(field.rng, np.arctan2(dy, dx), 0.2)
    mask = sigmoid((radius - np.hypot(dx, dy)) / 0.35)
    field.paint(where, mask, hematoxylin * (1 + 0.25 * grain), eosin * (1 + 0.25 * grain))


def draw_figure(field: Field, x: float, y: float, label: int) -> None:
    """Draw a mitosis or an imposter of a kind drawn by lot; both parts of an anaphase are one figure."""
    rng, mitosis = field.rng, label == MITOSIS
    kind = rng.choice(list(SHARES[label]), p=list(SHARES[label].values()))
    if kind == "hyperchromatic":
        draw_nucleus(field, x, y, rng.choice(["epithelial", "spindle"]), darkness=rng.uniform(1.8, 3))
        return
    if kind in CLUMPS:
        fewest, most, spread, thin, thick = CLUMPS[kind]
        points = rng.normal(0, spread * rng.uniform(0.7, 1.2), (rng.integers(fewest, most + 1), 2))
        radii = rng.uniform(thin, thick, len(points))
    else:
        short, long, thin, thick, near, far = PLATES[kind]
        line, apart = np.linspace(-0.5, 0.5, 9) * rng.uniform(short, long), rng.uniform(near, far)
        sides = [apart, -apart] if apart else [0]
        scatter, taper = (0.33, 0) if mitosis else (0.15, 2)
        bent = [rng.normal(0, 0.03) * line**2 + rng.normal(0, scatter, 9) + side for side in sides]
        points = np.column_stack([np.tile(line, len(sides)), np.concatenate(bent)])
        taper = np.tile(1 - taper * np.linspace(-0.5, 0.5, 9) ** 2, len(sides))
        radii = rng.uniform(thin, thick) * rng.uniform(0.8, 1.2, len(points)) * taper

    blur_um = rng.uniform(0.5, 1.1) if kind == "unfocused" else max(rng.normal(0.1, 0.2), 0)
    rough = rng.uniform(0.15, 0.45) if mitosis else rng.uniform(0, 0.12)
    radius_um = rng.uniform(5, 7.5) if mitosis else rng.uniform(3.5, 6.5)
    if mitosis and rng.random() < 0.8:  # the clear zone round the chromosomes
        draw_body(field, x, y, radius_um, rng.uniform(0.05, 0.2), rng.uniform(0.15, 0.4))
    elif mitosis:
        draw_body(field, x, y, radius_um, 0.25, rng.uniform(0.4, 0.9))
    elif rng.random() < 0.6:  # a dying cell is pink, and shrinks away from its neighbours
        if kind in ("pyknotic", "apoptotic"):
            draw_body(field, x, y, radius_um + rng.uniform(0.8, 2.5), 0.02, 0.06)
        draw_body(field, x, y, radius_um, rng.uniform(0.05, 0.5), rng.uniform(0.3, 1.4))

    where, dx, dy, grain = field.window(x, y, 14)
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    density = np.zeros((dy.size, dx.size))
    for (at_x, at_y), radius in zip((points - points.mean(axis=0)) @ turn, radii, strict=True):
        density += np.exp(-((dx - at_x) ** 2 + (dy - at_y) ** 2) / (2 * radius**2))
    mask = sigmoid((density + rough * grain * np.minimum(density, 1) - 0.6) / 0.07)
    if blur_um > 0:
        mask = cv2.GaussianBlur(mask, (0, 0), blur_um / field.um_per_px)
    field.paint(where, mask, rng.uniform(2.4, 4.2) * (1 + 0.06 * grain), 0.3)


def place_nuclei(rng: np.random.Generator, side: int, um_per_px: float) -> np.ndarray:
    """Return nucleus centres (N, 2) x, y, shuffled, on a jittered hexagonal grid so that few overlap."""
    step, edge = 12.5 / um_per_px, NUCLEUS_UM / um_per_px + 2
    rows, columns = np.mgrid[0 : side / step, 0 : side / step / 0.866]
    points = np.stack([(columns * 0.866).ravel(), (rows + columns % 2 / 2).ravel()], axis=1) * step
    points = rng.permutation(points + rng.normal(0, 0.17 * step, points.shape))
    return points[((points > edge) & (points < side - edge)).all(axis=1)]


def scan(field: Field, scanner: Scanner, margin: int) -> np.ndarray:
    """Return the scanner's picture of the stains by the Beer-Lambert law: uint8 RGB without the margin."""
    rng = field.rng
    dose = rng.uniform(0.85, 1.15, (2, 1))  # the laboratory's, per case
    stains = np.array([scanner.hematoxylin, scanner.eosin]) * rng.normal(1, 0.04, (2, 3)) * dose
    density = field.hematoxylin[..., None] * stains[0] + field.eosin[..., None] * stains[1]
    picture = (np.array(scanner.white) * np.exp(-density)).astype(np.float32)
    picture = cv2.GaussianBlur(picture, (0, 0), scanner.blur_um / scanner.um_per_px)
    picture += scanner.sharpen * (picture - cv2.GaussianBlur(picture, (0, 0), 0.5 / scanner.um_per_px))
    noise = cv2.GaussianBlur(rng.standard_normal(picture.shape, dtype=np.float32), (0, 0), 0.6)
    picture = np.clip(np.round(picture + 2 * scanner.noise * noise), 0, 255).astype(np.uint8)
    picture = np.ascontiguousarray(picture[margin:-margin, margin:-margin, ::-1])
    _, jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, scanner.jpeg_quality])
    return cv2.imdecode(jpeg, cv2.IMREAD_COLOR)[..., ::-1]
