"""The stochastic step against Flow-GRPO's formula, exact Gaussian marginals and hand-written loops."""
import math

import pytest
import torch

from plumbing.files import InputError
from rollout import euler, rollout, sample, sigma_grid, transition

pytestmark = pytest.mark.quick
SHIFT = 3.0
STEPS = [(1.0, 0.9), (1.0, 0.97), (0.9, 0.75), (0.5, 0.0), (0.3, 0.3)]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3, 4, 5)), generator=torch.Generator().manual_seed(seed))


def student() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Tanh())


def gaussian(m: float, s0: float):
    """Velocity E[eps - x0 | x], mean and variance at sigma, of data N(m, s0^2)."""
    def moments(sigma):
        return (1 - sigma) * m, (1 - sigma) ** 2 * s0 ** 2 + sigma ** 2

    def velocity(x, sigma):
        mean, variance = moments(sigma)
        return -m + (sigma - (1 - sigma) * s0 ** 2) / variance * (x - mean)

    return velocity, moments


def propagate(velocity, mean: float, variance: float, grid: list[float], noise: float) -> list[tuple[float, float]]:
    """Mean and variance at grid[1:], exactly: with a velocity linear in x the mean of a step is slope x + offset."""
    course, x = [], torch.tensor([0.0, 1.0], dtype=torch.float64)
    for sigma, following in zip(grid, grid[1:]):
        ends, std = transition(x, velocity(x, sigma), sigma, following, noise)
        offset, slope = float(ends[0]), float(ends[1] - ends[0])
        mean, variance = slope * mean + offset, slope ** 2 * variance + std ** 2
        course.append((mean, variance))
    return course


@pytest.mark.parametrize("sigma, following", STEPS)
def test_transition_without_noise_is_euler(sigma, following):
    for x, v in ((draw(0), draw(1)), (draw(2).double(), draw(3).double())):
        mean, std = transition(x, v, sigma, following, 0.0)
        assert torch.equal(mean, euler(x, v, sigma, following)) and mean.dtype == x.dtype
        assert std == 0.0 and isinstance(std, float)


@pytest.mark.parametrize("sigma, following", STEPS[:-1])
def test_little_noise_converges_to_euler(sigma, following):
    """Mean at second order in a, std at first."""
    x, v, results = draw(0).double(), draw(1).double(), []
    for a in (0.2, 0.1, 0.05):
        mean, std = transition(x, v, sigma, following, a)
        results.append((float((mean - euler(x, v, sigma, following)).abs().max()), std))
    for (off, std), (off_half, std_half) in zip(results, results[1:]):
        assert off_half > 0 and off / off_half == pytest.approx(4, rel=1e-6)
        assert std_half > 0 and std / std_half == pytest.approx(2, rel=1e-9)


@pytest.mark.parametrize("noise", [0.3, 0.7, 1.2])
@pytest.mark.parametrize("sigma, following", STEPS)
def test_transition_is_the_published_step(sigma, following, noise):
    """Flow-GRPO's formula in its own form, with the exception at sigma = 1."""
    x, v, d = draw(0).double(), draw(1).double(), following - sigma
    g = noise * math.sqrt(sigma / (1 - (following if sigma == 1 else sigma)))
    expected = x * (1 + g ** 2 / (2 * sigma) * d) + v * (1 + g ** 2 * (1 - sigma) / (2 * sigma)) * d
    mean, std = transition(x, v, sigma, following, noise)
    assert torch.allclose(mean, expected, rtol=1e-12, atol=1e-12)
    assert isinstance(std, float) and std == pytest.approx(g * math.sqrt(-d), rel=1e-12)
    if sigma == 1:
        assert std == pytest.approx(noise)  # whatever the step


@pytest.mark.parametrize("noise", [0.0, 0.4, 0.7, 1.2])
def test_gaussian_marginals_converge_at_first_order(noise):
    """The worst error of all states from sigma = 0.9, where the marginal is given, to 0; the mean is even exact."""
    velocity, moments = gaussian(1.5, 0.4)

    def errors(steps: int) -> tuple[float, float]:
        grid = torch.linspace(0.9, 0.0, steps + 1, dtype=torch.float64).tolist()
        found = propagate(velocity, *moments(0.9), grid, noise)
        pairs = [(*state, *moments(sigma)) for state, sigma in zip(found, grid[1:])]
        return max(abs(p[0] - p[2]) for p in pairs), max(abs(p[1] - p[3]) for p in pairs)

    coarse, fine = errors(200), errors(400)
    assert coarse[0] < 1e-12 and fine[0] < 1e-12
    assert fine[1] < 0.01 and 0.9 < math.log2(coarse[1] / fine[1]) < 1.1, (coarse, fine)


@pytest.mark.parametrize("noise", [0.7, 1.2])
def test_first_step_as_published_overshoots(noise):
    """From pure noise the variance is too large by a^4 / 4, however short the step; the mean is right."""
    velocity, moments = gaussian(1.5, 0.4)
    for d in (1e-3, 1e-4):
        ((mean, variance),) = propagate(velocity, 0.0, 1.0, [1.0, 1 - d], noise)
        assert mean == pytest.approx(moments(1 - d)[0], rel=1e-6)
        assert variance - moments(1 - d)[1] == pytest.approx(noise ** 4 / 4, abs=4 * d)


@pytest.mark.parametrize("noise", [0.3, 0.7])
def test_samples_have_the_propagated_moments(noise):
    """Many particles from pure noise: eps is drawn once per step, independent of x and with the right scale."""
    velocity, moments = gaussian(1.5, 0.4)
    grid, n = sigma_grid(1.0, 20), 160000
    samples = sample(velocity, draw(5, 1, 1, 400, 400), grid, noise, torch.Generator().manual_seed(6))
    mean, variance = propagate(velocity, 0.0, 1.0, grid.tolist(), noise)[-1]
    assert float(samples.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / n))
    assert float(samples.var()) == pytest.approx(variance, rel=4 * math.sqrt(2 / n))
    assert mean == pytest.approx(moments(0.0)[0], abs=0.05) and variance == pytest.approx(moments(0.0)[1], abs=0.05)


@pytest.mark.parametrize("off_policy", [False, True])
def test_rollout_with_noise_is_this_loop(off_policy):
    """eps from the generator, one like x per step, also when another velocity is followed; sample goes the same way."""
    net, x, grid, rng = student(), draw(0, 1, 3, 4, 4), sigma_grid(SHIFT, 4), torch.Generator().manual_seed(7)
    start, count = x, 0

    def velocity(x, sigma):
        return torch.full_like(x, sigma) if off_policy else net(x)

    for point in rollout(velocity, x, grid, None, 0.7, torch.Generator().manual_seed(7)):
        assert torch.equal(point.x, x) and point.noise == 0.7 and not point.x.requires_grad
        v = torch.full_like(x, point.sigma) if off_policy else point.v.detach()
        mean, std = transition(x, v, point.sigma, point.sigma_next, 0.7)
        x, count = mean + std * torch.randn(x.shape, generator=rng), count + 1
    assert count == 4
    assert torch.equal(sample(velocity, start, grid, 0.7, torch.Generator().manual_seed(7)), x)


def test_path_is_a_function_of_the_seed():
    net, grid = student(), sigma_grid(SHIFT, 4)

    def path(noise: float, rng: torch.Generator | None) -> torch.Tensor:
        points = rollout(lambda x, sigma: net(x), draw(0, 1, 3, 4, 4), grid, noise=noise, rng=rng)
        return torch.stack([point.x for point in points])

    one = path(0.7, torch.Generator().manual_seed(1))
    assert torch.equal(one, path(0.7, torch.Generator().manual_seed(1)))
    other, quiet = path(0.7, torch.Generator().manual_seed(2)), path(0.0, None)
    for k in range(1, 4):  # the start is shared
        assert not torch.equal(one[k], other[k]) and not torch.equal(one[k], quiet[k])
    rng = torch.Generator().manual_seed(3)
    before = rng.get_state()
    assert torch.equal(path(0.0, rng), quiet) and torch.equal(rng.get_state(), before)
    sample(lambda x, sigma: net(x), draw(0, 1, 3, 4, 4), grid, rng=rng)
    assert torch.equal(rng.get_state(), before)


@pytest.mark.parametrize("learned", [{0}, {1, 3}, {2}, {3}, set()])
def test_noisy_path_does_not_depend_on_what_is_learned(learned):
    net, grid, rngs = student(), sigma_grid(SHIFT, 4), [torch.Generator().manual_seed(8) for _ in range(2)]
    every = list(rollout(lambda x, sigma: net(x), draw(0, 1, 3, 4, 4), grid, None, 0.7, rngs[0]))
    some = list(rollout(lambda x, sigma: net(x), draw(0, 1, 3, 4, 4), grid, learned, 0.7, rngs[1]))
    assert len(some) == len(learned)
    for k, point in zip(sorted(learned), some):
        assert torch.equal(point.x, every[k].x) and point.sigma == every[k].sigma and point.noise == 0.7
    if 3 in learned:                                                    # else the walk ended earlier
        assert torch.equal(rngs[0].get_state(), rngs[1].get_state())


def test_wrong_noise_is_refused():
    x, grid, rng = draw(0), sigma_grid(SHIFT, 2), torch.Generator()
    for noise in (-0.1, math.nan, math.inf):
        for call in (lambda: transition(x, x, 0.5, 0.3, noise), lambda: sample(lambda x, _: x, x, grid, noise, rng),
                     lambda: list(rollout(lambda x, _: x, x, grid, None, noise, rng)),
                     lambda: list(rollout(lambda x, _: x, x, grid, {1}, noise, rng))):
            with pytest.raises(InputError, match=f"^--noise {noise}: .*give 0 .*or more.*$"):
                call()
    with pytest.raises(InputError, match="^--noise 0.7: no finite noise .* sigma = 1.0 to 1.0; .*--noise 0$"):
        transition(x, x, 1.0, 1.0, 0.7)
    for call in (lambda: sample(lambda x, _: x, x, grid, 0.7),
                 lambda: list(rollout(lambda x, _: x, x, grid, None, 0.7))):
        with pytest.raises(ValueError, match="rng"):
            call()
