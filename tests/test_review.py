"""review.py as its user runs it: queues, a server driven by requests, answers, and what is collected of them."""

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import cv2
import numpy as np
import pandas as pd
import pytest
from conftest import made_once
from pipeline import LIGHT, ROOT, call, check_run_json, fails, succeed

import review
from dasc.data.datasets import read_dataset
from dasc.data.tables import MEMORY, read_patches, write_table
from dasc.files import sha256
from dasc.review.answers import COLUMNS, HEADER
from dasc.review.crops import Crops, turned
from dasc.review.queue import CELL, read_queue

SHARED = ROOT.parent / "shared/data/mitos14"


@pytest.fixture(scope="session")
def reviewed(tmp_path_factory, small_run):
    """memory.csv of the small run's patches, and a predict folder of its images."""
    return made_once(tmp_path_factory, "reviewed", lambda folder: make_reviewed(folder, small_run))


def make_reviewed(folder, small_run):
    train = read_patches(small_run / "patches/patches.csv")
    train = train[train["split"] == "train"]
    rng = np.random.default_rng(0)
    counts = rng.multinomial(10, [0.5, 0.3, 0.2], len(train))
    memory = train[["patch", "label", "origin"]].assign(clean=counts[:, 0], hard=counts[:, 1], noisy=counts[:, 2])
    doubted = rng.random(len(train)) < np.where(train["origin"] == "annotated", 0.5, 0.05)  # some of each kind
    noise = np.where(doubted, 0.7, 0.0) + 0.3 * rng.random(len(train))
    memory = memory.assign(learned=10 - counts[:, 2], forgotten=counts[:, 2], noise_score=noise.round(6))
    for name in ("confidence_weak", "confidence_strong", "confidence_fused", "centroid_distance"):
        memory[name] = 0.5
    write_table(folder / "memory.csv", memory, MEMORY)
    flags = [
        "--images",
        small_run / "sample/images",
        "--um_per_px",
        0.25,
        "--smallest",
        0,
        "--threshold",
        0.403,
    ]  # some detections on either side
    flags += ["--model_path", small_run / "NS/model.pt", "--out", folder / "predict", "--report", False]
    succeed("predict.py", *flags, "--overlays", False, "--device", "cpu", "--per_mm2", 600)


def memory_flags(reviewed, small_run):
    return ["--memory", reviewed / "memory.csv", "--manifest", small_run / "patches/patches.csv"]


def predict_flags(reviewed, small_run):
    return ["--predict", reviewed / "predict", "--images", small_run / "sample/images"]


class Served:
    """review.py in a process of its own, and a browser that asks it."""

    def __init__(self, *flags):
        free = [] if "--port" in flags else ["--port", 0]  # other tests may serve at the same time
        command = [sys.executable, str(ROOT / "review.py"), *map(str, [*flags, *free])]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if found := re.search(r"(http://127\.0\.0\.1:(\d+))/\?token=(\S+)", line):
                self.base, self.port, self.token = found[1], int(found[2]), found[3]
                return
        raise AssertionError(self.process.communicate()[1])

    def get(self, path, host=None, token=None):
        """Status and body."""
        url = f"{self.base}{path}{'&' if '?' in path else '?'}token={self.token if token is None else token}"
        return self.ask(urllib.request.Request(url, headers={"Host": host} if host else {}))

    def post(self, content, path="/api/answer", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"X-Token": self.token, "Content-Type": "application/json"} | headers
        return self.ask(urllib.request.Request(self.base + path, data, headers))

    def ask(self, request):
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def state(self):
        return json.loads(self.get("/api/state")[1])

    def stop(self, sign=signal.SIGINT):
        if self.process.poll() is None:
            self.process.send_signal(sign)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, self.said + out, err

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop(signal.SIGKILL)


def write_answers(out, reader, answers, **columns):
    """An answers file as the server writes it; answers: by item."""
    rows = [
        {"time": "2026-01-01T00:00:00.000+00:00", "reader": reader, "item": item, "answer": answer, "seconds": 1.5}
        | {"pass": 1, "queue_sha256": sha256(out / "queue.csv")}
        | columns
        for item, answer in answers.items()
    ]
    (out / "answers").mkdir(exist_ok=True)
    path = out / "answers" / f"{reader}.csv"
    path.write_bytes(pd.DataFrame(rows, columns=COLUMNS).to_csv(index=False, lineterminator="\n").encode())
    return path


@pytest.fixture
def queue(tmp_path, reviewed, small_run):
    """A queue of training patches in a folder of the test's own, made by writing the page for another reader."""
    flags = [*memory_flags(reviewed, small_run), "--items", 20, "--controls", 0.2, "--repeats", 0.1]
    succeed("review.py", *flags, "--reader", "Page", "--page", tmp_path / "page.html", "--out", tmp_path / "review")
    return tmp_path / "review"


def test_a_reader_answers_by_browser_and_a_killed_server_forgets_nothing(tmp_path, reviewed, small_run):
    out = tmp_path / "review"
    flags = [*memory_flags(reviewed, small_run), "--reader", "AB", "--items", 30, "--out", out]
    with Served(*flags) as one:
        assert "30 cells of " in one.said and "27 " not in one.said.splitlines()[1]
        status, page = one.get("/")
        assert status == 200 and b"/*DATA*/null" in page
        state = one.state()
        assert {name: state[name] for name in ("reader", "title", "queue", "columns", "rows", "pass")} == {
            "reader": "AB",
            "title": "doubtful labels",
            "queue": "noise",
            "columns": 6,
            "rows": 4,
            "pass": 1,
        }
        assert state["queue_sha256"] == sha256(out / "queue.csv")
        assert state["crop_um"] == 32 and state["context_um"] == 256
        assert [item["item"] for item in state["items"]] == list(range(30))
        assert all(item.keys() == {"item", "turn", "answer"} for item in state["items"])  # blind
        assert one.post({"item": 3, "answer": "M", "seconds": 1.7}) == (200, b'{"answered": 1, "of": 30}')
        assert one.post({"item": 4, "answer": "L", "seconds": 0.6})[1] == b'{"answered": 2, "of": 30}'
        assert one.post({"item": 4, "answer": None, "seconds": 0.2})[1] == b'{"answered": 1, "of": 30}'
        assert one.post({"item": 3, "answer": "U", "seconds": 2})[1] == b'{"answered": 1, "of": 30}'
        one.stop(signal.SIGKILL)
    rows = pd.read_csv(out / "answers/AB.csv", dtype=str, keep_default_na=False)
    assert list(rows.columns) == COLUMNS
    assert rows[["item", "answer"]].to_numpy().tolist() == [["3", "M"], ["4", "L"], ["4", ""], ["3", "U"]]
    assert set(rows["queue_sha256"]) == {sha256(out / "queue.csv")} and set(rows["reader"]) == {"AB"}
    with Served(*flags) as again:
        assert {item["item"]: item["answer"] for item in again.state()["items"] if item["answer"]} == {3: "U"}
        closing = json.loads(again.get("/api/closing")[1])
        assert closing["answered"] == 1 and closing["of"] == 30 and closing["changed"] == 0
        assert closing["minutes"] == 0.1 and closing["written"] == [str(out / "answers/AB.csv")]
        assert f"--collect {out}/answers/*.csv" in closing["command"]
        status, said, err = again.stop()
        assert status == 0 and "1 of 30 cells answered" in said and not err.replace("\n", "")
    check_run_json(out / "run.json")


def test_the_server_answers_nobody_else_and_no_other_request(tmp_path, reviewed, small_run):
    flags = [*memory_flags(reviewed, small_run), "--reader", "AB", "--items", 20, "--out", tmp_path / "review"]
    with Served(*flags) as one:
        good = {"item": 0, "answer": "M", "seconds": 1}
        for path in ("/", "/api/state", "/crop/0.jpg", "/slide/0.jpg", "/api/closing"):
            assert one.get(path, token="")[0] == one.get(path, token=one.token[:-1])[0] == 403
            assert one.get(path, host="evil.example:80")[0] == 403
            assert one.get(path, host=f"localhost:{one.port}")[0] == 200
        assert one.post(good, **{"X-Token": "x"})[0] == one.post(good, Host="evil.example")[0] == 403
        assert one.post(good, **{"Content-Type": "text/plain"})[0] == 415
        assert one.post(b" " * 5000)[0] == 413
        assert one.post(good, path="/api/state")[0] == 404
        wrong = [b"", b"{", b"[" * 4000, b"\xff", [], {"item": 0}, good | {"path": "/etc/passwd"}]
        wrong += [good | {"item": item} for item in (-1, 20, 1.0, True, "0", None, 10**400)]
        wrong += [good | {"answer": answer} for answer in ("", "m", "MM", 1, ["M"])]
        wrong += [good | {"seconds": seconds} for seconds in (-1, "1", None, True, 1e300, 10**400, float("nan"))]
        for content in wrong:
            status, body = one.post(content)
            assert status == 400 and json.loads(body)["error"], content
        for path in (
            "/crop/20.jpg",
            "/crop/-1.jpg",
            "/crop/0.png",
            "/crop/../queue.csv",
            "/queue.csv",
            "//[",
            "/favicon.ico",
        ):
            assert one.get(path)[0] == 404, path
        assert one.get("/crop/0.jpg?um=1")[0] == 400
        assert not (tmp_path / "review/answers/AB.csv").exists()
        with pytest.raises(OSError):  # it listens on 127.0.0.1 only, not on the other names of this computer
            socket.create_connection(("127.0.0.2", one.port), 5)
        assert one.post(good) == (200, b'{"answered": 1, "of": 20}')
        # The same reader in a second browser of the same server: the last answer counts.
        assert one.post(good | {"answer": "L"}) == (200, b'{"answered": 1, "of": 20}')
        assert one.state()["items"][0]["answer"] == "L"
        # A second server for this reader would write to the same file; another reader's does not.
        done = call("review.py", *flags)
        assert done.status == 1 and "another run writes here (process" in done.err
        used = ["--reader", "CD", "--port", one.port]
        fails("review.py", *flags, *used, says=f"--port {one.port}: cannot be listened on")
        assert not one.stop()[2].strip()


def test_pictures_show_the_cell_in_their_middle(queue, tmp_path):
    table = read_queue(queue / "queue.csv")
    with Crops(table) as crops:
        for item in range(6):
            row = table.loc[item]
            image = cv2.imread(row["path"])
            crop = cv2.imdecode(np.frombuffer(crops.crop(item), np.uint8), cv2.IMREAD_COLOR)
            assert crop.shape == (192, 192, 3)
            side = 32 / row["um_per_px"]
            left, top = np.round(row[["x_px", "y_px"]].to_numpy(float) + 0.5 - side / 2).astype(int)
            margin = 200
            padded = cv2.copyMakeBorder(image, *[margin] * 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))
            part = padded[margin + top :, margin + left :][: round(side), : round(side)]
            expected = turned(cv2.resize(part, (192, 192), interpolation=cv2.INTER_CUBIC), row["turn"])
            assert np.abs(crop.astype(int) - expected).mean() < 4
            context = cv2.imdecode(np.frombuffer(crops.crop(item, 256), np.uint8), cv2.IMREAD_COLOR)
            overview = cv2.imdecode(np.frombuffer(crops.overview(item), np.uint8), cv2.IMREAD_COLOR)
            assert context.shape == (640, 640, 3) and max(overview.shape) == 320
    assert len({turned(np.arange(27).reshape(3, 3, 3), turn).tobytes() for turn in range(8)}) == 8


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")
def test_crops_of_real_fields_come_within_50_ms():
    frames = sorted(SHARED.glob("H05/frames/x40/*"))[:6]
    columns = {"um_per_px": 0.2274, "turn": 0}
    rows = [{"path": str(frame), "x_px": 300 + 37 * n, "y_px": 500, **columns} for frame in frames for n in range(8)]
    with Crops(pd.DataFrame(rows)) as crops:
        crops.crop(0)
        crops._ahead.submit(lambda: None).result()  # as a reader looks at the first page meanwhile
        seconds = []
        for item in range(48):
            start = time.perf_counter()
            crops.crop(item)
            seconds.append(time.perf_counter() - start)
    assert np.median(seconds) < 0.05 and np.quantile(seconds, 0.9) < 0.05


def test_the_queue_hides_what_it_suspects(queue, reviewed, small_run):
    table = read_queue(queue / "queue.csv")
    assert table["kind"].value_counts().to_dict() == {"queue": 14, "control": 4, "repeat": 2}
    first = table[table["kind"] != "repeat"]
    assert not first.duplicated(CELL).any() and "shifted" not in set(table["origin"])
    assert set(table.loc[table["kind"] == "control", "called"]) == {0, 1}
    repeats = table[table["kind"] == "repeat"]
    originals = table.loc[repeats["repeat_of"].astype(int)]
    assert (originals[CELL].to_numpy() == repeats[CELL].to_numpy()).all() and repeats["turn"].between(1, 7).all()
    assert (repeats["item"].to_numpy() > originals["item"].to_numpy()).all() and (first["turn"] == 0).all()
    asked = table[table["kind"] == "queue"]
    memory = pd.read_csv(reviewed / "memory.csv")
    train = read_patches(small_run / "patches/patches.csv").merge(memory[["patch", "noise_score"]], on="patch")
    worst = train[train["origin"] != "shifted"]["noise_score"].nlargest(14)
    assert sorted(asked["noise_score"]) == pytest.approx(sorted(worst))
    assert not asked["noise_score"].is_monotonic_decreasing  # shuffled
    controls = table.loc[table["kind"] == "control", "noise_score"]
    assert controls.max() < asked["noise_score"].min()


@pytest.mark.parametrize("queue_name", ["uncertain", "disagree"])
def test_other_queues_of_labels(tmp_path, reviewed, small_run, queue_name):
    flags = [*memory_flags(reviewed, small_run), "--queue", queue_name, "--items", 12, "--reader", "AB"]
    succeed("review.py", *flags, "--page", tmp_path / "page.html", "--out", tmp_path / "review")
    table = read_queue(tmp_path / "review/queue.csv")
    asked = table[table["kind"] == "queue"]
    if queue_name == "uncertain":
        memory = pd.read_csv(reviewed / "memory.csv")
        nearest = (memory.loc[memory["origin"] != "shifted", "noise_score"] - 0.5).abs().nsmallest(len(asked))
        assert (asked["probability"] - 0.5).abs().max() == pytest.approx(nearest.max())
    assert len(table) == 12 and len(asked) == 10


def test_a_page_without_a_server_holds_everything(tmp_path, queue):
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = json.JSONDecoder().raw_decode(text[text.index('{"state"') :])[0]
    assert data["queue_sha256"] == sha256(queue / "queue.csv") and data["state"]["reader"] == "Page"
    assert len(data["state"]["items"]) == len(data["crops"]) == len(data["context"]) == len(data["overview"]) == 20
    for kind, side in (("crops", 192), ("context", 640)):
        jpeg = base64.b64decode(data[kind]["7"].removeprefix("data:image/jpeg;base64,"))
        assert cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR).shape == (side, side, 3)
    assert "http://" not in text and "https://" not in text


def test_the_port_is_the_same_after_a_restart():
    """Browsers keep unsent answers by port; below 32768 no system gives it to a program that asks for any."""
    assert 1024 <= review.PORT < 32768


def test_readers_are_collected(queue, small_run):
    table = read_queue(queue / "queue.csv")
    asked = [item for item in table.index[table["kind"] == "queue"] if table.loc[item, "origin"] == "annotated"]
    other = [item for item in table.index[table["kind"] != "repeat"] if table.loc[item, "origin"] == "random"]
    so = {item: "M" if called else "L" for item, called in enumerate(table["called"])}
    write_answers(queue, "AB", so | {asked[0]: "L", asked[1]: "U", other[0]: "M"})
    write_answers(queue, "CD", so | {asked[0]: "L", asked[1]: "U", other[0]: "M", asked[2]: "L"})
    write_answers(queue, "EF", so | {asked[0]: "X", asked[2]: "L"})
    flags = ["--collect", f"{queue}/answers/*.csv", "--out", queue, "--manifest", small_run / "patches/patches.csv"]
    done = succeed("review.py", *flags)
    corrections = pd.read_csv(queue / "corrections.csv", dtype=str, keep_default_na=False)
    place = {item: tuple(table.loc[item, CELL].astype(str)) for item in (*asked, *other)}
    found = {tuple(row[:3]): row[4:7] for row in corrections.to_numpy().tolist()}
    assert found == {
        place[asked[0]]: ["1", "0", "L 2"],
        place[asked[1]]: ["1", "unsure", "M 1; U 2"],
        place[asked[2]]: ["1", "0", "M 1; L 2"],
        place[other[0]]: ["", "1", "M 2; L 1"],
    }
    cut = re.search(r"train on: python (pre/cut_patch_2.py .*)", done.out)[1]
    assert f"--data_root {small_run / 'sample'} " in cut and "..." not in cut and "run.json has it" in done.out
    rest = ["--dataset", "sample", "--shifts", 0, "--out", queue / "cut"]
    succeed(*cut.split(), *rest)
    before, after = ((folder / "cut.json").read_text() for folder in (small_run / "patches", queue / "cut"))
    assert before == after
    agreement = json.loads((queue / "agreement.json").read_text())
    assert agreement["readers"] == ["AB", "CD", "EF"] and len(agreement["cohen_kappa"]) == 3
    assert agreement["accuracy_on_controls"]["EF"]["value"] == 1
    assert agreement["intra_reader_kappa"]["CD"]["cells"] == 2
    assert 0 < agreement["fleiss_kappa"]["value"] < 1
    assert (queue / "agreement.png").stat().st_size > 5000 and "Fleiss' kappa" in done.out
    check_run_json(queue / "collect/run.json")
    image = table.loc[asked[1], "image"]
    layer = json.loads((queue / image / "reviewed.geojson").read_text())
    assert "Unsure" in {one["properties"]["classification"]["name"] for one in layer["features"]}

    dataset = read_dataset("table", queue / "dataset")
    before = read_dataset("sample", small_run / "sample")
    assert len(dataset.annotations) == len(
        before.annotations[before.annotations["image"].isin(dataset.fields["image"])]
    )
    assert dataset.annotations["label"].sum() == before.annotations["label"].sum() - 3 + 1
    cut = ["--dataset", "sample", "--data_root", small_run / "sample", "--patch_size", 64, "--random_per_field", 5]
    done = succeed("pre/cut_patch_2.py", *cut, "--corrections", queue / "corrections.csv", "--out", queue / "patches")
    said = "2 relabelled as look-alikes, 1 mitoses added, 1 unsure"
    assert said in done.out
    run = check_run_json(queue / "patches/run.json")
    assert run["corrections"]["relabelled as look-alikes"] == 2 and run["corrections"]["unsure"] == 1
    patches = read_patches(queue / "patches/patches.csv")
    origin_of = {tuple(place): origin for *place, origin in patches[[*CELL, "origin"]].to_numpy().tolist()}
    cell = {item: tuple(table.loc[item, CELL]) for item in (*asked, *other)}
    assert origin_of[cell[asked[0]]] == "hard_negative" and origin_of[cell[other[0]]] == "annotated"
    assert cell[asked[1]] not in origin_of


def test_contested_cells_are_decided_by_another_reader(queue, small_run):
    table = read_queue(queue / "queue.csv")
    so = {item: "M" if called else "L" for item, called in enumerate(table["called"])}
    differ = table.index[table["kind"] == "queue"][:3]
    write_answers(queue, "AB", so)
    write_answers(queue, "CD", so | {item: "L" if table.loc[item, "called"] else "M" for item in differ})
    manifest = ["--manifest", small_run / "patches/patches.csv"]
    done = succeed("review.py", "--collect", f"{queue}/answers/*.csv", "--out", queue, *manifest)
    assert "0 corrections" in done.out and "3 cells without a majority" in done.out
    flags = ["--queue", "contested", "--reader", "EF", "--out", queue, "--blind", False]
    with Served(*flags) as one:
        state = one.state()
        assert len(state["items"]) == 3 and {item["hint"] for item in state["items"]} == {"M 1; L 1"}
        for item in range(3):
            one.post({"item": item, "answer": "U", "seconds": 1})
        one.stop()
    done = succeed("review.py", "--collect", f"{queue}/answers/*.csv", "--out", queue, *manifest)
    corrections = pd.read_csv(queue / "corrections.csv", dtype=str, keep_default_na=False)
    assert set(corrections["new"]) == {"unsure"} and len(corrections) == 3 and "0 cells without" in done.out
    assert set(corrections["readers"]) == {"AB; CD; decided by EF"}


def test_an_audit_gives_counts_with_intervals(tmp_path, reviewed, small_run):
    out = tmp_path / "review"
    flags = [*predict_flags(reviewed, small_run), "--queue", "audit", "--items", 70, "--out", out]
    succeed("review.py", *flags, "--reader", "AB", "--page", tmp_path / "page.html")
    table = read_queue(out / "queue.csv")
    assert "control" not in set(table["kind"]) and table["stratum"].notna().all() and len(table) == 70
    counts = pd.read_csv(reviewed / "predict/counts.csv")
    mitoses = {item: "M" if row["stratum"] == 0 else "L" for item, row in table.iterrows()}
    write_answers(out, "AB", mitoses)
    done = succeed("review.py", "--collect", out / "answers/AB.csv", "--out", out, "--predict", reviewed / "predict")
    audit = json.loads((out / "audit.json").read_text())
    sizes = audit["strata"]["size"]
    assert audit["mitoses"][0] == sizes[0] and audit["mitoses"][1] <= sizes[0] <= audit["mitoses"][2]
    above = [size for size, is_above in zip(sizes, audit["strata"]["above"], strict=True) if is_above]
    assert sum(above) == counts["mitoses"].sum()
    assert sum(sizes) == len(pd.read_csv(reviewed / "predict/detections.csv"))
    assert "mitoses: " in done.out and "recall: " in done.out
    written = pd.read_csv(out / "counts_reviewed.csv")
    assert written["image"].tolist() == counts["image"].tolist()
    assert written["mitoses_estimate"].sum() == pytest.approx(sizes[0], rel=0.01)
    assert (written["mitoses_low"] <= written["mitoses_estimate"]).all()
    assert (written["hotspot_estimate"] == written["mitoses_estimate"]).all()  # fields smaller than a hotspot's window
    fails("review.py", "--collect", out / "answers/AB.csv", "--out", out, "--predict", tmp_path, says="no such file")


def test_detections_are_reviewed(tmp_path, reviewed, small_run):
    out = tmp_path / "review"
    flags = [*predict_flags(reviewed, small_run), "--items", 20, "--out", out]
    succeed("review.py", *flags, "--reader", "AB", "--page", tmp_path / "page.html")
    table = read_queue(out / "queue.csv")
    assert set(table["origin"]) == {"detection"} and table["label"].isna().all()
    answers = dict.fromkeys(range(20), "L") | {0: "M"}
    write_answers(out, "AB", answers)
    succeed("review.py", "--collect", out / "answers/AB.csv", "--out", out, "--predict", reviewed / "predict")
    written = pd.read_csv(out / "counts_reviewed.csv")
    counts = pd.read_csv(reviewed / "predict/counts.csv")
    once = table[table["kind"] != "repeat"]
    true = once.index == 0
    assert written["judged"].sum() == len(once)
    assert written["rejected"].sum() == ((once["called"] == 1) & ~true).sum()
    assert (written["mitoses_reviewed"] == counts["mitoses"] - written["rejected"] + written["added"]).all()
    dataset = read_dataset("table", out / "dataset", val=[], test=[])
    assert len(dataset.annotations) == len(once) and dataset.annotations["label"].sum() == 1
    fails("review.py", *flags, "--reader", "AB", "--queue", "noise", "--out", tmp_path / "n", says="needs labels")


def test_bad_input_is_one_line(tmp_path, queue, reviewed, small_run):
    flags = [*memory_flags(reviewed, small_run), "--out", tmp_path / "new"]
    for name in ("A/B", "..", "", ".x", "a\nb", "x" * 80, "A."):
        fails("review.py", *flags, "--reader", name, says="--reader")
    fails("review.py", "--reader", "AB", "--out", tmp_path / "new", says="give --memory or --predict")
    other = tmp_path / "memory.csv"
    pd.read_csv(reviewed / "memory.csv")[1:].to_csv(other, index=False)
    fails("review.py", *flags, "--reader", "AB", "--memory", other, says="they come from different runs")
    images = [*predict_flags(reviewed, small_run)[:2], "--images", next((small_run / "sample/images").iterdir())]
    fails("review.py", *images, "--reader", "AB", "--out", tmp_path / "new", says="is not among --images")
    images = [*images[:3], tmp_path / "gone"]
    fails("review.py", *images, "--reader", "AB", "--out", tmp_path / "new", says="--images names what predict.py read")
    # another queue in the same folder
    flags = [*memory_flags(reviewed, small_run), "--out", queue, "--reader", "AB"]
    fails("review.py", *flags, "--items", 21, says="another queue")
    # answers of another queue, of two, of another reader, and no answers
    path = write_answers(queue, "AB", {0: "M"}, queue_sha256="0" * 64)
    same = ["--items", 20, "--controls", 0.2, "--repeats", 0.1]
    fails("review.py", *flags, *same, "--page", tmp_path / "p.html", says="an answer to another queue")
    fails("review.py", "--collect", path, "--out", queue, says="an answer to another queue")
    sound = write_answers(queue, "AB", {0: "M"}).read_text()
    path.write_text(sound + sound.splitlines()[1].replace(",AB,", ",CD,") + "\n")
    fails("review.py", "--collect", path, "--out", queue, says="expected one file per reader")
    fails("review.py", *flags, *same, "--page", tmp_path / "p.html", says="answers of CD, expected AB")
    path.write_text(sound + "2026,AB,x,M,1,1,0\n")
    fails("review.py", "--collect", path, "--out", queue, says="row 3: '2026,AB,x,M,1,1,0' is no answer")
    path.write_text(HEADER)
    fails("review.py", "--collect", path, "--out", queue, says="no answer in it")
    path.write_text("a,b\n1,2\n")
    fails("review.py", "--collect", path, "--out", queue, says="its columns are not")
    fails("review.py", "--collect", queue / "answers/Z*.csv", "--out", queue, says="no such file")


def test_answers_cut_in_a_row_lose_that_row_only(queue, reviewed, small_run):
    path = write_answers(queue, "AB", {0: "M", 1: "L", 2: "M"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    manifest = ["--manifest", small_run / "patches/patches.csv"]
    done = succeed("review.py", "--collect", path, "--out", queue, *manifest)
    assert "its last row was cut off and is left out" in done.out
    assert json.loads((queue / "agreement.json").read_text())["answers"] == {"AB": 2}
    flags = [*memory_flags(reviewed, small_run), "--items", 20, "--controls", 0.2, "--repeats", 0.1]
    with Served(*flags, "--reader", "AB", "--out", queue) as one:
        assert "its last row was cut off and is gone" in one.said
        assert [item["answer"] for item in one.state()["items"]][:3] == ["M", "L", None]
        one.post({"item": 2, "answer": "U", "seconds": 1})
        one.stop()
    rows = path.read_bytes()
    assert rows.startswith(whole[: whole[:-1].rindex(b"\n") + 1]) and rows.count(b"\n") == 4
    path.write_bytes(whole[:9])  # cut within the header
    with Served(*flags, "--reader", "AB", "--out", queue) as one:
        assert one.post({"item": 2, "answer": "U", "seconds": 1})[0] == 200
        one.stop()
    assert path.read_text().startswith(HEADER)


def test_an_image_that_is_gone_is_said(tmp_path, reviewed, small_run):
    root = tmp_path / "sample"
    shutil.copytree(small_run / "sample/images", root / "images")
    gone = sorted((root / "images").iterdir())[0]
    gone.unlink()
    flags = [*memory_flags(reviewed, small_run), "--data_root", root, "--items", 40, "--out", tmp_path / "review"]
    with Served(*flags, "--reader", "AB") as one:
        assert "1 of 6 images are gone, the first " in one.said
        table = read_queue(tmp_path / "review/queue.csv")
        item = table.index[table["path"] == str(gone)][0]
        status, body = one.get(f"/crop/{item}.jpg")
        assert status == 404 and str(gone) in json.loads(body)["error"]
        assert one.get(f"/slide/{item}.jpg")[0] == 404
        assert one.get(f"/crop/{table.index[table['path'] != str(gone)][0]}.jpg")[0] == 200
        assert one.post({"item": int(item), "answer": "X", "seconds": 1})[0] == 200
        one.stop()
    fails("review.py", *flags, "--reader", "AB", "--page", tmp_path / "page.html", says=f"{gone}: cannot be read")
    assert not (tmp_path / "page.html").exists()
    other = ["--data_root", tmp_path, "--out", tmp_path / "other", "--reader", "AB"]
    fails("review.py", *flags, *other, says="none of the 6 images")


def test_a_full_disk_keeps_the_answers_before(queue, monkeypatch):
    from dasc.errors import WriteError
    from dasc.review.answers import AnswerFile

    answers = AnswerFile(queue / "answers/AB.csv", "AB", sha256(queue / "queue.csv"), 20)
    answers.append(0, "M", 1)
    before = answers.path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(WriteError, match="No space left"):
        answers.append(1, "L", 1)
    assert answers.path.read_bytes() == before and answers.last == {0: "M"}


def test_the_whole_way_from_training_to_queue(tmp_path, small_run):
    """Stage 4 as it is, stage 5's verdicts, and a queue of what it does not call clean."""
    manifest = ["--manifest", small_run / "patches/patches.csv"]
    succeed("DMU/main.py", *LIGHT, *manifest, "--epochs", 2, "--out", tmp_path / "DMU")
    memory = ["--memory", tmp_path / "DMU/memory.csv"]
    succeed("clus_hard.py", *memory, *manifest, "--noisy_share", 0, "--hard_share", 0, "--out", tmp_path / "DMU")
    hard = pd.read_csv(tmp_path / "DMU/hard.csv")
    flags = [*memory, *manifest, "--hard", tmp_path / "DMU/hard.csv", "--items", 10, "--out", tmp_path / "review"]
    succeed("review.py", *flags, "--reader", "AB", "--page", tmp_path / "page.html")
    table = read_queue(tmp_path / "review/queue.csv")
    patches = read_patches(small_run / "patches/patches.csv").merge(hard[["patch", "verdict"]], on="patch")
    asked = table[table["kind"] == "queue"].merge(patches, on=CELL)
    assert len(asked) and not (asked["verdict"] == "clean").any()
