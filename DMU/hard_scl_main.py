"""Stage 8 of 9: train the detector by difficulty-graded supervised contrastive learning on subclasses.

Reads SCL.csv of stage 7, the patches it names, the validation patches, and the dataset's validation fields for the
threshold. Writes OUT/model.pt (best epoch on validation), subclasses.csv (subclass of every training patch), log.csv,
curves.png, val_curve.csv, reliability.png (calibration), subclasses.png (patches of each subclass), embedding.png,
run.json and, to resume from, last.pt.
"""

import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dasc.flags import Amount, Count, Device, Natural, Positive, Share, SomeShare, read_flags

# Edit here, or override one run with the flag of the same name.
MANIFEST = "data/patches_ns/patches.csv"  # all patches; those of validation choose the best epoch
SCL = "results/DMU_hard/SCL.csv"  # the training patches that stay, with their hardness (stage 7)
OUT = "results/DMU_scl"  # folder to write
DATA_ROOT = ""  # dataset folder with the validation fields; empty: where it lay at stage 1
BACKBONE = "resnet18"  # any timm model that gives feature maps
STRIDE: Count = 16  # px of the patch per cell of the CAM; 16 is the third block of ResNet18
PRETRAINED = True  # start from timm's ImageNet weights (needs the model hub)
INIT_WEIGHTS = ""  # start from this timm state dict or model.pt on disk instead
START_SHARE: Share = 0.5  # weight interpolation: share of the model.pt of --init_weights in the kept weights
EPOCHS: Count = 99  # passes over as many label-balanced patches as SCL.csv holds
CONTRAST_LABELS_SHARE: Share = (
    0.1  # share of EPOCHS whose contrastive loss compares labels; then it compares subclasses
)
CLUSTER_EVERY_SHARE: Share = 0.1  # share of EPOCHS after which the subclasses are found anew
SUBCLASSES: Count = 4  # clusters per label; fewer where a label has fewer patches
BATCH_SIZE: Count = 128  # patches per step
LR: Positive = 1e-4  # learning rate of Adam at the start; it falls to 0 along a cosine
CONTRASTIVE_WEIGHT: Amount = 0.1  # of the contrastive loss beside the classification loss
LOCALISATION_WEIGHT: Amount = 0.01  # of the distance in px between the activation's centre and the annotated point
TEMPERATURE: Positive = 0.1  # of the contrastive losses; lower looks at the nearest patches only
GAMMA: Amount = 0.25  # weight of the rest of the label beside the own subclass
LEVEL_TEMPERATURE: Amount = (
    0.5  # the hardest level's temperature is higher by this share, that of easier levels by less
)
LEVEL_WEIGHT: Share = 0.5  # the hardest level's anchors weigh less by this share, those of easier levels by less
SMOOTHING: Share = 0.1  # label smoothing of hard patches below the hardest level
GCE_Q: SomeShare = 0.7  # exponent of the hardest level's generalised cross entropy: near 0 cross entropy, 1: mean error
EMA: Share = 0.98  # decay per step of the moving average of the weights, which is what is kept; 0: the last step's
STAIN: Amount = 0.2  # stain augmentation: relative change of each stain's amount; 0 turns it off
LIGHT: Amount = 0.2  # augmentation: relative change of brightness and contrast
FOCUS: Share = 0.8  # augmentation: largest share of fine detail blurred away, and half of it sharpened
NAN_STEPS: Count = 10  # steps in a row without a finite loss before training stops
MATCH_UM: Positive = 7.5  # a detection this near to a mitosis is right; within it detections merge into the strongest
PER_MM2: Positive = 3000.0  # candidates per mm2 looked at in the validation fields, and by predict.py with this model
VIEWS: Literal[1, 2, 4, 8] = 8  # test-time augmentation: turned and mirrored views averaged per likely candidate
PER_GROUP: Natural = 24  # patches shown per subclass
DEVICE: Device = "auto"  # auto takes cuda, else mps, else cpu
SEED = 0  # of the first weights, the draws, the augmentation and the clusters
WORKERS: Count = 2  # threads that read patches into memory
RESUME = False  # True: go on from OUT/last.pt

if __name__ == "__main__":
    args = read_flags(globals())  # before the slow imports: --help and a wrong flag answer at once

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dasc.data.cut import read_cut, read_val_fields
from dasc.data.pack import open_patches
from dasc.data.tables import LABELS, check_both_labels, join_by_patch, read_patches, read_scl
from dasc.detect.val import fit_to_val
from dasc.errors import InputError
from dasc.files import write_csv
from dasc.model import loop, losses, processes
from dasc.model.augment import located_view
from dasc.model.clusters import concentration, subclasses
from dasc.model.inference import embed_patches
from dasc.model.start import training_settings
from dasc.model.step import Step
from dasc.report.plots import contact_sheet, embedding, reliability
from dasc.report.trained import write_detector
from dasc.run import pick_device, record_run, run_script

LOSSES = ("loss", "classification", "contrastive", "localisation")  # columns of log.csv: their weighted sum, and each


def main(args) -> int:
    device = pick_device(args.device, processes.size() > 1)
    manifest, scl_path, out = Path(args.manifest), Path(args.scl), Path(args.out)
    table = read_patches(manifest)
    val, rows = table[table["split"] == "val"], table[table["split"] == "train"]
    scl = read_scl(scl_path)
    rows = join_by_patch(scl, rows[rows["patch"].isin(scl["patch"])], scl_path, manifest)
    check_both_labels(rows, str(scl_path), "clus_scl.py prints where they went")
    check_both_labels(val, f"{manifest}: split val", "see --val of pre/cut_patch_2.py")
    cut, fields = read_cut(manifest.parent), read_val_fields(manifest.parent, args.data_root)
    loop.check_batch(args.batch_size, cut.patch_size, args.stride)
    patches, val_patches = (
        open_patches(manifest.parent, part["patch"].tolist(), args.workers, cut.patch_size) for part in (rows, val)
    )
    points_px = annotated_points(rows, cut.patch_size, manifest)

    settings = training_settings(args, manifest=manifest, scl=scl_path, init_weights=args.init_weights)
    processes.start(device, settings)
    network, start = loop.start_network(args, device, resumed=args.resume)
    best, log = train(network, patches, points_px, rows, val_patches, val["label"].to_numpy(), settings, args)
    if not processes.finish():
        return 0
    detector, best = loop.kept_detector(network, best, start, cut, args, settings["manifest_sha256"])
    detector, curve, *judged = fit_to_val(detector, fields, batch_size=2 * args.batch_size, match_um=args.match_um)
    reliability(out / "reliability.png", *judged, detector.calibration)
    panels = {name: [name] for name in LOSSES} | {"F1 of the val patches": ["val_f1"]}
    facts = write_detector(out, detector, best, curve, log, panels, scl_sha256=settings["scl_sha256"])

    features, _ = embed_patches(detector.network, patches, 2 * args.batch_size)
    rows["subclass"] = subclasses(features, rows["label"].to_numpy(), args.subclasses, args.seed)
    write_csv(out / "subclasses.csv", rows[["patch", "label", "level", "subclass"]])
    draw(out, rows, patches, features, args)
    counts = {word: rows.loc[rows["label"] == label, "subclass"].nunique() for label, word in LABELS.items()}
    for word in (word for word, count in counts.items() if count < args.subclasses):
        print(f"{word}: {counts[word]} subclasses, not {args.subclasses}: its patches give no more different features")
    facts |= {"patches": len(rows), "subclasses": counts, "start_share": args.start_share if start else 0.0}
    record_run(out, args, inputs={manifest: len(table), scl_path: len(rows)}, device=device, **facts)
    return 0


def annotated_points(rows: pd.DataFrame, patch_size: int, manifest: Path) -> torch.Tensor:
    """Annotated points of the mitoses in their patches, in px, (N, 2); NaN for a negative: it is not to be located.

    Raises:
        InputError: a patch, of whatever label, whose annotated point lies outside the patch.
    """
    points_px = torch.tensor(rows[["point_x_px", "point_y_px"]].to_numpy(np.float32))
    outside = ((points_px < -0.5) | (points_px >= patch_size - 0.5)).any(dim=1).numpy()
    if outside.any():
        row = rows[outside].iloc[0]
        raise InputError(
            f"{manifest}: {outside.sum()} patches whose annotated point lies outside the patch of {patch_size} px "
            f"(first: {row['patch']} with {row['point_x_px']:g}, {row['point_y_px']:g}); cut them again"
        )
    points_px[rows["label"].to_numpy() == 0] = torch.nan
    return points_px


def train(network, patches, points_px, rows, val_patches, val_labels, settings, args) -> tuple[dict, list[dict]]:
    """The averaged weights of the best epoch on the validation patches, and the log.

    patches: (N, 3, S, S) uint8. points_px: (N, 2). rows: (N,) label and hardness. val_patches, val_labels: (M, ...).
    """
    out, device = Path(args.out), next(network.parameters()).device
    labels, hardness = torch.tensor(rows["label"].to_numpy()), torch.tensor(rows["hardness"].to_numpy(np.float32))
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    ema, average = loop.averaged(network)
    modules = {"model": network, "ema": ema, "optimizer": optimizer}
    none = {"groups": torch.empty(0, dtype=torch.long), "spreads": torch.empty(0, dtype=torch.double)}
    log, best, groups, spreads = loop.begin(args, settings, modules, best=None, **none)
    contrast_labels = loop.epochs_of(args.contrast_labels_share, args.epochs)
    cluster_every = max(1, round(args.cluster_every_share * args.epochs))
    steps = -(-len(labels) // args.batch_size)
    guard = loop.LossGuard(args.nan_steps, steps)
    learned = loop.Rows(device, labels, hardness, patches=patches)

    def losses_of(views, points, truth, hard, group=None, spread=None):
        with loop.autocast(device):
            maps = network.features(views)
            cam = network.cam(maps)
        cam, z = cam.float(), F.normalize(maps.float().mean(dim=(2, 3)), dim=1)
        cam, z, points = (processes.gathered(part, len(truth)) for part in (cam, z, points))
        classification = losses.graded_cross_entropy(cam.amax(dim=(2, 3)), truth, hard, args.smoothing, args.gce_q)
        if group is not None:
            softer, weights = 1 + args.level_temperature * hard, 1 - args.level_weight * hard
            temperatures = args.temperature * softer, spread * softer
            contrastive = losses.subclass_contrastive(z, truth, group, *temperatures, weights, args.gamma)
        else:
            contrastive = losses.supervised_contrastive(z, truth, args.temperature)
        place = losses.localisation(cam[:, 1], points, patches.shape[-1])
        loss = classification + args.contrastive_weight * contrastive + args.localisation_weight * place
        return [loss, classification, contrastive, place], []

    step = Step(losses_of, optimizer, average, args.ema)
    for epoch in range(len(log), args.epochs):
        generator = loop.epoch_generator(args.seed, epoch)
        if epoch >= contrast_labels and (epoch - contrast_labels) % cluster_every == 0:
            features = loop.features_of(ema, patches, 2 * args.batch_size)
            found = subclasses(features, labels.numpy(), args.subclasses, args.seed)
            groups = processes.of_first(torch.from_numpy(found))
            spread = torch.from_numpy(concentration(features, groups.numpy()))
            spreads = losses.subclass_temperatures(spread, args.temperature)
        grouped = loop.Rows(device, groups, spreads[groups].float())
        network.train()
        totals, skipped = dict.fromkeys(LOSSES, 0.0), 0
        order = loop.batches(loop.balanced_order(labels, generator), args.batch_size)
        progress = tqdm(order, f"epoch {epoch}", leave=False)
        for number, batch in enumerate(progress, epoch * steps):
            shown, *known = learned(batch)
            known += grouped(batch) if epoch >= contrast_labels else []
            own, drawn = batch[processes.own(len(batch))], processes.draws(generator, len(batch))
            views, points = located_view(shown, points_px[own], drawn, args.stain, args.light, args.focus)
            parts, _ = step(views, points, *known)
            if guard.passes_over(parts[0], epoch):
                skipped += len(batch)
                continue
            step.update(args.lr * loop.cosine(number / (steps * args.epochs)), number)
            for name, part in zip(LOSSES, parts, strict=True):
                totals[name] += part * len(batch)
            progress.set_postfix(loss=f"{parts[0]:.3f}", val_f1=f"{log[-1]['val_f1']:.3f}" if log else "-")

        val_f1 = loop.val_f1(ema, val_patches, val_labels, 2 * args.batch_size)
        if best is None or val_f1 > max(row["val_f1"] for row in log):
            best = loop.copy_of(ema.state_dict())
        means = {name: total / (len(labels) - skipped) for name, total in totals.items()}
        log.append({"epoch": epoch, **means, "val_f1": val_f1, "skipped": skipped})
        loop.save_epoch(out, log, modules, best=best, groups=groups, spreads=spreads, settings=settings)
    return best, log


def draw(out: Path, rows: pd.DataFrame, patches: torch.Tensor, features: np.ndarray, args) -> None:
    """Draw patches of every subclass (subclasses.png), and all of them by their features (embedding.png)."""
    rng, sheet = np.random.default_rng(args.seed), []
    level = np.where(rows["hardness"] == 0, "clean", "level " + rows["level"].astype(str))
    for (label, subclass), members in rows.reset_index(drop=True).groupby(["label", "subclass"]):
        shown = rng.permutation(members.index.to_numpy())[: args.per_group]
        title = f"{LABELS[label]}: subclass {subclass}, {len(members)} patches, shown here"
        sheet.append((title, patches[shown].permute(0, 2, 3, 1).numpy(), level[shown].tolist()))
    contact_sheet(out / "subclasses.png", sheet, per_group=args.per_group)
    subclass = rows["label"].map(LABELS) + " " + rows["subclass"].astype(str)
    embedding(out / "embedding.png", features, {"subclass": subclass, "level": level})


if __name__ == "__main__":
    run_script(main, args, join=processes.join)
