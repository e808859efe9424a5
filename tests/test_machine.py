"""Devices, precision and memory. The formula of a training step is held to a simulation in test_real_size.py."""
import dataclasses
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import random_transformer
from safetensors.torch import save_file

from benchmarks.real_size import Z_CONFIG
from model import Z_IMAGE
from plumbing import machine
from plumbing.files import InputError
from plumbing.quantized import FLOAT, INT8
from plumbing.recipes import TURBO, fill
from plumbing.train_options import Options

pytestmark = pytest.mark.quick


def test_device_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.device_and_dtype("auto", "auto") == (torch.device("cpu"), torch.float32)
    assert machine.device_and_dtype("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    for name in ("quantum", "meta", "mps"):
        with pytest.raises(InputError, match=f"^--device {name}: not available here; use cpu"):
            machine.device_and_dtype(name, "auto")


def test_weights_by_the_headers_of_their_files(tmp_path):
    """Sampling needs the larger network: the two are never in memory together."""
    (tmp_path / "transformer").mkdir(), (tmp_path / "text_encoder").mkdir()
    net = random_transformer()
    weights = net.state_dict()
    save_file(weights, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({"one": torch.zeros(10), "two": torch.zeros(5, 2)}, tmp_path / "text_encoder" / "model.safetensors")
    count = sum(tensor.numel() for tensor in weights.values())
    rows = sum(layer.weight.numel() for block in net.blocks().values() for layer in block.modules()
               if isinstance(layer, torch.nn.Linear))
    for dtype, quantize, size in ((torch.float32, FLOAT, 4 * count), (torch.bfloat16, FLOAT, 2 * count),
                                  (torch.bfloat16, INT8, 2 * count - rows)):
        assert machine.weights_gb(tmp_path / "transformer", dtype, quantize) == pytest.approx(size / 2 ** 30)
        assert machine.sampling_gb(SimpleNamespace(quantize=quantize), tmp_path, dtype) == pytest.approx(size / 2 ** 30)
    assert machine.weights_gb(tmp_path / "text_encoder", torch.bfloat16) == 2 * 20 / 2 ** 30


@pytest.fixture
def z_image(tmp_path, monkeypatch):
    """The files' headers of Z-Image-Turbo at its true size, without their bytes."""
    with torch.device("meta"):
        model = Z_IMAGE.network(Z_CONFIG)
        text = {f"layers.{i}.mlp.weight": torch.empty(9728, 10240) for i in range(36)}
        text["embed_tokens.weight"] = torch.empty(151936, 2560)
    sizes = {"transformer": model.state_dict(), "text_encoder": text}
    monkeypatch.setattr(machine, "tensors", lambda folder, only_shapes: iter(sizes[folder.name].items()))
    monkeypatch.setattr(machine, "pixels_per_patch", lambda folder: 16)
    return model


def options(**changes) -> Options:
    """Of train.py, by the official recipe."""
    return dataclasses.replace(fill(Options(["data"]), TURBO), **changes)


def check(device: str, model, **changes) -> None:
    machine.check_memory(options(**changes), Path("Z"), torch.device(device),
                         lambda cfg: machine.training_gb(cfg, Path("Z"), torch.bfloat16, model))


def test_a_run_that_does_not_fit_is_refused_with_options_that_do(z_image, monkeypatch):
    """One line with what is needed, what is free, and options; whoever follows them is let through."""
    free = [0.0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free[0] * 2 ** 30), 2 ** 40))

    def refusal(gb: float, **changes) -> str:
        free[0] = gb
        with pytest.raises(InputError) as caught:
            check("cuda", z_image, **changes)
        assert "\n" not in str(caught.value) and f"cuda has {gb:.1f} GB free" in str(caught.value)
        return str(caught.value)

    for gb, changes, ways in ((12, {}, ["--quantize int8", "--size 768 --rank 16 --quantize int8",
                                        "--size 512 --rank 16 --quantize int8"]),
                              (24, {"checkpointing": False}, ["--checkpointing", "--quantize int8 --checkpointing",
                                                              "--size 768 --rank 16 --checkpointing"]),
                              (8, {}, ["--size 768 --rank 16 --quantize int8",
                                       "--size 512 --rank 16 --quantize int8"])):
        said = refusal(gb, **changes)
        assert [way for way in re.findall(r"(--[^(]*) \(", said)] == ways
        for way in ways:
            words = way.removeprefix("--").split(" --")
            chosen = {name: True if not value else int(value) if value.isdigit() else value
                      for name, _, value in (word.partition(" ") for word in words)}
            check("cuda", z_image, **changes | chosen)
    assert refusal(2).endswith("GB free; use a smaller checkpoint, or a larger machine")


def test_ways_to_train_all_weights(z_image, monkeypatch):
    """Rank and 8 bits are no ways there; more GPUs are."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 ** 30, 2 ** 40))
    with pytest.raises(InputError) as caught:
        check("cuda", z_image, tune="full", keep="none")
    said = str(caught.value)
    assert "--rank" not in said and "--quantize" not in said and said.endswith("or more GPUs (torchrun)")


def test_a_computer_with_little_memory_is_a_warning(z_image, monkeypatch, capsys):
    """It may swap, and other programs may end."""
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 3 * 2 ** 18, "SC_PAGE_SIZE": 4096}.get)
    check("cpu", z_image)
    said = capsys.readouterr().err
    assert said.startswith("warning: Z: needs about 16") and "cpu has 3.0 GB" in said and said.count("\n") == 1
    monkeypatch.setattr(os, "sysconf", lambda name: (_ for _ in ()).throw(ValueError(name)))    # it does not say
    check("cpu", z_image)
    assert capsys.readouterr().err == ""


def test_the_encoder_may_be_the_larger_phase(z_image, monkeypatch):
    """With a large text encoder encoding decides, with .15 for vision tower and activations."""
    sizes = {"transformer": 1.0, "text_encoder": 8.0}
    monkeypatch.setattr(machine, "weights_gb", lambda network, dtype, quantize: sizes[network.name])
    assert machine.training_gb(options(size=256, rank=1), Path("Z"), torch.bfloat16, z_image) == 1.15 * 8


def test_blocks_are_recomputed_only_where_a_step_does_not_fit(z_image, monkeypatch):
    """Unless the user says; with a tenth of what is free left over."""
    step = {way: machine.step_gb(options(checkpointing=way), Path("Z"), torch.bfloat16, z_image)
            for way in (True, False, None)}
    assert step[True] == step[None] < 3 and step[False] > 18            # the estimate is of the least
    most = step[False] + 0.6 * machine.trained_gb(options(), torch.bfloat16, z_image, 1)    # gradient and moments
    for free, needs in ((most / 0.9 + 0.01, False), (most / 0.9 - 0.01, True)):
        monkeypatch.setattr(machine, "free_gb", lambda device: free)
        found = [machine.recomputes(options(checkpointing=way), Path("Z"), torch.bfloat16, z_image)
                 for way in (None, True, False)]
        assert found == [needs, True, False]


def test_a_card_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    with pytest.raises(InputError, match="^--dtype bfloat16: Tesla T4 has no such type; use --dtype float32$"):
        machine.device_and_dtype("cuda", "auto")
    assert machine.device_and_dtype("cuda", "float32")[1] == torch.float32


def test_peak_memory_is_in_gb():
    """A process with torch has more than 50 MB and less than a TB; in bytes or kilobytes it would not look so."""
    machine.free()
    assert 0.05 < machine.peak_memory_gb(torch.device("cpu")) < 1000
