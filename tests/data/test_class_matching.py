"""Classes of data sets and outputs of networks."""

import json

import pytest
from timm.data import ImageNetInfo

from replknet._errors import UsageError
from replknet.data.class_matching import imagenet_ids, match_classes, read_real_labels

IDS = ImageNetInfo("imagenet-1k").label_names()


def test_wordnet_ids_find_their_outputs():
    some = sorted(IDS)[3:900:7]
    match = match_classes(some, 1000)
    assert [IDS[target] for target in match.targets] == some
    assert match.is_subset
    assert match.rule == "WordNet ids"
    assert not match_classes(sorted(IDS), 1000).is_subset


def test_a_22k_head_is_matched_by_its_own_order():
    ids = imagenet_ids(21841)
    assert ids is not None
    match = match_classes(["n02504458", "n01440764"], 21841)
    assert [ids[target] for target in match.targets] == ["n02504458", "n01440764"]
    # A third-party port of the release's 22K weights finds African elephant here.
    assert match.targets[0] == 3674


def test_folders_of_numbers_are_numbers():
    # As ImageNet-V2's folders sort: "0", "1", "10", "100", ...
    names = sorted(str(number) for number in range(1000))
    match = match_classes(names, 1000)
    assert match.targets == [int(name) for name in names]
    assert not match.is_subset


def test_own_names_and_order():
    assert match_classes(["cat", "ant"], 3, own_names=["ant", "bee", "cat"]).targets == [2, 0]
    assert match_classes(["x", "y"], 2) == match_classes(["x", "y"], 2)
    assert match_classes(["x", "y"], 2).rule == "order"
    assert match_classes(None, 4).targets == [0, 1, 2, 3]
    # Digits trained on folders "0".."9" are told by name, not by number.
    assert match_classes(["7", "1"], 3, own_names=["1", "7", "8"]).targets == [1, 0]


@pytest.mark.parametrize(
    ("names", "outputs", "own", "message"),
    [
        (["a", "b", "c"], 2, None, "3 classes .* 2 outputs"),
        (["a", "b"], 3, None, "2 classes .* 3 outputs"),
        (["5", "9"], 8, None, "2 classes"),
        (["ant", "dog"], 3, ["ant", "bee", "cat"], "dog of the data are unknown"),
        (["n99999999", "n01440764"], 1000, None, "n99999999 are not among"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(names, outputs, own, message):
    with pytest.raises(UsageError, match=message):
        match_classes(names, outputs, own_names=own)


def test_real_labels(tmp_path):
    path = tmp_path / "real.json"
    path.write_text(json.dumps([[1], [], [3, 4]]))
    names = ["ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000001.JPEG"]
    assert read_real_labels(path, names) == [[3, 4], [1]]
    with pytest.raises(UsageError, match=r"for 1 pictures, ILSVRC2012_val_00000009"):
        read_real_labels(path, ["ILSVRC2012_val_00000009.JPEG", *names])
    with pytest.raises(UsageError, match="other"):
        read_real_labels(path, ["other.jpg"])
    path.write_text(json.dumps({"a.jpg": [5]}))
    assert read_real_labels(path, ["a.png"]) == [[5]]
    path.write_text("{")
    with pytest.raises(UsageError, match="not a JSON"):
        read_real_labels(path, names)
    with pytest.raises(UsageError, match="no such file"):
        read_real_labels(tmp_path / "absent.json", names)
