"""The simulation of a step at real sizes against closed forms; the formula of `check_memory` against the simulation."""
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks import official, real_size
from benchmarks.live import GIB, Grid, Live, fused_norms
from benchmarks.real_size import BACKBONES, KLEIN_4B, PADDED, PROMPT, Z_CONFIG, Options, Program, simulate
from plumbing import machine

BF16, CPU = torch.bfloat16, torch.device("cpu")
Z_TINY = Z_CONFIG | {"dim": 96, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 24,
                     "axes_dims": [16, 16, 16]}
KLEIN_TINY = KLEIN_4B | {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
                         "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": [4, 4, 4, 4]}
TINY = {"zimage": Z_TINY, "klein-4b": KLEIN_TINY}


def test_live_storages_and_flop_of_a_product():
    """(3, 5) @ (5, 7) = 2 * 3 * 5 * 7 FLOP; views count once, what is dropped counts no more."""
    with FakeTensorMode(), Live() as live:
        a, b = torch.empty(3, 5), torch.empty(5, 7, dtype=BF16).float()
        assert live.now == 4 * (3 * 5 + 5 * 7) and live.peak == live.now + 2 * 5 * 7
        c = (a @ b).T.reshape(-1)[1:]
        assert live.flop == 2 * 3 * 5 * 7 and live.now >= 4 * (3 * 5 + 5 * 7 + 3 * 7)
        del a, b, c
        assert live.now == 0


def test_attention_counts_and_is_not_kept_as_a_square():
    """Forward two products of N^2 D per head, backward five; nothing of N^2 is kept."""
    N, D, heads = 64, 16, 3
    with FakeTensorMode(), Live() as live:
        q = torch.empty(1, heads, N, D, requires_grad=True)
        y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        assert live.flop == 2 * 2 * heads * N * N * D and live.now < 4 * heads * N * N
        y.sum().backward()
    assert live.flop == 7 * 2 * heads * N * N * D


def test_what_was_resized_counts_as_it_is():
    """So FSDP2 frees a block: its storage stays and is empty."""
    with FakeTensorMode(), Live() as live:
        a = torch.empty(6)
        live.resize(a.untyped_storage(), 0)
        assert live.now == 0 and live.peak == 24
        live.resize(a.untyped_storage(), 24)
        del a
        assert live.now == 0 and live.peak == 24


def test_shared_weights_are_shared(monkeypatch):
    """20 bytes a weight over the processes, 2 more for the untuned model, and what a step adds to that."""
    monkeypatch.setitem(BACKBONES, "klein-4b", (BACKBONES["klein-4b"][0], KLEIN_TINY))
    cfg = Options(backbone="klein-4b", size=128, checkpointing=True)
    model = real_size.skeleton(cfg, KLEIN_TINY, released=False)
    weights = sum(parameter.numel() for parameter in model.parameters()) / GIB
    alone, _ = real_size.of_one(cfg, KLEIN_TINY, 1, keeps=False)
    shared, peak = real_size.of_one(cfg, KLEIN_TINY, 2, keeps=True)
    assert alone - shared == pytest.approx((20 - 22 / 2) * weights, rel=0.01)
    assert alone > 20 * weights and peak > shared + weights
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("backbone, layers, options", [
    ("zimage", {"n_layers": 2, "n_refiner_layers": 1}, {}),
    ("zimage", {"n_layers": 2, "n_refiner_layers": 1}, {"size": 768, "rank": 16, "quantize": "int8"}),
    ("zimage", {"n_layers": 4, "n_refiner_layers": 0}, {"size": 512, "checkpointing": False, "batch_size": 2}),
    ("klein-4b", {"num_layers": 1, "num_single_layers": 2}, {}),
    ("klein-4b", {"num_layers": 1, "num_single_layers": 3}, {"size": 512, "checkpointing": False}),
    ("klein-4b", {"num_layers": 1, "num_single_layers": 1}, {"size": 768, "rank": 16, "quantize": "int8"}),
])
def test_the_formula_of_check_memory_is_that_of_the_simulation(backbone, layers, options, monkeypatch):
    """At the true width, with few blocks, where what it does not know weighs most: within 10 %."""
    text, context = (PROMPT, "vlm") if backbone == "zimage" else (PADDED, "reference")
    monkeypatch.setattr(machine, "TEXT", text)                          # of the simulation's prompt
    monkeypatch.setattr(machine, "pixels_per_patch", lambda folder: 16)
    cfg = dataclasses.replace(Options(backbone=backbone, checkpointing=True, grad_states=1), **options)
    config = BACKBONES[backbone][1] | layers
    with FakeTensorMode(allow_non_fake_inputs=True), fused_norms(), Live() as live:
        program = Program(cfg, config, False, BF16, CPU)
        live.peak = live.now
        program.gradient(Grid([1.0, 0.9, 0.75, 0.5, 0.0]), [0])
        program.update()
        weights = sum(p.untyped_storage().nbytes() for p in program.model.parameters())
        given = SimpleNamespace(**vars(cfg), teacher_context=context)
        said = weights / GIB + machine.trained_gb(given, BF16, program.model, 1) \
            + machine.step_gb(given, None, BF16, program.model)
    print(backbone, options, f"simulated {live.peak / GIB:.2f}, formula {said:.2f}, of it weights {weights / GIB:.2f}")
    assert 0.9 < said / (live.peak / GIB) < 1.1


@pytest.mark.parametrize("backbone", TINY)
def test_both_programs_run_and_count(backbone, monkeypatch, capsys):
    """On a CPU with numbers, and simulated; one stratified state and its walk cost less than half of all four."""
    monkeypatch.setitem(BACKBONES, backbone, (BACKBONES[backbone][0], TINY[backbone]))
    cfg = Options(backbone=backbone, size=64, rank=2, accumulate=1, checkpointing=True)
    one = simulate(dataclasses.replace(cfg, grad_states=1), TINY[backbone], False)
    real_size.main(["--backbone", backbone, "--size", "64", "--rank", "2", "--accumulate", "1", "--official"])
    every = json.loads(capsys.readouterr().out.splitlines()[-1])
    theirs = every["released"]
    assert every["seconds"] is None and every["grad_states"] == 4
    assert every["ratio"]["peak"] == every["peak_gib"] / (theirs["peak_gib"] + theirs["resident_gib"]) < 1
    assert 0.2 < one["tflop"] / every["tflop"] < 0.5 and theirs["tflop"] == pytest.approx(every["tflop"], rel=0.02)
    assert theirs["peak_gib"] > every["peak_gib"] > one["peak_gib"]     # which has no gradients before its only pass
    for released in (False, True):
        assert real_size.run(cfg, TINY[backbone], released, CPU, torch.float32, steps=2)["seconds"] > 0


@pytest.mark.parametrize("backbone", TINY)
def test_the_released_algorithm_has_our_gradient(backbone):
    """Same weights, adapters and noise: PEFT's and our gradients agree, so both programs do the same work."""
    cfg = Options(backbone=backbone, size=64, rank=2, accumulate=1, checkpointing=True)
    torch.manual_seed(0)
    theirs, ours = (Program(cfg, TINY[backbone], released, torch.float32, CPU) for released in (True, False))
    base = theirs.model.get_base_model()
    ours.model.load_state_dict({name.replace(".base_layer", ""): value for name, value in base.state_dict().items()
                                if "lora_" not in name})
    layers = dict(base.named_modules())
    for adapter, side in ((ours.tuned.theta, "student"), (ours.tuned.theta_bar, "teacher")):
        for name, (A, B) in adapter.weights.items():
            A.data.copy_(layers[name].lora_A[side].weight)
            B.data.copy_(layers[name].lora_B[side].weight)
    ours.x, ours.c_s, ours.c_t = theirs.x, theirs.c_s, theirs.c_t
    sigmas = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
    for program in (theirs, ours):
        program.optimizer.zero_grad(set_to_none=True)
        program.gradient(sigmas, [0, 1, 2, 3])
    for name, (A, B) in ours.tuned.theta.weights.items():
        for mine, his in ((A, layers[name].lora_A["student"]), (B, layers[name].lora_B["student"])):
            torch.testing.assert_close(mine.grad, his.weight.grad, rtol=1e-3, atol=1e-4 * float(mine.grad.abs().max()))


def test_resident_encoders():
    """Qwen3-4B has 4.02 billion parameters, Qwen3-VL-4B 4.44; the autoencoder .084."""
    assert official.resident_bytes("zimage") / 2 == pytest.approx(4.02e9 + 4.44e9 + 0.084e9, rel=0.003)
    assert official.resident_bytes("klein-4b") / 2 == pytest.approx(4.02e9 + 0.084e9, rel=0.003)
