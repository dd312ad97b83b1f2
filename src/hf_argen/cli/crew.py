"""The processes that `accelerate launch` or `torchrun` started to share one piece of work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

PATIENCE = timedelta(days=1)  # one process may have much more to do than another


@dataclass
class Crew:
    """
    This process and those beside it.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
        device: where this one computes; `None` leaves the choice to whoever asks.
        state: accelerate's `PartialState`, with several processes.
    """

    rank: int = 0
    size: int = 1
    device: str | None = None
    state: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that does what only one shall do."""
        return self.rank == 0

    def wait(self) -> None:
        """Returns when all processes are here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def from_first(self, value: Any) -> Any:
        """The value that the first process gave."""
        if self.state is None:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]


@contextmanager
def crew(device: str | None) -> Iterator[Crew]:
    """
    The processes of this run; a single one outside a launcher.

    Args:
        device: "cpu", "cuda", ...; default: a GPU for each process if there are any.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Crew(device=device)
        return
    import torch
    from accelerate import PartialState

    accelerator = torch.accelerator.current_accelerator()
    # Processes that share one device, or have none, talk by way of the CPU.
    alone = device == "cpu" or accelerator is None or accelerator.type in ("cpu", "mps")
    state = PartialState(cpu=alone, timeout=PATIENCE)
    if state.num_processes != size:
        raise ValueError(
            f"{size} processes were started, but accelerate knows {state.num_processes}; on a machine without GPU "
            "start them with: accelerate launch --multi_gpu --num_processes N"
        )
    try:
        yield Crew(state.process_index, size, device if alone else str(state.device), state)
    finally:
        state.destroy_process_group()
