"""Folders as people have them: hidden files, links, odd suffixes, missing labels."""

import os

import pytest

from replknet._errors import UsageError
from replknet.data import open_dataset
from replknet.data.folders import FlatSet, FolderSet, find_pictures, split_folder


def test_classes_are_sorted_folders(tmp_path, write_classes):
    root = write_classes(tmp_path / "set", {"zebra": 2, "ant": 3, "Bee": 1})
    images = FolderSet(root)
    assert images.class_names == ["Bee", "ant", "zebra"]
    assert images.labels.tolist() == [0, 1, 1, 1, 2, 2]
    picture, label = images.read(5, 3)
    assert (picture.size, label) == ((48, 40), 2)
    assert images.name(5) == str(root / "zebra" / "001.png")


def test_what_is_no_picture_is_passed_over(tmp_path, write_classes):
    root = write_classes(tmp_path / "set", {"a": 2, "b": 1})
    (root / "a" / ".hidden.png").write_bytes(b"")
    (root / "a" / "notes.txt").write_text("no picture")
    (root / ".git").mkdir()
    (root / "labels.csv").write_text("")
    (root / "a" / ".thumbs").mkdir()
    (root / "a" / ".thumbs" / "x.png").write_bytes(b"")
    (root / "b" / "deep" / "deeper").mkdir(parents=True)
    (root / "a" / "000.png").rename(root / "b" / "deep" / "deeper" / "UPPER.PNG")
    images = FolderSet(root)
    assert images.class_names == ["a", "b"]
    names = [os.path.relpath(images.name(index), root) for index in range(len(images))]
    assert names == ["a/001.png", "b/000.png", "b/deep/deeper/UPPER.PNG"]


def test_links_are_followed_and_loops_end(tmp_path, write_classes):
    root = write_classes(tmp_path / "set", {"a": 2})
    os.symlink(root / "a", root / "linked")
    os.symlink(root, root / "a" / "loop")
    images = FolderSet(root)
    assert images.class_names == ["a", "linked"]
    assert 4 <= len(images) < 40


def test_names_in_any_language(tmp_path, write_classes):
    root = write_classes(tmp_path / "set", {"größe 1": 1, "猫": 1})
    images = FolderSet(root)
    for index in range(2):
        assert images.read(index, 3)[1] == index


@pytest.mark.parametrize("kind", ["missing", "file", "no classes", "empty class"])
def test_unusable_folders_are_named(tmp_path, write_classes, kind):
    root = tmp_path / "set"
    if kind == "file":
        root.write_text("")
    elif kind == "no classes":
        root.mkdir()
    elif kind == "empty class":
        write_classes(root, {"full": 1})
        (root / "void").mkdir()
    words = {"missing": "no such", "file": "a file", "no classes": "no class folders", "empty class": "void"}
    with pytest.raises(UsageError, match=words[kind]) as caught:
        FolderSet(root)
    assert str(root) in str(caught.value)


def test_split_folders(tmp_path, write_classes):
    write_classes(tmp_path / "set" / "train", {"a": 1})
    with pytest.raises(UsageError, match="no folder val or valid"):
        split_folder(tmp_path / "set", "validation")
    write_classes(tmp_path / "set" / "val", {"a": 1})
    assert split_folder(tmp_path / "set", "validation").name == "val"
    assert split_folder(tmp_path / "set", "train").name == "train"
    assert split_folder(tmp_path / "set" / "val", "validation").name == "val"


@pytest.mark.parametrize("style", ["names", "stems", "comma", "alone", "words"])
def test_flat_folder_with_labels(tmp_path, write_classes, style):
    flat = write_classes(tmp_path, {"flat": 4}) / "flat"
    numbers = [2, 0, 1, 2]
    lines = {
        "names": [f"{index:03d}.png {label}" for index, label in enumerate(numbers)],
        "stems": [f"val/{index:03d} {label}" for index, label in enumerate(numbers)],
        "comma": [f"{index:03d}.png,{label}" for index, label in reversed(list(enumerate(numbers)))],
        "alone": [str(label) for label in numbers],
        "words": [f"{index:03d}.png {'xyz'[label]}" for index, label in enumerate(numbers)],
    }
    (tmp_path / "labels.txt").write_text("\n".join(lines[style]) + "\n\n")
    images = open_dataset(str(flat), split="validation", labels=tmp_path / "labels.txt")
    assert isinstance(images, FlatSet)
    assert [images.read(index, 3)[1] for index in range(4)] == numbers
    assert images.class_names == (["x", "y", "z"] if style == "words" else ["0", "1", "2"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\n1\n", "2 labels for 4 pictures"),
        ("000.png 0\n001.png 1\n", "no label for 2 pictures, 002.png"),
        ("1\n2\n3\n4\n", "development kit"),
        ("-1\n2\n3\n0\n", "run from -1"),
        ("000.png 0\nnonsense\n", "line 2"),
        ("", "0 labels for 4"),
    ],
    ids=str,
)
def test_wrong_label_lists_are_named(tmp_path, write_classes, text, message):
    flat = write_classes(tmp_path, {"flat": 4}) / "flat"
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(UsageError, match=message):
        FlatSet(flat, tmp_path / "labels.txt", num_classes=4)


def test_label_list_missing_or_binary(tmp_path, write_classes):
    flat = write_classes(tmp_path, {"flat": 1}) / "flat"
    with pytest.raises(UsageError, match="no such list"):
        FlatSet(flat, tmp_path / "absent.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UsageError, match="not a text file"):
        FlatSet(flat, tmp_path / "binary.txt")
    with pytest.raises(UsageError, match="needs a label list"):
        open_dataset(str(flat))


def test_find_pictures(tmp_path, write_classes):
    root = write_classes(tmp_path / "set", {"b": 1, "a": 1})
    assert find_pictures(root) == [root / "a" / "000.png", root / "b" / "000.png"]


def test_classes_called_by_numbers_are_names(tmp_path, write_classes):
    flat = write_classes(tmp_path, {"flat": 3}) / "flat"
    (tmp_path / "labels.txt").write_text("10\n2\n1\n")
    images = FlatSet(flat, tmp_path / "labels.txt", class_names=["1", "10", "2"])
    assert images.labels.tolist() == [1, 2, 0]
