"""A server as the review page expects it, which can fail, and what a reader sees of the page."""

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
from PIL import Image

PAGE = Path(__file__).resolve().parents[1] / "dasc/review/page.html"
TOKEN = "a secret+&token"
COLUMNS = ["time", "reader", "item", "answer", "seconds", "pass", "queue_sha256"]  # of answers/READER.csv
EVIL = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"


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
