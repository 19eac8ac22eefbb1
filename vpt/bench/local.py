"""Runs in processes of this machine, which share its cores and GPUs."""

import multiprocessing
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

import torch
from threadpoolctl import threadpool_limits

from vpt.bench.suite import RETRIES, Outcome, attempt
from vpt.config import RunConfig


def run_locally(configs: Sequence[RunConfig], cpus: int = 1, gpus: float = 1) -> Iterator[Outcome]:
    """Do `configs`, each in a process of its own; one that dies is started again.

    As many at once as there is room for: by GPUs where there are any, else by cores (those that
    torch would use, so OMP_NUM_THREADS limits them), which they share evenly.

    Args:
        configs: with their folders in `out`.
        cpus: cores for one run.
        gpus: fraction of a GPU for one run, at most 1.
    """
    cores, devices = torch.get_num_threads(), torch.cuda.device_count()
    room = devices * int(1 / gpus) or max(1, cores // cpus)
    workers = min(len(configs), room)
    threads = max(1, cores // workers)
    # a server that has imported everything, and used no thread or GPU, forks a process in no time
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    waiting = deque((config, RETRIES) for config in configs)
    free = deque(range(workers))
    running = {}
    try:
        while waiting or running:
            while waiting and free:
                config, retries = waiting.popleft()
                slot = free.popleft()
                gpu = slot % devices if devices else None
                pipe, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(theirs, config, threads, gpu))
                process.start()
                theirs.close()
                running[pipe] = process, config, retries, slot
            for pipe in wait(running):
                process, config, retries, slot = running.pop(pipe)
                free.append(slot)
                try:
                    failure = pipe.recv()
                except EOFError:
                    if retries:
                        waiting.append((config, retries - 1))
                        continue
                    failure = f"its process died {RETRIES + 1} times"
                yield config, failure
    finally:
        for process, *_ in running.values():
            process.kill()


def _work(pipe: Connection, config: RunConfig, threads: int, gpu: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    torch.set_num_threads(threads)
    threadpool_limits(threads)  # scikit-learn's
    if gpu is not None:
        torch.cuda.set_device(gpu)
    pipe.send(attempt(config))
