"""The two fields of real tissue in docs/example: whole, small, annotated on their pixels, and attributed."""

from pathlib import Path

from dasc.data.datasets import drop_outside, read_dataset
from dasc.images.read import read_field

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "docs/example"
MOST_BYTES = 1_500_000


def test_the_example_is_sound():
    dataset = read_dataset("table", EXAMPLE)
    assert list(dataset.fields["split"]) == ["test", "test"]  # what predict.py judges without another flag
    assert {path.name for path in EXAMPLE.glob("*.jpg")} == set(dataset.fields["path"])
    for field in dataset.fields.itertuples():
        height, width, _ = read_field(EXAMPLE / field.path).shape
        points = dataset.annotations[dataset.annotations["image"] == field.image]
        assert drop_outside(points, width, height)[1] == 0
    assert set(dataset.annotations["label"]) == {1} and dataset.duplicates == 0
    assert sum(path.stat().st_size for path in EXAMPLE.iterdir() if path.is_file()) < MOST_BYTES
    notice = (EXAMPLE / "NOTICE.md").read_text(encoding="utf-8")
    assert "https://creativecommons.org/licenses/by/4.0/" in notice  # the licence asks for its link and the source
    assert "https://doi.org/10.1186/s13104-019-4121-7" in notice
    assert all(author in notice for author in ("Aksac", "Demetrick", "Özyer", "Alhajj"))
