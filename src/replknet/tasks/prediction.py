"""The best classes of single pictures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from replknet._errors import UsageError
from replknet.data.folders import find_pictures
from replknet.data.images import BrokenImageError, load_image
from replknet.data.transforms import ImageFormat, evaluation_transform


@dataclass(frozen=True)
class Prediction:
    """One picture's best classes, or why there are none.

    Attributes:
        path: the picture.
        classes: indices of the network's outputs, best first.
        scores: their softmax probabilities.
        error: why the picture could not be read, or None.
    """

    path: Path
    classes: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    error: str | None = None


def find_inputs(arguments: Sequence[str]) -> list[Path]:
    """Pictures named by files, folders (everything below them) and glob patterns, each once, in the given order.

    A file is taken whatever its name; whether it is a picture shows when it is read.

    Raises:
        UsageError: nothing there, or a folder or pattern without pictures.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument).expanduser()
        if path.is_dir():
            names = find_pictures(path)
            if not names:
                raise UsageError(f"{argument}: no pictures in this folder")
        elif path.exists() or path.is_symlink():
            names = [path]
        elif has_magic(argument):
            names = [Path(name) for name in sorted(glob(str(path), recursive=True)) if Path(name).is_file()]
            if not names:
                raise UsageError(f"{argument}: no file fits this pattern")
        else:
            raise UsageError(f"{argument}: no such file or folder")
        found.update(dict.fromkeys(names))
    return list(found)


def predict(
    model: nn.Module,
    paths: Sequence[Path],
    image: ImageFormat,
    *,
    top: int = 5,
    batch_size: int = 16,
    workers: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Iterator[Prediction]:
    """Predictions in the order of `paths`; a picture that cannot be read, or that the
    network has no finite answer to, gives its error, and the others go on.

    Args:
        model: images `[N, C, H, W]` → logits `[N, outputs]`; put in evaluation mode.
        paths: pictures.
        image: input format.
        top: classes to name, at most the outputs.
        batch_size: pictures at a time.
        workers: processes that decode.
        device, dtype: where and in what precision to run; bfloat16 and float16 under autocast.
    """
    if top < 1:
        raise UsageError(f"top {top}: give 1 or more")
    place = torch.device(device)
    model = model.to(place).eval()
    loader = DataLoader(
        _Pictures(paths, image), batch_size=batch_size, num_workers=workers, collate_fn=_collate, shuffle=False
    )
    position = 0
    for images, errors in loader:
        logits = _logits(model, images.to(place), dtype) if len(images) else None
        row = 0
        for error in errors:
            path = paths[position]
            position += 1
            if error is not None or logits is None:
                yield Prediction(path, error=error)
                continue
            answer = logits[row]
            row += 1
            if not answer.isfinite().all():
                yield Prediction(path, error=f"{path}: the network's outputs are infinite or not numbers")
                continue
            scores, classes = answer.softmax(0).topk(min(top, len(answer)))
            yield Prediction(path, tuple(classes.tolist()), tuple(scores.tolist()))


def _logits(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(), torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        return model(images).float()


class _Pictures(Dataset):
    def __init__(self, paths: Sequence[Path], image: ImageFormat):
        self._paths, self._image, self._transform = paths, image, evaluation_transform(image)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor | None, str | None]:
        try:
            return self._transform(load_image(self._paths[index], in_chans=self._image.in_chans)), None
        except BrokenImageError as error:
            return None, str(error)


def _collate(batch: list[tuple[Tensor | None, str | None]]) -> tuple[Tensor, list[str | None]]:
    tensors = [tensor for tensor, _ in batch if tensor is not None]
    return torch.stack(tensors) if tensors else torch.empty(0), [error for _, error in batch]
