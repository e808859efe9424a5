"""The processes that train one model together, `torchrun --nproc-per-node N train.py ...`; or one that is alone.

Process r of N takes every N-th batch of the same order, and gradients are averaged once in an optimizer step. So N
processes with --accumulate A make the steps of one with --accumulate N A. The first reads, encodes, writes and draws;
the others wait for it. Nothing but torch.distributed: gloo between CPUs, nccl between GPUs.
"""
import contextlib
import datetime
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from plumbing.backbone import Transformer
from plumbing.files import InputError

BACKENDS = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
PATIENCE = datetime.timedelta(hours=2)      # for the first process, which may encode a large data set


class Team:
    """rank: this process's number. size: how many there are."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.is_first, self.is_alone = rank == 0, size == 1
        self.mesh: DeviceMesh | None = None             # made when weights are shared

    @classmethod
    def meet(cls) -> "Team":
        """All that torchrun has started, by what it says in the environment. Raises InputError."""
        self = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if self.is_alone or dist.is_initialized():
            return self
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        try:
            dist.init_process_group(BACKENDS, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:     # a port in use, an address that nobody listens at
            reason = str(error).splitlines()[0]
            raise InputError(f"process {self.rank} of {self.size}: cannot meet the others ({reason:.200}); start with "
                             "torchrun --standalone, which takes a free port") from None
        if not self.is_first:
            sys.stdout = open(os.devnull, "w")          # what the first one says is enough
        return self

    def numbers(self, step: int, batches: int) -> range:
        """Of the batches that this process takes in an optimizer step, with `batches` for each process."""
        return range(step * batches * self.size + self.rank, (step + 1) * batches * self.size, self.size)

    # ------------------------------------------------------------------------------------------------ together
    def mean_(self, tensors: Iterable[Tensor | None]) -> None:
        """Average, in place, over the processes."""
        if self.is_alone:
            return
        given = [tensor for tensor in tensors if tensor is not None]
        flat = torch.cat([tensor.flatten() for tensor in given])
        dist.all_reduce(flat)
        for tensor, part in zip(given, (flat / self.size).split([tensor.numel() for tensor in given])):
            tensor.copy_(part.view_as(tensor))

    def any(self, number: int) -> int:
        """The largest of all: whether anybody was asked to stop."""
        if self.is_alone:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    @contextlib.contextmanager
    def in_turn(self, what: str) -> Iterator[None]:
        """The first process does it, and then the others, who find it done and say nothing."""
        if self.is_first:
            yield
        self.wait(what)
        if not self.is_first:
            with contextlib.redirect_stderr(None):
                yield
        self.wait(what)

    def wait(self, what: str) -> None:
        """Until all are here. Raises InputError when one does not come."""
        if self.is_alone:
            return
        try:
            if torch.cuda.is_available():
                dist.barrier()
            else:
                dist.monitored_barrier(timeout=PATIENCE, wait_all_ranks=True)       # of gloo alone; says who is late
        except RuntimeError as error:
            raise InputError(f"process {self.rank} of {self.size}: waits for {what} ({str(error).splitlines()[0]:.200})"
                             "; look at what the other processes say") from None

    def check_same(self, facts: dict[str, str]) -> None:
        """Raises InputError unless all have the same: code, options, data. facts: name -> anything that tells."""
        if self.is_alone:
            return
        digests = [hashlib.sha256(fact.encode()).digest() for fact in facts.values()]
        own = torch.tensor([int.from_bytes(digest[:7], "big") for digest in digests])
        found = [torch.zeros_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        for rank, other in enumerate(found):
            if wrong := [name for name, is_same in zip(facts, (other == found[0]).tolist()) if not is_same]:
                raise InputError(f"process {rank} of {self.size} has other {wrong[0]} than process 0; give the same")

    # ------------------------------------------------------------------------------------------------ weights in parts
    def shard(self, model: Transformer, dtype: torch.dtype) -> None:
        """Each process keeps its part of the float32 weights, and computes in `dtype` with whole blocks (FSDP2); one
        that is alone and computes in float32 keeps all."""
        if self.is_alone and dtype == torch.float32:
            return
        if not dist.is_initialized():                   # alone, but with weights in two precisions
            dist.init_process_group(BACKENDS, store=dist.HashStore(), rank=0, world_size=1)
        # Inputs stay as they are: sigma in bfloat16 would be another noise level. Whole weights never outlive their
        # use, or the teacher would keep those from before its last EMA step.
        self.mesh = self.mesh or init_device_mesh(next(model.parameters()).device.type, (self.size,))
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        assert isinstance(model, nn.Module)             # no annotation says that a Transformer is one
        for module in (*model.blocks().values(), model):
            fully_shard(module, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)
        register_fsdp_forward_method(model, "velocity")

    def gathered(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors in the memory of the first process. All must ask, and the others get nothing."""
        parts = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
        return {name: part.cpu() for name, part in parts if self.is_first}


ALONE = Team()


def leave(status: int) -> int:
    """End one of several processes. While Python ends, a thread of gloo that drops FSDP's last tensor aborts it."""
    if dist.is_initialized():
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    return status


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each process has a part; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def put(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole value into a tensor of which each process has a part."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(value)
