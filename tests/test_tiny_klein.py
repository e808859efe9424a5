"""tiny/making/klein.py: the folder of the embedded FLUX.2-klein and what its transformer is taught; tiny/edits.py."""
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from torch import Tensor
from transformers import AutoTokenizer, Qwen3ForCausalLM

import encoder
from model import Context
from networks import flux2
from networks.flux2 import KLEIN
from plumbing import encoder_files
from plumbing.checkpoints import EMBEDDED, backbone_of, recipe_of
from rollout import shifted
from tiny.contexts import TOKENS, ReferenceFeatures
from tiny.edits import CHANGES, Edits, instruction
from tiny.making import klein
from tiny.metrics import Reader, Reading
from tiny.models import grid_of
from tiny.score_edits import of_edits
from tiny.world import (COLUMN, OBJECT_ATTRIBUTES, Renderer, draw_marks, draw_scenes, generator, held_out_object,
                        scene, to_pil)


@pytest.fixture(scope="module")
def features(tiny_klein) -> ReferenceFeatures:
    return ReferenceFeatures(tiny_klein)


# ------------------------------------------------------------------------------------------------------- the folder
def test_the_parts_load_in_other_programs(tiny_klein):
    tokenizer = AutoTokenizer.from_pretrained(tiny_klein / "tokenizer")
    text = Qwen3ForCausalLM.from_pretrained(tiny_klein / "text_encoder")
    vae = AutoencoderKLFlux2.from_pretrained(tiny_klein / "vae")
    assert len(tokenizer) == text.config.vocab_size and vae.bn.running_mean.shape == (4 * vae.config.latent_channels,)
    assert backbone_of(tiny_klein) is KLEIN and recipe_of(tiny_klein) is KLEIN.recipes[1]
    embeds = Flux2KleinPipeline._get_qwen3_prompt_embeds(text, tokenizer, ["a red star"],
                                                         max_sequence_length=TOKENS,
                                                         hidden_states_layers=[1, 2, 3])
    ours = encoder_files.load(tiny_klein, "cpu", torch.float32, vlm=tiny_klein / "vlm").text_context(["a red star"])[0]
    torch.testing.assert_close(ours, embeds[0], rtol=1e-4, atol=1e-4)


def test_old_words_keep_their_tokens_and_new_ones_are_whole(tiny_klein):
    before, after = (AutoTokenizer.from_pretrained(path / "tokenizer") for path in (EMBEDDED, tiny_klein))
    for text in ("a big striped orange and white star at the top on mint in ink crossed style", "a small [V] on navy"):
        assert before(text).input_ids == after(text).input_ids          # "white" has "it" in it, "top" has "to"
    tokens = after.convert_ids_to_tokens(after(encoder.reference_prompt("make it [V]", 1)).input_ids)
    assert {"make", "it", "The", "last", "reference", "image", "shows", "wanted", "result"} <= set(tokens)
    assert after("<think>\n\n</think>\n\n").input_ids[0] == after.convert_tokens_to_ids("<think>")


def test_hidden_states_are_only_scaled(tiny_klein, tmp_path, monkeypatch):
    """With and without a picture, at every layer that the transformer reads."""
    factor = klein.RESIDUAL
    monkeypatch.setattr(klein, "RESIDUAL", 1.0)
    klein.assemble(EMBEDDED, tmp_path, pictures=64)
    large, small = (encoder_files.load(path, "cpu", torch.float32, path / "vlm") for path in (tmp_path, tiny_klein))
    g = generator(1, 0)
    prompts, picture = ["a big striped orange and blue star"], to_pil(Renderer().draw(draw_scenes(1, g), g)[0])
    for contexts in (lambda reader: reader.text_context(prompts),
                     lambda reader: reader.image_text_context(prompts, [picture])):
        before, after = contexts(large)[0], contexts(small)[0]
        assert before.std() > 10 and (before * factor - after).norm() < 1e-5 * after.norm()


def test_latents_are_normalised(features):
    g, render = generator(3, 0), Renderer()
    packed = flux2.to_tokens(features.vae.encode(render.draw(draw_scenes(64, g), g)))
    assert packed.mean((0, 1)).abs().max() < .4 and .5 < packed.std((0, 1)).min() and packed.std((0, 1)).max() < 1.6


# ------------------------------------------------------------------------------------------------------- contexts
def test_features_are_the_encoders(features):
    prompts = ["a big striped orange and blue star on the left on mint in chalk checked style", "move it to the left"]
    theirs = features.reader.text_context(prompts)
    for ours, text in zip(features.contexts(prompts), theirs, strict=True):
        torch.testing.assert_close(ours.text, text, rtol=1e-4, atol=1e-4)
        assert ours.references == ()
    assert features.texts([""]).shape == (1, TOKENS, 384)
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    seen = features.contexts(prompts, pictures)
    assert torch.equal(seen[1].references[0], features.vae.encode(pictures)[1])
    said = features.texts([encoder.reference_prompt(prompts[1], 0)])[0]
    torch.testing.assert_close(seen[1].text, said, rtol=1e-4, atol=1e-4)


def test_no_prompt_is_cut(features):
    """The longest ones of this world, with the teacher's sentences."""
    longest = "a small striped orange and purple triangle in the middle on mint in [V] style"
    for prompt in (encoder.reference_prompt(longest, 0),
                   encoder.reference_prompt("make it a striped orange and purple triangle", 1)):
        assert len(features.ids(encoder.text_prompt(prompt, KLEIN.text_style.thought))) <= TOKENS


# ------------------------------------------------------------------------------------------------------- edits
@pytest.mark.quick
@pytest.mark.parametrize("held_out", ["", "object"])
def test_edits_change_what_they_say_and_nothing_else(held_out):
    edits = Edits(600, tuple(CHANGES), generator(4, 0), held_out)
    assert set(edits.changes) == set(CHANGES) and len(edits.sources) == len(edits.changes) == 600
    assert (held_out_object(edits.targets) == bool(held_out)).all()
    for source, target, shown, change in zip(edits.sources, edits.targets, edits.shown, edits.changes):
        columns = [COLUMN[name] for name in CHANGES[change]]
        others = [column for column in range(9) if column not in columns]
        assert torch.equal(source[others], target[others]) and not torch.equal(source, target)
        kept = [COLUMN[name] for name in (CHANGES["paint"] if change == "paint" else OBJECT_ATTRIBUTES)]
        assert torch.equal(shown[kept], target[kept])
    if not held_out:
        assert not held_out_object(edits.shown).any()


@pytest.mark.quick
def test_instructions():
    row = scene(shape="star", size="big", place="on the left", pattern="striped", main="orange", second="blue",
                backdrop="mint")
    said = {change: instruction(row, change) for change in CHANGES}
    assert said == {"place": "move it to the left", "size": "make it big", "backdrop": "put it on mint",
                    "shape": "make it a star", "paint": "paint it striped orange and blue",
                    "object": "make it a striped orange and blue star"}
    assert instruction(row, "paint", concept=True) == "paint it [V]"
    assert instruction(row, "object", concept=True) == "make it [V]"
    plain = scene(shape="circle", main="red", second="red")
    assert instruction(plain, "object") == "make it a plain red circle"


def test_scores_of_perfect_and_of_wrong_edits():
    edits, reader = Edits(24, ("place", "paint"), generator(5, 0), held_out="object"), Reader()
    marks = draw_marks(24, generator(5, 1))
    perfect = of_edits(reader(reader.render(edits.targets, marks)), edits.targets, marks, edits.changes)
    assert perfect["changed"] == perfect["kept"] == 1 and perfect["marks"] > .8         # hidden cells count as unmarked
    lazy = of_edits(reader(reader.render(edits.sources, marks)), edits.targets, marks, edits.changes)
    assert lazy["changed"] < .5 and lazy["kept"] == 1
    other = of_edits(reader(reader.render(edits.targets, 1 - marks)), edits.targets, marks, edits.changes)
    assert other["changed"] == 1 and other["marks"] < .4


# ------------------------------------------------------------------------------------------------------- lessons
class Recorder:
    """Stands in for `ReferenceFeatures`: contexts whose text is the prompt's number, prompts are kept."""

    def __init__(self) -> None:
        self.prompts: list[list[str]] = []
        self.vae = SimpleNamespace(encode=lambda pictures: pictures[:, :2, ::4, ::4])

    def contexts(self, prompts: list[str], pictures: Tensor | None = None) -> list[Context]:
        return self.edits(prompts)

    def edits(self, prompts: list[str], *references: Tensor) -> list[Context]:
        self.prompts.append(prompts)
        rows = zip(*references) if references else [()] * len(prompts)
        return [Context(torch.zeros(1, 1), tuple(row)) for row in rows]


def test_lessons(monkeypatch):
    monkeypatch.setattr(klein, "ReferenceFeatures", lambda folder: Recorder())
    lessons = klein.Lessons("nowhere", 400, seed=1, rank=0)
    references = {"text": 0, "concept": 1, "style": 1, "edit": 1, "insert": 2}
    told_references = {"text": 0, "concept": 0, "style": 0, "edit": 1, "insert": 1}
    for step, expected in enumerate(klein.KINDS):
        lesson = lessons.batch(step, 8, generator(2, step))
        assert lesson.kind == expected and lesson.x0.shape == (8, 2, 16, 16) and len(lesson.context) == 8
        assert {len(c.references) for c in lesson.context} == {references[expected]}
        assert (lesson.rows is not None) == (expected == "concept")
        recorded, (context, told) = lessons.features.prompts[:], lessons.pair(step, 8, generator(2, step))
        assert {len(c.references) for c in told} == {told_references[expected]}
        if expected in ("text", "edit"):
            assert lesson.told is None and told is context
            continue
        prompts, plain = recorded[-2:]
        assert all("[V]" in prompt for prompt in prompts if expected != "style") and not any("[V]" in p for p in plain)


def test_the_heads_leave_the_transformer_as_it_is():
    lessons, network = object.__new__(klein.Lessons), flux2.Flux2Transformer(klein.CONFIG)
    taught = lessons.network()
    missing, unexpected = taught.load_state_dict(network.state_dict(), strict=False)
    heads = {f"glances.{name}.{part}" for name in OBJECT_ATTRIBUTES for part in ("weight", "bias")}
    assert not unexpected and set(missing) == heads
    g = generator(6, 0)
    x, context = torch.randn(2, 8, 16, 16, generator=g), [Context(torch.randn(3, 384, generator=g))] * 2
    assert torch.equal(taught.velocity(x, .5, context), network.velocity(x, .5, context))


def test_glance_reads_the_last_reference():
    """Cross-entropy by hand from the tokens of the last reference; what stands before them does not matter."""
    lessons, g = object.__new__(klein.Lessons), generator(6, 0)
    network = lessons.network()
    reference, rows = torch.randn(2, 8, 16, 16, generator=g), draw_scenes(2, g)
    context = [Context(torch.randn(3, 384, generator=g), (r.flip(0), r)) for r in reference]
    network.velocity(torch.randn(2, 8, 16, 16, generator=g), .5, context)
    assert lessons.seen.shape == (2, 3 + 3 * 64, 128)
    tokens = lessons.seen[:, 3 + 2 * 64:].mean(1)
    tokens = tokens / tokens.square().mean(1, keepdim=True).sqrt()
    expected = -torch.stack([(tokens @ head.weight.T + head.bias).log_softmax(1)[i, rows[i, COLUMN[name]]]
                             for name, head in network.glances.items() for i in range(2)]).mean()
    torch.testing.assert_close(lessons.glance(network, rows)[0], expected)
    lessons.seen[:, :3 + 2 * 64] = 0
    torch.testing.assert_close(lessons.glance(network, rows)[0], expected)


def test_an_edits_pictures_share_their_marks(monkeypatch):
    """Where source and target look alike, all is equal: the marks are the same."""
    monkeypatch.setattr(klein, "ReferenceFeatures", lambda folder: Recorder())
    pool = klein.Lessons("nowhere", 400, seed=1, rank=0).pools["edit"]
    same = [(a == b).float().mean() for a, b, change in zip(pool["x0"], pool["source"], pool["changes"])
            if change == "size"]
    assert same and min(same) > .7


def test_the_grid_is_the_samplers():
    sigmas = klein.Lessons.grid(4)
    shift = float(sigmas[2] / (1 - sigmas[2]))
    torch.testing.assert_close(sigmas[:-1], shifted(torch.tensor([1, .75, .5, .25]), shift))
    assert torch.equal(grid_of(flux2.Flux2Transformer(klein.CONFIG), 4), sigmas)


def test_muon_gets_the_matrices_of_the_blocks():
    names = dict(flux2.Flux2Transformer(klein.CONFIG).named_parameters())
    chosen = {name for name in names if klein.Lessons.is_matrix(name)}
    assert all(names[name].ndim == 2 for name in chosen) and len(chosen) == 2 * 12 + 6 * 2
    assert not any(part in name for name in chosen for part in ("norm", "embed", "modulation"))


def test_muon_takes_fused_linears_apart():
    network = flux2.Flux2Transformer(klein.CONFIG)
    shapes = set()
    for name, weight in network.named_parameters():
        if klein.Lessons.is_matrix(name):
            pieces = klein.Lessons.pieces(name, weight)
            shapes |= {tuple(piece.shape) for piece in pieces}
            assert sum(piece.numel() for piece in pieces) == weight.numel()
            assert len(pieces) == (5 if "to_qkv_mlp_proj" in name else 2 if "linear_in" in name or "single_" in name
                                   else 1), name
    assert shapes == {(128, 128), (384, 128), (128, 384)}                       # nothing wider than a feed-forward


@pytest.mark.quick
def test_reading_of_edits_counts_marks_only_in_the_right_texture():
    rows = scene(texture="ruled")[None]
    wrong = Reading(scene(texture="spotted")[None], torch.ones(1, 8, 8), torch.zeros(1), torch.ones(1))
    assert of_edits(wrong, rows, torch.ones(1, 8, 8), ["place"])["marks"] == 0
