"""Several teachers into one student (--teacher-lora), rollouts with noise, data of captions alone."""
import json
import shutil

import pytest
import torch
from conftest import SCHEDULER, fill_b, metrics, write_pictures
from safetensors.torch import load_file

import data
import lora
import train
from plumbing import lora_files
from rollout import sigma_grid


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two adapter files of different ranks."""
    from conftest import random_transformer
    model, folder = random_transformer(), tmp_path_factory.mktemp("teachers")
    for name, rank, seed in (("a", 3, 1), ("b", 2, 2)):
        lora.save(fill_b(lora.create(model, rank, 2 * rank, seed), seed=seed), folder / f"{name}.safetensors")
    return [folder / "a.safetensors", folder / "b.safetensors"]


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A folder with captions only."""
    folder = tmp_path_factory.mktemp("data") / "captions"
    folder.mkdir()
    for i, text in enumerate(("a red circle", "a small blue star on mint", "a moon")):
        (folder / f"{i}.txt").write_text(text)
    return folder


def two(photos, captions, teachers) -> tuple:
    return "--data", photos, captions, "--teacher-lora", *teachers


def loss_of(parts, task, rng, K: int, kind: str, a: float) -> torch.Tensor:
    """One task's loss as one graph: both sides read the prompt, the student walks with noise a."""
    batch, sigmas = task.dataset.batch(0), sigma_grid(SCHEDULER["shift"], K).tolist()
    x, terms = torch.randn(batch.latents.shape, generator=rng), []
    for sigma, following in zip(sigmas, sigmas[1:]):
        v = parts.model.velocity(x, sigma, batch.student_context, parts.run.tuned.theta)
        goal = task.teacher(batch.student_context)(x, sigma).detach()
        d, below = following - sigma, following if sigma == 1 else sigma
        g = a * (sigma / (1 - below)) ** .5
        means = [(1 + g * g * d / (2 * sigma)) * x + (1 + g * g * (1 - sigma) / (2 * sigma)) * u * d for u in (v, goal)]
        std = g * (-d) ** .5
        if kind == "kl" and a > 0:
            terms.append(torch.distributions.kl_divergence(torch.distributions.Normal(means[0], std),
                                                           torch.distributions.Normal(means[1], std)).mean())
        else:
            terms.append(((means[0] - means[1]) ** 2).mean() / 2 if kind == "kl" else ((v - goal) ** 2).mean())
        x = means[0].detach()
        if a > 0:
            x = x + std * torch.randn(x.shape, generator=rng)
    return sum(terms) / K


@pytest.mark.quick
@pytest.mark.parametrize("kind, a", [("v", 0.0), ("kl", 0.0), ("kl", 0.7), ("v", 0.3)])
def test_a_round_is_the_mean_over_tasks(prepare, photos, captions, teachers, kind, a):
    parts = prepare(*two(photos, captions, teachers), "--loss", kind, "--noise", a, "--rollout-steps", 3)
    fill_b(parts.run.tuned.theta, seed=5)
    assert [task.name for task in parts.tasks] == ["photos", "captions"]
    losses = train.gradient_of_step(parts.cfg, parts.run, parts.tasks, parts.shift_of)
    ours = {name: tensor.grad.clone() for name, tensor in parts.run.tuned.parameters().items()}
    for tensor in parts.run.tuned.parameters().values():
        tensor.grad = None
    seed = parts.cfg.seed
    rngs = [data.generator(seed, "noise", 0), data.generator(seed, "noise", 0, 1)]
    theirs = [loss_of(parts, task, rng, 3, kind, a) for task, rng in zip(parts.tasks, rngs)]
    assert list(losses.values()) == pytest.approx([loss.item() for loss in theirs], rel=1e-4)
    (sum(theirs) / 2).backward()
    for name, tensor in parts.run.tuned.parameters().items():
        torch.testing.assert_close(ours[name], tensor.grad, rtol=1e-3, atol=1e-5 * float(tensor.grad.abs().max()))


def test_each_task_is_logged_and_the_panel_has_its_teachers(run, photos, captions, teachers, monkeypatch):
    seen, save = [], train.Panels.draw
    monkeypatch.setattr(train.Panels, "draw", lambda self, path, note, student, teacher, others, writes: seen.append(
        (teacher, list(others), len(self.rows))) or save(self, path, note, student, teacher, others, writes))
    out = run("merged", *two(photos, captions, teachers), "--steps", 2, "--sample-every", 2)
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        assert list(line["losses"]) == ["photos", "captions"]
        assert line["loss"] == pytest.approx(sum(line["losses"].values()) / 2)
    assert seen[0] == (None, ["teacher of photos", "teacher of captions"], 5)     # 2 prompts, 2 and the unrelated one
    assert not (out / "teacher.safetensors").exists() and (out / "student.safetensors").is_file()


def test_training_reaches_the_teachers(run, photos, captions, teachers):
    """One task, its teacher within reach of the student's rank: the loss falls to a part of the untrained model's."""
    out = run("one", "--data", captions, "--teacher-lora", teachers[0], "--steps", 60)
    losses = [line["loss"] for line in metrics(out)]
    assert sum(losses[-5:]) / 5 < losses[0] / 3


def test_resume_with_noise_and_teachers_is_the_same_run(run, photos, captions, teachers):
    flags = (*two(photos, captions, teachers), "--loss", "kl", "--noise", 0.5, "--grad-states", 1)
    whole, parts = run("whole", *flags, "--steps", 4), run("parts", *flags, "--steps", 2)
    run("parts", *flags, "--steps", 4, "--resume")
    a, b = (load_file(folder / "student.safetensors") for folder in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_an_image_teacher_beside_an_adapter(prepare, photos, captions, teachers):
    parts = prepare("--data", photos, captions, "--teacher-lora", "image", teachers[1])
    first, second = parts.tasks
    assert first.teacher is None
    adapter = lora_files.load(teachers[1], parts.model)
    batch = second.dataset.batch(0)
    assert len(first.dataset.batch(0).teacher_context) == 2 and batch.teacher_context == []
    given = train.bind(parts.cfg, parts.run.tuned, second, 0, parts.shift_of)
    expected = parts.model.velocity(given["x"], 0.9, batch.student_context, adapter)
    assert torch.equal(given["teacher"](given["x"], 0.9), expected)
    assert not torch.allclose(expected, parts.model.velocity(given["x"], 0.9, batch.student_context))


def test_the_untuned_model_as_a_teacher(prepare, photos, captions):
    parts = prepare("--data", photos, captions, "--teacher-lora", "image", "base", "--loss", "v", "--rollout-steps", 2)
    first, second = parts.tasks
    fill_b(parts.run.tuned.theta, seed=5)
    batch, (start, _, _) = second.dataset.batch(0), sigma_grid(SCHEDULER["shift"], 2).tolist()
    given = train.bind(parts.cfg, parts.run.tuned, second, 0, parts.shift_of)
    x = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(1))
    untuned = parts.model.velocity(x, start, batch.student_context)
    assert first.teacher is None and torch.equal(given["teacher"](x, start), untuned)
    assert not torch.allclose(given["student"](x, start), untuned)
    losses = train.gradient_of_step(parts.cfg, parts.run, [second], parts.shift_of)
    assert losses["captions"] > 0                                       # it pulls the student back


def test_captions_alone(tmp_path, captions):
    rows = data.read_folder(captions, captions_suffice=True)
    assert [(row.image, row.size) for row in rows] == [(None, (1, 1))] * 3
    lines = [{"text": "a star"}, {"text": ["one", "two"]}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [row.captions for row in data.read_folder(tmp_path, captions_suffice=True)] == [("a star",), ("one", "two")]
    mixed = write_pictures(tmp_path / "mixed", [(40, 40)])
    (mixed / "more.txt").write_text("no picture")
    assert [row.image is None for row in data.read_folder(mixed, captions_suffice=True)] == [False, True]


def test_two_folders_of_one_name(prepare, photos, tmp_path, teachers):
    other = shutil.copytree(photos, tmp_path / "photos")
    parts = prepare("--data", photos, other, "--teacher-lora", *teachers)
    assert [task.name for task in parts.tasks] == ["photos-1", "photos-2"]
