"""What the training scripts of this folder share: optimizer, schedule, weight average, log, resume.

Every stage is a function of its seed: the batch of step n comes from `world.generator(seed, n)`, so a run that was
stopped and started again is the same run. State is safetensors plus JSON, written atomically.

Under `torchrun --nproc-per-node 2 -m tiny.making.<stage>` two processes with a thread each share every batch, which on
two cores is faster than one process with two threads.
"""
import copy
import json
import os
import time
from pathlib import Path
from collections.abc import Callable, Iterator

import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from tqdm import tqdm

from plumbing.files import write_json, write_tensors


def join() -> tuple[int, int]:
    """(rank, number of processes); joins the others when started by torchrun."""
    if "RANK" not in os.environ:
        return 0, 1
    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    return distributed.get_rank(), distributed.get_world_size()


def one_matrix(name: str, weight: Tensor) -> tuple[Tensor, ...]:
    """The weight as a matrix: a convolution becomes (out, in * height * width)."""
    return (weight.flatten(1),)


class Stage:
    """Muon on the matrices named by `is_matrix`, AdamW on the rest; linear warm-up, then a linear decay to zero.

    model: all its parameters are trained. `average` holds an exponential moving average of them, which is what is
    shipped. pieces(name, weight) -> views of a weight, each a matrix of its own to Muon: Linears that are fused into
    one weight are updated as if they were not.
    """

    def __init__(self, model: nn.Module, out: Path, steps: int, adam: float, muon: float = 0.0,
                 is_matrix: Callable[[str], bool] = lambda name: False, warmup: int = 100, ema: float = 0.999,
                 clip: float = 1.0, pieces: Callable[[str, Tensor], tuple[Tensor, ...]] = one_matrix) -> None:
        self.model, self.out, self.steps, self.warmup, self.ema, self.clip = model, Path(out), steps, warmup, ema, clip
        self.names, self.pieces = dict(model.named_parameters()), pieces
        self.parts = {n: [nn.Parameter(view) for view in pieces(n, p.data)] for n, p in self.names.items()
                      if muon and p.ndim > 1 and is_matrix(n)}                  # views of the same memory, for Muon
        matrices = {f"{n}[{i}]": view for n, views in self.parts.items() for i, view in enumerate(views)}
        others = {n: p for n, p in self.names.items() if n not in self.parts}
        self.matrices, self.targets = matrices, {**others, **matrices}
        adamw = torch.optim.AdamW(others.values(), lr=adam, betas=(0.9, 0.99), weight_decay=0.0)
        self.optimizers = [(adamw, list(others), adam)]
        if matrices:
            orthogonal = torch.optim.Muon(matrices.values(), lr=muon, weight_decay=0.0)
            self.optimizers.append((orthogonal, list(matrices), muon))
        self.average = {n: p.detach().clone() for n, p in self.names.items()}
        self.step, self.started = 0, time.time()
        self.rank, self.processes = join()
        self.resume()

    def resume(self) -> None:
        """Continue from the state in `out`, if there is one."""
        if not (self.out / "state.safetensors").is_file():
            return
        state = load_file(self.out / "state.safetensors")
        self.step = json.loads((self.out / "state.json").read_text())["step"]
        for name, parameter in self.names.items():
            parameter.data.copy_(state[f"model.{name}"])
            self.average[name].copy_(state[f"average.{name}"])
        for optimizer, names, _ in self.optimizers:
            for name in names:
                prefix = f"optimizer.{name}."
                optimizer.state[self.targets[name]] = {key[len(prefix):]: value for key, value in state.items()
                                                       if key.startswith(prefix)}
        print(f"resumed at step {self.step}")

    def save(self) -> None:
        state = {f"model.{n}": p for n, p in self.names.items()} | {f"average.{n}": a for n, a in self.average.items()}
        for optimizer, names, _ in self.optimizers:
            for name in names:
                state |= {f"optimizer.{name}.{key}": torch.as_tensor(value)
                          for key, value in optimizer.state[self.targets[name]].items()}
        write_tensors(self.out / "state.safetensors", state)
        write_json(self.out / "state.json", {"step": self.step})

    def run(self, loss_of: Callable[[int], tuple[Tensor, dict[str, float]]], save_every: int = 500) -> Iterator[int]:
        """Trains; yields the step number after each `save_every` steps (the state is saved) and after the last one.

        loss_of(step) -> (loss, numbers for the log).
        """
        bar = tqdm(range(self.step, self.steps), initial=self.step, total=self.steps, mininterval=5,
                   disable=self.rank > 0)
        for step in bar:
            rate = min((step + 1) / self.warmup, (self.steps - step) / max(self.steps - self.warmup, 1), 1.0)
            loss, numbers = loss_of(step)
            for optimizer, _, base in self.optimizers:
                optimizer.param_groups[0]["lr"] = base * rate
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            self.share_gradients()
            norm = float(nn.utils.clip_grad_norm_(self.names.values(), self.clip))
            if not norm < float("inf"):
                raise SystemExit(f"step {step}: the gradient is not finite; the state of the last save is in "
                                 f"{self.out}")
            for name, views in self.parts.items():
                gradient = self.names[name].grad
                parts = [None] * len(views) if gradient is None else self.pieces(name, gradient)
                for view, part in zip(views, parts, strict=True):
                    view.grad = part
            for optimizer, _, _ in self.optimizers:
                optimizer.step()
            self.update_average()
            self.step = step + 1
            numbers = {"loss": loss.item(), "grad": norm, **numbers}
            bar.set_postfix({k: f"{v:.3f}" for k, v in numbers.items()}, refresh=False)
            if self.rank > 0:
                continue
            self.log({"step": self.step, **numbers})
            if self.step % save_every == 0 or self.step == self.steps:
                self.save()
                yield self.step

    def share_gradients(self) -> None:
        """Average the gradients of all processes, in one message."""
        if self.processes == 1:
            return
        gradients = [p.grad for p in self.names.values() if p.grad is not None]
        message = torch.cat([g.flatten() for g in gradients]) / self.processes
        distributed.all_reduce(message)
        for gradient, part in zip(gradients, message.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def update_average(self) -> None:
        decay = min(self.ema, (1 + self.step) / (10 + self.step))                        # young averages forget faster
        torch._foreach_lerp_(list(self.average.values()), [self.names[n].detach() for n in self.average], 1 - decay)

    def log(self, numbers: dict[str, float]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps({**numbers, "seconds": round(time.time() - self.started, 1)}) + "\n")

    def averaged(self) -> nn.Module:
        """The model with its averaged weights put in (a copy)."""
        model = copy.deepcopy(self.model).eval()
        for name, parameter in model.named_parameters():
            parameter.data.copy_(self.average[name])
        return model
