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
    torch.testing.assert_close(variance.kl(mean, goal, 0.6), value)
    (gradient,) = torch.autograd.grad(value, mean)
    torch.testing.assert_close(variance.closed_form(mean.detach(), goal, 0.6), gradient)


def test_the_score_function_of_one_sample():
    mean, goal, eps = (torch.randn(5, generator=seeded(i)).double() for i in range(3))
    mean.requires_grad_()
    x = (mean + 0.6 * eps).detach()
    log_s, log_t = (Normal(m, 0.6).log_prob(x).sum() for m in (mean, goal))
    (expected,) = torch.autograd.grad((log_s - log_t).detach() * log_s, mean)
    torch.testing.assert_close(variance.score_function(mean.detach(), goal, 0.6, eps), expected)


def test_the_score_function_converges_to_the_closed_form():
    """mu_s = w x with one parameter w: d KL / d w = x (mu_s - mu_t) / s^2, summed over elements."""
    x, goal, w, std, g = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.7, 0.1, -1.0]), 0.4, 0.8, seeded(5)
    exact = float((x * variance.closed_form(w * x, goal, std)).sum())
    spreads = {}
    for name, baseline in (("plain", 0.0), ("baseline", variance.kl(w * x, goal, std))):
        spreads[name] = variance.Spread()
        for _ in range(4000):
            vector = variance.score_function(w * x, goal, std, torch.randn(3, generator=g), baseline)
            spreads[name].add((x * vector).sum()[None])
        error = (spreads[name].trace() / 4000) ** 0.5
        assert abs(float(spreads[name].sum) / 4000 - exact) < 4 * error and error < 0.1 * abs(exact)
    assert 0 < spreads["baseline"].trace() < spreads["plain"].trace()


def test_sums_for_the_spread():
    gradients = torch.randn(50, 7, generator=seeded(6)) + 1
    found = variance.Spread()
    for gradient in gradients:
        found.add(gradient)
    assert found.trace() == pytest.approx(float(gradients.var(0).sum()), rel=1e-5)
    assert found.norm() == pytest.approx(float(gradients.mean(0).square().sum()) - found.trace() / 50, rel=1e-5)


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
    assert all(row["KL"] > 0 for row in rows) and (tmp_path / "variance.png").stat().st_size > 1000
    assert (tmp_path / "variance.md").read_text().count("\n| ") == 2 + 4
    assert "score function" in capsys.readouterr().out
    assert variance.main([*words, "--samples", "2"]) == 0
    moved = json.loads((tmp_path / "variance.json").read_text())["rows"]
    assert moved[0]["KL"] != rows[0]["KL"] and all(row["KL"] > 0 for row in moved)
    for flag, value in (("--samples", "1"), ("--noise", "0")):
        with pytest.raises(InputError, match=f"{flag} {value}"):
            variance.main([*words, flag, value])
