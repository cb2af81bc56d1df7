"""Submit a training to SLURM, or run it in the background of this machine.

See what would be submitted, then submit; every option of `replknet train` is understood:

    replknet submit --config RECIPE.yaml --data /data/imagenet --output runs/31b --job.nodes 4 --dry-run
    replknet submit --config RECIPE.yaml --data /data/imagenet --output runs/31b --job.nodes 4 --job.partition gpu

On this machine, without SLURM:

    replknet submit replknet_nano --data digits --output runs/nano --job.executor local --job.gpus 0

A job that is preempted or reaches its time limit saves, resubmits itself and goes on. A run folder that has a
checkpoint already is continued; choose another --output for a new run.
"""

from jsonargparse import ArgumentParser, Namespace

from replknet._errors import UsageError
from replknet.cli import train as train_command
from replknet.tasks.submit import JobConfig, sbatch_script, submit


def add_arguments(parser: ArgumentParser) -> None:
    train_command.add_arguments(parser)
    parser.add_class_arguments(JobConfig, "job")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script and submit nothing")


def run(args: Namespace) -> None:
    config = train_command.config_from(args)
    job = JobConfig(**vars(args.job))
    if not config.model or not config.data:
        raise UsageError("name a model and data; for example: replknet submit replknet_nano --data digits")
    if args.dry_run:
        print(sbatch_script(config, job))
        return
    submitted = submit(config, job)
    print(f"job {submitted.job_id}; logs in {job.folder(config)}")
