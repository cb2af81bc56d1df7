"""A segmentor together with all that is needed to use it: pipelines, class names, colours."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS, MODELS, TRANSFORMS
from PIL import Image
from torch import Tensor, nn

from replknet._errors import UsageError
from replknet.data.images import load_image
from replknet.layers import reparameterize
from replknet.tasks.openmmlab.checkpoint_files import read_runner_checkpoint, weights_file
from replknet.tasks.openmmlab.configs import config_of_checkpoint
from replknet.tasks.openmmlab.runner import Precision, autocast, load_weights
from replknet.tasks.segmentation.folder_dataset import CLASS_LIST, default_palette, read_classes
from replknet.tasks.segmentation.official import official_config, official_segmentor

Mode = Literal["whole", "slide"]
HEADS = ("decode_head", "auxiliary_head")


@dataclass(frozen=True)
class OpenedSegmentor:
    """A segmentor ready for use, in evaluation mode.

    Attributes:
        model: mmseg's segmentor, or its test-time-augmentation wrapper.
        config: what it was built from.
        classes: names in the order of labels.
        palette: a colour (red, green, blue) a class.
        pipeline: from `{"img": [H, W, 3] uint8, blue first}` to the model's input.
        device: of the model.
        precision: of the forward pass.
        source: where the weights come from.
    """

    model: nn.Module
    config: Config
    classes: list[str]
    palette: list[list[int]]
    pipeline: Compose
    device: torch.device
    precision: Precision
    source: str

    @torch.no_grad()
    def segment(self, picture: str | Path | Image.Image) -> np.ndarray:
        """Label map `[H, W]`, int64, of a picture as large as it is.

        Raises:
            BrokenImageError: the file cannot be read as a picture.
        """
        image = picture if isinstance(picture, Image.Image) else load_image(Path(picture))
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
        with segmentation_scope():
            batch = pseudo_collate([self.pipeline({"img": pixels})])
        with autocast(self.device, self.precision):
            (sample,) = self.model.test_step(batch)  # type: ignore[operator]
        return sample.pred_sem_seg.data.reshape(pixels.shape[:2]).cpu().numpy().astype(np.int64)


def open_segmentor(
    weights: str | Path | None = None,
    *,
    config: Config | None = None,
    mode: Mode | None = None,
    tta: bool = False,
    merged: bool = True,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
) -> OpenedSegmentor:
    """Build a segmentor with its weights and find out how to feed it.

    Args:
        weights: name of official weights, an official file of the 0.x release, or a checkpoint of the Runner.
        config: what the weights were trained with; may be left out where the weights know it.
        mode: whole picture, or overlapping windows; None as in the config.
        tta: average over six sizes and mirror images, as in the config's `tta_pipeline`.
        merged: re-parameterise the backbone: same labels, faster.
        device: of the model.
        precision: of the forward pass.

    Raises:
        UsageError: neither weights nor config, or a request that the config cannot meet.
        RunError: weights that do not fit.
    """
    config, weights = resolve_config(weights, config)
    model = build_segmentor(config, mode)
    if weights is not None:
        load_weights(model, weights)
    model = prepare_for_inference(model, merged=merged)
    classes, palette = class_list(config, weights, int(model.num_classes))  # type: ignore[arg-type]
    pipeline = _pipeline(config, tta)
    if tta:
        wrapper = {**config.get("tta_model", {"type": "SegTTAModel"}), "module": model}
        with segmentation_scope():
            model = MODELS.build(wrapper).eval()
    chosen = torch.device(device)
    source = "untrained" if weights is None else str(weights)
    return OpenedSegmentor(model.to(chosen), config, classes, palette, pipeline, chosen, precision, Path(source).name)


def resolve_config(weights: str | Path | None, config: Config | None) -> tuple[Config, str | Path | None]:
    """The config to use, and the weights; a given config wins over the weights' own.

    Raises:
        UsageError: the weights do not know their config and none was given.
    """
    entry = None if weights is None else official_segmentor(weights)
    if config is not None:
        return config, weights
    if weights is None:
        raise UsageError("give --weights (official weights' name, or a checkpoint) or --config")
    if entry is not None:
        return official_config(entry), weights
    return config_of_checkpoint(read_runner_checkpoint(weights_file(weights)), str(weights)), weights


def build_segmentor(config: Config, mode: Mode | None = None) -> nn.Module:
    """The config's segmentor with random weights, in training mode, with plain batch norm for SyncBN.

    Raises:
        UsageError: the config holds no segmentor, or no window for mode "slide".
    """
    if "model" not in config:
        raise UsageError("the config has no model")
    described = inference_cfg(config.model, mode)
    _fill_classes(described, config)
    try:
        with segmentation_scope():
            model = MODELS.build(described)
    except (KeyError, TypeError, AssertionError) as error:
        raise UsageError(f"the config's model cannot be built: {error.args[0] if error.args else error}") from error
    return revert_sync_batchnorm(model)


def inference_cfg(model: Any, mode: Mode | None = None) -> Any:
    """A model's description without the weights it would start training from, and with another test mode."""
    described = copy.deepcopy(model)
    described.pop("pretrained", None)
    for key in ("init_cfg", "pretrained"):
        described["backbone"].pop(key, None)
    if mode is not None:
        described["test_cfg"] = _test_cfg(described, mode)
    return described


def _fill_classes(model: Any, config: Config) -> None:
    """Give heads that leave their number of classes open the data set's."""
    for name in HEADS:
        if model.get(name) is not None and "num_classes" in model[name] and model[name]["num_classes"] is None:
            found = _configured(config)
            if not found:
                raise UsageError(
                    f"the config leaves the number of classes open and its data set is not there: set --cfg_options "
                    f"model.{name}.num_classes"
                )
            model[name]["num_classes"] = len(found["classes"])


def prepare_for_inference(model: nn.Module, *, merged: bool = True) -> nn.Module:
    """In evaluation mode, without the auxiliary head, and with the backbone re-parameterised if `merged`."""
    model = model.eval()
    if hasattr(model, "auxiliary_head"):
        del model.auxiliary_head
    if merged:
        reparameterize(model.backbone)  # type: ignore[arg-type]
    return model


class LogitsModel(nn.Module):
    """Pixels to logits, for export and timing: `[N, 3, H, W]`, red first, 0 to 255, to `[N, classes, H, W]`.

    The test mode, windows and sizes around it are left out: one forward pass of the whole input.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        parts: Any = model
        self.backbone, self.decode_head = parts.backbone, parts.decode_head
        self.align_corners = bool(parts.align_corners)
        self.mean, self.std = (nn.Buffer(t.clone(), persistent=False) for t in _statistics(parts.data_preprocessor))

    def forward(self, x: Tensor) -> Tensor:
        """Logits as large as the picture."""
        maps = self.backbone((x - self.mean) / self.std)
        logits = self.decode_head(maps)
        return nn.functional.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=self.align_corners)


def _statistics(preprocessor: Any) -> tuple[Tensor, Tensor]:
    return preprocessor.mean, preprocessor.std


@contextmanager
def segmentation_scope() -> Iterator[None]:
    """Inside, names in configs mean MMSegmentation's classes."""
    with DefaultScope.overwrite_default_scope("mmseg"):
        yield


def class_list(config: Config, weights: str | Path | None, outputs: int) -> tuple[list[str], list[list[int]]]:
    """Names and colours of `outputs` classes: the checkpoint's own, the config's, the data set's, else numbers."""
    for found in (_stored(weights), _configured(config)):
        if found and len(found["classes"]) == outputs:
            names = [str(name).strip() for name in found["classes"]]
            return names, [list(color) for color in found.get("palette") or default_palette(outputs)]
    return [str(index) for index in range(outputs)], default_palette(outputs)


def _stored(weights: str | Path | None) -> dict[str, Any] | None:
    if weights is None:
        return None
    meta = read_runner_checkpoint(weights).get("meta") or {}
    found = meta.get("dataset_meta") or {"classes": meta.get("CLASSES"), "palette": meta.get("PALETTE")}
    return dict(found) if found.get("classes") else None


def _configured(config: Config) -> dict[str, Any] | None:
    if "metainfo" in config:
        return dict(config.metainfo)
    loader = config.get("test_dataloader") or config.get("val_dataloader") or config.get("train_dataloader")
    return None if loader is None else dataset_meta(loader["dataset"])


def dataset_meta(dataset: dict[str, Any]) -> dict[str, Any] | None:
    """Classes and palette of a data set that a config describes; None where it does not tell."""
    if (dataset.get("metainfo") or {}).get("classes"):
        return dict(dataset["metainfo"])
    if dataset["type"] == "SegmentationFolder":
        path = Path(str(dataset.get("data_root"))) / CLASS_LIST
        if not path.is_file():
            return None
        classes, palette = read_classes(path)
        return {"classes": classes, "palette": palette or default_palette(len(classes))}
    with segmentation_scope():
        cls = DATASETS.get(dataset["type"])
    return dict(getattr(cls, "METAINFO", {})) or None


def _test_cfg(model: Any, mode: Mode) -> dict[str, Any]:
    given = dict(model.get("test_cfg") or {})
    if mode == "whole":
        return {"mode": "whole"}
    if "crop_size" not in given:
        size = (model.get("data_preprocessor") or {}).get("size")
        if size is None:
            raise UsageError("--mode slide: the config tells no crop size; add model.test_cfg.crop_size and stride")
        given.update(crop_size=tuple(size), stride=tuple(side * 2 // 3 for side in size))
    return {**given, "mode": "slide"}


def _pipeline(config: Config, tta: bool) -> Compose:
    key = "tta_pipeline" if tta else "test_pipeline"
    steps = config.get(key)
    if steps is None and not tta and "test_dataloader" in config:
        steps = config.test_dataloader.dataset.pipeline
    if not steps:
        raise UsageError(f"the config has no {key}")
    with segmentation_scope():
        return Compose([TRANSFORMS.build(step) for step in _without_labels(steps)])


def _without_labels(steps: Sequence[Any]) -> list[Any]:
    """The steps for a picture that is in memory already and has no label map."""
    kept = []
    for step in steps:
        if step["type"] == "LoadImageFromFile":
            kept.append({"type": "LoadImageFromNDArray"})
        elif step["type"] == "TestTimeAug":
            branches = [_without_labels(branch) for branch in step["transforms"]]
            kept.append({**step, "transforms": [branch for branch in branches if branch]})
        elif "Annotations" not in step["type"]:
            kept.append(dict(step))
    return kept
