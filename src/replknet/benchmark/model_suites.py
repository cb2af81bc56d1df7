"""Named comparisons of whole networks: which networks, in which ways, at which sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_PEERS = ("convnext_base", "swin_base_patch4_window7_224")
_OURS: dict[str, Any] = {"convolutions": ("optimize",), "merged": (True,)}
_THEIRS: dict[str, Any] = {"convolutions": ("torch",), "merged": (False,)}
_GPU: dict[str, Any] = {"dtypes": ("bfloat16",), "formats": ("channels_last",), "executions": ("compile",)}

_CPU: dict[str, Any] = {"dtypes": ("float32", "bfloat16"), "formats": ("channels_last",)}


@dataclass(frozen=True)
class Entry:
    """Networks that are measured in the same ways; `options` are those of `ModelSettings`, by name."""

    models: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)


def _against(ours: tuple[str, ...], theirs: tuple[str, ...], **options: Any) -> list[Entry]:
    return [Entry(ours, {**_GPU, **_OURS, **options}), Entry(theirs, {**_GPU, **_THEIRS, **options})]


SUITES: dict[str, list[Entry]] = {
    "inference": _against(("replknet_31b",), _PEERS, batches=(64,)),
    "training": _against(("replknet_31b",), _PEERS, batches=(64,), modes=("training",)),
    "latency": _against(("replknet_31b",), _PEERS, batches=(1,), executions=("compile_graph",)),
    "large": [
        *_against(("replknet_31l",), ("convnext_large",), batches=(32,), size=(384, 384)),
        *_against(("replknet_xl",), ("convnext_xlarge",), batches=(32,), size=(320, 320)),
    ],
    "dense": [
        *_against(("replknet_31b",), ("convnext_base",), batches=(1,), modes=("erf",), size=(1024, 1024)),
        *_against(("replknet_31b",), ("convnext_base",), batches=(1,), modes=("features",), size=(512, 2048)),
    ],
    "accelerate": [
        Entry(("convnext_base",), {**_GPU, "batches": (64,), "convolutions": ("torch", "replknet", "optimize")}),
    ],
    "cpu": [
        Entry(("replknet_31b",), {"batches": (1,), "convolutions": ("torch", "replknet"), "merged": (False, True)}),
        Entry(("replknet_31b",), {"batches": (1,), **_OURS, **_CPU}),
        Entry(("replknet_31b",), {"batches": (1,), **_THEIRS, "merged": (True,), "executions": ("onnxruntime",)}),
        Entry(("replknet_31b",), {"batches": (8,), "modes": ("training",), "convolutions": ("torch",)}),
        Entry(("replknet_31b",), {"batches": (8,), "modes": ("training",), **_OURS, **_CPU}),
    ],
}
"""What each suite measures; "cpu" eager, ours in bfloat16 too, the others on a GPU in bfloat16, compiled."""
