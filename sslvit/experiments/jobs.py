"""Experiments as lists of jobs: each is a recipe's command line, and a file that exists when it is done.

So a comparison or a study that was killed continues where it was, finished jobs are never repeated, and several
machines can work in one folder: whoever runs a job locks its file, which is free again when the process is gone. The
results depend on the jobs alone, and not on who ran them when.
"""

import importlib.util
import pkgutil
import shlex
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from sslvit.cli.parse import choose
from sslvit.config import ImagesConfig
from sslvit.errors import CannotWrite
from sslvit.processes.system import cores, fcntl
from sslvit.runs.settings import as_now, configuration
from sslvit.storage import durable, sealed

RECIPES = "sslvit.recipes"  # the package of the recipes; a module of another name is one of the user's own


class Job(NamedTuple):
    name: str  # unique, also a path
    recipe: str  # a module's name, in sslvit.recipes or, with a dot, anywhere
    words: tuple[str, ...]  # of its command line
    product: Path
    needs: tuple[str, ...] = ()  # names of jobs
    work: float = 1.0  # how long it takes, in any unit that is the same for all
    run: Path | None = None  # a folder with runs, which need no checkpoints when the job is done

    @property
    def done(self) -> bool:
        return self.product.exists()

    def command(self) -> str:
        return shlex.join(["python", "-m", module_of(self.recipe), *self.words])


def module_of(recipe: str) -> str:
    return recipe if "." in recipe else f"{RECIPES}.{recipe}"


def recipe_of(name: str) -> ModuleType:
    return importlib.import_module(module_of(name))


def is_recipe(name: str) -> bool:
    spec = importlib.util.find_spec(f"{RECIPES}.{name}") if name.isidentifier() else None
    return spec is not None and spec.origin is not None


def recipes() -> list[str]:
    """The names of those that pretrain."""
    names = sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(RECIPES).__path__))
    return [
        name for name in names if "PRESETS" in vars(recipe_of(name)) and name not in ("finetune", "segment", "adapt")
    ]


def options_of(recipe: ModuleType) -> Any:
    """What its command line is parsed by: its presets, or the class of its options."""
    return vars(recipe).get("PRESETS") or vars(recipe).get("Config")


def at_a_time(jobs: int) -> int:
    """How many jobs run together: by default one per GPU, or per core."""
    return jobs or torch.cuda.device_count() or cores()


def flags(**options: object) -> tuple[str, ...]:
    """A command line's words: threads=1 as --threads 1, a sequence as several values."""
    words = []
    for name, value in options.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return tuple(words)


def reading(config: ImagesConfig, channels: int | None = None) -> tuple[str, ...]:
    """The words for the images of this configuration, with this number of channels."""
    words = flags(data=config.data, image_size=config.image_size)
    words += flags(channels=channels) if channels in (1, 3) else ()
    for one in fields(ImagesConfig):
        value = getattr(config, one.name)
        if one.name not in ("data", "image_size") and value != one.default:
            words += (f"--{one.name}",) if value is True else flags(**{one.name: value})
    return words


def check_words(recipe: str, words: tuple[str, ...], flag: str) -> None:
    """Parses and checks a recipe's words before anything is begun. flag: the user's own, from which they come."""
    presets = options_of(recipe_of(recipe))
    if not isinstance(presets, Mapping):
        raise ValueError(f"{flag}: the recipe {recipe} has no presets: it does not pretrain")
    try:
        choose(presets, words)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error


def made_again(file: Path) -> AbstractContextManager[None]:
    """Names a job's file that cannot be read, with the way out."""
    return sealed.readable(file, f"delete {file.parent}, and the same command makes it again")


def settings_of(config: Any, free: tuple[str, ...]) -> dict[str, Any]:
    """All but those that decide nothing."""
    return {name: value for name, value in configuration(config).items() if name not in free}


def check_settings(
    config: Any, file: Path, *, free: tuple[str, ...], grows: tuple[str, ...] = (), appended: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Refuses other settings than those that the folder was begun with, and returns them. Free are those that decide
    nothing; those that add jobs may change (grows), or become longer where jobs are numbered by them (appended)."""
    now = settings_of(config, free)
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


@contextmanager
def locked(lock: Path) -> Iterator[bool]:
    """Whether the lock is ours, and not another process's. It is free again when its process ends, however it does."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
