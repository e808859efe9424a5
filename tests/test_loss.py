"""Objectives against explicit formulas, finite differences and closed-form gradients."""
import itertools

import pytest
import torch

from loss import WEIGHTS, weight_of
from plumbing.files import InputError
from rollout import Point, rollout, sigma_grid, transition
from train import dopsd

pytestmark = pytest.mark.quick
SHIFT = 3.0
SHAPE = (2, 3, 4, 5)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed))


def loss_at(point: Point, v_teacher: torch.Tensor, kind: str) -> torch.Tensor:
    """The loss of `dopsd` where the student has the velocity of this point, walking from its sigma to 0."""
    (loss,) = dopsd(lambda x, sigma: point.v, lambda x, sigma: v_teacher + 0, torch.zeros(point.v.shape),
                    torch.tensor([point.sigma, point.sigma_next], dtype=torch.float64), weight_of(kind), [0],
                    noise=point.noise, rng=torch.Generator())
    return loss


def point_at(sigma: float, v: torch.Tensor, noise: float = 0.0, sigma_next: float | None = None) -> Point:
    return Point(draw(0), sigma, sigma / 2 if sigma_next is None else sigma_next, v, noise)


def definition(kind: str, point: Point, v: torch.Tensor, v_teacher: torch.Tensor) -> torch.Tensor:
    """Each objective as its paper or code writes it, in float64, mean over elements; x is of the shape of v."""
    x, v_teacher = draw(0, *v.shape).double(), v_teacher.double()
    if kind == "v":
        return (v - v_teacher).square().mean()
    if kind == "x0":
        return ((x - point.sigma * v) - (x - point.sigma * v_teacher)).square().mean()
    mine, std = transition(x, v, point.sigma, point.sigma_next, point.noise)
    goal, _ = transition(x, v_teacher, point.sigma, point.sigma_next, point.noise)
    if point.noise == 0:
        return (mine - goal).square().mean() / 2
    Normal = torch.distributions.Normal
    return torch.distributions.kl_divergence(Normal(mine, std), Normal(goal, std)).mean()


@pytest.mark.parametrize("sigma", [1.0, 0.9, 0.3])
def test_values(sigma):
    point, v_teacher = point_at(sigma, draw(1)), draw(2)
    pairs = zip(draw(1).flatten().tolist(), v_teacher.flatten().tolist())
    explicit = sum((s - t) ** 2 for s, t in pairs) / v_teacher.numel()
    assert float(loss_at(point, v_teacher, "v")) == pytest.approx(explicit, rel=1e-5)
    x0_student, x0_teacher = point.x - sigma * point.v, point.x - sigma * v_teacher
    explicit = torch.nn.functional.mse_loss(x0_student, x0_teacher)
    assert float(loss_at(point, v_teacher, "x0")) == pytest.approx(float(explicit), rel=1e-5)


@pytest.mark.parametrize("kind, noise", [("v", 0.0), ("x0", 0.0), ("kl", 0.0), ("kl", 0.7)])
def test_gradient(kind, noise):
    sigma, v, v_teacher = 0.75, draw(3, 1, 1, 2, 3).requires_grad_(), draw(4, 1, 1, 2, 3)
    point = point_at(sigma, v, noise)
    loss_at(point, v_teacher, kind).backward()
    ode = 0.375 ** 2 / 2
    sde = 1.245 ** 2 * 0.375 * 0.25 / (2 * 0.49 * 0.75)
    weight = {("v", 0.0): 1.0, ("x0", 0.0): sigma ** 2, ("kl", 0.0): ode, ("kl", 0.7): sde}[kind, noise]
    closed = 2 * weight * (v.detach() - v_teacher) / v.numel()
    assert torch.allclose(v.grad, closed, rtol=1e-5, atol=1e-8)

    def reference(v64: torch.Tensor) -> float:
        return float(definition(kind, point, v64, v_teacher))

    step = 1e-5
    for i in range(v.numel()):
        nudge = torch.zeros(v.numel(), dtype=torch.float64)
        nudge[i] = step
        nudge = nudge.view_as(v)
        numeric = (reference(v.detach().double() + nudge) - reference(v.detach().double() - nudge)) / (2 * step)
        assert float(v.grad.flatten()[i]) == pytest.approx(numeric, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("sigma, following", [(1.0, 0.9), (1.0, 0.5), (0.9, 0.75), (0.5, 0.3), (0.3, 0.0)])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.7, 1.2])
@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_every_weight_is_half_the_curvature_of_its_definition(kind, noise, sigma, following):
    """Value and second derivative in v_s; for kl the definition is torch's KL of the two Normals of the transition."""
    v, v_teacher = draw(1), draw(2)
    point = point_at(sigma, v, noise, following)
    expected = definition(kind, point, v.double(), v_teacher)
    assert float(loss_at(point, v_teacher, kind)) == pytest.approx(float(expected), rel=1e-5)
    one = torch.tensor([0.3], dtype=torch.float64)
    curvature = torch.autograd.functional.hessian(lambda v: definition(kind, point, v, torch.tensor([0.8])), one)
    assert WEIGHTS[kind](point) == pytest.approx(float(curvature) / 2, rel=1e-9)


@pytest.mark.parametrize("noise", [0.1, 0.7, 1.2])
def test_kl_closed_forms(noise):
    """The table of loss.py's docstring."""
    for sigma, following in ((0.9, 0.75), (0.5, 0.3), (0.3, 0.0)):
        closed = (1 + noise ** 2 / 2) ** 2 * (sigma - following) * (1 - sigma) / (2 * noise ** 2 * sigma)
        assert WEIGHTS["kl"](point_at(sigma, draw(1), noise, following)) == pytest.approx(closed, rel=1e-12)
    for following in (0.9, 0.5, 0.0):
        closed = (1 - following) ** 2 / (2 * noise ** 2)
        assert WEIGHTS["kl"](point_at(1.0, draw(1), noise, following)) == pytest.approx(closed, rel=1e-12)


def test_kl_of_the_ode_is_no_limit():
    """With little noise the KL grows like 1 / a^2; without, it is the surrogate d^2 / 2."""
    weights = [WEIGHTS["kl"](point_at(0.5, draw(1), a)) for a in (1e-3, 1e-4, 0.0)]
    assert weights[1] / weights[0] == pytest.approx(100, rel=1e-4)
    assert weights[2] == 0.25 ** 2 / 2


@pytest.mark.parametrize("sigma, following", [(1.0, 1.0), (0.5, 0.5)])
def test_kl_needs_a_density(sigma, following):
    with pytest.raises(InputError) as error:
        loss_at(point_at(sigma, draw(1), 0.7, following), draw(2), "kl")
    message = str(error.value)
    assert message.startswith(f"--loss kl: the step from sigma = {sigma} to {following} ") and "\n" not in message
    assert message.endswith("use --noise 0 or another --loss")
    assert float(loss_at(point_at(sigma, draw(1), 0.0, following), draw(2), "kl")) == 0.0
    with pytest.raises(InputError, match="^--noise -1.0: "):
        loss_at(point_at(0.5, draw(1), -1.0), draw(2), "kl")


@pytest.mark.parametrize("noise", [0.0, 0.7])
@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_subsets_of_states_average_to_the_full_mean(kind, noise):
    """Over all subsets of one size, each walked by itself, the mean of the learned states' losses is that of all."""
    student, steps = torch.nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False), 4

    def mean_loss(learned: set[int]) -> float:
        points = rollout(lambda x, _: student(x), draw(9), sigma_grid(SHIFT, steps), learned, noise,
                         torch.Generator().manual_seed(1))
        return sum(float(loss_at(point, point.x.tanh(), kind)) for point in points) / len(learned)

    full = mean_loss(set(range(steps)))
    for size in range(1, steps):
        losses = [mean_loss(set(subset)) for subset in itertools.combinations(range(steps), size)]
        assert max(losses) > 1.01 * min(losses)  # else the average would prove nothing
        assert sum(losses) / len(losses) == pytest.approx(full, rel=1e-5)


@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_teacher_gets_no_gradient(kind):
    v, v_teacher = draw(5).requires_grad_(), draw(6).requires_grad_()
    loss_at(point_at(0.5, v), v_teacher, kind).backward()
    assert v.grad is not None and v_teacher.grad is None


def test_low_precision_inputs_are_computed_in_float32():
    v, v_teacher = draw(7).bfloat16(), draw(8).bfloat16()
    for kind in WEIGHTS:
        loss = loss_at(point_at(0.3, v), v_teacher, kind)
        assert loss.dtype == torch.float32 and loss.shape == ()
        assert torch.equal(loss, loss_at(point_at(0.3, v.float()), v_teacher.float(), kind))
    # bfloat16 arithmetic would lose this: 1 + 2^-10 is not a bfloat16 number, the difference of two float32 is 2^-10
    small = loss_at(point_at(1.0, torch.full(SHAPE, 1 + 2 ** -10)), torch.ones(SHAPE).bfloat16(), "v")
    assert float(small) == 2 ** -20


def test_unknown_objective():
    with pytest.raises(InputError, match="^--loss huber: no such objective; choose one of v, x0, kl$"):
        loss_at(point_at(0.5, draw(1)), draw(2), "huber")


def test_a_new_objective_is_one_entry(monkeypatch):
    monkeypatch.setitem(WEIGHTS, "late", lambda point: 3 * (1 - point.sigma_next))
    for sigma, following in ((1.0, 0.9), (0.5, 0.3)):
        point, v_teacher = point_at(sigma, draw(1), 0.0, following), draw(2)
        ratio = float(loss_at(point, v_teacher, "late")) / float(loss_at(point, v_teacher, "v"))
        assert ratio == pytest.approx(3 * (1 - following), rel=1e-5)
    with pytest.raises(InputError, match="choose one of v, x0, kl, late$"):
        weight_of("later")


@pytest.mark.parametrize("kind", list(WEIGHTS))
def test_backward_per_step_equals_one_backward(kind):
    def nets() -> tuple[torch.nn.Module, torch.nn.Module]:
        torch.manual_seed(0)
        return torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)

    student, teacher = nets()
    grid = sigma_grid(SHIFT, 4)
    for loss in dopsd(lambda x, sigma: student(x), lambda x, sigma: teacher(x), draw(9), grid, weight_of(kind),
                      range(4)):
        loss.backward()
    per_step = [parameter.grad for parameter in student.parameters()]

    student, teacher = nets()
    points = list(rollout(lambda x, sigma: student(x), draw(9), grid))
    torch.stack([loss_at(point, teacher(point.x), kind) for point in points]).mean().backward()
    for ours, parameter in zip(per_step, student.parameters()):
        assert torch.allclose(ours, parameter.grad, rtol=1e-5, atol=1e-7)
