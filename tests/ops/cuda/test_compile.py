"""The disk cache of compiled kernels: what is read, what is compiled again, and many processes at once."""

import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from replknet.ops.cuda import _compile
from replknet.ops.cuda._compile import Compiled, compile_kernel, source

pytest.importorskip("cuda.core", reason="needs cuda-core, NVRTC's front end")

NAMES = ("common.cuh", "weight_grad.cu")
EXPRESSION = "weight_grad_sum<0>"
ARCH = "sm_90"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of its own for every test; the folder of the kernels in it."""
    monkeypatch.setenv("REPLKNET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiler(monkeypatch) -> list[tuple[str, str]]:
    """Stands in for NVRTC; the list of what it was asked for."""
    calls = []

    def compile_(text: str, expression: str, arch: str) -> Compiled:
        calls.append((expression, arch))
        return Compiled(f"symbol_{len(calls)}", b"cubin\n\0" + bytes(range(256)))

    monkeypatch.setattr(_compile, "_nvrtc", compile_)
    return calls


def only_entry(folder: Path) -> Path:
    (entry,) = folder.iterdir()
    return entry


def test_compiles_to_an_elf_with_the_symbol_in_it(cache):
    compiled = compile_kernel(NAMES, EXPRESSION, ARCH)
    assert compiled.cubin[:4] == b"\x7fELF"
    assert "weight_grad_sum" in compiled.symbol
    assert compiled.symbol.encode() in compiled.cubin


def test_the_second_call_reads_what_the_first_wrote(cache, compiler, monkeypatch):
    first = compile_kernel(NAMES, EXPRESSION, ARCH)

    def refuse(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(_compile, "_nvrtc", refuse)
    assert compile_kernel(NAMES, EXPRESSION, ARCH) == first
    assert len(compiler) == 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param((NAMES, EXPRESSION, "sm_80"), id="architecture"),
        pytest.param((NAMES, "weight_grad_sum<1>", ARCH), id="expression"),
        pytest.param((("common.cuh", "forward.cu", "weight_grad.cu"), EXPRESSION, ARCH), id="source"),
    ],
)
def test_whatever_decides_the_content_decides_the_entry(cache, compiler, change):
    compile_kernel(NAMES, EXPRESSION, ARCH)
    compile_kernel(*change)
    assert len(compiler) == 2
    assert len(list(cache.iterdir())) == 2


def test_another_nvrtc_or_other_options_compile_again(cache, compiler, monkeypatch):
    compile_kernel(NAMES, EXPRESSION, ARCH)
    monkeypatch.setattr(_compile, "_nvrtc_version", lambda: "0.0")
    compile_kernel(NAMES, EXPRESSION, ARCH)
    monkeypatch.setattr(_compile, "_OPTIONS", {**_compile._OPTIONS, "lineinfo": True})
    compile_kernel(NAMES, EXPRESSION, ARCH)
    assert len(compiler) == 3


def flip_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def other_version(data: bytes) -> bytes:
    """A whole entry whose checksum holds, written by a version with another layout."""
    body = b"another layout"
    return b"replknet-kernel-0\n" + hashlib.sha256(body).digest() + body


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(flip_last, id="last byte"),
        pytest.param(lambda data: b"x" + data[1:], id="first byte"),
        pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
        pytest.param(lambda data: data[:10], id="truncated in the header"),
        pytest.param(lambda data: data[: len(_compile._MAGIC) + 32], id="header alone"),
        pytest.param(lambda data: data + b"\0", id="longer"),
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: b"\x7fELF" + data, id="foreign"),
        pytest.param(other_version, id="other version"),
    ],
)
def test_a_damaged_or_foreign_entry_is_compiled_again(cache, compiler, caplog, damage):
    compile_kernel(NAMES, EXPRESSION, ARCH)
    entry = only_entry(cache)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING, logger=_compile.__name__):
        again = compile_kernel(NAMES, EXPRESSION, ARCH)
    assert again.symbol == "symbol_2"
    assert str(entry) in caplog.text
    assert _compile._read(only_entry(cache)) == again


def test_a_folder_in_the_place_of_an_entry_does_not_stop_the_kernel(cache, compiler, caplog):
    compile_kernel(NAMES, EXPRESSION, ARCH)
    entry = only_entry(cache)
    entry.unlink()
    entry.mkdir()
    assert compile_kernel(NAMES, EXPRESSION, ARCH).symbol == "symbol_2"
    assert "not kept on disk" in caplog.text
    assert only_entry(cache) == entry  # no temporary file is left


@pytest.mark.parametrize("obstacle", ["cache is a file", "kernels is a file", "no permission"])
def test_an_unwritable_cache_warns_and_the_kernel_is_there(cache, compiler, caplog, obstacle):
    if obstacle == "cache is a file":
        cache.parent.write_bytes(b"")
    else:
        cache.parent.mkdir()
        if obstacle == "kernels is a file":
            cache.write_bytes(b"")
        else:
            cache.mkdir()
            cache.chmod(0o500)
            if os.access(cache, os.W_OK):
                pytest.skip("this user may write everywhere (root)")
    with caplog.at_level(logging.WARNING, logger=_compile.__name__):
        compiled = compile_kernel(NAMES, EXPRESSION, ARCH)
    assert compiled.symbol == "symbol_1"
    assert "kernels are not kept on disk" in caplog.text


def test_a_full_disk_warns_and_leaves_no_temporary_file(cache, compiler, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_compile.os, "replace", full)
    assert compile_kernel(NAMES, EXPRESSION, ARCH).symbol == "symbol_1"
    assert "No space left on device" in caplog.text
    assert list(cache.iterdir()) == []


def test_where_the_cache_lies(tmp_path, compiler, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("REPLKNET_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    places = [tmp_path / "home" / ".cache" / "replknet", tmp_path / "xdg" / "replknet", tmp_path / "own"]
    for place, variable, value in zip(
        places, (None, "XDG_CACHE_HOME", "REPLKNET_CACHE"), (None, tmp_path / "xdg", tmp_path / "own"), strict=True
    ):
        if variable:
            monkeypatch.setenv(variable, str(value))
        compile_kernel(NAMES, EXPRESSION, ARCH)
        assert only_entry(place / "kernels").name.startswith("weight_grad_sum-sm_90-")


def test_a_compile_error_carries_the_log_and_is_not_kept(cache):
    with pytest.raises(RuntimeError, match=r"(?s)weight_grad_sum<nothing> for sm_90.*nothing.* is undefined") as error:
        compile_kernel(NAMES, "weight_grad_sum<nothing>", ARCH)
    assert "error:" in str(error.value)
    assert not cache.exists()


def test_an_unknown_architecture_is_a_runtime_error(cache):
    with pytest.raises(RuntimeError, match="sm_1"):
        compile_kernel(NAMES, EXPRESSION, "sm_1")


WORKER = """
import hashlib, pathlib, sys, time
from replknet.ops.cuda._compile import compile_kernel
ready, go = map(pathlib.Path, sys.argv[1:3])
ready.touch()
while not go.exists():
    time.sleep(0.002)
compiled = compile_kernel(("common.cuh", "weight_grad.cu"), "weight_grad_sum<0>", "sm_90")
sys.stdout.write(compiled.symbol + " " + hashlib.sha256(compiled.cubin).hexdigest())
"""


@pytest.mark.slow
def test_processes_that_start_together_leave_one_whole_entry(cache, tmp_path):
    go, ready = tmp_path / "go", [tmp_path / f"ready{i}" for i in range(4)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(mine), str(go)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for mine in ready
    ]
    try:
        while not all(mine.exists() for mine in ready):
            assert all(process.poll() is None for process in processes), "a process died before it began"
        go.touch()
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * 4, results
    assert all(errors == "" for _, errors in results), results
    assert len({out for out, _ in results}) == 1
    found = _compile._read(only_entry(cache))
    assert found is not None
    assert results[0][0] == f"{found.symbol} {hashlib.sha256(found.cubin).hexdigest()}"


def test_source_is_the_files_in_order():
    text = source(NAMES)
    assert text.index("struct Table") < text.index("struct WeightGrad")
    assert "#include" not in text  # minimal options: NVRTC is given no headers
