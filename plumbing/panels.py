"""The panels of a training run: what base, student and teacher draw for the same prompts and the same noise."""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import lora
from model import Context
from networks import vae as autoencoder
from plumbing.backbone import Transformer
from plumbing.checkpoints import backbone_of, latent_shape, starting_noise
from plumbing.machine import free, free_gb
from plumbing.pictures import Shape, panel, save_png, to_image
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
    source: Image.Image | None = None       # for editing: the (first) picture that the prompt says how to change


class Panels:
    """The panels of a training run: target, base, student, teacher; the same noise in every cell and every panel."""

    def __init__(self, folder: Path, model: Transformer, shift_of: Shift, steps: int, seed: int,
                 size: Shape, rows: list[PanelRow]) -> None:
        """size: (height, width) of every picture."""
        self.folder, self.model, self.seed, self.rows, self.size = folder, model, seed, rows, size
        shape = latent_shape(folder, *size)
        self.noise = starting_noise(backbone_of(folder), seed, shape)
        self.sigmas = sigma_grid(shift_of(steps, *shape[1:]), steps)
        self.base: list[Image.Image] = []

    def draw(self, path: Path, note: str, student: lora.Adapter, teacher: lora.Adapter | None,
             others: dict[str, lora.Adapter] | None = None) -> None:
        """Write the panel of a student and its teachers: one that is shown the target, and others that read the prompt,
        by the titles of their columns; all of them optional."""
        free()
        device = next(self.model.parameters()).device
        fits = free_gb(device) > 4 * math.prod(self.size) / 2 ** 20     # what decoding takes (benchmarks/README.md)
        vae = autoencoder.load(self.folder, device if fits else "cpu")  # small, not needed between panels

        def pictures(contexts: list[Context], adapter: lora.Adapter | None) -> list[Image.Image]:
            latents = draw(self.model, contexts, self.noise, self.sigmas, adapter)
            return [to_image(vae.decode(z[None].to(next(vae.parameters()).device))[0]) for z in latents]

        steps, prompts = len(self.sigmas) - 1, [row.prompt for row in self.rows]
        texts = [row.student for row in self.rows]
        self.base = self.base or pictures(texts, None)
        given: dict[str, Sequence[Image.Image | None]] = {"source": [row.source for row in self.rows],
                                                          "target": [row.target for row in self.rows]}
        columns = {name: images for name, images in given.items() if any(images)}
        columns |= {"base": self.base, "student": pictures(texts, student)}
        if teacher is not None:
            columns["teacher (sees the target)"] = pictures([row.teacher for row in self.rows], teacher)
        columns |= {title: pictures(texts, adapter) for title, adapter in (others or {}).items()}
        save_png(panel(columns, prompts, f"{note}, {steps} solver steps, seed {self.seed}"), path,
                 {"prompt": "\n".join(prompts), "seed": self.seed, "steps": steps, "lora": note})
