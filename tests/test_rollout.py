"""Sigma grids of both backbones, Euler step and rollout against diffusers, closed forms and hand-written loops."""
import gc
import math
import weakref

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu, retrieve_timesteps
from test_flux2 import SCHEDULER as KLEIN

from model import scheduler_shift
from networks import flux2
from plumbing.files import InputError
from rollout import Point, euler, rollout, sample, sigma_grid

pytestmark = pytest.mark.quick
SHIFT = 3.0  # Turbo's
TURBO = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0,
         "use_dynamic_shifting": False}


def pipeline_scheduler(shift: float, steps: int):
    """diffusers' scheduler after ZImagePipeline has set its timesteps."""
    from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift, use_dynamic_shifting=False)
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=get_default_z_image_sigmas(steps), mu=0.7)
    return scheduler


# ------------------------------------------------------------------------------------------------------- grid
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.25])
def test_grid_equals_pipeline(shift):
    for steps in range(1, 51):
        ours = sigma_grid(scheduler_shift(TURBO | {"shift": shift}), steps)
        assert ours.dtype == torch.float32 and ours.shape == (steps + 1,)
        assert torch.equal(ours, pipeline_scheduler(shift, steps).sigmas), steps


def test_grid_of_the_model_facts():
    eight = torch.tensor([1, .9545, .9, .8333, .75, .6429, .5, .3, 0])
    assert torch.allclose(sigma_grid(SHIFT, 8), eight, atol=5e-5)
    assert torch.allclose(sigma_grid(SHIFT, 4), torch.tensor([1, .9, .75, .5, 0]))
    assert sigma_grid(SHIFT, 4)[:-1].tolist() == sigma_grid(SHIFT, 8)[:-1:2].tolist()


@pytest.mark.parametrize("steps", [0, -3])
def test_grid_needs_a_step(steps):
    with pytest.raises(InputError, match=rf"^steps = {steps}: .* 1 or more$"):
        sigma_grid(SHIFT, steps)


@pytest.mark.parametrize("key", ["use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas",
                                 "use_beta_sigmas", "invert_sigmas", "stochastic_sampling"])
def test_other_grids_are_refused(key):
    with pytest.raises(InputError, match=f"{key} = True is not supported"):
        sigma_grid(scheduler_shift(TURBO | {key: True}), 4)


def test_wrong_configs_are_refused():
    for shift in (None, 0, -1.0, "3", float("nan"), float("inf"), True):
        with pytest.raises(InputError, match="not a positive number"):
            scheduler_shift(TURBO | {"shift": shift})
    with pytest.raises(InputError, match="not a positive number"):
        scheduler_shift({})
    with pytest.raises(InputError, match="shift_terminal = 0.1"):
        scheduler_shift(TURBO | {"shift_terminal": 0.1})
    with pytest.raises(InputError, match="DDIMScheduler"):
        scheduler_shift(TURBO | {"_class_name": "DDIMScheduler"})


def grid_of(config: dict, steps: int, height: int, width: int) -> torch.Tensor:
    """Noise levels for latents of this size."""
    return sigma_grid(flux2.time_shift(config, steps, height, width), steps)


@pytest.mark.parametrize("height, width", [(256, 256), (512, 768), (1024, 1024), (1344, 576), (1040, 1056),
                                           (1056, 1056), (2048, 2048)])  # 4290 and 4356 tokens: either side of 4300
def test_grid_of_klein_is_the_pipelines(height, width):
    for steps in range(1, 51):
        scheduler, tokens = FlowMatchEulerDiscreteScheduler.from_config(KLEIN), (height // 16) * (width // 16)
        u = np.linspace(1.0, 1 / steps, steps)
        retrieve_timesteps(scheduler, steps, "cpu", sigmas=u, mu=compute_empirical_mu(tokens, steps))
        sigmas = grid_of(KLEIN, steps, height // 8, width // 8)
        assert sigmas.shape == (steps + 1,) and sigmas.dtype == torch.float32
        assert (sigmas - scheduler.sigmas).abs().max() < 1e-6
        assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_grid_of_klein_has_four_steps_at_1024_pixels():
    grid = grid_of(KLEIN, 4, 128, 128)
    assert (grid - torch.tensor([1, .967, .908, .767, 0])).abs().max() < 1e-3  # not 1, .952, .832, .0098


@pytest.mark.parametrize("change, message", [
    (dict(_class_name="EulerDiscreteScheduler"), "EulerDiscreteScheduler"), (dict(use_dynamic_shifting=False), "False"),
    (dict(time_shift_type="linear"), "linear"), (dict(shift_terminal=0.1), "0.1"), (dict(use_beta_sigmas=True), "True"),
])
def test_other_schedulers_of_klein_are_refused(change, message):
    with pytest.raises(InputError, match=f"{next(iter(change))} = {message}"):
        grid_of(KLEIN | change, 4, 128, 128)
    plain = {"_class_name": KLEIN["_class_name"], "use_dynamic_shifting": True}
    assert torch.equal(grid_of(plain, 4, 128, 128), grid_of(KLEIN, 4, 128, 128))
    with pytest.raises(InputError, match="steps = 0"):
        grid_of(plain, 0, 128, 128)


# ---------------------------------------------------------------------------------------------------- sampler
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 50])
def test_straight_flow_lands_on_x0(steps):
    generator = torch.Generator().manual_seed(steps)
    # Multiples of 1/8 and a power-of-two grid would be exact by luck; random numbers leave rounding only.
    x0, eps = torch.randn(2, 2, 3, 4, 5, generator=generator)
    landed = sample(lambda x, sigma: eps - x0, eps, sigma_grid(SHIFT, steps))
    assert landed.dtype == torch.float32
    assert torch.allclose(landed, x0, atol=2e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_straight_flow_is_exact_in_exact_arithmetic(steps):
    x0, eps = torch.randint(-8, 8, (2, 2, 3, 4, 5), generator=torch.Generator().manual_seed(0)).float()
    grid = sigma_grid(1.0, steps)  # 1, 1 - 1/n, ...: sums without rounding for powers of two
    assert torch.equal(sample(lambda x, sigma: eps - x0, eps, grid), x0)


def test_gaussian_data_converges_at_first_order():
    # Data N(m, s^2): x_sigma ~ N((1 - sigma) m, a^2), a^2 = (1 - sigma)^2 s^2 + sigma^2, and
    # v(x) = E[eps - x0 | x] = -m + (sigma - (1 - sigma) s^2) / a^2 (x - (1 - sigma) m). The ODE maps eps to m + s eps.
    m, s = 1.5, 0.4

    def velocity(x, sigma):
        a2 = (1 - sigma) ** 2 * s ** 2 + sigma ** 2
        return -m + (sigma - (1 - sigma) * s ** 2) / a2 * (x - (1 - sigma) * m)

    eps = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    errors = [float((sample(velocity, eps, sigma_grid(SHIFT, n)) - (m + s * eps)).abs().max()) for n in (40, 80, 160)]
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert errors[-1] < 0.03 and all(0.85 < order < 1.15 for order in orders), (errors, orders)


def test_sample_builds_no_graph():
    weight = torch.ones(1, requires_grad=True)
    assert not sample(lambda x, sigma: weight * x, torch.ones(1, 1, 2, 2), sigma_grid(SHIFT, 2)).requires_grad


# ---------------------------------------------------------------------------------------------------- rollout
def student(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    first, second = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 3, 3, padding=1)
    return torch.nn.Sequential(first, torch.nn.Tanh(), second)


def test_rollout_visits_the_states_of_diffusers():
    net, noise = student(), torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(2))
    scheduler, x = pipeline_scheduler(3.0, 8), noise
    scheduler.set_begin_index(0)
    points = list(rollout(lambda x, sigma: (1 + sigma) * net(x), noise, sigma_grid(SHIFT, 8)))
    assert len(points) == 8
    for point, t, sigma in zip(points, scheduler.timesteps, scheduler.sigmas):
        assert torch.equal(point.x, x) and point.sigma == float(sigma)
        x = scheduler.step(((1 + float(sigma)) * net(x)).detach(), t, x, return_dict=False)[0]
    assert points[-1].sigma_next == 0.0
    last = points[-1]
    assert torch.equal(euler(last.x, last.v.detach(), last.sigma, last.sigma_next), x)
    assert torch.equal(sample(lambda x, sigma: (1 + sigma) * net(x), noise, sigma_grid(SHIFT, 8)), x)


def test_states_are_detached_and_float32():
    net = student().double()
    noise = torch.randn(1, 3, 4, 4, requires_grad=True)
    for point in rollout(lambda x, sigma: net(x.double()), noise, sigma_grid(SHIFT, 3)):
        assert isinstance(point, Point) and isinstance(point.sigma, float)
        assert point.x.dtype == point.v.dtype == torch.float32
        assert not point.x.requires_grad and point.v.requires_grad
    with pytest.raises(AttributeError):
        point.sigma = 0.0


def test_gradient_never_crosses_steps():
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    grid = sigma_grid(SHIFT, 3)
    net = student()
    for point in rollout(lambda x, sigma: net(x), noise, grid):
        point.v.square().sum().backward()
    ours = [p.grad.clone() for p in net.parameters()]

    net.zero_grad()
    x, states = noise, []
    with torch.no_grad():
        for k in range(3):
            states.append(x)
            x = x + (grid[k + 1] - grid[k]) * net(x)
    sum(net(state).square().sum() for state in states).backward()
    for mine, parameter in zip(ours, net.parameters()):
        assert torch.allclose(mine, parameter.grad, rtol=1e-5, atol=1e-6)

    net.zero_grad()  # and the gradient through the solver is another one, so the comparison above can fail
    x, total = noise, 0.0
    for k in range(3):
        v = net(x)
        total = total + v.square().sum()
        x = x + (grid[k + 1] - grid[k]) * v
    total.backward()
    assert not torch.allclose(ours[0], next(net.parameters()).grad, rtol=1e-2)


class Saved:
    """Wraps one tensor that autograd saved, so that the living ones can be counted."""

    def __init__(self, tensor, alive):
        self.tensor = tensor
        alive.add(self)


def test_one_graph_alive():
    net, alive, before, inside = student(), weakref.WeakSet(), [], []

    def velocity(x, sigma):
        before.append(len(alive))
        v = net(x)
        inside.append(len(alive))
        return v

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: Saved(tensor, alive), lambda saved: saved.tensor):
        for point in rollout(velocity, torch.randn(1, 3, 4, 4), sigma_grid(SHIFT, 4)):
            point.v.square().mean().backward()
    assert before == [0, 0, 0, 0]
    assert inside[0] > 0 and len(set(inside)) == 1


def test_generator_keeps_no_reference():
    # A caller that skips backward (a step without loss) and drops the point must not leave a graph behind either.
    net, last, seen = student(), None, []

    def velocity(x, sigma):
        seen.append(last is None or last() is None)
        return net(x)

    points = rollout(velocity, torch.randn(1, 3, 4, 4), sigma_grid(SHIFT, 4))
    gc.disable()  # freed by reference count, not by luck of the collector
    try:
        for _ in range(4):
            point = next(points)
            last = weakref.ref(point.v)
            point = None
    finally:
        gc.enable()
    assert seen == [True] * 4


@pytest.mark.parametrize("learned", [{0}, {1, 3}, {0, 1, 2, 3}, set()])
def test_states_before_the_last_learned_one_are_walked(learned):
    net, noise, grid, graphs = student(), torch.randn(1, 3, 4, 4), sigma_grid(SHIFT, 4), []

    def velocity(x, sigma):
        graphs.append(torch.is_grad_enabled())
        return net(x)

    every = list(rollout(lambda x, sigma: net(x), noise, grid))
    some = list(rollout(velocity, noise, grid, learned))
    assert graphs == [k in learned for k in range(max(learned, default=-1) + 1)]       # and nothing after the last one
    assert len(some) == len(learned)
    for k, point in zip(sorted(learned), some):
        assert torch.equal(point.x, every[k].x) and point.sigma == every[k].sigma
