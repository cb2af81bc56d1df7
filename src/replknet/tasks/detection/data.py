"""Data sets and picture loading for MMDetection's configs, on top of checked annotation files."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.registry import DATASETS, TRANSFORMS

from replknet._errors import RunError
from replknet.data.images import load_image
from replknet.tasks.detection.annotations import read_annotations, size_problem


class CheckedCoco(COCO):
    """pycocotools' index of a file that `read_annotations` has read."""

    def __init__(self, annotation_file: str | Path):
        super().__init__()
        self.found = read_annotations(annotation_file)
        self.dataset = self.found.dataset  # type: ignore[assignment]
        self._index()

    def _index(self) -> None:
        # pycocotools prints.
        with contextlib.redirect_stdout(io.StringIO()):
            self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    def get_cat_ids(
        self, cat_names: Sequence[str] = (), sup_names: Sequence[str] = (), cat_ids: Sequence[int] = ()
    ) -> list[int]:
        """Ids in the order of the names: label k of a model is its k-th class in any file.

        pycocotools answers in the order of the file, which shifts all labels where the orders differ.
        """
        if not cat_names:
            return self.getCatIds(list(cat_names), list(sup_names), list(cat_ids))
        ids = self.found.category_ids
        return [ids[name] for name in cat_names if name in ids]


@DATASETS.register_module()
class CocoPictures(CocoDataset):
    """mmdet's `CocoDataset` over a checked file, its labels in the order of `metainfo['classes']`."""

    COCOAPI = CheckedCoco

    def load_data_list(self) -> list[dict[str, Any]]:
        """As the base class; the ids of the classes go into the metadata, and so into checkpoints."""
        found = super().load_data_list()
        self._metainfo["category_ids"] = list(self.cat_ids)
        return found


@TRANSFORMS.register_module()
class LoadPicture(BaseTransform):
    """Decode a picture to its last byte, in BGR as OpenCV has it.

    Needs `img_path`; where `height` and `width` of the annotation are there too, they are compared. Adds `img`
    `[H, W, 3]` uint8, `img_shape` and `ori_shape`.

    Raises:
        BrokenImageError: the picture cannot be read.
        RunError: it has another size than its annotation says.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Read the picture."""
        path = results["img_path"]
        pixels = np.asarray(load_image(path))[:, :, ::-1]
        height, width = pixels.shape[:2]
        if "height" in results and "width" in results:
            problem = size_problem(path, (width, height), (results["width"], results["height"]))
            if problem:
                raise RunError(problem)
        results.update(img=np.ascontiguousarray(pixels), img_shape=(height, width), ori_shape=(height, width))
        return results
