"""Image transforms of the official release, built from timm's and torchvision's pieces.

Evaluation: bicubic. At 384 and above the picture is warped to the square and nothing is cut off; below, the short side
becomes int(size / 0.875) and the centre is cropped; at 32 and below (small-image sets) the picture is resized to the
square, which leaves a picture of that size as it is. Mean and standard deviation belong to the weights.

Source: the official release's evaluation and fine-tuning scripts (2022), arXiv:2203.06717 appendix A.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from PIL import Image, ImageOps
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode

from replknet._errors import UsageError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

CropMode = Literal["auto", "center", "squash", "border"]
Transform = Callable[[Any], Tensor]

# Up to this size a training crop is a shifted copy of the picture (padding 4), not a resized part of it.
SMALL_IMAGE = 32
# From this size on the release warps to the square instead of cropping.
WARP_FROM = 384


@dataclass(frozen=True)
class ImageFormat:
    """What a network expects of its input.

    Attributes:
        size: side of the square input, pixels.
        mean, std: per channel, of pixel values in [0, 1].
        in_chans: 3 (RGB) or 1 (grey).
        crop_mode: "auto" is the release's rule (see the module); the others are timm's.
        crop_pct: share of the resized picture that "center" keeps.
        interpolation: PIL's name of the filter.
    """

    size: int = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    in_chans: int = 3
    crop_mode: CropMode = "auto"
    crop_pct: float = 0.875
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"image size {self.size}: give a positive number of pixels")
        if self.in_chans not in (1, 3):
            raise UsageError(f"in_chans {self.in_chans}: pictures are read as RGB (3) or grey (1)")
        if not 0 < self.crop_pct <= 1:
            raise UsageError(f"crop_pct {self.crop_pct}: give a share in (0, 1]")
        for name in ("mean", "std"):
            object.__setattr__(self, name, _per_channel(name, getattr(self, name), self.in_chans))
        if min(self.std) <= 0:
            raise UsageError(f"std {self.std}: every value must be above 0")

    def resolved_crop(self) -> tuple[str, float]:
        """timm's (crop_mode, crop_pct) after the "auto" rule."""
        if self.crop_mode != "auto":
            return self.crop_mode, self.crop_pct
        if self.size >= WARP_FROM or self.size <= SMALL_IMAGE:
            return "squash", 1.0
        return "center", self.crop_pct

    def with_size(self, size: int) -> "ImageFormat":
        """The same format at another size."""
        return replace(self, size=size)


@dataclass(frozen=True)
class Augmentation:
    """Training-time randomness; the defaults are the release's ImageNet recipe.

    Attributes:
        auto_augment: timm's RandAugment/AutoAugment string, or None.
        color_jitter: brightness/contrast/saturation factor; by timm's rule it acts only without auto_augment.
        erasing: probability of random erasing, filled per pixel with standard normal noise after normalisation.
        hflip: probability of a left-right flip; 0 where left and right mean something (digits).
        scale: area range of the random resized crop.
        crop: "resized", "shift" (pad by 4, crop; for small pictures), "none", or "auto": shift up to 32 pixels.
        rotate: largest random rotation in degrees, "shift" crops only.
    """

    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    erasing: float = 0.25
    hflip: float = 0.5
    scale: tuple[float, float] = (0.08, 1.0)
    crop: Literal["auto", "resized", "shift", "none"] = "auto"
    rotate: float = 0.0

    def resolved_crop(self, size: int) -> str:
        if self.crop != "auto":
            return self.crop
        return "shift" if size <= SMALL_IMAGE else "resized"


NO_AUGMENTATION = Augmentation(auto_augment=None, color_jitter=0.0, erasing=0.0, hflip=0.0, crop="none")
# Handwritten digits: mirrored digits are other signs, and colours are not there to be changed.
DIGIT_AUGMENTATION = Augmentation(
    auto_augment=None, color_jitter=0.0, erasing=0.0, hflip=0.0, crop="shift", rotate=10.0
)


def evaluation_transform(image: ImageFormat, *, normalize: bool = True) -> Transform:
    """PIL picture → `[in_chans, size, size]`: float32 and normalised, or uint8 with `normalize=False`."""
    crop_mode, crop_pct = image.resolved_crop()
    return _timm(
        input_size=(image.in_chans, image.size, image.size),
        is_training=False,
        interpolation=image.interpolation,
        mean=image.mean,
        std=image.std,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        normalize=normalize,
    )


def training_transform(image: ImageFormat, augmentation: Augmentation, *, normalize: bool = True) -> Transform:
    """PIL picture → `[in_chans, size, size]`, randomly changed.

    With `normalize=False` the result is uint8 and random erasing is left to `DeviceTransform`, since its noise is
    drawn in normalised units.
    """
    crop = augmentation.resolved_crop(image.size)
    if crop == "none":
        return evaluation_transform(replace(image, crop_mode="squash", crop_pct=1.0), normalize=normalize)
    if crop == "shift":
        return _small_image_transform(image, augmentation, normalize)
    return _timm(
        input_size=(image.in_chans, image.size, image.size),
        is_training=True,
        scale=augmentation.scale,
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation=image.interpolation,
        mean=image.mean,
        std=image.std,
        re_prob=augmentation.erasing if normalize else 0.0,
        re_mode="pixel",
        normalize=normalize,
    )


class DeviceTransform:
    """Normalise uint8 batches (and erase, in training) on the device where they are.

    The values equal those of the worker-side transform up to float32 rounding. Erasing draws from the global generators
    of Python and torch.
    """

    def __init__(self, image: ImageFormat, *, erasing: float = 0.0):
        self._scale = torch.tensor(image.std).mul(255.0).view(1, -1, 1, 1)
        self._shift = torch.tensor(image.mean).mul(255.0).view(1, -1, 1, 1)
        self._erasing = erasing

    def __call__(self, images: Tensor, *, training: bool = False) -> Tensor:
        """`images`: uint8 `[N, C, H, W]` → float32, same shape and memory format; float input is returned as it is."""
        if images.dtype != torch.uint8:
            return images
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        out = images.float().sub_(self._shift).div_(self._scale)
        if training and self._erasing > 0:
            RandomErasing(self._erasing, mode="pixel", max_count=1, device=str(images.device))(out)
        return out


def _small_image_transform(image: ImageFormat, augmentation: Augmentation, normalize: bool) -> Transform:
    steps: list[Any] = [tv.Resize((image.size, image.size), interpolation=InterpolationMode.BICUBIC)]
    if augmentation.rotate > 0:
        steps.append(tv.RandomRotation(augmentation.rotate, interpolation=InterpolationMode.BILINEAR))
    steps.append(tv.RandomCrop(image.size, padding=4))
    # timm's transform does the rest; its resized crop is left out.
    primary, secondary, final = _timm(
        input_size=(image.in_chans, image.size, image.size),
        is_training=True,
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter,
        auto_augment=augmentation.auto_augment,
        interpolation=image.interpolation,
        mean=image.mean,
        std=image.std,
        re_prob=augmentation.erasing if normalize else 0.0,
        re_mode="pixel",
        normalize=normalize,
        separate=True,
    )
    flips = [step for step in primary.transforms if isinstance(step, tv.RandomHorizontalFlip)]
    return tv.Compose([*steps, *flips, *secondary.transforms, *final.transforms])


def _timm(**options: Any) -> Any:
    # Its annotation is a union with a kind of transform that these options never give.
    made: Any = create_transform(**options)
    for part in made if isinstance(made, tuple) else (made,):
        for step in part.transforms:
            for operation in getattr(step, "ops", ()):
                if operation.name.startswith("Posterize"):
                    operation.aug_fn = _posterize
    return made


def _posterize(picture: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's posterize; at full strength it keeps 0 bits, which Pillow 13 refuses and older ones turn black."""
    if bits < 1:
        return Image.new(picture.mode, picture.size)
    return picture if bits >= 8 else ImageOps.posterize(picture, bits)


def _per_channel(name: str, values: Sequence[float] | float, in_chans: int) -> tuple[float, ...]:
    values = (values,) if isinstance(values, (int, float)) else tuple(values)
    if len(values) == 1:
        values = values * in_chans
    if in_chans == 1 and len(values) == 3:
        # A grey picture has one channel: the mean of the three values serves it.
        values = (sum(values) / 3,)
    if len(values) != in_chans:
        raise UsageError(f"{name} {values}: give 1 or {in_chans} values for {in_chans} input channels")
    return tuple(float(value) for value in values)
