"""Stage 2 of 9: train the search network that tells mitosis from negative patches.

Reads patches.csv and the patches of stage 1 (or 3), and the dataset's validation fields to choose the threshold. Where
patches come from no fields (pre/split_patches.py) the validation patches choose it, and OUT/test.json judges it.
Writes OUT/model.pt (best epoch on validation), log.csv, curves.png, val_curve.csv, reliability.png (calibration; with
fields only), run.json and, to resume from, last.pt.
"""

import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dasc.flags import Amount, Count, Device, Positive, Share, read_flags

# Edit here, or override one run with the flag of the same name.
MANIFEST = "data/patches/patches.csv"  # patches to train on
HARD = ""  # hard.csv of stage 5, whose noisy patches are left out of the training; empty: none is
OUT = "results/NS"  # folder to write
DATA_ROOT = ""  # dataset folder with the validation fields; empty: where it lay at stage 1
BACKBONE = "resnet18"  # any timm model that gives feature maps
STRIDE: Count = 16  # px of the patch per cell of the CAM; 16 is the third block of ResNet18
PRETRAINED = True  # start from timm's ImageNet weights (needs the model hub)
INIT_WEIGHTS = ""  # start from this timm state dict or model.pt on disk instead
START_SHARE: Share = 0.5  # weight interpolation: share of the model.pt of --init_weights in the kept weights
EPOCHS: Count = 25  # passes over as many label-balanced patches as the training split holds
BATCH_SIZE: Count = 128  # patches per step
LR: Positive = 1e-4  # learning rate of Adam at the start; it falls to 0 along a cosine
EMA: Share = 0.98  # decay per step of the moving average of the weights, which is what is kept; 0: the last step's
STAIN: Amount = 0.2  # stain augmentation: relative change of each stain's amount; 0 turns it off
LIGHT: Amount = 0.2  # augmentation: relative change of brightness and contrast
FOCUS: Share = 0.8  # augmentation: largest share of fine detail blurred away, and half of it sharpened
NAN_STEPS: Count = 10  # steps in a row without a finite loss before training stops
MATCH_UM: Positive = 7.5  # a detection this near to a mitosis is right; within it detections merge into the strongest
PER_MM2: Positive = 3000.0  # candidates per mm2 looked at in the validation fields, and by predict.py with this model
VIEWS: Literal[1, 2, 4, 8] = 8  # test-time augmentation: turned and mirrored views averaged per likely candidate
DEVICE: Device = "auto"  # auto takes cuda, else mps, else cpu
SEED = 0  # of the first weights, the draws and the augmentation
WORKERS: Count = 2  # threads that read patches into memory
RESUME = False  # True: go on from OUT/last.pt

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dasc.data.cut import read_cut, read_val_fields
from dasc.data.pack import open_patches
from dasc.data.tables import SPLITS, check_both_labels, read_patches, without_noisy
from dasc.detect.val import fit_to_patches, fit_to_val, judge_patches
from dasc.files import write_json
from dasc.model import loop, processes
from dasc.model.augment import training_view
from dasc.model.inference import score_patches
from dasc.model.start import training_settings
from dasc.model.step import Step
from dasc.report.plots import reliability
from dasc.report.trained import write_detector
from dasc.run import pick_device, record_run, run_script


def main(args) -> int:
    device = pick_device(args.device, processes.size() > 1)
    manifest, out = Path(args.manifest), Path(args.out)
    table = read_patches(manifest)
    parts = {split: table[table["split"] == split] for split in SPLITS}
    if args.hard:
        parts["train"] = without_noisy(parts["train"], manifest, Path(args.hard))
    for split in ("train", "val"):
        check_both_labels(parts[split], f"{manifest}: split {split}", "see --val and --test of pre/cut_patch_2.py")
    cut, fields = read_cut(manifest.parent), read_val_fields(manifest.parent, args.data_root, optional=True)
    loop.check_batch(args.batch_size, cut.patch_size, args.stride)
    names = {split: part["patch"].tolist() for split, part in parts.items()}
    patches = {of: open_patches(manifest.parent, names[of], args.workers, cut.patch_size) for of in ("train", "val")}
    labels = {split: torch.tensor(part["label"].to_numpy()) for split, part in parts.items()}

    settings = training_settings(args, manifest=manifest, hard=args.hard, init_weights=args.init_weights)
    processes.start(device, settings)
    network, start = loop.start_network(args, device, resumed=args.resume)
    best, log = train(network, patches, labels, settings, args)
    if not processes.finish():
        return 0
    detector, best = loop.kept_detector(network, best, start, cut, args, settings["manifest_sha256"])

    if fields:
        detector, curve, *judged = fit_to_val(detector, fields, batch_size=2 * args.batch_size, match_um=args.match_um)
        reliability(out / "reliability.png", *judged, detector.calibration)
    else:
        scores = score_patches(detector.network, patches["val"], 2 * args.batch_size, args.views)
        detector, curve = fit_to_patches(detector, labels["val"].numpy(), scores.numpy())
        if names["test"]:  # predict.py cannot judge patches that come from no fields
            test = open_patches(manifest.parent, names["test"], args.workers, cut.patch_size)
            scores = score_patches(detector.network, test, 2 * args.batch_size, args.views)
            write_json(out / "test.json", judge_patches(labels["test"].numpy(), scores.numpy(), detector.threshold))
    panels = {"cross entropy": ["loss"], "F1 of the val patches": ["val_f1"]}
    facts = write_detector(out, detector, best, curve, log, panels, hard_sha256=settings.get("hard_sha256"))
    inputs = {manifest: len(table)} | ({args.hard: len(names["train"])} if args.hard else {})
    record_run(out, args, inputs=inputs, device=device, start_share=args.start_share if start else 0.0, **facts)
    return 0


def train(network, patches: dict, labels: dict, settings: dict, args) -> tuple[dict, list[dict]]:
    """The averaged weights of the best epoch on the validation patches, and the log.

    patches: (N, 3, S, S) uint8 of train and val. labels: (N,) of each.
    """
    out, device = Path(args.out), next(network.parameters()).device
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    ema, average = loop.averaged(network)
    modules = {"model": network, "ema": ema, "optimizer": optimizer}
    log, best = loop.begin(args, settings, modules, best=None)
    steps = -(-len(labels["train"]) // args.batch_size)
    guard = loop.LossGuard(args.nan_steps, steps)
    learned = loop.Rows(device, labels["train"], patches=patches["train"])

    def losses(views, truth):
        with loop.autocast(device):
            return [F.cross_entropy(processes.gathered(network(views), len(truth)).float(), truth)], []

    step = Step(losses, optimizer, average, args.ema)
    for epoch in range(len(log), args.epochs):
        generator = loop.epoch_generator(args.seed, epoch)
        network.train()
        total, skipped = 0.0, 0
        order = loop.batches(loop.balanced_order(labels["train"], generator), args.batch_size)
        progress = tqdm(order, f"epoch {epoch}", leave=False)
        for number, batch in enumerate(progress, epoch * steps):
            shown, truth = learned(batch)
            views = training_view(shown, processes.draws(generator, len(batch)), args.stain, args.light, args.focus)
            (loss,), _ = step(views, truth)
            if guard.passes_over(loss, epoch):
                skipped += len(batch)
                continue
            step.update(args.lr * loop.cosine(number / (steps * args.epochs)), number)
            total += loss * len(batch)
            progress.set_postfix(loss=f"{loss:.3f}", val_f1=f"{log[-1]['val_f1']:.3f}" if log else "-")

        f1 = loop.val_f1(ema, patches["val"], labels["val"].numpy(), 2 * args.batch_size)
        if best is None or f1 > max(row["val_f1"] for row in log):
            best = loop.copy_of(ema.state_dict())
        log.append({"epoch": epoch, "loss": total / (len(labels["train"]) - skipped), "val_f1": f1, "skipped": skipped})
        loop.save_epoch(out, log, modules, best=best, settings=settings)
    return best, log


if __name__ == "__main__":
    run_script(main, args, join=processes.join)
