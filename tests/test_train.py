"""train.py: each number of a run against an independent computation, and what a run leaves behind."""
import gc
import inspect
import itertools
import json
import math
import shutil
import weakref
from collections import Counter
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCHEDULER, fill_b, largest_difference, learn, metrics, random_transformer, write_pictures
from diffusers import ZImageTransformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from test_model import their_velocity
from test_sample import pixels
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

import data
import lora
import model as zimage
import sample
import train
from benchmarks.live import Grid
from loss import weight_of
from networks import vae
from plumbing import encoder_files, lora_files, recipes
from plumbing.backbone import Backbone
from plumbing.options import parse
from plumbing.team import ALONE
from rollout import sigma_grid

STATE = "state.safetensors"
FILES = ("student.safetensors", "teacher.safetensors", STATE)


def noise_of(batch: data.Batch, seed: int, number: int) -> torch.Tensor:
    return torch.randn(batch.latents.shape, generator=data.generator(seed, "noise", number))


def equation_7(student, teacher, batch, x, steps: int, kind: str) -> torch.Tensor:
    """The loss as one graph through all states, which are constants. student, teacher: (x, sigma, context) -> v."""
    sigmas, terms = sigma_grid(SCHEDULER["shift"], steps).tolist(), []
    for sigma, following in zip(sigmas, sigmas[1:]):
        v, goal = student(x, sigma, batch.student_context), teacher(x, sigma, batch.teacher_context).detach()
        a, b = (v, goal) if kind == "v" else (x - sigma * v, x - sigma * goal)
        terms.append(((a - b) ** 2).mean())
        x = (x + (following - sigma) * v).detach()
    return sum(terms) / len(terms)


def with_adapter(model, adapter):
    return lambda x, sigma, context: model.velocity(x, sigma, context, adapter)


# ---------------------------------------------------------------------------------------------------- the objective
@pytest.mark.parametrize("kind, accumulate, steps", [("v", 1, 2), ("x0", 1, 4), ("v", 3, 1), ("x0", 2, 2)])
def test_first_loss_is_equation_7(run, prepare, kind, accumulate, steps):
    flags = ("--loss", kind, "--accumulate", accumulate, "--rollout-steps", steps, "--steps", 1, "--seed", 4)
    parts, losses = prepare(*flags), []
    for number in range(accumulate):
        batch = parts.dataset.batch(number)
        losses.append(equation_7(with_adapter(parts.model, None), with_adapter(parts.model, None), batch,
                                 noise_of(batch, 4, number), steps, kind))            # B = 0: both are the base model
    assert metrics(run("real", *flags))[0]["loss"] == pytest.approx(sum(losses).item() / accumulate, rel=1e-5)
    assert losses[0].item() > 1e-3


@pytest.mark.quick
@pytest.mark.parametrize("checkpointing", ["--no-checkpointing", "--checkpointing"])
@pytest.mark.parametrize("kind", ["v", "x0"])
def test_gradient_is_that_of_one_graph_through_all_states(prepare, kind, checkpointing):
    parts = prepare("--rollout-steps", 4, "--loss", kind, checkpointing)
    assert parts.model.checkpointing == (checkpointing == "--checkpointing")
    student, teacher = fill_b(parts.run.tuned.theta, seed=1), fill_b(parts.run.tuned.theta_bar, seed=2)
    batch = parts.dataset.batch(0)
    value = learn(parts)
    parts.model.checkpointing = False
    whole = equation_7(with_adapter(parts.model, student), with_adapter(parts.model, teacher), batch,
                       noise_of(batch, 0, 0), 4, kind)
    expected = torch.autograd.grad(whole, student.parameters())
    assert value == pytest.approx(whole.item(), rel=1e-5)
    for tensor, gradient in zip(student.parameters(), expected):
        assert torch.allclose(tensor.grad, gradient, rtol=1e-4, atol=1e-6) and gradient.abs().max() > 1e-4
    assert all(not tensor.requires_grad and tensor.grad is None for tensor in teacher.parameters())
    assert all(not weight.requires_grad and weight.grad is None for weight in parts.model.parameters())


def test_gradient_is_that_of_diffusers_and_peft(prepare, checkpoint):
    parts = prepare()
    adapters = {"student": fill_b(parts.run.tuned.theta, seed=1), "teacher": fill_b(parts.run.tuned.theta_bar, seed=2)}
    config = LoraConfig(r=3, lora_alpha=6, target_modules=list(zimage.LORA_TARGETS))
    theirs = ZImageTransformer2DModel.from_pretrained(checkpoint / "transformer").requires_grad_(False)
    theirs = get_peft_model(theirs, config, adapter_name="student")
    theirs.add_adapter("teacher", config)
    layers = {name: (theirs.base_model.model.get_submodule(name), pair)
              for name, pair in adapters["student"].weights.items()}
    for side, adapter in adapters.items():
        for name, (layer, _) in layers.items():
            layer.lora_A[side].weight.data.copy_(adapter.weights[name][0])
            layer.lora_B[side].weight.data.copy_(adapter.weights[name][1])

    def velocity(side: str):
        def call(x, sigma, context):
            theirs.set_adapter(side)
            return their_velocity(theirs, x, sigma, context)
        return call

    batch = parts.dataset.batch(0)
    value = learn(parts)
    whole = equation_7(velocity("student"), velocity("teacher"), batch, noise_of(batch, 0, 0), 2, "v")
    theirs.set_adapter("student")
    whole.backward()
    assert value == pytest.approx(whole.item(), rel=1e-4)
    for name, (layer, (A, B)) in layers.items():
        assert torch.allclose(A.grad, layer.lora_A["student"].weight.grad, rtol=1e-3, atol=1e-5), name
        assert torch.allclose(B.grad, layer.lora_B["student"].weight.grad, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("grad_states", [1, 2, 3])
def test_learned_states_are_unbiased(filled, grad_states):
    """A loss is the mean over a subset of the states; over all subsets these average to Eq. 7, and all are drawn."""
    parts = filled("--rollout-steps", 3, "--grad-states", grad_states)
    sigmas, batch = sigma_grid(SCHEDULER["shift"], 3), parts.batch
    terms, x = [], noise_of(batch, 0, 0)
    for sigma, following in zip(sigmas.tolist(), sigmas.tolist()[1:]):
        v = parts.model.velocity(x, sigma, batch.student_context, parts.run.tuned.theta)
        goal = parts.model.velocity(x, sigma, batch.teacher_context, parts.run.tuned.theta_bar).detach()
        terms.append(((v - goal) ** 2).mean())
        x = (x + (following - sigma) * v).detach()
    subsets = [set(s) for s in itertools.combinations(range(3), grad_states)]
    means = [sum(terms[k] for k in subset).item() / grad_states for subset in subsets]
    assert sum(means) / len(means) == pytest.approx(sum(terms).item() / 3, rel=1e-5)
    seen = set()
    for number in range(24):                                                        # the states alone differ
        value = learn(parts, learned=train.draw_states(3, grad_states, number, seed=0))
        drawn = [i for i, mean in enumerate(means) if value == pytest.approx(mean, rel=1e-4)]
        assert len(drawn) == 1
        seen |= set(drawn)
    assert seen == set(range(len(subsets)))


@pytest.mark.parametrize("K, n", [(4, 1), (4, 2), (4, 3), (4, 4), (8, 3), (5, 2)])
def test_learned_states_are_stratified(K, n):
    """Over K / gcd(n, K) batches in a row every state is learned equally often, none twice in a batch; over many turns
    every state and every pair of neighbouring batches is as likely as any other."""
    turn = K // math.gcd(n, K)
    drawn = [train.draw_states(K, n, number, seed=3) for number in range(400 * turn)]
    assert all(len(set(states)) == n and set(states) <= set(range(K)) for states in drawn)
    for start in range(0, len(drawn), turn):
        counts = Counter(k for states in drawn[start:start + turn] for k in states)
        assert set(counts.values()) == {n * turn // K} and len(counts) == K
    for position in range(turn):                                                    # unbiased at each place of a turn
        share = Counter(k for states in drawn[position::turn] for k in states)
        assert all(share[k] / 400 == pytest.approx(n / K, abs=0.1) for k in range(K))
    assert drawn[:turn] == [train.draw_states(K, n, number, seed=3) for number in range(turn)]
    others = [[train.draw_states(K, n, number, *where) for number in range(20 * turn)] for where in ((4,), (3, 1))]
    assert n == K or all(other != drawn[:20 * turn] for other in others)


@pytest.mark.parametrize("teacher, equal", [("copy", "student"), ("base", "start"), ("ema", None)])
def test_teachers(run, prepare, teacher, equal):
    start = {name: tensor.detach().clone() for name, tensor in prepare().run.tuned.theta.tensors().items()}
    state = load_file(run("real", "--steps", 2, "--teacher", teacher) / STATE)
    same = {"student": all(torch.equal(state[f"teacher.{name}"], state[f"student.{name}"]) for name in start),
            "start": all(torch.equal(state[f"teacher.{name}"], tensor) for name, tensor in start.items())}
    assert [name for name, is_same in same.items() if is_same] == ([equal] if equal else [])


@pytest.mark.quick
@pytest.mark.parametrize("method", list(train.METHODS))
def test_needs_are_the_parameters_and_bind_gives_them(method):
    needs, parameters = train.METHODS[method].needs, list(inspect.signature(train.METHODS[method].losses).parameters)
    assert parameters[0] == "student" and len(parameters) == len(set(parameters)) == 3 + len(needs)
    assert set(parameters) == {"student", "x", "sigmas", *needs}
    cfg = recipes.fill(parse(train.Options, ["--data", "photos", "--method", method], ""), recipes.SMALL)
    context = zimage.Context(torch.zeros(2, 128))
    batch = data.Batch(torch.ones(1, 8, 4, 4), [context], [context], ["a star"], [0])
    task = train.Task("photos", SimpleNamespace(batch=lambda number: batch), None)
    given = train.bind(cfg, lora.Tuned(random_transformer(), 1, 1, 0), task, 0, lambda *_: 3.0)
    assert set(parameters) <= given.keys()
    losses = list(train.METHODS[method](**given))
    assert len(losses) == (cfg.grad_states if "learned" in needs else 1)
    assert all(loss.shape == () and loss.requires_grad for loss in losses)


@pytest.mark.quick
@pytest.mark.parametrize("method", [name for name in train.METHODS if name != "dreambooth"])     # see test_baselines.py
def test_every_method_trains_and_resumes(run, method):
    whole = run("whole", "--method", method, "--steps", 3)
    run("parts", "--method", method, "--steps", 1)
    parts = run("parts", "--method", method, "--steps", 3, "--resume")
    assert metrics(whole) == metrics(parts)
    assert (whole / "teacher.safetensors").exists() == train.METHODS[method].has_teacher


# ---------------------------------------------------------------------------------------------------- the update
def norm_of(gradients) -> float:
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item()


@pytest.mark.quick
@pytest.mark.parametrize("accumulate", [1, 2])
def test_first_update_is_clipped_adam_on_the_mean(run, prepare, accumulate):
    flags = ("--accumulate", accumulate, "--alpha", 60)                              # so large that it is clipped
    parts, losses = prepare(*flags), []
    before = {name: tensor.detach().clone() for name, tensor in parts.run.tuned.theta.tensors().items()}
    for number in range(accumulate):
        batch = parts.dataset.batch(number)
        student, teacher = (with_adapter(parts.model, adapter) for adapter in (parts.run.tuned.theta, None))
        losses.append(equation_7(student, teacher, batch, noise_of(batch, 0, number), 2, "v"))
    gradients = torch.autograd.grad(sum(losses) / accumulate, parts.run.tuned.theta.parameters())
    norm = norm_of(gradients)
    out = run("real", "--steps", 1, *flags)
    assert metrics(out)[0]["gradient_norm"] == pytest.approx(norm, rel=1e-4) and norm > 1
    after = load_file(out / STATE)
    for name, gradient in zip(before, gradients, strict=True):
        clipped = gradient / norm
        expected = before[name] - 1e-2 * clipped / (clipped.abs() + 1e-8)            # Adam's first step, no decay
        large = clipped.abs() > 1e-5                                                 # else rounding decides
        assert torch.allclose(after[f"student.{name}"][large], expected[large], atol=1e-5), name
    moved = [name for name in before if not torch.equal(before[name], after[f"student.{name}"])]
    assert moved and all(name.endswith(".B") for name in moved)                      # B = 0 leaves A without gradient


def test_teacher_is_the_closed_form_of_the_students(run, prepare):
    first = {name: tensor.detach().clone() for name, tensor in prepare().run.tuned.theta.tensors().items()}
    states = [load_file(run(f"steps{n}", "--steps", n) / STATE) for n in (1, 2, 3, 4)]
    for name, start in first.items():
        students = [state[f"student.{name}"].double() for state in states]
        for n in (1, 2, 3, 4):
            expected = 0.7 ** n * start.double()
            expected += sum(0.3 * 0.7 ** (n - i) * students[i - 1] for i in range(1, n + 1))
            assert torch.allclose(states[n - 1][f"teacher.{name}"].double(), expected, atol=1e-7), (name, n)
    assert largest_difference(states[2], states[3]) > 1e-3


@pytest.mark.parametrize("ema, equal", [(0, "student"), (1, "start")])
def test_ends_of_the_ema_range(run, prepare, ema, equal):
    start = {name: tensor.detach().clone() for name, tensor in prepare().run.tuned.theta.tensors().items()}
    state = load_file(run("real", "--steps", 2, "--ema", ema) / STATE)
    for name, tensor in start.items():
        assert torch.equal(state[f"teacher.{name}"], tensor if equal == "start" else state[f"student.{name}"])


def test_training_lowers_the_loss(run):
    losses = [line["loss"] for line in metrics(run("long", "--steps", 20, "--ema", 1, "--batch-size", 3))]
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])


def test_checkpointing_changes_no_number(run):
    plain, recomputed = run("plain", "--steps", 3), run("recomputed", "--steps", 3, "--checkpointing")
    for a, b in zip(metrics(plain), metrics(recomputed), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


# ---------------------------------------------------------------------------------------------------- files
@pytest.mark.quick
def test_what_a_run_leaves_behind(run, capsys, checkpoint):
    out = run("name", "--steps", 3, "--sample-every", 2, "--seed", 8)
    assert {path.name for path in out.iterdir()} == {*FILES, "config.json", "metrics.jsonl", "samples", ".lock",
                                                     "report.html"}
    steps = [f"step_{n:06d}.png" for n in (0, 2, 3)]
    assert sorted(path.name for path in (out / "samples").iterdir()) == steps
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all({"seconds", "loss", "gradient_norm"} <= line.keys() for line in lines)
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    config = json.loads((out / "config.json").read_text())
    assert config["options"]["seed"] == 8 and config["options"]["ema"] == 0.7 and config["options"]["loss"] == "v"
    assert config["versions"]["torch"] == version("torch") and "commit" in config
    with safe_open(str(out / "student.safetensors"), "pt") as file:
        assert all(key.startswith("transformer.") and ".lora_" in key for key in file.keys())
    shown = capsys.readouterr().out
    for word in (str(checkpoint), "cpu", "float32", "embedded model", "3 of 32x32", "0 -> 3", "LoRA parameters"):
        assert word in shown
    net = zimage.Z_IMAGE.load(checkpoint, "cpu", torch.float32)
    state = load_file(out / STATE)
    for side in ("student", "teacher"):
        merged = lora_files.load(out / f"{side}.safetensors", net)
        for name, (A, B) in merged.weights.items():
            assert torch.equal(A, state[f"{side}.{name}.A"])
            assert torch.allclose(B, 2 * state[f"{side}.{name}.B"])                  # alpha / rank is 2


def test_sft_needs_no_vlm_and_writes_no_teacher(run, copied):
    shutil.rmtree(copied / "vlm")
    out = run("sft", "--method", "sft", "--steps", 2, "--model", copied, "--sample-every", 2)
    assert not (out / "teacher.safetensors").exists()
    assert (out / "student.safetensors").is_file() and (out / STATE).is_file()
    assert pixels(out / "samples" / "step_000002.png").shape[1] == 190 + 3 * 166     # no teacher column


def test_out_defaults_to_the_name_of_the_data(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*base, "--steps", "1"]) == 0
    assert (tmp_path / "out" / "photos" / STATE).is_file()


def test_buckets_of_several_shapes(run, tmp_path, capsys):
    mixed = write_pictures(tmp_path / "mixed", [(40, 40), (80, 40), (40, 40), (40, 80), (80, 40)])
    out = run("mixed_run", "--data", mixed, "--steps", 5, "--sample-every", 5)
    assert len(metrics(out)) == 5 and (out / "samples" / "step_000005.png").is_file()
    shown = capsys.readouterr().out
    assert "2 of 32x32" in shown and "2 of 40x24" in shown and "1 of 24x40" in shown


# ---------------------------------------------------------------------------------------------------- memory
class Ledger:
    """How many bytes autograd holds for the backward pass, now and at most; weights, which it only refers to, aside."""

    def __init__(self, weights):
        self.held, self.peak, self.before, self.weights = 0, 0, [], {weight.data_ptr() for weight in weights}
        ledger = self

        class Entry:
            def __init__(self, tensor):
                self.tensor, self.size = tensor, 0 if tensor.data_ptr() in ledger.weights else tensor.nbytes
                ledger.held += self.size
                ledger.peak = max(ledger.peak, ledger.held)

            def __del__(self):
                ledger.held -= self.size

        self.hooks = torch.autograd.graph.saved_tensors_hooks(Entry, lambda entry: entry.tensor)


@pytest.mark.quick
@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("method", ["dopsd", "off-policy"])
def test_one_graph_alive_in_a_whole_step(monkeypatch, method, at_once):
    """On a transformer with a LoRA: K = 4 states hold as much as one; four graphs, four times."""
    model = random_transformer().requires_grad_(False)
    tuned = lora.Tuned(model, rank=2, alpha=2, seed=0)
    fill_b(tuned.theta, seed=1), fill_b(tuned.theta_bar, seed=2)
    draw = torch.Generator().manual_seed(3)
    context, x = [zimage.Context(torch.randn(8, 128, generator=draw))], torch.randn(1, 8, 8, 8, generator=draw)

    def peak(K: int) -> int:
        ledger, student = Ledger([*model.parameters(), *tuned.theta.parameters()]), tuned.student(context)

        def velocity(x, sigma):
            ledger.before.append(ledger.held)
            return student(x, sigma)

        given = dict(student=velocity, teacher=tuned.teacher(context), x=x, sigmas=sigma_grid(SCHEDULER["shift"], K),
                     weight=lambda point: 1.0, learned=range(K), noise=0.0, rng=torch.Generator())
        with ledger.hooks:
            if at_once:
                sum(train.METHODS[method](**given)).backward()
            else:
                monkeypatch.setattr(train, "bind", lambda *_: given)
                cfg = SimpleNamespace(accumulate=1, method=method)
                run = SimpleNamespace(step=0, tuned=tuned, team=ALONE)
                train.gradient_of_step(cfg, run, [train.Task("a", None, None, method=train.METHODS[method])], None)
        assert ledger.held == 0 and len(ledger.before) == K
        assert any(ledger.before) == (at_once and K > 1)                    # before a forward pass nothing is held
        return ledger.peak

    ratio = peak(4) / peak(1)
    assert 3.8 < ratio < 4.2 if at_once else 0.95 < ratio < 1.05


@pytest.mark.quick
@pytest.mark.parametrize("method", ["dopsd", "off-policy"])
def test_the_gradient_does_not_wait_for_the_gpu(monkeypatch, method):
    """Fake tensors have no numbers: whoever asks for one, which on a GPU means to wait, fails."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        tuned = lora.Tuned(random_transformer().requires_grad_(False), rank=2, alpha=2, seed=0)
        context = [zimage.Context(torch.randn(length, 128)) for length in (8, 40)]
        given = dict(student=tuned.student(context), teacher=tuned.teacher(context), x=torch.randn(2, 8, 8, 8),
                     sigmas=Grid([1.0, 0.9, 0.75, 0.5, 0.0]), weight=weight_of("x0"), learned=[0, 2], noise=0.0,
                     rng=None)
        monkeypatch.setattr(train, "bind", lambda *_: given)
        tasks = [train.Task(name, None, None, method=train.METHODS[method]) for name in "ab"]
        run = SimpleNamespace(step=0, tuned=tuned, team=ALONE)
        losses = train.gradient_of_step(SimpleNamespace(accumulate=2), run, tasks, None)
        assert all(tensor.grad is not None for tensor in tuned.theta.parameters())
        with pytest.raises(DataDependentOutputException):
            losses["a"].item()


def test_models_are_freed_before_the_transformer_comes(run, tmp_path, monkeypatch):
    alive = []

    def watched(module, pick):
        load = module.load

        def wrapper(*args, **kwargs):
            gc.collect()
            assert all(ref() is None for ref in alive), "two models at once"
            found = load(*args, **kwargs)
            alive.extend(weakref.ref(part) for part in pick(found))
            return found
        monkeypatch.setattr(module, "load", wrapper)

    watched(vae, lambda found: [found])
    watched(encoder_files, lambda found: [found.text, found.vlm, found])
    watched(Backbone, lambda found: [])
    run("real", "--steps", 1, "--cache", tmp_path / "new")
    assert len(alive) == 4


def test_second_start_loads_neither_vae_nor_encoder(run, tmp_path, monkeypatch):
    cache = ("--steps", 1, "--cache", tmp_path / "new")
    first = run("first", *cache)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "new").iterdir()}

    def refuse(*_, **__):
        raise AssertionError("loaded again")

    monkeypatch.setattr(vae, "load", refuse)
    monkeypatch.setattr(encoder_files, "load", refuse)
    second = run("second", *cache)
    assert metrics(first) == metrics(second)
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "new").iterdir()}


@pytest.mark.parametrize("folder", ["photos.v1", "photos"])
def test_default_out_is_named_after_the_data(base, photos, tmp_path, monkeypatch, folder):
    shutil.copytree(photos, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    assert train.main([*base[2:], "--data", folder, "--steps", "1"]) == 0
    assert (tmp_path / "out" / folder / STATE).is_file()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_trains_resumes_and_samples(run, checkpoint, tmp_path):
    flags = ("--device", "cuda", "--checkpointing", "--sample-every", 2)
    out = run("gpu", "--steps", 2, *flags)
    run("gpu", "--steps", 3, "--resume", *flags)
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]
    sample.main(["--prompt", "a red star", "--model", str(checkpoint), "--device", "cuda", "--height", "32", "--width",
                 "32", "--lora", str(out / "student.safetensors"), "--out", str(tmp_path / "picture.png")])
