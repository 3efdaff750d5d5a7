"""What a count of mitoses tells: its interval, and its density where the area is large enough for one."""

from scipy.special import gammaincinv

SMALLEST_MM2 = 0.5  # tissue below which no density is given: one mitosis there is more than 2 per mm2, and guidelines
# count in 2 mm2
CONFIDENCE = 0.95


def poisson_interval(count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact interval (Garwood 1936) of the expected number, where `count` were found and they fall independently.

    It tells how far chance moves a count, not how far the model is wrong.
    """
    outside = (1 - confidence) / 2
    low = gammaincinv(count, outside) if count else 0.0
    return float(low), float(gammaincinv(count + 1, 1 - outside))


def per_mm2(count: float, area_mm2: float) -> float:
    """`count` per mm2; NaN where the area is smaller than SMALLEST_MM2."""
    return count / area_mm2 if area_mm2 >= SMALLEST_MM2 else float("nan")
