"""SDXL-Lightning's losses against closed forms, segments against the sampler's grid, gradients, resume, bad input."""
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import random_transformer
from safetensors.torch import load_file
from torch import Tensor

from model import Context
from plumbing import files
from plumbing.checkpoints import EMBEDDED, backbone_of
from plumbing.files import InputError
from rollout import euler, sample, sigma_grid
from tiny import few_steps, few_tuned
from tiny.making import lightning, lightning_pool, lightning_stage, material
from tiny.making.lightning import (Discriminator, Lesson, Walkers, cross, loss_of_discriminator, loss_of_student,
                                   segments)
from tiny.making.lightning_pool import Pool
from tiny.models import FLUX2_FOLDER, Z_IMAGE_BASE, base_of, z_image_grid

pytestmark = pytest.mark.quick


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------- formulas
def test_losses_in_closed_form():
    real, fake = torch.randn(5, 7, generator=seeded(0)) * 3, torch.randn(5, 7, generator=seeded(1)) * 3
    p, p_fake = (torch.sigmoid(logit.double()) for logit in (real, fake))
    torch.testing.assert_close(loss_of_discriminator(real, fake).double(), (-p.log() - (1 - p_fake).log()).mean(),
                               rtol=1e-5, atol=0)
    torch.testing.assert_close(loss_of_student(fake).double(), -p_fake.log().mean(), rtol=1e-5, atol=0)
    unsure = torch.zeros(2, 3)
    assert float(loss_of_discriminator(unsure, unsure)) == pytest.approx(2 * math.log(2))
    far = torch.full((1, 1), -200.0, requires_grad=True)
    loss_of_student(far).backward()
    assert float(far.grad) == pytest.approx(-1)                         # does not saturate where log(1 - p^) would


@pytest.mark.parametrize("shift, steps, between", [(10.0, 4, 2), (3.0, 2, 4), (10.0, 1, 2), (6.0, 16, 4)])
def test_segments_are_steps_of_both_grids(shift, steps, between):
    grid = segments(shift, steps, between)
    assert grid.shape == (steps, between + 1)
    torch.testing.assert_close(torch.cat([grid[:, 0], grid[-1:, -1]]), sigma_grid(shift, steps), rtol=0, atol=1e-6)
    assert torch.equal(torch.cat([grid[:, :-1].flatten(), grid[-1:, -1]]), sigma_grid(shift, steps * between))


def test_the_teacher_crosses_segments_as_the_sampler_does():
    """All segments one after the other are the sampler with K n steps, whatever the noise levels of rows in a batch."""
    x = torch.randn(3, 2, 4, 4, generator=seeded(2))

    def velocity(x: Tensor, sigma) -> Tensor:
        return x * torch.as_tensor(sigma).view(-1, 1, 1, 1).cos() + 0.3

    at = x
    for sigmas in segments(3.0, 4, 2):
        at = cross(velocity, at, sigmas.expand(3, -1))
    torch.testing.assert_close(at, sample(velocity, x, sigma_grid(3.0, 8)))
    rows = cross(velocity, x, segments(3.0, 4, 2)[[0, 2, 3]])
    for i, k in enumerate((0, 2, 3)):
        torch.testing.assert_close(rows[i:i + 1], cross(velocity, x[i:i + 1], segments(3.0, 4, 2)[[k]]))


def lesson_of(student, teacher, between: int = 1, k: tuple[int, ...] = (0, 1, 3), level: float = 0.0) -> Lesson:
    x, noise = (torch.randn(3, 8, 4, 4, generator=seeded(seed)) for seed in (3, 4))
    return Lesson(x, segments(3.0, 4, between)[list(k)], student, teacher, noise, torch.full((3,), level))


def test_a_student_that_is_the_teacher_arrives_where_it_does():
    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return x + sigma.view(-1, 1, 1, 1)

    lesson = lesson_of(velocity, velocity)
    torch.testing.assert_close(lesson.fake, lesson.real)
    assert float(lesson.mse) < 1e-9
    for i, (sigma, sigma_next) in enumerate(segments(3.0, 4, 1)[[0, 1, 3]].tolist()):
        torch.testing.assert_close(lesson.fake[i], euler(lesson.x[i], lesson.x[i] + sigma, sigma, sigma_next))
    other = lesson_of(lambda x, sigma: velocity(x, sigma) + 2, velocity)
    assert float(other.mse) == pytest.approx(4, rel=1e-4)               # of velocities, whatever the step's length


def test_noise_before_the_discriminator_at_x0_alone():
    def still(x: Tensor, sigma: Tensor) -> Tensor:
        return torch.zeros_like(x)

    lesson = lesson_of(still, still, level=0.25)
    assert lesson.seen_at.tolist() == [*segments(3.0, 4, 1)[:2, 1].tolist(), .25]
    critic, shown = Discriminator(random_transformer(2, n_layers=3), 32, True, False), []
    critic.features = lambda x, sigma, context: shown.append((x, sigma)) or [torch.zeros(len(x), 4, 32)] * 2
    assert len(list(lesson.losses(critic, [0, 1, 2]))) == 2 and len(shown) == 4            # x_t, real, fake, fake
    (x, sigma), (seen, at) = shown[0], shown[2]
    assert torch.equal(x, lesson.x) and torch.equal(sigma, lesson.sigma) and torch.equal(at, lesson.seen_at)
    assert torch.equal(seen[:2], lesson.fake[:2])
    torch.testing.assert_close(seen[2], .75 * lesson.fake[2] + .25 * lesson.noise[2])
    shown.clear()
    list(lesson.losses(critic, [0, 1, 2], below=.5))
    assert [len(x) for x, _ in shown] == [1] * 4 and torch.equal(shown[2][0], seen[2:])
    shown.clear()
    critic.sees_x_t, critic.heads = False, Discriminator(random_transformer(2, n_layers=3), 32, False, False).heads
    x0 = torch.randn(3, 8, 4, 4, generator=seeded(8))
    list(lesson.losses(critic, [0, 1, 2], pool=(x0, [3, 4, 5])))                           # real, fake, fake
    sigma = lesson.sigma_next[:2].view(2, 1, 1, 1)
    torch.testing.assert_close(shown[0][0][:2], (1 - sigma) * x0[:2] + sigma * lesson.noise[:2])
    torch.testing.assert_close(shown[0][0][2], .75 * x0[2] + .25 * lesson.noise[2])


def test_levels_of_noise_have_the_signal_to_noise_of_sdxl():
    betas = torch.linspace(.00085 ** .5, .012 ** .5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[[10, 250, 500, 750]]
    sigma = (1 - kept).sqrt() / (kept.sqrt() + (1 - kept).sqrt())
    assert lightning.NOISED == pytest.approx(sigma.tolist(), abs=5e-5)


# ---------------------------------------------------------------------------------------------------- discriminator
def contexts(seed: int) -> list[Context]:
    return [Context(torch.randn(length, 128, generator=seeded(seed + length))) for length in (5, 9, 40)]


@pytest.mark.parametrize("learns", [False, True])
def test_gradients_reach_what_they_should(learns):
    student, critic = random_transformer(1), Discriminator(random_transformer(2, n_layers=3), 32, True, learns)
    context = contexts(0)
    lesson = lesson_of(lambda x, sigma: student.velocity(x, sigma, context),
                       lambda x, sigma: random_transformer(3).velocity(x, sigma, context), between=2)

    def touched(network: torch.nn.Module) -> set[str]:
        return {name for name, p in network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    losses = lesson.losses(critic, context)
    next(losses).backward()
    heads = {name for name in touched(critic) if name.startswith("heads.")}
    assert len(heads) == 2 * 6 and not touched(student)
    assert bool(touched(critic) - heads) == learns
    critic.zero_grad(set_to_none=True)
    next(losses).backward()
    assert not touched(critic) and len(touched(student)) > 20
    assert all(p.requires_grad for name, p in critic.named_parameters() if learns or name.startswith("heads."))


def test_the_student_learns_to_be_taken_for_the_teacher():
    """A step of D against the student's picture lowers its loss, a step of the student along the gradient Eq. 21."""
    critic, context = Discriminator(random_transformer(2, n_layers=3), 32, True, False), contexts(0)
    v = torch.randn(3, 8, 4, 4, generator=seeded(9)).requires_grad_()
    lesson = lesson_of(lambda x, sigma: v, lambda x, sigma: torch.zeros_like(x))
    *_, loss = lesson.losses(critic, context)
    loss.backward()
    with torch.no_grad():
        better = lesson_of(lambda x, sigma: v - 2 * v.grad / v.grad.norm(), lambda x, sigma: torch.zeros_like(x))
        *_, lower = better.losses(critic, context)
    assert lower < loss


def test_what_the_discriminator_looks_at():
    x, other = (torch.randn(3, 8, 4, 4, generator=seeded(seed)) for seed in (5, 6))
    sigma, context, text = torch.tensor([.2, .5, 1.0]), contexts(0), contexts(7)
    for sees_x_t in (True, False):
        critic = Discriminator(random_transformer(2, n_layers=6), 32, sees_x_t, False)
        assert critic.read == ["layers.1", "layers.3"] and len(critic.backbone.layers) == 4        # of six
        features = critic.features(x, sigma, context)
        assert [tuple(f.shape) for f in features] == [(3, 4, 32)] * 2                          # patches of 2 x 2
        before, elsewhere = (critic.features(start, sigma, context) for start in (x, other))
        logits = critic(features, before)
        assert logits.shape == (3, 4 * 2)
        assert torch.equal(logits, critic(features, elsewhere)) != sees_x_t                # Eq. 22, Eq. 23
        assert not torch.equal(logits, critic(critic.features(x, sigma, text), before))    # the caption
        assert not torch.equal(logits, critic(critic.features(x, sigma / 2, context), before))
        assert torch.equal(critic.features(x, sigma, context)[0], features[0])             # no hook is left


def test_of_flux2_the_discriminator_sees_the_drawn_image_alone():
    """Its tokens stand between those of words and of references; the count of words may differ."""
    base = base_of(FLUX2_FOLDER)
    network = backbone_of(base).load(base, "cpu", torch.float32)
    dim, channels = network.context_embedder.in_features, network.x_embedder.in_features // 4
    said, shown = torch.randn(2, 7, dim, generator=seeded(3)), torch.randn(channels, 8, 8, generator=seeded(4))
    x, sigma = torch.randn(2, channels, 16, 16, generator=seeded(5)), torch.tensor([0.3, 0.6])
    context = [Context(said[0], (shown,)), Context(said[1, :5], (shown,))]
    seen = []
    critic = Discriminator(network, backbone_of(base).width(files.read_json(base / "transformer" / "config.json")),
                           False, False)
    critic.backbone.blocks()[critic.read[0]].register_forward_hook(lambda block, given, out: seen.append(out))
    found = critic.features(x, sigma, context)[0]
    assert found.shape[1] == 64 and seen[0].shape[1] == 7 + 64 + 16
    assert torch.equal(found, seen[0][:, 7:-16])


# ---------------------------------------------------------------------------------------------------- walks
class Numbered:
    """Captions that say when they were drawn."""
    shape = (1, 2, 2)

    def draw(self, step: int, count: int, g: torch.Generator):
        return ([Context(torch.full((1, 1), step + i / 10)) for i in range(count)] for _ in range(2))


def test_walkers_take_turns():
    grid = segments(3.0, 3, 1)
    walkers, seen, starts = Walkers(Numbered(), 5, grid, seed=0), [], []
    for step in range(8):
        walkers.begin(step)
        seen.append(walkers.k.tolist())
        starts.append([round(float(context.text), 1) for context in walkers.contexts[0]])
        walkers.advance(walkers.x + 1, walkers.x, walkers.x)
    assert seen == [[0] * 5, [1, 0, 1, 1, 0], [2, 1, 0, 2, 1], [0, 2, 1, 0, 2]] + [
        [1, 0, 2, 1, 0], [2, 1, 0, 2, 1], [0, 2, 1, 0, 2], [1, 0, 2, 1, 0]]
    assert starts[0] == [0, .1, .2, .3, .4] and starts[1] == [0, 1, .2, .3, 1.1] and starts[5][2] == 5
    fresh = Walkers(Numbered(), 5, grid, seed=0)
    fresh.load_state(walkers.state())
    walkers.begin(8), fresh.begin(8)
    assert torch.equal(walkers.x, fresh.x) and torch.equal(walkers.k, fresh.k)
    assert all(torch.equal(a.text, b.text) for a, b in zip(walkers.contexts[1], fresh.contexts[1]))


def test_walks_are_those_of_the_sampler():
    grid = segments(3.0, 3, 1)
    walkers = Walkers(Numbered(), 1, grid, seed=0)
    walkers.begin(0)
    start = walkers.x
    for step in range(3):
        walkers.begin(step)
        sigma, sigma_next = grid[walkers.k][0].tolist()
        arrived = euler(walkers.x, walkers.x * sigma, sigma, sigma_next)
        walkers.advance(arrived, walkers.x, walkers.x)
    torch.testing.assert_close(arrived, sample(lambda x, sigma: x * sigma, start, sigma_grid(3.0, 3)))


def test_the_last_step_is_repeated_from_the_teachers_picture():
    """Two more times, at the noise level where it starts; then the row begins anew."""
    grid = segments(3.0, 2, 2)
    walkers, seen = Walkers(Numbered(), 1, grid, seed=0, linger=2), []
    real, noise = torch.full_like(walkers.x, 2.0), torch.full_like(walkers.x, -1.0)
    for step in range(5):
        walkers.begin(step)
        seen.append((int(walkers.k), round(float(walkers.contexts[0][0].text), 1)))
        if 2 <= step < 4:
            torch.testing.assert_close(walkers.x, (1 - grid[1, 0]) * real + grid[1, 0] * noise)
        walkers.advance(walkers.x + 1, real, noise)
    assert seen == [(0, 0), (1, 0), (1, 0), (1, 0), (0, 4)]


# ---------------------------------------------------------------------------------------------------- the program
@pytest.fixture(scope="module")
def captions(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a red star", "a heart", "a dog on mint")))
    return path


@pytest.fixture(scope="module")
def stage(checkpoint, captions, tmp_path_factory):
    """Runs a stage on the small random checkpoint; returns its folder."""
    def train(name: str, *words: str) -> Path:
        out = tmp_path_factory.getbasetemp() / "lightning" / name
        assert lightning_stage.main(["--model", str(checkpoint), "--data", str(captions), "--size", "32", "--batch",
                                     "3", "--device", "cpu", "--out", str(out), *words]) == 0
        return out
    return train


def same(a: Path, b: Path, *files: str) -> bool:
    """The tensors; the order in which metadata is written differs."""
    pairs = [(load_file(a / file), load_file(b / file)) for file in files]
    return all(mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
               for mine, other in pairs)


RESULT = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": material.LORA_FILE}


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_every_stage_goes_on_bit_for_bit(stage, checkpoint, captions, tune, monkeypatch):
    monkeypatch.setattr(lightning_stage, "HEAD_START", 1)
    first = stage(f"{tune}-4", "--tune", tune, "--from-steps", "8", "--to-steps", "4", "--steps", "2", "--rank", "2")
    words = ("--tune", tune, "--teacher", str(first), "--from-steps", "4", "--to-steps", "2", "--save-every", "2")
    if tune == "full":
        pool = first.parent / "pool"
        lightning_pool.main(["--model", str(checkpoint), "--data", str(captions), "--size", "32", "--count", "17",
                             "--steps", "2", "--device", "cpu", "--out", str(pool)])
        assert len(Pool(pool).contexts) == len(Pool(pool).x0) == 32
        words += ("--relaxed", "--pool", str(pool))
    else:
        words += ("--critic", "heads")
    whole, stopped = stage(f"{tune}-whole", *words, "--steps", "3"), stage(f"{tune}-stopped", *words, "--steps", "2")
    assert not same(whole, stopped, RESULT[tune])
    assert stage(f"{tune}-stopped", *words, "--steps", "3") == stopped
    assert same(whole, stopped, RESULT[tune], "state.safetensors") and not same(whole, first, RESULT[tune])
    assert (whole / "log.jsonl").read_text() == (stopped / "log.jsonl").read_text()
    log = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3] and all({"mse", "D", "G"} <= line.keys() for line in log)


def test_a_lora_is_merged_where_all_weights_are_trained(stage, checkpoint):
    first = stage("to-merge", "--tune", "lora", "--from-steps", "4", "--to-steps", "2", "--steps", "2", "--lr", "1e-2")
    out = stage("merged", "--teacher", str(first), "--from-steps", "2", "--to-steps", "1", "--steps", "1", "--lr", "0")
    device, base = torch.device("cpu"), backbone_of(checkpoint).load(checkpoint, "cpu", torch.float32)
    net, adapter = material.read_network(first, checkpoint, device, torch.float32)
    merged, none = material.read_network(out, checkpoint, device, torch.float32)
    x, context = torch.randn(3, 8, 4, 4, generator=seeded(0)), contexts(0)
    torch.testing.assert_close(merged.velocity(x, .5, context), net.velocity(x, .5, context, adapter))
    assert none is None and not torch.allclose(base.velocity(x, .5, context), net.velocity(x, .5, context, adapter))


@pytest.mark.parametrize("words, message", [
    (("--from-steps", "16", "--to-steps", "3"), "do not divide"),
    (("--from-steps", "4", "--to-steps", "4"), "do not divide"),
    (("--to-steps", "0"), "--to-steps 0: give 1 or more"),
    (("--lr", "nan"), "--lr nan"),
    (("--pool", "ROOT"), "--pool: belongs to --relaxed"),
    (("--relaxed", "--teacher", "BASE", "--pool", "ROOT/none"), "no pictures there"),
    (("--relaxed",), "--relaxed: there is no discriminator"),
    (("--data", "ROOT/none.jsonl"), "no such folder"),
    (("--data", "ROOT/empty.jsonl"), "no rows"),
    (("--data", "ROOT/blank.jsonl"), "blank.jsonl"),
    (("--teacher", "ROOT/none"), "no such file"),
    (("--tune", "lora", "--init", "BASE"), "holds a whole network"),
    (("--linger", "-1"), "--linger -1: give 0 or more"),
    (("--noised", "-1"), "--noised -1: give 0 or more"),
    (("--out", "ROOT/other"), "other options"),
])
def test_bad_input_is_one_line(stage, checkpoint, tmp_path, words, message):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "stage.json").write_text('{"options": {}}')
    words = [word.replace("ROOT", str(tmp_path)).replace("BASE", str(checkpoint)) for word in words]
    with pytest.raises(InputError, match=message) as caught:
        stage("bad", "--steps", "1", *words)
    assert "\n" not in str(caught.value)


def test_when_the_discriminator_is_shown_noise(stage, captions, checkpoint):
    """At x0, where the student has --noised steps or fewer."""
    for noised, expected in ((0, False), (1, False), (2, True)):
        cfg = lightning_stage.Options(from_steps=4, to_steps=2, model=str(checkpoint), data=str(captions), size=32,
                                      batch=3, device="cpu", noised=noised, critic="none", out="unused")
        training = lightning_stage.Training(cfg)
        first, _ = training.lesson()
        assert not first.level.any()                                    # the first of two steps does not end at x0
        training.walkers.advance(first.fake.detach(), first.real, first.noise)
        training.step = 1
        assert bool(training.lesson()[0].level.any()) is expected


def test_a_whole_network_teaches_a_new_lora(stage):
    first = stage("full-4", "--tune", "full", "--from-steps", "8", "--to-steps", "4", "--steps", "2", "--rank", "2")
    out = stage("lora-2", "--tune", "lora", "--teacher", str(first), "--from-steps", "4", "--to-steps", "2", "--steps",
                "1", "--rank", "2", "--critic", "none")
    assert (out / material.LORA_FILE).is_file() and not (out / "transformer").exists()


def test_a_discriminator_that_wins_outright(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(lightning_stage, "WON_STEPS", 2)
    monkeypatch.setattr(lightning_stage, "WON", 10.0)
    first = stage("full-4", "--tune", "full", "--from-steps", "8", "--to-steps", "4", "--steps", "2", "--rank", "2")
    out = tmp_path / "won"
    with pytest.raises(InputError, match="step 2: the discriminator tells teacher and student apart"):
        stage("unused", "--teacher", str(first), "--from-steps", "4", "--to-steps", "2", "--out", str(out))
    assert (out / "state.safetensors").is_file()


def test_a_number_that_is_not_finite_stops_before_the_step(stage, tmp_path, monkeypatch):
    first = stage("full-4", "--tune", "full", "--from-steps", "8", "--to-steps", "4", "--steps", "2", "--rank", "2")
    words = ("--teacher", str(first), "--from-steps", "4", "--to-steps", "2", "--save-every", "1", "--out",
             str(tmp_path))
    stage("unused", *words, "--steps", "2")
    before = (tmp_path / "state.safetensors").read_bytes()
    monkeypatch.setattr(lightning, "loss_of_discriminator", lambda real, fake: (real + fake).mean() * float("nan"))
    with pytest.raises(InputError, match="step 3: loss nan"):
        stage("unused", *words, "--steps", "4")
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_distilled_models_are_known(stage, checkpoint, capsys):
    assert material.is_distilled(EMBEDDED) and not material.is_distilled(checkpoint)
    assert material.undistilled(EMBEDDED) == Z_IMAGE_BASE and not material.is_distilled(Z_IMAGE_BASE)
    assert material.undistilled(checkpoint) == checkpoint
    out = stage("full-4", "--tune", "full", "--from-steps", "8", "--to-steps", "4", "--steps", "2", "--rank", "2")
    assert material.is_distilled(out) and capsys.readouterr()
    material.warn_distilled(out)
    assert capsys.readouterr().err.startswith("warning: ")


def test_captions_of_the_world_are_read_in_words_by_the_teacher():
    world = material.World(EMBEDDED, 0)
    assert world.shape == (8, 16, 16) and world.empty.text.shape[1] == 128
    for step in range(2):                                               # text, and [V] with a picture
        mine, told = world.draw(step, 2, seeded(step))
        assert len(mine) == len(told) == 2 and all(isinstance(context, Context) for context in mine + told)
        assert all((len(a.text) == len(b.text)) == (step == 0) for a, b in zip(mine, told))


# ---------------------------------------------------------------------------------------------------- the measure
@pytest.mark.parametrize("entry", ["tiny/base", "=tiny/base", "a=", "a=tiny/base:x"])
def test_networks_need_a_name_a_path_and_a_guidance(entry):
    with pytest.raises(InputError, match="--network"):
        few_steps.Walker(entry, Z_IMAGE_BASE)


def test_measures_of_few_steps(monkeypatch):
    """Two prompts in one step: a smoke test, and the grid is the sampler's."""
    ask, asked = few_steps.Questions(EMBEDDED, 2, seed=3), []
    monkeypatch.setattr(few_steps, "draw", lambda net, vae, contexts, noise, steps, *rest: (
        asked.append((len(contexts), steps, *rest[1:2])), ask.reader.render.draw(ask.prompts.rows[:1].expand(
            len(contexts), -1), seeded(4)))[1])
    walker = few_steps.Walker(f"base={Z_IMAGE_BASE}:2", Z_IMAGE_BASE)
    numbers, pictures = ask(walker, 2)
    assert asked == [(2, 2, 2.0), (4, 2, 2.0)] and pictures.shape == (2, 3, 64, 64)
    assert numbers["ordinary, decided"] > .99 and .3 < numbers["diversity"] < .7
    assert few_steps.table({"base": {"2": numbers}}).splitlines()[-1].startswith("| base | 2 | ")
    assert len(z_image_grid(2)) == 3


# ---------------------------------------------------------------------------------------------------- D-OPSD on top
def test_a_model_is_put_together_from_a_network_and_the_rest(tmp_path):
    model = few_tuned.assemble(Z_IMAGE_BASE, tmp_path / "model")
    assert {path.name for path in model.iterdir()} == {path.name for path in EMBEDDED.iterdir()}
    assert (model / "transformer").resolve() == Z_IMAGE_BASE / "transformer"
    assert (few_tuned.assemble(Z_IMAGE_BASE, tmp_path / "model") / "vae").resolve() == EMBEDDED / "vae"
    with pytest.raises(InputError, match="no transformer/"):
        few_tuned.assemble(tmp_path, tmp_path / "other")


def test_rows_of_the_table_are_means_over_concepts_and_seeds():
    def line(steps: int, row: str, concept: float, **more: float) -> dict:
        return {"steps": steps, "row": row, "measures": {"concept": concept, **more}}

    lines = [line(2, "SFT", .5, ordinary=.9), line(2, "SFT", .7, ordinary=.8), line(4, "teacher's view", 1.0)]
    assert few_tuned.table(lines).splitlines()[2:] == [
        "| 4 | teacher's view | 1.000 |  |  |  |  | 1 |", "| 2 | SFT | 0.600 ± 0.141 | 0.850 ± 0.071 |  |  |  | 2 |"]


@pytest.mark.parametrize("entry", ["four=a", "4=", "0=a", "a"])
def test_models_need_a_number_of_steps(entry, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["few_tuned", "--network", entry, "--out", str(tmp_path)])
    with pytest.raises(InputError, match="write STEPS=FOLDER"):
        few_tuned.main()


@pytest.mark.parametrize("words", [("--network", "4=b"), ("--network", "4=a", "--prompts", "9"),
                                   ("--network", "4=a", "--steps", "9")])
def test_results_of_other_models_are_not_taken(words, tmp_path, monkeypatch):
    line = {"steps": 4, "network": "a", "updates": 100, "prompts": 48, "concept": "star", "row": "before", "seed": 0}
    (tmp_path / "few_tuned.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.setattr("sys.argv", ["few_tuned", "--out", str(tmp_path), *words])
    with pytest.raises(InputError, match="has results for 4 steps of another network, .*give another --out"):
        few_tuned.main()
    monkeypatch.setattr("sys.argv", ["few_tuned", "--out", str(tmp_path), "--network", "4=a"])
    with pytest.raises(InputError, match="a: no transformer/ in this folder"):         # the same goes on
        few_tuned.main()
