"""Stage 8 of 9: train the detector by difficulty-graded supervised contrastive learning on subclasses.

Reads SCL.csv of stage 7, the patches it names, the val patches, and the dataset's val fields for the threshold.
Writes OUT/model.pt (best epoch on val), subclasses.csv (subclass of every training patch), log.csv, curves.png,
val_curve.csv, reliability.png (calibration), subclasses.png (patches of each subclass), embedding.png, run.json and, to
resume from, last.pt.
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dasc.data.patches import load_patches
from dasc.data.tables import LABELS, ValFields, read_cut_fields, read_cut_run, read_patches
from dasc.detect.val import fit_to_val
from dasc.errors import InputError
from dasc.files import sha256, write_csv
from dasc.model.augment import located_view
from dasc.model.checkpoint import (
    Detector,
    interpolate,
    load_initial_weights,
    read_last,
    save_checkpoint,
    save_detector,
    training_settings,
)
from dasc.model.clusters import concentration, subclasses
from dasc.model.difficulty import join_by_patch, read_scl
from dasc.model.inference import embed_patches, score_patches
from dasc.model.loop import balanced_order, batches, best_f1, check_batch, cosine
from dasc.model.losses import (
    graded_cross_entropy,
    localisation,
    subclass_contrastive,
    subclass_temperatures,
    supervised_contrastive,
)
from dasc.model.network import CamNetwork, fold_batch_norms, update_average
from dasc.report.plots import contact_sheet, detector_curves, embedding, reliability
from dasc.run import pick_device, positive, record_run, run_script, share, true_or_false

# Edit here, or override one run with the flag of the same name.
MANIFEST = "data/patches_ns/patches.csv"  # all patches; those of val choose the best epoch
SCL = "results/DMU_hard/SCL.csv"  # the training patches that stay, with their levels (stage 7)
OUT = "results/DMU_scl"  # folder to write
DATA_ROOT = ""  # dataset folder with the val fields; empty: where it lay at stage 1
BACKBONE = "resnet18"  # any timm model that gives feature maps
STRIDE = 16  # px of the patch per cell of the CAM; 16 is the third block of ResNet18
PRETRAINED = True  # start from timm's ImageNet weights (needs the model hub)
INIT_WEIGHTS = ""  # start from this timm state dict or model.pt on disk instead
START_SHARE = 0.5  # how far the kept weights go back to a model.pt that --init_weights names; 0: not at all
EPOCHS = 99  # passes over as many label-balanced patches as SCL.csv holds
WARMUP = 10  # epochs whose contrastive loss compares labels; then it compares subclasses
CLUSTER_EVERY = 10  # epochs after which the subclasses are found anew
SUBCLASSES = 4  # clusters per label; fewer where a label has fewer patches
BATCH_SIZE = 128  # patches per step
LR = 1e-4  # learning rate of Adam at the start; it falls to 0 along a cosine
CONTRASTIVE_WEIGHT = 0.1  # of the contrastive loss beside the classification loss
LOCALISATION_WEIGHT = 0.01  # of the distance in px between the activation's centre and the annotated point
TEMPERATURE = 0.1  # of the contrastive losses; lower looks at the nearest patches only
GAMMA = 0.25  # weight of the rest of the label beside the own subclass
LEVELS = 3  # levels of difficulty, as in clus_hard.py; clean patches have the next one
LEVEL_TEMPERATURE = 0.5  # the hardest level's temperature is higher by this share, that of easier levels by less
LEVEL_WEIGHT = 0.5  # the hardest level's anchors weigh less by this share, those of easier levels by less
SMOOTHING = 0.1  # label smoothing of hard patches below the hardest level
GCE_Q = 0.7  # exponent of the hardest level's generalised cross entropy: towards 0 cross entropy, 1: mean error
AVERAGE = 0.98  # the kept weights are a running average over about 1 / (1 - AVERAGE) steps; 0: those of the last step
STAIN = 0.2  # stain augmentation: relative change of each stain's amount; 0 turns it off
LIGHT = 0.2  # relative change of brightness and contrast
FOCUS = 0.8  # largest share of fine detail blurred away, and half of it sharpened
NAN_STEPS = 10  # steps in a row without a finite loss before training stops
MATCH_UM = 7.5  # a detection this near to a mitosis is right; also the distance within which detections merge
PER_MM2 = 3000.0  # candidates per mm2 looked at in the val fields, as in predict.py
VIEWS = 8  # right-angle views averaged for every likely candidate, as in predict.py
PER_GROUP = 24  # patches shown per subclass
DEVICE = "auto"  # auto, cpu, cuda or mps
SEED = 0
WORKERS = 2  # threads that read patches into memory
RESUME = False  # True: go on from OUT/last.pt

LOSSES = ("loss", "classification", "contrastive", "localisation")  # columns of log.csv: their weighted sum, and each


def build_parser() -> argparse.ArgumentParser:
    """Flags: the constants above in lower case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", default=MANIFEST, help="patches.csv with the patches of SCL.csv and of val")
    parser.add_argument("--scl", default=SCL, help="SCL.csv of stage 7")
    parser.add_argument("--out", default=OUT, help="folder to write")
    parser.add_argument("--data_root", default=DATA_ROOT, help="dataset folder (default: where it lay at stage 1)")
    parser.add_argument("--backbone", default=BACKBONE, help="timm model")
    parser.add_argument("--stride", type=int, default=STRIDE, help="px per cell of the CAM")
    parser.add_argument("--pretrained", type=true_or_false, default=PRETRAINED, help="timm's ImageNet weights")
    parser.add_argument("--init_weights", default=INIT_WEIGHTS, help="timm state dict or model.pt to start from")
    parser.add_argument("--start_share", type=share, default=START_SHARE, help="of that model.pt in the kept weights")
    parser.add_argument("--epochs", type=positive, default=EPOCHS)
    parser.add_argument("--warmup", type=int, default=WARMUP, help="epochs that contrast labels, not subclasses")
    parser.add_argument("--cluster_every", type=positive, default=CLUSTER_EVERY, help="epochs between clusterings")
    parser.add_argument("--subclasses", type=positive, default=SUBCLASSES, help="clusters per label")
    parser.add_argument("--batch_size", type=positive, default=BATCH_SIZE, help="patches per step")
    parser.add_argument("--lr", type=float, default=LR, help="learning rate at the start")
    parser.add_argument("--contrastive_weight", type=float, default=CONTRASTIVE_WEIGHT, help="of the contrastive loss")
    parser.add_argument("--localisation_weight", type=float, default=LOCALISATION_WEIGHT, help="of the localisation")
    parser.add_argument("--temperature", type=float, default=TEMPERATURE, help="of the contrastive losses")
    parser.add_argument("--gamma", type=float, default=GAMMA, help="weight of the rest of the label")
    parser.add_argument("--levels", type=positive, default=LEVELS, help="levels of difficulty, as in clus_hard.py")
    parser.add_argument("--level_temperature", type=float, default=LEVEL_TEMPERATURE, help="added for harder levels")
    parser.add_argument("--level_weight", type=float, default=LEVEL_WEIGHT, help="taken from harder levels' anchors")
    parser.add_argument("--smoothing", type=float, default=SMOOTHING, help="label smoothing of hard patches")
    parser.add_argument("--gce_q", type=float, default=GCE_Q, help="exponent of the hardest level's loss, above 0")
    parser.add_argument("--average", type=float, default=AVERAGE, help="decay of the running average of the weights")
    parser.add_argument("--stain", type=float, default=STAIN, help="strength of stain augmentation")
    parser.add_argument("--light", type=float, default=LIGHT, help="strength of brightness and contrast changes")
    parser.add_argument("--focus", type=float, default=FOCUS, help="strength of blurring and sharpening")
    parser.add_argument("--nan_steps", type=int, default=NAN_STEPS, help="steps without a finite loss before it stops")
    parser.add_argument("--match_um", type=float, default=MATCH_UM, help="a detection this near is right")
    parser.add_argument("--per_mm2", type=float, default=PER_MM2, help="candidates per mm2 in the val fields")
    parser.add_argument("--views", type=int, default=VIEWS, choices=(1, 2, 4, 8), help="views averaged per candidate")
    parser.add_argument("--per_group", type=int, default=PER_GROUP, help="patches shown per subclass")
    parser.add_argument("--device", default=DEVICE, help="auto, cpu, cuda or mps")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--workers", type=positive, default=WORKERS, help="threads that read patches")
    parser.add_argument("--resume", type=true_or_false, nargs="?", const=True, default=RESUME)
    return parser


def main(args: argparse.Namespace) -> int:
    for name in ("temperature", "gce_q"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name} {getattr(args, name)}: expected more than 0")
    device = pick_device(args.device)
    manifest, scl_path, out = Path(args.manifest), Path(args.scl), Path(args.out)
    table = read_patches(manifest)
    val = table[table["split"] == "val"]
    train = training_patches(table[table["split"] == "train"], manifest, scl_path, args)
    for label, word in LABELS.items():
        if not (val["label"] == label).any():
            raise InputError(f"{manifest}: split val has no {word} patch ({len(val)} in all); see --val of stage 1")
    cut = read_cut_run(manifest.parent)["arguments"]
    data_root, fields, annotations = read_cut_fields(manifest.parent, args.data_root)
    for path in fields.loc[fields["split"] == "val", "path"]:
        if not (data_root / path).is_file():
            raise InputError(f"{data_root / path}: this val field is gone; --data_root names the dataset's folder")
    train_patches, val_patches = (
        load_patches([manifest.parent / patch for patch in part["patch"]], args.workers) for part in (train, val)
    )
    patch_size = train_patches.shape[-1]
    check_batch(args.batch_size, patch_size, args.stride)
    labels, levels = (torch.tensor(train[name].to_numpy()) for name in ("label", "level"))
    points_px = torch.tensor(train[["point_x_px", "point_y_px"]].to_numpy(np.float32))
    check_points(train, points_px, patch_size, manifest)
    points_px[labels == 0] = torch.nan  # look-alikes were annotated too, but only mitoses are to be located
    # 0 for clean patches, rising to 1 for the hardest level
    difficulty = torch.where(levels == args.levels, 0.0, (levels + 1) / args.levels)

    torch.manual_seed(args.seed)
    network = CamNetwork(args.backbone, args.stride, args.pretrained and not args.init_weights and not args.resume)
    start = load_initial_weights(network, Path(args.init_weights)) if args.init_weights else None
    network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    settings = training_settings(args, manifest=args.manifest, scl=args.scl, init_weights=args.init_weights)
    average = copy.deepcopy(network).eval()
    log, best, groups, spreads = [], None, torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.double)
    if args.resume:
        keys = ("model", "average", "optimizer", "log", "best", "groups", "spreads")
        checkpoint = read_last(out / "last.pt", settings, keys)
        network.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        average.load_state_dict(checkpoint["average"])
        log, best, groups, spreads = (checkpoint[name] for name in ("log", "best", "groups", "spreads"))

    steps = -(-len(train) // args.batch_size)
    patience = max(1, min(args.nan_steps, steps))  # a short epoch is not gone through in vain
    nan_steps = 0
    for epoch in range(len(log), args.epochs):
        generator = torch.Generator().manual_seed(args.seed * 100_003 + epoch)  # an epoch draws the same when resumed
        torch.manual_seed(args.seed * 100_003 + epoch)
        if epoch >= args.warmup and (epoch - args.warmup) % args.cluster_every == 0:
            features, _ = embed_patches(fold_batch_norms(average), train_patches, 2 * args.batch_size)
            groups = torch.from_numpy(subclasses(features, labels.numpy(), args.subclasses, args.seed))
            spreads = subclass_temperatures(torch.from_numpy(concentration(features, groups.numpy())), args.temperature)
        network.train()
        totals, skipped = dict.fromkeys(LOSSES, 0.0), 0
        progress = tqdm(batches(balanced_order(labels, generator), args.batch_size), f"epoch {epoch}", leave=False)
        for step, batch in enumerate(progress):
            optimizer.param_groups[0]["lr"] = args.lr * cosine((epoch + step / steps) / args.epochs)
            there, points = train_patches[batch].to(device), points_px[batch].to(device)
            views, points = located_view(there, points, generator, args.stain, args.light, args.focus)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                maps = network.features(views)
                cam = network.cam(maps)
            cam, direction = cam.float(), F.normalize(maps.float().mean(dim=(2, 3)), dim=1)
            batch_labels, batch_levels, hardness = (x[batch].to(device) for x in (labels, levels, difficulty))
            classification = graded_cross_entropy(
                cam.amax(dim=(2, 3)),
                batch_labels,
                batch_levels,
                args.levels - 1,
                args.levels,
                args.smoothing,
                args.gce_q,
            )
            if epoch < args.warmup:
                contrastive = supervised_contrastive(direction, batch_labels, args.temperature)
            else:
                softer = 1 + args.level_temperature * hardness
                contrastive = subclass_contrastive(
                    direction,
                    batch_labels,
                    groups[batch].to(device),
                    args.temperature * softer,
                    spreads[groups[batch]].float().to(device) * softer,
                    1 - args.level_weight * hardness,
                    args.gamma,
                )
            place = localisation(cam[:, 1], points, patch_size)
            loss = classification + args.contrastive_weight * contrastive + args.localisation_weight * place
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
            for name, part in zip(totals, (loss, classification, contrastive, place), strict=True):
                totals[name] += part.item() * len(batch)
            progress.set_postfix(loss=f"{loss.item():.3f}", val_f1=f"{log[-1]['val_f1']:.3f}" if log else "-")

        scores = score_patches(fold_batch_norms(average), val_patches, 2 * args.batch_size)
        val_f1 = best_f1(val["label"].to_numpy(), scores.numpy())
        means = {name: total / (len(train) - skipped) for name, total in totals.items()}
        log.append({"epoch": epoch, **means, "val_f1": val_f1, "skipped": skipped})
        if best is None or val_f1 > max(row["val_f1"] for row in log[:-1]):
            best = {name: tensor.clone() for name, tensor in average.state_dict().items()}
        state = {"model": network.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        state |= {"log": log, "best": best, "groups": groups, "spreads": spreads}
        write_csv(out / "log.csv", pd.DataFrame(log).round(6))  # before last.pt: with that, the epoch is done
        save_checkpoint(out / "last.pt", {**state, "settings": settings})

    if start:
        best = interpolate(best, start, args.start_share)
        print(f"the kept weights lie {args.start_share:.0%} of the way back to {args.init_weights}")
    average.load_state_dict(best)
    detector = Detector(
        network=fold_batch_norms(average),
        patch_size=patch_size,
        patch_um_per_px=cut["patch_um_per_px"],
        normalise_stain=cut["normalise_stain"],
        per_mm2=args.per_mm2,
        merge_um=args.match_um,
        views=args.views,
        manifest_sha256=sha256(manifest),
    )
    val_fields = ValFields(data_root, fields[fields["split"] == "val"], annotations[annotations["label"] == 1])
    detector, curve, probabilities, right = fit_to_val(
        detector, val_fields, batch_size=2 * args.batch_size, match_um=args.match_um
    )
    reliability(out / "reliability.png", probabilities, right, detector.calibration)
    features, _ = embed_patches(detector.network, train_patches, 2 * args.batch_size)
    train["subclass"] = subclasses(features, labels.numpy(), args.subclasses, args.seed)
    save_detector(out / "model.pt", detector, best, scl_sha256=sha256(scl_path))
    write_csv(out / "subclasses.csv", train[["patch", "label", "level", "subclass"]])
    write_csv(out / "val_curve.csv", curve.round(6))
    panels = {name: [name] for name in LOSSES} | {"F1 of the val patches": ["val_f1"]}
    detector_curves(out, pd.DataFrame(log), panels, curve, detector.threshold)
    draw_subclasses(out / "subclasses.png", train, train_patches, args)
    level = train["level"].map(lambda level: "clean" if level == args.levels else f"level {level}")
    subclass = train["label"].map(LABELS) + " " + train["subclass"].astype(str)
    embedding(out / "embedding.png", features, {"subclass": subclass, "level": level})
    epoch = max(range(len(log)), key=lambda index: log[index]["val_f1"])
    facts = {"patches": len(train), "best_epoch": epoch, "threshold": detector.threshold}
    facts["skipped_patches"] = sum(row["skipped"] for row in log)  # of steps without a finite loss
    facts["start_share"] = args.start_share if start else 0.0
    facts["subclasses"] = {
        word: train.loc[train["label"] == label, "subclass"].nunique() for label, word in LABELS.items()
    }
    for word, count in facts["subclasses"].items():
        if count < args.subclasses:
            print(f"{word}: {count} subclasses, not {args.subclasses}: its patches give no more different features")
    record_run(out, args, inputs={manifest: len(table), scl_path: len(train)}, device=device, **facts)
    f1 = curve["f1"].max() if len(curve) else 0.0
    print(f"best epoch {epoch}; val fields: F1 {f1:.3f} at best; threshold {detector.threshold:.3f}")
    print(f"wrote {out / 'model.pt'}")
    return 0


def training_patches(train: pd.DataFrame, manifest: Path, scl_path: Path, args: argparse.Namespace) -> pd.DataFrame:
    """The rows of the manifest that SCL.csv keeps, in its order, with their level."""
    scl = read_scl(scl_path, args.levels)
    kept = join_by_patch(scl, train[train["patch"].isin(scl["patch"])], scl_path, manifest)
    for label, word in LABELS.items():
        if not (kept["label"] == label).any():
            raise InputError(f"{scl_path}: no {word} patch among {len(kept)}; clus_scl.py prints where they went")
    return kept


def check_points(train: pd.DataFrame, points_px: torch.Tensor, patch_size: int, manifest: Path) -> None:
    """Raise InputError where a patch has an annotated point (one without has NaN) that lies outside the patch."""
    outside = ((points_px < -0.5) | (points_px >= patch_size - 0.5)).any(dim=1).numpy()
    if outside.any():
        row = train[outside].iloc[0]
        raise InputError(
            f"{manifest}: {outside.sum()} patches whose annotated point lies outside the patch of {patch_size} px "
            f"(first: {row['patch']} with {row['point_x_px']:g}, {row['point_y_px']:g}); cut them again"
        )


def draw_subclasses(path: Path, train: pd.DataFrame, patches: torch.Tensor, args: argparse.Namespace) -> None:
    """Contact sheet: patches of every subclass, drawn at random."""
    rng, sheet = np.random.default_rng(args.seed), []
    for (label, subclass), rows in train.reset_index(drop=True).groupby(["label", "subclass"]):
        shown = rng.permutation(rows.index.to_numpy())[: args.per_group]
        captions = ["clean" if level == args.levels else f"level {level}" for level in train["level"].iloc[shown]]
        title = f"{LABELS[label]}: subclass {subclass}, {len(rows)} patches, shown here"
        sheet.append((title, patches[shown].permute(0, 2, 3, 1).numpy(), captions))
    contact_sheet(path, sheet, per_group=args.per_group)


if __name__ == "__main__":
    run_script(main, build_parser().parse_args())
