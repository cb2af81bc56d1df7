"""One function from a source string to a set of pictures.

| source | what |
|---|---|
| `digits` | embedded: 1797 handwritten digits of scikit-learn |
| `PATH` | folder of class folders, or of split folders (train, val, ...) that hold them |
| `PATH` with a label list | one flat folder, as ImageNet's validation set comes |
| `wds/PATH` | WebDataset tar shards: a folder, one file, or `name-{000..127}.tar` |
| `torch/NAME` | torchvision sets: cifar10, cifar100, mnist and the others in `TORCHVISION` |
| `hfds/NAME`, `hfids/NAME` | Hugging Face sets, by number or streamed (needs the package datasets) |
| `tfds/NAME` | TensorFlow sets (needs tensorflow-datasets) |
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.readers.reader_factory import create_reader

from replknet import _env
from replknet._errors import RunError, UsageError
from replknet.data.embedded import DigitsSet
from replknet.data.folders import SPLIT_FOLDERS, FlatSet, FolderSet, has_class_folders, split_folder
from replknet.data.images import load_image
from replknet.data.sampler import world
from replknet.data.samples import ImageSet
from replknet.data.streams import ImageStream, ReaderStream, ShardSet, find_shards

SCHEMES = ("torch", "hfds", "hfids", "wds", "tfds")
TORCHVISION = (
    "cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "qmnist", "places365", "inaturalist", "imagenet",
)  # fmt: skip
_PACKAGES = {"hfds": "datasets", "hfids": "datasets", "wds": "webdataset", "tfds": "tensorflow-datasets"}


def open_dataset(
    source: str,
    *,
    split: str = "train",
    labels: str | Path | None = None,
    root: str | Path | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    num_samples: int | None = None,
    training: bool | None = None,
    batch_size: int = 1,
    seed: int = 0,
    download: bool = False,
) -> ImageSet | ImageStream:
    """Open a data set.

    Args:
        source: see the module.
        split: "train", "validation", or a split's own name (Hugging Face and TensorFlow sets).
        labels: label list of a flat folder.
        root: where torchvision, Hugging Face and TensorFlow sets lie; the cache folder by default.
        num_classes: of a flat folder whose labels do not reach the last class.
        class_names: of a flat folder: the classes that its labels name or number, in order.
        num_samples: length of a stream that does not tell it.
        training: streams shuffle; by default for split "train".
        batch_size, seed: handed to timm's streaming readers.
        download: let torchvision, Hugging Face and TensorFlow sets download.

    Raises:
        UsageError: nothing there, no classes, no pictures, an unknown scheme or a package that is not installed.
    """
    training = split == "train" if training is None else training
    scheme, _, name = source.partition("/")
    if source == "digits":
        return DigitsSet(split)
    if scheme in SCHEMES and name and not Path(source).exists():
        if scheme == "torch":
            return TorchvisionSet(name, split, _root(root), download)
        if scheme == "wds" and "://" not in name and not name.startswith("pipe:"):
            return ShardSet(find_shards(name if root is None else str(Path(root) / name), split))
        return _timm_reader(scheme, source, split, root, num_samples, training, batch_size, seed, download)
    return _local(source, split, labels, num_classes, class_names)


def _local(
    source: str, split: str, labels: str | Path | None, num_classes: int | None, class_names: Sequence[str] | None
) -> ImageSet | ImageStream:
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".tar":
        return ShardSet([path])
    if not path.exists():
        raise UsageError(
            f"{source}: no such data; give a folder of class folders, digits, or one of "
            + ", ".join(f"{scheme}/NAME" for scheme in SCHEMES)
        )
    folder = split_folder(path, split)
    if labels is not None:
        names = None if class_names is None else list(class_names)
        return FlatSet(folder, Path(labels).expanduser(), num_classes=num_classes, class_names=names)
    if not has_class_folders(folder) and any(item.is_file() for item in folder.iterdir()):
        raise UsageError(
            f"{folder}: files and no class folders; a flat folder of pictures needs a label list (labels=FILE)"
        )
    return FolderSet(folder)


class TorchvisionSet:
    """A classification set of torchvision, by timm's name for it."""

    def __init__(self, name: str, split: str, root: Path, download: bool):
        if name not in TORCHVISION:
            raise UsageError(f"torch/{name}: unknown; known are {', '.join(f'torch/{known}' for known in TORCHVISION)}")
        if download:
            root.mkdir(parents=True, exist_ok=True)
        try:
            self._data: Any = create_dataset(f"torch/{name}", root=str(root), split=split, download=download)
        except (RuntimeError, OSError, ValueError) as error:
            hint = "" if download else "; allow its download, or give the folder that holds it"
            raise UsageError(f"torch/{name}: not found whole under {root}{hint} ({error})") from error
        classes = getattr(self._data, "classes", None) or getattr(self._data, "all_categories", None)
        if not classes:
            raise RunError(f"torch/{name}: torchvision gives no class names for it")
        self.class_names = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in classes]
        self._name = f"torch/{name}/{split}"

    def __len__(self) -> int:
        return len(self._data)

    def name(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def read(self, index: int, in_chans: int) -> tuple[Image.Image, int]:
        picture, target = self._data[index]
        return load_image(picture, in_chans=in_chans, name=self.name(index)), int(target)


class ReaderSet:
    """A timm reader with random access (`hfds/`)."""

    def __init__(self, reader, name: str):
        self._reader, self._name = reader, name
        classes = getattr(reader, "class_to_idx", None) or {}
        if not classes:
            raise UsageError(f"{name}: its label field has no class names; only classification sets can be used")
        self.class_names = [str(entry) for entry in sorted(classes, key=classes.__getitem__)]

    def __len__(self) -> int:
        return len(self._reader)

    def name(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def read(self, index: int, in_chans: int) -> tuple[Image.Image, int]:
        file, target, *_ = self._reader[index]
        with file:
            return load_image(file, in_chans=in_chans, name=self.name(index)), int(target)


def _timm_reader(
    scheme: str,
    source: str,
    split: str,
    root: str | Path | None,
    num_samples: int | None,
    training: bool,
    batch_size: int,
    seed: int,
    download: bool,
) -> ImageSet | ImageStream:
    name = source.partition("/")[2]
    stream = {"num_samples": num_samples, "is_training": training, "batch_size": batch_size, "seed": seed}
    options: dict[str, Any] = {} if scheme == "hfds" else stream
    if scheme in ("hfids", "tfds"):
        options["download"] = download
    if scheme == "wds":
        root, _, split = name.rpartition("/")
    if not training and scheme != "hfids" and world()[1] > 1 and scheme != "hfds":
        raise UsageError(
            f"{source}: this reader cannot split an evaluation exactly over {world()[1]} processes; "
            "use one, or a local copy"
        )
    missing = f"{source}: needs a package that is not installed: pip install {_PACKAGES[scheme]}"
    try:
        reader = _first_split(source, root, split, options)
    except ImportError as error:
        raise UsageError(missing) from error
    except (RuntimeError, ValueError, OSError, AssertionError) as error:
        if "install" in str(error).lower():
            raise UsageError(missing) from error
        raise UsageError(f"{source}, split {split}: cannot be opened ({error})") from error
    return ReaderSet(reader, source) if scheme == "hfds" else ReaderStream(reader, source)


def _first_split(source: str, root: str | Path | None, split: str, options: dict[str, Any]) -> Any:
    """The reader of `split`, or for "validation" of the first split that the set has of those called so."""
    names = SPLIT_FOLDERS.get(split, (split,)) if not source.startswith("wds/") else (split,)
    names = (split, *(name for name in names if name != split))
    for name in names:
        try:
            reader = create_reader(source, root=None if root is None else str(root), split=name, **options)
            if source.startswith("hfids/") and not options["download"]:
                # It would tell a wrong split only inside a worker, at the first picture.
                reader.builder.as_streaming_dataset(split=name)  # type: ignore[attr-defined]
            return reader
        except ValueError as error:
            # The readers' libraries name the splits that they know; anything else would fail for every name.
            if "split" not in str(error).lower() or name == names[-1]:
                raise
    raise AssertionError(names)


def _root(root: str | Path | None) -> Path:
    return Path(root).expanduser() if root is not None else _env.cache_dir() / "data"
