"""Helpers of the kernels' tests, as fixtures: test modules cannot import one another."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cuda_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def simulation() -> ModuleType:
    """The kernels in NumPy."""
    return _load("simulation")


@pytest.fixture(scope="session")
def ring() -> ModuleType:
    """The rings of the channels_last kernels."""
    return _load("ring")


@pytest.fixture(scope="session")
def elf() -> ModuleType:
    """A reader of cubins."""
    return _load("elf")
