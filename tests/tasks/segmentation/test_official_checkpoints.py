"""Checkpoints of the release's five segmentors, in MMSegmentation 0.x's layout, load strictly."""

import json
from pathlib import Path

import pytest
import torch

from replknet._errors import RunError, UsageError
from replknet.models.weights import WEIGHTS
from replknet.tasks.openmmlab import require

require("segmentation")
import replknet.tasks.segmentation  # noqa: E402, F401
from replknet.tasks.openmmlab.runner import load_weights  # noqa: E402
from replknet.tasks.segmentation.official import official_config  # noqa: E402
from replknet.tasks.segmentation.segmentor import build_segmentor, open_segmentor  # noqa: E402

# A model without data takes shapes and no values.
pytestmark = pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter:UserWarning")

NAMES = [name for name, entry in WEIGHTS.items() if entry.task == "segmentation"]
ARCHITECTURES = {
    "replknet_31b": ((128, 256, 512, 1024), (31, 29, 27, 13), 5, 1.0),
    "replknet_31l": ((192, 384, 768, 1536), (31, 29, 27, 13), 5, 1.0),
    "replknet_xl": ((256, 512, 1024, 2048), (27, 27, 27, 13), None, 1.5),
}
REFERENCE = Path(__file__).parents[4] / "shared" / "reference" / "state_dict_keys.json"


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    shapes = {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return {**shapes, f"{name}.num_batches_tracked": ()}


def unit(name: str, out: int, inside: int, kernel: int) -> dict[str, tuple[int, ...]]:
    """Convolution without bias and norm, as the release and mmcv's ConvModule name them."""
    return {f"{name}.conv.weight": (out, inside, kernel, kernel), **norm(f"{name}.bn", out)}


def backbone(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the release's backbone has, written from its description."""
    channels, kernels, small, ratio = ARCHITECTURES[model]
    c = channels[0]
    shapes = {
        **unit("stem.0", c, 3, 3),
        **unit("stem.1", c, 1, 3),
        **unit("stem.2", c, c, 1),
        **unit("stem.3", c, 1, 3),
    }
    for stage, (c, kernel, layers) in enumerate(zip(channels, kernels, (2, 2, 18, 2), strict=True)):
        wide = int(c * ratio)
        for layer in range(layers):
            block, ffn = f"stages.{stage}.blocks.{2 * layer}", f"stages.{stage}.blocks.{2 * layer + 1}"
            shapes |= (
                norm(f"{block}.prelkb_bn", c) | unit(f"{block}.pw1", wide, c, 1) | unit(f"{block}.pw2", c, wide, 1)
            )
            shapes |= unit(f"{block}.large_kernel.lkb_origin", wide, 1, kernel)
            shapes |= unit(f"{block}.large_kernel.small_conv", wide, 1, small) if small else {}
            shapes |= norm(f"{ffn}.preffn_bn", c) | unit(f"{ffn}.pw1", 4 * c, c, 1) | unit(f"{ffn}.pw2", c, 4 * c, 1)
        shapes |= norm(f"stages.{stage}.norm", c) if model == "replknet_xl" else {}
        if stage < 3:
            after = channels[stage + 1]
            shapes |= unit(f"transitions.{stage}.0", after, c, 1) | unit(f"transitions.{stage}.1", after, 1, 3)
    return shapes


def heads(model: str, classes: int) -> dict[str, tuple[int, ...]]:
    """UPerHead and FCNHead of MMSegmentation 0.x."""
    channels = ARCHITECTURES[model][0]
    decode = {"conv_seg.weight": (classes, 512, 1, 1), "conv_seg.bias": (classes,)}
    for scale in range(4):
        decode |= unit(f"psp_modules.{scale}.1", 512, channels[3], 1)
    decode |= unit("bottleneck", 512, channels[3] + 4 * 512, 3)
    for level in range(3):
        decode |= unit(f"lateral_convs.{level}", 512, channels[level], 1) | unit(f"fpn_convs.{level}", 512, 512, 3)
    decode |= unit("fpn_bottleneck", 512, 4 * 512, 3)
    auxiliary = {"conv_seg.weight": (classes, 256, 1, 1), "conv_seg.bias": (classes,)}
    auxiliary |= unit("convs.0", 256, channels[2], 3)
    return {f"decode_head.{k}": v for k, v in decode.items()} | {f"auxiliary_head.{k}": v for k, v in auxiliary.items()}


def layout(name: str) -> dict[str, tuple[int, ...]]:
    entry = WEIGHTS[name]
    own = {f"backbone.{key}": shape for key, shape in backbone(entry.model).items()}
    return own | heads(entry.model, entry.num_classes)


def light(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """One stored number a tensor: names and shapes of a 1.5 GB file without its bytes."""
    return {key: torch.zeros(1).expand(shape) if shape else torch.tensor(0) for key, shape in shapes.items()}


def checkpoint(state: dict[str, torch.Tensor]) -> dict:
    """As mmcv 1.x wrote it."""
    meta = {"epoch": 1, "iter": 40000, "mmseg_version": "0.20.2", "CLASSES": ("a", "b"), "PALETTE": [[1, 2, 3]] * 2}
    return {"meta": {**meta, "config": "lr_config = dict(policy='poly')\n"}, "state_dict": state, "optimizer": {}}


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_0x_state_dict_loads_strictly(name, tmp_path):
    state = light(layout(name))
    torch.save(checkpoint(state), tmp_path / "official.pth")
    with torch.device("meta"):
        model = build_segmentor(official_config(WEIGHTS[name]))
    report = load_weights(model, tmp_path / "official.pth")
    assert report.is_exact
    assert set(report.matched) == set(model.state_dict()) == set(state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_strictly_means_strictly(name, change, tmp_path):
    state = light(layout(name))
    key = "auxiliary_head.convs.0.conv.weight"
    if change == "missing":
        del state[key]
    elif change == "extra":
        state["decode_head.extra.weight"] = torch.zeros(1)
    else:
        state[key] = torch.zeros(1).expand(1, 2, 3, 3)
    torch.save(checkpoint(state), tmp_path / "official.pth")
    with torch.device("meta"):
        model = build_segmentor(official_config(WEIGHTS[name]))
    with pytest.raises(RunError, match="decode_head.extra.weight" if change == "extra" else key):
        load_weights(model, tmp_path / "official.pth")


@pytest.mark.skipif(not REFERENCE.exists(), reason="the list of the official files' keys is not part of the project")
@pytest.mark.parametrize("model", ARCHITECTURES)
def test_the_description_agrees_with_the_official_files(model):
    listed = json.loads(REFERENCE.read_text())[model]["train"]
    official = {k: tuple(v) for k, v in listed.items() if not k.startswith(("norm.", "head."))}
    own = {k: v for k, v in backbone(model).items() if not k.startswith(tuple(f"stages.{s}.norm" for s in range(4)))}
    assert own == official


@pytest.mark.slow
def test_values_of_an_official_file_predict(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in layout("replknet_31b.in1k_upernet_ade20k").items():
        if key.endswith("running_var") or (len(shape) == 1 and key.endswith("weight")):
            state[key] = torch.ones(shape)
        elif len(shape) == 4:
            scale = 1 / (shape[1] * shape[2] * shape[3]) ** 0.5
            state[key] = scale * torch.randn(shape, generator=generator)
        else:
            state[key] = torch.zeros(shape, dtype=torch.long if shape == () else None)
    path = tmp_path / "RepLKNet-31B_ImageNet-1K_UperNet_ADE20K.pth"
    torch.save(checkpoint(state), path)
    # Known by its file name: no config is needed.
    opened = open_segmentor(path, merged=False)
    own = opened.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items() if not key.startswith("auxiliary"))
    assert (len(opened.classes), opened.classes[:2], opened.palette[0]) == (150, ["wall", "building"], [120, 120, 120])
    assert opened.source == path.name


def test_weights_of_another_task_are_refused():
    with pytest.raises(
        UsageError, match=r"weights for classification; for segmentation there are replknet_31b.in1k_upe"
    ):
        open_segmentor("replknet_31b.in1k_224")


def test_weights_by_name_come_from_the_folder_of_weights(tmp_path, monkeypatch):
    name = "replknet_31b.in1k_upernet_cityscapes"
    state = light(layout(name))
    torch.save(checkpoint(state), tmp_path / WEIGHTS[name].sources[0].file_name)
    monkeypatch.setenv("REPLKNET_WEIGHTS", str(tmp_path))
    with torch.device("meta"):
        model = build_segmentor(official_config(WEIGHTS[name]))
    assert load_weights(model, name).is_exact
