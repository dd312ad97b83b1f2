"""Two processes on this machine that work together, as `torchrun` starts them."""

import io
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")  # imports once, then starts processes in a moment
CONTEXT.set_forkserver_preload(
    ["tests.helpers.processes", "tests.helpers.tiny", "transformers.trainer", "hf_argen.cli.sampling"]
)
PATIENCE = 300  # seconds
SIZE = 2


def in_two_processes(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """
    What `work(*arguments)` returns in each of two processes of one gloo group.

    Args:
        work: a function at the top of a module; it finds its number in the environment, as RANK.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(SIZE)]
    processes = [
        CONTEXT.Process(target=_run, args=(rank, port, pipes[rank][1], work, arguments), daemon=True)
        for rank in range(SIZE)
    ]
    try:
        for process, (_, theirs) in zip(processes, pipes, strict=True):
            process.start()
            theirs.close()
        return [_answer(ours) for ours, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(messages: Any) -> Any:
    import torch

    assert messages.poll(PATIENCE), "the processes take too long"
    try:
        is_well, answer = messages.recv()
    except EOFError:
        raise AssertionError("a process died") from None
    if not is_well:
        raise AssertionError(answer)
    return torch.load(io.BytesIO(answer), weights_only=False)


def _run(rank: int, port: int, messages: Any, work: Callable[..., Any], arguments: tuple) -> None:
    import torch

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(SIZE),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TQDM_DISABLE": "1",
    }
    torch.set_num_threads(1)
    try:
        answer = io.BytesIO()
        torch.save(work(*arguments), answer)
        messages.send((True, answer.getvalue()))
    except BaseException:
        messages.send((False, f"process {rank}:\n{traceback.format_exc()}"))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
