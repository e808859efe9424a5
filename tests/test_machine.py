"""Devices, precision and memory."""
import pytest
import torch
from conftest import TRANSFORMER, random_transformer
from safetensors.torch import save_file

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
    weights = random_transformer().state_dict()
    save_file(weights, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({"one": torch.zeros(10), "two": torch.zeros(5, 2)}, tmp_path / "text_encoder" / "model.safetensors")
    count = sum(tensor.numel() for tensor in weights.values())
    assert count > 2 * TRANSFORMER["dim"] ** 2
    assert machine.weights_gb(tmp_path, torch.float32) == pytest.approx(4 * count / 2 ** 30)
    assert machine.weights_gb(tmp_path, torch.bfloat16) == pytest.approx(2 * count / 2 ** 30)
    assert machine.check_memory(tmp_path, torch.device("cpu"), torch.float32) == pytest.approx(4 * count / 2 ** 30)
    for free, fits in ((4 * count, True), (4 * count - 1, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 ** 40))
        if fits:
            machine.check_memory(tmp_path, torch.device("cuda"), torch.float32)
            continue
        with pytest.raises(InputError, match="its weights need .* GB in float32, cuda has .* GB free"):
            machine.check_memory(tmp_path, torch.device("cuda"), torch.float32)


def test_peak_memory_is_in_gb():
    """A process with torch has more than 50 MB and less than a TB; in bytes or kilobytes it would not look so."""
    machine.free()
    assert 0.05 < machine.peak_memory_gb(torch.device("cpu")) < 1000
