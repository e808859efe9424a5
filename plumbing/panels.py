"""The panels of a training run: what base, student and teacher draw for the same prompts and the same noise."""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from lora import Bound
from model import Context
from networks import vae as autoencoder
from plumbing.checkpoints import backbone_of, latent_shape, starting_noise
from plumbing.machine import free, free_gb
from plumbing.pictures import TILE, Shape, panel, save_png, to_image
from rollout import sigma_grid
from sample import draw

Shift = Callable[[int, int, int], float]  # solver steps, height and width of latents -> time shift of the grid


@dataclass(frozen=True)
class PanelRow:
    """One prompt of a training run's panels."""
    prompt: str
    target: Image.Image | None
    student: Context                        # Eq. 4
    teacher: Context
    shape: Shape                            # (height, width) of what is drawn
    source: Image.Image | None = None       # for editing: the (first) picture that the prompt says how to change
    label: str = ""                         # on the target, or on the source where there is none


class Panels:
    """The panels of a training run: target, base, student, teacher; the same noise for every column and every panel."""

    def __init__(self, folder: Path, device: torch.device, shift_of: Shift, steps: int, seed: int,
                 rows: list[PanelRow]) -> None:
        self.folder, self.device, self.seed, self.steps, self.rows = folder, device, seed, steps, rows
        noise = [starting_noise(backbone_of(folder), seed, latent_shape(folder, *row.shape)) for row in rows]
        self.noise = [row.to(device) for row in noise]
        self.sigmas = [sigma_grid(shift_of(steps, *row.shape[2:]), steps) for row in noise]
        self.base: list[Image.Image] = []

    def draw_base(self, base: Bound) -> None:
        """The column of the untuned model, once, while there is one."""
        self.base = self.pictures(self.vae(), "base", base, [row.student for row in self.rows])

    def draw(self, path: Path, note: str, student: Bound, teacher: Bound | None, others: dict[str, Bound] | None = None,
             writes: bool = True) -> None:
        """Write the panel of a student and its teachers: one that is shown the target, and others that read the prompt,
        by the titles of their columns; all of them optional. The student's pictures that it shrinks are beside it.

        writes: whether this process does; several that share the weights must all draw."""
        vae, texts, prompts = self.vae(), [row.student for row in self.rows], [row.prompt for row in self.rows]
        facts: dict[str, str | int] = {"seed": self.seed, "steps": self.steps, "lora": note}
        columns: dict[str, Sequence[Image.Image | None]] = {
            "source": [row.source for row in self.rows], "target": [row.target for row in self.rows],
            "base": self.base, "student": self.pictures(vae, "student", student, texts)}
        if teacher is not None:
            columns["teacher (sees the target)"] = self.pictures(vae, "teacher", teacher,
                                                                 [row.teacher for row in self.rows])
        columns |= {title: self.pictures(vae, title, other, texts) for title, other in (others or {}).items()}
        if not writes:
            return
        for i, picture in enumerate(columns["student"], 1):
            if picture and picture.width > TILE:
                save_png(picture, path.with_name(f"{path.stem}_{i}.png"), {"prompt": prompts[i - 1], **facts})
        labels = {("target" if row.target else "source", i): row.label for i, row in enumerate(self.rows)}
        table = panel({name: images for name, images in columns.items() if any(images)}, prompts,
                      f"{note}, {self.steps} solver steps, seed {self.seed}", labels)
        save_png(table, path, {"prompt": "\n".join(prompts), **facts})

    def vae(self) -> autoencoder.Autoencoder:
        """Small, and not needed between panels; on the CPU where the GPU has no room for what decoding takes."""
        free()
        fits = free_gb(self.device) > 4 * max(math.prod(row.shape) for row in self.rows) / 2 ** 20  # benchmarks/README
        return autoencoder.load(self.folder, self.device if fits else "cpu")

    def pictures(self, vae: autoencoder.Autoencoder, name: str, network: Bound, contexts: list[Context]
                 ) -> list[Image.Image]:
        latents = [draw(network, [context], noise, sigmas, name)
                   for context, noise, sigmas in zip(contexts, self.noise, self.sigmas, strict=True)]
        return [to_image(vae.decode(z.to(next(vae.parameters()).device))[0]) for z in latents]
