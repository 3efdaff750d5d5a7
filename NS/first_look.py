"""Optional, after stage 2 or 8: give the detector a first look, which is trained here or taken from another model.

The first look goes over a whole field once and says where mitoses may be. The detector then looks at a sixth of the
candidates, and adds the log odds of both. Without one, candidates are ranked by measures of stain and contrast.
Reads fields.csv and annotations.csv of stage 1, the dataset's fields, and the model.pt, from whose backbone it starts.
Writes OUT/model.pt (the detector with its first look, its threshold chosen anew on validation), log.csv, curves.png,
val_curve.csv, val_curve.png, reliability.png, run.json and, to resume from, last.pt.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dasc.flags import Amount, Count, Device, Positive, Share, read_flags

# Edit here, or override one run with the flag of the same name.
MANIFEST = "data/patches/patches.csv"  # of stage 1 or 3: the fields that it was cut from are learned from
MODEL_PATH = "results/NS/model.pt"  # the detector that gets a first look
FIRST_LOOK = ""  # model.pt whose first look is taken; empty: one is trained
OUT = "results/first_look"  # folder to write
DATA_ROOT = ""  # dataset folder with the fields; empty: where it lay at stage 1
EPOCHS: Count = 15  # of STEPS steps
STEPS: Count = 100  # steps per epoch; 1,500 in all: a prototype that took 2,500 had learned its fields by heart
BATCH_SIZE: Count = 12  # tiles of 96 um per step
LR: Positive = 1e-3  # largest learning rate of AdamW; it rises for an epoch and falls to 0 along a cosine
EMA: Share = 0.995  # decay per step of the moving average of the weights, which is what is kept; 0: the last step's
STAIN: Amount = 0.2  # stain augmentation: relative change of each stain's amount; 0 turns it off
LIGHT: Amount = 0.2  # augmentation: relative change of brightness and contrast
FOCUS: Share = 0.8  # augmentation: largest share of fine detail blurred away, and half of it sharpened
NAN_STEPS: Count = 10  # steps in a row without a finite loss before training stops
PER_MM2: Positive = 500.0  # candidates per mm2 that the detector looks at, best ranked first
DEVICE: Device = "auto"  # auto takes cuda, else mps, else cpu
SEED = 0  # of the first weights, the draws and the augmentation
WORKERS: Count = 2  # threads that read fields into memory, 12 MB per mm2
RESUME = False  # True: go on from OUT/last.pt

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from dasc.data.corrections import UNSURE
from dasc.data.cut import read_cut_fields, read_val_fields
from dasc.detect.candidates import at_working_resolution
from dasc.detect.val import fit_to_val
from dasc.errors import InputError
from dasc.files import write_csv
from dasc.images.read import read_field
from dasc.images.stain import apply_stain, estimate_stain, tissue_density
from dasc.model import loop
from dasc.model.augment import jitter_focus, jitter_light, jitter_stain, to_float
from dasc.model.checkpoint import Detector, load_detector, read_checkpoint, save_detector, sources_of
from dasc.model.first_look import FirstLook, focal_loss
from dasc.model.look_tiles import LookField, LookTiles
from dasc.model.network import fold_batch_norms
from dasc.model.start import load_initial_weights, training_settings
from dasc.model.step import Step
from dasc.report.plots import curves, precision_recall, reliability
from dasc.run import pick_device, record_run, run_script

VAL_TILES = 96  # tiles of the validation fields, the same in every epoch, that log.csv's val_loss is of


def main(args) -> int:
    device = pick_device(args.device)
    manifest, model_path, out = Path(args.manifest), Path(args.model_path), Path(args.out)
    root, fields, annotations = read_cut_fields(manifest.parent, args.data_root)
    val = read_val_fields(manifest.parent, args.data_root)
    detector = load_detector(model_path, device)
    if args.first_look:
        first_look = load_detector(Path(args.first_look), device).first_look
        if first_look is None:
            raise InputError(f"{args.first_look}: has no first look")
        look_weights = read_checkpoint(Path(args.first_look))["first_look"]["model"]
    else:
        tiles = {
            split: LookTiles(read_fields(root, fields[fields["split"] == split], annotations, detector, args))
            for split in ("train", "val")
        }
        torch.manual_seed(args.seed)
        network = FirstLook(detector.network.backbone_name)
        load_initial_weights(network, model_path)
        network.to(device, memory_format=torch.channels_last)
        ema, log = train(network, tiles, training_settings(args, manifest=manifest, model_path=model_path), args)
        first_look, look_weights = fold_batch_norms(ema), ema.state_dict()
        curves(out / "curves.png", pd.DataFrame(log), {"focal loss": ["loss", "val_loss"]})

    detector = replace(detector, first_look=first_look, per_mm2=args.per_mm2)
    detector, curve, *judged = fit_to_val(detector, val, batch_size=1024, match_um=detector.merge_um)
    checkpoint = read_checkpoint(model_path)
    save_detector(out / "model.pt", detector, checkpoint["model"], look_weights, **sources_of(checkpoint["config"]))
    write_csv(out / "val_curve.csv", curve.round(6))
    reliability(out / "reliability.png", *judged, detector.calibration)
    precision_recall(out / "val_curve.png", curve, detector.threshold)
    before, after = (max(one["f1"], default=0.0) for one in (checkpoint["config"]["val_curve"] or {"f1": []}, curve))
    print(f"validation F1 {after:.3f} at best, {before:.3f} by the val curve of {model_path}")
    print(f"threshold {detector.threshold:.3f}; wrote {out / 'model.pt'}")
    inputs = {manifest: len(fields), model_path: 1} | ({args.first_look: 1} if args.first_look else {})
    record_run(out, args, inputs=inputs, device=device, threshold=detector.threshold)
    return 0


def read_fields(
    root: Path, fields: pd.DataFrame, annotations: pd.DataFrame, detector: Detector, args
) -> list[LookField]:
    """The fields of a split as the detector's first look sees them, with their annotations."""
    annotations = annotations[annotations["image"].isin(fields["image"])]
    if not (annotations["label"] == 1).any():
        where = Path(args.manifest).parent / "annotations.csv"
        raise InputError(f"{where}: no mitosis in the {' and '.join(fields['split'].unique()) or 'absent'} fields")
    points = dict(tuple(annotations.groupby("image")))

    def read(field) -> LookField:
        image = read_field(root / field.path)
        small = at_working_resolution(image, field.um_per_px)
        shown = apply_stain(small, estimate_stain(tissue_density(image)) if detector.normalise_stain else None)
        of_field = points.get(field.image, annotations[:0])
        scale = np.array(small.shape[1::-1]) / image.shape[1::-1]
        places = (of_field[["x_px", "y_px"]].to_numpy(float) + 0.5) * scale - 0.5
        return LookField(shown, *(places[(of_field["label"] == label).to_numpy()] for label in (1, 0, UNSURE)))

    with ThreadPoolExecutor(args.workers) as pool:
        return list(tqdm(pool.map(read, fields.itertuples()), "fields", total=len(fields), unit="field"))


def train(network: FirstLook, tiles: dict[str, LookTiles], settings: dict, args) -> tuple[FirstLook, list[dict]]:
    """The moving average of the network's weights after the last epoch, and the log."""
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), lr=args.lr, weight_decay=1e-4)
    ema, average = loop.averaged(network)
    modules = {"model": network, "ema": ema, "optimizer": optimizer}
    (log,) = loop.begin(args, settings, modules)
    guard = loop.LossGuard(args.nan_steps, args.steps)

    def losses(views, wanted, counts):
        with loop.autocast(device):
            odds = network(views)
        return [focal_loss(odds.float(), wanted, counts)], []

    step = Step(losses, optimizer, average, args.ema)
    held_out = [part.to(device) for part in tiles["val"].draw(VAL_TILES, np.random.default_rng(0))]
    for epoch in range(len(log), args.epochs):
        generator, rng = loop.epoch_generator(args.seed, epoch), np.random.default_rng([args.seed, epoch])
        network.train()
        total, skipped = 0.0, 0
        progress = tqdm(range(args.steps), f"epoch {epoch}", leave=False)
        for number in progress:
            done = epoch + number / args.steps
            shown, wanted, counts = (part.to(device) for part in tiles["train"].draw(args.batch_size, rng))
            views = jitter_stain(to_float(shown), generator, args.stain, args.stain / 4)
            views = jitter_light(views, generator, args.light, args.light)
            views = jitter_focus(views, generator, args.focus, args.focus / 2)
            (loss,), _ = step(views, wanted, counts)
            if guard.passes_over(loss, epoch):
                skipped += 1
                continue
            rate = args.lr * min(1, done + 1 / args.steps) * loop.cosine(done / args.epochs)
            step.update(rate, epoch * args.steps + number)
            total += loss
            progress.set_postfix(loss=f"{loss:.3f}", val_loss=f"{log[-1]['val_loss']:.3f}" if log else "-")

        with torch.inference_mode(), loop.autocast(device):
            val_loss = float(focal_loss(ema(to_float(held_out[0])).float(), *held_out[1:]))
        loss = total / max(args.steps - skipped, 1)
        log.append({"epoch": epoch, "loss": loss, "val_loss": val_loss, "skipped": skipped})
        loop.save_epoch(Path(args.out), log, modules, settings=settings)
    return ema, log


if __name__ == "__main__":
    run_script(main, args)
