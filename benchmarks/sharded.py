"""Memory of one of N GPUs that share all weights of a model, simulated: `python -m benchmarks.real_size --tune full`.

The real program, `Full` with FSDP2, takes one optimizer step on fake tensors, as the first of N processes whose
messages go nowhere (torch's "fake" process group). FSDP2 frees a whole block by resizing its storage to nothing, which
fake storages do not show; so the two functions that do it tell `Live`.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.live import GIB, Grid, Live, fused_norms
from plumbing.full import Full
from plumbing.team import Team
from train import dopsd


@contextmanager
def one_of(processes: int) -> Iterator[Team]:
    """The first process of some that are not there."""
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        team = Team(0, processes)
        team.mesh = init_device_mesh("cpu", (processes,))
        yield team
    finally:
        dist.destroy_process_group()


@contextmanager
def told(live: Live) -> Iterator[None]:
    """FSDP2 allocates and frees whole blocks before the eyes of `live`."""
    def alloc(tensor: Tensor) -> None:
        live.count(tensor)
        live.resize(tensor.untyped_storage(), tensor.numel() * tensor.itemsize)

    def free(tensor: Tensor) -> None:
        live.count(tensor)
        live.resize(tensor.untyped_storage(), 0)

    before = _fsdp_param.alloc_storage, _fsdp_param.free_storage
    _fsdp_param.alloc_storage, _fsdp_param.free_storage = alloc, free
    try:
        yield
    finally:
        _fsdp_param.alloc_storage, _fsdp_param.free_storage = before


def simulate(load, inputs, weight, sigmas: list[float], processes: int, keeps: bool
             ) -> tuple[float, float]:
    """GiB of each process between steps, gradients and Adam's moments included, and at the peak of a step.

    load(dtype): a transformer with random weights. inputs() -> x at sigma = 1, contexts of student and teacher. weight:
    of the loss. keeps: whether there is an untuned model for --keep.
    """
    with (one_of(processes) as team, FakeTensorMode(allow_non_fake_inputs=True), fused_norms(), Live() as live,
          told(live)):
        tuned = Full(load, {}, torch.bfloat16, team, "ema", keeps)
        optimizer = torch.optim.AdamW(tuned.parameters().values(), foreach=False, weight_decay=0.0)     # as in Run
        for parameter in tuned.parameters().values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        x, c_s, c_t = inputs()
        resident = live.peak = live.now
        for loss in dopsd(tuned.student(c_s), tuned.teacher(c_t), x, Grid(sigmas), weight, range(len(sigmas) - 1)):
            loss.backward()
        tuned.clip_(1.0)
        optimizer.step()
        tuned.ema_(0.999)
        return resident / GIB, live.peak / GIB
