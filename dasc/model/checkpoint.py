"""Models on disk: the detector with all that using it depends on."""

import io
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dasc.errors import InputError
from dasc.files import replacing, sha256
from dasc.judge.calibration import UNCALIBRATED, Calibration
from dasc.model.first_look import FirstLook
from dasc.model.network import CLASSES, CamNetwork, fold_batch_norms

SCAN_SETTINGS = ("per_mm2", "merge_um", "views")
CONFIG = (  # what the config of every detector holds, beside the hashes of what it was made from
    "network",
    "backbone",
    "stride",
    "patch_size",
    "um_per_px",
    "normalise_stain",
    "classes",
    "threshold",
    "temperature",
    "offset",
    "alignment",
    "val_curve",
    *SCAN_SETTINGS,
    "manifest_sha256",
)


@dataclass(frozen=True)
class Detector:
    """A network and how it is used; `dataclasses.replace` makes variants.

    network: ready for prediction: in evaluation mode, with folded batch norms.
    patch_size: px. patch_um_per_px: um/px of its patches, None where it is not known.
    normalise_stain: whether its patches had their stain normalised.
    per_mm2, merge_um, views: how fields are scanned: candidates looked at per mm2, um within which detections merge,
    views of test-time augmentation. The threshold holds for these.
    manifest_sha256: of the patches.csv that it was trained on.
    threshold: calibrated probability from which a detection is a mitosis.
    val_curve: columns threshold, precision, recall, f1 of the val fields; None where it has seen none.
    sha256: of the file that it was loaded from.
    first_look: what ranks the candidates, ready for prediction, whose log odds are added to the network's; None: they
    are ranked by `candidates.score_candidates`.
    """

    network: CamNetwork
    patch_size: int
    patch_um_per_px: float | None
    normalise_stain: bool
    per_mm2: float
    merge_um: float
    views: int
    manifest_sha256: str | None
    threshold: float = 0.5
    calibration: Calibration = UNCALIBRATED
    val_curve: dict[str, list] | None = None
    sha256: str = ""
    first_look: FirstLook | None = None


def load_detector(path: Path, device: torch.device) -> Detector:
    """Load a detector of stage 2 or 8, its network on `device`.

    Raises: InputError: no such file, not a checkpoint (files that would run code are refused), a network of another
    kind, a config that lacks something or has impossible values, weights that do not fit it or are not finite.
    """
    checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    _check_config(path, config)
    network = CamNetwork(config["backbone"], config["stride"])
    network = _with_weights(network, checkpoint["model"], path, device)
    first_look = None
    if (stored := checkpoint.get("first_look")) is not None:
        if not isinstance(stored, dict) or not isinstance(stored.get("backbone"), str):
            raise InputError(f"{path}: its first look names no backbone; train it again")
        first_look = _with_weights(FirstLook(stored["backbone"]), stored.get("model"), path, device)
    return Detector(
        network=network,
        patch_size=config["patch_size"],
        patch_um_per_px=config["um_per_px"],
        normalise_stain=config["normalise_stain"],
        per_mm2=config["per_mm2"],
        merge_um=config["merge_um"],
        views=config["views"],
        manifest_sha256=config["manifest_sha256"],
        threshold=config["threshold"],
        calibration=Calibration(config["temperature"], config["offset"], config["alignment"]),
        val_curve=config["val_curve"],
        sha256=sha256(path),
        first_look=first_look,
    )


def _with_weights(network: nn.Module, weights: Any, path: Path, device: torch.device) -> nn.Module:
    """The network with the weights of a checkpoint, on the device, ready for prediction."""
    try:
        network.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: its weights do not fit its own config ({network.backbone_name})") from error
    if not all(torch.isfinite(tensor).all() for tensor in network.state_dict().values()):
        raise InputError(f"{path}: its weights are not all finite numbers; train it again")  # it would find nothing
    return fold_batch_norms(network.to(device, memory_format=torch.channels_last))


def save_detector(
    path: Path,
    detector: Detector,
    weights: dict[str, Tensor],
    first_look: dict[str, Tensor] | None = None,
    **sources: str | None,
) -> None:
    """Write a detector; the same content gives the same bytes.

    It is {"model": weights, "config": ...}, with a first look also "first_look": {"backbone": ..., "model": weights}.

    weights, first_look: state dicts of its networks before the batch norms were folded.
    sources: SHA-256 of what else it was made from, by name; those that are None are left out.
    """
    calibration = detector.calibration
    values = {
        "network": "cam",
        "backbone": detector.network.backbone_name,
        "stride": detector.network.stride,
        "patch_size": detector.patch_size,
        "um_per_px": detector.patch_um_per_px,
        "normalise_stain": detector.normalise_stain,
        "classes": list(CLASSES),
        "threshold": detector.threshold,
        "temperature": calibration.temperature,
        "offset": calibration.offset,
        "alignment": calibration.alignment,
        "val_curve": detector.val_curve,
        "per_mm2": detector.per_mm2,
        "merge_um": detector.merge_um,
        "views": detector.views,
        "manifest_sha256": detector.manifest_sha256,
    }
    values |= {name: source for name, source in sources.items() if source is not None}
    content = {"model": weights, "config": values}
    if first_look is not None:
        content["first_look"] = {"backbone": detector.first_look.backbone_name, "model": first_look}
    save_checkpoint(path, _interned(content))


def sources_of(config: dict[str, Any]) -> dict[str, str]:
    """The hashes of a config that its detector does not hold: of what else it was made from, by name."""
    return {name: value for name, value in config.items() if name.endswith("_sha256") and name != "manifest_sha256"}


def _interned(value: Any) -> Any:
    """The same values with equal texts as one object: pickle writes an object once, and after that a reference."""
    if isinstance(value, dict):
        return {_interned(name): _interned(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_interned(entry) for entry in value]
    return sys.intern(value) if type(value) is str else value


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Save tensors and plain types, so that the file loads with `weights_only=True`; same content, same bytes."""
    buffer = io.BytesIO()  # given a path, torch writes its name into the file, and on a full disk hides why it failed
    torch.save(checkpoint, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a finished model of ours, of any stage: a dict with at least model (state dict) and config (a dict).

    Raises: InputError: as `read_tensors`, or without these two.
    """
    checkpoint = read_tensors(path)
    if not isinstance(checkpoint, dict) or "model" not in checkpoint or not isinstance(checkpoint.get("config"), dict):
        raise InputError(f"{path}: not a checkpoint of this project (expected model and config in it)")
    return checkpoint


def read_tensors(path: Path) -> Any:
    """Read tensors and plain types that torch saved, onto the CPU.

    Raises: InputError: no such file, or one that holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; a training script writes it (stage 2: NS/sigle.py); name another with --model_path"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes the unpickler raise anything
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a readable checkpoint, or one that would run code ({reason})") from error


def _check_config(path: Path, config: dict[str, Any]) -> None:
    """Raise InputError where a config is not that of a detector."""
    if config.get("network") == "dual":
        raise InputError(f"{path}: holds the dual network of stage 4; expected a model of stage 2 (NS) or 8 (DMU_scl)")
    absent = [key for key in CONFIG if key not in config]
    if absent:
        raise InputError(f"{path}: made by an older version, its config lacks {', '.join(absent)}; train it again")
    if config["classes"] != list(CLASSES):
        raise InputError(f"{path}: its classes are {str(config['classes'])[:60]}, expected {list(CLASSES)}")
    strange = [key for key, value in config.items() if not _is_sound(key, value)]
    if strange:
        value = str(config[strange[0]])[:60]
        raise InputError(f"{path}: its config has {strange[0]} {value!r}; train it again")


def _is_sound(key: str, value: Any) -> bool:
    """Whether a config may have this value; keys that no reader looks at may have any."""
    is_number = isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
    if key in ("stride", "patch_size"):
        return isinstance(value, int) and is_number and 0 < value <= 4096
    if key == "views":
        return is_number and isinstance(value, int) and value in (1, 2, 4, 8)
    if key in ("um_per_px", "merge_um"):
        return (is_number and value >= 0) or (key == "um_per_px" and value is None)  # patches of unknown resolution
    if key in ("threshold", "offset"):
        return is_number
    if key == "alignment":
        return value is None or is_number
    if key in ("temperature", "per_mm2"):
        return is_number and value > 0
    if key == "val_curve":
        return value is None or _is_curve(value)
    kinds = {"network": str, "backbone": str, "normalise_stain": bool, "manifest_sha256": str | None}
    return isinstance(value, kinds.get(key, object)) and (key != "network" or value == "cam")


def _is_curve(value: Any) -> bool:
    """Whether a value has the columns of a val curve, all numbers and of one length."""
    columns = list(value.values()) if isinstance(value, dict) else []
    return (
        isinstance(value, dict)
        and {"threshold", "precision", "recall"} <= value.keys()
        and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)
        and all(isinstance(number, float | int) for column in columns for number in column)
    )
