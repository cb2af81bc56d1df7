"""Jobs: the sbatch script, a mocked SLURM, and a real local job that is preempted and goes on."""

import json
import os
import re
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from replknet._errors import UsageError
from replknet.tasks.submit import JobConfig, TrainingJob, absolute, sbatch_script, submit
from replknet.tasks.train import train

submitit = pytest.importorskip("submitit", reason="needs the extra slurm")


def test_script_asks_for_what_was_given(small_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = JobConfig(
        nodes=4, gpus=8, partition="big", account="me", timeout_hours=1.5, mem_gb=500, slurm={"qos": "high"}
    )
    script = sbatch_script(small_config("digits", Path("runs/x")), job)
    lines = dict(re.findall(r"#SBATCH --([a-z-]+)=?(.*)", script))
    assert lines == {
        "account": "me",
        "cpus-per-task": "10",
        "error": f"{tmp_path}/runs/x/jobs/%j_0_log.err",
        "gpus-per-node": "8",
        "job-name": "replknet",
        "mem": "500GB",
        "nodes": "4",
        "ntasks-per-node": "8",
        "open-mode": "append",
        "output": f"{tmp_path}/runs/x/jobs/%j_0_log.out",
        "partition": "big",
        "qos": "high",
        "requeue": "",
        "signal": "USR2@120",
        "time": "90",
        "wckey": "submitit",
    }
    assert f"submitit.core._submit {tmp_path}/runs/x/jobs" in script
    assert not list(tmp_path.iterdir())


def test_submitting_needs_a_cluster_or_the_local_executor(small_config, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UsageError, match=r"no SLURM here.*--dry-run"):
        submit(small_config("digits", tmp_path / "run"), JobConfig())
    with pytest.raises(UsageError, match="one machine"):
        submit(small_config("digits", tmp_path / "run"), JobConfig(executor="local", nodes=2))
    for bad in ({"nodes": 0}, {"gpus": -1}, {"timeout_hours": 0}, {"requeue": -1}):
        with pytest.raises(UsageError, match="a job needs"):
            sbatch_script(small_config("digits", tmp_path / "run"), JobConfig(**bad))


def test_a_mocked_cluster_gets_the_training(small_config, digits_folder, tmp_path):
    from submitit.slurm.test_slurm import mocked_slurm

    config = small_config(digits_folder, tmp_path / "run", epochs=2)
    with mocked_slurm() as mock:
        job = submit(config, JobConfig(gpus=0, nodes=1, partition="p"))
        script = next((tmp_path / "run/jobs").glob("*.sh")).read_text()
        assert "#SBATCH --partition=p" in script
        assert "gpus" not in script
        submitted = job.submission().function
        assert isinstance(submitted, TrainingJob)
        assert submitted.config.resume == "auto"
        assert submitted.config.hardware.accelerator == "cpu"
        with mock.job_context(job.job_id):
            again = submitted.checkpoint().function
    assert again.config == replace(submitted.config, resume="auto")


def test_paths_do_not_depend_on_the_jobs_working_directory(small_config, digits_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(digits_folder.parent)
    config = absolute(small_config(digits_folder.name, Path("out"), resume="auto", val_data="torch/cifar10"))
    assert config.data == str(digits_folder)
    assert config.output == str(digits_folder.parent / "out")
    assert (config.val_data, config.resume) == ("torch/cifar10", "auto")
    assert absolute(replace(config, data="digits")).data == "digits"


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the job's processes through Linux's /proc")
def test_a_preempted_local_job_saves_resubmits_itself_and_goes_on(small_config, digits_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole = train(small_config(digits_folder, tmp_path / "whole", epochs=6))
    folder = tmp_path / "job"
    job = submit(small_config(digits_folder, folder, epochs=6), JobConfig(executor="local", gpus=0, timeout_hours=1))
    log = folder / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not log.exists() or log.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline, job.stderr()
        assert not job.done(), job.stderr()
        time.sleep(0.01)
    # The controller would end the job; preemption reaches the training itself.
    for child in children(int(job.job_id)):
        os.kill(child, signal.SIGUSR2)
    scores = job.result()
    assert "Requeued job" in (job.stdout() or "") + (job.stderr() or "")
    assert scores == whole.final

    def losses(run: Path) -> list:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(record["step"], record.get("train/loss"), record.get("val/loss")) for record in records]

    assert losses(folder) == losses(whole.folder)
    one, other = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (folder, whole.folder))
    assert all(torch.equal(one["state_dict"][key], other["state_dict"][key]) for key in one["state_dict"])
