"""experiments/variance.py: the estimates against torch and on a toy, the command on a small random model."""
import json

import pytest
import torch
from conftest import fill_b, random_transformer
from torch.distributions import Normal, kl_divergence

import lora
from experiments import variance
from plumbing.files import InputError


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_closed_form_is_that_of_torch():
    mean, goal = (torch.randn(2, 3, 4, 4, generator=seeded(i)) for i in range(2))
    mean.requires_grad_()
    value = kl_divergence(Normal(mean, 0.6), Normal(goal, 0.6)).sum()
    kl, vectors = variance.estimates(mean.detach(), goal, 0.6, torch.randn(mean.shape, generator=seeded(2)))
    torch.testing.assert_close(kl, value)
    (gradient,) = torch.autograd.grad(value, mean)
    torch.testing.assert_close(vectors["closed form"], gradient)


def test_the_score_function_of_one_sample():
    mean, goal, eps = (torch.randn(5, generator=seeded(i)).double() for i in range(3))
    mean.requires_grad_()
    x = (mean + 0.6 * eps).detach()
    log_s, log_t = (Normal(m, 0.6).log_prob(x).sum() for m in (mean, goal))
    kl, vectors = variance.estimates(mean.detach(), goal, 0.6, eps)
    for name, baseline in (("score function", 0.0), ("score function with a baseline", kl)):
        (expected,) = torch.autograd.grad((log_s - log_t - baseline).detach() * log_s, mean, retain_graph=True)
        torch.testing.assert_close(vectors[name], expected)


def test_the_score_function_converges_to_the_closed_form():
    """mu_s = w x with one parameter w: d KL / d w = x (mu_s - mu_t) / s^2, summed over elements."""
    x, goal, w, std, g = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.7, 0.1, -1.0]), 0.4, 0.8, seeded(5)
    draws = [variance.estimates(w * x, goal, std, torch.randn(3, generator=g))[1] for _ in range(4000)]
    gradients = torch.tensor([[float((x * vectors[name]).sum()) for vectors in draws] for name in variance.ESTIMATES])
    traces, _ = variance.moments(gradients.double().sum(1)[:, None], gradients.double().square().sum(1), 4000)
    exact, closed, plain, baseline = float(gradients[0].mean()), *traces.tolist()
    assert closed < 1e-9
    for number, trace in ((1, plain), (2, baseline)):
        error = (trace / 4000) ** 0.5
        assert abs(float(gradients[number].mean()) - exact) < 4 * error and error < 0.1 * abs(exact)
    assert 0 < baseline < plain


def test_moments_from_sums():
    gradients = torch.randn(2, 50, 7, generator=seeded(6)) + 1
    traces, norms = variance.moments(gradients.sum(1), gradients.square().sum((1, 2)), 50)
    for found, trace, norm in zip(gradients, traces, norms):
        assert float(trace) == pytest.approx(float(found.var(0).sum()), rel=1e-5)
        assert float(norm) == pytest.approx(float(found.mean(0).square().sum()) - float(trace) / 50, rel=1e-5)


def test_states_in_turns_against_states_drawn_independently():
    """Optimizer steps of K = 3 batches on a toy, whose gradient at state k is N(mean_k, std_k)."""
    means, stds = torch.tensor([[3.0, 0.0], [1.0, 1.0], [2.0, -4.0]]).double(), torch.tensor([1.0, 0.5, 2.0]).double()
    K, count, g = 3, 200_000, seeded(7)
    norm = means.mean(0).square().sum()
    # in one rollout the states' noises are independent here, so their mean has a K-th of the mean trace
    found = variance.of_draws(2 * stds.square(), means.square().sum(1), 2 * stds.square().mean() / K, norm)
    for name, states in (("one state each, drawn independently", torch.randint(K, (count, K), generator=g)),
                         ("one state each, in turns", torch.rand(count, K, generator=g).argsort(1))):
        noise = torch.randn(count, K, 2, generator=g, dtype=torch.float64)
        steps = (means[states] + stds[states][..., None] * noise).mean(1)
        torch.testing.assert_close(steps.mean(0), means.mean(0), atol=0.02, rtol=0)         # the same expectation
        assert found[name] == pytest.approx(float(steps.var(0).sum() / norm), rel=0.02)
    assert found["one state each, in turns"] < found["one state each, drawn independently"]


def test_variance_end_to_end(checkpoint, adapter_file, tmp_path, capsys):
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"text": "a red star"}\n{"text": "a moon"}\n')
    student = tmp_path / "student.safetensors"
    lora.save(fill_b(lora.create(random_transformer(), 2, 2, seed=3), 3, scale=0.02), student)
    words = ["--lora", str(adapter_file), "--data", str(captions), "--model", str(checkpoint), "--out", str(tmp_path),
             "--student", str(student)]
    assert variance.main([*words[:-2], "--samples", "3"]) == 0
    rows = json.loads((tmp_path / "variance.json").read_text())["rows"]
    assert [row["sigma"] for row in rows] == pytest.approx([1, 0.9, 0.75, 0.5]) and rows[0]["s"] == pytest.approx(0.7)
    assert all(row["KL"] > 0 for row in rows)
    assert (tmp_path / "variance.md").read_text().count("\n| ") == 2 + 4 + 3
    draws = json.loads((tmp_path / "variance.json").read_text())["draws"]
    assert list(draws) == list(variance.DRAWS)
    assert "score function" in capsys.readouterr().out
    assert variance.main([*words, "--samples", "2"]) == 0
    moved = json.loads((tmp_path / "variance.json").read_text())["rows"]
    assert moved[0]["KL"] != rows[0]["KL"] and all(row["KL"] > 0 for row in moved)
    for flag, value in (("--samples", "1"), ("--noise", "0")):
        with pytest.raises(InputError, match=f"{flag} {value}"):
            variance.main([*words, flag, value])
