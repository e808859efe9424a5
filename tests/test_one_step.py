"""plumbing/one_step.py: the picture of one step, and what it refuses."""
import pytest
import torch
from PIL import Image

import lora
from plumbing import one_step
from plumbing.files import InputError
from rollout import sigma_grid


@pytest.mark.quick
def test_estimates_are_those_of_the_definition():
    """A straight flow: the student knows x0, the teacher another one, so each estimate is known in closed form."""
    x0, other, eps = torch.randn(3, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    states = list(one_step.step(lambda x, sigma: (x - x0) / sigma, lambda x, sigma: (x - other) / sigma, eps,
                                sigma_grid(3.0, 4)))
    assert [sigma for sigma, _, _ in states] == pytest.approx([1.0, 0.9, 0.75, 0.5])
    for sigma, loss, (x, student, teacher) in states:
        torch.testing.assert_close(x, (1 - sigma) * x0 + sigma * eps, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(student, x0, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(teacher, other, atol=1e-5, rtol=1e-5)
        assert loss == pytest.approx(float(((x0 - other) / sigma).square().mean()), rel=1e-4)


@pytest.mark.quick
def test_equal_pictures_are_white_and_others_are_not():
    red, dark = Image.new("RGB", (2, 2), (200, 0, 0)), Image.new("RGB", (2, 2), (180, 0, 0))
    assert one_step.difference(red, red).getcolors() == [(4, (255, 255, 255))]
    (_, (value, *_)), = one_step.difference(red, dark).getcolors()
    assert 200 < value < 255


def test_a_run_becomes_a_picture(run, tmp_path, monkeypatch, capsys):
    folder, seen = run("taught", "--steps", 2), []
    panel = one_step.panel
    monkeypatch.setattr(one_step, "panel", lambda columns, *rest: seen.append(columns) or panel(columns, *rest))
    capsys.readouterr()
    assert one_step.main(["--run", str(folder), "--image", "2", "--out", str(tmp_path / "step.png")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "step.png")
    (columns,) = seen
    names = list(columns)
    assert len(names) == 5 and all(name.startswith(word) for name, word in zip(names, 2 * ["before"] + 2 * ["after"]))
    assert all(len(images) == 4 for images in columns.values())
    assert columns[names[0]][0].tobytes() == columns[names[2]][0].tobytes()             # the same noise
    assert columns[names[0]][1].tobytes() != columns[names[2]][1].tobytes()             # other weights
    assert Image.open(tmp_path / "step.png").info["prompt"] == "a big blue circle on the left"


def test_what_is_refused(run, tmp_path):
    folder = run("taught", "--steps", 1)
    with pytest.raises(InputError, match="--image 4: .* has 3; give 1 to 3"):
        one_step.main(["--run", str(folder), "--image", "4"])
    with pytest.raises(InputError, match="config.json: no such file"):
        one_step.main(["--run", str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="no teacher.safetensors.*--method dopsd"):
        one_step.main(["--run", str(run("sft", "--steps", 1, "--method", "sft"))])


def test_an_adapter_of_the_teacher_is_used(run, tmp_path, monkeypatch):
    """The teacher of the right half is the EMA, not the base."""
    folder, used = run("taught", "--steps", 1), []
    real = lora.velocity_of
    monkeypatch.setattr(lora, "velocity_of", lambda model, context, adapter: used.append(adapter) or
                        real(model, context, adapter))
    one_step.main(["--run", str(folder), "--out", str(tmp_path / "a.png")])
    assert used[:2] == [None, None] and all(adapter is not None for adapter in used[2:]) and len(used) == 4
