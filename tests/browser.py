"""A headless Chromium, spoken to over a pipe: enough of the DevTools protocol to look at a page as a reader would.

The pipe (`--remote-debugging-pipe`: file descriptors 3 and 4, JSON texts that end in a zero byte) needs no port and no package.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REMEDY = "no Chromium is installed: apt-get install chromium-headless-shell, or put one of " + ", ".join(NAMES) + " on the PATH"
_PATIENCE_S = 60.0
# Where the browser looks for the pipe. A shell could do this too, were it sure to know descriptors above 9.
_THREE_AND_FOUR = """
import fcntl, os, sys
for number, given in [(3, sys.argv[1]), (4, sys.argv[2])]:
    sys.argv[number - 2] = fcntl.fcntl(int(given), fcntl.F_DUPFD, 10)
for number in (3, 4):
    os.dup2(sys.argv[number - 2], number)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find():
    """The path of a browser, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a running browser."""

    def __init__(self, write, read):
        self.write, self.read = write, read
        self.rest, self.number, self.session = b"", 0, None
        self.events = []

    def call(self, method, **params):
        """The result of a command; events that come meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        os.write(self.write, json.dumps(message | ({"sessionId": self.session} if self.session else {})).encode() + b"\0")
        return self._until(lambda found: found.get("id") == self.number)["result"]

    def wait_for(self, method):
        """The next event of a name."""
        return self._until(lambda found: found.get("method") == method)

    def _until(self, wanted):
        end = time.monotonic() + _PATIENCE_S
        while True:
            while b"\0" in self.rest:
                text, _, self.rest = self.rest.partition(b"\0")
                found = json.loads(text)
                if "error" in found:
                    raise RuntimeError(f"the browser refused: {found['error']}")
                if "method" in found:
                    self.events.append(found)
                if wanted(found):
                    return found
            if not select.select([self.read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"the browser did not answer for {_PATIENCE_S:.0f} s")
            piece = os.read(self.read, 1 << 20)
            if not piece:
                raise RuntimeError("the browser has gone")
            self.rest += piece

    def value(self, expression):
        """What a JavaScript expression is on the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def show(self, path, *, width, scheme, height=800):
        """Open a file at a width in CSS pixels, in the colours `light` or `dark`; width and scheme are the page's, not the window's."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        self.wait_for("Page.loadEventFired")

    def complaints(self):
        """Console messages, exceptions and log entries since the page was opened."""
        kinds = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        return [event["params"] for event in self.events if event["method"] in kinds]

    def requested(self):
        """Addresses that were asked for since then."""
        return [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]

    def picture(self):
        """The whole page as PNG bytes."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])


@contextmanager
def open_browser(profile):
    """A browser that ends with the block; `profile` is a directory for what it writes."""
    ours, theirs = os.pipe(), os.pipe()  # each (read, write): commands go through the first, answers come from the second
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars"]
    flags += ["--disable-background-networking", "--disable-extensions", f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    command = [sys.executable, "-c", _THREE_AND_FOUR, str(ours[0]), str(theirs[1]), find(), *flags, "about:blank"]
    process = subprocess.Popen(command, pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(ours[0])
    os.close(theirs[1])
    try:
        browser = Browser(ours[1], theirs[0])
        target = next(t for t in browser.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        browser.session = browser.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            browser.call(f"{domain}.enable")
        yield browser
    finally:
        os.close(ours[1])
        os.close(theirs[0])
        process.terminate()
        process.wait(timeout=20)
