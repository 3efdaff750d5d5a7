"""How long stage 1 and predict.py take for one field, and how much memory: each as a process of its own.

Tiles a field to 7215 x 5412 px with 11 annotated mitoses for stage 1; predict.py gets the field itself.
Times are read from the scripts' own work: the start of Python and its libraries is timed apart, on a blank field.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from dasc.images.read import read_field


def seconds(*command: object) -> float:
    """Wall time of one script; its output only when it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stderr}")
    return time.perf_counter() - start


def write_table(folder: Path, image: np.ndarray, um_per_px: float, mitoses: int) -> None:
    folder.mkdir()
    tifffile.imwrite(folder / "field.tiff", image)
    (folder / "fields.csv").write_text(f"image,path,case,split,um_per_px\nf,field.tiff,1,train,{um_per_px}\n")
    places = np.random.default_rng(0).uniform(0.05, 0.95, (mitoses, 2)) * [image.shape[1], image.shape[0]]
    rows = "".join(f"f,{x:.0f},{y:.0f},1\n" for x, y in places)
    (folder / "annotations.csv").write_text("image,x_px,y_px,label\n" + rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--field", required=True, help="an image of tissue")
    parser.add_argument("--um_per_px", type=float, default=0.2274)
    parser.add_argument("--models", nargs="*", default=[], help="model.pt files to predict with")
    args = parser.parse_args()
    image = read_field(Path(args.field))
    large = np.tile(image, (-(-5412 // image.shape[0]), -(-7215 // image.shape[1]), 1))[:5412, :7215]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_table(folder / "large", large, args.um_per_px, 11)
        write_table(folder / "blank", np.full((400, 400, 3), 245, np.uint8), args.um_per_px, 1)
        cut = [ROOT / "pre/cut_patch_2.py", "--dataset", "table", "--out"]
        start = min(seconds(*cut, folder / "a", "--data_root", folder / "blank") for _ in range(2))
        whole = min(seconds(*cut, folder / "b", "--data_root", folder / "large") for _ in range(2))
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        print(f"stage 1, 7215 x 5412: {whole - start:.2f} s beside {start:.2f} s of start, peak {memory:.2f} GiB")
        for model in args.models:
            flags = ["--um_per_px", args.um_per_px, "--model_path", model, "--out", folder / "p", "--images"]
            start = min(seconds(ROOT / "predict.py", *flags, folder / "blank/field.tiff") for _ in range(2))
            whole = min(seconds(ROOT / "predict.py", *flags, args.field) for _ in range(2))
            print(
                f"predict.py, {model}, {image.shape[1]} x {image.shape[0]}: {whole - start:.2f} s beside {start:.2f} s"
            )
