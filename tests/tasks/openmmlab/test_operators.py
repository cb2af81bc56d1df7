"""torchvision's operators behind mmcv's functions: against closed forms, float64, and mmcv's compiled ones."""

import math
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from replknet.tasks.openmmlab import operators

pytest.importorskip("mmcv", reason="needs pip install 'replknet[detection]'")
operators.place_operators()
from mmcv import ops  # noqa: E402 - importable only now

BOXES = torch.tensor(
    [[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 10, 5], [21, 20, 31, 30], [50, 50, 50, 60]]
)
SCORES = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.95, 0.1])


def iou(a: Tensor, b: Tensor, offset: int) -> float:
    """By counting: area of the intersection over that of the union."""
    width = max(0.0, float(min(a[2], b[2]) - max(a[0], b[0])) + offset)
    height = max(0.0, float(min(a[3], b[3]) - max(a[1], b[1])) + offset)
    areas = [float((box[2] - box[0] + offset) * (box[3] - box[1] + offset)) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def greedy(boxes: Tensor, scores: Tensor, threshold: float, offset: int) -> list[int]:
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        if all(iou(boxes[index], boxes[other], offset) <= threshold for other in kept):
            kept.append(index)
    return kept


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.69, 0.9])
def test_nms_is_the_greedy_choice(device, offset, threshold):
    kept = greedy(BOXES, SCORES, threshold, offset)
    dets, indices = ops.nms(BOXES.to(device), SCORES.to(device), threshold, offset=offset)
    assert indices.tolist() == kept
    assert torch.equal(dets.cpu(), torch.cat([BOXES[kept], SCORES[kept, None]], 1))


def test_nms_by_hand():
    # Shares: 81 / 119 for the first two, 50 / 100 for the first and the fourth, 90 / 110 for the third and the fifth.
    assert ops.nms(BOXES, SCORES, 0.68)[1].tolist() == [4, 0, 3, 5]
    assert ops.nms(BOXES, SCORES, 0.69)[1].tolist() == [4, 0, 1, 3, 5]
    assert ops.nms(BOXES, SCORES, 0.49)[1].tolist() == [4, 0, 5]


@pytest.mark.parametrize("count", [0, 1])
def test_nms_of_none_or_one(device, count):
    dets, indices = ops.nms(BOXES[:count].to(device), SCORES[:count].to(device), 0.5)
    assert dets.shape == (count, 5)
    assert indices.tolist() == list(range(count))


def test_batched_nms_keeps_classes_apart(device):
    boxes = BOXES[[0, 0, 1, 1]].to(device)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6], device=device)
    classes = torch.tensor([0, 1, 0, 1], device=device)
    _, kept = ops.batched_nms(boxes, scores, classes, {"type": "nms", "iou_threshold": 0.5})
    assert kept.tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_nms_in_other_dtypes(device, dtype):
    kept = ops.nms(BOXES.to(device, dtype), SCORES.to(device, dtype), 0.5)[1]
    assert kept.tolist() == [4, 0, 3, 5]


def test_soft_nms_by_hand():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [40, 40, 50, 50]])
    scores = torch.tensor([0.8, 0.6, 0.3])
    share = 0.5  # the IoU of the first two
    shares = {"naive": None, "linear": 1 - share, "gaussian": math.exp(-(share**2) / 0.5)}
    for method, kept in shares.items():
        dets, indices = ops.soft_nms(boxes, scores, 0.4, sigma=0.5, min_score=0.01, method=method)
        expected = [0.8, 0.3] if kept is None else sorted([0.8, 0.6 * kept, 0.3], reverse=True)
        assert dets[:, 4].tolist() == pytest.approx(expected, rel=1e-6)
        assert torch.equal(dets[:, :4], boxes[indices])
    assert len(ops.soft_nms(boxes, scores, 0.4, min_score=0.5, method="linear")[1]) == 1


def ramp(height: int, width: int, dtype=torch.float64) -> Tensor:
    """`[1, 3, H, W]`: 1, the column, and twice the row plus three times the column: bilinear sampling is exact."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.ones_like(rows), columns, 2 * rows + 3 * columns])[None].to(dtype)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("ratio", [0, 1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_roi_align_of_a_plane_is_its_value_at_the_centres(device, aligned, ratio, scale):
    height, width = 3, 2
    box = torch.tensor([3.5, 4.0, 17.25, 15.0], dtype=torch.float64) / scale
    layer = ops.RoIAlign((height, width), scale, ratio, aligned=aligned)
    found = layer(ramp(24, 30).to(device), torch.cat([torch.zeros(1), box])[None].to(device))[0].cpu()
    # Pixel values stand at the centres of pixels, half a pixel from the edge; the older rule leaves that out.
    x1, y1, x2, y2 = (box * scale - 0.5 * aligned).tolist()
    columns = x1 + (torch.arange(width) + 0.5) * (x2 - x1) / width
    rows = (y1 + (torch.arange(height) + 0.5) * (y2 - y1) / height)[:, None]
    expected = torch.stack([torch.ones(height, width), columns.expand(height, width), 2 * rows + 3 * columns])
    assert found == pytest.approx(expected.double(), rel=1e-5)


def test_roi_align_takes_the_picture_that_the_first_column_names(device):
    pictures = torch.stack([torch.full((1, 8, 8), float(value)) for value in (1, 2, 3)]).to(device)
    rois = torch.tensor([[2.0, 1, 1, 5, 5], [0, 1, 1, 5, 5]], device=device)
    assert ops.roi_align(pictures, rois, 2).flatten(1).mean(1).tolist() == [3.0, 1.0]
    assert ops.roi_align(pictures, rois[:0], 2).shape == (0, 1, 2, 2)


def test_roi_align_backward_is_the_transpose_of_forward(device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 9, 13, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    corners = torch.rand(5, 4, generator=generator, dtype=torch.float64) * torch.tensor([20.0, 14, 20, 14])
    boxes = torch.cat([torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])], 1)
    rois = torch.cat([torch.tensor([[0.0], [1], [1], [0], [1]]), boxes], 1).to(device)
    pooled = ops.roi_align(x, rois, (3, 2), 0.5, 0)
    weights = torch.randn(pooled.shape, generator=generator, dtype=torch.float64).to(device)
    (grad,) = torch.autograd.grad(pooled, x, weights)
    # <w, A x> = <A' w, x> for the linear map A.
    assert (pooled * weights).sum().item() == pytest.approx((grad * x).sum().item(), rel=1e-10)
    if device.type == "cpu":
        assert torch.autograd.gradcheck(lambda x: ops.roi_align(x, rois, (3, 2), 0.5, 2), (x,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_roi_align_in_16_bits_is_the_rounded_one(device, dtype):
    x = torch.randn(1, 4, 10, 10, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    rois = torch.tensor([[0.0, 1, 2, 7, 8]], device=device, dtype=dtype)
    exact = ops.roi_align(x.double(), rois.double(), 3)
    tolerance = 4 * torch.finfo(dtype).eps
    assert torch.allclose(ops.roi_align(x, rois, 3).double(), exact, rtol=tolerance, atol=tolerance)


def focal(logits: Tensor, target: Tensor, gamma: float, alpha: float) -> Tensor:
    """Element by element, as the paper writes it."""
    losses = torch.zeros_like(logits)
    for row, label in enumerate(target.tolist()):
        for column in range(logits.shape[1]):
            p = torch.sigmoid(logits[row, column])
            hit = column == label
            losses[row, column] = (
                -alpha * (1 - p) ** gamma * p.log() if hit else -(1 - alpha) * p**gamma * (1 - p).log()
            )
    return losses


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (0.0, 0.5), (1.5, 0.75)])
def test_focal_loss_and_its_gradient(device, gamma, alpha):
    logits = 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    target = torch.tensor([0, 3, 4, 4, 1, 2])  # 4: background
    expected_logits = logits.clone().requires_grad_()
    expected = focal(expected_logits, target, gamma, alpha)
    for reduction, of in (("none", expected), ("sum", expected.sum()), ("mean", expected.sum() / 6)):
        x = logits.to(device).requires_grad_()
        loss = ops.sigmoid_focal_loss(x, target.to(device), gamma, alpha, None, reduction)
        assert torch.allclose(loss.detach().cpu(), of.detach(), rtol=1e-6, atol=1e-9)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        (exact,) = torch.autograd.grad(of.sum(), expected_logits, retain_graph=True)
        assert torch.allclose(grad.cpu(), exact, rtol=1e-6, atol=1e-9)


def test_focal_loss_of_no_boxes(device):
    x = torch.zeros(0, 3, device=device, requires_grad=True)
    ops.sigmoid_focal_loss(x, torch.zeros(0, dtype=torch.long, device=device), 2.0, 0.25, None, "sum").backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 3)


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda: ops.roi_pool(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2), "roi_pool_forward"),
        (lambda: ops.nms_match(torch.zeros(1, 5), 0.5), "nms_match"),
        (lambda: ops.roi_align(torch.zeros(1, 1, 4, 4), torch.zeros(1, 5), 2, 1.0, 0, "max"), "pool_mode='avg'"),
        (
            lambda: ops.sigmoid_focal_loss(torch.zeros(1, 2), torch.zeros(1).long(), 2.0, 0.25, torch.ones(2)),
            "no class weights",
        ),
    ],
    ids=["roi_pool", "nms_match", "max pooling", "class weights"],
)
def test_what_is_not_provided_says_what_it_needs(call, what):
    if operators.place_operators() == "compiled":
        pytest.skip("mmcv has compiled operators here, which provide these")
    with pytest.raises(NotImplementedError, match=what):
        call()


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).strip()


def test_compiled_operators_win():
    # A finder that serves a compiled module, as an installation with operators would.
    code = """
import importlib.abc, importlib.machinery, sys
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "mmcv._ext" else None
    def exec_module(self, module):
        module.nms = "compiled"
sys.meta_path.insert(0, Finder())
from replknet.tasks.openmmlab import operators
print(operators.place_operators(), sys.modules["mmcv._ext"].nms, operators.place_operators())
"""
    assert in_a_new_process(code) == "compiled compiled compiled"


def test_compiled_operators_that_do_not_load_are_named():
    code = """
import importlib.abc, importlib.machinery, sys
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self) if name == "mmcv._ext" else None
    def exec_module(self, module):
        raise ImportError("undefined symbol: _ZN2at4_ops5zeros")
sys.meta_path.insert(0, Finder())
from replknet.tasks.openmmlab import operators
print(operators.place_operators())
"""
    lines = in_a_new_process(code).splitlines()
    assert "torchvision" in lines
    assert any("undefined symbol: _ZN2at4_ops5zeros" in line for line in lines)


def test_mmdet_must_not_come_first():
    code = """
import warnings
warnings.simplefilter("ignore")
import mmdet.structures.mask
from replknet._errors import UsageError
from replknet.tasks.openmmlab import operators
try:
    operators.place_operators()
except UsageError as error:
    print(error)
"""
    assert "import replknet.tasks.detection first" in in_a_new_process(code)


def test_the_module_answers_as_a_module_does():
    module = sys.modules[operators.NAME]
    assert isinstance(module, ModuleType)
    assert module.__spec__ is not None
    assert not hasattr(module, "__path__")
    assert ops.get_compiler_version()
