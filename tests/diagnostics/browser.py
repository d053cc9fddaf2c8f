"""A real Chromium without a window, driven through a pipe by its own DevTools protocol."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome") or ""
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--no-first-run",
]


class Browser:
    """One page of one browser. `messages` has what the page wrote to its console, its exceptions and blocked content."""

    def __init__(self, profile):
        (commands, self.write), (self.read, answers) = os.pipe(), os.pipe()

        # Its pipes are 3 and 4; a small process of its own puts them there, since one with JAX's threads must not fork.
        launcher = f"import os, sys; a, b = os.dup({commands}), os.dup({answers}); os.dup2(a, 100); os.dup2(b, 101)"
        launcher += "; os.dup2(100, 3); os.dup2(101, 4); os.execv(sys.argv[1], sys.argv[1:])"
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", launcher, CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(commands, answers),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(answers)
        self.left, self.number = b"", 0
        self.session: str | None = None
        self.messages: list[dict] = []
        self.requests: list[str] = []
        target = next(each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _next(self):
        while b"\0" not in self.left:
            chunk = os.read(self.read, 1 << 16)
            if not chunk:
                raise EOFError("Chromium ended")
            self.left += chunk
        message, self.left = self.left.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def _note(self, event):
        match event.get("method"):
            case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" | "Log.entryAdded":
                self.messages.append(event["params"])
            case "Network.requestWillBeSent":
                self.requests.append(event["params"]["request"]["url"])

    def open(self, path, *, width=1200, height=900, dark=False):
        """Opens a page, a file or an address, in a window of this size."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        address = str(path)
        self.call("Page.navigate", url=address if address.startswith("http://") else f"file://{address}")
        self.wait("document.readyState === 'complete'")

    def value(self, expression):
        """Value of an expression of JavaScript."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, expression, seconds=20):
        """Waits until the expression is true."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            if time.monotonic() > end:
                raise TimeoutError(expression)
            time.sleep(0.02)

    def mouse(self, kind, x, y, **options):
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **options)

    def key(self, name):
        text = {"text": name} if len(name) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name)

    def picture(self, path, *, whole=False):
        """Writes a screenshot of the window, or of the whole page."""
        options = {"captureBeyondViewport": True} if whole else {}
        answer = self.call("Page.captureScreenshot", **options)
        with open(path, "wb") as file:
            file.write(base64.b64decode(answer["data"]))

    def close(self):
        with contextlib.suppress(Exception):
            self.session = None
            self.call("Browser.close")
        os.close(self.write)
        os.close(self.read)
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextlib.contextmanager
def browser():
    """Starts a browser and ends it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        made = Browser(profile)
        try:
            yield made
        finally:
            made.close()
