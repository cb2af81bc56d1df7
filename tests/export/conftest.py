import importlib.util
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from replknet.data.sample_pictures import sample_pictures
from replknet.data.transforms import ImageFormat, evaluation_transform


@pytest.fixture(scope="session")
def model() -> Any:
    """A small RepLKNet whose norms are not the identity, so that merging and folding change every weight."""
    torch.manual_seed(1)
    model = timm.create_model("replknet_nano", num_classes=10, layers=(1, 1, 1, 1)).eval()
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif value.is_floating_point() and value.ndim == 1:
            value.normal_().mul_(0.3).add_(1.0 if key.endswith("weight") else 0.0)
    return model


@pytest.fixture(scope="session")
def pictures() -> Tensor:
    """`[8, 3, 64, 64]`, views of a photograph."""
    transform = evaluation_transform(ImageFormat(size=64))
    return torch.stack([transform(picture) for picture in sample_pictures()])


@pytest.fixture
def hub():
    """A running `HubServer` of the module beside this one."""
    spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).with_name("hub_server.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.serving() as server:
        yield server
