"""Real crashes for tests: forked children, a tap on every call that changes a disk, and a model of a power loss."""

import os
import random
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHANGES = ("open", "write", "pwrite", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "ftruncate")


def forked(work: Callable[[], None]) -> int:
    """The wait status of a child that did this: 0 if all went well, SIGKILL's number if it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(99)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


@contextmanager
def tapped(
    before: Callable[[str, tuple, dict], None], after: Callable[[str, tuple, dict, object], None]
) -> Iterator[None]:
    """Calls of the os module that change a disk are announced, then really made, then announced with their result."""
    real = {name: getattr(os, name) for name in CHANGES}

    def tap(name: str) -> Callable:
        def call(*args, **named):
            before(name, args, named)
            result = real[name](*args, **named)
            after(name, args, named, result)
            return result

        return call

    for name in CHANGES:
        setattr(os, name, tap(name))
    try:
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)


def list_changes(work: Callable[[], None]) -> list[str]:
    names = []
    with tapped(lambda name, args, named: names.append(name), lambda *_: None):
        work()
    return names


def killed_at(work: Callable[[], None], moment: int, when: str) -> int:
    """Forks, and sends SIGKILL before, after or midway in the given change (midway: half of a write is on disk)."""
    real_write = os.write

    def child() -> None:
        seen = -1

        def before(name: str, args: tuple, named: dict) -> None:
            nonlocal seen
            seen += 1
            if seen == moment and when != "after":
                if when == "midway" and name == "write":
                    real_write(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

        def after(name: str, args: tuple, named: dict, result: object) -> None:
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        with tapped(before, after):
            work()

    return forked(child)


class File:
    def __init__(self) -> None:
        self.data, self.durable = bytearray(), b""


class Folder:
    def __init__(self) -> None:
        self.names: dict[str, File | Folder] = {}
        self.durable: dict[str, File | Folder] = {}
        self.pending: list[dict[str, File | Folder | None]] = []  # not yet fsynced changes of names, each atomic

    def change(self, **names: "File | Folder | None") -> None:
        self.pending.append(names)
        apply(self.names, names)


def apply(entries: dict, names: dict) -> None:
    for name, node in names.items():
        entries.pop(name, None)
        if node is not None:
            entries[name] = node


class PowerLoss:
    """What POSIX promises about a disk after a power loss, and no more.

    Data is there if its file was fsynced after it was written; else what was written since may be missing, cut
    anywhere, or zeros.
    Names are there if their folder was fsynced after they changed; else any subset of the changes may have happened.
    """

    def __init__(self, top: Path):
        self.top, self.root, self.trace = top, self._existing(top), []
        self.open: dict[int, Path] = {}

    def _existing(self, path: Path) -> File | Folder:
        if path.is_dir():
            folder = Folder()
            folder.names = {child.name: self._existing(child) for child in path.iterdir()}
            folder.durable = dict(folder.names)
            return folder
        file = File()
        file.data = bytearray(path.read_bytes())
        file.durable = bytes(file.data)
        return file

    @contextmanager
    def recording(self) -> Iterator[None]:
        with tapped(lambda *_: None, self._record):
            yield

    def _path(self, path: object, named: dict) -> Path:
        return self.open[named["dir_fd"]] / os.fspath(path) if named.get("dir_fd") is not None else Path(path)

    def _record(self, name: str, args: tuple, named: dict, result: object) -> None:
        if name == "open":
            path = self._path(args[0], named)
            self.open[result] = path
            if args[1] & os.O_CREAT:
                self._add("create", path)
        elif name in ("write", "pwrite"):
            at = args[2] if name == "pwrite" else None  # at the end
            self._add("write", self.open.get(args[0]), bytes(args[1][:result]), at)
        elif name == "fsync":
            self._add("fsync", self.open.get(args[0]))
        elif name == "ftruncate":
            self._add("truncate", self.open.get(args[0]), args[1])
        elif name in ("rename", "replace"):
            self._add("rename", Path(args[0]), Path(args[1]))
        else:
            self._add(name, self._path(args[0], named))

    def _add(self, kind: str, path: Path | None, *rest: object) -> None:
        """What happens elsewhere is nobody's concern here."""
        if path is not None and path.is_relative_to(self.top):
            self.trace.append((kind, path, *rest))

    def _node(self, path: Path) -> File | Folder:
        node = self.root
        for part in path.relative_to(self.top).parts:
            node = node.names[part]
        return node

    def play(self, operation: tuple) -> None:
        kind, path, *rest = operation
        if kind == "create":
            if path.name not in self._node(path.parent).names:
                self._node(path.parent).change(**{path.name: File()})
        elif kind == "mkdir":
            self._node(path.parent).change(**{path.name: Folder()})
        elif kind == "write":
            (written, at), data = rest, self._node(path).data
            at = len(data) if at is None else at
            data[at : at + len(written)] = written
        elif kind == "truncate":
            self._node(path).data = bytearray(self._node(path).data[: rest[0]].ljust(rest[0], b"\0"))
        elif kind == "rename":
            node = self._node(path)
            if path.parent == rest[0].parent:
                self._node(path.parent).change(**{path.name: None, rest[0].name: node})
            else:  # in two folders, each of which may have lost it
                self._node(path.parent).change(**{path.name: None})
                self._node(rest[0].parent).change(**{rest[0].name: node})
        elif kind in ("unlink", "rmdir"):
            self._node(path.parent).change(**{path.name: None})
        else:
            assert kind == "fsync"
            node = self._node(path)
            if isinstance(node, File):
                node.durable = bytes(node.data)
            else:
                node.durable, node.pending = dict(node.names), []

    def rebuild(self, where: Path, names: str, data: str, chance: random.Random) -> None:
        """Puts on a real disk what may be left; names: undone, done or some; data: empty, cut or zeros."""
        self._rebuild(self.root, where, names, data, chance)

    def _rebuild(self, node: File | Folder, where: Path, names: str, data: str, chance: random.Random) -> None:
        if isinstance(node, File):
            kept = len(node.durable) if bytes(node.data[: len(node.durable)]) == node.durable else 0
            new = len(node.data) - kept
            cut = {"empty": 0, "cut": chance.randrange(new + 1), "zeros": 0}[data]
            where.write_bytes(bytes(node.data[: kept + cut]) + (bytes(new) if data == "zeros" else b""))
            return
        where.mkdir()
        entries = dict(node.durable)
        for change in node.pending:
            if names == "done" or (names == "some" and chance.random() < 0.5):
                apply(entries, change)
        for name, child in entries.items():
            self._rebuild(child, where / name, names, data, chance)
