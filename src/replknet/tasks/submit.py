"""Trainings as jobs: on SLURM, or in the background of this machine, resubmitted after preemption and time-out.

SLURM warns a job with SIGUSR2 before it takes the machine away. The training saves at the end of the step
(`stopping`), and only then is submitit asked to resubmit; the new job goes on from the run folder's last checkpoint.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from replknet import _env
from replknet._errors import UsageError
from replknet.tasks.train import TrainConfig, train


@dataclass(frozen=True)
class JobConfig:
    """What is asked of the cluster.

    Attributes:
        nodes: machines.
        gpus: GPUs, and processes, on each machine; 0 trains on CPUs with one process a machine.
        cpus: CPU cores for each process.
        mem_gb: memory of each machine in GB; None leaves it to the cluster.
        partition: SLURM partition.
        account: SLURM account.
        constraint: SLURM constraint, for example a GPU type.
        timeout_hours: longest time of one job.
        requeue: how often a job that timed out is resubmitted; preemption does not count.
        signal_delay_s: seconds between the warning and the end of a job; a step and a save must fit.
        name: job name.
        log_folder: job logs and submitted pickles; by default `jobs` in the run folder.
        executor: "slurm", or "local" for a background process on this machine.
        slurm: further sbatch options, such as {qos: high}.
    """

    nodes: int = 1
    gpus: int = 8
    cpus: int = 10
    mem_gb: float | None = None
    partition: str | None = None
    account: str | None = None
    constraint: str | None = None
    timeout_hours: float = 72
    requeue: int = 30
    signal_delay_s: int = 120
    name: str = "replknet"
    log_folder: str | None = None
    executor: str = "slurm"
    slurm: dict[str, Any] = field(default_factory=dict)

    def folder(self, config: TrainConfig) -> Path:
        """Absolute log folder of a run."""
        default = Path(config.output) / "jobs"
        return Path(self.log_folder or default).expanduser().absolute()


class TrainingJob:
    """What submitit pickles and calls in every process of the job.

    The working directory may be another one when the job starts, so paths are absolute by then.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config

    def __call__(self) -> dict[str, float]:
        """Train; returns the final scores."""
        previous = signal.getsignal(signal.SIGUSR2)

        def on_stop(signum: int) -> None:
            if signum == signal.SIGUSR2 and callable(previous):
                hand_over(previous)

        if _env.submitit_executor() == "local":
            import submitit.helpers

            # On SLURM, srun's own variables say the same.
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        return train(self.config, on_stop=on_stop).final

    def checkpoint(self) -> Any:
        """Called by submitit when a job is resubmitted: the same training, going on where it was saved."""
        import submitit.helpers

        return submitit.helpers.DelayedSubmission(TrainingJob(replace(self.config, resume="auto")))


def hand_over(handler: Callable[[int, None], None], patience: float = 600) -> None:
    """Let submitit's handler resubmit; it ends the process of rank 0 and returns in the others, which wait for theirs.

    A process that went on would meet a rank 0 that is gone, fail, and mark the job as failed.
    """
    handler(signal.SIGUSR2, None)
    time.sleep(patience)


def absolute(config: TrainConfig) -> TrainConfig:
    """The configuration with every local path made absolute; resumes from its run folder if that has a checkpoint."""
    changes: dict[str, Any] = {"output": _absolute(config.output), "progress": False}
    for name in ("data", "val_data", "val_labels", "data_root", "weights"):
        value = getattr(config, name)
        if value is not None and Path(value).expanduser().exists():
            changes[name] = _absolute(value)
    resume = config.resume if config.resume in (None, "auto") else _absolute(config.resume)
    return replace(config, **changes, resume=resume)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def submit(config: TrainConfig, job: JobConfig) -> Any:
    """Submit a training.

    Returns:
        submitit's Job.

    Raises:
        UsageError: submitit is missing, there is no SLURM here, or an option is out of range.
    """
    submitit = _submitit()
    config = _with_hardware(absolute(config), job)
    folder = job.folder(config)
    if job.executor == "local":
        if job.nodes != 1:
            raise UsageError(f"the local executor has one machine; got nodes {job.nodes}")
        executor = submitit.LocalExecutor(folder, max_num_timeout=job.requeue)
        tasks = max(1, job.gpus)
        limits = {"tasks_per_node": tasks, "gpus_per_node": job.gpus, "signal_delay_s": job.signal_delay_s}
        executor.update_parameters(timeout_min=_minutes(job), **limits)
    else:
        try:
            executor = submitit.SlurmExecutor(folder, max_num_timeout=job.requeue)
        except RuntimeError as error:
            raise UsageError(f"no SLURM here ({error}); use --dry-run, or --job.executor local") from error
        executor.update_parameters(**_slurm_parameters(job))
    return executor.submit(TrainingJob(config))


def sbatch_script(config: TrainConfig, job: JobConfig) -> str:
    """The script that `submit` would hand to sbatch; needs no SLURM and writes nothing."""
    import shlex
    import sys

    _submitit()
    from submitit.slurm.slurm import _make_sbatch_string

    folder = job.folder(config)
    command = shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(folder)])
    return _make_sbatch_string(command=command, folder=folder, **_slurm_parameters(job))


def _slurm_parameters(job: JobConfig) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "job_name": job.name,
        "nodes": job.nodes,
        "ntasks_per_node": max(1, job.gpus),
        "cpus_per_task": job.cpus,
        "time": _minutes(job),
        "signal_delay_s": job.signal_delay_s,
        "gpus_per_node": job.gpus or None,
        "mem": None if job.mem_gb is None else f"{job.mem_gb:g}GB",
        "partition": job.partition,
        "account": job.account,
        "constraint": job.constraint,
        # SLURM itself may restart the job after a node failure; it then resumes as well.
        "additional_parameters": {"requeue": True, **job.slurm},
    }
    return {name: value for name, value in parameters.items() if value is not None}


def _minutes(job: JobConfig) -> int:
    if job.nodes < 1 or job.gpus < 0 or job.timeout_hours <= 0 or job.requeue < 0:
        raise UsageError(
            "a job needs nodes >= 1, gpus >= 0, timeout_hours > 0 and requeue >= 0; got "
            f"{job.nodes}, {job.gpus}, {job.timeout_hours} and {job.requeue}"
        )
    return max(1, round(60 * job.timeout_hours))


def _with_hardware(config: TrainConfig, job: JobConfig) -> TrainConfig:
    accelerator = "gpu" if job.gpus else "cpu"
    hardware = replace(config.hardware, accelerator=accelerator, devices=max(1, job.gpus), nodes=job.nodes)
    # A job that SLURM restarts by itself runs the same pickle again, so that it must always look for its checkpoint.
    return replace(config, hardware=hardware, resume=config.resume or "auto")


def _submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UsageError("submitting jobs needs submitit: pip install 'replknet[slurm]'") from error
    return submitit
