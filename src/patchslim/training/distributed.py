"""`Processes`: connects the processes that train together. It works for a single one, too.

The code of a training is the same for one process and for several, which torchrun or `accelerate
launch` start. This file knows torch.distributed, DDP and FSDP2, and neither models nor data.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from patchslim.errors import BadFile, BadSetting, PatchslimError, TrainingStopped

# How long a process waits for another that is alive and silent. It has to be longer than a
# checkpoint or validation by one process. A process that died is noticed at once.
TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")


class Processes:
    """Number of this process, how many there are, and what they do together.

    Attributes:
        rank: the number of this process, from 0.
        world: how many processes there are.
        device: where the modules and images of this process belong.
        stop_requested: whether this process received SIGTERM. It goes on, so that all can stop
            together at the end of a step: `processes.any(processes.stop_requested)`.
    """

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank = rank
        self.world = world
        self.device = device
        self.stop_requested = False

    @classmethod
    @contextlib.contextmanager
    def connect(cls, device: torch.device | str | None = None) -> Iterator[Processes]:
        """Connects the processes that a launcher started, until the block ends.

        Without a launcher this process is alone.

        Args:
            device: "cpu" or "cuda"; None for a GPU if there is one. Each process gets its own.

        Raises:
            TrainingStopped: another process ended, stays silent or never came.
            BadSetting: there are fewer GPUs than processes.
        """
        wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
        if world == 1:
            alone = cls(0, 1, wanted)
            with _catch_sigterm(alone):
                yield alone
            return
        processes = cls(int(os.environ["RANK"]), world, _own_device(wanted))
        with _catch_sigterm(processes), _explain_lost(world), _process_group(processes.device):
            yield processes

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints for all."""
        return self.rank == 0

    def mean(self, value: float) -> float:
        """Returns the mean of a number over all processes."""
        return self._reduce(value, dist.ReduceOp.SUM) / self.world

    def any(self, flag: bool) -> bool:  # noqa: FBT001 (a flag is all that it takes)
        """Whether the flag is set in at least one process."""
        return self._reduce(float(flag), dist.ReduceOp.MAX) > 0

    def barrier(self) -> None:
        """Waits until all processes have called this."""
        self._reduce(0.0, dist.ReduceOp.SUM)

    def broadcast(self, value: T) -> T:
        """Returns the first process's value, in all processes."""
        if self.world == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, 0)
        first: T = values[0]
        return first

    def check_same_settings(self, settings: Mapping[str, object]) -> None:
        """Refuses settings that differ between the processes."""
        if self.world == 1:
            return
        all_settings: list[Any] = [None] * self.world
        dist.all_gather_object(all_settings, dict(settings))
        ours = all_settings[0]
        for rank, theirs in enumerate(all_settings):
            for name in sorted({*ours, *theirs}):
                if ours.get(name) != theirs.get(name):
                    raise BadSetting(
                        f"The processes were started differently: {name} is {ours.get(name)!r} in "
                        f"process 0 and {theirs.get(name)!r} in process {rank}. Start all with "
                        "the same command on the same files."
                    )

    def wrap(self, module: nn.Module, *, shard: bool) -> nn.Module:
        """Returns the module to call in training. Its gradients are the mean over all processes.

        All processes start with the weights of the first. Make the optimiser afterwards, from the
        parameters of the wrapped module.

        Args:
            module: a module on this process's device, whose forward pass returns tensors, or
                tuples, lists or dictionaries of them.
            shard: whether each process holds only a part of the weights and of the optimiser's
                state (FSDP2) instead of all (DDP). The result is the same. A single process has
                nothing to share, and can resume a sharded run.
        """
        if self.world == 1:
            return module
        if not shard:
            # Some parameters get no gradient: a mask token, an unused head, a frozen host. Which
            # ones changes during a run. DDP has to look for them, or fails in the second step.
            devices = [self.device] if self.device.type == "cuda" else None
            return DistributedDataParallel(module, device_ids=devices, find_unused_parameters=True)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, 0)
        # Only the root is sharded. FSDP gathers the weights of a module when it is called, and our
        # loop calls the parts of a block but never the block.
        # Weights are sharded again after each forward pass. Otherwise a validation, which has no
        # backward pass, would leave the module with other parameters than the optimiser has.
        mesh = init_device_mesh(self.device.type, (self.world,))
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        return module

    @contextlib.contextmanager
    def no_sync(self, module: nn.Module) -> Iterator[None]:
        """Within the block, gradients are added up in each process, and not averaged.

        The next backward pass outside averages them all. Both the forward and the backward pass
        belong inside.
        """
        if isinstance(module, DistributedDataParallel):
            with module.no_sync():
                yield
            return
        synchronise = getattr(module, "set_requires_gradient_sync", lambda _: None)
        synchronise(False)
        try:
            yield
        finally:
            synchronise(True)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Scales all gradients to a norm of at most `limit`, and returns their norm before.

        A limit of 0 leaves them as they are.
        """
        norm = nn.utils.clip_grad_norm_(list(parameters), limit or math.inf)
        return float(_full_tensor(norm))

    def gather(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Returns complete copies of all tensors, on the CPU. Other values stay as they are.

        All processes have to call it. Only the first gets the copies, and the others get {}.
        """
        # One tensor after the other, so that the other processes never hold more than one.
        copies = {}
        for name, value in tensors.items():
            full = _full_tensor(value) if isinstance(value, Tensor) else value
            if self.is_first:
                copies[name] = full.to("cpu", copy=True) if isinstance(full, Tensor) else full
        return copies

    def full_state(self, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """Returns the state of both as a single process would have it; {} in all but the first."""
        state = optimizer.state_dict()
        full = {
            "model": self.gather(_unwrap(module).state_dict()),
            "optimizer": {
                "state": {index: self.gather(each) for index, each in state["state"].items()},
                "param_groups": state["param_groups"],
            },
        }
        return full if self.is_first else {}

    def restore(self, module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Gives module and optimiser a state that `full_state` returned.

        The number of processes may have been another. Every process needs the complete state.

        Raises:
            BadFile: the state is of another model or optimiser.
        """
        bare = _unwrap(module)
        try:
            model = shard_tensors(state["model"], bare.state_dict())
            bare.load_state_dict(model)
            parameters = [each for group in optimizer.param_groups for each in group["params"]]
            saved = {
                index: shard_tensors(values, dict.fromkeys(values, parameters[index]))
                for index, values in state["optimizer"]["state"].items()
            }
            optimizer.load_state_dict({**state["optimizer"], "state": saved})
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            if _is_process_lost(error):
                raise
            reason = " ".join(str(error).split())[:200]
            raise BadFile(
                f"The checkpoint is of another model, method or optimiser ({reason}). "
                "Go on with the settings that the run began with, or train from the start."
            ) from error

    def _reduce(self, value: float, how: Any) -> float:
        """Combines a number over all processes."""
        if self.world == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(number, how)
        return float(number)


def shard_tensors(tensors: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Copies complete tensors, and shards each like the tensor of the same name in `like`."""
    return {name: _shard_tensor(value, like.get(name)) for name, value in tensors.items()}


def _shard_tensor(value: Any, like: Any) -> Any:
    """Copies one value, and shards it like `like` if that is sharded."""
    if not isinstance(value, Tensor):
        return value
    if not hasattr(like, "placements") or like.shape != value.shape:
        return value.clone()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _full_tensor(tensor: Tensor) -> Tensor:
    """Returns the complete tensor, with the parts that other processes hold."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def _unwrap(module: nn.Module) -> nn.Module:
    """Returns the module inside DDP's wrapper."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def _own_device(wanted: torch.device) -> torch.device:
    """Returns the device of this process: the CPU, or the GPU with its local rank."""
    if wanted.type != "cuda":
        return wanted
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise BadSetting(
            f"Process {local} of this machine has no GPU of its own: there are {count}. "
            f"Start {count} a machine: torchrun --nproc-per-node {count}"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextlib.contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """Connects the processes for the length of the block, unless they are connected already."""
    if dist.is_initialized():
        yield
        return
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    except ValueError as error:
        raise TrainingStopped(
            f"RANK and WORLD_SIZE are set, and the processes cannot be connected: {error}. Start "
            "with torchrun or accelerate launch, or unset both to train in one process."
        ) from error
    broken = True
    try:
        yield
        broken = False
    finally:
        # After an error NCCL would wait here for the lost process, and hide the error.
        if not (broken and device.type == "cuda"):
            dist.destroy_process_group()
            # DDP's wrapper is in a cycle and holds the group. Threads of the group that are left
            # when the interpreter ends would abort the process.
            gc.collect()


@contextlib.contextmanager
def _catch_sigterm(processes: Processes) -> Iterator[None]:
    """Within the block, SIGTERM sets `stop_requested` instead of ending the process.

    A launcher sends SIGTERM as soon as one process has failed. Without this, the others would end
    before they can say why. A handler that is set already stays.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def note(*_: object) -> None:
        processes.stop_requested = True

    signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _explain_lost(world: int) -> Iterator[None]:
    """Turns the loss of a process into TrainingStopped, and passes our errors to the launcher."""
    try:
        try:
            yield
        except RuntimeError as error:
            if not _is_process_lost(error):
                raise
            raise TrainingStopped(
                f"Training was stopped: another of its {world} processes ended or does not answer. "
                "What that one said is the reason; go on from the last checkpoint."
            ) from error
    except PatchslimError as error:
        _tell_launcher(str(error))
        raise


def _is_process_lost(error: Exception) -> bool:
    """Tells whether the error says that another process is gone. Gloo has no error class for it."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _tell_launcher(message: str) -> None:
    """Writes the message into the file whose content torchrun prints at the end."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        entry = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": entry}), encoding="utf-8")
