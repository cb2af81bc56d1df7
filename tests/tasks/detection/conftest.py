"""Two real annotated photographs in COCO's format, and small detectors."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mmdet", reason="needs pip install 'replknet[detection]'")
# Before anything of mmdet: it puts the operators in place that mmdet imports.
pytest.importorskip("replknet.tasks.detection", reason="needs pip install 'replknet[detection]'")

import imgviz
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
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


def losses_of(detector: torch.nn.Module, masks: bool, size: tuple[int, int] = (96, 128)) -> dict[str, torch.Tensor]:
    """Losses of one step on a picture with two objects, by mmdet's own data structures.

    Args:
        detector: in training mode.
        masks: give the objects masks.
        size: height and width of the picture.
    """
    height, width = size
    meta = {"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0), "img_id": 1}
    share = torch.tensor([width, height, width, height])
    instances = InstanceData()
    instances.bboxes = torch.tensor([[0.06, 0.1, 0.47, 0.73], [0.55, 0.21, 0.94, 0.94]]) * share
    instances.labels = torch.tensor([3, 5])
    if masks:
        painted = np.zeros((2, height, width), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(painted, instances.bboxes.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        instances.masks = BitmapMasks(painted, height, width)
    sample = DetDataSample(metainfo=meta)
    sample.gt_instances = instances
    pixels = torch.randint(0, 255, (3, *size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    batch = detector.data_preprocessor({"inputs": [pixels], "data_samples": [sample]}, True)
    torch.manual_seed(0)
    np.random.seed(0)
    found = detector(**batch, mode="loss")
    flat = {k: sum(v) if isinstance(v, list) else v for k, v in found.items()}
    return {k: v for k, v in flat.items() if "loss" in k}
