"""Run under compute-sanitizer by test_sanitizer.py: small problems in every pass, dtype and format."""

import itertools
import sys

import torch
import torch.nn.functional as F

from replknet.ops import cuda
from replknet.ops.cuda import _compile, _plan_channels_last

# N, C, H, W, kernel height, kernel width
PROBLEMS = [
    (2, 16, 20, 24, 7, 7),
    (3, 9, 14, 14, 13, 13),
    (2, 8, 33, 20, 31, 31),
    (1, 24, 56, 56, 31, 31),
    (17, 8, 7, 7, 13, 13),
    (2, 10, 19, 65, 51, 5),
    (2, 8, 21, 23, 5, 51),
    (1, 3, 1, 1, 3, 3),
    (3, 40, 47, 44, 5, 5),
    (9, 3, 5, 11, 3, 3),
    (2, 64, 20, 24, 13, 13),
    (8, 64, 28, 28, 7, 7),
    (2, 16, 41, 48, 31, 31),
]
DTYPES = [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-4)]


def errors(problem: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> list[float]:
    """Relative errors of the three passes."""
    n, c, h, w, kh, kw = problem
    x, g = (torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=memory_format) for _ in range(2))
    weight = torch.randn(c, 1, kh, kw).to(dtype)
    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    want = F.conv2d(exact_x, exact_weight, padding=(kh // 2, kw // 2), groups=c)
    exact = (want.detach(), *torch.autograd.grad(want, (exact_x, exact_weight), g.double()))
    gx, gg, gw = x.cuda(), g.cuda(), weight.cuda()
    got = (cuda.forward(gx, gw, None, None), cuda.input_grad(gg, gw), cuda.weight_grad(gg, gx, kh, kw))
    return [float((a.cpu().double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]


def main() -> None:
    """Exits with 1 where a result is wrong."""
    if "every_lane_arrives" in sys.argv:
        _compile._OPTIONS["define_macro"] = ("ARRIVALS", "32")
    # Clusters are for larger problems than these.
    _plan_channels_last.FORWARD_SHARED_FROM = _plan_channels_last.WEIGHT_GRAD_SHARED_FROM = 0
    torch.manual_seed(0)
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    for problem, (dtype, limit), memory_format in itertools.product(
        PROBLEMS, DTYPES, (torch.contiguous_format, torch.channels_last)
    ):
        found = errors(problem, dtype, memory_format)
        if not max(found) < limit:
            sys.exit(f"wrong: {problem} {dtype} {memory_format}: {found}")
    sys.stdout.write("all right\n")


if __name__ == "__main__":
    main()
