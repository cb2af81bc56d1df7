"""CUDA C++ to kernels: NVRTC through cuda-core at first use, kept on disk.

An entry of the cache is a file of its own, named by a hash of everything that decides its content (source, kernel name,
options, architecture, NVRTC version), written under a temporary name and renamed: processes that start together may
compile the same kernel twice, but none reads half a file. Its checksum is verified; a corrupt or foreign entry is
compiled again.
"""

import functools
import hashlib
import importlib
import logging
import os
import tempfile
import threading
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from replknet import _env

_LOG = logging.getLogger(__name__)
_IMPORT = threading.Lock()
_MAGIC = b"replknet-kernel-1\n"
_OPTIONS = {"std": "c++17", "minimal": True}


@dataclass(frozen=True)
class Compiled:
    """A cubin and the symbol of its kernel."""

    symbol: str
    cubin: bytes


@functools.cache
def source(names: tuple[str, ...]) -> str:
    """The text of the .cu and .cuh files of this package, one after the other."""
    folder = resources.files("replknet.ops.cuda")
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def compile_kernel(names: tuple[str, ...], expression: str, arch: str) -> Compiled:
    """Compile one instantiation, or read it from the disk cache.

    Args:
        names: source files of this package, e.g. `("common.cuh", "forward.cu")`.
        expression: the kernel's C++ name, e.g. `"forward_nchw<0, 1, 31, ...>"`.
        arch: e.g. `"sm_90"`.

    Raises:
        RuntimeError: NVRTC refused the source; the message holds its log.
    """
    path = _entry(names, expression, arch)
    if (found := _read(path)) is not None:
        return found
    compiled = _nvrtc(source(names), expression, arch)
    _write(path, compiled)
    return compiled


def _nvrtc(text: str, expression: str, arch: str) -> Compiled:
    # Two first imports of this package at once leave one of them with half a module.
    with _IMPORT:
        core = importlib.import_module("cuda.core")
    program = core.Program(text, "c++", core.ProgramOptions(arch=arch, **_OPTIONS))
    try:
        code = program.compile("cubin", name_expressions=(expression,))
    except Exception as error:
        raise RuntimeError(f"NVRTC could not compile {expression} for {arch}: {str(error).rstrip(chr(0))}") from error
    symbol = code.symbol_mapping[expression]
    return Compiled(symbol.decode() if isinstance(symbol, bytes) else symbol, bytes(code.code))


@functools.cache
def _nvrtc_version() -> str:
    return ".".join(map(str, importlib.import_module("cuda.bindings.nvrtc").nvrtcVersion()[1:]))


def _entry(names: tuple[str, ...], expression: str, arch: str) -> Path:
    parts = (source(names), expression, arch, repr(sorted(_OPTIONS.items())), _nvrtc_version())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return _env.cache_dir() / "kernels" / f"{expression.split('<')[0]}-{arch}-{key[:32]}.cubin"


def _read(path: Path) -> Compiled | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    head = len(_MAGIC) + 32
    body = data[head:]
    if data[: len(_MAGIC)] != _MAGIC or hashlib.sha256(body).digest() != data[len(_MAGIC) : head]:
        _LOG.warning("%s is not a whole kernel of this version; compiling it again", path)
        return None
    symbol, _, cubin = body.partition(b"\n")
    return Compiled(symbol.decode(), cubin)


def _write(path: Path, compiled: Compiled) -> None:
    body = compiled.symbol.encode() + b"\n" + compiled.cubin
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(body).digest() + body)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        _LOG.warning("kernels are not kept on disk: %s", error)
