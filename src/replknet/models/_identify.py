"""Which RepLKNet a state dict belongs to, read from its names and shapes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from replknet.models.family import ARCHITECTURES

_FFN = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.pw2\.conv\.weight$")
_KERNEL = re.compile(r"stages\.(\d+)\.blocks\.0\.large_kernel\.(?:lkb_origin\.conv|lkb_reparam)\.weight$")


@dataclass(frozen=True)
class Identity:
    """What the names and shapes of a state dict say; empty fields for anything but a RepLKNet."""

    layers: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    kernel_sizes: tuple[int, ...] = ()

    @property
    def names(self) -> list[str]:
        """Named models with this architecture."""
        return [
            name
            for name, a in ARCHITECTURES.items()
            if (a["layers"], a["channels"], a["kernel_sizes"]) == (self.layers, self.channels, self.kernel_sizes)
        ]

    @property
    def description(self) -> str:
        """The architecture in words; empty for anything but a RepLKNet."""
        if not self.layers:
            return ""
        if self.names:
            return f"it fits {' or '.join(self.names)}"
        return (
            f"a RepLKNet with kernel_sizes={self.kernel_sizes}, layers={self.layers}, channels={self.channels}, "
            "which no named model has"
        )

    def differs_from(self, model: nn.Module) -> bool:
        """Whether `model` is something else than this RepLKNet."""
        own = identify(model.state_dict())
        return bool(self.layers) and own != self


def identify(tensors: Mapping[str, Tensor]) -> Identity:
    """Read layers, channels and kernel sizes from release-named tensors in any form."""
    channels, blocks, kernels = {}, {}, {}
    for name, value in tensors.items():
        if match := _FFN.search(name):
            stage = int(match[1])
            channels[stage] = value.shape[0]
            blocks[stage] = max(blocks.get(stage, 0), int(match[2]) + 1)
        elif match := _KERNEL.search(name):
            kernels[int(match[1])] = value.shape[-1]
    if not kernels or kernels.keys() != channels.keys():
        return Identity()
    stages = sorted(kernels)
    return Identity(
        tuple(blocks[s] // 2 for s in stages), tuple(channels[s] for s in stages), tuple(kernels[s] for s in stages)
    )
