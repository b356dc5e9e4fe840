"""`Processes`: those that share one training, or one that is alone.

It knows torch.distributed, DDP and FSDP2, and neither models nor data. Alone, every method does the
same for one, so that a training is written once. torchrun and `accelerate launch` start several.
"""

from __future__ import annotations

import contextlib
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

# How long one waits for another that lives and says nothing: longer than a checkpoint or a
# validation that one does for all. One that died is noticed at once.
TIMEOUT = timedelta(minutes=30)

T = TypeVar("T")


class Processes:
    """Which process this is, of how many, and on which device it works.

    Attributes:
        rank, world: the number of this process, and of all.
        device: where its modules and images belong.
        told_to_stop: whether it received SIGTERM. It goes on, so that all can stop together at
            the end of a step: `processes.any(processes.told_to_stop)`.
    """

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank = rank
        self.world = world
        self.device = device
        self.stop_requested = False

    @classmethod
    @contextlib.contextmanager
    def connect(cls, device: torch.device | str | None = None) -> Iterator[Processes]:
        """The processes that a launcher started, connected until the block ends; else one alone.

        Args:
            device: "cpu" or "cuda", of which each process gets its own; None for what there is.

        Raises:
            BrokenRun: where another process ends, stays silent or never comes.
        """
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        world = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
        if world == 1:
            alone = cls(0, 1, place)
            with _catch_sigterm(alone):
                yield alone
            return
        here = cls(int(os.environ["RANK"]), world, _own_device(place))
        with _catch_sigterm(here), _explain_lost(world), _process_group(here.device):
            yield here

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def mean(self, value: float) -> float:
        """The mean of a number over all processes."""
        return self._reduce(value, dist.ReduceOp.SUM) / self.world

    def any(self, flag: bool) -> bool:  # noqa: FBT001 (a flag is all that it takes)
        """Whether it is so in at least one process."""
        return self._reduce(float(flag), dist.ReduceOp.MAX) > 0

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self._reduce(0.0, dist.ReduceOp.SUM)

    def broadcast(self, value: T) -> T:
        """The first process's value, in all of them."""
        if self.world == 1:
            return value
        held: list[Any] = [value]
        dist.broadcast_object_list(held, 0)
        first: T = held[0]
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
        """The module to call in training, whose gradients are the mean over all processes.

        All begin with the weights of the first. Its forward pass returns tensors, or tuples, lists
        or dictionaries of them. The optimiser is made afterwards, of the wrapped parameters.

        Args:
            module: on this process's device.
            shard: whether each process holds a part of the weights and of the optimiser's state
                (FSDP2) instead of all (DDP). The result is the same; alone there is nobody to share
                with, and a sharded run can be resumed by one process as it is.
        """
        if self.world == 1:
            return module
        if not shard:
            # A mask token, a head that a method leaves out, a frozen host: parameters that get no
            # gradient are ordinary here, and which they are changes during a run. Without the
            # search for them DDP fails in the second step.
            own = [self.device] if self.device.type == "cuda" else None
            return DistributedDataParallel(module, device_ids=own, find_unused_parameters=True)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, 0)
        # The root and nothing in it: our loop uses the parts of a block without calling the block,
        # whose weights would therefore never be gathered if it were sharded by itself.
        # Divided again after each forward pass: one without a backward pass, as in a validation,
        # would leave the module with other parameters than the optimiser has.
        mesh = init_device_mesh(self.device.type, (self.world,))
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        return module

    @contextlib.contextmanager
    def no_sync(self, module: nn.Module) -> Iterator[None]:
        """Gradients of passes inside stay in their process, to be averaged with the next outside.

        Both the forward and the backward pass belong inside.
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
        """The norm of all gradients, which are then scaled to at most `limit`; 0 for any."""
        norm = nn.utils.clip_grad_norm_(list(parameters), limit or math.inf)
        return float(_full_tensor(norm))

    def gather(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Copies on the CPU, of which none is a part; only in the first process, else empty.

        All processes have to call it. What is no tensor stays as it is.
        """
        # One after the other, so that no process but the first ever holds more than one.
        copies = {}
        for name, value in tensors.items():
            full = _full_tensor(value) if isinstance(value, Tensor) else value
            if self.is_first:
                copies[name] = full.to("cpu", copy=True) if isinstance(full, Tensor) else full
        return copies

    def full_state(self, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        """The state of both as one process alone would have it; empty but in the first process."""
        state = optimizer.state_dict()
        full = {
            "model": self.gather(_unwrap(module).state_dict()),
            "optimizer": {
                "state": {place: self.gather(each) for place, each in state["state"].items()},
                "param_groups": state["param_groups"],
            },
        }
        return full if self.is_first else {}

    def restore(self, module: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
        """Gives module and optimiser the state that `full_state` returned in however many.

        Every process needs it. Raises BadFile where it is of another model or optimiser.
        """
        bare = _unwrap(module)
        try:
            model = shard_tensors(state["model"], bare.state_dict())
            bare.load_state_dict(model)
            parameters = [each for group in optimizer.param_groups for each in group["params"]]
            saved = {
                place: shard_tensors(values, dict.fromkeys(values, parameters[place]))
                for place, values in state["optimizer"]["state"].items()
            }
            optimizer.load_state_dict({**state["optimizer"], "state": saved})
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            if _is_process_lost(error):
                raise
            why = " ".join(str(error).split())[:200]
            raise BadFile(
                f"The checkpoint is of another model, method or optimiser ({why}). "
                "Go on with the settings that the run began with, or train from the start."
            ) from error

    def _reduce(self, value: float, how: Any) -> float:
        """One number made of every process's."""
        if self.world == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(number, how)
        return float(number)


def shard_tensors(tensors: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of full tensors, each divided over the processes as its namesake in `like` is."""
    return {name: _shard_tensor(value, like.get(name)) for name, value in tensors.items()}


def _shard_tensor(value: Any, like: Any) -> Any:
    """A copy of the value, of which this process holds what it holds of `like`."""
    if not isinstance(value, Tensor):
        return value
    if not hasattr(like, "placements") or like.shape != value.shape:
        return value.clone()
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def _full_tensor(tensor: Tensor) -> Tensor:
    """The tensor with the parts that the other processes hold."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def _unwrap(module: nn.Module) -> nn.Module:
    """The module under its own names."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def _own_device(place: torch.device) -> torch.device:
    """The device of this process, of those of its machine."""
    if place.type != "cuda":
        return place
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
    """Connects the processes, unless somebody has done so, and parts them in the end."""
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
        # NCCL would wait here for the one that is lost, and nobody would read why this one ends.
        if not (broken and device.type == "cuda"):
            dist.destroy_process_group()


@contextlib.contextmanager
def _catch_sigterm(processes: Processes) -> Iterator[None]:
    """Has SIGTERM be noted instead of ending the process, unless somebody listens already.

    A launcher sends it as soon as one process failed. Without this the others would end before
    they can say why.
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
    """Turns the loss of a process into one error, and tells the launcher of any of ours."""
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
    """Whether the error is that another process is gone. Gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _tell_launcher(message: str) -> None:
    """Leaves the message where torchrun looks for it, to show it in its own last words."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        said = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": said}), encoding="utf-8")
