"""Pictures in folders: one folder a class, or one flat folder with a list of labels."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from replknet._errors import UsageError
from replknet.data.images import IMAGE_SUFFIXES, is_image_name, load_image

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "test"),
}


class FolderSet:
    """`ROOT/CLASS/**/picture`: classes are the sub-folders in sorted order.

    Hidden files and folders are passed over, links are followed, suffixes count in any case.

    Raises:
        UsageError: no such folder, no class folders, or a class folder without pictures.
    """

    def __init__(self, root: Path):
        self.root = require_folder(root)
        self.class_names = _sub_folders(self.root)
        if not self.class_names:
            raise UsageError(f"{root}: no class folders in it; expected {root}/CLASS/picture.jpg")
        names, targets = [], []
        empty = []
        for target, class_name in enumerate(self.class_names):
            found = sorted(_pictures(self.root / class_name))
            if not found:
                empty.append(class_name)
            names += [os.fsencode(name.relative_to(self.root)) for name in found]
            targets += [target] * len(found)
        if empty:
            shown = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
            raise UsageError(
                f"{root}: no pictures in class folder {shown}; remove it or add pictures ({' '.join(IMAGE_SUFFIXES)})"
            )
        # Arrays, not lists: a million Python strings would be copied into every worker by their reference counts.
        self._names = np.array(names, dtype=np.bytes_)
        self.labels = np.array(targets, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._names[index]))

    def read(self, index: int, in_chans: int) -> tuple[Image.Image, int]:
        return load_image(self.name(index), in_chans=in_chans), int(self.labels[index])


class FlatSet:
    """Pictures side by side in one folder and a text file with their labels, as ImageNet's validation set comes.

    The list holds a line for each picture: `NAME LABEL`, or `LABEL` alone in the sorted order of the names. A label is
    a class index from 0, or a class name (a WordNet id, for example) whose index is its place in sorted order, among
    `class_names` if given.

    Raises:
        UsageError: folder or list missing, counts that differ, a picture without a label, labels out of range.
    """

    def __init__(
        self, root: Path, labels: Path, *, num_classes: int | None = None, class_names: list[str] | None = None
    ):
        self.root = require_folder(root)
        names = sorted(
            entry.name for entry in os.scandir(self.root) if is_image_name(entry.name) and not entry.is_dir()
        )
        if not names:
            raise UsageError(f"{root}: no pictures in it ({' '.join(IMAGE_SUFFIXES)})")
        values = _labels_of(names, labels)
        self.class_names, self.labels = _class_indices(values, labels, num_classes, class_names)
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self._names[index])

    def read(self, index: int, in_chans: int) -> tuple[Image.Image, int]:
        return load_image(self.name(index), in_chans=in_chans), int(self.labels[index])


def split_folder(root: Path, split: str) -> Path:
    """The folder of a split under `root`, or `root` itself where it is no root of splits."""
    require_folder(root)
    known = {name: part for part, names in SPLIT_FOLDERS.items() for name in names}
    present = {entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name in known}
    for name in SPLIT_FOLDERS.get(split, (split,)):
        if (root / name).is_dir():
            return root / name
    if present:
        wanted = " or ".join(SPLIT_FOLDERS.get(split, (split,)))
        raise UsageError(f"{root}: found {', '.join(sorted(present))} but no folder {wanted} for the {split} split")
    return root


def require_folder(path: Path) -> Path:
    if not path.exists():
        raise UsageError(f"{path}: no such folder")
    if not path.is_dir():
        raise UsageError(f"{path}: a file, where a folder of pictures was expected")
    return path


def has_class_folders(root: Path) -> bool:
    return bool(_sub_folders(root))


def find_pictures(root: Path) -> list[Path]:
    """All pictures under a folder, sorted."""
    return sorted(_pictures(require_folder(root)))


def _sub_folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _pictures(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    real = os.path.realpath(folder)
    # A link to a folder above itself would go round for ever.
    if real in above:
        return
    for entry in os.scandir(folder):
        if entry.is_dir():
            if not entry.name.startswith("."):
                yield from _pictures(folder / entry.name, (*above, real))
        elif is_image_name(entry.name):
            yield folder / entry.name


def _labels_of(names: list[str], labels: Path) -> list[str]:
    if not labels.is_file():
        raise UsageError(f"{labels}: no such list of labels")
    try:
        lines = [line.strip() for line in labels.read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError(f"{labels}: not a text file") from error
    rows = [line.replace(",", " ").rsplit(None, 1) for line in lines]
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(names):
            raise UsageError(f"{labels}: {len(rows)} labels for {len(names)} pictures")
        return [row[0] for row in rows]
    if bad := [number for number, row in enumerate(rows, 1) if len(row) != 2]:
        raise UsageError(f"{labels}: line {bad[0]} is not `NAME LABEL`: {lines[bad[0] - 1]!r}")
    table = {os.path.basename(name): label for name, label in rows}
    stems = {os.path.splitext(name)[0]: label for name, label in table.items()}
    found = [table.get(name, stems.get(os.path.splitext(name)[0])) for name in names]
    if missing := [name for name, label in zip(names, found, strict=True) if label is None]:
        raise UsageError(f"{labels}: no label for {len(missing)} pictures, {missing[0]} for one")
    return [label for label in found if label is not None]


def _class_indices(
    values: list[str], labels: Path, num_classes: int | None, class_names: list[str] | None
) -> tuple[list[str], np.ndarray]:
    # Classes that are called by numbers need not be in their order: names win over indices.
    named = class_names is not None and set(values) <= set(class_names)
    if not named and all(value.lstrip("-").isdigit() for value in values):
        numbers = np.array([int(value) for value in values], dtype=np.int64)
        count = len(class_names) if class_names else num_classes or int(numbers.max()) + 1
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= count:
            hint = (
                "; labels from 1 are the development kit's own numbers, which are not in the order of the classes: "
                "use a list with WordNet ids or indices from 0"
            )
            raise UsageError(
                f"{labels}: labels run from {low} to {high}, indices of {count} classes run from 0 to {count - 1}"
                + (hint if low == 1 else "")
            )
        return class_names or [str(index) for index in range(count)], numbers
    order = class_names or sorted(set(values))
    index = {name: position for position, name in enumerate(order)}
    if unknown := sorted(set(values) - set(index)):
        raise UsageError(
            f"{labels}: unknown class {unknown[0]!r}; {len(order)} classes are known, {order[0]!r} for one"
        )
    return order, np.array([index[value] for value in values], dtype=np.int64)
