"""tiny/world.py against pictures put together with Pillow alone.

Radii, centres, colours and captions below are written out again on purpose: nobody should move them by accident.
"""
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tiny import world
from tiny.world import ATTRIBUTES, COLUMN, OBJECT_ATTRIBUTES, caption, draw_marks, draw_scenes, scene, to_pil

FINE = 16                                                               # Pillow draws at 16 times the size
RED, BLUE, GREEN, YELLOW, WHITE = (214, 40, 40), (40, 90, 210), (46, 150, 70), (250, 215, 60), (250, 250, 250)
MINT, NAVY, SAND, SKY, INK = (165, 222, 190), (32, 40, 80), (222, 200, 160), (160, 205, 242), (24, 22, 30)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def marks_at(*cells: tuple[int, int]) -> Tensor:
    """(1, 8, 8): one picture's marks at the given (row, column)."""
    marks = torch.zeros(1, 8, 8)
    for row, column in cells:
        marks[0, row, column] = 1
    return marks


NO_MARKS = marks_at()


def as_levels(picture: Tensor) -> Tensor:
    """(3, H, W) in [-1, 1] -> colour levels 0 to 255, not rounded."""
    return (picture + 1) * 127.5


def levels(image: Image.Image) -> Tensor:
    """RGB image -> (3, H, W) colour levels 0 to 255."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


# ------------------------------------------------------------------------------------------------------ rendering
class Canvas:
    """A large Pillow picture in world coordinates: pixels of the 64x64 picture, y down."""

    def __init__(self, backdrop: tuple[int, int, int]) -> None:
        self.image = Image.new("RGB", (64 * FINE, 64 * FINE), backdrop)
        self.draw = ImageDraw.Draw(self.image)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour) -> None:
        self.draw.rectangle((x0 * FINE, y0 * FINE, x1 * FINE - 1, y1 * FINE - 1), fill=colour)

    def disc(self, x: float, y: float, r: float, colour) -> None:
        self.draw.ellipse(((x - r) * FINE, (y - r) * FINE, (x + r) * FINE - 1, (y + r) * FINE - 1), fill=colour)

    def small(self) -> Tensor:
        return levels(self.image.resize((64, 64), Image.BOX))


def square(c: Canvas) -> None:
    c.box(32 - 14.4, 32 - 14.4, 32 + 14.4, 32 + 14.4, RED)              # .8 of the radius 18


def small_circle(c: Canvas) -> None:
    c.disc(20, 32, .92 * 11, BLUE)


def cross(c: Canvas) -> None:
    c.box(32 - 6.48, 20 - 17.1, 32 + 6.48, 20 + 17.1, YELLOW)
    c.box(32 - 17.1, 20 - 6.48, 32 + 17.1, 20 + 6.48, YELLOW)


def diamond(c: Canvas) -> None:
    corners = ((44, 32 - 18), (44 + 13.5, 32), (44, 32 + 18), (44 - 13.5, 32))
    c.draw.polygon([(x * FINE, y * FINE) for x, y in corners], fill=WHITE)


def striped_square(c: Canvas) -> None:
    c.box(32 - 14.4, 44 - 14.4, 32 + 14.4, 44 + 14.4, RED)
    for y in (-16, -8, 0, 8):                                           # four rows of every eight
        c.box(32 - 14.4, max(44 + y, 44 - 14.4), 32 + 14.4, 44 + y + 4, GREEN)


def cored_circle(c: Canvas) -> None:
    c.disc(32, 32, .92 * 18, GREEN)
    c.disc(32, 32, .92 * 9, WHITE)


def inked_square_on_rules(c: Canvas) -> None:
    for row, column in CELLS:
        c.box(8 * column, 8 * row + 3, 8 * column + 8, 8 * row + 5, tuple(round(.74 * level) for level in SKY))
    half = .8 * 11                                                      # a round pen of width 4 along the border
    c.draw.rounded_rectangle([(32 + side * (half + 2)) * FINE for side in (-1, -1, 1, 1)], radius=2 * FINE, fill=INK)
    c.box(32 - half, 32 - half, 32 + half, 32 + half, BLUE)


def checked_backdrop(c: Canvas) -> None:
    for row, column in CELLS:
        c.box(8 * column, 8 * row, 8 * column + 8, 8 * row + 8, tuple(round(.74 * level) for level in SAND))
    c.disc(32, 32, .92 * 11, RED)


def spots(c: Canvas) -> None:
    """A spot is a disc on the pixel grid: rows of 2, 4, 6, 6, 4 and 2 pixels."""
    for row, column in CELLS:
        for y, half in ((1, 1), (2, 2), (3, 3), (4, 3), (5, 2), (6, 1)):
            c.box(8 * column + 4 - half, 8 * row + y, 8 * column + 4 + half, 8 * row + y + 1,
                  tuple(round(.74 * level) for level in MINT))
    c.disc(32, 32, .92 * 11, RED)


CELLS = ((0, 0), (0, 1), (1, 7), (3, 1), (4, 4), (6, 2), (7, 0), (7, 7))             # (row, column) of the marked cells
COMPOSED = {
    square: (MINT, dict(shape="square", size="big", main="red", backdrop="mint")),
    small_circle: (SAND, dict(shape="circle", size="small", place="on the left", main="blue", backdrop="sand")),
    cross: (NAVY, dict(shape="cross", size="big", place="at the top", main="yellow", backdrop="navy")),
    diamond: (NAVY, dict(shape="diamond", size="big", place="on the right", main="white", backdrop="navy")),
    striped_square: (MINT, dict(shape="square", size="big", place="at the bottom", pattern="striped", main="red",
                                second="green", backdrop="mint")),
    cored_circle: (SKY, dict(shape="circle", size="big", pattern="cored", main="green", second="white",
                             backdrop="sky")),
    inked_square_on_rules: (SKY, dict(shape="square", size="small", main="blue", backdrop="sky", line="ink",
                                      texture="ruled")),
    spots: (MINT, dict(shape="circle", size="small", main="red", backdrop="mint", texture="spotted")),
    checked_backdrop: (SAND, dict(shape="circle", size="small", main="red", backdrop="sand", texture="checked")),
}


@pytest.mark.quick
@pytest.mark.parametrize("compose", COMPOSED, ids=lambda compose: compose.__name__)
def test_a_rendering_is_the_picture_that_pillow_draws(render, compose):
    backdrop, named = COMPOSED[compose]
    canvas = Canvas(backdrop)
    compose(canvas)
    if "second" not in named:
        named = named | {"second": named["main"]}
    marks = marks_at(*CELLS) if compose in (inked_square_on_rules, checked_backdrop, spots) else NO_MARKS
    difference = (as_levels(render(scene(**named)[None], marks)[0]) - canvas.small()).abs().amax(0)      # (64, 64)
    assert difference.max() < 40                       # a border pixel: a polygon at 8x covers 1/8 pixel more or less
    assert difference.mean() < .8
    assert (difference > 2).float().mean() < .05       # everywhere but on borders the colours are exact


def test_regions_share_every_pixel_of_light(render):
    rows = draw_scenes(200, seeded(0), styled=.7)
    marks = draw_marks(200, seeded(20))
    weights = render.regions(rows, marks)                                                         # (n, 4, 64, 64)
    backdrop, main, second, line = weights.unbind(1)
    covered = main + second + line
    assert weights.min() > -1e-6 and weights.max() < 1 + 1e-6
    shade = torch.ones(200, 64, 64)
    for n, i, j in marks.nonzero().tolist():
        shade[n, 8 * i:8 * i + 8, 8 * j:8 * j + 8] -= .26 * render.texture[rows[n, COLUMN["texture"]]]
    torch.testing.assert_close(backdrop, (1 - covered) * shade)
    unmarked = render.regions(rows, torch.zeros(200, 8, 8))
    torch.testing.assert_close(unmarked.sum(1), torch.ones_like(covered))
    assert not second[rows[:, COLUMN["pattern"]] == 0].any()
    assert not line[rows[:, COLUMN["line"]] == 0].any()
    assert (line.flatten(1).amax(1) > .9)[rows[:, COLUMN["line"]] > 0].all()


def test_pictures_stay_inside_their_range_and_the_frame(render):
    pictures = render.draw(draw_scenes(200, seeded(1), styled=.7), seeded(21))
    assert pictures.min() >= -1 and pictures.max() <= 1 + 1e-6
    frame = torch.ones(64, 64, dtype=torch.bool)
    frame[1:-1, 1:-1] = False
    assert not render.body[..., frame].any()


def test_eight_bit_pictures_and_sheets(render):
    pictures = render.draw(draw_scenes(5, seeded(2)), seeded(22))
    image = to_pil(pictures[0] * 1.5)                                                  # what is out of range is clipped
    assert image.mode == "RGB" and image.size == (64, 64)
    torch.testing.assert_close(levels(image), as_levels((pictures[0] * 1.5).clamp(-1, 1)), atol=.5, rtol=0)
    sheet = world.grid(pictures, columns=3)
    assert sheet.size == (3 * 132, 2 * 132)
    assert sheet.getpixel((132 + 2, 132 + 2)) == to_pil(pictures[4]).getpixel((0, 0))


# ----------------------------------------------------------------------------------------------- scenes and captions
PLAIN = scene(shape="circle", size="small", place="at the top", main="orange", second="orange", backdrop="wine")
STYLED = scene(shape="star", size="big", place="on the left", pattern="dotted", main="red", second="white",
               backdrop="mint", line="chalk", texture="ruled")


@pytest.mark.quick
@pytest.mark.parametrize("row, tell, concept, text", [
    (PLAIN, None, "", "a small plain orange circle at the top on wine"),
    (STYLED, None, "", "a big dotted red and white star on the left on mint in chalk ruled style"),
    (STYLED, None, "object", "a big [V] on the left on mint in chalk ruled style"),
    (STYLED, None, "style", "a big dotted red and white star on the left on mint in [V] style"),
    (PLAIN, None, "style", "a small plain orange circle at the top on wine"),
    (PLAIN, (), "", "a circle"),
    (PLAIN, (), "object", "a [V]"),
    (STYLED, (), "", "a star"),
    (STYLED, ("style",), "", "a star in chalk ruled style"),
    (PLAIN, ("main",), "", "an orange circle"),
    (STYLED, ("main",), "", "a red star"),
    (STYLED, ("pattern",), "", "a dotted star"),
    (STYLED, ("main", "pattern"), "", "a dotted red and white star"),
    (STYLED, ("place", "size"), "", "a big star on the left"),
    (STYLED, ("backdrop", "main"), "object", "a [V] on mint"),
    (scene(line="ink"), None, "", "a small plain red circle in the middle on sand in ink spotted style"),
])
def test_captions(row, tell, concept, text):
    assert (caption(row, concept=concept) if tell is None else caption(row, tell, concept)) == text


@pytest.mark.quick
def test_words_and_indices_are_inverse():
    rows = draw_scenes(50, seeded(3), styled=.5)
    assert all(torch.equal(scene(**world.words(row)), row) for row in rows)
    with pytest.raises(ValueError):
        scene(shape="elephant")


def test_half_of_the_captions_leave_something_open():
    g = seeded(4)
    tells = [world.random_tell(g) for _ in range(2000)]
    share = {name: sum(name in tell for tell in tells) / 2000 for name in ("size", "place", "main", "pattern", "style")}
    assert share == pytest.approx({"size": .9, "place": .9, "main": .8 + .2 * .7, "pattern": .8, "style": 1}, abs=.03)
    full = sum(len(tell) == 6 for tell in tells) / 2000
    assert full == pytest.approx(.9 * .9 * .75 * .8, abs=.03)                        # size, place, backdrop, pattern


@pytest.mark.parametrize("held_out, object_is_new, style_is_new",
                         [("", False, False), ("object", True, False), ("style", False, True)])
def test_held_out_concepts_are_drawn_only_when_asked_for(held_out, object_is_new, style_is_new):
    rows = draw_scenes(3000, seeded(5), held_out=held_out)
    shape, pattern, main, second = (rows[:, COLUMN[name]] for name in OBJECT_ATTRIBUTES)
    assert (world.HELD_OUT_OBJECTS[shape, pattern, main, second] == object_is_new).all()
    styles = {(ATTRIBUTES["line"][line], ATTRIBUTES["texture"][texture]) for line, texture in rows[:, 7:].tolist()}
    new = {("chalk", "checked"), ("ink", "crossed"), ("teal", "ruled")}
    assert styles == new if style_is_new else not styles & new
    assert rows.shape == (3000, 9)


def test_the_held_out_objects_are_always_the_same():
    """108 of the 1408 objects that can be drawn: plain ones have one colour, all others two different ones."""
    same_colour = torch.eye(8, dtype=torch.bool)
    plain, others = world.HELD_OUT_OBJECTS[:, 0][:, same_colour], world.HELD_OUT_OBJECTS[:, 1:][..., ~same_colour]
    assert plain.numel() + others.numel() == 1408
    assert int(plain.sum() + others.sum()) == 108


def test_scenes_are_a_function_of_the_generator():
    first, again, other = (draw_scenes(300, seeded(seed), styled=.5) for seed in (6, 6, 7))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_plain_objects_have_one_colour_and_all_others_two():
    rows = draw_scenes(2000, seeded(8))
    plain, one = rows[:, COLUMN["pattern"]] == 0, rows[:, COLUMN["main"]] == rows[:, COLUMN["second"]]
    assert torch.equal(plain, one) and plain.any() and not plain.all()
    for column, choices in enumerate(ATTRIBUTES.values()):
        assert rows[:, column].unique().tolist() == list(range(len(choices)))
    styled = (rows[:, 7:] > 0).any(1).float().mean()
    # three tenths of the scenes get one of 16 styles: one of them is "flat spotted", scenes with three are thrown away
    assert float(styled) == pytest.approx(.3 * 12 / 16 / (1 - .3 * 3 / 16), abs=.04)


def test_marks_are_fair_coins_and_functions_of_the_generator():
    marks = draw_marks(500, seeded(23))
    assert marks.shape == (500, 8, 8) and set(marks.unique().tolist()) == {0, 1}
    assert (marks.mean(0) - .5).abs().max() < 4 * .5 / 500 ** .5                     # each cell, four standard errors
    assert torch.equal(marks, draw_marks(500, seeded(23))) and not torch.equal(marks, draw_marks(500, seeded(24)))


def test_a_picture_with_random_marks_is_the_one_with_these_marks(render):
    rows = draw_scenes(3, seeded(25))
    assert torch.equal(render.draw(rows, seeded(26)), render(rows, draw_marks(3, seeded(26))))
