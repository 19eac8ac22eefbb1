"""Runs as Ray tasks, on this machine or on a cluster whose nodes share the files."""

from collections.abc import Iterator, Sequence

from vpt.bench.suite import RETRIES, Outcome, attempt
from vpt.config import RunConfig
from vpt.errors import InputError


def run_on_ray(configs: Sequence[RunConfig], cpus: int = 1, gpus: float = 1) -> Iterator[Outcome]:
    """Do `configs` as tasks of the cluster that runs (`ray start`), else of one on this machine.

    A task whose worker or node died is started again elsewhere, and goes on from its last epoch.

    Args:
        configs: with their folders in `out`, on a file system that all nodes share.
        cpus: cores for one run.
        gpus: GPUs for one run, or a fraction of one; none are asked for where the cluster has none.

    Raises:
        InputError: ray is not installed.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError(
            "--engine ray needs ray: pip install 'visual-prompt-tuning[bench]'"
        ) from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    gpus = gpus if ray.cluster_resources().get("GPU") else 0
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(attempt)
    running = {task.remote(config): config for config in configs}
    try:
        while running:
            for done in ray.wait(list(running))[0]:
                config = running.pop(done)
                try:
                    yield config, ray.get(done)
                except ray.exceptions.RayError as error:
                    yield config, f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        for task in running:
            ray.cancel(task, force=True)
