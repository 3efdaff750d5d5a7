"""The first look: its map, its peaks, what it learns from, and what a detector that has one finds."""

import shutil
from dataclasses import replace

import cv2
import numpy as np
import pandas as pd
import pytest
import tifffile
import timm
import torch
import torch.nn.functional as F
from pipeline import LIGHT, call, fails, succeed
from scipy.spatial import cKDTree
from scipy.special import expit, logit
from test_detect import detector_of
from test_scan import assert_same, draw_tissue, found_in, slide_file, soft  # noqa: F401

from dasc.detect.field import AT_LEAST, look_at, most_seen_again, scan_field
from dasc.errors import InputError
from dasc.images.tissue import Tissue
from dasc.judge.calibration import Calibration
from dasc.model import first_look, look_map, loop
from dasc.model.checkpoint import load_detector, read_checkpoint, save_checkpoint, save_detector
from dasc.model.engine import CLOSE, OpenVinoLook, is_installed
from dasc.model.first_look import HALO, STRIDE, FirstLook, Step, focal_loss
from dasc.model.look_map import odds_map, peaks
from dasc.model.look_tiles import CELLS, DRAWN_AT, SIDE, UNSURE_CELLS, LookField, LookTiles
from dasc.model.network import CamNetwork, fold_batch_norms

CPU = torch.device("cpu")


class DarkLook(torch.nn.Module):
    """A first look whose log odds are high where it is dark."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(8.0))

    def steps(self):
        return [Step(self, reads=(1,), gives=STRIDE, channels=1, halo=0, window=128)]

    def forward(self, fields):
        return self.scale * (0.4 - F.avg_pool2d(fields.mean(1, keepdim=True), STRIDE))


def used(backbone: str) -> FirstLook:
    """A first look in evaluation mode whose batch norms do something and whose map differs from cell to cell."""
    torch.manual_seed(0)
    network = FirstLook(backbone)
    network(torch.rand(4, 3, 128, 128))
    with torch.no_grad():
        network.head[-1].weight.mul_(5)
    return network.eval()


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "resnet10t"])
def test_windows_give_the_map_of_the_whole(backbone, monkeypatch):
    network = fold_batch_norms(used(backbone))
    field = np.random.default_rng(0).integers(0, 256, (701, 503, 3), np.uint8)
    whole = odds_map(network, field)
    assert whole.shape == (176, 126) and whole.std() > 0.01
    monkeypatch.setattr(first_look, "WINDOWS", (64, 64, 80, 32))
    assert np.allclose(odds_map(network, field, cores=2), whole, atol=1e-4)
    padded = cv2.copyMakeBorder(field, 0, 3, 0, 9, cv2.BORDER_REFLECT)
    with torch.inference_mode():
        plain = network(torch.from_numpy(padded).permute(2, 0, 1)[None] / 255)[0, : whole.shape[0], : whole.shape[1]]
    assert np.allclose(plain, whole, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (16, 16), (65, 7)])
def test_fields_of_any_size(shape):
    odds = odds_map(fold_batch_norms(used("resnet10t")), np.zeros((*shape, 3), np.uint8))
    assert odds.shape == tuple(-(-side // STRIDE) for side in shape) and np.isfinite(odds).all()


@pytest.mark.parametrize("full", ["upload", "_take"])  # the field, and what is made of it
def test_a_device_that_is_too_small_is_named(full, monkeypatch):
    def no_memory(*given):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(look_map, full, no_memory)
    with pytest.raises(InputError, match="memory does not hold the maps of the field; use --device cpu"):
        odds_map(DarkLook(), np.zeros((64, 64, 3), np.uint8))


def test_backbones_that_see_too_far_or_too_little():
    """ResNet34 sees 230 px far, although its residual blocks give nothing before they are trained."""
    for backbone in ("mobilenetv3_small_100", "resnet34"):
        with pytest.raises(InputError, match=f"{backbone}: sees farther than {HALO} px"):
            FirstLook(backbone)
    with pytest.raises(InputError, match=r"a first look needs \(4, 8, 16\)"):
        FirstLook("vit_tiny_patch16_224")
    with pytest.raises(InputError, match="its layers are not in a row"):
        FirstLook("hrnet_w18_small")


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "resnet10t"])
def test_the_steps_are_the_backbone(backbone):
    """As timm itself runs it, and with the receptive field that its convolutions have."""
    network, field = used(backbone), torch.rand(1, 3, 64, 96)
    places = network.backbone.feature_info.out_indices
    plain = timm.create_model(backbone, features_only=True, out_indices=places).eval()
    plain.load_state_dict(network.backbone.state_dict(), strict=False)  # without the blocks that are left out
    given, steps = field, network.steps()
    for step, theirs in zip(steps, plain((field - network.mean) / network.std), strict=False):
        given = step.network(given)
        assert torch.equal(given, theirs) and given.shape[1] == step.channels
    by_hand = {"tf_efficientnet_lite0": [16, 32, 144, 16], "resnet10t": [16, 16, 32, 16]}
    assert [step.halo for step in steps] == by_hand[backbone]


def test_nothing_is_computed_that_is_not_used():
    """timm keeps the blocks of an EfficientNet that come after the last wanted features."""
    network = FirstLook("tf_efficientnet_lite0")
    network(torch.rand(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_peaks_lie_between_the_cells():
    centres = np.array([[10.3, 20.0], [40.0, 7.6], [55.4, 30.2]])  # in cells
    y, x = np.mgrid[:48, :64]
    odds = np.full((48, 64), -9.0, np.float32)
    for height, centre in zip((3.0, 1.0, 2.0), centres, strict=True):
        np.maximum(odds, height - 0.4 * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2), out=odds)
    points_px, strength = peaks(odds)
    assert len(points_px) == 3 and (np.diff(strength) <= 0).all()  # none on the plain
    assert np.allclose(points_px, centres[[0, 2, 1]] * STRIDE + (STRIDE - 1) / 2, atol=0.05 * STRIDE)
    assert len(peaks(np.zeros((5, 5), np.float32))[0]) == 0


def test_the_loss_by_hand():
    odds = torch.tensor([[[0.0, 2.0, -1.0, 5.0]]])
    wanted = torch.tensor([[[1.0, 0.5, 0.0, 0.0]]])
    counts = torch.tensor([[[True, True, True, False]]])
    p = expit(odds.numpy()[0, 0])
    expected = -(0.25 * np.log(0.5) + 0.5**4 * p[1] ** 2 * np.log(1 - p[1]) + p[2] ** 2 * np.log(1 - p[2]))
    assert float(focal_loss(odds, wanted, counts)) == pytest.approx(expected, rel=1e-5)
    assert float(focal_loss(odds, wanted, torch.zeros_like(counts))) == 0
    twice = [torch.cat([each, each]) for each in (odds, wanted, counts)]
    assert float(focal_loss(*twice)) == pytest.approx(expected, rel=1e-5)  # per centre


def field_of(mitoses, unsure=(), negatives=(), side=300):
    """A white field with a black spot at every mitosis."""
    image = np.full((side, side, 3), 255, np.uint8)
    for x, y in mitoses:
        cv2.circle(image, (x, y), 6, (0, 0, 0), -1)
    points = (np.array(each, float).reshape(-1, 2) for each in (mitoses, negatives, unsure))
    return LookField(image, *points)


def test_maps_follow_the_tiles():
    """Wherever a tile is cut, zoomed, turned or mirrored, the centre is where the spot is."""
    tiles, maps, counts = LookTiles([field_of([(150, 150)])]).draw(24, np.random.default_rng(0))
    assert tiles.shape == (24, 3, SIDE, SIDE) and maps.shape == counts.shape == (24, CELLS, CELLS)
    seen = 0
    for tile, wanted in zip(tiles.numpy(), maps.numpy(), strict=True):
        dark = np.argwhere(tile[0] < 100)
        if len(dark) < 60:
            continue
        spot = (dark.mean(axis=0) - (STRIDE - 1) / 2) / STRIDE
        centre = np.argwhere(wanted == 1)
        assert len(centre) == 1 and np.abs(centre[0] - spot).max() < 1.1
        seen += 1
    assert seen >= 12  # half of them are drawn at the mitosis


def test_what_lies_outside_or_is_unsure_does_not_count():
    small = field_of([(30, 30)], side=60)
    _, maps, counts = LookTiles([small]).draw(12, np.random.default_rng(0))
    share = counts.float().mean(dim=(1, 2))
    assert ((share > 0) & (share < 0.2)).all() and (maps[~counts] < 1).all()
    _, _, counts = LookTiles([field_of([(250, 250)], unsure=[(250, 250)], side=500)]).draw(12, np.random.default_rng(0))
    hidden = (~counts).sum(dim=(1, 2))[:6].float()
    assert abs(hidden.median() / (np.pi * UNSURE_CELLS**2) - 1) < 0.3


def test_fields_without_mitoses_give_tiles_too():
    fields = [field_of([(50, 50)], side=100), field_of([], side=400)]
    _, maps, _ = LookTiles(fields).draw(60, np.random.default_rng(0))
    at_mitoses = torch.tensor([DRAWN_AT[place % len(DRAWN_AT)] == 0 for place in range(60)])
    assert (maps.amax(dim=(1, 2)) == 1)[at_mitoses].float().mean() > 0.9
    assert (maps.amax(dim=(1, 2)) == 0)[~at_mitoses].float().mean() > 0.7


def with_look(detector=None, **changes):
    return replace(detector or soft(), first_look=DarkLook().eval(), per_mm2=500, **changes)


def test_a_detector_looks_where_its_first_look_says():
    """Its candidates lie at the dark nuclei, as many as it is asked for, with the log odds of both added."""
    image, centres = draw_tissue(300, 0.25)
    area_mm2 = 300**2 / 1e6
    alone, both = (
        look_at(replace(with_look(), first_look=one), image, 0.25, batch_size=64) for one in (None, DarkLook().eval())
    )
    assert (
        len(both.first) <= 500 * area_mm2 and len(both.points_px) == most_seen_again(with_look(), area_mm2) >= AT_LEAST
    )
    near, _ = cKDTree(centres).query(both.points_px)
    assert np.median(near) * 0.25 < 1.0
    silent = with_look()
    silent.first_look.scale.data.fill_(1e-6)
    without = look_at(silent, image, 0.25, batch_size=64)
    assert both.odds.max() > without.odds.max() + 0.3  # the darkest have log odds above 0 by the first look too
    assert len(alone.first) > 0


def test_slides_in_other_tiles_find_the_same(slide_file):  # noqa: F811
    path, um_per_px = slide_file
    once = found_in(path, um_per_px, detector=with_look(), tile_um=1e6)
    assert len(once) > 15
    for tile_um, shift in ((200, (1, 2)), (140, (0, 1))):
        again = found_in(path, um_per_px, None, with_look(), tile_um=tile_um, shift=shift, workers=1, batch_size=17)
        assert_same(once, again)


@pytest.mark.parametrize(("um_per_px", "backbone"), [(0.25, "tf_efficientnet_lite0"), (0.61, "resnet10t")])
def test_a_real_first_look_finds_the_same_in_other_tiles(tmp_path, um_per_px, backbone):
    """With a wide receptive field; a slide may be coarser than what the first look is made for."""
    image, _ = draw_tissue({0.25: 360, 0.61: 600}[um_per_px], um_per_px)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(256, 256), photometric="rgb", compression="lzw")
    detector = replace(with_look(), first_look=fold_batch_norms(used(backbone)), per_mm2=3000)
    once = found_in(tmp_path / "a.tif", um_per_px, detector=detector, tile_um=1e6, smallest=1e-5)
    assert len(once) > 8
    again = found_in(tmp_path / "a.tif", um_per_px, None, detector, tile_um=150, shift=(0, 1), smallest=1e-5)
    assert_same(once, again)


def test_a_slide_gives_nearly_what_a_field_gives(slide_file):  # noqa: F811
    path, um_per_px = slide_file
    image = tifffile.imread(path)
    everywhere = Tissue(np.ones((len(image) // 16, len(image) // 16), bool), 16)
    for calibration in (Calibration(), Calibration(alignment=0.7)):
        detector = with_look(calibration=calibration)
        field = scan_field(detector, image, um_per_px, batch_size=50, smallest=0.05)
        slide = found_in(path, um_per_px, everywhere, detector)
        distance, pair = cKDTree(slide[["x_px", "y_px"]]).query(field[["x_px", "y_px"]])
        near = distance * um_per_px < 1
        assert len(field) > 15 and near.mean() > 0.8
        odds = logit(field["probability"].to_numpy()[near]), logit(slide["probability"].to_numpy()[pair[near]])
        assert abs(np.median(odds[1] - odds[0])) < 0.2


def test_a_resolution_that_is_none_is_refused():
    with pytest.raises(InputError, match=r"found 1.5 um/px, expected 0.1-1.0"):
        look_at(with_look(), np.zeros((300, 300, 3), np.uint8), 1.5, batch_size=16)


def test_glass_alone_has_no_candidate():
    looked = look_at(with_look(), np.full((500, 600, 3), 240, np.uint8), 0.25, batch_size=16)
    assert len(looked.points_px) == len(looked.first) == 0


def detector_with_look(path):
    """A detector's file with a first look; its network and first look as they are used."""
    torch.manual_seed(0)
    network, look = CamNetwork("resnet10t").eval(), used("resnet10t")
    detector = replace(detector_of(network), first_look=look)
    save_detector(path, detector, network.state_dict(), look.state_dict())
    return detector


def test_a_first_look_comes_back_as_it_was(tmp_path):
    detector = detector_with_look(tmp_path / "model.pt")
    loaded = load_detector(tmp_path / "model.pt", CPU)
    field = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    assert np.allclose(*(odds_map(each.first_look, field) for each in (detector, loaded)), atol=1e-3)
    save_detector(tmp_path / "without.pt", detector, detector.network.state_dict())
    assert load_detector(tmp_path / "without.pt", CPU).first_look is None


@pytest.mark.parametrize("fault", ["missing", "not finite", "no weights"])
def test_broken_first_looks_are_named(tmp_path, fault):
    detector_with_look(tmp_path / "model.pt")
    content = read_checkpoint(tmp_path / "model.pt")
    if fault == "missing":
        del content["first_look"]["model"]["head.0.weight"]
    elif fault == "not finite":
        content["first_look"]["model"]["head.0.weight"][0] = torch.nan
    else:
        content["first_look"] = 3
    save_checkpoint(tmp_path / "model.pt", content)
    with pytest.raises(InputError, match=r"not all finite|do not fit|names no backbone"):
        load_detector(tmp_path / "model.pt", CPU)


@pytest.mark.skipif(not is_installed(), reason="needs OpenVINO")
def test_both_engines_give_the_same_map():
    network = fold_batch_norms(used("tf_efficientnet_lite0"))
    openvino = OpenVinoLook(network)
    field = np.random.default_rng(0).integers(0, 256, (330, 410, 3), np.uint8)
    ours, theirs = (odds_map(each, field, cores=2) for each in (openvino, network))
    assert theirs.std() > 0.01 and np.abs(ours - theirs).max() < 4 * CLOSE


RESNET = [*LIGHT, "--backbone", "resnet10t"]
SHORT = ["--epochs", 2, "--steps", 2, "--batch_size", 6, "--device", "cpu"]


@pytest.fixture(scope="module")
def resnet(small_run, tmp_path_factory):
    """A model.pt of stage 2 whose backbone a first look can have."""
    out = tmp_path_factory.mktemp("resnet")
    flags = [*RESNET, "--manifest", small_run / "patches/patches.csv", "--epochs", 1, "--views", 1]
    succeed("NS/sigle.py", *flags, "--out", out)
    return out / "model.pt"


def flags(small_run, resnet, out):
    return [*SHORT, "--manifest", small_run / "patches/patches.csv", "--model_path", resnet, "--out", out]


@pytest.fixture(scope="module")
def first_look_run(small_run, resnet, tmp_path_factory):
    out = tmp_path_factory.mktemp("first_look")
    said = succeed("NS/first_look.py", *flags(small_run, resnet, out)).out
    best = (max(read_checkpoint(path)["config"]["val_curve"]["f1"]) for path in (out / "model.pt", resnet))
    assert "validation F1 {:.3f} at best, {:.3f} by the val curve of".format(*best) in said
    return out


def test_the_script_gives_the_detector_a_first_look(small_run, resnet, first_look_run, tmp_path):
    log = pd.read_csv(first_look_run / "log.csv")
    assert list(log["epoch"]) == [0, 1] and log[["loss", "val_loss"]].gt(0).all(axis=None)
    before, after = read_checkpoint(resnet), read_checkpoint(first_look_run / "model.pt")
    assert all(torch.equal(tensor, after["model"][name]) for name, tensor in before["model"].items())
    assert (before["config"]["per_mm2"], after["config"]["per_mm2"]) == (3000, 500)
    assert after["config"]["threshold"] != before["config"]["threshold"]
    assert cv2.imread(str(first_look_run / "curves.png")).std() > 5
    images = ["--images", small_run / "sample/images/009.tiff", "--device", "cpu", "--report", "False"]
    said = succeed("predict.py", *images, "--model_path", first_look_run / "model.pt", "--out", tmp_path / "with").out
    assert "has no first look" not in said
    said = succeed("predict.py", *images, "--model_path", resnet, "--out", tmp_path / "without").out
    assert said.count("has no first look") == 1


def test_an_interrupted_training_goes_on(small_run, resnet, first_look_run, tmp_path, monkeypatch):
    given, save = flags(small_run, resnet, tmp_path / "out"), loop.save_epoch

    def interrupt(*epoch, **state):
        save(*epoch, **state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_epoch", interrupt)
        assert call("NS/first_look.py", *given).status != 0
    assert len(pd.read_csv(tmp_path / "out/log.csv")) == 1 and not (tmp_path / "out/model.pt").exists()
    fails("NS/first_look.py", *given, "--resume", "--lr", 0.5, says="--lr")
    succeed("NS/first_look.py", *given, "--resume")
    for name in ("model.pt", "log.csv", "val_curve.csv"):
        assert (tmp_path / "out" / name).read_bytes() == (first_look_run / name).read_bytes()


def test_another_detector_takes_a_first_look(small_run, first_look_run, tmp_path):
    """Whatever its own backbone is."""
    taken = ["--first_look", first_look_run / "model.pt", "--model_path", small_run / "NS/model.pt", "--device", "cpu"]
    manifest = ["--manifest", small_run / "patches/patches.csv"]
    succeed("NS/first_look.py", *manifest, *taken, "--out", tmp_path / "out")
    one, other = (read_checkpoint(folder / "model.pt") for folder in (tmp_path / "out", first_look_run))
    assert other["first_look"]["backbone"] == "resnet10t" != one["config"]["backbone"]
    assert all(
        torch.equal(each, one["first_look"]["model"][name]) for name, each in other["first_look"]["model"].items()
    )
    assert load_detector(tmp_path / "out/model.pt", CPU).first_look.backbone_name == "resnet10t"
    taken[1] = small_run / "NS/model.pt"
    fails("NS/first_look.py", *manifest, *taken, "--out", tmp_path / "out", says="has no first look")


def test_the_script_says_what_is_wrong(small_run, resnet, tmp_path):
    given = flags(small_run, resnet, tmp_path / "out")
    fails("NS/first_look.py", *given[:-3], small_run / "NS/model.pt", *given[-2:], says="sees farther than")
    fails("NS/first_look.py", *given[:-3], tmp_path / "none.pt", *given[-2:], says="no such file")
    shutil.copytree(small_run / "patches", tmp_path / "patches")
    annotations = pd.read_csv(tmp_path / "patches/annotations.csv")
    annotations.assign(label=0).to_csv(tmp_path / "patches/annotations.csv", index=False)
    manifest = ["--manifest", tmp_path / "patches/patches.csv", *given[-4:]]
    fails("NS/first_look.py", *SHORT, *manifest, says="no mitosis in the train fields")
