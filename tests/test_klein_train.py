"""train.py with a whole FLUX.2-klein checkpoint: numbers of a run against diffusers' networks, files and panels."""
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CAPTIONS, KLEIN_TOKENS, draw_picture, fill_b, learn, metrics, write_pictures
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from PIL import Image, ImageOps
from safetensors import safe_open
from test_flux2 import their_velocity
from test_resume import assert_same_run, press_ctrl_c, saved_step
from test_sample import difference, pixels, tiles_of
from test_train import noise_of, with_adapter

import data
import encoder
import sample
import train
from model import Context
from networks.flux2 import KLEIN
from plumbing import encoder_files, pictures

LAYERS = (1, 2, 3)
# For editing: size of each target, sizes of its sources. 48 x 40 pixels are more than the training pictures' 32 * 32.
EDITS = [((40, 40), [(64, 16)]), ((40, 40), [(24, 40), (32, 32)]), ((40, 40), [(48, 40)]),
         ((40, 40), [(16, 8), (9, 9)])]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("data") / "photos", [(40, 40)] * 4)


@pytest.fixture(scope="module")
def edits(tmp_path_factory) -> Path:
    """Rows with one source and with two, in turn."""
    folder, lines = tmp_path_factory.mktemp("data"), []
    for i, (size, sources) in enumerate(EDITS):
        names = [f"{i}_{j}.png" for j in range(len(sources))]
        for seed, (name, shape) in enumerate(zip([f"{i}.png", *names], [size, *sources])):
            draw_picture(folder / name, shape, 5 * i + seed)
        lines.append({"file_name": f"{i}.png", "text": f"make it {CAPTIONS[i]}",
                      "source": names if len(names) > 1 else names[0]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def base(klein, photos, tmp_path_factory) -> list[str]:
    """Arguments of a short run, for the fixtures `run` and `prepare`."""
    return ["--data", str(photos), "--model", str(klein), "--device", "cpu", "--size", "32", "--rank", "3", "--alpha",
            "6", "--rollout-steps", "2", "--batch-size", "2", "--sample-every", "0", "--lr", "1e-2", "--ema", "0.7",
            "--loss", "v", "--keep", "none", "--cache", str(tmp_path_factory.mktemp("features"))]


@pytest.fixture(scope="module")
def pipeline(klein):
    pipeline = Flux2KleinPipeline.from_pretrained(klein, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---------------------------------------------------------------------------------------------------- by other means
class Theirs:
    """The contexts of a batch by diffusers' networks, from the files of a data set."""

    def __init__(self, pipeline, klein: Path, folder: Path):
        self.pipeline, self.rows = pipeline, data.read_folder(folder)
        self.reader = encoder_files.load(klein, "cpu", torch.float32, klein / "vlm")

    def text(self, prompt: str) -> torch.Tensor:
        return self.pipeline.encode_prompt(prompt, max_sequence_length=KLEIN_TOKENS,
                                           text_encoder_out_layers=LAYERS)[0][0].detach()

    def latents(self, image: Image.Image) -> torch.Tensor:
        with torch.no_grad():
            packed = self.pipeline._encode_vae_image(pictures.to_tensor(image), generator=None)
        return self.pipeline._unpatchify_latents(packed)[0]

    def contexts(self, batch: data.Batch, kind: str) -> tuple[torch.Tensor, list[Context], list[Context]]:
        """Latents, and the contexts of student and teacher (Eq. 4)."""
        x0, students, teachers = [], [], []
        for index, prompt in zip(batch.indices, batch.captions, strict=True):
            row = self.rows[index]
            target = pictures.crop(pictures.open_image(row.image), (32, 32))
            x0.append(self.latents(target))
            sources = tuple(self.latents(pictures.fit(pictures.open_image(path), 8, 32 * 32, path))
                            for path in row.sources)
            students.append(Context(self.text(prompt), sources))
            if kind == "vlm":
                teachers.append(Context(self.reader.image_text_context([prompt], [target])[0], sources))
            else:
                text = self.text(encoder.reference_prompt(prompt, len(sources)))
                teachers.append(Context(text, (*sources, x0[-1])))
        return torch.stack(x0), students, teachers

    def velocity(self, x, sigma, context):
        return their_velocity(self.pipeline.transformer, x, sigma, context)


def grid(steps: int) -> list[float]:
    """The pipeline's noise levels for 32x32 pixels: 8x8 latents, 16 tokens."""
    mu = compute_empirical_mu(16, steps)
    return [math.exp(mu) / (math.exp(mu) + 1 / u - 1) for u in np.linspace(1, 1 / steps, steps)] + [0.0]


def equation_7(student, teacher, contexts, x, steps: int, kind: str) -> torch.Tensor:
    """One graph through all states, which are constants. student, teacher: (x, sigma, context) -> v."""
    terms = []
    for sigma, following in zip(grid(steps), grid(steps)[1:]):
        v, goal = student(x, sigma, contexts[0]), teacher(x, sigma, contexts[1]).detach()
        terms.append((sigma ** 2 if kind == "x0" else 1) * ((v - goal) ** 2).mean())
        x = (x + (following - sigma) * v).detach()
    return sum(terms) / len(terms)


# ---------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("name, context, kind, steps", [
    ("photos", "reference", "v", 4), ("photos", "vlm", "x0", 2), ("edits", "reference", "x0", 3),
    ("edits", "vlm", "v", 1)])
def test_first_loss_is_that_of_diffusers(run, prepare, pipeline, klein, request, name, context, kind, steps):
    """Two batches of two: with `edits`, one of rows with one source and one of rows with two."""
    folder = request.getfixturevalue(name)
    flags = ("--data", folder, "--loss", kind, "--rollout-steps", steps, "--accumulate", 2, "--seed", 4, "--steps", 1)
    flags += ("--teacher-context", "vlm") if context == "vlm" else ()                # else klein's default
    theirs, dataset, losses, sources = Theirs(pipeline, klein, folder), prepare(*flags).dataset, [], set()
    for number in range(2):
        batch = dataset.batch(number)
        x0, *contexts = theirs.contexts(batch, context)
        assert len(x0) == 2 and torch.allclose(x0, batch.latents, atol=1e-4)
        sources.update(len(c.references) for c in contexts[0])
        x = noise_of(batch, 4, number)
        losses.append(equation_7(theirs.velocity, theirs.velocity, contexts, x, steps, kind).item())
    assert sources == ({1, 2} if name == "edits" else {0}) and min(losses) > 1e-3
    assert metrics(run("real", *flags))[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)


@pytest.mark.parametrize("context", ["reference", "vlm"])
def test_gradient_reaches_every_block(prepare, pipeline, klein, edits, context):
    parts = prepare("--data", edits, "--teacher-context", context, "--checkpointing")
    student, teacher = fill_b(parts.run.tuned.theta, seed=1), fill_b(parts.run.tuned.theta_bar, seed=2)
    batch = parts.dataset.batch(0)
    value = learn(parts)
    _, *contexts = Theirs(pipeline, klein, edits).contexts(batch, context)
    parts.model.checkpointing = False
    whole = equation_7(with_adapter(parts.model, student), with_adapter(parts.model, teacher), contexts,
                       noise_of(batch, 0, 0), 2, "v")
    assert value == pytest.approx(whole.item(), rel=1e-4)
    assert {name.rsplit(".attn", 1)[0].rsplit(".ff", 1)[0] for name in student.weights} == set(parts.model.blocks())
    for (name, tensor), gradient in zip(student.tensors().items(), torch.autograd.grad(whole, student.parameters())):
        assert gradient.norm() > 1e-5 and (tensor.grad - gradient).norm() < 1e-3 * gradient.norm(), name


@pytest.mark.parametrize("name", ["photos", "edits"])
def test_first_loss_of_sft(run, prepare, pipeline, klein, request, name):
    folder = request.getfixturevalue(name)
    flags = ("--data", folder, "--method", "sft", "--steps", 1, "--seed", 9)
    batch, rng = prepare(*flags).dataset.batch(0), data.generator(9, "noise", 0)
    theirs = Theirs(pipeline, klein, folder)
    x0, context, _ = theirs.contexts(batch, "reference")
    eps, u = torch.randn(x0.shape, generator=rng), 1 - torch.rand(2, generator=rng)
    sigma = 1 / (1 + math.exp(-compute_empirical_mu(16, 2)) * (1 / u - 1))
    s = sigma.view(-1, 1, 1, 1)
    loss = ((theirs.velocity((1 - s) * x0 + s * eps, sigma, context) - (eps - x0)) ** 2).mean()
    assert metrics(run("real", *flags))[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("method", ["off-policy", "sft-teacher", "pso"])
def test_the_other_methods_train(run, edits, method):
    out = run("real", "--data", edits, "--method", method, "--steps", 2)
    losses = [line["loss"] for line in metrics(out)]
    assert all(0 < loss < math.inf for loss in losses) and losses[0] != losses[1]
    assert (out / "teacher.safetensors").exists() == train.METHODS[method].has_teacher
    if method == "pso":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)                      # the student is the reference


@pytest.mark.parametrize("has_sources", [False, True])
def test_keep_beside_an_edit(prepare, edits, tmp_path, has_sources):
    """Kept captions draw a picture, or edit sources of their own; the untuned model teaches what it would do itself."""
    source = {"source": str(edits / "0_0.png")} if has_sources else {}
    (tmp_path / "keep.jsonl").write_text(json.dumps({"text": "paint it green", **source}) + "\n")
    parts = prepare("--data", edits, "--keep", tmp_path / "keep.jsonl")
    fill_b(parts.run.tuned.theta, seed=1)
    kept = parts.tasks[1]
    (context,), given = kept.dataset.batch(0).student_context, train.bind(parts.cfg, parts.run.tuned, kept, 0,
                                                                         parts.shift_of)
    assert len(context.references) == has_sources
    untuned = parts.model.velocity(given["x"], 0.9, [context])
    assert torch.equal(given["teacher"](given["x"], 0.9), untuned)
    assert not torch.allclose(given["student"](given["x"], 0.9), untuned)
    assert train.gradient_of_step(parts.cfg, parts.run, parts.tasks, parts.shift_of)["keep"] > 0


# ---------------------------------------------------------------------------------------------------- files
def test_interrupted_and_resumed_equals_uninterrupted(run, edits, monkeypatch):
    flags = ("--data", edits, "--steps", 4, "--accumulate", 2)
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, times=1, call=5)                                         # the first state of step 2
        out = run("stopped", *flags, status=130)
    assert saved_step(out) == 2
    run("stopped", *flags, "--resume")
    assert_same_run(out, run("whole", *flags))
    assert json.loads((out / "config.json").read_text())["options"]["teacher_context"] == "reference"


def test_student_loads_in_the_pipeline(run, klein, pipeline, tmp_path):
    out, pictures = run("real", "--steps", 3), {}
    words = ["--model", klein, "--prompt", "a red star", "--seed", "3", "--height", "32", "--width", "32",
             "--device", "cpu", "--out", tmp_path / "picture.png"]
    for name, flags in {"base": [], "student": ["--lora", out / "student.safetensors"]}.items():
        sample.main([str(word) for word in (*words, *flags)])
        pictures[name] = pixels(tmp_path / "picture.png")
    assert difference(pictures["base"], pictures["student"]) > 10
    pipeline.load_lora_weights(out / "student.safetensors")
    try:
        theirs = pipeline(prompt="a red star", height=32, width=32, num_inference_steps=4, guidance_scale=1.0,
                          generator=torch.Generator().manual_seed(3), max_sequence_length=KLEIN_TOKENS,
                          text_encoder_out_layers=LAYERS).images[0]
    finally:
        pipeline.unload_lora_weights()
    assert difference(pictures["student"], np.asarray(theirs).astype(int)) <= 2
    with safe_open(str(out / "student.safetensors"), "pt") as file:
        assert {key.split(".")[1] for key in file.keys()} == {"transformer_blocks", "single_transformer_blocks"}


def test_reference_needs_no_vlm(run, klein, tmp_path):
    shutil.copytree(klein, tmp_path / "model", ignore=shutil.ignore_patterns("vlm"))
    out = run("real", "--model", tmp_path / "model", "--steps", 1, "--sample-every", 1, "--cache", tmp_path / "cache")
    assert pixels(out / "samples" / "step_000001.png").shape[1] == 190 + 4 * 166     # nothing was edited: no source


def test_summary_and_recipe(run, edits, capsys):
    config = json.loads((run("real", "--data", edits, "--steps", 1) / "config.json").read_text())
    assert config["recipe"] == KLEIN.recipes[1].name and config["options"]["teacher_context"] == "reference"
    shown = capsys.readouterr().out
    for word in ("2 of 32x32 with 1 source(s)", "2 of 32x32 with 2 source(s)", KLEIN.recipes[1].name, "56 layers"):
        assert word.replace("56", str(2 * 12 + 2 * 2)) in shown


# ---------------------------------------------------------------------------------------------------- panels
@pytest.mark.parametrize("context", ["reference", "vlm"])
def test_panel_cells_are_what_sample_draws(run, klein, edits, tmp_path, context):
    out = run("real", "--data", edits, "--steps", 3, "--sample-every", 3, "--seed", 6, "--teacher-context", context,
              "--panel-prompt", "paint it green")
    shapes = [(32, 32), (32, 32), (32, 32), (40, 24), (32, 32)]                      # the new source is 24 x 40
    first, last = (tiles_of(pixels(out / "samples" / f"step_00000{n}.png"), 5, shapes) for n in (0, 3))
    prompts = [f"make it {CAPTIONS[0]}", f"make it {CAPTIONS[1]}", "paint it green", f"make it {CAPTIONS[0]}",
               KLEIN.recipes[1].unrelated]

    def enlarged(image: Image.Image, shape: tuple[int, int]) -> np.ndarray:
        """As in a tile of its row, in the middle of white."""
        return np.asarray(ImageOps.pad(image, (160, 160 * shape[0] // shape[1]), Image.Resampling.NEAREST,
                                       color="white")).astype(int)

    def cell(shape: tuple[int, int], *flags) -> np.ndarray:
        words = ["--model", klein, "--height", shape[0], "--width", shape[1], "--seed", 6, "--device", "cpu", "--out",
                 tmp_path / "cell.png", "--teacher-context", context]
        sample.main([str(word) for word in (*words, *flags)])
        return enlarged(Image.open(tmp_path / "cell.png"), shape)

    for i, (prompt, shape) in enumerate(zip(prompts, shapes, strict=True)):
        source, target, drawn, student, teacher = last[i]
        row = {0: 0, 1: 1, 2: 0}.get(i)                                              # a new prompt is shown the first
        files = [edits / f"{row}_{j}.png" for j in range(len(EDITS[row][1]))] if row is not None else []
        shown = ["--reference", edits / f"{row}.png"] if files else []
        files += [edits / "1_0.png"] if i == 3 else []                               # the source of another caption
        words = ["--prompt", prompt, *(word for file in files for word in ("--source", file))]
        assert difference(first[i][2], drawn) == 0 and difference(first[i][3], drawn) == 0    # B = 0 at the start
        assert difference(cell(shape, *words), drawn) <= 2
        assert difference(cell(shape, *words, "--lora", out / "student.safetensors"), student) <= 2
        assert difference(cell(shape, *words, *shown, "--lora", out / "teacher.safetensors"), teacher) <= 2
        if files:                                                                    # labels stand above
            assert difference(source[20 * (i == 3):], enlarged(Image.open(files[0]), shape)[20 * (i == 3):]) == 0
        if shown:
            crop = pictures.crop(pictures.open_image(edits / f"{row}.png"), (32, 32))
            assert difference(target[20 * (i == 2):], enlarged(crop, shape)[20 * (i == 2):]) == 0
    assert (last[4][0] == 255).all() and (last[3][1] == 255).all() and (last[4][1] == 255).all()  # nothing to edit
    assert difference(last[0][2], last[0][3]) > 2 and difference(first[0][3], first[0][4]) > 2


def alike(folder: Path, edits: Path) -> Path:
    """The rows of `edits` with one source, and one caption for all of them."""
    rows = [{"file_name": str(edits / f"{i}.png"), "text": "make it [V]", "source": str(edits / f"{i}_0.png")}
            for i in (0, 2)]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def test_the_new_source_is_one_that_training_does_not_have(prepare, edits, tmp_path):
    """A kept one, another caption's, or the last as in a mirror; never one that is learned with this caption."""
    one, keep = alike(tmp_path / "alike", edits), tmp_path / "keep.jsonl"
    draw_picture(tmp_path / "kept.png", (40, 24), 7)

    def new(data, *kept) -> tuple[Image.Image, list[str]]:
        keep.write_text("".join(json.dumps({"text": "paint it green", "source": str(path)}) + "\n" for path in kept))
        rows = prepare("--data", data, *(("--keep", keep) if kept else ())).panels.rows
        (row,) = [row for row in rows if row.label == "new for this prompt"]
        assert row.prompt == rows[0].prompt and row.target is None and row.teacher is row.student
        assert len(row.student.references) == 1 and len(rows) == 4 and rows[2] is row
        return row.source, row.shape

    def same(image: Image.Image, other: Image.Image) -> bool:
        return image.size == other.size and image.tobytes() == other.convert("RGB").tobytes()

    first, last = (Image.open(edits / f"{i}_0.png") for i in (0, 2))
    assert same(new(one)[0], ImageOps.mirror(last.convert("RGB"))) and not same(new(one)[0], last)
    assert same(new(one, edits / "0_0.png")[0], ImageOps.mirror(last.convert("RGB")))       # kept, but learned too
    image, shape = new(one, edits / "0_0.png", tmp_path / "kept.png")
    assert same(image, Image.open(tmp_path / "kept.png")) and shape == (24, 40)
    lines = one.read_text().splitlines()
    one.write_text(f"{lines[0]}\n" + lines[1].replace("make it [V]", "another") + "\n")
    assert same(new(one)[0], last) and not same(new(one)[0], first)


def test_the_new_source_is_encoded_again_when_it_changes(prepare, edits, tmp_path):
    """The same path and another picture: its latents are the other's, and training stays what it was."""
    flags = ("--data", alike(tmp_path / "alike", edits), "--keep", tmp_path / "keep.jsonl")
    (tmp_path / "keep.jsonl").write_text(json.dumps({"text": "paint it green", "source": "kept.png"}) + "\n")
    found = []
    for seed in (7, 8, 7):
        draw_picture(tmp_path / "kept.png", (40, 40), seed)
        rows = prepare(*flags).panels.rows
        assert rows[2].label == "new for this prompt"
        found.append(rows[2].student.references[0])
    assert torch.equal(found[0], found[2]) and not torch.allclose(found[0], found[1], atol=0.1)
