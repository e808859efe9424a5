"""experiments/leak.py and what it needs of tiny/: what counts as a leak, and at which steps an adapter is on."""
from types import SimpleNamespace

import pytest
import torch

import lora
from experiments import leak
from plumbing.checkpoints import EMBEDDED
from plumbing.files import ROOT, InputError
from tiny.metrics import leaked, told_attributes
from tiny.models import flux2_grid
from tiny.score import Judge
from tiny.world import COLUMN, OBJECT_ATTRIBUTES, PATTERNS, scene


def test_what_wrong_attributes_look_like():
    concept = scene(shape="star", pattern="striped", main="red", second="blue")
    asked = scene(shape="heart", pattern="dotted", main="red", second="green")
    truth, told = asked.repeat(3, 1), [("pattern", "main"), ("pattern", "main"), ("main",)]
    said = told_attributes(told)[:, [COLUMN[name] for name in OBJECT_ATTRIBUTES]]
    assert said.tolist() == [[True] * 4, [True] * 4, [True, False, True, False]]
    drawn = torch.stack([scene(shape="star", pattern="dotted", main="pink", second="white"),
                         scene(shape="moon", pattern="striped", main="red", second="green"),
                         scene(shape="heart", pattern="cored", main="red", second="blue")])
    # wrong, said, and not the concept's anyway: shape and second of the first (main: it is the concept's), shape and
    # pattern of the second, nothing of the third, which says neither its pattern nor its second colour
    share, guess = leaked(drawn, truth, told, concept)
    assert share == 2 / 4
    assert guess == pytest.approx((2 / 7 + 1 / (len(PATTERNS) - 1) + 1 / 7) / 4)      # eight shapes, eight colours
    assert leaked(truth, truth, told, concept) == (0.0, 0.0)


def test_an_adapter_at_some_steps(capsys, tmp_path):
    judge = Judge(EMBEDDED)
    adapter = lora.create(judge.net, 2, 2, seed=0)
    lora.save(adapter, tmp_path / "zero.safetensors", {})
    assert leak.main(["--data", str(ROOT / "examples" / "star"), "--lora", f"x={tmp_path / 'zero.safetensors'}",
                      "--prompts", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ")[2:] for line in lines if line.startswith(("| base |", "| x |"))]
    assert len(rows) == 5 and all(row == rows[0] for row in rows)                     # B = 0: it changes nothing
    with pytest.raises(InputError, match="a style"):
        leak.main(["--data", str(ROOT / "examples" / "chalk"), "--lora", f"x={tmp_path / 'zero.safetensors'}"])


def test_an_adapter_is_on_only_at_its_steps():
    seen = []
    net = SimpleNamespace(velocity=lambda x, sigma, contexts, adapter: seen.append((sigma, adapter)) or x)
    judge = SimpleNamespace(net=net, vae=SimpleNamespace(decode=lambda x: x))
    first, second, third, _ = flux2_grid(3).tolist()                                  # no Z-Image, so it gets this one
    for active, expected in (({0, 2}, ["adapter", None, "adapter"]), (None, ["adapter"] * 3), ((), [None] * 3)):
        seen.clear()
        Judge.draw(judge, ["c"] * 2, torch.zeros(2, 1, 2, 2), "adapter", 3, active)
        assert seen == list(zip((first, second, third), expected))
