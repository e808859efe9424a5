"""Exact metrics: read every attribute back from a picture by finding the best-fitting picture of the world.

For each arrangement of regions (shape, size, place, pattern, outline or not, texture: 2560 of them) the best colours
are a least-squares fit; they are snapped to the nearest colours that the world has, and the arrangement with the
smallest remaining error wins. So there is no learned judge, and a true rendering is always read correctly (tested).
"""
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from torch import Tensor

from tiny.world import ATTRIBUTES, COLUMN, Renderer

ARRANGEMENT = ("shape", "size", "place", "pattern", "line", "texture")          # what decides the regions
OBJECT = ("shape", "pattern", "main", "second")                                 # what a concept [V] stands for
STYLE = ("line", "texture")


@dataclass
class Reading:
    """rows (n, 9): the attributes read; distance (n,): root mean square error to that rendering, in [-1, 1] units."""
    rows: Tensor
    distance: Tensor


class Reader:
    """Reads pictures (n, 3, 64, 64) in [-1, 1]."""

    def __init__(self, render: Renderer | None = None) -> None:
        self.render = render or Renderer()
        sizes = [len(ATTRIBUTES[name]) if name != "line" else 2 for name in ARRANGEMENT]
        combinations = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
        self.arrangements = torch.zeros(len(combinations), len(ATTRIBUTES), dtype=torch.long)
        self.arrangements[:, [COLUMN[name] for name in ARRANGEMENT]] = combinations
        self.weights = torch.cat([self.render.regions(rows)
                                  for rows in self.arrangements.split(256)]).flatten(2)               # (T, 4, pixels)
        self.gram = einsum(self.weights, self.weights, "t r p, t s p -> t r s")
        self.inverse = torch.linalg.inv(self.gram + 1e-4 * torch.eye(4))              # ridge: regions can be empty
        self.patterned = self.arrangements[:, COLUMN["pattern"]] > 0
        self.palettes = [self.render.backdrops + 1, self.render.colours + 1, self.render.colours + 1,
                         self.render.lines[1:] + 1]

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Reading:
        parts = [self._read(chunk) for chunk in pictures.split(8)]
        return Reading(torch.cat([rows for rows, _ in parts]), torch.cat([distance for _, distance in parts]))

    def _read(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        light = pictures.float().flatten(2) + 1                                                       # (n, 3, pixels)
        n, pixels = len(light), light.shape[2]
        against = (rearrange(light, "n c p -> (n c) p") @ rearrange(self.weights, "t r p -> p (t r)"))
        against = rearrange(against, "(n c) (t r) -> n t r c", n=n, r=4)                              # <w_r, picture>
        fitted = einsum(self.inverse, against, "t r s, n t s c -> n t r c")
        index = torch.stack([torch.cdist(fitted[:, :, r].contiguous(), palette).argmin(-1)
                             for r, palette in enumerate(self.palettes)], -1)                         # (n, T, 4)
        colours = torch.stack([palette[index[..., r]] for r, palette in enumerate(self.palettes)], 2)
        error = (light.square().sum((1, 2))[:, None] - 2 * (colours * against).sum((2, 3))
                 + einsum(colours, self.gram, colours, "n t r c, t r s, n t s c -> n t"))              # (n, T)
        # one colour is "plain"
        error = torch.where(self.patterned & (index[..., 1] == index[..., 2]), torch.inf, error)
        best = error.argmin(1)
        colour = index[torch.arange(n), best]                                                         # (n, 4)
        rows = self.arrangements[best].clone()
        rows[:, COLUMN["backdrop"]], rows[:, COLUMN["main"]] = colour[:, 0], colour[:, 1]
        plain, lined = rows[:, COLUMN["pattern"]] == 0, rows[:, COLUMN["line"]] == 1
        rows[:, COLUMN["second"]] = torch.where(plain, colour[:, 1], colour[:, 2])
        rows[:, COLUMN["line"]] = torch.where(lined, colour[:, 3] + 1, 0)
        squared = error[torch.arange(n), best].clamp(min=0) / (3 * pixels)
        return rows, squared.sqrt()


def accuracy(reading: Tensor, truth: Tensor, names: tuple[str, ...] = tuple(ATTRIBUTES)) -> dict[str, float]:
    """Fraction of pictures in which each attribute was read as asked, and their "mean"; reading and truth (n, 9)."""
    each = {name: float((reading[:, COLUMN[name]] == truth[:, COLUMN[name]]).float().mean()) for name in names}
    return {**each, "mean": sum(each.values()) / len(each)}


def told_accuracy(reading: Tensor, truth: Tensor, told: list[tuple[str, ...]]) -> float:
    """Mean accuracy over the attributes that each prompt mentions ("style" counts as line and texture)."""
    right = []
    for got, asked, tell in zip(reading, truth, told):
        names = ["shape", *(name for name in tell if name != "style"), *(STYLE if "style" in tell else ())]
        names += ["second"] if "pattern" in tell and "main" in tell else []
        right += [float(got[COLUMN[name]] == asked[COLUMN[name]]) for name in names]
    return sum(right) / len(right)


def whole(reading: Tensor, truth: Tensor, kind: str) -> float:
    """The share of pictures in which every attribute of the concept is right."""
    columns = [COLUMN[name] for name in (OBJECT if kind == "object" else STYLE)]
    return float((reading[:, columns] == truth[:, columns]).all(1).float().mean())


def fidelity(reading: Tensor, truth: Tensor, kind: str) -> float:
    """Concept fidelity in [0, 1]: the share of the concept's attributes that are right, over pictures."""
    return accuracy(reading, truth, OBJECT if kind == "object" else STYLE)["mean"]
