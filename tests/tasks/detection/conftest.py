"""Two real annotated photographs in COCO's format, and small detectors."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmdet", reason="needs pip install 'replknet[detection]'")

import imgviz
import numpy as np
import torch
from PIL import Image
from pycocotools import mask as run_lengths

from replknet.tasks.detection.detector import build_detector
from replknet.tasks.openmmlab.configs import read_config

RECIPES = Path(__file__).parents[3] / "recipes" / "detection"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small layers on few cores are faster without a team of threads, and bits are compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory) -> Path:
    """`all.json` with a VOC picture (19 boxes and masks) and an ARC2017 picture (8), both beside it as PNG."""
    root = tmp_path_factory.mktemp("coco")
    images, annotations, ids = [], [], {}
    for number, name in enumerate(("voc", "arc2017"), 1):
        data = getattr(imgviz.data, name)()
        Image.fromarray(data["rgb"]).save(root / f"{name}.png")
        height, width = data["rgb"].shape[:2]
        images.append({"id": number, "file_name": f"{name}.png", "width": width, "height": height})
        for (y1, x1, y2, x2), label, mask in zip(data["bboxes"].tolist(), data["labels"], data["masks"], strict=True):
            # Ids as in COCO: not from 0, not consecutive, not in the order of the list.
            category = ids.setdefault(data["class_names"][label], 90 - 7 * len(ids))
            encoded = run_lengths.encode(np.asfortranarray((mask == 1).astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": category,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(run_lengths.area(encoded)),
                    "iscrowd": 0,
                    "segmentation": {"size": list(encoded["size"]), "counts": encoded["counts"].decode()},
                }
            )
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    dataset = {"images": images, "annotations": annotations, "categories": categories}
    (root / "all.json").write_text(json.dumps(dataset))
    return root


@pytest.fixture
def dataset(coco_folder) -> dict[str, Any]:
    """A copy of the data set to spoil."""
    return json.loads((coco_folder / "all.json").read_text())


@pytest.fixture
def written(tmp_path) -> Callable[[Any], Path]:
    """`written(dataset)` is a file with it."""

    def write(contents: Any, name: str = "some.json") -> Path:
        path = tmp_path / name
        path.write_text(contents if isinstance(contents, str) else json.dumps(contents))
        return path

    return write


@pytest.fixture(scope="session")
def small_config() -> Callable[..., Any]:
    """`small_config("fcos")`: a recipe's config with the smallest network."""

    def make(method: str):
        return read_config(RECIPES / f"replknet_nano_{method}.py")

    return make


@pytest.fixture(scope="session")
def small_detector(small_config) -> Callable[..., torch.nn.Module]:
    """`small_detector("fcos")`: seeded weights, in evaluation mode."""

    def make(method: str, **backbone: Any) -> torch.nn.Module:
        config = copy.deepcopy(small_config(method))
        config.model.backbone.update(backbone)
        torch.manual_seed(0)
        return build_detector(config).eval()

    return make
