import http.server
import os
import pickle
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from image_zoo import png, scene

from sslvit.data.image import ImageError
from sslvit.data.spec import EncodedSource, open_source
from sslvit.data.stream import Stream
from sslvit.errors import DataError, NoInput

datasets = pytest.importorskip("datasets")
IMAGE, CLASS, TEXT, NUMBER = datasets.Image(), datasets.ClassLabel(names=["no", "yes"]), "string", "int64"


@pytest.fixture(autouse=True)
def own_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    datasets.disable_progress_bars()


def pictures(count: int) -> list[np.ndarray]:
    return [np.full((6, 7, 3), 10 + number, np.uint8) for number in range(count)]


def cells(count: int) -> list[dict]:
    return [{"bytes": png(pixels, 8, 2), "path": None} for pixels in pictures(count)]


def table(**columns) -> "datasets.Dataset":
    """name=(feature, values)"""
    features = {name: datasets.Value(f) if isinstance(f, str) else f for name, (f, _) in columns.items()}
    return datasets.Dataset.from_dict(
        {name: values for name, (_, values) in columns.items()}, features=datasets.Features(features)
    )


def saved(tmp_path: Path, **columns) -> str:
    table(**columns).save_to_disk(tmp_path / "set")
    return f"disk:{tmp_path}/set"


def values(source) -> list[int]:
    return source.read(np.arange(len(source))).pixels[:, 0, 0, 0].tolist()


def as_disk(tmp_path, data):
    data.save_to_disk(tmp_path / "set")
    return f"disk:{tmp_path}/set"


def as_parquet(tmp_path, data):
    (tmp_path / "set").mkdir()
    half = len(data) // 2
    data.select(range(half)).to_parquet(tmp_path / "set/train-00000-of-00002.parquet")
    data.select(range(half, len(data))).to_parquet(tmp_path / "set/train-00001-of-00002.parquet")
    return f"parquet:{tmp_path}/set/*.parquet"


@pytest.mark.parametrize("store", [as_disk, as_parquet])
@pytest.mark.parametrize("cache", [True, False])
def test_tables_give_their_images_and_labels(tmp_path, store, cache):
    spec = store(tmp_path, table(image=(IMAGE, cells(5)), label=(CLASS, [0, 1, 1, 0, 1])))
    source = open_source(spec, image_size=6, cache=cache)
    assert values(source) == [10, 11, 12, 13, 14]
    assert source.read(np.array([4, 0])).labels.tolist() == [1, 0]
    assert source.classes == ("no", "yes")
    assert source.canvas == (6, 7)
    copy = pickle.loads(pickle.dumps(source))
    assert values(copy) == values(source)
    assert len(pickle.dumps(source)) < 10_000
    assert open_source(spec, image_size=6, cache=cache).fingerprint == source.fingerprint


def test_splits_are_found_by_their_usual_names(tmp_path):
    parts = {name: table(image=(IMAGE, cells(count))) for name, count in (("train", 4), ("validation", 2))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    for name, part in parts.items():
        part.to_parquet(tmp_path / f"{name}-00000.parquet")
    for spec in (f"disk:{tmp_path}/set", f"parquet:{tmp_path}/*.parquet"):
        assert len(open_source(spec, image_size=6)) == 4
        assert len(open_source(spec, split="test", image_size=6)) == 2
    with pytest.raises(NoInput, match="no test split"):
        open_source(f"parquet:{tmp_path}/train*.parquet", split="test", image_size=6)
    parts["train"].save_to_disk(tmp_path / "one")
    with pytest.raises(NoInput, match="has no splits, so all of it is the train split"):
        open_source(f"disk:{tmp_path}/one", split="test", image_size=6)


STRUCT = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
SCHEMAS = {
    "image": (IMAGE, cells(3)),
    "img": (IMAGE, cells(3)),
    "picture of bytes": ("binary", [cell["bytes"] for cell in cells(3)]),
    "picture of large bytes": ("large_binary", [cell["bytes"] for cell in cells(3)]),
    "struct": (STRUCT, cells(3)),
    "nested": ({"deep": {"image": IMAGE}}, [{"deep": {"image": cell}} for cell in cells(3)]),
    "lists": (datasets.List(IMAGE), [cells(3)[:2], [], None, cells(3)[2:]]),
    "lists of bytes": (datasets.List(datasets.Value("binary")), [[cell["bytes"]] for cell in cells(3)]),
    "fixed lists": (datasets.List(IMAGE, length=1), [[cell] for cell in cells(3)]),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_one_image_column_is_found_whatever_its_name_and_shape(tmp_path, name):
    feature, rows = SCHEMAS[name]
    spec = saved(tmp_path, **{name: (feature, rows), "number": (NUMBER, list(range(len(rows))))})
    source = open_source(spec, image_size=6, cache=False)
    assert values(source) == [10, 11, 12]


def test_images_of_one_list_share_its_label(tmp_path):
    spec = saved(tmp_path, images=(datasets.List(IMAGE), [cells(3)[:2], [], cells(3)[2:]]), label=(CLASS, [1, 1, 0]))
    assert open_source(spec, image_size=6).labels.tolist() == [1, 1, 0]


def test_of_several_image_columns_one_must_be_named(tmp_path):
    spec = saved(tmp_path, left=(IMAGE, cells(2)), right=(IMAGE, cells(3)[1:]), text=(TEXT, ["a", "b"]))
    with pytest.raises(ValueError, match=r"several columns hold images, left, right: .* with --image_column"):
        open_source(spec, image_size=6)
    assert values(open_source(spec, image_size=6, image_column="right")) == [11, 12]
    with pytest.raises(ValueError, match="--image_column middle must be one of left, right, text"):
        open_source(spec, image_size=6, image_column="middle")


def test_a_table_without_images_names_its_columns(tmp_path):
    spec = saved(tmp_path, text=(TEXT, ["a"]), number=(NUMBER, [1]))
    with pytest.raises(ValueError, match="no column holds images: choose one of text, number"):
        open_source(spec, image_size=6)


def test_rows_without_an_image_are_bad_images(tmp_path):
    spec = saved(tmp_path, image=(IMAGE, [*cells(2), None]), label=(CLASS, [0, 1, 0]))
    samples = open_source(spec, image_size=6, cache=False).read(np.arange(3))
    assert [(line.id, line.path, line.reason) for line in samples.bad] == [(2, "row 2", "the row holds no image")]


def test_a_table_without_rows_is_refused(tmp_path):
    empty = table(image=(IMAGE, []))
    empty.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(DataError, match="corresponds to no data"):
        open_source(f"parquet:{tmp_path}", image_size=6)
    try:
        empty.save_to_disk(tmp_path / "set")
    except ZeroDivisionError:
        pytest.skip("datasets 4 writes no set without rows")
    with pytest.raises(NoInput, match="save_to_disk"):
        open_source(f"disk:{tmp_path}/set", image_size=6)


# --- labels ---


LABELS = {
    "class": ((CLASS, [1, 0, 1]), [1, 0, 1], ("no", "yes")),
    "number": ((NUMBER, [2, 0, 2]), [2, 0, 2], ("0", "1", "2")),
    "truth": (("bool", [True, False, True]), [1, 0, 1], ("0", "1")),
    "text": ((TEXT, ["dog", "čat", "dog"]), [0, 1, 0], ("dog", "čat")),
}
BAD_LABELS = {
    "hidden": ((CLASS, [-1, -1, -1]), "row 0 is -1 (a hidden label?)"),
    "partly hidden": ((NUMBER, [3, -1, 2]), "row 1 is -1: classes count from 0"),
    "beyond": ((NUMBER, [0, 1, 10**9]), "row 2 is 1000000000: not one of 1,000,000 classes"),
    "one beyond": ((NUMBER, [0, 1, 10**6]), "row 2 is 1000000: not one of 1,000,000 classes"),
    "missing": ((NUMBER, [0, None, 1]), "has no label in row 1"),
    "missing text": ((TEXT, ["a", None, "b"]), "has no label in row 1"),
    "empty text": ((TEXT, ["a", "b", ""]), "has no label in row 2"),
    "fractions": (("float32", [0.5, 1.0, 2.0]), "row 0 is 0.5, a float"),
    "not a number": (("float32", [float("nan")] * 3), "row 0 is nan, a float"),
    "several": ((datasets.List(datasets.Value("int64")), [[1], [1, 2], []]), "row 0 is [1], a list"),
    "pairs": ((datasets.List(datasets.Value("int64")), [[1, 2]] * 3), "labels of shape (2,)"),
    "things": (({"a": datasets.Value("int64")}, [{"a": 1}] * 3), "row 0 is {'a': 1}, a dict"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_any_kind_become_class_numbers(tmp_path, name):
    column, numbers, classes = LABELS[name]
    spec = saved(tmp_path, image=(IMAGE, cells(3)), what=column)
    source = open_source(spec, image_size=6, label_column="what")
    assert (source.required_labels().tolist(), source.classes) == (numbers, classes)
    assert source.labels.dtype == np.int64


@pytest.mark.parametrize("name", BAD_LABELS)
def test_bad_labels_stop_only_who_asks_for_them_naming_column_row_and_value(tmp_path, name):
    column, message = BAD_LABELS[name]
    source = open_source(saved(tmp_path, image=(IMAGE, cells(3)), what=column), image_size=6, label_column="what")
    assert source.read(np.arange(3)).labels is None
    with pytest.raises(DataError) as caught:
        source.required_labels()
    assert message in str(caught.value)
    assert "'what'" in str(caught.value)


def test_the_label_column_is_found_named_or_asked_for(tmp_path):
    spec = saved(tmp_path, image=(IMAGE, cells(2)), fine=(CLASS, [0, 1]), coarse=(CLASS, [1, 1]))
    with pytest.raises(DataError, match=r"none of the columns image, fine, coarse has .*--label_column"):
        open_source(spec, image_size=6).required_labels()
    assert open_source(spec, image_size=6, label_column="coarse").labels.tolist() == [1, 1]
    with pytest.raises(ValueError, match="--label_column course must be one of image, fine, coarse"):
        open_source(spec, image_size=6, label_column="course")
    only = saved(tmp_path / "b", image=(IMAGE, cells(2)), kind=(CLASS, [1, 0]), label=(TEXT, ["a", "b"]))
    assert open_source(only, image_size=6).labels.tolist() == [1, 0]


def test_text_labels_of_a_test_set_are_numbered_as_in_training(tmp_path):
    spec = saved(tmp_path, image=(IMAGE, cells(2)), label=(TEXT, ["cow", "bee"]))
    assert open_source(spec, image_size=6, classes=("ant", "bee", "cow")).labels.tolist() == [2, 1]
    with pytest.raises(DataError, match="row 0 is 'cow': not one of 2 classes"):
        open_source(spec, image_size=6, classes=("ant", "bee")).required_labels()


# --- what a row may point at ---


def test_a_row_may_point_at_files_inside_its_own_folder(tmp_path):
    (tmp_path / "set").mkdir()
    for number, pixels in enumerate(pictures(2)):
        (tmp_path / f"set/{number}.png").write_bytes(png(pixels, 8, 2))
    paths = ["0.png", str(tmp_path / "set/1.png")]
    table(image=(STRUCT, [{"bytes": None, "path": path} for path in paths])).to_parquet(tmp_path / "set/train.parquet")
    assert values(open_source(f"parquet:{tmp_path}/set", image_size=6, cache=False)) == [10, 11]
    table(file=(TEXT, paths)).to_parquet(tmp_path / "set/train.parquet")
    assert values(open_source(f"parquet:{tmp_path}/set", image_size=6, image_column="file", cache=False)) == [10, 11]


SEEN: list[tuple[str, str]] | None = None  # by a hook that cannot be taken away


@pytest.fixture(scope="module", autouse=True)
def _watch():
    sys.addaudithook(lambda event, arguments: None if SEEN is None else SEEN.append((event, str(*arguments[:1]))))


@contextmanager
def opened() -> Iterator[list[tuple[str, str]]]:
    """What Python opens or connects to meanwhile."""
    global SEEN
    SEEN = seen = []
    try:
        yield seen
    finally:
        SEEN = None


def test_a_row_may_point_nowhere_else(tmp_path):
    served = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served.append(self.path)

    root, secret = tmp_path / "set", tmp_path / "secret.png"
    (root / "sub").mkdir(parents=True)
    secret.write_bytes(png(scene(), 8, 2))
    (root / "link.png").symlink_to(secret)
    (root / "sub/up").symlink_to(tmp_path)
    os.mkfifo(root / "fifo.png")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        attacks = [
            str(secret), "../secret.png", "sub/../../secret.png", f"./{'../' * 20}etc/passwd", "/etc/passwd",
            "link.png", "sub/up/secret.png", "/proc/self/environ", "/dev/zero", "/dev/stdin", "fifo.png", "sub", ".",
            "~/.ssh/id_rsa", f"file://{secret}", f"http://{host}/x.png", f"https://{host}/x.png", "//etc/passwd", "",
            f"ftp://{host}/x",
            f"zip://x.png::http://{host}/x.zip", f"simplecache::http://{host}/x", "s3://bucket/x.png", "gs://b/x.png",
            "hf://datasets/a/b/x.png", "x\0.png", "C:\\Windows\\x.png", "nothing.png", f"{root}/../secret.png",
        ]  # fmt: skip
        assert len(attacks) >= 25
        rows = [{"bytes": None, "path": path} for path in attacks]
        table(image=(STRUCT, [*rows, *cells(1)])).to_parquet(root / "train.parquet")
        table(image=(TEXT, [*attacks, "nothing"])).to_parquet(root / "validation.parquet")
        source = open_source(f"parquet:{root}", image_size=6, cache=False)
        files = open_source(f"parquet:{root}", split="test", image_size=6, image_column="image", cache=False)
        with opened() as seen:
            samples = source.read(np.arange(len(attacks)))
            for id in range(len(files)):
                with pytest.raises(ImageError):
                    files.image(id)
        server.shutdown()
    assert [line.id for line in samples.bad] == list(range(len(attacks)))
    assert (samples.pixels == 10).all()
    assert not served
    assert not [event for event, _ in seen if event.startswith(("socket.", "urllib."))]
    assert not [path for event, path in seen if event == "open" and str(root) not in path]


def to_a_split(root: Path, outside: Path, split: str) -> None:
    (root / "dataset_dict.json").write_text(f'{{"splits": ["{split}"]}}')


def to_a_link(root: Path, outside: Path, name: str) -> None:
    """In the place of what has this name in the folder, a link to what has it outside."""
    there = root / name
    shutil.rmtree(there) if there.is_dir() else there.unlink()
    there.symlink_to(outside / name)


def to_a_pipe(root: Path, outside: Path, name: str) -> None:
    (root / name).unlink()
    os.mkfifo(root / name)


ARROW = "train/data-00000-of-00001.arrow"
LEADS_OUT = {
    "a split above": (to_a_split, "../outside/train"),
    "a split by its whole path": (to_a_split, "{}/train"),
    "a split above by a way back": (to_a_split, "train/../../outside/train"),
    "the folder above": (to_a_split, ".."),
    "an address": (to_a_split, "x::http://127.0.0.1:9/x"),
    "a linked split": (to_a_link, "train"),
    "a linked list of splits": (to_a_link, "dataset_dict.json"),
    "a linked state": (to_a_link, "train/state.json"),
    "a linked description": (to_a_link, "train/dataset_info.json"),
    "linked data": (to_a_link, ARROW),
    "a pipe for state": (to_a_pipe, "train/state.json"),
    "a pipe for data": (to_a_pipe, ARROW),
}


@pytest.mark.parametrize("case", LEADS_OUT)
def test_a_saved_set_leads_nowhere_outside_its_folder(tmp_path, monkeypatch, case):
    root, outside = tmp_path / "set", tmp_path / "outside"
    for folder in (root, outside):
        datasets.DatasetDict(train=table(image=(STRUCT, cells(3)))).save_to_disk(folder)
    change, name = LEADS_OUT[case]
    change(root, outside, name.format(outside))
    # Arrow opens files where Python does not see it.
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: pytest.fail("it was left to datasets"))
    with opened() as seen, pytest.raises(NoInput, match=f"disk:{root} is not a folder that Dataset.save_to_disk wrote"):
        open_source(f"disk:{root}", image_size=6)
    assert not [path for event, path in seen if event == "open" and "outside" in os.path.realpath(path)]
    assert not [event for event, _ in seen if event.startswith(("socket.", "urllib."))]


def test_a_saved_set_may_have_links_inside_its_folder(tmp_path):
    datasets.DatasetDict(train=table(image=(IMAGE, cells(3)))).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / ARROW).rename(tmp_path / "set/data.arrow")
    (tmp_path / "set" / ARROW).symlink_to("../data.arrow")
    assert values(open_source(f"disk:{tmp_path}/set", image_size=6, cache=False)) == [10, 11, 12]


def files_below(tmp_path) -> tuple[Path, list[str]]:
    root = tmp_path / "files"
    (root / "sub").mkdir(parents=True)
    for name, pixels in zip(("0.png", "sub/1.png"), pictures(2), strict=True):
        (root / name).write_bytes(png(pixels, 8, 2))
    return root, ["sub/1.png", str(root / "0.png"), "sub/../0.png"]


def naming(column: str, paths: list[str]) -> tuple:
    """A column whose rows name these files."""
    return {"struct": (STRUCT, [{"bytes": None, "path": path} for path in paths]), "text": (TEXT, paths)}[column]


@pytest.mark.parametrize("store", [as_disk, as_parquet])
@pytest.mark.parametrize("column", ["struct", "text"])
def test_rows_that_name_files_are_read_below_the_root(tmp_path, store, column):
    root, paths = files_below(tmp_path)
    columns = {"file_name": naming(column, paths), "note": (TEXT, ["a"] * 3), "label": (CLASS, [1, 0, 1])}
    source = open_source(store(tmp_path, table(**columns)), image_size=6, cache=False, root=root)
    assert (values(source), source.labels.tolist(), source.classes) == ([11, 10, 10], [1, 0, 1], ("no", "yes"))
    assert source.store.sizes.tolist() == [(root / path).stat().st_size for path in paths]


def test_a_stream_whose_rows_name_files_reads_them_below_the_root(tmp_path):
    root, paths = files_below(tmp_path)
    table(path=naming("text", paths)).to_parquet(tmp_path / "train.parquet")
    options = {"epoch_images": 3, "canvas": 8, "root": root}
    stream = Stream(f"parquet:{tmp_path}/train.parquet", **options)
    assert [stream.decode(row)[0, 0, 0].item() for _, row in stream.shard(0)] == [11, 10, 10]
    with pytest.raises(ValueError, match=r"--root .* not for webdataset"):
        Stream(f"webdataset:{tmp_path}/train.tar", **options)


@pytest.mark.parametrize("column", ["struct", "text"])
def test_no_row_leaves_the_root(tmp_path, column):
    root, paths = files_below(tmp_path)
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(scene(), 8, 2))
    (root / "link.png").symlink_to(secret)
    (root / "up").symlink_to(tmp_path)
    attacks = [str(secret), "../secret.png", "sub/../../secret.png", "link.png", "up/secret.png", "/etc/passwd",
               "/proc/self/environ", "/dev/zero", "up/..", f"{root}/../secret.png", "x\0.png"]  # fmt: skip
    opened, watching = [], [True]
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if watching and event == "open" else None)
    for number, attack in enumerate(attacks):
        file = tmp_path / f"train-{number}.parquet"
        table(image=naming(column, [*paths, attack])).to_parquet(file)
        with pytest.raises(DataError, match=r"which is not inside|zero byte"):
            open_source(f"parquet:{file}", image_size=6, cache=False, root=root)
    watching.clear()
    assert not [
        file for file in opened if "secret" in file or str(root) in file or file in ("/etc/passwd", "/dev/zero")
    ]


def test_a_missing_file_is_a_bad_image_and_most_missing_is_a_wrong_root(tmp_path):
    root = files_below(tmp_path)[0]
    table(path=naming("text", ["0.png", "sub/1.png", "no.png"])).to_parquet(tmp_path / "train.parquet")
    source = open_source(f"parquet:{tmp_path}/train.parquet", image_size=6, cache=False, root=root)
    assert [line.path for line in source.read(np.arange(3)).bad] == [f"{root}/no.png"]
    with pytest.raises(
        NoInput,
        match=r"most files that .* names are not below .* --root must be that folder",
    ):
        open_source(f"parquet:{tmp_path}/train.parquet", image_size=6, root=root / "sub")


def test_a_root_is_refused_where_rows_hold_images_or_name_nothing(tmp_path):
    spec = saved(tmp_path, image=(IMAGE, cells(2)), number=(NUMBER, [0, 1]), path=(TEXT, ["a.png", None]))
    with pytest.raises(ValueError, match=r"--root .*: rows of disk:.* contain images in 'image'"):
        open_source(spec, image_size=6, root=tmp_path)
    with pytest.raises(ValueError, match=r"--root .*: column 'number' of disk:.* is int64"):
        open_source(spec, image_size=6, root=tmp_path, image_column="number")
    with pytest.raises(DataError, match=r"disk:.*, row 1: column 'path' names no file"):
        open_source(spec, image_size=6, root=tmp_path, image_column="path")


def test_rows_that_name_files_elsewhere_are_refused_with_the_root_flag(tmp_path):
    root, paths = files_below(tmp_path)
    spec = saved(tmp_path, image=naming("struct", paths))
    with pytest.raises(DataError, match=r"outside the data's own folder, which is not read; --root"):
        open_source(spec, image_size=6, cache=False).read(np.arange(3))
    (tmp_path / "set").rename(tmp_path / "relative")
    spec_of_text = saved(tmp_path, path=naming("text", paths[:1] * 2))
    with pytest.raises(DataError, match="no such file in the data's own folder; --root names another one"):
        open_source(spec_of_text, image_size=6, image_column="path", cache=False).read(np.arange(2))
    with pytest.raises(ValueError, match=r"no column holds images: .*; if one names files, set --root"):
        open_source(saved(tmp_path / "b", path=naming("text", paths)), image_size=6)
    moved = f"disk:{tmp_path}/relative"
    assert values(open_source(moved, image_size=6, cache=False, root=root)) == [11, 10, 10]


# --- names ---


def test_a_folder_is_never_taken_for_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil/evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="hf:evil is a local folder: use folder:evil"):
        open_source("hf:evil", image_size=6)
    for name in ("../evil", "a/b/c", "https://x.y/z", "x:../y", "name with spaces", ""):
        with pytest.raises(ValueError, match="hf:"):
            open_source(f"hf:{name}", image_size=6)
    with pytest.raises(DataError, match="save_to_disk"):
        open_source("disk:evil", image_size=6)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("disk:{}/nothing", "is not a folder: the nearest folder is {}"),
        ("parquet:{}/nothing/*.parquet", "no .parquet files match {}/nothing"),
        ("parquet:{}", "no .parquet files match {}: it is a folder"),
    ],
)
def test_missing_data_is_named_in_one_sentence(tmp_path, spec, message):
    with pytest.raises(NoInput) as caught:
        open_source(spec.format(tmp_path), image_size=6)
    assert message.format(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=f"parquet:{tmp_path} cannot be read"):
        open_source(f"parquet:{tmp_path}", image_size=6)


def test_a_dataset_that_was_shuffled_or_selected_is_read_in_its_new_order(tmp_path):
    from sslvit.data.readers.columns import ReadOptions
    from sslvit.data.readers.tables import TableStore

    store = TableStore(table(image=(IMAGE, cells(5)), label=(CLASS, [0, 1, 1, 0, 1])).select([3, 1]), [], ReadOptions())
    source = EncodedSource(store, name="selected", canvas=(6, 7))
    assert values(source) == [13, 11]
    assert source.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    "state",
    ["[]", "null", '{"_data_files": [{"filename": "/etc/passwd"}]}', '{"_data_files": [{"filename": "../x.arrow"}]}'],
)
def test_a_saved_set_whose_state_is_odd_or_points_elsewhere_is_refused(tmp_path, state):
    table(image=(STRUCT, cells(3))).save_to_disk(str(tmp_path / "set"))
    (tmp_path / "set" / "state.json").write_text(state)
    with pytest.raises(NoInput, match=r"disk:.* is not a folder that Dataset.save_to_disk wrote images to"):
        open_source(f"disk:{tmp_path}/set", image_size=6)
