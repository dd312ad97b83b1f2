"""
Processes that are killed in the middle of their work.

A work is a generator function at the top of a module: what stands before its `yield` is preparation, what follows is
the work. It runs in a process of its own that starts in a moment, since it is forked from one that has imported
everything already.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Work = Callable[..., Iterator[None]]

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.helpers.kills", "tests.helpers.warm"])
PATIENCE = 600  # seconds
# What changes files; opening for reading does not count.
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate")


class Child:
    """A process at work; it has finished its preparation when this is made."""

    def __init__(self, work: Work, *arguments: Any, die_at: int | None = None):
        self.messages, theirs = CONTEXT.Pipe(duplex=False)
        self.process = CONTEXT.Process(target=_run, args=(work, arguments, theirs, die_at), daemon=True)
        self.process.start()
        theirs.close()
        assert self.messages.poll(PATIENCE), "the preparation takes too long"
        self.messages.recv()
        self.started = time.perf_counter()

    def finish(self) -> int:
        """Lets it end; returns how many changes of files it made. An error in it is raised here."""
        assert self.messages.poll(PATIENCE), "the work takes too long"
        try:
            answer = self.messages.recv()
        except EOFError:
            raise AssertionError(f"the process ended with {self.process.exitcode}") from None
        self.process.join()
        if isinstance(answer, str):
            raise AssertionError(answer)
        return answer

    def kill(self, after: float = 0.0) -> None:
        """Ends it by SIGKILL, `after` so many seconds of work."""
        time.sleep(max(0.0, self.started + after - time.perf_counter()))
        self.process.kill()
        self.process.join()

    def died(self) -> bool:
        """Waits for its end, and tells whether it was killed before it had finished."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, "the process hangs"
        return self.process.exitcode == -signal.SIGKILL


def run(work: Work, *arguments: Any) -> tuple[float, int]:
    """Does a work to its end; returns the seconds and the changes of files that it took."""
    child = Child(work, *arguments)
    changes = child.finish()
    return time.perf_counter() - child.started, changes


def kill_at_random(
    work: Work, arguments: Callable[[int], tuple], times: int, seed: int, seconds: float
) -> Iterator[int]:
    """
    Kills a work `times` times, at moments of its first `seconds` that follow from `seed`; yields the number of each
    time after the kill.

    Args:
        arguments: number of the time -> arguments of the work.
    """
    moments = random.Random(seed)
    for number in range(times):
        Child(work, *arguments(number)).kill(after=moments.uniform(0, seconds))
        yield number


def kill_at_change(work: Work, arguments: tuple, change: int) -> bool:
    """Lets a work kill itself before its change of files number `change`; tells whether it came so far."""
    return Child(work, *arguments, die_at=change).died()


def remains(folder: Path) -> list[str]:
    """Names of what a killed process left beside or inside of a folder."""
    beside = folder.parent.glob(f".{folder.name}.*")
    return sorted(path.name for path in (*beside, *folder.glob(".*")))


def _run(work: Work, arguments: tuple, messages: Any, die_at: int | None) -> None:
    try:
        os.environ["TQDM_DISABLE"] = "1"
        steps = work(*arguments)
        next(steps)
        changes = _count_changes(die_at)
        messages.send("ready")
        next(steps, None)
        messages.send(len(changes))
    except Exception as error:
        messages.send(f"{type(error).__name__}: {error}")
        raise


def _count_changes(die_at: int | None) -> list[str]:
    """A list that grows with every change of a file; at number `die_at` this process is killed before it."""
    changes: list[str] = []

    def hook(event: str, details: tuple) -> None:
        if event not in EVENTS or (event == "open" and not _writes(details)):
            return
        if len(changes) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        changes.append(event)

    sys.addaudithook(hook)
    return changes


def _writes(details: tuple) -> bool:
    _, mode, flags = details
    if mode is not None:
        return any(letter in mode for letter in "wax+")
    return bool(flags & (os.O_WRONLY | os.O_RDWR))
