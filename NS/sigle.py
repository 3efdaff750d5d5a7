"""Stage 2 of 9: train the search network that tells mitosis from negative patches.

Reads patches.csv and the patches of stage 1 (or 3), and the dataset's val fields to choose the threshold; patches that
come from no fields (pre/split_patches.py) have it chosen on the val patches and are judged in OUT/test.json.
With --hard the training patches that stage 5 called noisy are left out.
Writes OUT/model.pt (best epoch on val), log.csv, curves.png, val_curve.csv, reliability.png (calibration; with fields
only), run.json and, to resume from, last.pt.
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dasc.data.patches import load_patches
from dasc.data.tables import LABELS, ValFields, read_cut_fields, read_cut_run, read_patches
from dasc.detect.val import fit_to_patches, fit_to_val, judge_patches
from dasc.errors import InputError
from dasc.files import sha256, write_csv, write_json
from dasc.model.augment import training_view
from dasc.model.checkpoint import (
    Detector,
    interpolate,
    load_initial_weights,
    read_last,
    save_checkpoint,
    save_detector,
    training_settings,
)
from dasc.model.difficulty import join_by_patch, read_verdicts
from dasc.model.inference import score_patches
from dasc.model.loop import balanced_order, batches, best_f1, check_batch, cosine
from dasc.model.network import CamNetwork, fold_batch_norms, update_average
from dasc.report.plots import detector_curves, reliability
from dasc.run import pick_device, positive, record_run, run_script, share, true_or_false

# Edit here, or override one run with the flag of the same name.
MANIFEST = "data/patches/patches.csv"  # patches to train on
HARD = ""  # hard.csv of stage 5, whose noisy patches are left out of the training; empty: none is
OUT = "results/NS"  # folder to write
DATA_ROOT = ""  # dataset folder with the val fields; empty: where it lay at stage 1
BACKBONE = "resnet18"  # any timm model that gives feature maps
STRIDE = 16  # px of the patch per cell of the CAM; 16 is the third block of ResNet18
PRETRAINED = True  # start from timm's ImageNet weights (needs the model hub)
INIT_WEIGHTS = ""  # start from this timm state dict or model.pt on disk instead
START_SHARE = 0.5  # how far the kept weights go back to a model.pt that --init_weights names; 0: not at all
EPOCHS = 25  # passes over as many label-balanced patches as the training split holds
BATCH_SIZE = 128  # patches per step
LR = 1e-4  # learning rate of Adam at the start; it falls to 0 along a cosine
AVERAGE = 0.98  # the kept weights are a running average over about 1 / (1 - AVERAGE) steps; 0: those of the last step
STAIN = 0.2  # stain augmentation: relative change of each stain's amount; 0 turns it off
LIGHT = 0.2  # relative change of brightness and contrast
FOCUS = 0.8  # largest share of fine detail blurred away, and half of it sharpened
NAN_STEPS = 10  # steps in a row without a finite loss before training stops
MATCH_UM = 7.5  # a detection this near to a mitosis is right; also the distance within which detections merge
PER_MM2 = 3000.0  # candidates per mm2 looked at in the val fields, as in predict.py
VIEWS = 8  # right-angle views averaged for every likely candidate, as in predict.py
DEVICE = "auto"  # auto, cpu, cuda or mps
SEED = 0
WORKERS = 2  # threads that read patches into memory
RESUME = False  # True: go on from OUT/last.pt


def build_parser() -> argparse.ArgumentParser:
    """Flags: the constants above in lower case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", default=MANIFEST, help="patches.csv to train on")
    parser.add_argument("--hard", default=HARD, help="hard.csv of stage 5: do not train on its noisy patches")
    parser.add_argument("--out", default=OUT, help="folder to write")
    parser.add_argument("--data_root", default=DATA_ROOT, help="dataset folder (default: where it lay at stage 1)")
    parser.add_argument("--backbone", default=BACKBONE, help="timm model")
    parser.add_argument("--stride", type=int, default=STRIDE, help="px per cell of the CAM")
    parser.add_argument("--pretrained", type=true_or_false, default=PRETRAINED, help="timm's ImageNet weights")
    parser.add_argument("--init_weights", default=INIT_WEIGHTS, help="timm state dict or model.pt to start from")
    parser.add_argument("--start_share", type=share, default=START_SHARE, help="of that model.pt in the kept weights")
    parser.add_argument("--epochs", type=positive, default=EPOCHS)
    parser.add_argument("--batch_size", type=positive, default=BATCH_SIZE, help="patches per step")
    parser.add_argument("--lr", type=float, default=LR, help="learning rate at the start")
    parser.add_argument("--average", type=float, default=AVERAGE, help="decay of the running average of the weights")
    parser.add_argument("--stain", type=float, default=STAIN, help="strength of stain augmentation")
    parser.add_argument("--light", type=float, default=LIGHT, help="strength of brightness and contrast changes")
    parser.add_argument("--focus", type=float, default=FOCUS, help="strength of blurring and sharpening")
    parser.add_argument("--nan_steps", type=int, default=NAN_STEPS, help="steps without a finite loss before it stops")
    parser.add_argument("--match_um", type=float, default=MATCH_UM, help="a detection this near is right")
    parser.add_argument("--per_mm2", type=float, default=PER_MM2, help="candidates per mm2 in the val fields")
    parser.add_argument("--views", type=int, default=VIEWS, choices=(1, 2, 4, 8), help="views averaged per candidate")
    parser.add_argument("--device", default=DEVICE, help="auto, cpu, cuda or mps")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=positive, default=WORKERS, help="threads that read patches")
    parser.add_argument("--resume", type=true_or_false, nargs="?", const=True, default=RESUME)
    return parser


def main(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    manifest, out = Path(args.manifest), Path(args.out)
    table = read_patches(manifest)
    train, val = (table[table["split"] == split] for split in ("train", "val"))
    inputs = {manifest: len(table)}
    if args.hard:
        inputs[args.hard] = len(train)
        train = join_by_patch(train, read_verdicts(Path(args.hard)), manifest, Path(args.hard))
        noisy = train["verdict"] == "noisy"
        print(f"{args.hard}: {noisy.sum()} of {len(train)} training patches are noisy and left out")
        train = train[~noisy]
    for name, part in (("train", train), ("val", val)):
        for label, word in LABELS.items():
            if not (part["label"] == label).any():
                raise InputError(
                    f"{manifest}: split {name} has no {word} patch ({len(part)} in all); see --val, --test"
                )
    run = read_cut_run(manifest.parent)
    cut, cut_fields = run["arguments"], None
    if run["data_root"] is not None:
        cut_fields = read_cut_fields(manifest.parent, args.data_root)
        for path in cut_fields[1].loc[cut_fields[1]["split"] == "val", "path"]:
            if not (cut_fields[0] / path).is_file():
                raise InputError(
                    f"{cut_fields[0] / path}: this val field is gone; --data_root names the dataset's folder"
                )
    train_patches, val_patches = (
        load_patches([manifest.parent / patch for patch in part["patch"]], args.workers) for part in (train, val)
    )
    train_labels = torch.tensor(train["label"].to_numpy())

    check_batch(args.batch_size, train_patches.shape[-1], args.stride)
    torch.manual_seed(args.seed)
    network = CamNetwork(args.backbone, args.stride, args.pretrained and not args.init_weights and not args.resume)
    start = load_initial_weights(network, Path(args.init_weights)) if args.init_weights else None
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    settings = training_settings(args, manifest=args.manifest, hard=args.hard, init_weights=args.init_weights)
    average = copy.deepcopy(network).eval()
    log, best = [], None
    if args.resume:
        keys = ("model", "average", "optimizer", "log", "best")
        checkpoint = read_last(out / "last.pt", settings, keys)
        network.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        average.load_state_dict(checkpoint["average"])
        log, best = checkpoint["log"], checkpoint["best"]

    steps = -(-len(train) // args.batch_size)
    patience = max(1, min(args.nan_steps, steps))  # a short epoch is not gone through in vain
    nan_steps = 0
    for epoch in range(len(log), args.epochs):
        generator = torch.Generator().manual_seed(args.seed * 100_003 + epoch)  # an epoch draws the same when resumed
        torch.manual_seed(args.seed * 100_003 + epoch)
        network.train()
        total, skipped = 0.0, 0
        order = batches(balanced_order(train_labels, generator), args.batch_size)
        progress = tqdm(order, f"epoch {epoch}", leave=False)
        for step, batch in enumerate(progress):
            optimizer.param_groups[0]["lr"] = args.lr * cosine((epoch + step / steps) / args.epochs)
            views = training_view(train_patches[batch].to(device), generator, args.stain, args.light, args.focus)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = F.cross_entropy(network(views).float(), train_labels[batch].to(device))
            nan_steps = 0 if torch.isfinite(loss) else nan_steps + 1
            if nan_steps == patience:
                raise InputError(f"the loss was not finite in {nan_steps} steps in a row (epoch {epoch}); lower --lr")
            if nan_steps:
                skipped += len(batch)
                continue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done = epoch * steps + step  # the average forgets the first steps sooner than the later ones
            update_average(average, network, min(args.average, (1 + done) / (10 + done)))
            total += loss.item() * len(batch)
            progress.set_postfix(loss=f"{loss.item():.3f}", val_f1=f"{log[-1]['val_f1']:.3f}" if log else "-")

        scores = score_patches(fold_batch_norms(average), val_patches, 2 * args.batch_size)
        val_f1 = best_f1(val["label"].to_numpy(), scores.numpy())
        log.append({"epoch": epoch, "loss": total / (len(train) - skipped), "val_f1": val_f1, "skipped": skipped})
        if best is None or val_f1 > max(row["val_f1"] for row in log[:-1]):
            best = {name: tensor.clone() for name, tensor in average.state_dict().items()}
        state = {"model": network.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"log": log, "best": best, "settings": settings}
        write_csv(out / "log.csv", pd.DataFrame(log).round(6))  # before last.pt: with that, the epoch is done
        save_checkpoint(out / "last.pt", state)

    if start:
        best = interpolate(best, start, args.start_share)
        print(f"the kept weights lie {args.start_share:.0%} of the way back to {args.init_weights}")
    average.load_state_dict(best)
    detector = Detector(
        network=fold_batch_norms(average),
        patch_size=train_patches.shape[-1],
        patch_um_per_px=cut["patch_um_per_px"],
        normalise_stain=cut["normalise_stain"],
        per_mm2=args.per_mm2,
        merge_um=args.match_um,
        views=args.views,
        manifest_sha256=sha256(manifest),
    )
    if cut_fields:
        root, fields, annotations = cut_fields
        val_fields = ValFields(root, fields[fields["split"] == "val"], annotations[annotations["label"] == 1])
        detector, curve, probabilities, right = fit_to_val(
            detector, val_fields, batch_size=2 * args.batch_size, match_um=args.match_um
        )
        reliability(out / "reliability.png", probabilities, right, detector.calibration)
    else:
        scores = score_patches(detector.network, val_patches, 2 * args.batch_size, args.views)
        detector, curve = fit_to_patches(detector, val["label"].to_numpy(), scores.numpy())
        test = table[table["split"] == "test"]
        if len(test):  # predict.py cannot judge patches that come from no fields
            patches = load_patches([manifest.parent / patch for patch in test["patch"]], args.workers)
            scores = score_patches(detector.network, patches, 2 * args.batch_size, args.views)
            write_json(out / "test.json", judge_patches(test["label"].to_numpy(), scores.numpy(), detector.threshold))
    hard_sha256 = sha256(Path(args.hard)) if args.hard else None
    save_detector(out / "model.pt", detector, best, hard_sha256=hard_sha256)
    write_csv(out / "val_curve.csv", curve.round(6))
    panels = {"cross entropy": ["loss"], "F1 of the val patches": ["val_f1"]}
    detector_curves(out, pd.DataFrame(log), panels, curve, detector.threshold)
    epoch = max(range(len(log)), key=lambda index: log[index]["val_f1"])
    skipped = sum(row["skipped"] for row in log)  # patches of steps without a finite loss
    facts = {"best_epoch": epoch, "threshold": detector.threshold, "skipped_patches": skipped}
    facts["start_share"] = args.start_share if start else 0.0
    record_run(out, args, inputs=inputs, device=device, **facts)
    f1 = curve["f1"].max() if len(curve) else 0.0
    judged = "fields" if cut_fields else "patches"
    print(f"best epoch {epoch}; val {judged}: F1 {f1:.3f} at best; threshold {detector.threshold:.3f}")
    print(f"wrote {out / 'model.pt'}")
    return 0


if __name__ == "__main__":
    run_script(main, build_parser().parse_args())
