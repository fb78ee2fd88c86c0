"""The code blocks of docs/ run: Python as it stands, the quickstart's commands with tiny sizes."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from markdown_pages import ROOT, Block, blocks, commands
from PIL import Image

import sslvit
from sslvit.models.vit import ViT
from sslvit.recipes import embed
from sslvit.weights.folder import save_backbone

PAGES = sorted({block.page for block in blocks("python")} - {"README.md"})  # the README's is tests/api's


def write_images(folder: Path, count: int) -> None:
    draw = np.random.default_rng(len(str(folder)))
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(draw.integers(0, 256, (40, 48, 3), np.uint8)).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A working directory as the pages suppose it: two runs, images of one's own, and their features."""
    place = tmp_path_factory.mktemp("place")
    for run in ("mpp", "mine"):
        save_backbone(ViT.variant("XS/8", image_size=32), place / "runs" / run / "model", {"readout": "mean"})
    write_images(place / "my/images", 24)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write_images(place / "my/labelled" / split / name, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSLVIT_CACHE", str(place / "cache"))
        images, out = f"folder:{place}/my/images", place / "features.parquet"
        embed.main(embed.Config(model=place / "runs/mpp", data=images, out=out))
        yield place


def names_of(module: str, text: str) -> set[str]:
    """What a text takes from a module by a dot."""
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute))
    return {node.attr for node in nodes if ast.unparse(node.value) == module}


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page, place, monkeypatch):
    monkeypatch.chdir(place)
    space = {"images": torch.rand(2, 3, 32, 32), "__name__": "page"}
    for block in (block for block in blocks("python") if block.page == page):
        if needs_what_is_not_there(block):
            continue
        exec(compile(block.text.replace("/my/", f"{place}/my/"), f"{page}:{block.line}", "exec"), space)


def needs_what_is_not_there(block: Block) -> bool:
    """The Hub: then the names are looked up, and nothing is run."""
    missing = [name for name in names_of("sslvit", block.text) if not hasattr(sslvit, name)]
    assert not missing, f"{block.page}:{block.line}: sslvit has no {missing}"
    return "OWNER/NAME" in block.text


TINY = {
    "pretrain": "--image_size 32 --model XS/8 --workers 0 --epochs 1 --batch_size 8 --warmup_epochs 0.5",
    "probe": "--shots 1 --fractions 1",
    "finetune": "--steps 2 --batch_size 8 --rates 0.1",
    "compare": "--image_size 32 --model XS/8 --seeds 1 --epochs 1 --batch_size 8 --finetune_steps 2 --fractions 1 "
    "--finetune_rates 0.1",
}


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.timeout(1800)
def test_the_quickstart_runs_from_top_to_bottom(place):
    """With tiny models, so that later options replace those of the page."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    (place / "quickstart").mkdir()
    for block in (block for block in blocks("sh") if block.page == "docs/quickstart.md"):
        for words in commands(block.text):
            if words[0] == "pip":
                continue
            assert words[0] == "sslvit", words
            words = [word.replace("/my/", f"{place}/my/") for word in words[1:]]
            if words == ["pretrain", "mpp"]:
                words += ["--data", "shapes:n=64"]
            command = [sys.executable, "-m", "sslvit", *words, *TINY.get(words[0], "").split()]
            done = subprocess.run(
                command, cwd=place / "quickstart", env=environment, capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, f"{block.page}:{block.line}: {' '.join(command[3:])}\n{done.stderr[-3000:]}"
    there = {path.name for path in (place / "quickstart").iterdir()}
    assert {"runs", "views.png", "features.parquet"} <= there
    assert (place / "quickstart/runs/mine/report.html").exists()
