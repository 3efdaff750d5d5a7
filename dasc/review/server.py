"""The page for one reader: a server for this computer alone, or one file without a server."""

import base64
import hmac
import json
import os
import re
import secrets
import shlex
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

import pandas as pd
from tqdm import tqdm

from dasc.errors import InputError, WriteError
from dasc.files import write_text
from dasc.review.answers import AnswerFile
from dasc.review.crops import CONTEXT_UM, CROP_UM, SIDE_PX, Crops

PAGE = Path(__file__).with_name("page.html")
DATA = "/*DATA*/null"  # in the page: what stands here instead is what a server would have answered
HOST = "127.0.0.1"
MOST_BYTES = 4096  # of an answer
COLUMNS, ROWS = 6, 4  # of the gallery
TITLES = {
    "noise": "doubtful labels",
    "uncertain": "cells near the threshold",
    "disagree": "labels that the model contradicts",
    "contested": "cells that readers call differently",
    "audit": "a random sample",
}
POLICY = (
    "default-src 'none'; img-src 'self' data: blob:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class Review:
    """What the page shows and is told: one reader's way through one queue.

    hints: what stands below every crop; None: the reader is blind. command: what to do when all is answered.
    """

    def __init__(
        self, name: str, queue: pd.DataFrame, crops: Crops, answers: AnswerFile, hints: list[str] | None, command: str
    ) -> None:
        self.name, self.queue, self.crops, self.answers = name, queue, crops, answers
        self.hints, self.command = hints, command

    def state(self) -> dict[str, Any]:
        last = self.answers.last
        items: list[dict[str, Any]] = [
            {"item": item, "turn": int(turn), "answer": last.get(item)} for item, turn in enumerate(self.queue["turn"])
        ]
        for item, hint in zip(items, self.hints or [], strict=False):
            item["hint"] = hint
        return {
            "reader": self.answers.reader,
            "title": TITLES[self.name],
            "queue": self.name,
            "columns": COLUMNS,
            "rows": ROWS,
            "crop_um": CROP_UM,
            "context_um": CONTEXT_UM,
            "items": items,
            "pass": self.answers.number,
            "queue_sha256": self.answers.queue_sha256,
        }

    def answer(self, content: Any) -> dict[str, int]:
        if not isinstance(content, dict) or content.keys() != {"item", "answer", "seconds"}:
            raise InputError("expected an object with item, answer and seconds")
        return {"answered": self.answers.append(**content), "of": len(self.queue)}

    def closing(self) -> dict[str, Any]:
        last = self.answers.last
        called = self.queue["called"]
        asked = {item: answer for item, answer in last.items() if self.queue["kind"][item] != "repeat"}
        return {
            "answered": len(last),
            "of": len(self.queue),
            "changed": sum(answer == ("L" if called[item] else "M") for item, answer in asked.items()),
            "written": [str(self.answers.path)] if self.answers.path.is_file() else [],
            "command": self.command,
            "minutes": round(self.answers.minutes, 1),
        }


class Server(ThreadingHTTPServer):
    """Serves a review on this computer alone, to whoever knows the token.

    Raises:
        InputError: the port is in use.
    """

    daemon_threads = True
    allow_reuse_address = os.name != "nt"  # there it would share a port that another process listens on

    def __init__(self, review: Review, port: int) -> None:
        self.review, self.token = review, secrets.token_urlsafe(16)
        try:
            super().__init__((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"--port {port}: cannot be listened on ({getattr(error, 'strerror', None) or error}); "
                "name another one, or 0 for any that is free"
            ) from error
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that turned the page before its pictures came is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/?token={self.token}"


class Handler(BaseHTTPRequestHandler):
    """One request. Items are asked for by their number; no part of a request is ever a path."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer of a few bytes is not held back
    server_version, sys_version = "DASC", ""
    timeout = 60

    def do_GET(self) -> None:
        url = self._split()
        asked = {name: values[-1] for name, values in parse_qs(url.query).items()}
        if not self._may(asked.get("token", "")):
            return
        review = self.server.review
        picture = re.fullmatch(r"/(crop|slide)/([0-9]{1,9})\.jpg", url.path)
        if url.path == "/":
            self._send(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif url.path == "/api/state":
            self._json(200, review.state())
        elif url.path == "/api/closing":
            self._json(200, review.closing())
        elif picture and int(picture[2]) < len(review.queue):
            um = asked.get("um", str(CROP_UM))
            if um not in map(str, SIDE_PX):
                self._json(400, {"error": f"um {um[:20]}: expected {' or '.join(map(str, SIDE_PX))}"})
                return
            try:
                item = int(picture[2])
                data = review.crops.crop(item, int(um)) if picture[1] == "crop" else review.crops.overview(item)
            except InputError as error:
                self._json(404, {"error": str(error)})
                return
            self._send(200, data, "image/jpeg", "private, max-age=3600")
        else:
            self._json(404, {"error": "no such page or item"})

    def do_POST(self) -> None:
        closes, self.close_connection = self.close_connection, True  # what is left of an unread body is no request
        if not self._may(self.headers.get("X-Token", "")):
            return
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json":
            self._json(415, {"error": "expected application/json"})
        elif not re.fullmatch("[0-9]{1,15}", length):
            self._json(411, {"error": "expected a Content-Length"})
        elif int(length) > MOST_BYTES:
            self._json(413, {"error": f"{length} bytes, expected at most {MOST_BYTES}"})
        elif self._split().path != "/api/answer":
            self._json(404, {"error": "no such page"})
        else:
            body = self.rfile.read(int(length))
            self.close_connection = closes
            try:
                self._json(200, self.server.review.answer(json.loads(body)))
            except WriteError as error:
                self._json(500, {"error": str(error)})
            except (InputError, ValueError, RecursionError) as error:
                self._json(400, {"error": str(error)})

    def _split(self) -> SplitResult:
        try:
            return urlsplit(self.path)
        except ValueError:  # brackets that are no address
            return urlsplit("/none")

    def _may(self, token: str) -> bool:
        """Whether host and token are right; answers 403 where they are not. A page of another site knows no token,
        and a name of its own for this computer is not in `hosts`."""
        right = hmac.compare_digest(token.encode(), self.server.token.encode())
        if right and self.headers.get("Host", "") in self.server.hosts:
            return True
        self._json(403, {"error": "open the address that review.py printed, whole"})
        return False

    def _json(self, status: int, content: Any) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, data: bytes, kind: str, keep: str = "no-store") -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": len(data), "Cache-Control": keep}
        headers |= {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        headers |= {"Content-Security-Policy": POLICY}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing is printed per request."""


def write_page(path: Path, review: Review) -> None:
    """Write the page with all pictures in it, for a reader without this program.

    Raises:
        InputError: an image that is gone: a page with holes would be sent away unnoticed.
    """
    state = review.state()
    for item in state["items"]:
        item["answer"] = None
    data = {"state": state, "crops": {}, "context": {}, "overview": {}, "queue_sha256": review.answers.queue_sha256}
    for item in tqdm(range(len(review.queue)), desc="cells", unit="cell"):
        data["crops"][item] = _data_uri(review.crops.crop(item))
        data["context"][item] = _data_uri(review.crops.crop(item, CONTEXT_UM))
        data["overview"][item] = _data_uri(review.crops.overview(item))
    page = PAGE.read_text(encoding="utf-8")
    if page.count(DATA) != 1:
        raise InputError(f"{PAGE}: expected {DATA} in it once; get the file again")
    write_text(path, page.replace(DATA, json.dumps(data).replace("<", "\\u003c")))  # no name ends the script


def _data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def typed(words: Sequence[object]) -> str:
    """A command as it is typed in a shell; a pattern stays one."""
    return " ".join(word if "*" in word and " " not in word else shlex.quote(word) for word in map(str, words))
