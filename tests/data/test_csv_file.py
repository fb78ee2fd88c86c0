"""Image files beside a CSV file of labels: every dialect that people have, and nothing outside the folder."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from image_zoo import png

from sslvit.config import DataConfig
from sslvit.data.spec import open_source
from sslvit.errors import DataError, NoInput


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SSLVIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Grey pictures, each as bright as its number: 1.png to 6.png, sub/7.png, and an odd name."""
    for value, name in [*((n, f"{n}.png") for n in range(1, 7)), (7, "sub/7.png"), (8, 'a, "ž".png')]:
        file = tmp_path / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(np.full((8, 8, 3), value, np.uint8), 8, 2))
    return tmp_path / "set"


def opened(file: Path, text: str | bytes, kind: str = "csv", **options):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_source(f"{kind}:{file}", image_size=8, **options)


def shown(source) -> list[int]:
    return source.read(np.arange(len(source))).pixels[:, 0, 0, 0].tolist()


# Each names 3.png, 1.png and sub/7.png, in this order, as dog, cat and dog.
ROWS = [("3.png", "dog"), ("1.png", "cat"), ("sub/7.png", "dog")]
DIALECTS = {
    "header": "path,label\n3.png,dog\n1.png,cat\nsub/7.png,dog\n",
    "no header": "3.png,dog\n1.png,cat\nsub/7.png,dog",
    "labels first": "dog,3.png\ncat,1.png\ndog,sub/7.png\n",
    "of Windows": "\ufefffilename,class\r\n3.png,dog\r\n1.png,cat\r\nsub/7.png,dog\r\n",
    "of old Macs": "file,target\r3.png,dog\r1.png,cat\rsub/7.png,dog\r",
    "tabs": "image\tlabel\n3.png\tdog\n1.png\tcat\nsub/7.png\tdog\n",
    "semicolons": "Image Path;Class Name\n3.png;dog\n1.png;cat\nsub/7.png;dog\n",
    "quotes": '"path","label"\n"3.png","dog"\n"1.png", "cat"\nsub/7.png,dog\n',
    "spaces and blank lines": "\npath, label\n\n3.png, dog\n1.png, cat \n,\nsub/7.png, dog\n\n",
    "other columns": "id,path,size,label\n9,3.png,8,dog\n8,1.png,8,cat\n7,sub/7.png,8,dog\n",
    "unusual names of two columns": "photo,what\n3.png,dog\n1.png,cat\nsub/7.png,dog\n",
    "./ before a path": "path,label\n./3.png,dog\n./1.png,cat\nsub/../sub/7.png,dog\n",
}


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_gives_the_same_images_and_labels(folder, name):
    source = opened(folder / "labels.csv", DIALECTS[name])
    assert (shown(source), source.classes, source.labels.tolist()) == ([3, 1, 7], ("cat", "dog"), [1, 0, 1])
    assert not source.read(np.arange(3)).bad  # a header is no image


def test_names_with_commas_quotes_and_letters_of_any_language_stand_in_quotes(folder):
    source = opened(folder / "labels.csv", 'path,label\n"a, ""ž"".png","Žába, zelená"\n1.png,"cat ""Tom"""\n')
    assert (shown(source), source.classes) == ([8, 1], ('cat "Tom"', "Žába, zelená"))


def test_a_file_name_that_is_not_utf8_is_read(folder):
    try:
        os.rename(folder / "1.png", os.fsencode(folder) + b"/\xe9.png")
    except OSError:
        pytest.skip("this file system takes no such names")
    assert shown(opened(folder / "labels.csv", b"path,label\n\xe9.png,x\n2.png,y\n")) == [1, 2]


@pytest.mark.parametrize("kind", ["csv", "list"])
def test_a_list_that_ends_like_a_csv_or_tsv_file_with_a_header_is_one(folder, kind):
    for file, mark in (("labels.csv", ","), ("labels.tsv", "\t")):
        source = opened(folder / file, f"path{mark}label\n3.png{mark}10\n1.png{mark}9\n", kind)
        assert (shown(source), source.labels.tolist()) == ([3, 1], [10, 9])


def test_a_tsv_list_without_a_header_stays_a_list(folder):
    source = opened(folder / "labels.tsv", "3.png\t10\n1.png\t9\n", "list")
    assert (shown(source), source.classes, source.labels.tolist()) == ([3, 1], ("10", "9"), [0, 1])


def test_a_tsv_list_of_names_without_endings_or_that_end_with_zero_bytes_stays_a_list(folder):
    for number in (1, 2):
        (folder / f"{number}.png").rename(folder / f"{number}")
    (folder / "lists").mkdir()
    (folder / "lists/names.tsv").write_text("2\tx\n1\ty\n")
    assert shown(open_source(f"list:{folder}/lists/names.tsv,{folder}", image_size=8)) == [2, 1]
    assert shown(opened(folder / "zero.tsv", "2\tx\0001\ty\0", "list")) == [2, 1]


def test_whole_numbers_keep_their_order_and_words_are_sorted(folder):
    numbers = opened(folder / "labels.csv", "1.png,10\n2.png,9\n3.png,0\n")
    assert numbers.labels.tolist() == [10, 9, 0]
    words = opened(folder / "labels.csv", "1.png,10\n2.png,9\n3.png,none\n")
    assert (words.labels.tolist(), words.classes) == ([0, 1, 2], ("10", "9", "none"))
    test = opened(folder / "test.csv", "1.png,9\n2.png,10\n", classes=words.classes)
    assert test.labels.tolist() == [1, 0]  # numbers, but the training set's words


def test_columns_go_by_name_or_are_counted_from_1(folder):
    text = "path,other,fine,coarse\n1.png,2.png,a,x\n2.png,1.png,b,x\n"
    by_name = opened(folder / "labels.csv", text, image_column="other", label_column="fine")
    by_place = opened(folder / "labels.csv", text, image_column="2", label_column="3")
    bare = opened(folder / "labels.csv", text.partition("\n")[2], image_column="2", label_column="3")
    for source in (by_name, by_place, bare):
        assert (shown(source), source.classes) == ([2, 1], ("a", "b"))
    with pytest.raises(DataError, match=r"none of the columns path, other, fine, coarse has .*--label_column"):
        opened(folder / "labels.csv", text).required_labels()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "photo"}, "--image_column photo: .* has the columns path, kind, note"),
        ({"label_column": "5"}, "--label_column 5: .* has the columns path, kind, note"),
        ({"label_column": "0"}, "--label_column 0"),
    ],
)
def test_a_column_that_is_not_there_is_an_error_that_lists_them(folder, options, message):
    with pytest.raises(ValueError, match=message):
        opened(folder / "labels.csv", "path,kind,note\n1.png,a,b\n", **options)


def test_of_several_columns_of_paths_one_must_be_named(folder):
    with pytest.raises(ValueError, match=r"several columns may hold paths .* one of left, right with --image_column"):
        opened(folder / "labels.csv", "left,right\n1.png,2.png\n")
    with pytest.raises(ValueError, match=r"no column looks like paths .* one of id, kind with --image_column"):
        opened(folder / "labels.csv", "id,kind\n1,a\n")


BROKEN = {
    "few columns": ("path,label\n1.png,a\n\n2.png\n", DataError, "line 4 has 1 columns, the first row has 2"),
    "many columns": ("path,label\n1.png,a\na, b.png,b\n", DataError, "line 3 has 3 columns.*quote a cell"),
    "open quote": ('path,label\n1.png,"a\n2.png,b\n', DataError, "line 3: .*quote"),
    "no path": ("path,label\n1.png,a\n,b\n", DataError, "line 3: the column of images is empty"),
    "UTF-16": ("path,label\n1.png,a\n".encode("utf-16"), DataError, "is not text in UTF-8"),
    "empty": ("", NoInput, "has no rows"),
    "header alone": ("path,label\n", NoInput, "has no rows below its header"),
    "zero byte": ("path,label\n1.png,a\nx\0.png,b\n", DataError, "zero byte"),
    "elsewhere": ("path,label\nx/1.png,a\nx/2.png,b\n", NoInput, "use csv:.*/labels.csv,/that/folder or --root"),
    "no ending": ("image,label\n1,a\n2,b\n", NoInput, "1.png is a file: names need their ending"),
    "backslashes": ("path,label\nsub\\7.png,a\n", NoInput, "separator in paths must be /"),
    "URLs": ("path,label\nhttps://a.b/1.png,a\n", NoInput, "URLs are not fetched"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_one_sentence_with_its_line(folder, name):
    text, error, message = BROKEN[name]
    with pytest.raises(error, match=message) as caught:
        opened(folder / "labels.csv", text)
    assert "\n" not in str(caught.value)


def test_a_missing_label_stops_only_those_who_need_labels(folder):
    source = opened(folder / "labels.csv", "path,label\n1.png,a\n2.png,\n3.png,b\n")
    assert shown(source) == [1, 2, 3]
    with pytest.raises(DataError, match=r"labels.csv, line 3 has no label"):
        source.required_labels()


def test_a_missing_file_is_a_bad_image(folder):
    source = opened(folder / "labels.csv", "path,label\n1.png,a\nno.png,a\n3.png,b\n", cache=False)
    (bad,) = source.read(np.arange(3)).bad
    assert (bad.id, bad.path) == (1, f"{folder}/no.png")


def test_a_column_of_splits_parts_the_rows(folder):
    text = "path,label,split\n1.png,a,Train\n2.png,b,val\n3.png,b,train\n4.png,a,test\n5.png,b,test\n"
    train = opened(folder / "labels.csv", text)
    test = opened(folder / "labels.csv", text, split="test", classes=train.classes)
    assert (shown(train), train.labels.tolist()) == ([1, 3], [0, 1])
    assert (shown(test), test.labels.tolist()) == ([4, 5], [0, 1])  # test before val, as of other tables
    with pytest.raises(NoInput, match="has no test split: its column of splits holds train"):
        opened(folder / "labels.csv", "path,split\n1.png,train\n", split="test")
    with pytest.raises(NoInput, match="no test split: no column is called split"):
        opened(folder / "labels.csv", "path,label\n1.png,a\n", split="test")


def test_a_folder_holds_a_file_for_each_split(folder):
    (folder / "train.csv").write_text("path,label\n1.png,a\n2.png,b\n")
    (folder / "val.csv").write_text("path,label\n3.png,b\n")
    train = open_source(f"csv:{folder}", image_size=8)
    test = open_source(f"csv:{folder}", split="test", image_size=8, classes=train.classes)
    assert (shown(train), shown(test), test.labels.tolist()) == ([1, 2], [3], [1])
    (folder / "train-2.csv").write_text("path,label\n4.png,a\n")
    with pytest.raises(ValueError, match=r"several files for train, train-2.csv, train.csv: name one"):
        open_source(f"csv:{folder}", image_size=8)
    assert shown(open_source(f"csv:{folder}/train-2.csv", image_size=8)) == [4]
    with pytest.raises(NoInput, match=r"holds no .csv file"):
        open_source(f"csv:{folder}/sub", image_size=8)


def test_one_file_in_a_folder_is_read_by_its_column_of_splits(folder):
    (folder / "labels.csv").write_text("path,split\n1.png,train\n2.png,test\n")
    assert [shown(open_source(f"csv:{folder}", split=s, image_size=8)) for s in ("train", "test")] == [[1], [2]]


@pytest.mark.parametrize("spec", ["csv:{csv},{folder}", "csv:{csv}"])
def test_the_root_is_named_beside_the_file_or_by_its_flag(folder, tmp_path, spec):
    csv = tmp_path / "elsewhere.csv"
    csv.write_text("path,label\n1.png,a\nsub/7.png,b\n")
    root = {} if "folder" in spec else {"root": folder}
    config = DataConfig(data=spec.format(csv=csv, folder=folder), image_size=8, **root)
    assert shown(config.open()) == [1, 7]


def test_two_roots_and_roots_of_other_kinds_are_refused(folder, tmp_path):
    (tmp_path / "labels.csv").write_text("1.png,a\n")
    with pytest.raises(ValueError, match="both name a root"):
        open_source(f"csv:{tmp_path}/labels.csv,{folder}", image_size=8, root=folder)
    with pytest.raises(ValueError, match=r"--root .* is for lines or rows that name files.*not for folder"):
        open_source(f"folder:{folder}", image_size=8, root=folder)
    with pytest.raises(NoInput, match="--root /not/there is not a folder"):
        open_source(f"csv:{tmp_path}/labels.csv", image_size=8, root="/not/there")


def test_nothing_outside_the_root_is_opened(folder, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes((folder / "1.png").read_bytes())
    (folder / "link.png").symlink_to(secret)
    (folder / "up").symlink_to(tmp_path)
    attacks = [
        str(secret),
        "../secret.png",
        "sub/../../secret.png",
        "link.png",
        "up/secret.png",
        "/etc/passwd",
        "up/..",
    ]
    opened_files, watching = [], [True]
    sys.addaudithook(lambda event, args: opened_files.append(str(args[0])) if watching and event == "open" else None)
    for attack in attacks:
        with pytest.raises(DataError, match="which is not inside"):
            opened(folder / "labels.csv", f"path,label\n1.png,a\n{attack},b\n")
    watching.clear()
    assert {file for file in opened_files if not file.startswith("/proc")} == {str(folder / "labels.csv")}
