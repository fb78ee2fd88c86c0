import gc
import gzip
import os
import pickle
import socket
import struct
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from image_zoo import png, save, scene
from numpy.lib import format as npy
from torch.utils.data import DataLoader, Dataset

from sslvit.data.readers import shapes
from sslvit.data.readers.folders import Names, Skipped, files_of_split, open_folders, printable
from sslvit.data.readers.lists import open_list
from sslvit.data.source import ArraySource, substitutes
from sslvit.data.spec import KINDS, SHAPES_TEST, EncodedSource, Source, open_source
from sslvit.data.stream import Stream
from sslvit.errors import DataError, NoInput
from sslvit.weights.foreign.open import load_foreign

FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))


def every(source: Source) -> np.ndarray:
    return np.arange(len(source))


def write(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(pixels, 8, 2))
    return path


def flat(value: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


# --- the built-in set ---


@pytest.mark.usefixtures("all_shapes")
def test_the_built_in_splits_share_no_image():
    train, test = (open_source("shapes", split=split, image_size=8) for split in ("train", "test"))
    assert (len(train), len(test)) == (20_000, 4_000)
    assert (train.first, test.first) == (0, SHAPES_TEST)
    assert len(train) < SHAPES_TEST
    assert train.fingerprint != test.fingerprint


def test_the_built_in_set_is_what_shapes_makes_and_labels():
    ids = np.array([5, 0, 5, 19])
    expected = shapes.make(torch.from_numpy(ids), 16)
    for spec, label in (("shapes:n=20", shapes.shape_label), ("shapes:texture,n=20", shapes.texture_label)):
        source = open_source(spec, image_size=(16, 12))
        samples = source.read(ids)
        assert len(source) == 20
        assert torch.equal(samples.pixels, expected)
        assert torch.equal(samples.labels, label(torch.from_numpy(ids)))
        assert samples.extents.tolist() == [[16, 16]] * 4
        assert samples.ids.tolist() == ids.tolist()


def test_a_built_in_set_too_large_for_memory_is_drawn_as_it_is_read(monkeypatch):
    small = open_source("shapes:n=9", image_size=16).read(np.arange(9))
    monkeypatch.setattr("sslvit.data.source.IN_MEMORY", 0)
    assert torch.equal(open_source("shapes:n=9", image_size=16).read(np.arange(9)).pixels, small.pixels)


@pytest.mark.parametrize("spec", ["shapes:n=0", "shapes:n=-3", "shapes:colour", "shapes:n=2e4"])
def test_unknown_options_of_the_built_in_set_are_named(spec):
    with pytest.raises(ValueError, match=spec.partition(":")[2]):
        open_source(spec, image_size=16)


# --- idx ---


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist(folder: Path, pack=lambda data: data, ending: str = "") -> np.ndarray:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 6), dtype=np.uint8)
    folder.mkdir()
    for stem, part in (("train", slice(0, 7)), ("t10k", slice(7, 10))):
        (folder / f"{stem}-images-idx3-ubyte{ending}").write_bytes(pack(idx(pixels[part])))
        (folder / f"{stem}-labels-idx1-ubyte{ending}").write_bytes(pack(idx(np.arange(10, dtype=np.uint8)[part] % 3)))
    return pixels


@pytest.mark.parametrize(("pack", "ending"), [(bytes, ""), (gzip.compress, ".gz")])
def test_idx_files_are_read_as_they_are(tmp_path, pack, ending):
    pixels = mnist(tmp_path / "mnist", pack, ending)
    train, test = (open_source(f"idx:{tmp_path}/mnist", split=split, image_size=4) for split in ("train", "test"))
    assert train.read(every(train)).pixels[:, 0].tolist() == pixels[:7].tolist()
    assert test.read(np.array([2, 0])).pixels[:, 0].tolist() == pixels[[9, 7]].tolist()
    assert test.read(np.array([2, 0])).labels.tolist() == [0, 1]
    assert train.classes == ("0", "1", "2")
    assert (train.channels, train.canvas) == (1, (4, 6))
    again = pickle.loads(pickle.dumps(train))
    assert torch.equal(again.read(every(train)).pixels, train.read(every(train)).pixels)


def test_raw_idx_files_are_mapped_and_not_pickled(tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((1000, 28, 28), np.uint8)))
    source = open_source(f"idx:{folder}", image_size=28)
    source.read(every(source))
    assert len(pickle.dumps(source)) < 2000
    assert source.labels is None
    with pytest.raises(DataError, match="has no labels of the train split"):
        source.required_labels()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"\0\0\x08\3", "cannot be read"),
        (b"not an idx file at all", "not an idx file of uint8"),
        (struct.pack(">HBBI", 0, 13, 1, 1) + b"0000", "not an idx file of uint8"),
        (struct.pack(">HBBIII", 0, 8, 3, 9, 4, 4) + bytes(100), "has 100 bytes of data.*needs 144"),
        (struct.pack(">HBBIII", 0, 8, 3, 2, 4, 4) + bytes(100), "more than 32 bytes.*needs 32"),
        (struct.pack(">HBBIII", 0, 8, 3, 2**31, 2**15, 2**15), "free memory"),
        (struct.pack(">HBBIII", 0, 8, 3, 0, 4, 4), "holds no images"),
        (struct.pack(">HBBI", 0, 8, 1, 2) + b"00", "holds no images"),
    ],
)
def test_idx_files_that_are_not_what_they_say_are_refused(tmp_path, content, message):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(f"idx:{tmp_path}", image_size=4)


def test_two_sets_in_one_idx_folder_are_not_guessed_between(tmp_path):
    for name in ("emnist-letters-train-images-idx3-ubyte", "emnist-digits-train-images-idx3-ubyte"):
        (tmp_path / name).write_bytes(idx(np.zeros((1, 4, 4), np.uint8)))
    with pytest.raises(DataError, match="several sets, emnist-digits"):
        open_source(f"idx:{tmp_path}", image_size=4)


@pytest.mark.skipif(not FASHION.exists(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_is_read_at_20000_images_a_second():
    train, test = (open_source(f"idx:{FASHION}", split=split, image_size=28) for split in ("train", "test"))
    assert (len(train), len(test), train.canvas, train.channels) == (60_000, 10_000, (28, 28), 1)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    order = np.random.default_rng(0).permutation(60_000)
    start = time.process_time()
    for first in range(0, 60_000, 256):
        train.read(order[first : first + 256])
    assert time.process_time() - start < 3


# --- npz ---


def test_npz_arrays_of_every_layout_give_the_same_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 7), dtype=np.uint8)
    last = pixels.transpose(0, 2, 3, 1)
    for images in (pixels, last, last / 255.0, (last / 255).astype(np.float32), last.astype(np.uint16) * 257):
        np.savez_compressed(tmp_path / "set.npz", x_train=images, y_train=np.arange(5)[:, None] % 2)
        source = open_source(f"npz:{tmp_path}/set.npz", image_size=6)
        assert (source.read(every(source)).pixels.numpy() == pixels).all()
        assert source.labels.tolist() == [0, 1, 0, 1, 0]


def test_npz_of_medical_mnist_has_three_splits_and_labels_of_one_column(tmp_path):
    arrays = {f"{split}_images": np.zeros((size, 4, 4), np.uint8) for split, size in (("train", 6), ("test", 2))}
    np.savez(tmp_path / "set.npz", **arrays, train_labels=np.ones((6, 1), np.uint8), test_labels=np.zeros((2, 1)))
    train, test = (open_source(f"npz:{tmp_path}/set.npz", split=split, image_size=4) for split in ("train", "test"))
    assert (len(train), train.labels.tolist(), len(test)) == (6, [1] * 6, 2)
    with pytest.raises(DataError, match=r"'test_labels', row 0 is 0\.0, a float64"):
        test.required_labels()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 4, 4), np.uint8)}, "expected train_images, it holds pictures"),
        ({"images": np.zeros((2, 4, 4), np.int64)}, "holds int64"),
        ({"images": np.full((2, 4, 4), 255.0)}, r"floats from 255 to 255: they must lie in \[0, 1\]"),
        ({"images": np.full((2, 4, 4), np.nan)}, "floats from nan"),
        ({"images": np.zeros((2, 3, 9, 3), np.uint8)}, r"shape \(2, 3, 9, 3\)"),
        ({"images": np.zeros((0, 4, 4), np.uint8)}, "no pixels"),
        ({"images": np.zeros((2, 16), np.uint8)}, r"shape \(2, 16\)"),
        ({"images": np.zeros((3, 4, 4), np.uint8), "labels": np.zeros(2, int)}, "2 labels for 3 images"),
        ({"images": np.array([{"a": 1}], dtype=object)}, "cannot be read"),
    ],
)
def test_npz_files_that_hold_no_images_say_what_they_hold(tmp_path, arrays, message):
    np.savez(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_source(f"npz:{tmp_path}/set.npz", image_size=4)


def bomb(file: Path, size: int) -> Path:
    """An .npz of one array of zeros, a thousandth of its size."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("images.npy", "w") as stream:
        npy.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": (size >> 12, 64, 64)})
        for _ in range(size >> 20):
            stream.write(bytes(1 << 20))
    return file


def lying(file: Path, claimed: int) -> Path:
    """That says in its directory, where readers look, and before the array that it holds less."""
    raw = bytearray(file.read_bytes())
    directory = raw.rindex(b"PK\x01\x02")
    raw[directory + 24 : directory + 28] = claimed.to_bytes(4, "little")
    raw[22:26] = claimed.to_bytes(4, "little")
    other = file.with_name(f"lying-{file.name}")
    other.write_bytes(raw)
    return other


def test_npz_and_idx_bombs_are_not_unpacked_even_where_they_lie_about_their_size(tmp_path):
    large = bomb(tmp_path / "bomb.npz", 256 << 20)
    assert large.stat().st_size < 1 << 20
    (tmp_path / "idx").mkdir()
    header = struct.pack(">HBB3I", 0, 8, 3, 1 << 16, 64, 64)
    (tmp_path / "idx/train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(256 << 20)))
    small = lying(large, 10_000)
    cases = {f"npz:{large}": r"claim to unpack to 268,435,\d\d\d.*np\.savez\(NEW", f"npz:{small}": "claims shape"}
    tracemalloc.start()
    for spec, message in (cases | {f"idx:{tmp_path}/idx": "claim to unpack to 268,435,456.*gunzip"}).items():
        with pytest.raises(DataError, match=message):
            open_source(spec, image_size=64)
    for file, message in ((large, "claim to unpack"), (small, "claims shape")):
        with pytest.raises(DataError, match=message):
            load_foreign(file)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_images_that_shrink_to_a_fiftieth_are_read(tmp_path):
    pixels = np.zeros((40_000, 64, 64), np.uint8)
    pixels[:, 0, :58] = np.random.default_rng(0).integers(0, 256, (40_000, 58), np.uint8)
    np.savez_compressed(tmp_path / "set.npz", images=pixels)
    assert pixels.nbytes > 1 << 26
    assert pixels.nbytes > 50 * (tmp_path / "set.npz").stat().st_size
    assert len(open_source(f"npz:{tmp_path}/set.npz", image_size=64)) == 40_000


def test_npz_claims_beyond_the_memory_and_damage_are_refused(tmp_path):
    for shape in ((10**6, 3, 2000, 2000), (2**62, 2, 2)):
        with (
            zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
            archive.open("images.npy", "w") as f,
        ):
            npy.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with pytest.raises(DataError, match="claims shape"):
            open_source(f"npz:{tmp_path}/bomb.npz", image_size=4)
    np.savez_compressed(
        tmp_path / "set.npz", images=np.random.default_rng(0).integers(0, 256, (9, 9, 9), dtype=np.uint8)
    )
    data = (tmp_path / "set.npz").read_bytes()
    for end in (0, 10, len(data) // 2):
        (tmp_path / "set.npz").write_bytes(data[:end])
        with pytest.raises(DataError, match="cannot be read"):
            open_source(f"npz:{tmp_path}/set.npz", image_size=4)


# --- folders and lists ---


def test_sub_folders_are_classes_and_images_may_lie_deeper(tmp_path):
    for name, value in (("cat/1.png", 1), ("cat/deep/er/2.png", 2), ("dog/3.png", 3)):
        write(tmp_path / "set" / name, flat(value))
    source = open_source(str(tmp_path / "set"), image_size=8)
    samples = source.read(every(source))
    assert source.classes == ("cat", "dog")
    assert samples.pixels[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert samples.labels.tolist() == [0, 0, 1]


def test_flat_folders_and_single_sub_folders_have_no_labels(tmp_path):
    write(tmp_path / "flat/1.png", flat(1))
    write(tmp_path / "single/all/1.png", flat(1))
    write(tmp_path / "mixed/1.png", flat(1))
    write(tmp_path / "mixed/more/1.png", flat(1))
    for name, message in (
        ("flat", "in no sub-folders"),
        ("single", "one sub-folder all"),
        ("mixed", "1 images lie beside"),
    ):
        source = open_source(f"folder:{tmp_path}/{name}", image_size=8)
        assert source.read(every(source)).labels is None
        with pytest.raises(DataError, match=message):
            source.required_labels()


def test_several_roots_are_one_set_with_classes_by_name(tmp_path):
    write(tmp_path / "a/cat/1.png", flat(1))
    write(tmp_path / "a/dog/2.png", flat(2))
    write(tmp_path / "b/dog/3.png", flat(3))
    source = open_source(f"folder:{tmp_path}/a,{tmp_path}/b", image_size=8)
    assert source.read(every(source)).pixels[:, 0, 0, 0].tolist() == [1, 2, 3]
    assert source.labels.tolist() == [0, 1, 1]
    write(tmp_path / "c,d/1.png", flat(4))
    assert len(open_source(f"folder:{tmp_path}/c,d", image_size=8)) == 1


def test_train_and_val_folders_are_the_splits_with_one_numbering(tmp_path):
    for name in ("train/ant/1.png", "train/bee/2.png", "train/cow/3.png", "val/cow/4.png"):
        write(tmp_path / "set" / name, flat(7))
    train = open_source(str(tmp_path / "set"), image_size=8)
    test = open_source(str(tmp_path / "set"), split="test", image_size=8, classes=train.classes)
    assert (len(train), len(test)) == (3, 1)
    assert test.labels.tolist() == [2]
    with pytest.raises(DataError, match="classes cow are not among the 2"):
        open_source(str(tmp_path / "set"), split="test", image_size=8, classes=("ant", "bee"))


def test_a_class_that_is_called_train_is_told_with_what_is_not_read(tmp_path, capsys):
    for name in ("bus/1.png", "car/2.png", "train/3.png"):
        write(tmp_path / name, flat(7))
    assert len(open_source(str(tmp_path), image_size=8)) == 1
    assert "train/ is taken as its train split; not read: bus, car" in capsys.readouterr().err


def test_a_column_of_what_has_none_is_refused(tmp_path):
    write(tmp_path / "1.png", flat(7))
    with pytest.raises(ValueError, match="--label_column breed: folder: has no columns"):
        open_source(str(tmp_path), image_size=8, label_column="breed")


def test_a_name_that_only_begins_like_a_split_names_none():
    names = ["valencia.parquet", "madrid.parquet", "trains.tar"]
    assert files_of_split([Path(name) for name in names], "train") == [Path(name) for name in names]
    splits = [Path(name) for name in ("train-0.parquet", "train00.tar", "trainval.tar", "testset_1.parquet", "val.tar")]
    assert files_of_split(splits, "train") == splits[:3]
    assert files_of_split(splits, "test") == splits[3:4]


def test_the_order_and_the_fingerprint_depend_on_names_and_sizes_alone(tmp_path):
    names = [f"{c}/{n}.png" for c in "xyz" for n in (3, 1, 2)]
    for root, order in (("a", names), ("b", names[::-1])):
        for name in order:
            write(tmp_path / root / name, flat(len(name), 8, 8 + int(name[2])))
    first, second = (open_source(str(tmp_path / root), image_size=8) for root in "ab")
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.read(every(first)).pixels, second.read(every(second)).pixels)
    write(tmp_path / "b" / "x/1.png", scene(30, 30))
    assert open_source(str(tmp_path / "b"), image_size=8).fingerprint != first.fingerprint


def test_a_list_names_files_with_labels_or_without(tmp_path):
    for value in (1, 2, 3):
        write(tmp_path / f"set/{value}.png", flat(value))
    (tmp_path / "set/list.txt").write_text("3.png\tbig\n1.png\tsmall\n\n2.png\tbig\n")
    (tmp_path / "plain.txt").write_bytes(b"2.png\0" + b"1.png\0")
    source = open_source(f"list:{tmp_path}/set/list.txt", image_size=8)
    assert source.read(every(source)).pixels[:, 0, 0, 0].tolist() == [3, 1, 2]
    assert (source.classes, source.labels.tolist()) == (("big", "small"), [0, 1, 0])
    plain = open_source(f"list:{tmp_path}/plain.txt,{tmp_path}/set", image_size=8)
    assert plain.read(every(plain)).pixels[:, 0, 0, 0].tolist() == [2, 1]
    assert plain.labels is None


@pytest.mark.parametrize(("separator", "word"), [(",", "comma"), (", ", "comma"), (";", "semicolon"), (" ", "space")])
def test_a_label_not_after_a_tab_is_refused_with_a_hint(tmp_path, separator, word):
    for value in (1, 2, 3):
        write(tmp_path / f"set/a {value}.png", flat(value))
    (tmp_path / "set/list.txt").write_text("".join(f"a {value}.png{separator}dog\n" for value in (1, 2, 3)))
    message = f"most files that .*: a 1.png is a file, so a tab must stand before the label, not a {word}"
    with pytest.raises(NoInput, match=message.replace(": ", "; ", 1)):
        open_list(tmp_path / "set/list.txt", None, None)


def test_a_list_may_begin_with_a_byte_order_mark(tmp_path):
    write(tmp_path / "1.png", flat(1))
    (tmp_path / "list.txt").write_text("1.png\tcat\n", encoding="utf-8-sig")
    source = open_source(f"list:{tmp_path}/list.txt", image_size=8)
    assert source.read(every(source)).bad == ()


def test_a_file_missing_from_a_list_is_a_bad_image_and_most_of_them_are_another_root(tmp_path, capsys):
    for value in (1, 2, 3):
        write(tmp_path / f"set/{value}.png", flat(value))
    (tmp_path / "some.txt").write_text("1.png\ngone/2.png\n3.png\n")
    source = open_source(f"list:{tmp_path}/some.txt,{tmp_path}/set", image_size=8, cache=False)
    message = "(train): not read: 1 names (No such file or directory), which count as bad images: gone/2.png\n"
    assert capsys.readouterr().err.endswith(message)
    samples = source.read(every(source))
    assert [(line.id, line.reason) for line in samples.bad] == [(1, "No such file or directory")]
    assert samples.pixels[[0, 2], 0, 0, 0].tolist() == [1, 3]
    with pytest.raises(
        NoInput, match=r"most files that .*some\.txt names are not below .*: 3 names .*: 1\.png; if they"
    ) as e:
        open_source(f"list:{tmp_path}/some.txt", image_size=8)
    assert str(e.value).endswith(f"if they lie below another folder, use list:{tmp_path}/some.txt,/that/folder")


@pytest.mark.parametrize("line", ["../out.png", "/etc/passwd", "link.png", "in/../../out.png"])
def test_a_list_names_nothing_outside_its_folder(tmp_path, line):
    write(tmp_path / "out.png", flat(1))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/link.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "set/list.txt").write_text(line)
    with pytest.raises(DataError, match="is not inside"):
        open_list(tmp_path / "set/list.txt", None, None)


ODD = [
    b"new\nline.png", b"tab\t.png", b"caf\xe9.png", b"\xff\xfe.png", b"\x1b[2Jclear.png", b" .png", b"-rf.png",
    b"a b.png", "עברית.png".encode(), "日本.png".encode(), "\u00e9.png".encode(), "e\u0301.png".encode(),
    b"'quote'.png", b'"double".png', b"$HOME.png",
    b"back\\slash.png", b"a;b.png", b"*.png", b"UPPER.PNG", b"x" * 251 + b".png",
]  # fmt: skip


def test_odd_names_are_read_and_shown_without_control_bytes(tmp_path):
    assert len(ODD) == 20
    for value, name in enumerate(ODD):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(png(flat(value), 8, 2))
    (tmp_path / "zz bad\n\x1b[31m.png").write_text("no image")
    source = open_source(str(tmp_path), image_size=8, cache=False)
    samples = source.read(every(source))
    assert len(source) == len(ODD) + 1
    (bad,) = samples.bad
    assert sorted(samples.pixels[every(source) != bad.id, 0, 0, 0].tolist()) == list(range(len(ODD)))
    for id in range(len(source)):
        assert source.store.where(id).isprintable()
    assert bad.path.endswith(r"zz bad\n\x1b[31m.png")
    assert printable(b"\xff") == r"\xff"


def test_names_are_the_list_they_were_made_of():
    names = [b"", b"a", b"", b"bcd", b"\n"]
    packed = Names(names)
    assert [packed[i] for i in range(5)] == names
    assert len(packed) == 5


def test_what_is_no_regular_file_is_counted_and_never_opened(tmp_path):
    root = tmp_path / "set"
    write(root / "good.png", flat(5))
    os.mkfifo(root / "fifo.png")
    (root / "folder.png").mkdir()
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "gone.png").symlink_to(root / "nothing")
    (root / "up").symlink_to(tmp_path)
    (root / ".hidden.png").write_text("")
    (root / "notes.txt").write_text("")
    (root / "README").write_text("")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(root / "socket.png"))
        start = time.perf_counter()
        source = open_source(str(root), image_size=8)
        linked = open_source(str(root), image_size=8, follow_links=True)
    assert time.perf_counter() - start < 10
    assert len(source) == 1
    assert len(linked) >= 1  # the loop ends
    with pytest.raises(NoInput, match="no image files"):
        open_source(f"folder:{root}/folder.png", image_size=8)


def test_links_are_followed_inside_the_folder_and_outside_only_when_asked(tmp_path):
    write(tmp_path / "out/1.png", flat(1))
    write(tmp_path / "set/2.png", flat(2))
    (tmp_path / "set/3.png").symlink_to(tmp_path / "set/2.png")
    (tmp_path / "set/4.png").symlink_to(tmp_path / "out/1.png")
    (tmp_path / "set/more").symlink_to(tmp_path / "out")
    assert len(open_folders([tmp_path / "set"])) == 2
    assert len(open_folders([tmp_path / "set"], follow_links=True)) == 4


def test_nothing_outside_the_folder_is_opened_and_no_connection_made(tmp_path):
    root = tmp_path / "set"
    write(root / "a/1.png", flat(1))
    write(root / "b/2.png", flat(2))
    (root / "b/3.png").write_text("file:///etc/passwd")
    write(tmp_path / "secret.png", flat(9))
    (root / "a/out.png").symlink_to(tmp_path / "secret.png")
    seen, watching = [], [True]

    def hook(event: str, arguments: tuple) -> None:
        if watching and (event == "open" or event.startswith("socket.")):
            seen.append((event, str(arguments[0])))

    sys.addaudithook(hook)
    source = open_source(str(root), image_size=8, cache=False)
    source.read(every(source))
    watching.clear()
    opened = [path for event, path in seen if event == "open"]
    assert any("1.png" in path for path in opened)
    assert not [path for path in opened if str(root) not in path and not path.endswith((".py", ".pyc", "meminfo"))]
    assert not [event for event, _ in seen if event.startswith("socket.")]


# --- sizes ---


def test_images_of_any_size_lie_in_the_corner_of_one_canvas(tmp_path):
    for name, size in {"a": (8, 40), "b": (40, 8), "c": (1, 1), "d": (200, 100), "e": (1, 5000)}.items():
        write(tmp_path / f"{name}.png", scene(*size))
    source = open_source(str(tmp_path), image_size=32)
    samples = source.read(every(source))
    assert samples.pixels.shape == (5, 3, 96, 96)
    assert samples.extents.tolist() == [[8, 40], [40, 8], [1, 1], [96, 48], [1, 96]]
    for pixels, (height, width) in zip(samples.pixels, samples.extents.tolist(), strict=True):
        assert pixels[:, height:].sum() == pixels[:, :, width:].sum() == 0
    assert (samples.pixels[0, :, :8, :40].permute(1, 2, 0).numpy() == scene(8, 40)).all()


def test_images_of_one_size_have_a_canvas_of_that_size(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.png", scene(100, 130))
    assert open_source(str(tmp_path), image_size=64).canvas == (100, 130)
    assert open_source(str(tmp_path), image_size=64, canvas=65).canvas == (50, 65)
    assert open_source(str(tmp_path), image_size=224, channels=1).read(np.arange(2)).pixels.shape == (2, 1, 100, 130)


def test_a_photograph_keeps_its_pixels_at_224(tmp_path):
    write(tmp_path / "a.png", scene(375, 500))
    write(tmp_path / "b.png", scene(500, 375))
    source = open_source(str(tmp_path), image_size=224)
    assert source.canvas == (512, 512)
    assert source.read(every(source)).extents.tolist() == [[375, 500], [500, 375]]


# --- bad images ---


def broken_set(root: Path, good: int = 64, bad: int = 8) -> list[int]:
    for number in range(good + bad):
        write(root / f"{number:03}.png", flat(number))
    broken = list(range(5, good + bad, (good + bad) // bad))[:bad]
    jpeg = save(scene(32, 32), "JPEG")
    kinds = [b"", b"text", jpeg[: len(jpeg) // 2], png(flat(0), 8, 2)[:40]] * bad
    for number, content in zip(broken, kinds, strict=False):
        (root / f"{number:03}.png").write_bytes(content)
    return broken


@pytest.mark.parametrize("cache", [True, False])
def test_a_bad_image_is_named_and_replaced_by_a_good_one_that_its_id_alone_decides(tmp_path, cache):
    broken = broken_set(tmp_path / "set")
    source = open_source(str(tmp_path / "set"), image_size=8, cache=cache)
    assert isinstance(source, ArraySource if cache else EncodedSource)
    samples = source.read(every(source))
    assert [line.id for line in samples.bad] == broken
    assert samples.ids.tolist() == every(source).tolist()
    assert "empty file" in samples.bad[0].reason
    assert samples.bad[0].path.endswith("005.png")
    shown = samples.pixels[:, 0, 0, 0].tolist()
    for line in samples.bad:
        assert line.substitute not in broken
        assert shown[line.id] == line.substitute
        alone = source.read(np.array([line.id]))
        assert alone.bad == (line,)
        assert alone.pixels[0, 0, 0, 0] == line.substitute
    assert [shown[id] for id in range(72) if id not in broken] == [id for id in range(72) if id not in broken]


@pytest.mark.parametrize("cache", [True, False])
def test_a_substitute_brings_its_own_label(tmp_path, cache):
    for name in ("ant", "bee"):
        for number in range(3):
            write(tmp_path / f"set/{name}/{number}.png", flat(10 * (name == "bee") + number))
    (tmp_path / "set/ant/0.png").write_text("")
    source = open_source(str(tmp_path / "set"), image_size=8, cache=cache)
    assert isinstance(source, ArraySource if cache else EncodedSource)
    samples = source.read(np.array([0]))
    assert samples.labels[0] == source.labels[samples.bad[0].substitute] == (samples.pixels[0, 0, 0, 0] >= 10)


def test_substitutes_are_all_others_once():
    for size in (1, 2, 3, 10, 97, 1000):
        for id in (0, size // 2, size - 1):
            assert sorted(substitutes(id, size)) == [other for other in range(size) if other != id]
    assert abs(next(substitutes(500, 1000)) - 500) > 100  # not a neighbour, which may be damaged likewise


def test_a_set_of_one_bad_image_says_why(tmp_path):
    (tmp_path / "1.png").write_text("no image")
    with pytest.raises(DataError, match=r"image 0 and 0 substitutes .* because: not JPEG, PNG"):
        open_source(str(tmp_path), image_size=8, cache=False).read(np.array([0]))


def test_a_set_without_one_good_image_says_so(tmp_path):
    for number in range(5):
        write(tmp_path / f"set/{number}.png", flat(0)).write_text("no")
    source = open_source(str(tmp_path / "set"), image_size=8)
    with pytest.raises(DataError, match="image 0 and 4 substitutes cannot be used, the last because: not JPEG"):
        source.read(np.array([0]))


def test_files_that_change_during_a_run_are_bad_images(tmp_path):
    for number in range(4):
        write(tmp_path / f"set/{number}.png", scene(8, 8 + number))
    source = open_source(str(tmp_path / "set"), image_size=8)
    (tmp_path / "set/1.png").unlink()
    write(tmp_path / "set/2.png", scene(50, 50))
    samples = source.read(every(source))
    assert [line.id for line in samples.bad] == [1, 2]
    assert "No such file" in samples.bad[0].reason
    assert "changed since it was listed" in samples.bad[1].reason


# --- one sentence each ---


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("{}/nothing/at/all", NoInput, "the nearest folder is {}, which holds empty, file.txt, text"),
        ("folder:{}/empty", NoInput, "no image files in {}/empty: found nothing"),
        ("folder:{}/text", NoInput, r"found 1 without an ending: README; 3 \*.txt: 1.txt"),
        ("{}/file.txt", NoInput, "file.txt is not a folder of images: it is a file"),
        ("idx:{}/nothing", NoInput, "no such folder"),
        ("idx:{}/text", NoInput, "no images of the train split: expected a file like train-images-idx3-ubyte"),
        ("npz:{}/nothing.npz", NoInput, "no such file"),
        ("list:{}/nothing.txt", NoInput, "is not a file"),
        ("foulder:{}", ValueError, "does not begin with one of shapes, idx"),
        ("shapes:wrong", ValueError, "shapes:wrong must be like"),
    ],
)
def test_missing_data_is_named_in_one_sentence(tmp_path, spec, error, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "file.txt").write_text("")
    for name in ("1.txt", "2.txt", "3.txt", "README"):
        (tmp_path / "text" / name).write_text("")
    with pytest.raises(error, match=message.format(tmp_path)) as caught:
        open_source(spec.format(tmp_path), image_size=8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "",
        " ",
        "folder:",
        "folder:{},",
        "folder:,{}",
        "{},",
        "list:",
        "list:{}/list.txt,",
        *(f"{k}:" for k in KINDS[1:]),
    ],
)
def test_an_empty_path_is_not_the_folder_that_we_happen_to_be_in(tmp_path, monkeypatch, spec):
    write(tmp_path / "1.png", flat(1))
    (tmp_path / "list.txt").write_text("1.png\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"lacks a path or name: is a variable of the shell"):
        open_source(spec.format(tmp_path), image_size=8)


@pytest.mark.parametrize("spec", ["", "webdataset:", "parquet:", "hf:", "parquet: "])
def test_an_empty_stream_is_not_the_folder_that_we_happen_to_be_in(tmp_path, monkeypatch, spec):
    (tmp_path / "1.tar").write_bytes(bytes(1024))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="lacks a path or name: is a variable of the shell unset"):
        Stream(spec, epoch_images=1, canvas=8)


def test_a_set_without_a_test_split_says_where_it_looked(tmp_path):
    write(tmp_path / "1.png", flat(1))
    with pytest.raises(NoInput, match="has no test split: none of test, val, validation, valid is in it"):
        open_source(str(tmp_path), split="test", image_size=8)
    with pytest.raises(ValueError, match="split must be train or test, got 'dev'"):
        open_source(str(tmp_path), split="dev", image_size=8)


@pytest.mark.parametrize(
    ("name", "kind"), [("a.csv", "csv"), ("a.txt", "list"), ("a.npz", "npz"), ("a.parquet", "parquet")]
)
@pytest.mark.parametrize("prefix", ["", "folder:"])
def test_a_file_instead_of_a_folder_is_refused_with_its_kind(tmp_path, name, kind, prefix):
    (tmp_path / name).write_text("")
    with pytest.raises(NoInput, match=f"is not a folder of images: it is a file; use {kind}:{tmp_path}/{name}$"):
        open_source(f"{prefix}{tmp_path}/{name}", image_size=8)


def test_a_csv_file_beside_images_without_labels_is_pointed_at(tmp_path):
    write(tmp_path / "1.png", flat(1))
    (tmp_path / "labels.csv").write_text("1.png,cat\n")
    with pytest.raises(DataError, match=r"the images lie in no sub-folders; csv:FILE reads them from labels.csv"):
        open_source(f"folder:{tmp_path}", image_size=8).required_labels()


def test_a_bare_npy_is_refused_with_the_call_that_writes_an_npz(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match=r"a.npy is one array: np.savez\("):
        open_source(f"npz:{tmp_path}/a.npy", image_size=8)


@pytest.fixture
def unprivileged(tmp_path_factory) -> Iterator[None]:
    """Root may read everything, so it becomes nobody for a while."""
    if os.geteuid() != 0:
        yield
        return
    base = tmp_path_factory.getbasetemp()
    for folder in (base, base.parent, base.parent.parent):  # one more where several workers share the tests
        if not folder.stat().st_mode & 0o005:
            folder.chmod(0o755)
    write(base / "readable/1.png", flat(1))
    open_source(str(base / "readable"), image_size=8, cache=False).read(np.array([0]))  # imports what nobody may not
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_unreadable_folders_and_files_are_named(tmp_path, request):
    tmp_path.chmod(0o755)
    write(tmp_path / "set/1.png", flat(1)).chmod(0)
    write(tmp_path / "set/2.png", flat(2))
    write(tmp_path / "closed/3.png", flat(3))
    (tmp_path / "closed").chmod(0)
    request.getfixturevalue("unprivileged")
    bad = open_source(str(tmp_path / "set"), image_size=8, cache=False).read(np.array([0])).bad
    assert bad[0].reason == "Permission denied"
    with pytest.raises(NoInput, match=r"found 1 folders \(Permission denied\)"):
        open_source(str(tmp_path / "closed"), image_size=8)


def test_other_entries_of_a_folder_are_named_in_one_line(tmp_path, capsys, request):
    tmp_path.chmod(0o755)
    for name in ("ant", "bee", "cow"):
        write(tmp_path / f"set/{name}/1.png", flat(1))
    for name in ("a.heic", "b.heic", "bee/c.heic", "notes"):
        (tmp_path / "set" / name).write_text("")
    (tmp_path / "set/dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "set/ant").chmod(0)
    request.getfixturevalue("unprivileged")
    assert len(open_source(str(tmp_path / "set"), image_size=8, cache=False)) == 2
    message, _, _ = capsys.readouterr().err.rpartition("\n")
    before, _, kinds = message.partition("/set: not read: ")
    assert before == f"folder:{tmp_path}"
    assert sorted(kinds.split("; ")) == [
        "1 folders (Permission denied): ant",
        "1 links out of the folder or to folders (--follow_links reads them): dog",
        "1 without an ending: notes",
        "3 *.heic: a.heic",
    ]


def test_a_kind_that_is_rare_is_not_lost_among_many_endings():
    skipped = Skipped()
    for number in range(50):
        for _ in range(number + 2):
            skipped.add(f"*.{number}", b"x" * 300)
    skipped.add("folders (Permission denied)", b"cat")
    assert str(skipped).startswith("1 folders (Permission denied): cat; 51 *.49: xx")
    assert str(skipped).endswith("; 989 of other kinds")
    assert len(str(skipped)) < 1000


def test_one_image_and_one_pixel_are_a_set(tmp_path):
    write(tmp_path / "1.png", flat(3, 1, 1))
    source = open_source(str(tmp_path), image_size=8)
    assert source.read(np.array([0, 0, 0])).pixels.tolist() == [[[[3]]] * 3] * 3


def test_ids_are_checked(tmp_path):
    write(tmp_path / "1.png", flat(3))
    for cache in (True, False):
        source = open_source(str(tmp_path), image_size=8, cache=cache)
        assert len(source.read(np.array([], np.int64)).pixels) == 0
        for ids, message in (
            ([1], "ids 1 to 1 of a source of 1"),
            ([-1], "ids -1"),
            ([0.5], "float64"),
            ([[0]], "shape"),
        ):
            with pytest.raises(ValueError, match=message):
                source.read(np.array(ids))


# --- workers ---


class Fetches(Dataset):
    def __init__(self, source: Source, fetches: int, batch: int):
        self.source, self.fetches, self.batch = source, fetches, batch

    def __len__(self) -> int:
        return self.fetches

    def __getitem__(self, item: int) -> torch.Tensor:
        ids = np.random.default_rng(item).integers(0, len(self.source), self.batch)
        return self.source.read(ids)


@pytest.mark.processes
def test_workers_read_what_one_process_reads(tmp_path):
    broken_set(tmp_path / "set", 30, 3)
    source = open_source(str(tmp_path / "set"), image_size=8, cache=False)
    alone = [source.read(np.random.default_rng(item).integers(0, 33, 4)) for item in range(8)]
    for read, expected in zip(DataLoader(Fetches(source, 8, 4), batch_size=None, num_workers=2), alone, strict=True):
        assert torch.equal(read.pixels, expected.pixels)
        assert tuple(read.bad) == expected.bad


def pss(pids: list[int]) -> int:
    """Memory of these processes, what they share counted once. Files are left out: a library's part depends on who else
    uses it."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))


@pytest.mark.slow
@pytest.mark.processes
def test_the_names_of_200000_files_take_a_buffer_and_do_not_grow_in_workers(tmp_path):
    target = write(tmp_path / "one.png", flat(1))
    (tmp_path / "list.txt").write_bytes(b"one.png\n" * 200_000)
    source = open_source(f"list:{tmp_path}/list.txt", image_size=8, cache=False)
    assert source.store.names.buffer.nbytes == 200_000 * len(target.name)
    assert len(source) == 200_000
    gc.collect()
    loader = iter(DataLoader(Fetches(source, 2000, 1), batch_size=None, num_workers=2, prefetch_factor=2))
    pids, sizes = [os.getpid(), *(worker.pid for worker in loader._workers)], []
    for number, _ in enumerate(loader):
        if number in (400, 1000, 1990):
            sizes.append(pss(pids))
    assert sizes[2] < 1.1 * sizes[1]
    assert sizes[2] < 1.1 * sizes[0]


@pytest.mark.slow
def test_two_hundred_thousand_real_paths_are_listed_in_seconds(tmp_path):
    for folder in range(200):
        first = write(tmp_path / f"set/{folder}/0.png", flat(1))
        for number in range(1, 1000):
            os.link(first, tmp_path / f"set/{folder}/{number}.png")
    start = time.process_time()
    source = open_source(str(tmp_path / "set"), image_size=8, cache=False)
    assert time.process_time() - start < 10
    assert len(source) == 200_000
    assert len(source.classes) == 200


def test_a_split_that_is_a_link_to_elsewhere_is_read_only_if_that_is_asked_for(tmp_path):
    write(tmp_path / "elsewhere/a.png", flat(1))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"train is a link to .*elsewhere: --follow_links goes there"):
        open_source(str(tmp_path / "set"), image_size=8)
    assert len(open_source(str(tmp_path / "set"), image_size=8, follow_links=True)) == 1


def test_npz_files_with_other_members_or_a_password_are_one_sentence(tmp_path):
    np.savez(tmp_path / "locked.npz", x_train=np.zeros((2, 4, 4), np.uint8))
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        archive.writestr("x_train", b"no array")
    data = bytearray((tmp_path / "locked.npz").read_bytes())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # the flag of encryption, in both headers
        data[data.index(mark) + place] |= 1
    (tmp_path / "locked.npz").write_bytes(data)
    for name in ("odd", "locked"):
        with pytest.raises(DataError, match=f"{name}.npz"):
            open_source(f"npz:{tmp_path}/{name}.npz", image_size=4)
