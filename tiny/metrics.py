"""Exact metrics: read every attribute back from a picture by finding the best-fitting picture of the world.

1. The backdrop's colour and texture: for each of the 24 pairs, every cell is taken with or without its mark, whichever
   fits better; cells with an object in them fit badly under all pairs alike.
2. For each arrangement of regions (shape, size, place, pattern, outline or not: 640 of them) the best colours are a
   least-squares fit on that backdrop, snapped to the nearest colours that the world has.
3. For the few best arrangements the texture and its cells are decided again, now that the object is known; the smallest
   remaining error wins.
So there is no learned judge, and a true rendering is always read correctly (tested). What remains is the distance to
the world: pictures that mix two possibilities, half marks among them, are far from both.
"""
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

from tiny.world import (ATTRIBUTES, CELL, COLUMN, CONCEPT_ATTRIBUTES, SHADE, SIDE, STYLE_ATTRIBUTES,
                        Renderer, marked)

ARRANGEMENT = ("shape", "size", "place", "pattern", "line")                     # what decides the regions of the object
FINALISTS = 8                                                                   # arrangements that are looked at twice


@dataclass
class Reading:
    """rows (n, 9): the attributes read; marks (n, 8, 8) in {0, 1}: the marked cells (any, under the object).

    distance (n,): root mean square error to that rendering, in [-1, 1] units.
    decided (n,): how clearly cells carry a mark or none, the mean of |2 a - 1| with a the part of a mark that is there:
    1 in a rendering, 0 where every cell has half a mark. Cells that the object hides by more than half do not count.
    """
    rows: Tensor
    marks: Tensor
    distance: Tensor
    decided: Tensor


class Reader:
    """Reads pictures (n, 3, 64, 64) in [-1, 1]."""

    def __init__(self, render: Renderer | None = None) -> None:
        self.render = render or Renderer()
        sizes = [len(ATTRIBUTES[name]) if name != "line" else 2 for name in ARRANGEMENT]
        combinations = torch.cartesian_prod(*(torch.arange(size) for size in sizes))
        self.arrangements = torch.zeros(len(combinations), len(ATTRIBUTES), dtype=torch.long)
        self.arrangements[:, [COLUMN[name] for name in ARRANGEMENT]] = combinations
        unmarked = torch.zeros(256, SIDE // CELL, SIDE // CELL)
        weights = torch.cat([self.render.regions(rows, unmarked[:len(rows)])
                             for rows in self.arrangements.split(256)]).flatten(2)                    # (T, 4, pixels)
        self.backdrop, self.object = weights[:, 0], weights[:, 1:]                         # (T, pixels), (T, 3, pixels)
        self.gram = einsum(self.object, self.object, "t r p, t s p -> t r s")
        self.inverse = torch.linalg.inv(self.gram + 1e-4 * torch.eye(3))              # ridge: regions can be empty
        self.patterned = self.arrangements[:, COLUMN["pattern"]] > 0
        self.backdrops = self.render.backdrops + 1
        self.palettes = [self.render.colours + 1, self.render.colours + 1, self.render.lines[1:] + 1]

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Reading:
        parts = [self._read(picture.float().flatten(1) + 1) for picture in pictures]
        return Reading(*(torch.stack(part) for part in zip(*parts)))

    def _read(self, light: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One picture as light (3, pixels) in [0, 2] -> its row, marked cells, distance, decided."""
        backdrop, texture, marks = self._read_backdrop(light)
        shade = self._shade(texture, marks)
        error, _ = self._fit(light, shade, backdrop, slice(None))                     # of all arrangements, as a view
        finalists = error.topk(FINALISTS, largest=False).indices
        _, index = self._fit(light, shade, backdrop, finalists)
        texture, marks, decided = self._decide_cells(light, backdrop, finalists, index)
        error, index = self._fit(light, self._shade(texture, marks), backdrop, finalists)
        best = error.argmin()
        main, second, line = index[best].tolist()
        row = self.arrangements[finalists[best]].clone()
        row[COLUMN["backdrop"]], row[COLUMN["texture"]], row[COLUMN["main"]] = backdrop, texture[best], main
        row[COLUMN["second"]] = main if row[COLUMN["pattern"]] == 0 else second
        row[COLUMN["line"]] = line + 1 if row[COLUMN["line"]] == 1 else 0
        return row, marks[best], (error[best].clamp(min=0) / light.numel()).sqrt(), decided[best]

    def _shade(self, texture: Tensor, marks: Tensor) -> Tensor:
        """Textures (n,) and their marked cells (n, 8, 8) -> (n, pixels): the factor on the backdrop's light."""
        return 1 - (1 - SHADE) * marked(self.render.texture[texture], marks).flatten(1)

    def _cells(self, bare: Tensor, dark: Tensor) -> tuple[Tensor, Tensor]:
        """Squared errors (n, pixels) of an unmarked and of a wholly dark backdrop -> the error of each unmarked cell
        (n, 1, cells) and what a mark of each texture adds to it (n, textures, cells)."""
        bare, dark = (rearrange(error, "n (i p j q) -> n (i j) (p q)", i=SIDE // CELL, p=CELL, q=CELL)
                      for error in (bare, dark))
        return bare.sum(-1)[:, None], einsum(self.render.texture.flatten(1), dark - bare, "t p, n c p -> n t c")

    def _read_backdrop(self, light: Tensor) -> tuple[int, Tensor, Tensor]:
        """Backdrop, texture (1,) and marked cells (1, 8, 8) of a picture (3, pixels), whatever stands before it."""
        errors = ((light - self.backdrops[:, :, None] * shade).square().sum(1) for shade in (1, SHADE))
        bare, gain = self._cells(*errors)
        cells = bare + gain.clamp(max=0)                                                              # (b, t, cells)
        best = int(cells.clamp(min=0).sqrt().sum(-1).argmin())             # the root: object cells shall not decide
        backdrop, texture = divmod(best, len(self.render.texture))
        marks = (gain[backdrop, texture] < 0).float().view(1, SIDE // CELL, SIDE // CELL)
        return backdrop, torch.tensor([texture]), marks

    def _fit(self, light: Tensor, shade: Tensor, backdrop: int, arrangements: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Squared error (t,) of each arrangement with its best colours, and their indices (t, 3): main, second, line.

        shade (t or 1, pixels) is known, so the backdrop is subtracted and only the object's colours are fitted.
        """
        ground, regions = self.backdrop[arrangements] * shade, self.object[arrangements]
        colour = self.backdrops[backdrop]
        against = (einsum(regions, light, "t r p, c p -> t r c")
                   - einsum(regions, ground, "t r p, t p -> t r")[..., None] * colour)        # <w_r, residual>
        squared = (light.square().sum() - 2 * einsum(ground, light, "t p, c p -> t c") @ colour
                   + ground.square().sum(1) * colour.square().sum())                          # |residual|^2
        fitted = einsum(self.inverse[arrangements], against, "t r s, t s c -> t r c")
        index = torch.stack([torch.cdist(fitted[:, r], palette).argmin(-1)
                             for r, palette in enumerate(self.palettes)], -1)
        colours = torch.stack([palette[index[:, r]] for r, palette in enumerate(self.palettes)], 1)   # (t, 3, c)
        error = (squared - 2 * (colours * against).sum((1, 2))
                 + einsum(colours, self.gram[arrangements], colours, "t r c, t r s, t s c -> t"))
        one_colour = self.patterned[arrangements] & (index[:, 0] == index[:, 1])              # that would be "plain"
        return torch.where(one_colour, torch.inf, error), index

    def _decide_cells(self, light: Tensor, backdrop: int, arrangements: Tensor,
                      index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The texture (t,) and marks (t, 8, 8) that fit best around the object with its colours `index` (t, 3), and
        how decided the cells are (t,)."""
        colours = torch.stack([palette[index[:, r]] for r, palette in enumerate(self.palettes)], 1)
        fixed = einsum(self.object[arrangements], colours, "t r p, t r c -> t c p")
        ground = einsum(self.backdrop[arrangements], self.backdrops[backdrop], "t p, c -> t c p")
        bare, gain = self._cells(*((light - fixed - ground * shade).square().sum(1) for shade in (1, SHADE)))
        texture = (bare + gain.clamp(max=0)).sum(-1).argmin(1)
        each = torch.arange(len(texture))
        mark = ((1 - SHADE) * ground).square().sum(1)
        _, size = self._cells(torch.zeros_like(mark), mark)                        # |mark|^2 as far as it is seen
        gain, size = gain[each, texture], size[each, texture]                      # gain = |mark|^2 (1 - 2 a)
        clear = (gain.abs() / size.clamp(min=1e-6)).clamp(max=1)
        seen = (size > 0.5 * size.amax(1, keepdim=True)).float()
        decided = (clear * seen).sum(1) / seen.sum(1)
        return texture, (gain < 0).float().view(-1, SIDE // CELL, SIDE // CELL), decided


def accuracy(reading: Tensor, truth: Tensor, names: tuple[str, ...] = tuple(ATTRIBUTES)) -> dict[str, float]:
    """Fraction of pictures in which each attribute was read as asked, and their "mean"; reading and truth (n, 9)."""
    each = {name: float((reading[:, COLUMN[name]] == truth[:, COLUMN[name]]).float().mean()) for name in names}
    return {**each, "mean": sum(each.values()) / len(each)}


def told_names(tell: tuple[str, ...]) -> list[str]:
    """The attributes that a prompt mentions ("style" counts as line and texture)."""
    names = ["shape", *(name for name in tell if name != "style"), *(STYLE_ATTRIBUTES if "style" in tell else ())]
    return names + (["second"] if "pattern" in tell and "main" in tell else [])


def told_attributes(told: list[tuple[str, ...]]) -> Tensor:
    """(n, 9) bool: which attributes each of n prompts mentions."""
    return torch.tensor([[name in told_names(tell) for name in ATTRIBUTES] for tell in told])


def told_accuracy(reading: Tensor, truth: Tensor, told: list[tuple[str, ...]]) -> float:
    """The share that is right of all attributes that the prompts mention."""
    said = told_attributes(told)
    return int((said & (reading == truth)).sum()) / int(said.sum())


def whole(reading: Tensor, truth: Tensor, kind: str) -> float:
    """The share of pictures in which every attribute of the concept is right."""
    columns = [COLUMN[name] for name in CONCEPT_ATTRIBUTES[kind]]
    return float((reading[:, columns] == truth[:, columns]).all(1).float().mean())


def fidelity(reading: Tensor, truth: Tensor, kind: str) -> float:
    """Concept fidelity in [0, 1]: the share of the concept's attributes that are right, over pictures."""
    return accuracy(reading, truth, CONCEPT_ATTRIBUTES[kind])["mean"]


def hidden_cells(rows: Tensor, render: Renderer) -> Tensor:
    """Scenes (n, 9) -> (n, 8, 8) bool: cells that the object or its outline reaches into."""
    shape, size, place = (rows[:, COLUMN[name]] for name in ("shape", "size", "place"))
    lined = (rows[:, COLUMN["line"]] > 0).float()[:, None, None]
    covered = render.body[shape, size, place] + render.line[shape, size, place] * lined
    return F.max_pool2d(covered[:, None], CELL)[:, 0] > 0


def diversity(reading: Reading, group: int, render: Renderer) -> float:
    """Mean share of cells in which two pictures of the same prompt differ by a mark, over cells that neither hides.

    reading: of pictures in groups of `group` with the same prompt. 0: always the same backdrop; 0.5: fair coins.
    """
    hidden, shares = hidden_cells(reading.rows, render), []
    for start in range(0, len(reading.rows), group):
        for a, b in combinations(range(start, start + group), 2):
            seen = ~(hidden[a] | hidden[b])
            shares.append(float((reading.marks[a] != reading.marks[b])[seen].float().mean()))
    return sum(shares) / len(shares)
