"""Several processes that train one model: torchrun starts them, each computes a part of every batch.

`runtime.processes` starts them on this machine; on several machines, torchrun itself does (docs/TRAINING.md). Either
way a process knows its place from the environment that torchrun sets.
"""

from __future__ import annotations

import datetime
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stages.core.errors import InputError, Stopped
from stages.core.loader import Shard
from stages.core.stopping import watch_owner

_TIMEOUT = datetime.timedelta(minutes=10)  # of one exchange: longer than any rank may be behind another


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def local_rank() -> int:
    """Number of this process among those on this machine."""
    return int(os.environ["LOCAL_RANK"]) if is_worker() else 0


def local_count() -> int:
    """Processes on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if is_worker() else 1


def launch(module: str, num_processes: int) -> None:
    """Run `python -m module` in `num_processes` processes of this machine, through torchrun's agent.

    Raises Stopped when this process is told to stop (the workers are told, and save), and InputError when a worker
    fails, naming it.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"train-{os.getpid()}",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.2,
        shutdown_timeout=int(_TIMEOUT.total_seconds()),  # a step may be long, and the checkpoint comes after it
    )
    ended = watch_owner(lambda _: os.kill(os.getpid(), signal.SIGTERM))
    try:
        elastic_launch(config, sys.executable)("-m", module)
    except SignalException as error:
        raise Stopped("the processes were told to stop; what they said is above", error.sigval) from None
    except ChildFailedError as error:
        # Others end because they lost it (exit status 1) or are told to (SIGTERM).
        consequences = (1, -signal.SIGTERM)
        rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode in consequences, item[0]))
        how = failure.signal_name() if failure.exitcode < 0 else f"exit status {failure.exitcode}"
        stop = -failure.exitcode if failure.exitcode < 0 else failure.exitcode - 128
        if failure.exitcode > 128 and stop in (signal.SIGTERM, signal.SIGINT):
            raise Stopped("the processes were stopped; what they said is above", stop) from None
        if failure.exitcode == 2:  # its message names the mistake
            raise InputError(f"process {rank} of {num_processes} refused to go on: see above") from None
        raise InputError(
            f"process {rank} of {num_processes} ended with {how}, so the others were ended too; the last "
            "checkpoint is kept: run the same command again, and training goes on from there"
        ) from None
    finally:
        ended.set()


class World:
    """The processes that train together; with one process, every exchange is a no-op."""

    def __init__(self, device: torch.device) -> None:
        self.shard = Shard(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Shard()
        # Wishes to stop are exchanged on the CPU, so that a GPU is not waited for.
        self._control: Any = dist.new_group(backend="gloo", timeout=_TIMEOUT) if self.shard.num_shards > 1 else None
        self._device = device
        self._pending: tuple[Tensor, dist.Work] | None = None

    @property
    def writes(self) -> bool:
        """Whether this process writes files and speaks: rank 0 alone does."""
        return self.shard.rank == 0

    def describe(self) -> str:
        """Where the processes compute."""
        count = self.shard.num_shards
        return str(self._device) if count == 1 else f"{count} x {self._device.type}"

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in a train step: gradients are averaged over the processes."""
        if self.shard.num_shards == 1:
            return model
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[self._device.index] if self._device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes of a tensor."""
        if self.shard.num_shards == 1:
            return values
        # In float64, where the mean of equal values is the value: a mean that comes out of a checkpoint is taken again.
        result = values.to(torch.float64)
        dist.all_reduce(result)
        return (result / self.shard.num_shards).to(values.dtype)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (n, ...) of all processes on the CPU, in the order of their ranks."""
        if self.shard.num_shards == 1:
            return rows
        parts: list[Any] = [None] * self.shard.num_shards
        dist.all_gather_object(parts, rows.cpu(), group=self._control)
        return torch.cat(parts)

    def agree(self, wish: int, wait: bool = False) -> int:
        """The largest wish of all processes. All learn the same at the same call.

        Without `wait` it is the largest of the call before, so that nobody waits: between steps that is soon enough.
        """
        if self.shard.num_shards == 1:
            return wish
        flag = torch.tensor(wish)
        work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._control, async_op=True)
        assert work is not None
        if wait:
            work.wait()
            return int(flag.item())
        before, self._pending = self._pending, (flag, work)
        if before is None:
            return 0
        before[1].wait()
        return int(before[0].item())

    def share_object(self, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """Rank 0's tensors and plain values, in every process (None stays None)."""
        if self.shard.num_shards == 1:
            return value
        buffer = io.BytesIO()
        torch.save(value, buffer)
        content = [buffer.getvalue() if self.writes else None]
        dist.broadcast_object_list(content, src=0, group=self._control)
        assert content[0] is not None
        result: dict[str, Any] | None = torch.load(io.BytesIO(content[0]), map_location="cpu", weights_only=True)
        return result

    def check_same(self, what: str, value: str) -> None:
        """InputError when the processes differ in a value: one of the machines has other params, data or code."""
        if self.shard.num_shards == 1:
            return
        values: list[Any] = [None] * self.shard.num_shards
        dist.all_gather_object(values, value, group=self._control)
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise InputError(f"processes {others} have other {what} than process 0: bring the machines to one state")


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """Join the processes that torchrun started; alone without torchrun. ConnectionError when one of them is gone."""
    if not is_worker():
        yield World(device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield World(device)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise ConnectionError(f"another process of this job is gone: {str(error).splitlines()[0][:200]}") from None
    finally:
        dist.destroy_process_group()
