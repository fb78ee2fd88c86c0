"""python tests/support/audited.py EVENTS then [RECIPE WORDS...] then [RECIPE WORDS...]: the recipes one after the
other, and what they connect to, start, unpickle, open elsewhere or write, an event a line in the file EVENTS."""

import json
import os
import runpy
import sys
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
TOLD = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request", "ftplib.connect")
TOLD += ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pickle.find_class")
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "shutil.rmtree")


def main() -> None:
    file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    busy = []

    def hook(event: str, arguments: tuple) -> None:
        if busy:
            return
        busy.append(True)
        if event == "open" and isinstance(arguments[0], str | bytes):
            kind = "write" if (arguments[2] or 0) & WRITES else "read"
            os.write(file, (json.dumps([kind, os.path.abspath(os.fsdecode(arguments[0]))]) + "\n").encode())
        elif event in TOLD or event in CHANGES:
            os.write(file, (json.dumps([event, *map(str, arguments)]) + "\n").encode())
        busy.clear()

    runs, words = [], sys.argv[2:]
    while "then" in words:
        words = words[words.index("then") + 1 :]
        runs.append(words[: words.index("then")] if "then" in words else words)
    sys.addaudithook(hook)
    for recipe, *rest in runs:
        sys.argv = [f"{RECIPES / recipe}.py", *rest]
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
