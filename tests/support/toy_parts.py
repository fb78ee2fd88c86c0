"""Parts of a comparison that take a third of a second, and settings that have every kind of field."""

from dataclasses import dataclass
from pathlib import Path

from sslvit.experiments.jobs import Job

TOY = """
import os, sys, time
from pathlib import Path
product, log = map(Path, sys.argv[1:3])
needs = [Path(word) for word in sys.argv[3:]]
assert all(need.exists() for need in needs), "what it needs is not there"
with log.open("a") as file:
    file.write(f"{product.name}\\n")
time.sleep(float(os.environ.get("TOY_SECONDS", "0.3")))
product.with_suffix(".new").write_text(product.name)
product.with_suffix(".new").replace(product)
"""


def toys(out: Path) -> list[Job]:
    """Two that come first, and four that need one of them."""

    def toy(name: str, *needs: str) -> Job:
        words = (str(out / name), str(out / "started.txt"), *(str(out / need) for need in needs))
        return Job(name, "toy", words, out / name, needs)

    first = [toy("a"), toy("b")]
    return [toy(f"{need}-{i}", need) for need in ("a", "b") for i in range(2)] + first


@dataclass(frozen=True)
class Settings:
    out: str = "somewhere"
    methods: tuple[str, ...] = ("mpp",)
    transfer: tuple[str, ...] = ()
    epochs: float = 3
