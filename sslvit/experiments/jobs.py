"""Work as a list of parts, each one command line with a file that is there when it is done.

So a comparison or a study that is killed goes on where it was, finished parts are never done again, and several
machines can work in one folder: a part is taken by locking its file, which is free again when its process is gone. What
stands in the end depends on the parts alone, and not on who did them when.
"""

import fcntl
import importlib.util
import math
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from sslvit.cli import choose
from sslvit.config import ImagesConfig, as_now, configuration
from sslvit.errors import BAD_CONFIGURATION, INTERNAL, CannotWrite, Preempted, Stop
from sslvit.processes import signals
from sslvit.runs.folder import CHECKPOINTS
from sslvit.runs.log import duration
from sslvit.storage import durable, sealed

DISTRIBUTED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
LAST_LINES = 12
TAKEN = 113  # the exit code of a part that another worker is doing


class Job(NamedTuple):
    name: str  # unique, also a path
    recipe: str
    words: tuple[str, ...]  # after the recipe's name
    product: Path
    needs: tuple[str, ...] = ()  # names of parts
    work: float = 1.0  # how long it takes, in any unit that is the same for all
    run: Path | None = None  # a folder with runs, which need no checkpoints when the part is done

    def command(self) -> str:
        return shlex.join(["python", f"recipes/{self.recipe}.py", *self.words])


class JobFailed(Stop):
    """A part ended with an error, which is in its log."""

    def __init__(self, text: str, code: int):
        super().__init__(text)
        self.code = code


def flags(**given: object) -> tuple[str, ...]:
    """A command line's words: threads=1 as --threads 1, a sequence as several values."""
    words = []
    for name, value in given.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return tuple(words)


def reading(config: ImagesConfig) -> tuple[str, ...]:
    """The words for the images of this configuration."""
    words = flags(data=config.data, image_size=config.image_size)
    for one in fields(ImagesConfig):
        value = getattr(config, one.name)
        if one.name not in ("data", "image_size") and value != one.default:
            words += (f"--{one.name}",) if value is True else flags(**{one.name: value})
    return words


def check_numbers(config: Any, *, above: str = "", from_zero: str = "", shares: str = "") -> None:
    """Of options that are named in these words, each value must be so, and be named once."""
    kinds = {"above 0": (above, lambda x: x > 0), "0 or more": (from_zero, lambda x: x >= 0)}
    kinds |= {"above 0 and at most 1": (shares, lambda x: 0 < x <= 1)}
    for must, (names, fits) in kinds.items():
        for name in names.split():
            given = getattr(config, name)
            values = given if isinstance(given, tuple) else (given,)
            shown = " ".join(f"{value:g}" for value in values)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"--{name} {shown}: name one value or more, and each once")
            if wrong := [value for value in values if not (math.isfinite(value) and fits(value))]:
                raise ValueError(f"--{name} {shown}: {wrong[0]:g} must be {must}")


def check_words(recipe: Path, words: tuple[str, ...], said: str) -> None:
    """A recipe's own parser and its checks, before anything is begun. said: what the user said that led to them."""
    spec = importlib.util.spec_from_file_location("looked_at", recipe)
    if spec is None or spec.loader is None:
        raise ImportError(f"{recipe} is not Python")
    sys.modules["looked_at"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mine, sys.argv = sys.argv, [str(recipe), *words]
    try:
        if not hasattr(module, "PRESETS"):
            raise ValueError(f"{recipe} is no recipe that pretrains, which has its configurations in PRESETS")
        choose(module.PRESETS)
    except SystemExit:
        raise ValueError(f"{said}: {recipe.name} does not take these words; what is wrong stands above") from None
    except ValueError as error:
        raise ValueError(f"{said}: {error}") from error
    finally:
        sys.argv = mine
        del sys.modules["looked_at"]


def made_again(file: Path) -> AbstractContextManager[None]:
    """What a part wrote and cannot be read is named, with the way out."""
    return sealed.readable(file, f"delete {file.parent}, and the same command makes it again")


def check_settings(
    config: Any, file: Path, *, free: tuple[str, ...], grows: tuple[str, ...] = (), appended: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What is in the folder was made with these settings, which are returned. What adds parts, in `grows`, may change,
    and what decides nothing, in `free`; lists in `appended`, whose parts go by number, may go on."""
    now = {name: value for name, value in configuration(config).items() if name not in free}
    try:
        durable.make_folder(file.parent)
    except OSError as error:
        raise CannotWrite(f"--out: {file.parent} cannot be made: {error.strerror}; choose another place") from error
    if file.exists():
        remedy = f"if these are the settings that {file.parent} was begun with, delete {file.name} and give the same "
        with sealed.readable(file, f"{remedy}command again"):
            before = as_now(sealed.read(file), getattr(config, "image_size", 0))
            same = {k: now[k][: len(before.get(k, ()))] if k in appended else now[k] for k in now if k not in grows}
        if changed := [k for k, value in same.items() if value != before.get(k)]:
            was = "; ".join(f"{k} was {before.get(k)!r}, is now {now[k]!r}" for k in changed)
            raise ValueError(f"{file.parent} was begun with other settings: {was}. Give them, or another --out")
    sealed.write(file, now)
    return now


def work_on(parts: list[Job], out: Path, recipes: Path, *, jobs: int, devices: int) -> None:
    """Does what is not done yet, `jobs` parts at a time, and returns when all is done, here or elsewhere. A signal is
    handed on to the parts, and ends it when they have saved."""
    check_needs(parts)
    context = multiprocessing.get_context("forkserver")  # torch is imported once, and each part starts in no time
    context.set_forkserver_preload(["torch", "torch._dynamo", "sslvit.train", "sslvit.finetune", "tyro"])
    deaf_to_signals(resource_tracker.ensure_running, forkserver.ensure_running)
    for part in parts:
        delete_checkpoints(part, out)
    display, failed = Display(parts), {}
    running: dict[Job, tuple[BaseProcess, int, float]] = {}
    free, told = list(range(jobs)), False
    signals.listen()
    with signals.stepping():
        while True:
            gone = [(part, *at_work) for part, at_work in running.items() if not at_work[0].is_alive()]
            for part, process, slot, started in gone:
                del running[part]
                free.append(slot)
                if not part.product.exists() and process.exitcode != TAKEN and not signals.stop_requested():
                    failed[part] = process.exitcode
                display.ended(part, time.perf_counter() - started, failed=part in failed)
            waiting = [part for part in parts if not (part.product.exists() or part in running or part in failed)]
            done = {part.name for part in parts if part.product.exists()}
            ready = [part for part in waiting if done.issuperset(part.needs)]
            for part in sorted(ready, key=lambda part: -part.work) if not (failed or signals.stop_requested()) else []:
                if not free:
                    break
                with locked(out / "locks" / part.name) as not_elsewhere:
                    if not not_elsewhere:
                        continue
                slot = free.pop()
                process = context.Process(
                    target=run_job, args=(part, out, recipes, slot % devices if devices else None)
                )
                process.start()
                running[part] = (process, slot, time.perf_counter())
            if signals.stop_requested() and not told:
                told = True
                terminate(process for process, _, _ in running.values())
            display.goes_on({part.name: time.perf_counter() - started for part, (_, _, started) in running.items()})
            if not running and (failed or told or not waiting):
                break
            time.sleep(0.2)
    if failed:
        raise part_failed(*next(iter(failed.items())), out)
    if waiting or signals.stop_requested():
        display.clear()
        raise Preempted(f"asked to stop, with {len(done)} of {len(parts)} parts done; the same command goes on")


def check_needs(parts: list[Job]) -> None:
    names = {part.name for part in parts}
    if len(names) < len(parts) or any(set(part.needs) - names for part in parts):
        raise ValueError(f"parts are named twice, or need others that are not there: {sorted(names)}")


def terminate(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.terminate()


def part_failed(part: Job, code: int | None, out: Path) -> JobFailed:
    return JobFailed(
        f"{part.name} ended with exit code {code}; what is done is kept, and when the cause is gone the same "
        f"command goes on. {last_words(out / 'logs' / f'{part.name}.log')}",
        code if code and 0 < code <= BAD_CONFIGURATION else INTERNAL,
    )


def deaf_to_signals(*starts: Callable[[], None]) -> None:
    """What starts the parts must outlive a signal to all processes of the comparison, or nobody waits for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for start in starts:
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)  # the tracker unblocks them when it has started
        start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def last_words(log: Path) -> str:
    """The end of what the last attempt wrote."""
    if not log.exists():
        return f"There is no log {log}"
    *_, attempt = f"\n{log.read_text(errors='replace')}".split("\n$ ")
    return f"{log} ends:\n" + "\n".join(attempt.splitlines()[1:][-LAST_LINES:])


def run_job(part: Job, out: Path, recipes: Path, device: int | None) -> None:
    """In a process of its own: the recipe as from the command line, its output in a log."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)
    threading.Thread(target=end_with_the_parent, daemon=True).start()
    with locked(out / "locks" / part.name) as mine:
        if not mine:  # somebody was quicker
            sys.exit(TAKEN)
        if part.product.exists():
            return
        log = out / "logs" / f"{part.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            for name in DISTRIBUTED:  # a part is one process, whatever started the whole
                os.environ.pop(name, None)
            if device is not None:
                os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
            print(f"$ {part.command()}", flush=True)
            sys.argv = [str(recipes / f"{part.recipe}.py"), *part.words]
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            runpy.run_path(sys.argv[0], run_name="__main__")
    delete_checkpoints(part, out)


def delete_checkpoints(part: Job, out: Path) -> None:
    """Of a part that is done: they are most of what it takes on the disk. Its models, logs and numbers stay."""
    if part.run is None or not part.product.exists():
        return
    with locked(out / "locks" / part.name) as mine:
        for folder in part.run.glob(f"**/{CHECKPOINTS}") if mine else ():
            durable.discard(folder)


def end_with_the_parent() -> None:
    """A part whose comparison was killed saves and ends too, and does not train on beside the next one."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def locked(lock: Path) -> Iterator[bool]:
    """Whether nobody else has it. It is free again when this process ends, however it ends."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


class Display:
    """A line whenever a part ends: how many are done, and about how long the rest will take. Before the first and, on
    a terminal, all the time, what is being done."""

    def __init__(self, parts: list[Job]):
        self.parts, self.began = parts, time.perf_counter()
        self.before = sum(part.work for part in parts if part.product.exists())
        done = sum(part.product.exists() for part in parts)
        print(f"{len(parts)} parts, {done} of them done", flush=True)
        self.next_look, self.looks = 0.0, 0

    def goes_on(self, seconds: dict[str, float]) -> None:
        terminal = sys.stdout.isatty()
        if not seconds or time.perf_counter() < self.next_look or (self.looks and not terminal):
            return
        now = ", ".join(f"{name} for {duration(value)}" if self.looks else name for name, value in seconds.items())
        self.next_look, self.looks = time.perf_counter() + 1, self.looks + 1
        room = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{f'now {now}'[:room]}" if terminal else f"now {now}", end="" if terminal else "\n", flush=True)

    def ended(self, part: Job, seconds: float, *, failed: bool) -> None:
        done = [part for part in self.parts if part.product.exists()]
        if part not in done and not failed:
            return  # another worker had it
        work, all_work = sum(part.work for part in done), sum(part.work for part in self.parts)
        here = work - self.before
        left = (all_work - work) * (time.perf_counter() - self.began) / here if here else 0
        rest = "failed" if failed else f"about {duration(left)} left" if len(done) < len(self.parts) else "all done"
        self.clear()
        print(f"[{len(done)}/{len(self.parts)}] {part.name} in {duration(seconds)}; {rest}", flush=True)

    def clear(self) -> None:
        if sys.stdout.isatty():
            print("\r\x1b[K", end="", flush=True)
