"""Options that several commands read the same way."""

import re

import torch

from replknet._errors import UsageError

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def parse_size(text: str | int) -> tuple[int, int]:
    """`1024` or `768x1024` (height x width) to `(height, width)`."""
    match = re.fullmatch(r"(\d+)(?:[x×](\d+))?", str(text).strip())
    if not match or int(match[1]) < 1 or (match[2] and int(match[2]) < 1):
        raise UsageError(f"--size {text}: give pixels as 1024, or height x width as 768x1024")
    return int(match[1]), int(match[2] or match[1])


def parse_device(text: str) -> torch.device:
    """`auto` is the first CUDA GPU, or the CPU where there is none."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise UsageError(f"--device {text}: give auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {text}: this machine has {torch.cuda.device_count()} CUDA GPUs")
    return device


def file_stem(label: str) -> str:
    """A label as part of a file name."""
    return re.sub(r"[^\w.+-]+", "_", label).strip("_.") or "model"
