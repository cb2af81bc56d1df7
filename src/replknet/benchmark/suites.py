"""The depthwise convolutions of real networks, by stage and image size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from replknet._errors import UsageError


@dataclass(frozen=True)
class Case:
    """One depthwise convolution: `x [n, c, h, w]`, kernel `kh x kw`, and where it stands."""

    n: int
    c: int
    h: int
    w: int
    kh: int
    kw: int
    where: str = ""

    def __str__(self) -> str:
        return f"{self.n},{self.c},{self.h}x{self.w},{self.kh}x{self.kw}"


@dataclass(frozen=True)
class Network:
    """Channels of each stage and the kernels in it; stage s works at 1 / (4 * 2**s) of the image."""

    channels: tuple[int, int, int, int]
    kernels: tuple[tuple[tuple[int, int], ...], ...]


def _square(*stages: tuple[int, ...]) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(tuple((k, k) for k in stage) for stage in stages)


def _doubling(first: int) -> tuple[int, int, int, int]:
    return (first, 2 * first, 4 * first, 8 * first)


def _slak(large: tuple[int, ...]) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(((k, 5), (5, k), (5, 5)) for k in large)


_REPLKNET = _square((31, 5), (29, 5), (27, 5), (13, 5))
_UNIREPLKNET = _square((3,), (13,), (13, 3), (13,))
_SLAK = _slak((51, 49, 47, 13))
_CONVNEXT = _square((7,), (7,), (7,), (7,))
_INCEPTION = (((3, 3), (1, 11), (11, 1)),) * 4

# Channels and kernels from the papers and their released code.
NETWORKS: dict[str, Network] = {
    "replknet_31b": Network((128, 256, 512, 1024), _REPLKNET),
    "replknet_31l": Network((192, 384, 768, 1536), _REPLKNET),
    "replknet_xl": Network((384, 768, 1536, 3072), _square((27,), (27,), (27,), (13,))),
    "unireplknet_t": Network(_doubling(80), _UNIREPLKNET),
    "unireplknet_s": Network(_doubling(96), _UNIREPLKNET),
    "unireplknet_b": Network(_doubling(128), _UNIREPLKNET),
    "unireplknet_l": Network(_doubling(192), _UNIREPLKNET),
    "unireplknet_xl": Network(_doubling(256), _UNIREPLKNET),
    "slak_t": Network((124, 249, 499, 998), _SLAK),
    "slak_b": Network((166, 332, 665, 1331), _SLAK),
    "smpconv_t": Network(_doubling(96), _square((31,), (29,), (27,), (13,))),
    "smpconv_b": Network(_doubling(128), _square((31,), (29,), (27,), (13,))),
    "convnext_t": Network(_doubling(96), _CONVNEXT),
    "convnext_b": Network(_doubling(128), _CONVNEXT),
    "convnext_l": Network(_doubling(192), _CONVNEXT),
    "convnext_xl": Network(_doubling(256), _CONVNEXT),
    "inception_next_t": Network((12, 24, 48, 96), _INCEPTION),
    "inception_next_b": Network((16, 32, 64, 128), _INCEPTION),
    "overlock_t": Network((64, 128, 256, 512), _square((17,), (15,), (13,), (7,))),
    "overlock_s": Network((64, 128, 320, 512), _square((17,), (15,), (13,), (7,))),
    "overlock_b": Network((80, 160, 384, 576), _square((17,), (15,), (13,), (7,))),
    "van_b2": Network((64, 128, 320, 512), _square((5,), (5,), (5,), (5,))),
}

# Image sizes that the networks meet: classification, and the dense tasks' crops and whole images.
SIZES: dict[str, tuple[int, int]] = {
    "224": (224, 224),
    "384": (384, 384),
    "ade20k": (512, 512),
    "ade20k-whole": (512, 683),
    "cityscapes": (769, 769),
    "coco": (800, 1280),
    "erf": (1024, 1024),
}


def large() -> list[Case]:
    """RepLKNet-31B's stages at 224, the paper's widest layers, a small kernel, and SLaK's rectangles, batch 64."""
    squares = [(128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13), (384, 64, 31), (384, 64, 7)]
    cases = [Case(64, c, s, s, k, k, "large") for c, s, k in squares]
    return cases + [Case(64, 96, 56, 56, kh, kw, "large") for kh, kw in ((51, 5), (5, 51))]


def paper() -> list[Case]:
    """The 24 layers of the paper's operator benchmark: 64 x 384 x R x R, R 16, 32, 64, K 3 to 31."""
    return [Case(64, 384, r, r, k, k, "paper") for r in (16, 32, 64) for k in range(3, 32, 4)]


def cpu() -> list[Case]:
    """RepLKNet-31B's stages, a small kernel and SLaK's size, at a CPU's batch sizes."""
    rows = [(1, 128, 56, 31), (8, 128, 56, 31), (8, 256, 28, 29), (8, 512, 14, 27), (1, 1024, 7, 13)]
    rows += [(8, 1024, 7, 13), (8, 128, 56, 7), (2, 96, 56, 51)]
    return [Case(n, c, s, s, k, k, "cpu") for n, c, s, k in rows]


def network(name: str, size: tuple[int, int], batch: int) -> list[Case]:
    """Every distinct depthwise convolution of one network at an image size."""
    spec = NETWORKS[name]
    cases: list[Case] = []
    for stage, (channels, kernels) in enumerate(zip(spec.channels, spec.kernels, strict=True)):
        stride = 4 * 2**stage
        h, w = (-(-side // stride) for side in size)
        cases += [Case(batch, channels, h, w, kh, kw, f"{name} stage {stage + 1}") for kh, kw in kernels]
    return cases


SUITES = {"large": large, "paper": paper, "cpu": cpu}


def cases_of(names: Iterable[str], sizes: Iterable[str], batches: Iterable[int]) -> list[Case]:
    """Cases of suites, networks ("networks" for all) and single cases such as `64,128,56x56,31x31`; no duplicates.

    Raises:
        UsageError: an unknown name or size, or a case that does not read `N,C,HxW,KhxKw`.
    """
    cases: dict[tuple, Case] = {}
    for name in names:
        for case in _cases_of_one(name, tuple(sizes), tuple(batches)):
            cases.setdefault((case.n, case.c, case.h, case.w, case.kh, case.kw), case)
    return list(cases.values())


def _cases_of_one(name: str, sizes: tuple[str, ...], batches: tuple[int, ...]) -> list[Case]:
    if name in SUITES:
        return SUITES[name]()
    if name == "networks" or name in NETWORKS:
        wanted = list(NETWORKS) if name == "networks" else [name]
        pixels = [_size(size) for size in sizes]
        return [case for one in wanted for size in pixels for batch in batches for case in network(one, size, batch)]
    if "," in name:
        return [_parse(name)]
    known = ", ".join([*SUITES, "networks", *NETWORKS])
    raise UsageError(f"unknown suite {name!r}; known are {known}, or a case such as 64,128,56x56,31x31")


def _size(text: str) -> tuple[int, int]:
    if text in SIZES:
        return SIZES[text]
    parts = text.split("x")
    if len(parts) <= 2 and all(part.isdigit() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[-1])
    raise UsageError(f"unknown image size {text!r}; give {', '.join(SIZES)}, pixels, or HxW")


def _parse(text: str) -> Case:
    parts = text.split(",")
    pairs = [part.split("x") for part in parts]
    if len(parts) != 4 or any(len(pair) > 2 or not all(p.isdigit() and int(p) > 0 for p in pair) for pair in pairs):
        raise UsageError(f"case {text!r} must read N,C,HxW,KhxKw, for example 64,128,56x56,31x31")
    (n, *_), (c, *_), size, kernel = ([int(p) for p in pair] for pair in pairs)
    if kernel[0] % 2 == 0 or kernel[-1] % 2 == 0:
        raise UsageError(f"case {text!r} has an even kernel; the operator takes odd ones")
    return Case(n, c, size[0], size[-1], kernel[0], kernel[-1], "given")
