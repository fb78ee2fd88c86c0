import json
import multiprocessing
import os
import pickle
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folder import images
from image_zoo import png, save, scene

from sslvit.data.cache import cache_root, cached
from sslvit.data.source import ArraySource
from sslvit.data.spec import EncodedSource, open_source
from sslvit.errors import Error
from sslvit.storage import sealed


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def values(source) -> list[int]:
    return source.read(np.arange(len(source))).pixels[:, 0, 0, 0].tolist()


def folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


def test_small_images_of_one_size_are_decoded_once(root, tmp_path, capsys, monkeypatch):
    spec = images(tmp_path / "set")
    first = open_source(spec, image_size=8)
    assert isinstance(first, ArraySource)
    message = capsys.readouterr().err
    assert message == f"folder:{spec}: decoding 30 images of 3 x 8 x 8 once, 0.0 MB in {folders(root)[0]}\n"
    monkeypatch.setattr("sslvit.data.readers.encoded.open_image", None)  # nothing is decoded from here on
    second = open_source(spec, image_size=8)
    assert capsys.readouterr().err == ""
    assert values(second) == values(first) == list(range(30))
    assert second.fingerprint == first.fingerprint
    assert len(pickle.dumps(second)) < 1000
    assert values(pickle.loads(pickle.dumps(second))) == list(range(30))


def test_the_cache_holds_the_pixels_that_decoding_gives(root, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(5):
        (folder / f"{number}.png").write_bytes(png(np.roll(scene(20, 30), number, 0), 8, 2))
    for channels in (1, 3):
        stored = open_source(str(folder), image_size=16, channels=channels)
        decoded = open_source(str(folder), image_size=16, channels=channels, cache=False)
        assert isinstance(decoded, EncodedSource)
        for left, right in zip(stored.read(np.arange(5))[:3], decoded.read(np.arange(5))[:3], strict=True):
            assert torch.equal(left, right)
    assert len(folders(root)) == 2


def test_large_images_and_images_of_several_sizes_are_not_cached(root, tmp_path):
    assert isinstance(open_source(images(tmp_path / "large", 3, 97), image_size=97), EncodedSource)
    spec = images(tmp_path / "set")
    (tmp_path / "set/030.png").write_bytes(png(scene(8, 9), 8, 2))
    assert isinstance(open_source(spec, image_size=8), EncodedSource)
    assert not root.exists()


def test_an_odd_one_beyond_the_sample_is_remembered(root, tmp_path, capsys):
    spec = images(tmp_path / "set", 200)
    (tmp_path / "set/002.png").write_bytes(png(scene(8, 6), 8, 2))
    assert isinstance(open_source(spec, image_size=8), EncodedSource)
    assert sealed.read(folders(root)[0] / "about.json") == {"differs": 2}
    assert (folders(root)[0] / "pixels.bin").stat().st_size == 0
    capsys.readouterr()
    assert isinstance(open_source(spec, image_size=8), EncodedSource)
    assert capsys.readouterr().err == ""


def test_a_changed_file_is_decoded_anew(root, tmp_path):
    spec = images(tmp_path / "set")
    open_source(spec, image_size=8)
    changed = png(np.full((8, 8, 3), 99, np.uint8), 8, 2)
    assert len(changed) == (tmp_path / "set/003.png").stat().st_size  # only its time tells
    (tmp_path / "set/003.png").write_bytes(changed)
    os.utime(tmp_path / "set/003.png", (1, 1))
    assert values(open_source(spec, image_size=8))[3] == 99
    assert len(folders(root)) == 2


def test_a_cache_of_an_earlier_version_without_a_seal_is_written_anew(root, tmp_path, capsys):
    spec = images(tmp_path / "set")
    open_source(spec, image_size=8)
    about = folders(root)[0] / "about.json"
    about.write_text(json.dumps(sealed.read(about)))
    capsys.readouterr()
    assert values(open_source(spec, image_size=8)) == list(range(30))
    assert (
        f"cache {folders(root)[0]} is written anew: it has no seal, as in earlier versions\n" in capsys.readouterr().err
    )
    sealed.read(about, require_seal=True)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "no pixels", "torn json", "other json"])
def test_a_damaged_cache_is_noticed_and_written_anew(root, tmp_path, capsys, damage):
    spec = images(tmp_path / "set")
    open_source(spec, image_size=8)
    pixels, about = folders(root)[0] / "pixels.bin", folders(root)[0] / "about.json"
    data = bytearray(pixels.read_bytes())
    if damage == "flip":
        data[77] ^= 1
        pixels.write_bytes(data)
    elif damage in ("cut", "empty"):
        pixels.write_bytes(data[: len(data) // 2 * (damage == "cut")])
    elif damage == "no pixels":
        pixels.unlink()
    else:
        about.write_text(about.read_text()[:-5] if damage == "torn json" else "{}")
    capsys.readouterr()
    assert values(open_source(spec, image_size=8)) == list(range(30))
    assert "once" in capsys.readouterr().err
    assert pixels.read_bytes() == bytes(np.repeat(np.arange(30, dtype=np.uint8), 192))


@pytest.mark.processes
def test_a_killed_writer_leaves_nothing_that_is_taken_for_a_cache(root, tmp_path):
    spec = images(tmp_path / "set")
    source = open_source(spec, image_size=8, cache=False)

    def dies_at(id: int):
        def image(self, asked: int):
            if asked == id:
                os._exit(9)
            return torch.zeros(3, 8, 8, dtype=torch.uint8)

        return image

    process = os.fork()
    if not process:
        EncodedSource.image = dies_at(20)
        cached(source)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert [folder.name[:5] for folder in folders(root)] == [".tmp-"]
    assert values(open_source(spec, image_size=8)) == list(range(30))
    assert [folder.name[0] == "." for folder in folders(root)] == [False]


def _open_in_process(spec: str, queue) -> None:
    lines = []
    source = cached(open_source(spec, image_size=8, cache=False), say=lines.append)
    queue.put((len(lines), values(source)))


@pytest.mark.processes
def test_of_several_processes_one_decodes(root, tmp_path):
    spec = images(tmp_path / "set", 300)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_open_in_process, args=(spec, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    result = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(lines for lines, _ in result) == [0, 0, 0, 1]
    assert all(read == [number % 256 for number in range(300)] for _, read in result)


@pytest.mark.processes
@pytest.mark.parametrize("workers", [0, 2])
def test_workers_that_decode_change_nothing(root, tmp_path, workers):
    spec = images(tmp_path / "set", 2100)
    (tmp_path / "set/1500.png").write_text("no image")
    source = open_source(spec, image_size=8, cache=False)
    stored = cached(source, workers=workers, say=lambda line: None)
    decoded = source.read(np.arange(2100))
    assert torch.equal(stored.read(np.arange(2100)).pixels, decoded.pixels)
    assert stored.read(np.arange(2100)).bad == decoded.bad


@pytest.mark.processes
def test_a_file_that_hangs_the_decoding_ends_it_in_a_sentence_and_leaves_no_cache(root, tmp_path, monkeypatch):
    spec = images(tmp_path / "set", 2100)
    source = open_source(spec, image_size=8, cache=False)
    read = type(source.store).read
    hang = {1500: 30}
    monkeypatch.setattr("sslvit.data.cache.PATIENCE", 3)
    monkeypatch.setattr(
        type(source.store), "read", lambda s, id, most: time.sleep(hang.get(id, 0)) or read(s, id, most)
    )
    with pytest.raises(Error, match="a process that decodes its images died, or gave nothing for 3 seconds"):
        cached(source, workers=2, say=lambda line: None)
    assert not list(root.rglob("pixels.bin"))


def test_without_room_or_a_place_to_write_images_are_decoded_as_they_are_read(root, tmp_path, capsys, monkeypatch):
    spec = images(tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr("sslvit.data.cache.SPARE", 1e12)
        assert isinstance(open_source(spec, image_size=8), EncodedSource)
    assert "not cached, images are decoded whenever they are read: " in capsys.readouterr().err
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "set/000.png/cache"))
    source = open_source(spec, image_size=8)
    assert isinstance(source, EncodedSource)
    assert values(source) == list(range(30))
    assert "Not a directory" in capsys.readouterr().err


def test_the_place_is_the_users(monkeypatch):
    monkeypatch.setenv("SSLVIT_CACHE", "/a")
    assert cache_root() == Path("/a")
    monkeypatch.delenv("SSLVIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_root() == Path("/b/sslvit")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache_root() == Path("/c/.cache/sslvit")


def set_times(file: Path) -> None:
    os.utime(file, (1, 1))


def test_a_folder_of_the_same_names_sizes_and_times_has_its_own_cache(root, tmp_path):
    for name, value in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.bmp").write_bytes(save(np.full((8, 8, 3), value, np.uint8), "BMP"))
        set_times(tmp_path / name / "a.bmp")
    one, two = (open_source(str(tmp_path / name), image_size=8) for name in ("one", "two"))
    assert (values(one), values(two)) == ([1], [2])
    assert one.fingerprint == two.fingerprint
    # Another folder in the first one's place, as a container's mount would be.
    (tmp_path / "one").rename(tmp_path / "old")
    (tmp_path / "two").rename(tmp_path / "one")
    assert values(open_source(str(tmp_path / "one"), image_size=8)) == [2]


def test_a_tar_of_the_same_names_sizes_and_time_has_its_own_cache(root, tmp_path):
    for name, value in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / "a.bmp").write_bytes(save(np.full((8, 8, 3), value, np.uint8), "BMP"))
        with tarfile.open(tmp_path / name / "set.tar", "w") as archive:
            archive.add(tmp_path / "a.bmp", "a.bmp")
        set_times(tmp_path / name / "set.tar")
    one, two = (open_source(f"webdataset:{tmp_path}/{name}/set.tar", image_size=8) for name in ("one", "two"))
    assert (values(one), values(two)) == ([1], [2])
    assert one.fingerprint == two.fingerprint
    (tmp_path / "two/set.tar").rename(tmp_path / "one/set.tar")
    assert values(open_source(f"webdataset:{tmp_path}/one/set.tar", image_size=8)) == [2]


def test_a_parquet_file_in_the_place_of_one_of_its_size_and_time_has_its_own_cache(root, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    for value in (1, 2):
        cell = {"bytes": save(np.full((8, 8, 3), value, np.uint8), "BMP"), "path": None}
        table = datasets.Dataset.from_dict({"image": [cell]}, features=datasets.Features({"image": datasets.Image()}))
        table.to_parquet(tmp_path / "set/set.parquet")
        set_times(tmp_path / "set/set.parquet")
        assert values(open_source(f"parquet:{tmp_path}/set", image_size=8)) == [value]
