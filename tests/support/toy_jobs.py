"""Jobs of an experiment that take a third of a second, and settings that have every kind of field."""

from dataclasses import dataclass
from pathlib import Path

from sslvit.experiments.jobs import Job

TOY = "toy_recipes.toy"


def toys(out: Path) -> list[Job]:
    """Two that come first, and four that need one of them."""
    first = [toy(out, "a"), toy(out, "b")]
    return [toy(out, f"{need}-{i}", need) for need in ("a", "b") for i in range(2)] + first


def toy(out: Path, name: str, *needs: str) -> Job:
    words = ("--product", str(out / name), "--log", str(out / "started.txt"))
    if needs:
        words += ("--needs", *(str(out / need) for need in needs))
    return Job(name, TOY, words, out / name, needs)


@dataclass(frozen=True)
class Settings:
    out: str = "somewhere"
    methods: tuple[str, ...] = ("mpp",)
    transfer: tuple[str, ...] = ()
    epochs: float = 3
