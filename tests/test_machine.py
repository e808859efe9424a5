"""Devices, precision and memory. The formula of a training step is held to a simulation in test_real_size.py."""
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TRANSFORMER, random_transformer
from safetensors.torch import save_file

from benchmarks.real_size import Z_CONFIG
from model import Z_IMAGE
from plumbing import machine
from plumbing.files import InputError

pytestmark = pytest.mark.quick


def test_device_and_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.device_and_dtype("auto", "auto") == (torch.device("cpu"), torch.float32)
    assert machine.device_and_dtype("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)
    for name in ("quantum", "meta", "mps"):
        with pytest.raises(InputError, match=f"^--device {name}: not available here; use cpu"):
            machine.device_and_dtype(name, "auto")


def test_weights_of_the_larger_network(tmp_path, monkeypatch):
    """The networks are never in memory together; the count comes from the headers of their files."""
    (tmp_path / "transformer").mkdir(), (tmp_path / "text_encoder").mkdir()
    net = random_transformer()
    weights = net.state_dict()
    save_file(weights, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({"one": torch.zeros(10), "two": torch.zeros(5, 2)}, tmp_path / "text_encoder" / "model.safetensors")
    count = sum(tensor.numel() for tensor in weights.values())
    assert count > 2 * TRANSFORMER["dim"] ** 2
    assert machine.weights_gb(tmp_path, torch.float32) == pytest.approx(4 * count / 2 ** 30)
    assert machine.weights_gb(tmp_path, torch.bfloat16) == pytest.approx(2 * count / 2 ** 30)
    assert machine.check_memory(tmp_path, torch.device("cpu"), torch.float32) == pytest.approx(4 * count / 2 ** 30)
    rows = sum(layer.weight.numel() for block in net.blocks().values() for layer in block.modules()
               if isinstance(layer, torch.nn.Linear))
    assert machine.weights_gb(tmp_path, torch.bfloat16, "int8") == pytest.approx((2 * count - rows) / 2 ** 30)
    for free, fits in ((4 * count, True), (4 * count - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 ** 40))
        if fits:
            machine.check_memory(tmp_path, torch.device("cuda"), torch.float32)
            continue
        with pytest.raises(InputError, match="needs .* GB in float32, cuda has .* GB free; use a smaller checkpoint"):
            machine.check_memory(tmp_path, torch.device("cuda"), torch.float32)


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


def options(**changes) -> SimpleNamespace:
    """Of train.py, by the official recipe."""
    recipe = dict(size=1024, rank=64, batch_size=1, checkpointing=True, quantize="none", teacher_context="vlm")
    return SimpleNamespace(**recipe | changes)


def test_a_run_that_does_not_fit_is_refused_with_options_that_do(z_image, monkeypatch):
    """One line with what is needed, what is free, and options; whoever follows them is let through."""
    cuda, bf16, free = torch.device("cuda"), torch.bfloat16, [0.0]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free[0] * 2 ** 30), 2 ** 40))

    def refusal(gb: float, **changes) -> str:
        free[0] = gb
        with pytest.raises(InputError) as caught:
            machine.check_memory(Path("Z"), cuda, bf16, options(**changes), z_image)
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
            assert machine.check_memory(Path("Z"), cuda, bf16, options(**changes | chosen), z_image) <= gb
    assert refusal(2).endswith("GB free; use a smaller checkpoint, or a larger GPU")


def test_the_encoder_may_be_the_larger_phase(z_image, monkeypatch):
    """With a large text encoder encoding decides, with .15 for vision tower and activations."""
    sizes = {"transformer": 1.0, "text_encoder": 8.0}
    monkeypatch.setattr(machine, "weights_gb", lambda folder, dtype, quantize, parts: max(map(sizes.get, parts)))
    small = options(size=256, rank=1)
    assert machine.check_memory(Path("Z"), torch.device("cpu"), torch.bfloat16, small, z_image) == 1.15 * 8


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
