"""A recipe that takes a third of a second: it checks that what it needs is there, logs that it started, and writes."""

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Config:
    product: Path
    log: Path
    needs: tuple[Path, ...] = ()


def main(config: Config) -> None:
    assert all(need.exists() for need in config.needs), "what it needs is not there"
    with config.log.open("a") as file:
        file.write(f"{config.product.name}\n")
    time.sleep(float(os.environ.get("TOY_SECONDS", "0.3")))
    config.product.with_suffix(".new").write_text(config.product.name)
    config.product.with_suffix(".new").replace(config.product)
