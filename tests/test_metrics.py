"""tiny/metrics.py against true and damaged pictures: what it reads, and the distance to what was read."""
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_world import NO_MARKS, PLAIN, STYLED, levels, seeded
from torch import Tensor

from tiny.metrics import accuracy, fidelity, told_accuracy
from tiny.world import ATTRIBUTES, COLUMN, draw_marks, draw_scenes, scene, to_pil


@pytest.fixture(scope="module")
def truth() -> Tensor:
    """120 scenes: usual ones, held-out objects, held-out styles."""
    return torch.cat([draw_scenes(60, seeded(9), styled=.5), draw_scenes(30, seeded(10), held_out="object"),
                      draw_scenes(30, seeded(11), held_out="style")])


@pytest.fixture(scope="module")
def marks(truth) -> Tensor:
    return draw_marks(len(truth), seeded(27))


def whole(rows: Tensor, truth: Tensor) -> float:
    """Share of the pictures of which all nine attributes were read rightly."""
    return float((rows == truth).all(1).float().mean())


def test_true_renderings_are_read_without_an_error(reader, render, truth, marks):
    reading = reader(render(truth, marks))
    assert torch.equal(reading.rows, truth)
    assert reading.distance.max() < .005 and reading.decided.min() > .999
    again = render(reading.rows, reading.marks)                                # marks under the object do not matter
    assert (again - render(truth, marks)).abs().mean() < 1e-3
    stored = torch.stack([levels(to_pil(picture)) / 127.5 - 1 for picture in render(truth[::4], marks[::4])])
    assert torch.equal(reader(stored).rows, truth[::4])


@pytest.mark.parametrize("part, decided, distance", [(0, 1, 0), (.1, .8, .02), (.25, .5, .05), (.5, 0, .085)])
def test_parts_of_a_mark_are_undecided(reader, render, truth, part, decided, distance):
    """The same part of a mark in all cells: |2 part - 1| is how decided they are."""
    rows = draw_scenes(30, seeded(28))
    rows[:, COLUMN["texture"]] = 0                            # spots: half a check is another backdrop, not half a mark
    reading = reader(render(rows, torch.full((30, 8, 8), float(part))))
    assert reading.decided.mean().item() == pytest.approx(decided, abs=.03)
    assert reading.distance.mean().item() == pytest.approx(distance, abs=.02)


@pytest.mark.parametrize("noise", [.1, .3])
def test_noise_is_measured_and_read_through(reader, render, truth, marks, noise):
    pictures = render(truth[::2], marks[::2])
    reading = reader(pictures + noise * torch.randn(pictures.shape, generator=seeded(12)))
    assert torch.equal(reading.rows, truth[::2])
    assert reading.distance.mean().item() == pytest.approx(noise, rel=.02)


def blur(pictures: Tensor, width: int) -> Tensor:
    return F.avg_pool2d(F.pad(pictures, (width // 2,) * 4, mode="replicate"), width, 1)


def shift(pictures: Tensor, pixels: int) -> Tensor:
    return pictures.roll(pixels, -1)


def mix(pictures: Tensor, share: float) -> Tensor:
    return (1 - share) * pictures + share * pictures.roll(1, 0)


def fade(pictures: Tensor, share: float) -> Tensor:
    return (1 - share) * pictures


@pytest.mark.parametrize("damage, strengths, at_least, right", [
    (blur, (1, 3, 5, 9), .1, .4),
    (shift, (0, 1, 2, 4), .15, .4),
    (mix, (0, .1, .25, .5), .15, .2),
    (fade, (0, .1, .2, .3), .05, 1.0),
], ids=lambda value: value.__name__ if isinstance(value, Callable) else None)
def test_the_worse_the_damage_the_larger_the_distance(reader, render, truth, marks, damage, strengths, at_least, right):
    """strengths: from none to strong; the last has a distance above `at_least` and at most `right` wholly right."""
    pictures, rows = render(truth[::3], marks[::3]), truth[::3]
    readings = [reader(damage(pictures, strength)) for strength in strengths]
    distances = [float(reading.distance.mean()) for reading in readings]
    assert distances == sorted(distances) and distances[0] < .005 and distances[-1] > at_least
    shares = [whole(reading.rows, rows) for reading in readings]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[-1] <= right


@pytest.mark.parametrize("changed", [dict(main="blue", second="blue"), dict(shape="square"), dict(size="small"),
                                     dict(backdrop="navy"), dict(line="chalk"), dict(texture="checked")],
                         ids=lambda changed: next(iter(changed)))
def test_a_wrong_attribute_is_named_and_no_other(reader, render, changed):
    asked = dict(shape="heart", size="big", main="red", second="red", backdrop="sand", line="ink", texture="ruled")
    drawn = render.draw(scene(**asked | changed)[None], seeded(29))
    reading = reader(drawn)
    wrong = {name for name, index in COLUMN.items() if reading.rows[0, index] != scene(**asked)[index]}
    assert wrong == set(changed) and reading.distance < .005


def test_a_shift_by_twelve_pixels_is_the_next_place(reader, render):
    centre = scene(shape="star", size="big", main="yellow", second="yellow", backdrop="navy")
    reading = reader(shift(render(centre[None], NO_MARKS), 12))
    expected = scene(shape="star", size="big", place="on the right", main="yellow", second="yellow", backdrop="navy")
    assert torch.equal(reading.rows[0], expected) and reading.distance < .005


def test_a_colour_between_two_is_further_away_than_either(reader, render):
    red, blue = (render(scene(size="big", main=c, second=c)[None], NO_MARKS) for c in ("red", "blue"))
    distance = reader(torch.cat([red, (red + blue) / 2, blue])).distance
    assert distance[1] > .1 > 20 * max(distance[0], distance[2])


@pytest.mark.quick
def test_accuracies_by_hand():
    asked = torch.stack([STYLED, PLAIN])
    got = asked.clone()
    got[0, COLUMN["main"]] = ATTRIBUTES["main"].index("blue")
    got[0, COLUMN["texture"]] = 0
    got[1, COLUMN["place"]] = 0
    assert accuracy(got, asked) == {"shape": 1, "size": 1, "place": .5, "pattern": 1, "main": .5, "second": 1,
                                    "backdrop": 1, "line": 1, "texture": .5, "mean": pytest.approx(7.5 / 9)}
    assert fidelity(got, asked, "object") == 7 / 8 and fidelity(got, asked, "style") == 3 / 4
    assert told_accuracy(got, asked, [("main",), ()]) == 2 / 3                       # shape, main; shape
    assert told_accuracy(got, asked, [("main", "pattern"), ("place",)]) == 4 / 6     # shape, both colours, pattern; ...
    assert told_accuracy(got, asked, [("pattern", "style"), ("size",)]) == 5 / 6     # a style is two attributes
    assert told_accuracy(asked, asked, [("backdrop",), ("size", "place")]) == 1
