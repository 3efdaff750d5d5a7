"""The review page in real browsers, driven by keys: what a key says is shown, sent, kept and never lost."""

import base64
import csv
import io
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote_plus, urlsplit

import numpy as np
import pytest
from browser import CHROMIUM, FIREFOX, Chromium, Firefox
from PIL import Image

PAGE = Path(__file__).resolve().parents[1] / "dasc/review/page.html"
TOKEN = "a secret+&token"
COLUMNS = ["time", "reader", "item", "answer", "seconds", "pass", "queue_sha256"]  # of answers/READER.csv
EVIL = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
KINDS = {"chromium": (Chromium, CHROMIUM), "firefox": (Firefox, FIREFOX)}
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium, or Chrome")


def state_of(cells: int, **changes) -> dict:
    items = [{"item": item, "turn": 0, "answer": None} for item in range(cells)]
    sizes = {"columns": 6, "rows": 4, "crop_um": 32, "context_um": 256, "pass": 1}
    return (
        {"reader": "AB", "title": "doubtful labels", "queue": "noise", "items": items, "queue_sha256": "q1"}
        | sizes
        | changes
    )


def jpeg(size: int, shade: int = 128) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), (200, shade % 256, 190), np.uint8)).save(data, "JPEG")
    return data.getvalue()


class Fake(ThreadingHTTPServer):
    """What review.py answers, and how it can fail: `fails` is a status for every answer, `gone` items without image."""

    daemon_threads = True

    def __init__(self, state: dict, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.state, self.asked, self.answers, self.fails, self.gone, self.token = state, [], [], 0, set(), TOKEN
        self.hangs = threading.Event()  # set: it does not
        self.hangs.set()
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def handle_error(self, request, client_address):
        """A browser that no longer wants a picture is no error."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/?token={quote_plus(TOKEN)}"

    def pairs(self) -> list[tuple]:
        return [(row["item"], row["answer"]) for row in self.answers]

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self.thread.join()


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def reply(self, status: int, content: bytes | dict, kind: str = "application/json") -> None:
        data = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": len(data), "Connection": "close"}
        headers["Cache-Control"] = "private, max-age=3600" if kind == "image/jpeg" else "no-store"
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        url, state = urlsplit(self.path), self.server.state
        self.server.asked.append(self.path)
        picture = re.fullmatch(r"/(crop|slide)/(\d+)\.jpg", url.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        if query.get("token") != self.server.token:
            self.reply(403, {"error": "wrong token"})
        elif url.path == "/":
            self.reply(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif url.path == "/api/state":
            last = {row["item"]: row["answer"] for row in self.server.answers}
            self.reply(200, state | {"items": [one | {"answer": last.get(one["item"])} for one in state["items"]]})
        elif url.path == "/api/closing":
            closing = {"answered": 5, "of": len(state["items"]), "changed": 12, "minutes": 9.54, "written": [EVIL]}
            self.reply(200, closing | {"command": "python review.py --collect 'a b.csv'"})
        elif picture and int(picture[2]) in self.server.gone:
            self.reply(404, {"error": f"{EVIL} a.tif: not found"})
        elif picture and (picture[1] == "slide" or query["um"] in ("32", "256")):
            self.reply(200, jpeg(192 if query.get("um") == "32" else 640, int(picture[2])), "image/jpeg")
        else:
            self.reply(404, {"error": "no such page"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.hangs.wait(30)
        if self.server.fails:
            self.reply(self.server.fails, {"error": "the disk is full"})
        elif self.headers["X-Token"] != self.server.token or self.path != "/api/answer":
            self.reply(403, {"error": "wrong token"})
        else:
            row = json.loads(body)
            assert self.headers["Content-Type"] == "application/json" and row.keys() == {"item", "answer", "seconds"}
            self.server.answers.append(row)
            self.reply(200, {"answered": len(self.server.answers), "of": len(self.server.state["items"])})

    def log_message(self, *_):
        """Nothing is printed per request."""


@pytest.fixture(scope="module", params=list(KINDS))
def browser(request, tmp_path_factory):
    kind, program = KINDS[request.param]
    if program is None:
        pytest.skip(f"needs {request.param}")
    browser = kind(tmp_path_factory.mktemp(request.param))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def serve():
    servers = []

    def start(cells: int = 60, **changes) -> Fake:
        servers.append(Fake(state_of(cells, **changes)))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def opened(browser, server: Fake) -> Fake:
    browser.open(server.url)
    browser.wait("document.querySelector('.here img')?.naturalWidth")
    return server


def cursor(browser) -> int:
    """Where the cursor is, which is where the focus is too."""
    here = browser.js("document.querySelector('.cell.here').dataset.index")
    assert browser.js("document.activeElement.dataset.index") == here
    return int(here)


def badges(browser) -> str:
    """The answers of the page as they are shown, a letter a cell, - for none."""
    return browser.js("[...document.querySelectorAll('.badge')].map((one) => one.textContent || '-').join('')")


def said(browser) -> str:
    return browser.js("document.getElementById('said').textContent")


def shown(browser, identity: str) -> bool:
    return browser.js(f"document.getElementById('{identity}').checkVisibility()")


def await_answers(server: Fake, *pairs: tuple) -> None:
    end = time.monotonic() + 10
    while server.pairs() != list(pairs):
        assert time.monotonic() < end, server.pairs()
        time.sleep(0.02)


def test_keys_do_what_the_help_says(browser, serve):
    server = opened(browser, serve())
    browser.key("?")
    names = browser.js("[...document.querySelectorAll('#list kbd')].map((one) => one.textContent)")
    browser.keys("M", "Space", "Z", "C")  # nothing happens under the list
    assert shown(browser, "help")
    browser.key("?")
    assert not shown(browser, "help") and badges(browser) == "-" * 24

    tried = {"?"}
    browser.keys("M", "L", "U", "X")
    assert badges(browser) == "MLUX" + "-" * 20 and cursor(browser) == 4
    browser.key("Z")
    assert badges(browser) == "MLU" + "-" * 21 and cursor(browser) == 3
    tried |= {"M", "L", "U", "X", "Z"}
    for key, place in (("Down", 9), ("Right", 10), ("Up", 4), ("Left", 3), ("Up", 3), ("Down", 9)):
        browser.key(key)
        assert cursor(browser) == place
    tried.add("Arrows")
    browser.key("C")
    browser.wait("document.querySelector('#context img').naturalWidth === 640")
    browser.wait("document.querySelector('#overview img').naturalWidth")
    assert not shown(browser, "gallery") and "256 µm" in browser.text() and "Cell 10 of 60" in browser.text()
    browser.key("M")  # the next cell is shown large
    assert "Cell 11 of 60" in browser.text() and "Cell 10: mitosis" in said(browser)
    browser.key("Escape")
    assert badges(browser) == "MLU------M" + "-" * 14 and cursor(browser) == 10
    tried |= {"C", "Escape"}
    browser.key("Shift+L")
    assert badges(browser) == "MLULLLLLLM" + "L" * 14
    tried.add("Shift+M L U X")
    browser.key("Space")
    assert cursor(browser) == 24 and badges(browser) == "-" * 24
    browser.key("Shift+Space")
    assert cursor(browser) == 0 and "first page" not in said(browser)
    browser.key("Shift+Space")
    assert cursor(browser) == 0 and "first page" in said(browser)
    browser.keys("Space", "Space")
    assert cursor(browser) == 48 and len(badges(browser)) == 12
    browser.key("Space")
    browser.wait("document.querySelectorAll('#facts li').length > 2")
    assert shown(browser, "closing")
    browser.keys("M", "Shift+Space")
    assert cursor(browser) == 48 and badges(browser) == "-" * 12
    tried |= {"Space", "Shift+Space"}
    assert tried == set(names)

    rest = [item for item in range(24) if item not in (0, 1, 2, 9)]
    first = [(0, "M"), (1, "L"), (2, "U"), (3, "X"), (3, None), (9, "M")]
    await_answers(server, *first, *((item, "L") for item in rest))
    browser.open(server.url)  # and it goes on where it was left
    browser.wait("document.querySelector('.here')")
    assert cursor(browser) == 24 and "24 of 60" in browser.text()


def test_an_undo_takes_back_the_right_cell(chromium, serve):
    server = opened(chromium, serve())
    chromium.keys("M", "L", "Left", "Left", "U")  # the first cell was a mitosis, now unsure
    assert badges(chromium)[:3] == "UL-"
    chromium.keys("Right", "Right", "Down", "Shift+X", "Space", "M")
    chromium.key("Z")
    assert cursor(chromium) == 24 and badges(chromium) == "-" * 24
    chromium.key("Z")  # the page that one key filled, and only what it filled
    assert badges(chromium) == "UL" + "-" * 22 and "22 cells" in said(chromium) and cursor(chromium) == 2
    chromium.key("Z")
    assert badges(chromium) == "ML" + "-" * 22 and cursor(chromium) == 0
    chromium.keys("Z", "Z")
    assert badges(chromium) == "-" * 24 and cursor(chromium) == 0
    chromium.key("Z")
    assert "Nothing to take back" in said(chromium)
    page = [(item, letter) for letter in ("X", None) for item in range(2, 24)]
    known = [
        (0, "M"),
        (1, "L"),
        (0, "U"),
        *page[:22],
        (24, "M"),
        (24, None),
        *page[22:],
        (0, "M"),
        (1, None),
        (0, None),
    ]
    await_answers(server, *known)


def test_shift_marks_only_the_cells_of_the_page_without_answer(chromium, serve):
    server = serve(30)
    server.answers = [{"item": 3, "answer": "M"}, {"item": 26, "answer": "U"}]
    opened(chromium, server)
    chromium.key("Shift+L")
    assert badges(chromium) == "LLLM" + "L" * 20
    chromium.key("M")  # the cursor is at the end: a key too many changes nothing
    assert badges(chromium) == "LLLM" + "L" * 20 and "at its end" in said(chromium)
    chromium.key("Shift+U")
    assert badges(chromium) == "LLLM" + "L" * 20
    chromium.keys("Space", "C", "Shift+M", "Escape")  # a page that is not in sight is not marked
    assert badges(chromium) == "--U---"
    await_answers(server, (3, "M"), (26, "U"), *((item, "L") for item in range(24) if item != 3))


def test_a_held_key_is_one_key(chromium, serve):
    server = opened(chromium, serve())
    for key, shown_then in (("M", "M-"), ("L", "ML"), ("Z", "M-"), ("Space", "--"), ("U", "U-")):
        chromium.key(key)
        for _ in range(3):
            chromium.key(key, held=True)
        assert badges(chromium) == shown_then + "-" * 22
    chromium.wait("document.body.innerText.includes('all saved')")
    assert server.pairs() == [(0, "M"), (1, "L"), (1, None), (24, "U")]


def test_the_cursor_returns_to_a_cell_left_out(chromium, serve):
    opened(chromium, serve(8))
    chromium.keys("Right", "Right", *"LLLLLL")
    assert cursor(chromium) == 0 and badges(chromium) == "--LLLLLL"
    chromium.keys("M", "M")
    assert cursor(chromium) == 2  # the next cell; what is answered is not skipped


def test_answers_come_in_order_with_the_time_that_they_took(chromium, serve):
    server = opened(chromium, serve())
    chromium.key("X")
    await_answers(server, (0, "X"))
    start = time.monotonic()
    time.sleep(0.7)
    chromium.key("M")
    one = time.monotonic() - start
    start = time.monotonic()
    chromium.keys(*"LULMXUL")
    await_answers(server, (0, "X"), (1, "M"), *((2 + place, letter) for place, letter in enumerate("LULMXUL")))
    seconds = [row["seconds"] for row in server.answers]
    assert 0.69 <= seconds[1] <= one + 0.3
    assert sum(seconds[2:]) <= time.monotonic() - start + 0.1
    time.sleep(0.5)
    chromium.key("Shift+L")  # the time of one key is shared by the cells that it answers
    await_answers(server, *server.pairs()[:9], *((item, "L") for item in range(9, 24)))
    shares = [row["seconds"] for row in server.answers[9:]]
    assert len(set(shares)) == 1 and 0.5 <= sum(shares) + 0.2 <= 3
    rate = int(re.search(r"(\d+) cells per minute", chromium.text())[1])
    total = sum(row["seconds"] for row in server.answers)
    assert rate == pytest.approx(24 / total * 60, rel=0.1)


def test_a_server_that_fails_loses_nothing(chromium, serve):
    server = opened(chromium, serve())
    chromium.key("M")
    await_answers(server, (0, "M"))
    server.fails = 500
    chromium.keys("L", "U", "Z", "X")
    chromium.wait("document.getElementById('lost').checkVisibility()", 2)
    assert "the disk is full" in chromium.text() and "not confirmed: 4" in chromium.text()
    assert badges(chromium)[:3] == "MLX" and len(server.answers) == 1
    server.fails = 0
    await_answers(server, (0, "M"), (1, "L"), (2, "U"), (2, None), (2, "X"))
    chromium.wait("!document.getElementById('lost').checkVisibility()")
    assert "all saved" in chromium.text()


def test_a_server_that_hangs_loses_nothing(chromium, serve):
    server = opened(chromium, serve())
    chromium.key("M")
    chromium.wait("document.body.innerText.includes('all saved')")
    server.hangs.clear()
    chromium.keys("L", "U")
    assert "2 not saved" in chromium.text()  # before it is known that the server hangs
    chromium.wait("document.getElementById('lost').checkVisibility()", 8)
    assert "does not answer" in chromium.text() and "not confirmed: 2" in chromium.text()
    server.hangs.set()
    chromium.wait("document.body.innerText.includes('all saved')")
    last = {row["item"]: row["answer"] for row in server.answers}
    assert last == {0: "M", 1: "L", 2: "U"}  # the answer that hung may have come twice


def test_a_server_that_is_gone_and_comes_back_loses_nothing(browser, serve):
    server = opened(browser, serve())
    browser.key("M")
    await_answers(server, (0, "M"))
    port = server.server_port
    server.stop()
    browser.keys("L", "U", "Shift+L", "Z", "X")
    browser.wait("document.getElementById('lost').checkVisibility()", 3)
    assert "does not answer" in browser.text() and f"--port {port}" in browser.text()
    again = Fake(server.state, port)
    try:
        again.answers, again.token = list(server.answers), "another"  # a new server has a new token
        browser.wait("document.getElementById('trouble').textContent.includes('wrong token')")
        assert again.pairs() == [(0, "M")]
        browser.open(f"http://127.0.0.1:{port}/?token=another")  # the old page is left with answers unsent
        page = [(item, letter) for letter in ("L", None) for item in range(3, 24)]
        await_answers(again, (0, "M"), (1, "L"), (2, "U"), *page, (3, "X"))
        browser.wait("document.body.innerText.includes('all saved')")
        assert badges(browser) == "MLUX" + "-" * 20 and cursor(browser) == 4
    finally:
        again.stop()


def test_answers_of_one_queue_never_reach_another(chromium, serve):
    server = opened(chromium, serve())
    server.fails = 500
    chromium.keys("M", "M")
    chromium.wait("document.getElementById('lost').checkVisibility()")
    server.state["queue_sha256"], server.fails = "q2", 0
    opened(chromium, server)
    chromium.key("L")
    await_answers(server, *[(0, "L")])
    server.state["queue_sha256"] = "q1"
    chromium.open(server.url + "&back")
    await_answers(server, (0, "L"), (0, "M"), (1, "M"))


def test_unsent_answers_can_be_saved_as_a_file(chromium, serve):
    server = opened(chromium, serve())
    server.fails = 500
    chromium.keys("M", "L")
    chromium.wait("document.getElementById('lost').checkVisibility()")
    chromium.js("document.querySelector('#lost .save').focus()")
    chromium.key("Enter")
    rows = saved(chromium)
    assert [(row["item"], row["answer"]) for row in rows] == [("0", "M"), ("1", "L")]


def test_a_picture_that_is_gone_is_said_and_takes_only_x(browser, serve):
    server = serve(26)
    server.gone = {1, 5, 25}
    opened(browser, server)
    browser.wait("document.querySelectorAll('.gone').length === 2")
    assert "picture gone" in browser.text() and "a.tif: not found" in browser.text()
    browser.keys("Right", "M")
    assert badges(browser)[1] == "-" and "only answer is X" in said(browser)
    browser.key("X")
    assert badges(browser) == "-X" + "-" * 22
    browser.key("Shift+L")
    assert badges(browser) == "LXLLL-" + "L" * 18 and cursor(browser) == 5
    browser.key("X")
    assert badges(browser)[5] == "X" and browser.js("document.title") == "Review: doubtful labels"


def test_pictures_of_the_next_page_are_loaded_ahead(chromium, serve):
    server = opened(chromium, serve(80))
    end = time.monotonic() + 10
    while len({path for path in server.asked if path.startswith("/crop/")}) < 48:
        assert time.monotonic() < end
        time.sleep(0.02)
    asked = [int(re.search(r"\d+", path)[0]) for path in server.asked if path.startswith("/crop/")]
    assert sorted(asked) == list(range(48))
    server.asked.clear()
    chromium.key("Space")
    chromium.wait("document.querySelectorAll('.cell img').length === 24")
    assert chromium.js("[...document.querySelectorAll('.cell img')].every((one) => one.complete && one.naturalWidth)")
    assert not [path for path in server.asked if re.match(r"/crop/(2[4-9]|3\d|4[0-7])\.", path)]


def test_text_is_never_run_and_nothing_leaves_the_page(chromium, serve):
    state = state_of(3, title=EVIL, reader=EVIL)
    for item in state["items"]:
        item["hint"] = EVIL
    server = serve(3, **state)
    chromium.open("about:blank")
    chromium.events.clear()
    opened(chromium, server)
    chromium.keys("M", "C")
    chromium.wait("document.querySelector('#context img')?.naturalWidth")
    assert EVIL in chromium.text() and EVIL in chromium.js("document.querySelector('.hint').textContent")
    chromium.keys("Escape", "Space")
    chromium.wait("document.querySelectorAll('#facts li').length > 2")
    assert f"Written: {EVIL}" in chromium.text()
    assert chromium.js("document.title") == f"Review: {EVIL}" and chromium.js("document.scripts.length") == 1
    requests = [
        event["params"]["request"]["url"] for event in chromium.events if event["method"] == "Network.requestWillBeSent"
    ]
    origin = f"http://127.0.0.1:{server.server_port}/"
    assert len(requests) > 5 and all(url.startswith((origin, "data:,")) for url in requests), requests
    assert not [event for event in chromium.events if event["method"] == "Runtime.exceptionThrown"]


def test_the_closing_page_says_what_was_written_and_copies_the_command(chromium, serve):
    opened(chromium, serve(2))
    chromium.keys("M", "Space")
    chromium.wait("document.querySelector('#command').textContent")
    text = chromium.text()
    assert "Labels changed: 12" in text and "9.5 minutes" in text and "Cell 2 is the first without" in text
    origin = chromium.js("location.origin")
    chromium.call(
        "Browser.grantPermissions", origin=origin, permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    chromium.js("document.getElementById('copy').focus()")
    chromium.key("Enter")
    chromium.wait("document.getElementById('said').textContent.includes('copied')")
    assert chromium.js("navigator.clipboard.readText()") == "python review.py --collect 'a b.csv'"
    chromium.key("Z")
    assert cursor(chromium) == 0 and badges(chromium) == "--"


def test_a_screen_reader_is_told(chromium, serve):
    state = state_of(30)
    state["items"][0]["hint"] = "mitosis, p 0.83"
    opened(chromium, serve(30, **state))
    label = "document.activeElement.getAttribute('aria-label')"
    assert chromium.js(label) == "Cell 1 of 30: no answer. mitosis, p 0.83"
    chromium.key("M")
    assert chromium.js(label) == "Cell 2 of 30: no answer" and said(chromium) == "Cell 1: mitosis. 1 of 30 answered."
    assert chromium.js("document.getElementById('said').ariaLive") == "polite"
    assert chromium.js("document.getElementById('lost').role") == "alert"
    assert chromium.js("[...document.images].every((one) => one.alt.length > 3)")
    assert chromium.js("getComputedStyle(document.activeElement).outlineWidth") == "4px"
    chromium.key("Tab")  # out of the gallery: one cell alone is in the order of Tab
    assert "mitosis" in chromium.js("document.activeElement.textContent")
    chromium.key("Enter")  # the button does what its key does
    assert badges(chromium)[:3] == "MM-" and cursor(chromium) == 2


def test_it_fits_a_laptop_and_scrolls_on_a_phone(chromium, serve):
    opened(chromium, serve())
    try:
        for height in (768, 620):
            chromium.size(1366, height)
            assert chromium.js("document.documentElement.scrollHeight") <= height
            assert chromium.js("document.documentElement.scrollWidth") <= 1366
        chromium.size(390, 844)
        chromium.wait("document.documentElement.scrollWidth <= 390")
        chromium.key("Down")
        assert cursor(chromium) == 3  # three columns
    finally:
        chromium.size(1366, 768)


def data_page(folder: Path, cells: int, **changes) -> Path:
    picture = "data:image/jpeg;base64," + base64.b64encode(jpeg(64)).decode()
    pictures = {str(item): picture for item in range(cells)}
    state = state_of(cells, **changes)
    data = {"state": state, "crops": pictures, "context": pictures, "overview": pictures, "queue_sha256": "abc123"}
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("/*DATA*/null") == 1
    path = folder / "for_dr_c.html"
    path.write_text(text.replace("/*DATA*/null", json.dumps(data).replace("<", "\\u003c")), encoding="utf-8")
    return path


def saved(browser) -> list[dict[str, str]]:
    """The one CSV file in the downloads, which is taken away."""
    end = time.monotonic() + 10
    while not (files := list(browser.downloads.glob("*.csv"))) or list(browser.downloads.glob("*.part")):
        assert time.monotonic() < end
        time.sleep(0.05)
    (path,) = files
    text = path.read_text(encoding="utf-8")
    path.unlink()
    assert text.splitlines()[0] == ",".join(COLUMNS)
    return list(csv.DictReader(io.StringIO(text)))


def test_a_page_without_a_server_saves_the_same_columns(browser, tmp_path):
    page = data_page(tmp_path, 30, reader='Dr. "C", ü', **{"pass": 2}).as_uri()
    browser.open(page)
    browser.wait("document.querySelector('.here img')?.naturalWidth")
    browser.keys("M", "L", "Z", "U")
    browser.open(page)  # closed and opened again: the answers are in the browser
    browser.wait("document.querySelector('.here img')?.naturalWidth")
    assert badges(browser) == "MU" + "-" * 22 and cursor(browser) == 2
    browser.keys("C", "X", "Escape")
    browser.js("document.getElementById('csv').focus()")
    browser.key("Enter")
    rows = saved(browser)
    assert [(row["item"], row["answer"]) for row in rows] == [("0", "M"), ("1", "L"), ("1", ""), ("1", "U"), ("2", "X")]
    for row in rows:
        assert row["reader"] == 'Dr. "C", ü' and row["pass"] == "2" and row["queue_sha256"] == "abc123"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["time"]) and 0 <= float(row["seconds"]) < 60
    browser.keys("Space", "Space")
    assert shown(browser, "closing") and "Save the answers as a CSV file" in browser.text()


def test_a_page_without_its_pictures_says_so(chromium, tmp_path):
    page = data_page(tmp_path, 3, reader="none")
    text = page.read_text(encoding="utf-8")
    page.write_text(
        re.sub(r'"1": "data:[^"]*"', '"1": "data:image/jpeg;base64,AAAA"', text).replace('"2": "data:', '"9": "data:')
    )
    chromium.open(page.as_uri())
    chromium.wait("document.querySelectorAll('.gone').length === 2")
    chromium.key("Shift+M")
    assert badges(chromium) == "M--" and cursor(chromium) == 1
    chromium.key("Shift+X")
    assert badges(chromium) == "MXX"


def test_a_browser_that_keeps_nothing_says_so(chromium, tmp_path):
    page = data_page(tmp_path, 3, reader="nowhere")
    text = page.read_text(encoding="utf-8")
    refusal = (
        '<script>Storage.prototype.setItem = () => { throw new DOMException("full", "QuotaExceededError"); };</script>'
    )
    page.write_text(text.replace("<script>", refusal + "<script>", 1), encoding="utf-8")
    chromium.open(page.as_uri())
    chromium.wait("document.getElementById('lost').checkVisibility()")
    assert "keeps no answers (QuotaExceededError)" in chromium.text()
    chromium.keys("M", "L")
    chromium.js("document.querySelector('#lost .save').focus()")
    chromium.key("Enter")
    assert [row["answer"] for row in saved(chromium)] == ["M", "L"]


def test_an_empty_queue_and_a_server_without_a_queue_are_said(chromium, serve):
    chromium.open(serve(0).url)
    chromium.wait("document.body.innerText.includes('queue is empty')")
    chromium.keys("M", "Space", "Escape", "Z", "Left")
    assert shown(chromium, "closing")
    server = serve(3)
    del server.state["queue_sha256"]
    chromium.open(server.url)
    chromium.wait("document.body.innerText.includes('queue_sha256 is missing')")


def test_the_page_is_one_small_file_of_its_own():
    text = PAGE.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 400 and max(map(len, lines)) <= 120
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|https?://|@import", text
    )
    assert text.count("/*DATA*/null") == 1 and "default-src 'none'" in text
