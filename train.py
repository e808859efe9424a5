"""D-OPSD: teach a step-distilled diffusion model a new concept from a few images, and keep its few steps.

    python train.py --data examples/star                               # the embedded model, on a laptop
    python train.py --data DIR --model Tongyi-MAI/Z-Image-Turbo        # the real one, on a CUDA GPU

arXiv 2605.05204, Section 3. For every batch the student walks the few-step sampler from pure noise (rollout.py, Eq. 3).
At each state it visits, the EMA teacher, shown the target image (encoder.py, Eq. 4), says which velocity it would take
(Eq. 6), and the student learns that velocity (loss.py, Eq. 7). Then one optimizer step and one EMA step (lora.py).
`dopsd_step` below is the method; the rest of this file is set-up, logging, saving and resuming.

Differs from the official code:
1. Backward at every state instead of once per rollout: the same gradient with one graph alive.
2. Latents and contexts are encoded once and cached; VAE and encoders are freed before the transformer is loaded.
3. Both losses: the paper's (`--loss v`) and the released code's (`--loss x0`).
4. `--resume` continues bit for bit (on CUDA up to the rounding of attention's backward, which adds in no fixed order):
   batches and noise are functions of (seed, step).
5. Panels use the same noise every time, and the first one is drawn before step 1.
"""
import dataclasses
import hashlib
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
import encoder
import files
import lora
import loss as objectives
import model as transformer
import vae as autoencoder
from files import InputError, read_json
from options import (Interrupt, Recipe, check_seed, device_and_dtype, fill, model_folder, option, parse,
                     peak_memory_gb, provenance, recipe_of, run as run_program, vlm_of)
from rollout import rollout, sample, scheduler_shift, sigma_grid
from sample import Panels, pixels_per_patch

METHODS = {  # name -> whether it has a teacher that is shown the target image
    "dopsd": True,          # the student's own states (on-policy), the teacher's velocities: the paper
    "off-policy": True,     # the teacher's states, the teacher's velocities
    "sft-teacher": True,    # flow matching on pictures that the teacher samples
    "sft": False,           # flow matching on the target images: vanilla fine-tuning
    "pso": False,           # the target images preferred to the model's own samples (arXiv 2410.03190)
}
Model = transformer.ZImageTransformer  # the loop needs its `velocity`, lora.py its `lora_names`


@dataclass
class Options:
    """None means: the value of the checkpoint's recipe in options.py."""
    data: str = option(dataclasses.MISSING, "folder with images and captions (see README), or a .jsonl file")
    model: str = option("embedded", "checkpoint folder in diffusers layout, hub id, or embedded: tiny/model")
    vlm: str | None = option(None, "Qwen3-VL folder or hub id for the teacher's context")
    out: str | None = option(None, "folder of the run; default out/<name of the data>")
    method: str = option("dopsd", "dopsd, or a method that it is compared with", choices=tuple(METHODS))
    loss: str | None = option(None, "v: Eq. 7 of the paper; x0: the released code", choices=tuple(objectives.LOSSES))
    steps: int | None = option(None, "optimizer steps")
    lr: float | None = option(None, "learning rate of AdamW, constant")
    rank: int | None = option(None, "rank of the LoRA")
    alpha: int | None = option(None, "the LoRA is scaled by alpha / rank")
    rollout_steps: int | None = option(None, "K: solver steps of the student's rollout")
    grad_states: int | None = option(None, "learn at n of the K states, drawn anew for every batch (default: all)")
    teacher: str = option("ema", "the teacher's weights: ema of the student's, a live copy, or the base model's",
                          choices=("ema", "copy", "base"))
    ema: float | None = option(None, "m of the teacher: theta_bar <- m theta_bar + (1 - m) theta")
    beta: float = option(100.0, "of --method pso: how sharply it tells the pair apart")
    batch_size: int | None = option(None, "images per forward pass")
    accumulate: int | None = option(None, "forward passes per optimizer step")
    size: int | None = option(None, "side of the square training picture in pixels; other shapes have about its area")
    seed: int = option(0, "of LoRA, batch order, captions and noise")
    panel_prompt: list[str] = option([], "a further row of the panels; the teacher sees the first image; repeatable")
    sample_every: int | None = option(None, "optimizer steps between panels; 0: none")
    save_every: int | None = option(None, "optimizer steps between saves")
    resume: bool = option(False, "continue the run in --out as if it had never stopped")
    teacher_rope: str = option("vlm", "rotary base of the teacher's language model: vlm (official) or text",
                               choices=("vlm", "text"))
    checkpointing: bool | None = option(None, "recompute blocks in the backward pass: less memory, more time")
    compile: bool = option(False, "torch.compile the transformer's block")
    cache: str | None = option(None, "folder of cached latents and contexts; default <out>/cache")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA when there is one")
    dtype: str = option("auto", "of the frozen networks; auto is bfloat16 on CUDA",
                        choices=("auto", "float32", "bfloat16"))


# Options that may differ when a run is resumed: they change the rounding at most.
FREE = ("out", "steps", "save_every", "sample_every", "resume", "panel_prompt", "cache", "compile", "checkpointing",
        "device")
STATE = "state.safetensors"


# ------------------------------------------------------------------------------------------------------- set-up
def check_values(cfg: Options) -> None:
    """Raises InputError on numbers that cannot work; None is left for the recipe."""
    for name, least in (("steps", 1), ("rollout_steps", 1), ("batch_size", 1), ("accumulate", 1), ("rank", 1),
                        ("alpha", 1), ("save_every", 1), ("sample_every", 0), ("lr", 0), ("grad_states", 1),
                        ("beta", 0)):
        value, flag = getattr(cfg, name), "--" + name.replace("_", "-")
        if value is not None and (not value >= least or not math.isfinite(value)):
            raise InputError(f"{flag} {value}: not a usable number; give {least} or more")
    if cfg.ema is not None and not 0 <= cfg.ema <= 1:
        raise InputError(f"--ema {cfg.ema}: not a fraction; give a number in [0, 1], the paper has 0.9999")
    if cfg.grad_states is not None and cfg.method != "dopsd":
        raise InputError(f"--grad-states {cfg.grad_states}: only for --method dopsd, not {cfg.method}; leave it out")
    check_seed(cfg.seed)


def open_run(cfg: Options, out: Path, fingerprint: str) -> None:
    """Check that `out` can become a run of these options, or is one to resume. Raises InputError; writes nothing."""
    state = out / STATE
    if cfg.resume:
        if not state.is_file():
            raise InputError(f"--resume: {out} holds no run ({STATE} is missing); leave --resume out to start one")
        if not (out / "config.json").is_file():
            raise InputError(f"{out / 'config.json'}: no such file; --resume needs it, restore it or start a new run "
                             "with another --out")
        config = read_json(out / "config.json", "options")
        before = config["options"]
        for name, value in asdict(cfg).items():
            if name not in FREE and before.get(name, value) != value:
                raise InputError(f"--resume: --{name.replace('_', '-')} was {before[name]} and is now {value}; "
                                 "give the same value, or start a new run with another --out")
        if config.get("data") != fingerprint:
            raise InputError(f"--resume: the images or captions in {cfg.data} are not those that this run began with; "
                             "restore them, or start a new run with another --out")
        return
    if state.exists():
        raise InputError(f"--out {out}: holds another run; continue it with --resume, or choose another --out")
    if (out / "config.json").exists() and "options" not in read_json(out / "config.json"):
        raise InputError(f"--out {out}: holds something else (its config.json is not ours); choose another --out")
    files.check_writable(out, f"--out {out}")


# ------------------------------------------------------------------------------------------------------- features
class Features:
    """Everything that VAE and encoders contribute: the data set and the panel's contexts. Both are gone afterwards."""

    def __init__(self, cfg: Options, rows: list[data.Row], folder: Path, recipe: Recipe, out: Path,
                 device: torch.device, dtype: torch.dtype) -> None:
        self.rows = rows
        multiple = pixels_per_patch(folder)
        shapes = data.bucket_shapes(cfg.size, multiple)
        self.vlm = encoder.find_vlm(vlm_of(folder, recipe, cfg.vlm)) if METHODS[cfg.method] else None
        key = "/".join([data.model_key(folder, "vae", "text_encoder", "tokenizer"),
                        data.model_key(self.vlm) if self.vlm else "-", str(dtype), cfg.teacher_rope,
                        str(recipe.image_pixels)])
        keys = [data.content_key(row, data.nearest_shape(row.size, shapes), key) for row in rows]
        self.fingerprint = hashlib.sha256(" ".join(keys).encode()).hexdigest()
        open_run(cfg, out, self.fingerprint)                            # nothing is written before this line
        cache = Path(cfg.cache) if cfg.cache else out / "cache"
        prompts = self.panel_rows(cfg, recipe)
        panel_key = hashlib.sha256(f"{key}{prompts}{keys[:2]}".encode()).hexdigest()[:40]
        panel_file = cache / f"panel-{panel_key}.safetensors"

        def load_encoder() -> encoder.Encoder:
            reader = encoder.load(folder, device, dtype, self.vlm, recipe.image_pixels, cfg.teacher_rope)
            self.encode_panel(reader, prompts, shapes, panel_file)      # while it is in memory
            return reader

        examples = data.prepare(self.rows, cfg.size, multiple, cache, key, lambda: autoencoder.load(folder, device),
                                load_encoder, want_teacher=self.vlm is not None, device=device)
        self.dataset = data.Dataset(examples, cfg.batch_size, cfg.seed)
        if files.read_tensors(panel_file) is None:
            load_encoder()
            data.free()
        contexts = files.read_tensors(panel_file)
        self.prompts = [prompt for prompt, _ in prompts]
        self.targets = [None if index is None else examples[index].target() for _, index in prompts]
        self.student = [contexts[f"student.{i}"] for i in range(len(prompts))]
        self.teacher = [contexts.get(f"teacher.{i}", contexts[f"student.{i}"]) for i in range(len(prompts))]

    def panel_rows(self, cfg: Options, recipe: Recipe) -> list[tuple[str, int | None]]:
        """(prompt, image that the teacher is shown): two training pairs, new prompts, one unrelated prompt."""
        pairs, first = [(row.captions[0], i) for i, row in enumerate(self.rows[:2])], self.rows[0].captions[0]
        new = [recipe.new_style if "[V] style" in first else recipe.new_object] if "[V]" in first else []
        return pairs + [(prompt, 0) for prompt in new + cfg.panel_prompt] + [(recipe.unrelated, None)]

    def encode_panel(self, reader: encoder.Encoder, prompts: list[tuple[str, int | None]], shapes: list[data.Shape],
                     path: Path) -> None:
        """Contexts of the panel's prompts, "student.i" and "teacher.i", into a file."""
        contexts = {f"student.{i}": c for i, c in enumerate(reader.text_context([prompt for prompt, _ in prompts]))}
        shown = [(i, prompt, self.rows[index]) for i, (prompt, index) in enumerate(prompts) if index is not None]
        if self.vlm:
            crops = [data.crop(data.open_image(row.image), data.nearest_shape(row.size, shapes))
                     for _, _, row in shown]
            features = reader.image_text_context([prompt for _, prompt, _ in shown], crops)
            contexts |= {f"teacher.{i}": c for (i, _, _), c in zip(shown, features)}
        files.write_tensors(path, {name: c.cpu().clone() for name, c in contexts.items()})


# ------------------------------------------------------------------------------------------------------- the run
class Run:
    """Student, teacher, optimizer and their files: what one optimizer step changes, and nothing else."""

    def __init__(self, cfg: Options, out: Path, model: Model) -> None:
        self.cfg, self.out, self.step = cfg, out, 0
        self.device = next(model.parameters()).device
        self.student = lora.create(model, cfg.rank, cfg.alpha, cfg.seed)
        self.teacher = lora.copy(self.student)                          # theta_bar starts as theta
        self.parameters = self.student.tensors()
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=cfg.lr, betas=(0.9, 0.999), eps=1e-8,
                                           weight_decay=0.0)

    def save(self) -> None:
        """The adapters for other programs, then one file from which `load` continues; each whole or not at all."""
        state = {f"student.{name}": tensor for name, tensor in self.parameters.items()}
        state |= {f"teacher.{name}": tensor for name, tensor in self.teacher.tensors().items()}
        for name, parameter in self.parameters.items():
            state |= {f"adam.{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        facts = {"method": self.cfg.method, "base": Path(self.cfg.model).name, "step": str(self.step)}
        lora.save(self.student, self.out / "student.safetensors", facts)
        if METHODS[self.cfg.method]:
            lora.save(self.teacher, self.out / "teacher.safetensors", facts)
        files.write_tensors(self.out / STATE, state, {"step": str(self.step)})

    def load(self) -> None:
        """Continue from the state file. Raises InputError when it does not belong to these options."""
        path = self.out / STATE
        with files.open_safetensors(path) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            self.step = int((file.metadata() or {}).get("step", 0))
        for adapter, side in ((self.student, "student."), (self.teacher, "teacher.")):
            adapter.load_tensors({n.removeprefix(side): t for n, t in state.items() if n.startswith(side)})
        for name, parameter in self.parameters.items():
            prefix = f"adam.{name}."
            moments = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
            self.optimizer.state[parameter] = {key: value if key == "step" else value.to(parameter.device)
                                               for key, value in moments.items()}


class Sides:
    """Student and teacher on one batch: their contexts on the device, and the velocities that the methods ask for."""

    def __init__(self, run: Run, model: Model, batch: data.Batch) -> None:
        self.run, self.model, self.latents = run, model, batch.latents.to(run.device)
        self.student_context = [c.to(run.device) for c in batch.student_context]    # c_s = f_text(y), Eq. 4
        self.teacher_context = [c.to(run.device) for c in batch.teacher_context]    # c_t = f_mm(y, x0), Eq. 4

    def noise(self, rng: torch.Generator) -> Tensor:
        """(B, C, H, W): x at sigma = 1."""
        return torch.randn(self.latents.shape, generator=rng).to(self.run.device)

    def student(self, x: Tensor, sigma: float | Tensor) -> Tensor:                  # Eq. 5
        return self.model.velocity(x, sigma, self.student_context, self.run.student)

    @torch.no_grad()
    def teacher(self, x: Tensor, sigma: float | Tensor) -> Tensor:                  # Eq. 6
        return self.model.velocity(x, sigma, self.teacher_context, self.run.teacher)

    def untuned(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return self.model.velocity(x, sigma, self.student_context)


def dopsd_step(cfg: Options, sides: Sides, sigmas: Tensor, rng: torch.Generator) -> float:
    """Add the gradient of Eq. 7 for one batch to the student's; returns the loss. rng: of noise and learned states.

    The latents give the shape only: x0 itself reaches the student through the teacher's context.
    """
    x, steps, total = sides.noise(rng), len(sigmas) - 1, 0.0
    learned = set(torch.randperm(steps, generator=rng)[:cfg.grad_states or steps].tolist())
    for point in rollout(sides.student, x, sigmas, learned):                        # Eq. 3: the student's own states
        v_teacher = sides.teacher(point.x, point.sigma)                             # Eq. 6: the teacher, same state
        if cfg.method == "off-policy":
            point.follow(v_teacher)                                                 # else the teacher's own states
        loss = objectives.dopsd(point, v_teacher, cfg.loss) / len(learned)          # Eq. 7: mean over the K states
        (loss / cfg.accumulate).backward()                                          # one graph alive at a time
        total += loss.item()
    return total


def sft_step(cfg: Options, sides: Sides, sigmas: Tensor, shift: float, rng: torch.Generator) -> float:
    """Add the gradient of flow matching for one batch to the student's; returns the loss."""
    x0 = sample(sides.teacher, sides.noise(rng), sigmas) if cfg.method == "sft-teacher" else sides.latents
    eps, sigma = sides.noise(rng), objectives.draw_sigma(rng, shift, len(x0)).to(x0.device)
    loss = objectives.sft(sides.student, x0, eps, sigma)
    (loss / cfg.accumulate).backward()
    return loss.item()


def pso_step(cfg: Options, sides: Sides, sigmas: Tensor, rng: torch.Generator) -> float:
    """Add the gradient of pairwise sample optimization for one batch to the student's; returns the loss."""
    own = sample(sides.student, sides.noise(rng), sigmas)                           # what the model draws by now
    k = torch.randint(len(sigmas) - 1, (len(own),), generator=rng)                  # noise levels of its own sampler
    loss = objectives.pso(sides.student, sides.untuned, sides.latents, own, sides.noise(rng),
                          sigmas[k].to(own.device), cfg.beta)
    (loss / cfg.accumulate).backward()
    return loss.item()


def draw_panel(cfg: Options, run: Run, panels: Panels) -> None:
    """samples/step_N.png of the current step."""
    note = f"{cfg.method}, step {run.step} of {cfg.steps}"
    panels.draw(run.out / "samples" / f"step_{run.step:06d}.png", note, run.student,
                run.teacher if METHODS[cfg.method] else None)


def gradient_of_step(cfg: Options, model: Model, run: Run, dataset: data.Dataset, scheduler: dict) -> float:
    """The gradient of one optimizer step, from `cfg.accumulate` batches; returns the mean loss."""
    sigmas, shift, total = sigma_grid(scheduler, cfg.rollout_steps), scheduler_shift(scheduler), 0.0
    for number in range(run.step * cfg.accumulate, (run.step + 1) * cfg.accumulate):
        sides, rng = Sides(run, model, dataset.batch(number)), data.generator(cfg.seed, "noise", number)
        if cfg.method in ("dopsd", "off-policy"):
            total += dopsd_step(cfg, sides, sigmas, rng)
        elif cfg.method == "pso":
            total += pso_step(cfg, sides, sigmas, rng)
        else:
            total += sft_step(cfg, sides, sigmas, shift, rng)
    return total / cfg.accumulate


def train(cfg: Options, model: Model, run: Run, dataset: data.Dataset, panels: Panels, scheduler: dict) -> int:
    """The loop; returns the exit status. Leaves a saved state behind whichever way it ends."""
    if cfg.sample_every and run.step in (0, cfg.steps):
        draw_panel(cfg, run, panels)                                    # at 0: can the teacher draw the concept at all?
    metrics, decay = run.out / "metrics.jsonl", {"ema": cfg.ema, "copy": 0.0, "base": 1.0}[cfg.teacher]
    bar = tqdm(range(run.step, cfg.steps), initial=run.step, total=cfg.steps, disable=None)
    with Interrupt() as interrupt:
        for _ in bar:
            started = time.time()
            run.optimizer.zero_grad(set_to_none=True)
            try:
                loss = gradient_of_step(cfg, model, run, dataset, scheduler)
            except torch.OutOfMemoryError:
                run.save()                                              # a resumed run may use --checkpointing
                raise
            norm = float(torch.nn.utils.clip_grad_norm_(run.student.parameters(), 1.0))
            if not math.isfinite(loss) or not math.isfinite(norm):
                run.save()                                              # nothing was updated: the last good state
                raise InputError(f"step {run.step + 1}: loss {loss}, gradient norm {norm}; the state before it is in "
                                 f"{run.out}; start anew with another --out and a smaller --lr or --dtype float32")
            run.optimizer.step()
            lora.ema_(run.teacher, run.student, decay)                  # theta_bar <- m theta_bar + (1 - m) theta
            run.step += 1
            seconds, memory = time.time() - started, peak_memory_gb(run.device)
            files.append_json_line(metrics, {"step": run.step, "loss": loss, "gradient_norm": norm, "seconds": seconds,
                                             "peak_memory_gb": memory})
            bar.set_postfix_str(f"loss {loss:.4f}, grad {norm:.3f}, {seconds:.2f} s/step, {memory:.2f} GB")
            done = run.step == cfg.steps or interrupt.asked
            if done or run.step % cfg.save_every == 0:
                run.save()
            if interrupt.asked:
                print(f"interrupted: step {run.step} is saved in {run.out}; --resume continues", file=sys.stderr)
                return 130
            if cfg.sample_every and (done or run.step % cfg.sample_every == 0):
                draw_panel(cfg, run, panels)
    return 0


def print_summary(cfg: Options, recipe: Recipe, folder: Path, run: Run, dataset: data.Dataset, dtype) -> None:
    """What the run is about to do."""
    shown = ("method", "loss", "rollout_steps", "lr", "rank", "alpha", "ema", "batch_size", "accumulate")
    trained = sum(tensor.numel() for tensor in run.parameters.values())
    buckets = ", ".join(f"{count} of {width}x{height}" for (height, width), count in dataset.buckets.items())
    print(f"model    {folder} on {run.device}, {str(dtype).removeprefix('torch.')}")
    print(f"recipe   {recipe.name}: {', '.join(f'{name} {getattr(cfg, name)}' for name in shown)}")
    print(f"trained  {trained:,} LoRA parameters in {len(run.student.weights)} layers")
    print(f"images   {len(dataset.examples)}: {buckets}")
    print(f"steps    {run.step} -> {cfg.steps}, run in {run.out}", flush=True)


def main(argv: list[str] | None = None) -> int:
    cfg = parse(Options, argv, "D-OPSD: teach a step-distilled diffusion model a new concept from a few images.")
    check_values(cfg)
    device, dtype = device_and_dtype(cfg.device, cfg.dtype)
    rows = data.read_folder(cfg.data)                                   # before anything large is downloaded
    folder = model_folder(cfg.model)
    recipe = recipe_of(folder)
    cfg = dataclasses.replace(fill(cfg, recipe), dtype=str(dtype).removeprefix("torch."))
    if (cfg.grad_states or 1) > cfg.rollout_steps:
        raise InputError(f"--grad-states {cfg.grad_states}: the rollout has {cfg.rollout_steps} states; give 1 to "
                         f"{cfg.rollout_steps}")
    source = Path(cfg.data).resolve()
    out = Path(cfg.out or Path("out") / (source.stem if source.is_file() else source.name))
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    sigmas = sigma_grid(scheduler, recipe.inference_steps)

    transformer.check(folder)                                           # before anything is encoded and written
    features = Features(cfg, rows, folder, recipe, out, device, dtype)  # loads VAE and encoders, and frees them
    model = transformer.load(folder, device, dtype, cfg.checkpointing, cfg.compile)
    run = Run(cfg, out, model)
    if cfg.resume:
        run.load()
    files.keep_json_lines(out / "metrics.jsonl", lambda numbers: numbers["step"] <= run.step)
    files.write_json(out / "config.json", {"recipe": recipe.name, "options": asdict(cfg), "data": features.fingerprint,
                                           **provenance()})
    print_summary(cfg, recipe, folder, run, features.dataset, dtype)
    panels = Panels(folder, model, sigmas, cfg.seed, features.prompts, features.targets, features.student,
                    features.teacher)
    return train(cfg, model, run, features.dataset, panels, scheduler)


if __name__ == "__main__":
    run_program(main)
