"""Pictures that the undistilled model draws in many steps, for D' of lightning.py: python -m tiny.making.lightning_pool

Without x_t (Eq. 23), what the teacher made need not start where the student does. So the teacher can draw with many
steps, once for every relaxed stage (`--pool`), where crossing the student's segments with it would cost 64 steps with
guidance at every optimizer step. It is the paper's skip-level teacher, taken to its end.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model import Context
from plumbing import program
from plumbing.checkpoints import model_folder, shift_rule
from plumbing.files import InputError, check_writable, open_safetensors, write_tensors
from plumbing.machine import device_and_dtype
from plumbing.options import option, parse
from rollout import sample, sigma_grid
from tiny.making.material import WORLD, pack, read_network, source_of, undistilled, unpack, warn_distilled
from tiny.models import guided
from tiny.world import generator

CHUNK = 16


@dataclass
class Options:
    """What is drawn."""
    out: str = option("out/tiny/lightning/pool", "folder of the pictures; the same command goes on where it stopped")
    model: str = option("embedded", "checkpoint folder or hub id of an undistilled model")
    data: str = option(WORLD, "captions: a .jsonl or a folder of .txt; default those of the embedded models' world")
    count: int = option(512, "pictures")
    steps: int = option(64, "solver steps")
    guidance: float = option(2.0, "of the undistilled model")
    size: int = option(1024, "pixels of a side, with --data; the world has its own")
    seed: int = option(0, "of captions and noise")
    device: str = option("auto", "cpu, cuda or auto")


class Pool:
    """What `main` drew: x0 (N, C, H, W) and the student's contexts."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError."""
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise InputError(f"--pool {folder}: no pictures there; draw them with tiny.making.lightning_pool")
        x0, self.contexts = [], []
        for path in files:
            with open_safetensors(path) as file:
                state = {name: file.get_tensor(name) for name in file.keys()}
            x0.append(state["x0"])
            self.contexts += unpack(state, "context", len(state["x0"]))
        self.x0 = torch.cat(x0)

    def draw(self, count: int, g: torch.Generator) -> tuple[Tensor, list[Context]]:
        chosen = torch.randint(len(self.x0), (count,), generator=g)
        return self.x0[chosen], [self.contexts[i] for i in chosen.tolist()]


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    cfg = parse(Options, argv, __doc__)
    if min(cfg.count, cfg.steps, cfg.size) < 1:
        raise InputError("--count, --steps and --size: give 1 or more")
    out, folder = Path(cfg.out), model_folder(cfg.model)
    check_writable(out, f"--out {out}")
    base, device, dtype = undistilled(folder), *device_and_dtype(cfg.device, "auto")
    warn_distilled(base)
    source = source_of(folder, cfg.data, cfg.size, cfg.seed, device, dtype)
    net, _ = read_network(None, base, device, dtype)
    sigmas = sigma_grid(shift_rule(folder)(cfg.steps, *source.shape[1:]), cfg.steps)
    for chunk in tqdm(range(-(-cfg.count // CHUNK)), mininterval=5):
        path = out / f"{chunk:05d}.safetensors"
        if path.is_file():
            continue
        g = generator(cfg.seed + 2, chunk)
        mine, told = source.draw(chunk, CHUNK, g)
        noise = torch.randn(CHUNK, *source.shape, generator=g).to(device)
        walk = guided(net, [c.to(device) for c in told], [source.empty.to(device)] * CHUNK, cfg.guidance)
        write_tensors(path, {"x0": sample(walk, noise, sigmas), **pack("context", mine)})
    print(f"done     {out}")
    return 0


if __name__ == "__main__":
    program.run(main)
