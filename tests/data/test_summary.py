import os
import time

import numpy as np
import pytest
from image_zoo import png, save, scene
from PIL import Image

from sslvit.data.labels import no_labels
from sslvit.data.readers.encoded import spread_ids
from sslvit.data.readers.folders import FileStore, Skipped
from sslvit.data.source import ArraySource
from sslvit.data.spec import EncodedSource, open_source
from sslvit.data.subset import Subset
from sslvit.data.summary import SAMPLE, Summary, contact_sheet
from sslvit.views.pretraining import ContrastivePair


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))


def look(spec, **options):
    source = open_source(str(spec), image_size=32, cache=False)
    return Summary(source, **{"image_size": 32, "batch_size": 4} | options)


def photographs(folder, count: int = 12) -> None:
    for number in range(count):
        (folder / f"class{number % 3}").mkdir(parents=True, exist_ok=True)
        file = folder / f"class{number % 3}/{number:02}.png"
        file.write_bytes(png(np.roll(scene(40, 50 + number), number, 0), 8, 2))


def test_a_report_counts_what_is_there(tmp_path):
    photographs(tmp_path / "set")
    (tmp_path / "set/class3").mkdir()
    (tmp_path / "set/class3/one.jpg").write_bytes(save(scene(60, 60), "JPEG"))
    (tmp_path / "set/class0/bad.png").write_text("no image")
    report = look(tmp_path / "set")
    files = (tmp_path / "set").rglob("*.*")
    assert (report.images, report.sampled, report.unreadable) == (14, 14, 1)
    assert report.class_sizes == {"class0": 5, "class1": 4, "class2": 4, "class3": 1}
    assert report.kinds == {"PNG RGB": 12, "JPEG RGB": 1}
    assert report.sizes == {(40, 50 + number): 1 for number in range(12)} | {(60, 60): 1}
    assert report.stored_bytes == sum(file.stat().st_size for file in files)
    assert report.decoded_bytes == 14 * 3 * 96 * 96
    assert any("1 class has one image: it cannot be both" in sentence for sentence in report.advice)
    text = report.text()
    assert "unreadable  1 of 14 sampled; " in text
    assert "40 to 60 high, 50 to 61 wide" in text
    assert "4, from 1 images (class3) to 5 (class0)" in text


def test_duplicates_are_found_in_a_set_far_larger_than_the_sample(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(700):
        (folder / f"{number}.png").write_bytes(
            png(draw.integers(0, 256, (6, 8 + number % 40, 3), dtype=np.uint8), 8, 2)
        )
    os.link(folder / "123.png", folder / "copy.png")
    assert look(folder).duplicates == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: (f / "1.png").write_bytes(png(scene(), 8, 2)), "1 images are fewer than a batch of 4"),
        (lambda f: (f / "1.png").write_bytes(png(scene(8, 8), 8, 2)), "are smaller than 32 pixels"),
        (lambda f: (f / "1.png").write_bytes(png(scene(1, 90), 8, 2)), "one pixel high or wide"),
        (lambda f: (f / "1.png").write_bytes(png(scene()[..., :1], 8, 0)), "grey: --channels 1"),
        (lambda f: (f / "1.png").write_text("no"), "not one sampled image can be read"),
        (lambda f: [(f / n).write_bytes(png(scene(), 8, 2)) for n in ("1.png", "2.png")], "duplicates"),
    ],
)
def test_problems_of_a_dataset_are_named_before_training(tmp_path, make, message):
    (tmp_path / "set").mkdir()
    make(tmp_path / "set")
    report = look(tmp_path / "set")
    assert any(message in sentence for sentence in report.advice)
    assert message in report.text()


def test_a_good_set_needs_no_advice(tmp_path):
    photographs(tmp_path / "set")
    assert look(tmp_path / "set").advice == ()
    arrays = Summary(open_source("shapes:n=100", image_size=32), image_size=32, batch_size=10)
    assert (arrays.images, arrays.sizes, arrays.advice) == (100, {(32, 32): 100}, ())
    assert "drawn" in arrays.text()


def test_a_cached_set_still_knows_its_bad_images(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.png").write_bytes(png(np.roll(scene(32, 32), number, 0), 8, 2))
    (folder / "7.png").write_bytes(b"")
    report = Summary(open_source(str(folder), image_size=32), image_size=32, batch_size=4)
    assert (report.unreadable, report.kinds) == (1, {"PNG RGB": 19})
    assert "empty file" in report.reasons[0]


def test_what_a_set_is_known_before_and_after_it_lies_in_the_cache(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(600):
        pixels = draw.integers(0, 256, (32, 32, 1), dtype=np.uint8)
        (folder / f"{number:03}.png").write_bytes(png(pixels, 8, 0))
    first = set(spread_ids(603, SAMPLE).tolist())
    unseen = [number for number in range(600) if number not in first][:2]
    for number, copied in enumerate(unseen):
        os.link(folder / f"{copied:03}.png", folder / f"copy{number}.png")
    (folder / "notes.txt").write_text("")
    (folder / "scan.tga").write_text("")
    for _ in range(2):
        source = open_source(str(folder), image_size=32)
        assert isinstance(source, ArraySource)
        report = Summary(source, image_size=32, batch_size=4)
        assert report.kinds == {"PNG L": SAMPLE}
        assert report.stored_bytes == sum(file.stat().st_size for file in folder.glob("*.png"))
        assert report.duplicates == 2
        assert any("--channels 1" in sentence for sentence in report.advice)
        assert "not read    1 *.txt: notes.txt; 1 *.tga: scan.tga" in report.text()


def test_a_million_files_take_seconds(tmp_path):
    (tmp_path / "one.png").write_bytes(png(scene(32, 32), 8, 2))
    file = (b"one.png", (tmp_path / "one.png").stat().st_size, 0)
    store = FileStore([os.fsencode(tmp_path)], [0], [file] * 1_000_000, no_labels("made up"), Skipped())
    source = EncodedSource(store, name="a million", canvas=(32, 32))
    start = time.process_time()
    report = Summary(source, image_size=32, batch_size=4)
    assert time.process_time() - start < 15
    assert report.images == 1_000_000


def test_the_picture_shows_the_images_in_rows_of_eight(tmp_path):
    source = open_source("shapes:n=20", image_size=16)
    contact_sheet(source.read(np.arange(20)), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape == (3 * 18, 8 * 18, 3)
    tenth = source.read(np.array([10])).pixels[0].permute(1, 2, 0).numpy()
    assert (pixels[19:35, 2 * 18 + 1 : 2 * 18 + 17] == tenth).all()


def test_a_part_of_decoded_images_was_not_drawn():
    source = ArraySource(np.zeros((8, 3, 8, 8), np.uint8), name="zeros", fingerprint="zeros")
    drawn = open_source("shapes:n=8", image_size=8)
    for whole, kind in ((source, "decoded"), (drawn, "drawn")):
        for images in (whole, Subset(Subset(whole, np.arange(6)), np.arange(4))):
            assert Summary(images, image_size=8, batch_size=4).kinds == {kind: len(images)}


def test_photographs_reduced_too_far_for_the_smallest_crops_are_named_with_the_flag(tmp_path):
    (tmp_path / "set").mkdir()
    for number, width in enumerate((90, 200, 300)):
        (tmp_path / "set" / f"{number}.png").write_bytes(png(scene(80, width), 8, 2))
    source = open_source(str(tmp_path / "set"), image_size=32)  # on a canvas of 96
    needed = ContrastivePair(32).canvas  # 32 / sqrt(0.08 * 3 / 4) is 130.6
    advice = [s for s in Summary(source, image_size=32, batch_size=1, canvas=needed).advice if "--canvas" in s]
    assert len(advice) == 1
    assert "2 of 3 sampled images are reduced to the canvas of 96 x 96 pixels" in advice[0]
    assert "--canvas 160 keeps their pixels, for 2.8 times the memory" in advice[0]
    for quiet in ({"canvas": 160}, {"image_size": 160}):
        large = open_source(str(tmp_path / "set"), **{"image_size": 32} | quiet)
        assert not any("--canvas" in s for s in Summary(large, image_size=32, batch_size=1, canvas=needed).advice)


def test_images_lower_or_narrower_than_the_views_are_counted_as_smaller(tmp_path):
    (tmp_path / "set").mkdir()
    for number, (height, width) in enumerate([(32, 48), (40, 40), (24, 60), (64, 64)]):
        (tmp_path / "set" / f"{number}.png").write_bytes(png(scene(height, width), 8, 2))
    source = open_source(str(tmp_path / "set"), image_size=(32, 48))
    advice = [s for s in Summary(source, image_size=(32, 48), batch_size=1).advice if "smaller" in s]
    assert advice == ["2 of 4 sampled images are smaller than 32 x 48 pixels: views enlarge them"]
    assert not any("smaller than" in s for s in Summary(source, image_size=24, batch_size=1).advice)
