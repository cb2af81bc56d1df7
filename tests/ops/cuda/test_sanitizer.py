"""The kernels under compute-sanitizer (of the CUDA toolkit), in a process of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import replknet

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
SCRIPT = Path(__file__).with_name("sanitized.py")


# Looking up an optional symbol of the driver is no error of ours: reports of API calls are left out. Tensors lie in
# allocations of their own, so that one byte too far is seen. racecheck follows accesses lane by lane and does not know
# that one lane arrives at a barrier for its warp: there every lane arrives.
@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer, of the CUDA toolkit, is not on this machine")
@pytest.mark.parametrize(("tool", "arguments"), [("memcheck", []), ("racecheck", ["every_lane_arrives"])])
def test_no_reports(tool, arguments):
    assert SANITIZER is not None
    command = [SANITIZER, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", "--print-limit", "20"]
    package = str(Path(replknet.__file__).parents[1])
    path = os.pathsep.join((package, os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, sys.executable, str(SCRIPT), *arguments],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    text = done.stdout + done.stderr
    assert "all right" in text, text[-4000:]
    assert re.search(r"(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)", text), text[:8000]
    assert done.returncode == 0
