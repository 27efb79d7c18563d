"""A headless Chromium, driven through its pipe by the DevTools protocol: nothing but the browser
itself is needed."""

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """The path of a browser, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser. `errors` holds what its console and its exceptions said."""

    def __init__(self, profile: Path):
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()
        self.errors, self.requests, self.number, self.buffer = [], [], 0, b""
        self.reader, self.writer = ours_read, ours_write
        # The browser reads from descriptor 3 and writes to 4.
        command = f'exec "$0" "$@" 3<&{theirs_read} 4>&{theirs_write}'
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        self.process = subprocess.Popen(
            ["bash", "-c", command, find_browser(), *flags]
            + ["--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_read, theirs_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_read)
        os.close(theirs_write)
        self.session = None
        [page] = [
            target
            for target in self.ask("Target.getTargets")["targetInfos"]
            if target["type"] == "page"
        ][:1]
        self.session = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)[
            "sessionId"
        ]
        for domain in "Page", "Runtime", "Log", "Network":
            self.ask(f"{domain}.enable")

    def read(self) -> dict:
        """The next message of the browser."""
        while b"\0" not in self.buffer:
            chunk = os.read(self.reader, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self.buffer += chunk
        message, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(message)
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            self.errors.append(json.dumps(parameters["args"])[:500])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        return message

    def ask(self, method: str, **parameters) -> dict:
        """Sends a command and returns what the browser answers."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def run(self, script: str):
        """The value of a script's last expression, run in the page."""
        answer = self.ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def open(self, path: Path, width=1280, height=900, dark=False, mobile=False):
        """Opens a file, and returns how many seconds it took until it was ready."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )
        look = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[look])
        start = time.monotonic()
        self.ask("Page.navigate", url=Path(path).resolve().as_uri())
        while self.run("document.readyState") != "complete":
            time.sleep(0.02)
        return time.monotonic() - start

    def screenshot(self, path: Path, full=False):
        """Writes a picture of what is seen, or of the whole page."""
        answer = self.ask("Page.captureScreenshot", captureBeyondViewport=full)
        Path(path).write_bytes(base64.b64decode(answer["data"]))

    def press(self, key: str):
        """Presses a key and lets it go."""
        for kind in "keyDown", "keyUp":
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def close(self):
        """Ends the browser."""
        self.process.terminate()
        self.process.wait(20)
        os.close(self.reader)
        os.close(self.writer)
