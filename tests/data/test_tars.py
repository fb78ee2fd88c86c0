import io
import pickle
import tarfile
import time

import numpy as np
import pytest
from image_zoo import png

from sslvit.data.readers.folders import Skipped
from sslvit.data.readers.tar_index import members
from sslvit.data.spec import open_source
from sslvit.errors import DataError, NoInput


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))


def picture(value: int) -> bytes:
    return png(np.full((6, 7, 3), value, np.uint8), 8, 2)


def pack(file, content: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(file, "w", format=form) as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


def values(source) -> list[int]:
    return source.read(np.arange(len(source))).pixels[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_are_read_by_number_with_the_labels_beside_the_images(tmp_path, form):
    deep = "/".join(["a long folder name"] * 5)
    for shard in range(3):
        content = {}
        for number in range(4):
            key = f"{deep}/{'é' * (form != tarfile.USTAR_FORMAT)}{shard}{number}"
            content |= {
                f"{key}.png": picture(10 * shard + number),
                f"{key}.cls": b" %d\n" % (number % 2),
                f"{key}.json": b"{}",
            }
        pack(tmp_path / f"set-{shard}.tar", content, form)
    source = open_source(f"webdataset:{tmp_path}/set-*.tar", image_size=6, cache=False)
    assert values(source) == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert source.labels.tolist() == [0, 1] * 6
    assert source.read(np.array([7, 2])).pixels[:, 0, 0, 0].tolist() == [13, 2]
    assert source.store.where(4).startswith(f"{tmp_path}/set-1.tar: a long folder name/")
    assert values(pickle.loads(pickle.dumps(source))) == values(source)
    assert values(open_source(f"webdataset:{tmp_path}", image_size=6)) == values(source)


def test_an_index_agrees_with_the_standard_library(tmp_path):
    draw = np.random.default_rng(0)
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        content = {
            "x" * int(draw.integers(1, 90)) + f"/{number}.bin": draw.bytes(int(draw.integers(0, 3000)))
            for number in range(100)
        }
        pack(tmp_path / "set.tar", content, form)
        with tarfile.open(tmp_path / "set.tar") as archive:
            expected = [(entry.name.encode(), entry.offset_data, entry.size) for entry in archive]
        assert [tuple(member) for member in members(tmp_path / "set.tar", Skipped())] == expected


def test_splits_and_text_labels(tmp_path):
    pack(tmp_path / "train-0.tar", {"1.png": picture(1), "1.cls": b"dog", "2.png": picture(2), "2.cls": b"cat"})
    pack(tmp_path / "val-0.tar", {"3.png": picture(3), "3.cls": b"dog"})
    train = open_source(f"webdataset:{tmp_path}", image_size=6)
    test = open_source(f"webdataset:{tmp_path}", split="test", image_size=6, classes=train.classes)
    assert (train.classes, train.labels.tolist()) == (("cat", "dog"), [1, 0])
    assert test.labels.tolist() == [1]
    with pytest.raises(NoInput, match="has no test split"):
        open_source(f"webdataset:{tmp_path}/train-0.tar", split="test", image_size=6)


def test_of_several_images_in_a_sample_one_must_be_named(tmp_path):
    pack(tmp_path / "set.tar", {"1.left.png": picture(1), "1.right.png": picture(2), "1.cls": b"0"})
    with pytest.raises(ValueError, match=r"has several images, left.png and right.png: choose one with --image_column"):
        open_source(f"webdataset:{tmp_path}", image_size=6)
    assert values(open_source(f"webdataset:{tmp_path}", image_size=6, image_column="right.png")) == [2]


def test_images_without_labels_say_how_many(tmp_path):
    pack(tmp_path / "set.tar", {"1.png": picture(1), "1.cls": b"0", "2.png": picture(2)})
    with pytest.raises(DataError, match=r"1 of 2 images have no \.cls"):
        open_source(f"webdataset:{tmp_path}", image_size=6).required_labels()


def attack(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int | None = None) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, target, len(picture(9)) if size is None else size
    return entry


ATTACKS = {
    "absolute": (attack("/tmp/canary.png"), 1),
    "above": (attack("../../canary.png"), 1),
    "windows": (attack("C:\\canary.png"), 1),
    "control bytes": (attack("a\x1b[2J\n.png"), 1),
    "symbolic link": (attack("link.png", tarfile.SYMTYPE, "/etc/passwd", 0), 0),
    "hard link": (attack("link.png", tarfile.LNKTYPE, "/etc/passwd", 0), 0),
    "device": (attack("zero.png", tarfile.CHRTYPE, size=0), 0),
    "fifo": (attack("fifo.png", tarfile.FIFOTYPE, size=0), 0),
    "folder": (attack("folder.png", tarfile.DIRTYPE, size=0), 0),
    "sparse": (attack("sparse.png", tarfile.GNUTYPE_SPARSE), 0),
    "folder with a size": (attack("folder.png", tarfile.DIRTYPE, size=9999), 0),
    "ten gigabytes claimed": (attack("huge.png", size=10 << 30), None),
    "more than a tar can hold": (attack("huge.png", size=1 << 62), None),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_member_leads_anywhere(tmp_path, name):
    entry, images = ATTACKS[name]
    (tmp_path / "set").mkdir()
    with open(tmp_path / "set/set.tar", "wb") as file:
        good = tarfile.TarInfo("good.png")
        good.size = len(picture(1))
        for header, data in ((good, picture(1)), (entry, picture(9) * (entry.size == len(picture(9))))):
            file.write(header.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
        file.write(bytes(1024))
    before = sorted(tmp_path.rglob("*"))
    start = time.process_time()
    if images is None:
        with pytest.raises(DataError, match=r"set\.tar is damaged at byte"):
            open_source(f"webdataset:{tmp_path}/set", image_size=6, cache=False)
    else:
        source = open_source(f"webdataset:{tmp_path}/set", image_size=6, cache=False)
        assert values(source) == [1, 9][: 1 + images]
        assert source.store.where(len(source) - 1).isprintable()
    assert time.process_time() - start < 5
    assert sorted(tmp_path.rglob("*")) == before


def test_a_hundred_thousand_members_are_listed_in_seconds(tmp_path):
    header = attack("x.txt", size=0).tobuf(tarfile.USTAR_FORMAT)
    with open(tmp_path / "set.tar", "wb") as file:
        for _ in range(20):
            file.write(header * 5000)
        file.write(bytes(1024))
    start = time.process_time()
    with pytest.raises(NoInput, match=r"no images in 1 tar files: found 100,000 \*\.txt"):
        open_source(f"webdataset:{tmp_path}", image_size=6)
    assert time.process_time() - start < 5


def opened(file):
    return open_source(f"webdataset:{file}", image_size=6, cache=False)


def test_a_tar_that_is_cut_anywhere_is_refused_with_the_place(tmp_path):
    pack(tmp_path / "set.tar", {f"{number}.png": picture(number) for number in range(6)})
    data, last = (tmp_path / "set.tar").read_bytes(), opened(tmp_path / "set.tar").store.offsets[-1]
    for end in (0, 1, 512, 512 * 4, 512 * 9 + 20, last + 1, last + len(picture(5)), last + 512, last + 512 + 511):
        (tmp_path / "cut.tar").write_bytes(data[:end])
        with pytest.raises(DataError, match=rf"cut\.tar is damaged at byte {end:,}, where it ends") as caught:
            opened(tmp_path / "cut.tar")
        assert "\n" not in str(caught.value)
    (tmp_path / "cut.tar").write_bytes(data[: last + 1024])  # one empty block is an end
    assert values(opened(tmp_path / "cut.tar")) == list(range(6))


def test_a_flipped_bit_in_any_header_is_refused_with_the_place(tmp_path):
    pack(tmp_path / "set.tar", {f"{number}.png": picture(number) for number in range(6)})
    data = (tmp_path / "set.tar").read_bytes()
    for offset in opened(tmp_path / "set.tar").store.offsets.tolist():
        changed = bytearray(data)
        changed[offset - 512 + 3] ^= 1
        (tmp_path / "set.tar").write_bytes(changed)
        with pytest.raises(DataError, match=rf"set\.tar is damaged at byte {offset - 512:,}, which is not a member"):
            opened(tmp_path / "set.tar")


def test_members_beyond_an_end_or_a_hole_are_not_forgotten(tmp_path):
    pack(tmp_path / "set.tar", {"1.png": picture(1), "2.png": picture(2)})
    data = (tmp_path / "set.tar").read_bytes()
    hole = bytearray(data)
    hole[1024:1536] = bytes(512)
    for content in (data + data, bytes(hole)):
        (tmp_path / "set.tar").write_bytes(content)
        with pytest.raises(
            DataError, match=r"set\.tar is damaged after byte [\d,]+, where an empty block closes it but"
        ):
            opened(tmp_path / "set.tar")


def test_what_is_no_tar_or_compressed_is_named(tmp_path):
    (tmp_path / "text.tar").write_text("this is no archive at all" * 100)
    with pytest.raises(DataError, match=r"text\.tar is damaged at byte 0"):
        opened(tmp_path / "text.tar")
    (tmp_path / "set.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(DataError, match=r"set.tar.gz is compressed"):
        opened(f"{tmp_path}/*.gz")


def test_other_members_of_a_tar_are_named_in_one_line(tmp_path, capsys):
    content = {f"{number}.{ending}": picture(number) for number in range(3) for ending in ("png", "json")}
    pack(tmp_path / "set.tar", content | {"0.cls": b"0", "1.txt": b"a dog"})
    opened(tmp_path / "set.tar")
    message = f"webdataset:{tmp_path}/set.tar (train): not read: 3 *.json: 0.json; 1 *.txt: 1.txt\n"
    assert capsys.readouterr().err == message


def test_a_shard_that_shrinks_during_a_run_gives_bad_images(tmp_path):
    pack(tmp_path / "set.tar", {f"{number}.png": picture(number) for number in range(4)})
    source = open_source(f"webdataset:{tmp_path}/set.tar", image_size=6, cache=False)
    with open(tmp_path / "set.tar", "r+b") as file:
        file.truncate(int(source.store.offsets[3]) + 5)
    samples = source.read(np.arange(4))
    assert [(line.id, line.reason) for line in samples.bad] == [
        (3, f"the archive ends after 5 of {len(picture(3))} bytes")
    ]


def test_random_bytes_in_headers_crash_nothing(tmp_path):
    pack(tmp_path / "set.tar", {f"{number}.png": picture(number) for number in range(3)}, tarfile.PAX_FORMAT)
    data, draw = (tmp_path / "set.tar").read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        changed = bytearray(data)
        for place in draw.integers(0, len(data), 6):
            changed[place] = draw.integers(256)
        block = 512 * int(draw.integers(len(data) // 512))  # with a right checksum, so that the rest is looked at
        changed[block + 148 : block + 156] = b" " * 8
        changed[block + 148 : block + 156] = b"%06o\0 " % sum(changed[block : block + 512])
        (tmp_path / "set.tar").write_bytes(changed)
        try:
            source = open_source(f"webdataset:{tmp_path}/set.tar", image_size=6, cache=False)
            source.read(np.arange(len(source)))
        except DataError:
            continue
