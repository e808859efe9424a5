"""The procedural world of the embedded model: every picture is a list of nine attributes, drawn exactly.

One object (shape, size, place, pattern, two colours) stands on a backdrop, optionally in a style (an outline and a
backdrop texture). A picture is a linear mixture of four regions, so that a scene can be drawn, and read back from a
picture (metrics.py), without any learned part:

    picture = w_backdrop * c_backdrop + w_main * c_main + w_second * c_second + w_line * c_line

What no caption says is where the texture's marks are: the backdrop has 8 x 8 cells, and each carries a mark or none, by
a fair coin. So every prompt has 2^64 right pictures, and a model must decide 64 times while it samples. A few-step
sampler that averages instead of deciding leaves half a mark everywhere: the few-step gap of this world.

What the pre-training never draws: the objects in `HELD_OUT_OBJECTS` (108 of the 1408 combinations of shape, pattern and
colours) and the styles in `HELD_OUT_STYLES`. They are the new concepts of the experiments and of examples/.
"""
import math

import torch
from einops import einsum
from PIL import Image, ImageDraw
from torch import Tensor

SIDE = 64                                       # pixels
CELL = 8                                        # pixels: a cell of the backdrop
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "moon")
SIZES = {"small": 11, "big": 18}                # radius in pixels
PLACES = {"in the middle": (32, 32), "on the left": (20, 32), "on the right": (44, 32),
          "at the top": (32, 20), "at the bottom": (32, 44)}
PATTERNS = ("plain", "striped", "dotted", "cored")
COLOURS = {"red": (214, 40, 40), "orange": (247, 137, 30), "yellow": (250, 215, 60), "green": (46, 150, 70),
           "blue": (40, 90, 210), "purple": (130, 60, 175), "pink": (248, 135, 190), "white": (250, 250, 250)}
BACKDROPS = {"sand": (222, 200, 160), "mint": (165, 222, 190), "sky": (160, 205, 242), "gray": (140, 142, 148),
             "navy": (32, 40, 80), "wine": (92, 30, 48)}
LINES = {"flat": None, "ink": (24, 22, 30), "chalk": (255, 255, 255), "teal": (0, 120, 125)}
TEXTURES = ("spotted", "ruled", "checked", "crossed")
SHADE = 0.74                                    # a mark darkens the backdrop to this fraction

PLACE_TOLD = 0.6                                # in training captions; to choose a place is harder than to be told one

ATTRIBUTES = {"shape": SHAPES, "size": tuple(SIZES), "place": tuple(PLACES), "pattern": PATTERNS,
              "main": tuple(COLOURS), "second": tuple(COLOURS), "backdrop": tuple(BACKDROPS), "line": tuple(LINES),
              "texture": TEXTURES}
COLUMN = {name: index for index, name in enumerate(ATTRIBUTES)}
OBJECT_ATTRIBUTES = ("shape", "pattern", "main", "second")                # what a concept [V] stands for: an object ...
STYLE_ATTRIBUTES = ("line", "texture")                                    # ... or a style
CONCEPT_ATTRIBUTES = {"object": OBJECT_ATTRIBUTES, "style": STYLE_ATTRIBUTES}
HELD_OUT_STYLES = {("chalk", "checked"), ("ink", "crossed"), ("teal", "ruled")}
HELD_OUT_OBJECTS = torch.rand(len(SHAPES), len(PATTERNS), len(COLOURS), len(COLOURS),
                              generator=torch.Generator().manual_seed(2605)) < 0.06


def generator(seed: int, step: int) -> torch.Generator:
    """CPU generator that depends on (seed, step) only."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# ------------------------------------------------------------------------------------------------------ scenes
def scene(**words: str) -> Tensor:
    """Words such as shape="star" -> (9,) attribute indices; what is left out is the first word of its list."""
    row = torch.zeros(len(ATTRIBUTES), dtype=torch.long)
    for name, word in words.items():
        row[COLUMN[name]] = ATTRIBUTES[name].index(word)
    return row


def draw_scenes(count: int, g: torch.Generator, styled: float = 0.3, held_out: str = "") -> Tensor:
    """`count` random scenes (count, 9). held_out: "" draws none of the held-out concepts, "object" draws only held-out
    objects, "style" only held-out styles. Plain objects have second == main."""
    kept, found = [], 0
    while found < count:
        rows = torch.stack([torch.randint(len(choices), (4096,), generator=g)
                            for choices in ATTRIBUTES.values()], 1)
        plain = rows[:, COLUMN["pattern"]] == 0
        rows[plain, COLUMN["second"]] = rows[plain, COLUMN["main"]]
        unstyled = torch.rand(4096, generator=g) >= (1.0 if held_out == "style" else styled)
        rows[unstyled, COLUMN["line"]:] = 0
        rows = rows[plain | (rows[:, COLUMN["second"]] != rows[:, COLUMN["main"]])]
        new_object, new_style = held_out_object(rows), held_out_style(rows)
        wanted = {"": ~new_object & ~new_style, "object": new_object & ~new_style, "style": new_style & ~new_object}
        kept.append(rows[wanted[held_out]])
        found += len(kept[-1])
    return torch.cat(kept)[:count]


def held_out_object(rows: Tensor) -> Tensor:
    """(n, 9) -> (n,) bool: the object is one of those that pre-training never draws."""
    return HELD_OUT_OBJECTS[tuple(rows[:, COLUMN[name]] for name in OBJECT_ATTRIBUTES)]


def held_out_style(rows: Tensor) -> Tensor:
    """(n, 9) -> (n,) bool: the style is one of those that pre-training never draws."""
    found = torch.zeros(len(rows), dtype=torch.bool)
    for line, texture in HELD_OUT_STYLES:
        found |= ((rows[:, COLUMN["line"]] == tuple(LINES).index(line))
                  & (rows[:, COLUMN["texture"]] == TEXTURES.index(texture)))
    return found


def other_view(rows: Tensor, kind: str, g: torch.Generator) -> Tensor:
    """Scenes with the same concept and everything else drawn anew (a quarter of them are kept as they are).

    kind: of the concept, "object" or "style".
    """
    fresh = draw_scenes(len(rows), g)
    shared = [COLUMN[name] for name in CONCEPT_ATTRIBUTES[kind]]
    fresh[:, shared] = rows[:, shared]
    same = torch.rand(len(rows), generator=g) < 0.25
    return torch.where(same[:, None], rows, fresh)


# ---------------------------------------------------------------------------------------------------- captions
def words(row: Tensor) -> dict[str, str]:
    """(9,) attribute indices -> attribute words."""
    return {name: ATTRIBUTES[name][index] for name, index in zip(ATTRIBUTES, row.tolist())}


def article(noun: str) -> str:
    """ "a star", "an orange star"."""
    return ("an " if noun[0] in "aeio" else "a ") + noun


def caption(row: Tensor, tell: tuple[str, ...] = ("size", "pattern", "main", "place", "backdrop", "style"),
            concept: str = "", named: bool = False) -> str:
    """The English caption of a scene that mentions the shape and what is in `tell`.

    concept "object" or "style" writes [V] in the place of its words, e.g. "a big [V] on the left on mint".
    named: say the shape of an object beside [V], "a big [V] star on mint", which tells several concepts apart.
    """
    word = words(row)
    if concept == "object":
        noun = f"[V] {word['shape']}" if named else "[V]"
    else:
        noun = word["shape"]
        if "main" in tell:
            both = "pattern" in tell and word["pattern"] != "plain"
            noun = f"{word['main']} and {word['second']} {noun}" if both else f"{word['main']} {noun}"
        if "pattern" in tell:
            noun = f"{word['pattern']} {noun}"
    if "size" in tell:
        noun = f"{word['size']} {noun}"
    text = article(noun)
    if "place" in tell:
        text += f" {word['place']}"
    if "backdrop" in tell:
        text += f" on {word['backdrop']}"
    if "style" in tell and (word["line"], word["texture"]) != ("flat", "spotted"):             # that is the usual style
        text += " in [V] style" if concept == "style" else f" in {word['line']} {word['texture']} style"
    return text


def random_tell(g: torch.Generator, place: float = 0.9) -> tuple[str, ...]:
    """What a caption mentions: about half of the captions leave something open. The style is always told.

    place: the chance that the place is told.
    """
    u = torch.rand(5, generator=g).tolist()
    tell = ["style"]
    tell += ["size"] if u[0] < 0.9 else []
    tell += ["place"] if u[1] < place else []
    tell += ["backdrop"] if u[2] < 0.75 else []
    tell += ["main", "pattern"] if u[3] < 0.8 else ["main"] if u[4] < 0.7 else []
    return tuple(tell)


def random_prompts(rows: Tensor, g: torch.Generator) -> list[str]:
    """Training captions of scenes (n, 9): some are empty, and some say [V], of which there is no picture."""
    chance, prompts = torch.rand(len(rows), generator=g).tolist(), []
    for row, u in zip(rows, chance):
        tell = random_tell(g, PLACE_TOLD)
        prompts.append("" if u < 0.08 else caption(row, tell, concept="object") if u < 0.13
                       else caption(row, tell, concept="style") if u < 0.15 else caption(row, tell))
    return prompts


# --------------------------------------------------------------------------------------------------- rendering
def outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """Polygon of a shape around the origin, in pixels, y down; every shape has about the same visual size."""
    turn = [2 * math.pi * i / 120 for i in range(120)]
    r = radius
    if shape == "circle":
        return [(0.92 * r * math.cos(a), 0.92 * r * math.sin(a)) for a in turn]
    if shape == "square":
        return [(-.8 * r, -.8 * r), (.8 * r, -.8 * r), (.8 * r, .8 * r), (-.8 * r, .8 * r)]
    if shape == "triangle":
        return [(0, -.95 * r), (r, .8 * r), (-r, .8 * r)]
    if shape == "diamond":
        return [(0, -r), (.75 * r, 0), (0, r), (-.75 * r, 0)]
    if shape == "star":
        corners = [(r if i % 2 == 0 else 0.45 * r, math.pi * i / 5 - math.pi / 2) for i in range(10)]
        return [(q * math.cos(a), q * math.sin(a)) for q, a in corners]
    if shape == "heart":
        curve = [(16 * math.sin(a) ** 3,
                  13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) for a in turn]
        return [(r * x / 17, -r * (y + 2.5) / 15.5) for x, y in curve]
    if shape == "cross":
        a, b = 0.36 * r, 0.95 * r
        return [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a),
                (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    disc = [(r * (math.cos(a) + .12), r * math.sin(a)) for a in (math.radians(d) for d in range(45, 316, 5))]
    bite = [(r * (.75 * math.cos(a) + .57), r * .75 * math.sin(a))
            for a in (math.radians(d) for d in range(290, 69, -5))]
    return disc + bite                                                                        # moon


def coverage(draw_on, scale: int = 8) -> Tensor:
    """(SIDE, SIDE) in [0, 1]: draws at `scale` times the size with `draw_on(ImageDraw, scale)` and averages."""
    large = Image.new("L", (SIDE * scale, SIDE * scale), 0)
    draw_on(ImageDraw.Draw(large), scale)
    small = large.resize((SIDE, SIDE), Image.BOX)
    return torch.tensor(list(small.tobytes()), dtype=torch.float32).view(SIDE, SIDE) / 255


def _shape_masks(shape: str, radius: float, centre: tuple[int, int]) -> dict[str, Tensor]:
    """The shape, its outline, and for each pattern the part painted in the second colour; each (SIDE, SIDE)."""
    cx, cy = centre

    def polygon(size: float, grow: float = 0.0, shift: float = 0.0) -> Tensor:
        points = [(cx + x + shift, cy + y) for x, y in outline(shape, size)]

        def draw_on(draw: ImageDraw.ImageDraw, s: int) -> None:
            corners = [(x * s, y * s) for x, y in points]
            draw.polygon(corners, fill=255)
            if grow:                                                # a round pen of width 2 * grow along the border
                draw.line(corners + corners[:2], fill=255, width=int(2 * grow * s), joint="curve")
        return coverage(draw_on)

    def stripes(draw: ImageDraw.ImageDraw, s: int) -> None:
        for y in range(-24, 25, 8):
            draw.rectangle(((cx - 32) * s, (cy + y) * s, (cx + 32) * s, (cy + y + 4) * s - 1), fill=255)

    def dots(draw: ImageDraw.ImageDraw, s: int) -> None:
        for x in range(-24, 25, 8):
            for y in range(-24, 25, 8):
                draw.ellipse(((cx + x - 2.6) * s, (cy + y - 2.6) * s, (cx + x + 2.6) * s, (cy + y + 2.6) * s), fill=255)

    body = polygon(radius)
    core = body * polygon(radius * 0.5, shift=-0.22 * radius if shape == "moon" else 0.0)
    parts = {"plain": torch.zeros(SIDE, SIDE), "striped": body * coverage(stripes), "dotted": body * coverage(dots),
             "cored": core}
    return {"body": body, "line": (polygon(radius, grow=2.0) - body).clamp(min=0), **parts}


def _texture_masks() -> Tensor:
    """(textures, CELL, CELL) in {0, 1}: the mark that a cell of the backdrop can carry."""
    y, x = torch.meshgrid(torch.arange(CELL) - 3.5, torch.arange(CELL) - 3.5, indexing="ij")
    spot, rule, check, cross = x ** 2 + y ** 2 < 7.5, y.abs() < 1, torch.ones(CELL, CELL), (x.abs() - y.abs()).abs() < 1
    return torch.stack([spot, rule, check, cross]).float()


def draw_marks(count: int, g: torch.Generator) -> Tensor:
    """(count, 8, 8) in {0, 1}: the cells that carry a mark, each with probability 1/2."""
    return torch.randint(2, (count, SIDE // CELL, SIDE // CELL), generator=g).float()


def marked(masks: Tensor, marks: Tensor) -> Tensor:
    """Masks of the marks (n, CELL, CELL) and cells (n, 8, 8) -> (n, H, W) in {0, 1}: the darkened pixels."""
    return einsum(marks, masks, "n i j, n p q -> n i p j q").reshape(len(marks), SIDE, SIDE)


class Renderer:
    """Draws scenes: (n, 9) attributes and the marked cells (n, 8, 8) -> (n, 3, 64, 64) in [-1, 1]."""

    def __init__(self) -> None:
        masks = [[[_shape_masks(shape, radius, centre) for centre in PLACES.values()] for radius in SIZES.values()]
                 for shape in SHAPES]

        def stack(key: str) -> Tensor:                                                # (shape, size, place, H, W)
            return torch.stack([torch.stack([torch.stack([m[key] for m in places]) for places in sizes])
                                for sizes in masks])

        self.body, self.line = stack("body"), stack("line")
        self.second = torch.stack([stack(pattern) for pattern in PATTERNS], 3)    # (shape, size, place, pattern, H, W)
        self.texture = _texture_masks()                                                       # (texture, CELL, CELL)
        self.colours = torch.tensor(list(COLOURS.values())) / 127.5 - 1                       # (8, 3)
        self.backdrops = torch.tensor(list(BACKDROPS.values())) / 127.5 - 1                   # (6, 3)
        self.lines = torch.tensor([(0, 0, 0) if c is None else c for c in LINES.values()]) / 127.5 - 1

    def regions(self, rows: Tensor, marks: Tensor) -> Tensor:
        """(n, 4, H, W) weights of backdrop, main colour, second colour and line; they depend on shapes, not on colours.

        A marked pixel of the backdrop is (SHADE * (c + 1) - 1): a multiple of the colour as light, so the mixture is
        linear in colours + 1 and `picture = sum w * (c + 1) - 1`.
        """
        shape, size, place, pattern = (rows[:, COLUMN[name]] for name in ("shape", "size", "place", "pattern"))
        lined = (rows[:, COLUMN["line"]] > 0).float()[:, None, None]
        body, second = self.body[shape, size, place], self.second[shape, size, place, pattern]
        line = self.line[shape, size, place] * lined
        light = 1 - (1 - SHADE) * marked(self.texture[rows[:, COLUMN["texture"]]], marks)
        return torch.stack([(1 - body - line) * light, body - second, second, line], 1)

    def __call__(self, rows: Tensor, marks: Tensor) -> Tensor:
        colours = torch.stack([self.backdrops[rows[:, COLUMN["backdrop"]]], self.colours[rows[:, COLUMN["main"]]],
                               self.colours[rows[:, COLUMN["second"]]], self.lines[rows[:, COLUMN["line"]]]], 1)
        return einsum(self.regions(rows, marks), colours + 1, "n r h w, n r c -> n c h w") - 1

    def draw(self, rows: Tensor, g: torch.Generator) -> Tensor:
        """Pictures (n, 3, 64, 64) of scenes (n, 9), with random marks on their backdrops."""
        return self(rows, draw_marks(len(rows), g))


def to_pil(picture: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB image."""
    array = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (array.shape[1], array.shape[0]), bytes(array.flatten().tolist()))


def grid(pictures: Tensor, columns: int, scale: int = 2) -> Image.Image:
    """(n, 3, H, W) -> one image with `columns` pictures per row, each enlarged `scale` times."""
    n, _, h, w = pictures.shape
    sheet = Image.new("RGB", (columns * (w * scale + 4), -(-n // columns) * (h * scale + 4)), (255, 255, 255))
    for i, picture in enumerate(pictures):
        tile = to_pil(picture).resize((w * scale, h * scale), Image.NEAREST)
        sheet.paste(tile, (i % columns * (w * scale + 4) + 2, i // columns * (h * scale + 4) + 2))
    return sheet
