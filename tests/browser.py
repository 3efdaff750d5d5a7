"""A headless browser driven by keys, with the standard library alone.

Chromium is told by its DevTools pipe what to do, Firefox by Marionette.
"""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)
NAMES = {"Space": " ", "Left": "ArrowLeft", "Right": "ArrowRight", "Up": "ArrowUp", "Down": "ArrowDown"}
CODES = {
    " ": 32,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
    "Escape": 27,
    "Enter": 13,
    "Tab": 9,
}
MARIONETTE = {"ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015"}
MARIONETTE |= {"Escape": "\ue00c", "Enter": "\ue007", "Tab": "\ue004", "Shift": "\ue008"}
SECONDS = 30  # until a browser that does not answer fails the test


class Browser:
    """What both browsers do. key("Shift+M") presses as a keyboard does; wait(expression) until it is true."""

    def keys(self, *names: str) -> None:
        for name in names:
            self.key(name)

    def wait(self, expression: str, seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not self.js(f"Boolean({expression})"):
            assert time.monotonic() < end, f"not true within {seconds} s: {expression}\npage: {self.text()[:600]}"
            time.sleep(0.02)

    def text(self) -> str:
        return self.js("document.body.innerText")


class Chromium(Browser):
    def __init__(self, folder: Path, width: int = 1366, height: int = 768):
        """folder: for the profile and for what the page saves."""
        self.downloads = folder / "downloads"
        command = [
            CHROMIUM,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-extensions",
        ]
        command += [
            "--remote-debugging-pipe",
            f"--user-data-dir={folder / 'profile'}",
            "--disable-background-networking",
        ]
        command += ["--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "about:blank"]
        there, self.write = os.pipe()
        self.read, back = os.pipe()
        shell = ["bash", "-c", f'exec "$@" 3<&{there} 4>&{back}', "bash"]
        self.process = subprocess.Popen(
            [*shell, *command], pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(there), os.close(back)
        self.number, self.buffer, self.events, self.session = 0, b"", [], None
        target = next(one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        flags = {"targetId": target["targetId"], "flatten": True}
        self.session = self.call("Target.attachToTarget", **flags)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        self.size(width, height)

    def size(self, width: int, height: int) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **screen)

    def call(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                piece = os.read(self.read, 1 << 20)
                assert piece, "Chromium ended"
                self.buffer += piece
            line, self.buffer = self.buffer.split(b"\0", 1)
            reply = json.loads(line)
            if reply.get("method") == "Page.javascriptDialogOpening":  # "leave the page?": yes
                accept = {"id": 0, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                os.write(self.write, json.dumps(accept | {"sessionId": self.session}).encode() + b"\0")
            if "method" in reply:
                self.events.append(reply)
            elif reply["id"] == self.number:
                assert "error" not in reply, f"{method}: {reply['error']}"
                return reply["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")

    def js(self, expression: str):
        flags = {"returnByValue": True, "awaitPromise": True}
        result = self.call("Runtime.evaluate", expression=expression, **flags)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def key(self, name: str, held: bool = False) -> None:
        *shift, key = name.split("+")
        key = NAMES.get(key, key if shift or len(key) > 1 else key.lower())
        event = {"key": key, "code": f"Key{key.upper()}" if key.isalpha() and len(key) == 1 else key}
        event |= {"modifiers": 8 if shift else 0, "windowsVirtualKeyCode": CODES.get(key, ord(key.upper()[0]))}
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", autoRepeat=held, **event, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def shot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.call("Browser.close")
        os.close(self.write), os.close(self.read)
        self.process.wait(SECONDS)


class Firefox(Browser):
    def __init__(self, folder: Path, width: int = 1366, height: int = 768):
        """folder: for the profile and for what the page saves."""
        self.downloads = folder / "downloads"
        profile = folder / "profile"
        profile.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {
            "marionette.port": port,
            "browser.download.folderList": 2,
            "browser.shell.checkDefaultBrowser": False,
        }
        settings |= {"browser.download.dir": str(self.downloads), "datareporting.policy.dataSubmissionEnabled": False}
        settings |= {"browser.download.alwaysOpenPanel": False, "dom.disable_beforeunload": True}
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in settings.items()]
        (profile / "user.js").write_text("".join(lines))
        command = [FIREFOX, "--headless", "--marionette", "--no-remote", "--profile", str(profile)]
        command += ["--width", str(width), "--height", str(height), "about:blank"]
        environment = os.environ | {"HOME": str(folder), "MOZ_DISABLE_CONTENT_SANDBOX": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        end = time.monotonic() + SECONDS
        while True:
            try:
                self.socket = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
                break
            except OSError:
                assert time.monotonic() < end and self.process.poll() is None, "Firefox does not start"
                time.sleep(0.1)
        self.stream, self.number = self.socket.makefile("rb"), 0
        self.receive()
        self.call("WebDriver:NewSession")
        self.call("WebDriver:SetWindowRect", width=width, height=height)

    def receive(self):
        length = b""
        while not length.endswith(b":"):
            piece = self.stream.read(1)
            assert piece, "Firefox ended"
            length += piece
        return json.loads(self.stream.read(int(length[:-1])))

    def call(self, method: str, **params):
        self.number += 1
        message = json.dumps([0, self.number, method, params]).encode()
        self.socket.sendall(b"%d:%b" % (len(message), message))
        _, _, error, result = self.receive()
        assert error is None, f"{method}: {error}"
        return result

    def open(self, url: str) -> None:
        self.call("WebDriver:Navigate", url=url)

    def js(self, expression: str):
        result = self.call("WebDriver:ExecuteScript", script=f"return {expression}", args=[])
        return result["value"]

    def key(self, name: str) -> None:
        *shift, key = name.split("+")
        key = NAMES.get(key, key if shift or len(key) > 1 else key.lower())
        held = [MARIONETTE["Shift"]] if shift else []
        order = [("keyDown", one) for one in [*held, MARIONETTE.get(key, key)]]
        order += [("keyUp", one) for one in [MARIONETTE.get(key, key), *held]]
        actions = [{"type": kind, "value": value} for kind, value in order]
        self.call("WebDriver:PerformActions", actions=[{"type": "key", "id": "keyboard", "actions": actions}])

    def shot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("WebDriver:TakeScreenshot", full=False)["value"]))

    def close(self) -> None:
        with contextlib.suppress(AssertionError, OSError):
            self.call("Marionette:Quit", flags=["eForceQuit"])
        self.socket.close()
        self.process.wait(SECONDS)
