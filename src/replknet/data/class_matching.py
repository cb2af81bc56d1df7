"""Which output of a network stands for which class of a data set, and the label lists of ImageNet's test sets."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

from replknet._errors import UsageError


@dataclass(frozen=True)
class ClassMatch:
    """Output of the network for every class of the data, and how it was found.

    Attributes:
        targets: `targets[class of the data]` is an output of the network.
        outputs: number of outputs.
        rule: "own names", "WordNet ids", "numbers" or "order".
    """

    targets: list[int]
    outputs: int
    rule: str

    @property
    def is_subset(self) -> bool:
        return len(set(self.targets)) < self.outputs


def match_classes(
    data_names: Sequence[str] | None, outputs: int, *, own_names: Sequence[str] | None = None
) -> ClassMatch:
    """Match the classes of a data set to the outputs of a network.

    By the network's own class names if it was trained with some; by WordNet ids if the classes are called so
    (ImageNet, -Sketch, -A, -R) and the network has an ImageNet head; by number if all names are numbers (ImageNet-V2,
    whose folders 0 to 999 sort wrongly as text); by order if the counts are equal.

    Args:
        data_names: class names in the data's order; None where the data do not tell them (streams).
        outputs: outputs of the network.
        own_names: class names stored with the network.

    Raises:
        UsageError: nothing fits; the message names both sides.
    """
    if data_names is None:
        return ClassMatch(list(range(outputs)), outputs, "numbers")
    names = list(data_names)
    if own_names is not None and set(names) <= set(own_names):
        place = {name: index for index, name in enumerate(own_names)}
        return ClassMatch([place[name] for name in names], outputs, "own names")
    if (ids := imagenet_ids(outputs)) is not None and all(re.fullmatch(r"n\d{8}", name) for name in names):
        place = {name: index for index, name in enumerate(ids)}
        if strange := [name for name in names if name not in place]:
            raise UsageError(f"classes {', '.join(strange[:5])} are not among the network's {outputs} ImageNet classes")
        return ClassMatch([place[name] for name in names], outputs, "WordNet ids")
    numbers = [int(name) for name in names if re.fullmatch(r"\d+", name)]
    if len(numbers) == len(names) and max(numbers, default=0) < outputs and own_names is None:
        return ClassMatch(numbers, outputs, "numbers")
    if len(names) == outputs and own_names is None:
        return ClassMatch(list(range(outputs)), outputs, "order")
    if own_names is not None:
        strange = [name for name in names if name not in set(own_names)]
        raise UsageError(
            f"classes {', '.join(strange[:5])} of the data are unknown to the network, which was trained on "
            f"{', '.join(list(own_names)[:5])}{' ...' if len(own_names) > 5 else ''}"
        )
    raise UsageError(
        f"the data have {len(names)} classes ({names[0]!r}, ...) and the network {outputs} outputs; "
        "a subset is matched by WordNet ids or by numbers as folder names"
    )


def imagenet_ids(outputs: int) -> list[str] | None:
    """WordNet ids of the outputs of an ImageNet head, told by their number (1000, 21841, ...), or None."""
    subset = infer_imagenet_subset({"num_classes": outputs})
    return ImageNetInfo(subset).label_names() if subset else None


def read_real_labels(path: Path, names: Sequence[str]) -> list[list[int]]:
    """ReaL labels of ImageNet's validation pictures, in the order of `names`.

    Args:
        path: the published `real.json`: 50,000 lists of class indices, the first for ILSVRC2012_val_00000001; or an
            object from file names to such lists.
        names: file names of the pictures.

    Source: Beyer et al. 2020, arXiv:2006.07159.
    """
    try:
        labels = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file of ReaL labels") from error
    except ValueError as error:
        raise UsageError(f"{path}: not a JSON file ({error})") from error
    if isinstance(labels, dict):
        table = {Path(name).stem: entry for name, entry in labels.items()}
        keys: list = [Path(name).stem for name in names]
    else:
        table = dict(enumerate(labels, 1))
        keys = [_number(name) for name in names]
    if missing := [name for name, key in zip(names, keys, strict=True) if key not in table]:
        raise UsageError(f"{path}: no ReaL labels for {len(missing)} pictures, {missing[0]} for one")
    return [[int(label) for label in table[key]] for key in keys]


def _number(name: str) -> int:
    match = re.search(r"_val_(\d+)\.\w+$", name)
    return int(match.group(1)) if match else 0
