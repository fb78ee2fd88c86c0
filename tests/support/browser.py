"""A real browser without a window: Chromium, driven by the DevTools protocol through two pipes, with no other library.

The protocol: https://chromedevtools.github.io/devtools-protocol, JSON ended by a zero byte in either direction.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HEIGHT = 800


class Browser:
    """One page. Use as `with Browser() as browser`."""

    def __enter__(self) -> "Browser":
        self.profile = tempfile.mkdtemp()
        read, self.to = os.pipe()
        self.of, write = os.pipe()
        flags = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-extensions --remote-debugging-pipe"
        words = [str(PROGRAM), *flags.split(), "--hide-scrollbars", f"--user-data-dir={self.profile}", "about:blank"]
        # It reads from descriptor 3 and writes to 4. Not sh: some know no descriptors above 9.
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{read} 4>&{write}', "bash", *words],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self.number, self.session, self.rest, self.events = 0, "", b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Runtime.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self.session = ""
        try:
            self.call("Browser.close")
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.to)
            os.close(self.of)
            shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            chunk = os.read(self.of, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self.rest += chunk
        text, _, self.rest = self.rest.partition(b"\0")
        answer = json.loads(text)
        if "method" in answer:
            self.events.append(answer)
        return answer

    def wait_for(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self._next()

    def open(self, file: Path, *, width: int = 1280, dark: bool = False, script: str = "") -> None:
        """As if for the first time. script: runs before the page's own."""
        self.look(width, dark)
        added = self.call("Page.addScriptToEvaluateOnNewDocument", source=f"sessionStorage.clear(); {script}")[
            "identifier"
        ]
        self.events.clear()
        self.call("Page.navigate", url=file.absolute().as_uri())
        self.wait_for("Page.loadEventFired")
        self.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added)
        # A page puts its scroll position back in its first frame: on a busy machine that is after the load event.
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def look(self, width: int, dark: bool) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=HEIGHT, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, a promise's too."""
        done = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"]["exception"].get("description", done["exceptionDetails"]))
        return done["result"].get("value")

    def errors(self) -> list[str]:
        """Of the page's scripts, since it was opened."""
        kinds = "Runtime.exceptionThrown"
        return [json.dumps(event["params"]["exceptionDetails"]) for event in self.events if event["method"] == kinds]

    def click(self, selector: str, number: int = 0) -> None:
        """With a real mouse, in the middle of the element."""
        place = self.run(
            f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{number}];"
            "e.scrollIntoView({block: 'center', inline: 'center'});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def picture(self, file: Path) -> None:
        """Of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))
