"""Larger sets in a style that pre-training never drew, and how near pictures of new captions come to that style.

A set is what continued tuning learns from: many pictures, one style, captions that say "in [V] style" or, if the set is
plain, nothing of the style.
"""
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

import data
from plumbing.backbone import Transformer
from plumbing.pictures import save_png
from tiny.concepts import Concept, key_of, write_json_lines
from tiny.score import Judge, Prompts, new_scenes, of_concept, of_ordinary
from tiny.world import STYLE_ATTRIBUTES, Renderer, caption, draw_scenes, random_tell, scene, to_pil

ALL_BUT_STYLE = ("size", "pattern", "main", "place", "backdrop")
BASE, TEACHER, TRUE = "base", "teacher's view", "true pictures"     # what `StyleMeasures` takes in place of a student


@dataclass(frozen=True)
class StyleSet:
    """count: pictures. prompts: new captions to measure with. Sets of one style have the same scenes of both."""
    line: str
    texture: str
    count: int
    prompts: int
    seed: int
    plain: bool = False     # whether captions say nothing of the style

    @property
    def style(self) -> str:
        return f"{self.line}-{self.texture}"

    @property
    def name(self) -> str:
        return self.style + "-plain" * self.plain

    @property
    def row(self) -> Tensor:
        """A scene (9,) that has the style."""
        return scene(line=self.line, texture=self.texture)

    def scenes(self) -> tuple[Tensor, Tensor]:
        """Of the pictures (count, 9), and of the new captions (prompts, 9); none is in both."""
        g = data.generator(self.seed, "scenes", self.style)
        rows, new = (new_scenes("style", self.row, count, g) for count in (self.count, 4 * self.prompts))
        return rows, new[~(new[:, None] == rows).all(2).any(1)][:self.prompts]

    def caption(self, row: Tensor, tell: Iterable[str] = ALL_BUT_STYLE) -> str:
        tell = {*tell, "style"} - ({"style"} if self.plain else set())
        return caption(row, tuple(tell), "style")

    def write(self, parent: Path, render: Renderer, tuning: bool) -> Concept:
        """Draw the folder parent/NAME; many captions leave something open. tuning: of `Concept`."""
        folder, lines, g = parent / self.name, [], data.generator(self.seed, "set", self.style)
        rows, _ = self.scenes()
        for number, (row, picture) in enumerate(zip(rows, render.draw(rows, g)), 1):
            save_png(to_pil(picture), folder / f"{number:03d}.png", {})
            lines.append({"file_name": f"{number:03d}.png", "text": self.caption(row, random_tell(g))})
        write_json_lines(folder / "metadata.jsonl", lines)
        return Concept(self.name, "style", tuple(self.row.tolist()), folder, key_of(data.read_folder(folder)), tuning)


def styled_prompts(count: int, g: torch.Generator) -> Prompts:
    """Ordinary prompts, about objects that no stage ever drew, in styles that pre-training knows.

    All say their style: only what is said counts, so a model whose usual style has moved can still follow them.
    """
    rows = draw_scenes(8 * count, g, styled=1.0, held_out="object")
    rows = rows[rows[:, -len(STYLE_ATTRIBUTES):].any(1)][:count]        # the usual style, flat spotted, is left unsaid
    told = [random_tell(g) for _ in rows]
    return Prompts(rows, [caption(row, tell) for row, tell in zip(rows, told)], told, "")


class StyleMeasures:
    """Measures networks on new captions of sets, and on ordinary prompts; these and all noises are the same for all."""

    def __init__(self, sets: Iterable[StyleSet], judge: Judge, steps: int) -> None:
        """steps: of the solver."""
        self.judge, self.steps, self.untuned, self.asked = judge, steps, judge.net, {}
        for one in sets:
            rows, g = one.scenes()[1], data.generator(one.seed, "prompts", one.style)
            true, other = (judge.reader.render.draw(rows, g) for _ in range(2))
            prompts = Prompts(rows, [one.caption(row) for row in rows], [], "style")
            self.asked[one.name] = prompts, true, other, judge.noise(len(rows), g)
            g = data.generator(one.seed, "ordinary prompts")
            self.ordinary = styled_prompts(one.prompts, g)
            self.usual = judge.inputs(self.ordinary, g)

    def __call__(self, name: str, network: Transformer | None = None, view: str = BASE) -> dict[str, float]:
        """Of a set. Without a network it is the untuned one, or by `view` the same when it is shown what it shall draw,
        or true pictures of the same scenes with other marks, through the VAE: the best that there is."""
        judge, (prompts, true, other, noise) = self.judge, self.asked[name]
        judge.net = network or self.untuned
        drawn = judge.vae.decode(judge.vae.encode(other)) if view == TRUE else judge.draw(
            judge.features.contexts(prompts.captions, true if view == TEACHER else None), noise, steps=self.steps)
        reading = judge.reader(drawn)
        measures = of_concept(reading, prompts) | {"style, decided": float(reading.decided.mean()),
                                                   "style, distance": frechet(*map(judge.vae.encode, (drawn, true)))}
        if view == BASE:
            measures |= of_ordinary(judge.reader(judge.draw(*self.usual, steps=self.steps)), self.ordinary)
        return measures


def frechet(*latents: Tensor) -> float:
    """The Fréchet distance, as in FID, of two sets of latents (n, C, h, w): of Gaussians over their 2 x 2 patches."""
    means, covariances = [], []
    for part in latents:
        patches = rearrange(part, "n c (i p) (j q) -> (n i j) (c p q)", p=2, q=2).double()
        means.append(patches.mean(0))
        covariances.append(patches.T.cov())
    both = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    return float((means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * both)
