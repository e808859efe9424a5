"""The embedded model's training code: tokenizer and patches against transformers, the optimizer loop against
torch.optim and closed forms, guidance and distillation against their formulas."""
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from encoder import image_text_prompt, text_prompt
from model import scheduler_shift
from rollout import sigma_grid
from tiny.contexts import patches
from tiny.making import distill, pretrain, stage, train_vlm
from tiny.making.stage import Stage
from tiny.making.tokenizer import build_tokenizer
from tiny.models import Z_IMAGE_SCHEDULER, guided
from tiny.world import ATTRIBUTES, COLUMN, caption, draw_scenes, generator, other_view, scene, to_pil, words

pytestmark = pytest.mark.quick
CONCEPT = ["<V1>", "<V2>", "<V3>", "<V4>"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------- patches and tokenizer
@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def pieces(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    """Tokens of a text, a space before a word written as "_"."""
    return [token.replace("Ġ", "_") for token in tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)]


def test_patches_are_those_of_the_image_processor():
    """Noise, so that every patch differs; the processor gets 8-bit pictures, hence half a level of tolerance."""
    pictures = torch.rand(3, 3, 64, 64, generator=seeded(0)) * 2 - 1
    processor = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, image_mean=[.5] * 3,
                                         image_std=[.5] * 3, size={"shortest_edge": 4096, "longest_edge": 4096})
    expected = processor(images=[to_pil(picture) for picture in pictures], return_tensors="pt")
    assert expected["image_grid_thw"].tolist() == [[1, 8, 8]] * 3
    ours = patches(pictures)
    assert ours.shape == expected["pixel_values"].shape == (3 * 64, 384)
    torch.testing.assert_close(ours, expected["pixel_values"], atol=.51 / 127.5, rtol=0)


def test_every_word_of_the_world_is_one_token(tokenizer):
    vocabulary = {word for choices in ATTRIBUTES.values() for choice in choices for word in choice.split()}
    vocabulary |= {"on", "in", "the", "at", "and", "style"}
    assert {word: pieces(tokenizer, f" {word}") for word in vocabulary} == {word: [f"_{word}"] for word in vocabulary}
    row = scene(shape="star", size="big", place="on the left", pattern="dotted", main="orange", second="white",
                backdrop="mint", line="chalk", texture="ruled")
    assert pieces(tokenizer, caption(row)) == ["a", *(f"_{word}" for word in caption(row).split()[1:])]
    assert pieces(tokenizer, "an orange star") == ["an", "_orange", "_star"]


@pytest.mark.parametrize("prompt, expected", [
    ("a big [V] on mint", ["a", "_big", *CONCEPT, "_on", "_mint"]),
    ("[V] on mint", [*CONCEPT, "_on", "_mint"]),
    ("a [V]", ["a", *CONCEPT]),
    ("a red star in [V] style", ["a", "_red", "_star", "_in", *CONCEPT, "_style"]),
    ("a [V] in [V] style", ["a", *CONCEPT, "_in", *CONCEPT, "_style"]),
])
def test_the_concept_is_four_tokens_anywhere(tokenizer, prompt, expected):
    assert pieces(tokenizer, prompt) == expected
    inside = pieces(tokenizer, text_prompt(prompt))                       # the same tokens inside the chat template
    assert [token for token in inside if token in CONCEPT] == [token for token in expected if token in CONCEPT]
    assert len(set(tokenizer.convert_tokens_to_ids(CONCEPT))) == 4


@pytest.mark.parametrize("text", ["an elephant", "Übergröße, 夜!", "[v] [W]", "redstar  two  spaces"])
def test_unknown_words_fall_into_known_pieces(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id is None and None not in ids
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids(CONCEPT))
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("prompt", ["a red star", "a big [V] on mint", "line\nbreak", ""])
def test_the_chat_template_is_that_of_the_encoder(tokenizer, prompt):
    message = [{"role": "user", "content": prompt}]
    assert tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) == text_prompt(prompt)
    special = pieces(tokenizer, image_text_prompt(prompt, 16))
    assert special.count("<|image_pad|>") == 16 and special[:1] == ["<|im_start|>"]


@pytest.mark.parametrize("kind", ["object", "style"])
def test_the_words_of_a_concept_are_found(tokenizer, kind):
    rows = train_vlm.draw_concepts(64, seeded(1), kind)
    said = [[words(row)[name] for name in train_vlm.SLOTS[kind]] for row in rows]
    token_of = {word: tokenizer(f" {word}").input_ids[0] for choices in ATTRIBUTES.values() for word in choices}
    for row, named in zip(rows, said):
        ids = torch.tensor([tokenizer(text_prompt(caption(row))).input_ids])
        at = train_vlm.word_positions(ids, [named], token_of)[0]
        assert [tokenizer.decode(ids[0, position]).strip() for position in at] == named
        assert (at.diff() >= 0).all()


def test_another_view_shares_the_concept_only():
    for kind, shared in (("object", (0, 3, 4, 5)), ("style", (7, 8))):
        rows = train_vlm.draw_concepts(800, seeded(2), kind)
        views = other_view(rows, kind, seeded(3))
        assert torch.equal(views[:, shared], rows[:, shared])
        assert float((views == rows).all(1).float().mean()) == pytest.approx(.25, abs=.05)
        other = (views != rows).any(1)
        assert (views[other] != rows[other]).float().mean(0)[[COLUMN["place"], COLUMN["backdrop"]]].min() > .7


# ------------------------------------------------------------------------------------------------------ stage.Stage
RATES = [1 / 3, 2 / 3, 1, 1, .8, .6, .4, .2]                               # 8 steps, of which 3 are warm-up
START = [torch.randn(shape, generator=seeded(1000)) for shape in ((6, 4, 3, 3), (5,))]


class Quadratic(nn.Module):
    """Two parameters, a convolution's and a bias, that are drawn towards a target."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bias = (nn.Parameter(start.clone()) for start in START)


def target(step: int) -> list[Tensor]:
    return [torch.randn(start.shape, generator=generator(0, step)) for start in START]


def distance(parameters: list[Tensor], step: int) -> Tensor:
    return sum((p - t).square().sum() * size for p, t, size in zip(parameters, target(step), (.1, .7)))


def build(folder: Path, steps: int = 8, **extra) -> Stage:
    options = dict(adam=.03, muon=.05, warmup=3, ema=.6, is_matrix=lambda name: name == "conv") | extra
    return Stage(Quadratic(), folder, steps, **options)


def walk(training: Stage, history: list[list[Tensor]] | None = None, **options) -> Stage:
    """Runs a stage to its end; appends the parameters with which each step began to `history`."""
    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        parameters = [training.model.conv, training.model.bias]
        if history is not None:
            history.append([p.detach().clone() for p in parameters])
        return distance(parameters, step), {"step again": step}

    for _ in training.run(loss_of, **options):
        pass
    return training


def state(training: Stage) -> dict[str, Tensor]:
    return dict(training.model.state_dict()) | {f"average {n}": a for n, a in training.average.items()}


def test_a_run_that_was_stopped_ends_where_the_other_one_ends(tmp_path):
    whole = walk(build(tmp_path / "whole"))
    stopped = build(tmp_path / "stopped")
    for step in stopped.run(lambda step: (distance([stopped.model.conv, stopped.model.bias], step), {}), save_every=3):
        if step == 6:
            break
    resumed = build(tmp_path / "stopped")
    assert resumed.step == 6
    assert all(torch.equal(value, state(stopped)[name]) for name, value in state(resumed).items())
    seen = []
    walk(resumed, seen)
    assert len(seen) == 2 and resumed.step == 8
    assert state(whole).keys() == state(resumed).keys()
    assert all(torch.equal(value, state(resumed)[name]) for name, value in state(whole).items())
    assert not torch.equal(whole.model.conv, START[0])


def test_a_finished_run_does_nothing_more(tmp_path):
    before = state(walk(build(tmp_path)))
    again = build(tmp_path)
    assert list(again.run(lambda step: pytest.fail("trained on"))) == []
    assert all(torch.equal(value, before[name]) for name, value in state(again).items())


def test_saves_and_log(tmp_path):
    training = build(tmp_path)
    steps = list(training.run(lambda step: (distance([training.model.conv, training.model.bias], step), {"x": step}),
                              save_every=3))
    assert steps == [3, 6, 8]
    assert json.loads((tmp_path / "state.json").read_text()) == {"step": 8}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9)) and [line["x"] for line in lines] == list(range(8))
    assert all({"loss", "grad", "seconds"} <= line.keys() for line in lines)


def test_muon_on_views_is_muon_on_matrices(tmp_path):
    """torch.optim.Muon on a parameter that is a matrix from the start, AdamW beside it, the schedule written out."""
    training = walk(build(tmp_path, clip=1.0))
    matrix, bias = nn.Parameter(START[0].flatten(1).clone()), nn.Parameter(START[1].clone())
    optimizers = [(torch.optim.Muon([matrix], lr=1.0, weight_decay=0.0), .05),
                  (torch.optim.AdamW([bias], lr=1.0, betas=(.9, .99), weight_decay=0.0), .03)]
    for step, rate in enumerate(RATES):
        loss = distance([matrix.view(6, 4, 3, 3), bias], step)
        gradients = torch.autograd.grad(loss, [matrix, bias])
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > 1                                                    # so that clipping matters
        matrix.grad, bias.grad = (g / (norm + 1e-6) for g in gradients)
        for optimizer, base in optimizers:
            optimizer.param_groups[0]["lr"] = base * rate
            optimizer.step()
    torch.testing.assert_close(training.model.conv.flatten(1), matrix, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(training.model.bias, bias, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sizes, dim", [([4, 2], 0), ([9, 20, 7], 1)])
def test_fused_weights_are_trained_as_if_they_were_not(tmp_path, sizes, dim):
    """And a stopped run goes on: the state of every piece is saved."""
    def pieces(name: str, weight: Tensor) -> tuple[Tensor, ...]:
        return weight.flatten(1).split(sizes, dim)

    training = walk(build(tmp_path / "whole", pieces=pieces, clip=1e9))
    apart = [nn.Parameter(part.clone()) for part in START[0].flatten(1).split(sizes, dim)]
    muon = torch.optim.Muon(apart, lr=1.0, weight_decay=0.0)
    for step, rate in enumerate(RATES):
        muon.param_groups[0]["lr"] = .05 * rate
        muon.zero_grad()
        distance([torch.cat(apart, dim).view(6, 4, 3, 3), START[1]], step).backward()
        muon.step()
    torch.testing.assert_close(training.model.conv.flatten(1), torch.cat(apart, dim), atol=1e-5, rtol=1e-4)

    stopped = build(tmp_path / "stopped", pieces=pieces, clip=1e9)
    step = next(stopped.run(lambda step: (distance([stopped.model.conv, stopped.model.bias], step), {}), save_every=3))
    resumed = walk(build(tmp_path / "stopped", pieces=pieces, clip=1e9))
    assert step == 3 and all(torch.equal(value, state(resumed)[name]) for name, value in state(training).items())


def test_a_run_shorter_than_its_warm_up_goes_downhill(tmp_path):
    for steps in (1, 3, 5):
        training, rates = build(tmp_path / str(steps), steps=steps, warmup=5), []
        adam = training.optimizers[0][0].param_groups[0]
        for _ in training.run(lambda step: (distance([training.model.conv, training.model.bias], step), {}), 1):
            rates.append(adam["lr"] / .03)
        assert rates == pytest.approx([(step + 1) / 5 for step in range(steps)])


def test_without_muon_every_parameter_is_adams(tmp_path):
    training = build(tmp_path, muon=0.0)
    assert not training.matrices and len(training.optimizers) == 1
    history: list[list[Tensor]] = []
    walk(training, history)
    moved = (history[1][0] - history[0][0]).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, .03 / 3), rtol=1e-3, atol=0)  # Adam's first step: the rate


@pytest.mark.parametrize("ema", [.6, .15])
def test_the_average_in_closed_form(tmp_path, ema):
    """average = sum_j (1 - d_j) d_(j+1) ... d_n p_j + d_0 ... d_n p_start, d_j = min(ema, (1 + j) / (10 + j))."""
    history: list[list[Tensor]] = []
    training = walk(build(tmp_path, ema=ema), history)
    after = [parameters[0] for parameters in history[1:]] + [training.model.conv.detach()]
    decays = [min(ema, (1 + j) / (10 + j)) for j in range(8)]
    weights = [(1 - d) * float(torch.tensor(decays[j + 1:]).prod()) for j, d in enumerate(decays)]
    first = float(torch.tensor(decays).prod())
    assert first + sum(weights) == pytest.approx(1)
    expected = first * START[0] + sum(weight * p for weight, p in zip(weights, after))
    torch.testing.assert_close(training.average["conv"], expected, atol=1e-5, rtol=1e-5)
    averaged = training.averaged()
    assert torch.equal(averaged.conv, training.average["conv"]) and not averaged.training
    assert torch.equal(training.model.conv, after[-1])                                    # a copy: training goes on


def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path):
    training = build(tmp_path)

    def loss_of(step: int) -> tuple[Tensor, dict[str, float]]:
        return training.model.conv.sum() * (float("nan") if step == 4 else 1.0), {}

    with pytest.raises(SystemExit, match="step 4"):
        list(training.run(loss_of, save_every=2))
    assert build(tmp_path).step == 4


def test_processes_share_the_mean_of_their_gradients(tmp_path, monkeypatch):
    """The other process is played by all_reduce: its gradients are 10 everywhere."""
    training = build(tmp_path)
    training.processes = 2
    monkeypatch.setattr(stage.distributed, "all_reduce", lambda message: message.add_(10 / 2))
    distance([training.model.conv, training.model.bias], 0).backward()
    own = [training.model.conv.grad.clone(), training.model.bias.grad.clone()]
    training.share_gradients()
    for gradient, mine in zip((training.model.conv.grad, training.model.bias.grad), own):
        torch.testing.assert_close(gradient, (mine + 10) / 2)


def test_generators_depend_on_seed_and_step():
    draws = {torch.rand(1, generator=generator(seed, step)).item() for seed in range(3) for step in range(20)}
    assert len(draws) == 60
    assert torch.rand(1, generator=generator(2, 5)) == torch.rand(1, generator=generator(2, 5))


# ------------------------------------------------------------------------------------------ pre-training, distillation
class Toy:
    """A "transformer" whose velocity names what it was given."""

    def __init__(self) -> None:
        self.calls = 0

    def velocity(self, x: Tensor, sigma: float, context: list[Tensor], adapter=None) -> Tensor:
        self.calls += 1
        return torch.stack([row * sigma + c.sum() for row, c in zip(x, context)])


@pytest.mark.parametrize("guidance, calls", [(1.0, 1), (0.0, 2), (2.0, 2), (3.5, 2)])
def test_guidance(guidance, calls):
    x, toy = torch.randn(2, 3, 4, 4, generator=seeded(5)), Toy()
    context, empty = [torch.full((2, 1), 3.0), torch.full((1, 1), -1.0)], [torch.full((1, 1), .5)] * 2
    v = guided(toy, context, empty, guidance)(x, .7)
    base, told = .7 * x + .5, .7 * x + torch.tensor([6.0, -1.0]).view(2, 1, 1, 1)
    torch.testing.assert_close(v, (1 - guidance) * base + guidance * told)
    assert toy.calls == calls


def test_noise_levels_follow_the_samplers_time():
    """u uniform and sigma = 6 u / (1 + 5 u): P(sigma <= s) = s / (6 - 5 s), so six sevenths are above a half."""
    n = 20000
    sigma = pretrain.draw_sigma(seeded(6), pretrain.TRAIN_SHIFT, n).sort().values
    empirical = torch.arange(1, n + 1) / n
    assert (sigma / (6 - 5 * sigma) - empirical).abs().max() < 1.63 / n ** .5             # Kolmogorov-Smirnov, 1 %
    assert float((sigma > .5).float().mean()) == pytest.approx(6 / 7, abs=.01)
    assert sigma.min() >= 0 and sigma.max() <= 1
    assert float(sigma[n // 2]) == pytest.approx(6 / 7, abs=.01)


@pytest.mark.parametrize("k", range(4))
def test_a_segment_of_a_straight_line_is_crossed_exactly(k):
    """v = (x - x0) / sigma points along the line from eps to x0, so any number of Euler steps ends on the line."""
    x0, eps = torch.randn(2, 2, 3, 4, 4, generator=seeded(7))
    sigmas = sigma_grid(scheduler_shift(Z_IMAGE_SCHEDULER), 4)
    seen: list[float] = []

    def teacher(x: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        return (x - x0) / sigma

    at, after = ((1 - s) * x0 + s * eps for s in (sigmas[k], sigmas[k + 1]))
    torch.testing.assert_close(distill.cross(teacher, at, k), after, atol=1e-5, rtol=1e-5)
    assert len(seen) == (2, 2, 2, 6)[k] and seen[0] == pytest.approx(float(sigmas[k]))
    assert all(sigmas[k + 1] < sigma < sigmas[k] for sigma in seen[1:])


def test_the_teachers_substeps_are_those_of_the_sampler():
    """Two steps a segment are the plain grid of eight, six steps in the last one those of twenty-four."""
    seen: list[float] = []
    for k in range(4):
        distill.cross(lambda x, sigma: seen.append(sigma) or x, torch.zeros(1, 1, 1, 1), k)
    assert seen[:6] == pytest.approx(sigma_grid(scheduler_shift(Z_IMAGE_SCHEDULER), 8)[:6].tolist())
    assert seen[6:] == pytest.approx(sigma_grid(scheduler_shift(Z_IMAGE_SCHEDULER), 24)[18:-1].tolist())


def test_muon_gets_attention_and_feed_forward_only():
    names = {"layers.0.attention.to_q.weight": True, "noise_refiner.0.attention.to_out.0.weight": True,
             "layers.3.feed_forward.w2.weight": True, "layers.0.adaLN_modulation.0.weight": False,
             "layers.0.attention.norm_q.weight": False, "x_pad_token": False, "cap_embedder.1.weight": False}
    assert {name: pretrain.is_matrix(name) for name in names} == names


class Recorder:
    """Stands in for the VLM: remembers prompts and pictures."""

    def contexts(self, prompts: list[str], pictures: Tensor | None = None) -> list[Tensor]:
        self.prompts, self.pictures = prompts, pictures
        return [torch.zeros(1, 1)] * len(prompts)


def test_the_mixture_of_contexts():
    """Shares of the prompts of a text batch, and "[V]" with another view in an image batch."""
    recorder, rows = Recorder(), draw_scenes(2000, seeded(8), styled=1.0)
    contexts = pretrain.Contexts(recorder, render=SimpleNamespace(draw=lambda views, g: views))
    assert len(contexts.text(rows, seeded(9))) == 2000 and recorder.pictures is None
    assert sum(not prompt for prompt in recorder.prompts) / 2000 == pytest.approx(.08, abs=.02)
    assert sum("[V]" in prompt for prompt in recorder.prompts) / 2000 == pytest.approx(.05 + .02 * 15 / 16, abs=.02)
    _, told = contexts.image(rows, "object", seeded(10))
    assert sum("[V]" in prompt for prompt in recorder.prompts) / 2000 == pytest.approx(.85, abs=.03)
    assert torch.equal(recorder.pictures[:, (0, 3, 4, 5)], rows[:, (0, 3, 4, 5)])
    for row, prompt, plain in zip(rows, recorder.prompts, told):                       # the same in words alone
        _, noun = caption(row, ("pattern", "main")).split(" ", 1)
        assert "[V]" not in plain and (prompt == plain or plain.replace(noun, "[V]").split()[1:] == prompt.split()[1:])
