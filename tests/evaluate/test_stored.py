"""Stored features are read again, until anything that they depend on is another; a damaged file is made anew."""

import os

import numpy as np
import pytest
import torch
from noise_source import source
from PIL import Image

from sslvit.data.labels import Labels
from sslvit.data.source import ArraySource
from sslvit.data.spec import open_source
from sslvit.evaluate.stored import stored
from sslvit.models.vit import ViT
from sslvit.models.vit_config import ViTConfig
from sslvit.processes.collectives import start
from sslvit.views.pretraining import EvalView


@pytest.fixture
def arguments(tmp_path) -> dict:
    vit = ViT(ViTConfig(image_size=16, patch_size=8, width=16, depth=2, heads=1))
    return {
        "folder": tmp_path / "kept",
        "backbone": vit,
        "source": source(),
        "view": EvalView(16),
        "accelerator": start(threads=1),
    }


def entries(arguments: dict) -> dict[str, int]:
    """What is kept, and when it was written."""
    return {entry.name: os.stat(entry / "features.safetensors").st_ino for entry in arguments["folder"].iterdir()}


def test_the_second_time_features_are_read(arguments):
    first = stored(**arguments)
    first_entries = entries(arguments)
    again = stored(**arguments)
    assert entries(arguments) == first_entries
    for readout, features in first.by_readout.items():
        assert torch.equal(features, again.by_readout[readout])
    for name in ("labels", "ids", "unreadable"):
        assert torch.equal(getattr(first, name), getattr(again, name))


def test_whatever_features_depend_on_gives_them_another_name(arguments):
    stored(**arguments)
    changes = [{"source": source(1)}, {"view": EvalView(8)}, {"ids": np.arange(3)}, {"readouts": ("cls",)}]
    for count, change in enumerate(changes, 2):
        stored(**(arguments | change))
        assert len(entries(arguments)) == count, change
    with torch.no_grad():
        arguments["backbone"].blocks[1].mlp.fc1.bias[3] += 1e-6
    stored(**arguments)
    assert len(entries(arguments)) == 6


def test_labels_are_the_sources_and_not_stored(arguments):
    stored(**arguments)
    pixels, labels = arguments["source"].pixels, np.arange(6)[::-1].copy()
    other = ArraySource(pixels, name="noise", fingerprint="0", labels=Labels(labels, None, ""))
    assert stored(**(arguments | {"source": other})).labels.tolist() == [5, 4, 3, 2, 1, 0]
    assert len(entries(arguments)) == 1


def test_rewritten_or_differently_decoded_files_give_other_features(arguments, tmp_path):
    def write(name: str, value: int) -> None:
        Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(tmp_path / "set" / name, "BMP")

    def features(**options) -> torch.Tensor:
        source = open_source(f"folder:{tmp_path / 'set'}", image_size=16, **options)
        return stored(**(arguments | {"source": source})).by_readout["cls"]

    (tmp_path / "set").mkdir()
    for name, value in (("1.bmp", 10), ("2.bmp", 200)):
        write(name, value)
    first = features()
    write("1.bmp", 90)  # as many bytes, the same name
    os.utime(tmp_path / "set" / "1.bmp", ns=(1, 1))
    assert not torch.equal(features()[0], first[0])
    count = len(entries(arguments))
    features(canvas=8)
    features(max_pixels=300)
    assert len(entries(arguments)) == count + 2


def test_the_batch_size_gives_features_no_other_name(arguments):
    stored(**arguments, batch_size=2)
    stored(**arguments, batch_size=3)
    assert len(entries(arguments)) == 1


def test_a_changed_byte_is_noticed_and_features_are_extracted_again(arguments, caplog):
    good = stored(**arguments)
    (place,) = arguments["folder"].iterdir()
    file = place / "features.safetensors"
    contents = bytearray(file.read_bytes())
    contents[-9] ^= 1
    file.write_bytes(contents)
    actual = stored(**arguments)
    assert "is damaged and is made again" in caplog.text
    for readout, features in good.by_readout.items():
        assert torch.equal(features, actual.by_readout[readout])
    caplog.clear()
    stored(**arguments)
    assert not caplog.text
    assert [entry.name for entry in arguments["folder"].iterdir()] == [place.name]
