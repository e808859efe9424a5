"""Full fine-tuning: gradients, EMA and saved networks against plain torch and diffusers; resumed bit for bit."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import metrics, random_transformer
from diffusers import ZImageTransformer2DModel
from safetensors.torch import load_file
from test_model import difference

import model as zimage
import sample
import train
from plumbing import files, full, machine
from plumbing.files import InputError
from plumbing.full import Full
from plumbing.team import ALONE
from plumbing.train_options import Options

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def words_of(base: list[str]) -> list[str]:
    """Those of a run of all weights."""
    return [*base[:base.index("--rank")], *base[base.index("--alpha") + 2:], "--tune", "full", "--lr", "1e-3"]


@pytest.fixture
def tune(base, tmp_path):
    """tune("name", "--steps", 3) trains all weights into tmp_path / "name"."""
    def start(name: str, *flags):
        assert train.main([*words_of(base), "--out", str(tmp_path / name), *map(str, flags)]) == 0
        return tmp_path / name
    return start


@pytest.fixture
def network(checkpoint):
    return lambda precision=torch.float32: zimage.Z_IMAGE.load(checkpoint, "cpu", precision)


def full_of(network, checkpoint, teacher: str = "ema", needs_base: bool = True) -> Full:
    config = files.read_json(checkpoint / "transformer" / "config.json")
    return Full(network, config, torch.float32, ALONE, teacher, needs_base)


@pytest.mark.quick
def test_three_networks(network, checkpoint):
    """A step moves the student, the EMA follows by 1 - m, and the untuned model stays."""
    tuned, before = full_of(network, checkpoint), network()
    context, draw = [zimage.Context(torch.ones(5, 128))], torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, 8, 8, generator=draw)
    tuned.student(context)(x, 0.5).square().mean().backward()
    reference = network()
    for parameter in reference.parameters():
        parameter.requires_grad_(True)
    reference.velocity(x, 0.5, context).square().mean().backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None]).norm()
    assert torch.isclose(tuned.clip_(1e9), norm)
    with torch.no_grad():
        for name, parameter in tuned.parameters().items():
            torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad)
            parameter -= 0.1
    tuned.ema_(0.75)
    for name, own in before.state_dict().items():
        torch.testing.assert_close(tuned.model.state_dict()[name], own - 0.1)
        torch.testing.assert_close(tuned.slow.state_dict()[name], own - 0.025)
        assert torch.equal(tuned.untuned.state_dict()[name], own)
    with torch.no_grad():
        assert torch.equal(tuned.base(context)(x, 0.5), before.velocity(x, 0.5, context))
        assert difference(tuned.teacher(context)(x, 0.5), before.velocity(x, 0.5, context)) > 1e-4
    assert not any(p.requires_grad for part in (tuned.slow, tuned.untuned) for p in part.parameters())


@pytest.mark.quick
def test_teachers_without_an_average(network, checkpoint):
    """A live copy is the student itself, a frozen one the untuned model: neither has weights of its own to move."""
    for teacher, which in (("copy", "model"), ("frozen", "untuned")):
        tuned = full_of(network, checkpoint, teacher)
        assert tuned.slow is getattr(tuned, which) and not any(name.startswith("teacher") for name in tuned.state())
        before = {name: tensor.clone() for name, tensor in tuned.slow.state_dict().items()}
        tuned.ema_(0.0)
        assert all(torch.equal(before[name], tensor) for name, tensor in tuned.slow.state_dict().items())
    assert full_of(network, checkpoint, needs_base=False).untuned is not None


@pytest.mark.quick
def test_files_of_at_most_so_many_bytes():
    assert full.split({"a": 3, "b": 4}, most=7) == {"diffusion_pytorch_model.safetensors": ["a", "b"]}
    assert list(full.split({"a": 3, "b": 4, "c": 9, "d": 1, "e": 1}, most=7).values()) == [
        ["a", "b"], ["c"], ["d", "e"]]
    assert list(full.split(dict.fromkeys("abc", 7), most=7)) == [
        f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.mark.quick
def test_diffusers_loads_what_was_saved(network, checkpoint, tmp_path, monkeypatch):
    """In one file and in several; a folder that was there before is replaced as a whole."""
    tuned = full_of(network, checkpoint)
    with torch.no_grad():
        for parameter in tuned.parameters().values():
            parameter *= 1.05
    draw = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 8, 8, 8, generator=draw), torch.randn(32, 128, generator=draw)
    with torch.no_grad():
        ours = tuned.student([zimage.Context(context)])(x, 0.6)
    for whole in (True, False):
        tuned.save(tmp_path, {"step": "1"}, with_teacher=True)
        names = sorted(path.name for path in (tmp_path / "student" / "transformer").iterdir())
        assert len(names) == 2 if whole else len(names) > 4
        theirs = ZImageTransformer2DModel.from_pretrained(tmp_path / "student" / "transformer").eval()
        with torch.no_grad():
            v = -theirs([x[0, :, None]], torch.tensor([0.4]), [context])[0][0]
        assert difference(v.squeeze(1)[None], ours) < 1e-4
        again = zimage.Z_IMAGE.load(checkpoint, "cpu", torch.float32,
                                    transformer=str(tmp_path / "student" / "transformer"))
        assert all(torch.equal(again.get_parameter(name), own) for name, own in tuned.parameters().items())
        assert sorted(path.name for path in (tmp_path / "student").iterdir()) == ["transformer"]
        monkeypatch.setattr(full, "split", lambda sizes: dict(enumerate_files(sizes)))


def enumerate_files(sizes: dict[str, int]):
    """Four files, as if the network was large."""
    names = list(sizes)
    for i in range(4):
        yield f"diffusion_pytorch_model-0000{i + 1}-of-00004.safetensors", names[i::4]


def test_resume_is_bit_for_bit(tune, tmp_path):
    flags = ("--keep-weight", 2, "--sample-every", 2)
    whole, parts = tune("whole", "--steps", 4, *flags), tune("parts", "--steps", 2, *flags)
    tune("parts", "--steps", 4, "--resume", *flags)
    for name in ("state.safetensors", f"student/{WEIGHTS}", f"teacher/{WEIGHTS}"):
        a, b = load_file(whole / name), load_file(parts / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert metrics(whole) == metrics(parts)
    panels = [(out / "samples" / "step_000004.png").read_bytes() for out in (whole, parts)]
    assert panels[0] == panels[1]                                       # the base's column, too
    with pytest.raises(InputError, match="holds another run"):
        tune("whole", "--steps", 1)


def test_weights_that_no_batch_needs(tune, checkpoint):
    """Tokens of a 64 pixel picture need no pad token, which then has no gradient; it is saved and resumed as it was."""
    flags = ("--size", 64)
    whole, parts = tune("whole", "--steps", 2, *flags), tune("parts", "--steps", 1, *flags)
    tune("parts", "--steps", 2, "--resume", *flags)
    a, b = (load_file(out / "state.safetensors") for out in (whole, parts))
    assert not a["adam.x_pad_token.exp_avg"].any()
    assert torch.equal(a["student.x_pad_token"], load_file(checkpoint / WEIGHTS)["x_pad_token"])
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_what_is_tuned_is_drawn(tune, base, checkpoint, tmp_path, capsys):
    """sample.py --transformer; a folder of the other kind is refused."""
    out = tune("run", "--steps", 2)
    assert f"done     {out / 'student/transformer'}" in capsys.readouterr().out
    draw = ["--model", str(checkpoint), "--prompt", "a star", "--height", "32", "--width", "32", "--device", "cpu"]
    sample.main([*draw, "--out", str(tmp_path / "a.png")])
    sample.main([*draw, "--out", str(tmp_path / "b.png"), "--transformer", str(out / "student" / "transformer")])
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=str(folder)):
            sample.main([*draw, "--out", str(tmp_path / "c.png"), "--transformer", str(folder)])


def test_every_method_trains_all_weights(tune, captions_folder):
    """Also those that ask the untuned model: pso, what is kept, DreamBooth, frozen and live teachers."""
    for name, flags in {"sft": ("--method", "sft"), "pso": ("--method", "pso"), "off": ("--method", "off-policy"),
                        "keep": ("--keep", captions_folder), "frozen": ("--teacher-weights", "frozen"),
                        "copy": ("--teacher-weights", "copy"),
                        "dreambooth": ("--method", "dreambooth", "--keep", captions_folder)}.items():
        out = tune(name, "--steps", 2, *flags)
        before, after = (load_file(path) for path in (out / f"student/{WEIGHTS}", out / "state.safetensors"))
        assert all(torch.equal(before[key], after[f"student.{key}"]) for key in before), name
        assert (out / "teacher").exists() == (name in ("off", "keep"))


@pytest.fixture
def captions_folder(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "metadata.jsonl").write_text(json.dumps({"text": "a moon"}) + "\n")
    return tmp_path / "kept"


@pytest.mark.quick
@pytest.mark.parametrize("flag, value", [("--rank", "4"), ("--alpha", "2"), ("--quantize", "int8"),
                                         ("--teacher-lora", "a.safetensors"), ("--compile", None), ("--name", "dog")])
def test_what_belongs_to_lora_is_refused(flag, value, photos):
    words = ["--data", str(photos), "--tune", "full", flag, *([value] if value else [])]
    with pytest.raises(InputError, match=f"^{flag} .*: belongs to --tune lora; with --tune full"):
        train.main(words)


@pytest.mark.quick
def test_memory_is_shared():
    """20 bytes a weight, 2 more for the untuned model; N processes have an N-th each, and a block in full twice."""
    model = random_transformer()
    count = sum(parameter.numel() for parameter in model.parameters())
    cfg = Options(["data"], tune="full", keep="none")
    block = 2 * 2 * count / len(model.blocks())
    for changes, each in (({}, 20), ({"keep": "captions"}, 22), ({"teacher_weights": "copy"}, 16),
                          ({"teacher_weights": "frozen"}, 18), ({"method": "pso"}, 22)):
        given = SimpleNamespace(**vars(cfg) | changes)
        for processes in (1, 4):
            found = machine.trained_gb(given, torch.bfloat16, model, processes)
            assert found * 2 ** 30 == pytest.approx(each * count / processes + block)


def test_the_disk_is_checked(tune, monkeypatch, tmp_path):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=10 ** 6))
    with pytest.raises(InputError, match=r"--out .*: needs about .* on disk, 1 MB are free"):
        tune("full disk", "--steps", 1)
    assert not (tmp_path / "full disk").exists()
