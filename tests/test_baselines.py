"""The methods that D-OPSD is compared with: formulas, and a step of each against an independent computation."""
import itertools
import json
import math

import pytest
import torch
from conftest import fill_b, learn, metrics
from safetensors.torch import load_file
from test_loss import draw
from test_rollout import student
from test_train import noise_of, norm_of, with_adapter

import data
import train
from baselines import denoising_error, draw_sigma, off_policy, passes_of_rollout, preference, sft
from rollout import sigma_grid

pytestmark = pytest.mark.quick
SHIFT = 3.0


# ---------------------------------------------------------------------------------------------------- formulas
def test_sigma_draw():
    generator = torch.Generator().manual_seed(0)
    sigma = draw_sigma(generator, 3.0, 20000)
    assert sigma.shape == (20000,) and sigma.dtype == torch.float32
    assert 0 < float(sigma.min()) and float(sigma.max()) <= 1
    u = sigma / (3 - 2 * sigma)  # undo the shift: uniform again
    assert float(u.mean()) == pytest.approx(0.5, abs=0.01) and float(u.var()) == pytest.approx(1 / 12, abs=0.002)
    assert torch.equal(sigma, draw_sigma(torch.Generator().manual_seed(0), 3.0, 20000))
    assert float(draw_sigma(generator, 1.0, 20000).mean()) == pytest.approx(0.5, abs=0.01)


def test_sft():
    x0, eps, sigma = draw(10), draw(11), torch.tensor([0.25, 1.0])
    seen = {}

    def velocity(x, s):
        seen["x"], seen["sigma"] = x, s
        return 0.1 * x

    loss = denoising_error(velocity, x0, eps, sigma).mean()
    assert torch.equal(seen["sigma"], sigma)
    for b, s in enumerate((0.25, 1.0)):
        assert torch.allclose(seen["x"][b], (1 - s) * x0[b] + s * eps[b])
    assert float(loss) == pytest.approx(float(((0.1 * seen["x"] - (eps - x0)) ** 2).mean()), rel=1e-6)
    assert float(denoising_error(lambda x, s: eps - x0, x0, eps, sigma).mean()) == 0.0
    assert denoising_error(velocity, x0.bfloat16(), eps.bfloat16(), sigma).dtype == torch.float32

    (loss,) = sft(velocity, eps, torch.tensor([1.0, 0.0]), x0, 3.0, torch.Generator().manual_seed(3))
    drawn = draw_sigma(torch.Generator().manual_seed(3), 3.0, 2)
    assert torch.equal(seen["sigma"], drawn) and torch.equal(loss, denoising_error(velocity, x0, eps, drawn).mean())


def test_denoising_error_is_of_each_image():
    x0, eps, sigma = draw(12), draw(13), torch.tensor([0.5, 0.9])
    errors = denoising_error(lambda x, s: 0.3 * x, x0, eps, sigma)
    for b, s in enumerate((0.5, 0.9)):
        v = 0.3 * ((1 - s) * x0[b] + s * eps[b])
        assert float(errors[b]) == pytest.approx(float(((v - (eps[b] - x0[b])) ** 2).mean()), rel=1e-5)
    assert errors.shape == (2,)


@pytest.mark.parametrize("beta", [0.5, 20.0])
def test_pso(beta):
    """Against the definition; its gradient is a sigmoid times the margin's; at equal models it is log 2."""
    win, lose, eps, sigma = draw(14), draw(15), draw(16), torch.tensor([0.75, 1.0])
    weight = torch.tensor(0.2, requires_grad=True)

    def student(x, s):
        return weight * x

    def reference(x, s):
        return -0.1 * x

    loss, expected, slope = preference(student, reference, win, lose, eps, sigma, beta), 0.0, 0.0
    for b, s in enumerate((0.75, 1.0)):
        x = {name: (1 - s) * x0[b] + s * eps[b] for name, x0 in (("win", win), ("lose", lose))}
        goal = {"win": eps[b] - win[b], "lose": eps[b] - lose[b]}
        error = {name: ((0.2 * x[name] - goal[name]) ** 2).mean() for name in x}
        error_base = {name: ((-0.1 * x[name] - goal[name]) ** 2).mean() for name in x}
        margin = float((error_base["win"] - error_base["lose"]) - (error["win"] - error["lose"]))
        expected += math.log(1 + math.exp(-beta * margin)) / 2
        change = {name: 2 * ((0.2 * x[name] - goal[name]) * x[name]).mean() for name in x}      # dl / dweight
        slope += float(beta * (change["win"] - change["lose"]) / (1 + math.exp(beta * margin))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert float(weight.grad) == pytest.approx(slope, rel=1e-3)
    assert float(preference(reference, reference, win, lose, eps, sigma, beta)) == pytest.approx(math.log(2), rel=1e-6)


def test_off_policy_walks_along_the_teachers_velocity():
    """The next state is x + (sigma' - sigma) v for the teacher's v, and the gradient stays at the student."""
    net, noise, grid = student(), torch.randn(1, 3, 4, 4), sigma_grid(SHIFT, 3)
    visited, levels = [], torch.tensor(1.0, requires_grad=True)

    def velocity(x, sigma):
        visited.append(x)
        assert not x.requires_grad
        return net(x)

    for loss in off_policy(velocity, noise, grid, lambda x, sigma: levels * torch.full_like(x, sigma),
                           lambda point: 1.0, range(3), 0.0, torch.Generator()):
        loss.backward()
    x = noise
    for state, sigma, sigma_next in zip(visited, grid.tolist(), grid.tolist()[1:]):
        assert torch.allclose(state, x)
        x = x + (sigma_next - sigma) * sigma
    assert len(visited) == 3 and levels.grad is None and all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("K, learned", [(4, 1), (4, 2), (4, 4), (8, 3), (1, 1)])
def test_forward_passes_are_those_of_all_draws(K, learned):
    """Over all sets of learned states: the student walks until the last one, the teacher is asked at each."""
    sets = list(itertools.combinations(range(K), learned))
    walked = sum(max(states) + 1 for states in sets) / len(sets)
    assert passes_of_rollout(K, learned) == pytest.approx((walked - learned + learned, learned))


# ---------------------------------------------------------------------------------------------------- a step
def agrees(value: float, parts, expected: torch.Tensor) -> None:
    """A step returned the loss and left the gradient of `expected`."""
    assert value == pytest.approx(expected.item(), rel=1e-4)
    gradients = torch.autograd.grad(expected, parts.run.tuned.theta.parameters())
    for tensor, gradient in zip(parts.run.tuned.theta.parameters(), gradients):
        assert torch.allclose(tensor.grad, gradient, rtol=1e-3, atol=1e-6) and gradient.abs().max() > 1e-4


def test_off_policy_compares_at_the_teachers_states(filled):
    parts = filled("--method", "off-policy")
    value = learn(parts)
    x, terms = noise_of(parts.batch, 0, 0), []
    student, teacher = (with_adapter(parts.model, side) for side in (parts.run.tuned.theta, parts.run.tuned.theta_bar))
    for sigma, following in zip(parts.sigmas.tolist(), parts.sigmas.tolist()[1:]):
        goal = teacher(x, sigma, parts.batch.teacher_context).detach()
        terms.append(((student(x, sigma, parts.batch.student_context) - goal) ** 2).mean())
        x = x + (following - sigma) * goal                                          # D-OPSD goes on with the student's
    agrees(value, parts, sum(terms) / 2)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_first_loss_and_gradient_of_sft(run, prepare, accumulate):
    flags = ("--method", "sft", "--steps", 1, "--seed", 9, "--accumulate", accumulate)
    parts, losses = prepare(*flags), []
    for number in range(accumulate):
        batch, rng = parts.dataset.batch(number), data.generator(9, "noise", number)
        eps = torch.randn(batch.latents.shape, generator=rng)
        u = 1 - torch.rand(len(eps), generator=rng)
        sigma = 3 * u / (1 + 2 * u)                                                 # the scheduler's shift is 3
        s = sigma.view(-1, 1, 1, 1)
        x = (1 - s) * batch.latents + s * eps
        v = parts.model.velocity(x, sigma, batch.student_context, parts.run.tuned.theta)
        losses.append(((v - (eps - batch.latents)) ** 2).mean())
    mean = sum(losses) / accumulate
    line, = metrics(run("real", *flags))
    assert line["loss"] == pytest.approx(mean.item(), rel=1e-5)
    gradient = torch.autograd.grad(mean, parts.run.tuned.theta.parameters())
    assert line["gradient_norm"] == pytest.approx(norm_of(gradient), rel=1e-4)


def test_sft_teacher_learns_from_the_teachers_pictures(filled):
    parts = filled("--method", "sft-teacher")
    value = learn(parts)
    rng, x = data.generator(0, "noise", 0), noise_of(parts.batch, 0, 0)
    torch.randn(x.shape, generator=rng)
    for sigma, following in zip(parts.sigmas.tolist(), parts.sigmas.tolist()[1:]):
        v = parts.model.velocity(x, sigma, parts.batch.teacher_context, parts.run.tuned.theta_bar)
        x = (x + (following - sigma) * v).detach()
    eps = torch.randn(x.shape, generator=rng)
    sigma = draw_sigma(rng, 3.0, len(x))
    s = sigma.view(-1, 1, 1, 1)
    v = parts.model.velocity((1 - s) * x + s * eps, sigma, parts.batch.student_context, parts.run.tuned.theta)
    agrees(value, parts, ((v - (eps - x)) ** 2).mean())


def test_pso_prefers_the_target_to_an_own_sample(filled):
    parts = filled("--method", "pso", "--beta", 3)
    value = learn(parts)
    rng, own = data.generator(0, "noise", 0), noise_of(parts.batch, 0, 0)
    torch.randn(own.shape, generator=rng)
    k = torch.randint(2, (len(own),), generator=rng)
    eps, sigma = torch.randn(own.shape, generator=rng), parts.sigmas[k]
    for at, following in zip(parts.sigmas.tolist(), parts.sigmas.tolist()[1:]):
        v = parts.model.velocity(own, at, parts.batch.student_context, parts.run.tuned.theta)
        own = own + (following - at) * v
        own = own.detach()
    s, errors = sigma.view(-1, 1, 1, 1), {}
    for name, x0 in (("win", parts.batch.latents), ("lose", own)):
        for adapter in (None, parts.run.tuned.theta):
            v = parts.model.velocity((1 - s) * x0 + s * eps, sigma, parts.batch.student_context, adapter)
            errors[name, adapter is None] = ((v - (eps - x0)) ** 2).flatten(1).mean(1)
    margin = (errors["win", True] - errors["lose", True]) - (errors["win", False] - errors["lose", False])
    agrees(value, parts, torch.log(1 + torch.exp(-3 * margin)).mean())


@pytest.fixture
def dreamed(prepare, tmp_path):
    """Parts of a run of DreamBooth that keeps three captions, and a student that is not the base."""
    path = tmp_path / "captions.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a moon", ["a cross", "a heart"], "a star")))
    parts = prepare("--method", "dreambooth", "--keep", path, "--keep-weight", 3)
    fill_b(parts.run.tuned.theta, seed=1)
    return parts


def test_prior_pictures_are_the_untuned_models_and_drawn_once(dreamed, monkeypatch):
    prior, calls = dreamed.tasks[1].dataset, []
    forward = type(dreamed.model).velocity
    monkeypatch.setattr(type(dreamed.model), "velocity", lambda *given: calls.append(1) or forward(*given))
    batches = [prior.batch(number) for number in range(6)]                          # three epochs
    asked = {(index, text) for batch in batches for index, text in zip(batch.indices, batch.captions)}
    assert len(asked) == 4 and len(calls) == 4 * 4                                  # the sampler has 4 steps
    grid = sigma_grid(SHIFT, 4).tolist()
    for batch in batches:
        for index, text, context, latents in zip(batch.indices, batch.captions, batch.student_context, batch.latents):
            x = torch.randn(1, 8, 8, 8, generator=data.generator(0, "prior", index, text))
            for sigma, following in itertools.pairwise(grid):
                x = x + (following - sigma) * forward(dreamed.model, x, sigma, [context], None).detach()
            assert torch.allclose(latents, x[0], atol=1e-5) and latents.abs().max() > 0.1


def test_dreambooth_is_fine_tuning_on_both(dreamed):
    parameters, losses = list(dreamed.run.tuned.parameters().values()), []
    for task in dreamed.tasks:
        batch, rng = task.dataset.batch(0), data.generator(0, "noise", 0, *([task.index] if task.index else []))
        eps = torch.randn(batch.latents.shape, generator=rng)
        s = draw_sigma(rng, SHIFT, len(eps)).view(-1, 1, 1, 1)
        v = dreamed.model.velocity((1 - s) * batch.latents + s * eps, s.flatten(), batch.student_context,
                                   dreamed.run.tuned.theta)
        losses.append(((v - (eps - batch.latents)) ** 2).mean())
    expected = torch.autograd.grad((losses[0] + 3 * losses[1]) / 4, parameters)
    found = train.gradient_of_step(dreamed.cfg, dreamed.run, dreamed.tasks, dreamed.shift_of)
    assert list(found.values()) == pytest.approx([loss.item() for loss in losses], rel=1e-4)
    for parameter, gradient in zip(parameters, expected):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


def test_dreambooth_resumes(run, tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"text": "a moon"}\n{"text": "a heart"}\n')
    flags = ("--method", "dreambooth", "--keep", tmp_path / "captions.jsonl")
    whole, parts = run("whole", *flags, "--steps", 4), run("parts", *flags, "--steps", 2)
    run("parts", *flags, "--steps", 4, "--resume")
    assert metrics(whole) == metrics(parts)
    a, b = (load_file(out / "student.safetensors") for out in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
