"""D-OPSD: teach a step-distilled diffusion model a new concept from a few images, and keep its few steps.

    python train.py --data examples/star                               # the embedded model, on a laptop
    python train.py --data DIR --model Tongyi-MAI/Z-Image-Turbo        # a real one, on a CUDA GPU
    python train.py --data DIR --model black-forest-labs/FLUX.2-klein-4B

arXiv 2605.05204, Section 3. For every batch the student walks the few-step sampler from pure noise (rollout.py, Eq. 3).
At each state it visits, the EMA teacher, shown the target image (features.py, Eq. 4), says which velocity it would take
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
import functools
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
import files
import flux2
import lora
import loss as objectives
import model as transformer
from features import Features
from files import InputError, read_json
from options import (Interrupt, Recipe, backbone_of, check_memory, check_references, check_seed, device_and_dtype, fill,
                     model_folder, option, parse, peak_memory_gb, provenance, recipe_of, run as run_program,
                     warn_undistilled)
from rollout import rollout, sample, time_grid
from sample import Panels, Shift

METHODS = {  # name -> whether it has a teacher that is shown the target image
    "dopsd": True,          # the student's own states (on-policy), the teacher's velocities: the paper
    "off-policy": True,     # the teacher's states, the teacher's velocities
    "sft-teacher": True,    # flow matching on pictures that the teacher samples
    "sft": False,           # flow matching on the target images: vanilla fine-tuning
    "pso": False,           # the target images preferred to the model's own samples (arXiv 2410.03190)
}
Model = transformer.ZImageTransformer | flux2.Flux2Transformer  # the loop needs `velocity`, lora.py `lora_names`


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
    beta: float = option(10.0, "of --method pso: how sharply it tells the pair apart")
    batch_size: int | None = option(None, "images per forward pass")
    accumulate: int | None = option(None, "forward passes per optimizer step")
    size: int | None = option(None, "side of the square training picture in pixels; other shapes have about its area")
    seed: int = option(0, "of LoRA, batch order, captions and noise")
    panel_prompt: list[str] = option([], "a further row of the panels; the teacher sees the first image; repeatable")
    sample_every: int | None = option(None, "optimizer steps between panels; 0: none")
    save_every: int | None = option(None, "optimizer steps between saves")
    resume: bool = option(False, "continue the run in --out as if it had never stopped")
    teacher_context: str | None = option(None, "how the teacher is shown the target: vlm, or as reference (FLUX.2)",
                                         choices=("vlm", "reference"))
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


def gradient_of_step(cfg: Options, model: Model, run: Run, dataset: data.Dataset, shift_of: Shift) -> float:
    """The gradient of one optimizer step, from `cfg.accumulate` batches; returns the mean loss."""
    total = 0.0
    for number in range(run.step * cfg.accumulate, (run.step + 1) * cfg.accumulate):
        sides, rng = Sides(run, model, dataset.batch(number)), data.generator(cfg.seed, "noise", number)
        shift = shift_of(cfg.rollout_steps, *sides.latents.shape[2:])
        sigmas = time_grid(shift, cfg.rollout_steps)
        if cfg.method in ("dopsd", "off-policy"):
            total += dopsd_step(cfg, sides, sigmas, rng)
        elif cfg.method == "pso":
            total += pso_step(cfg, sides, sigmas, rng)
        else:
            total += sft_step(cfg, sides, sigmas, shift, rng)
    return total / cfg.accumulate


def train(cfg: Options, model: Model, run: Run, dataset: data.Dataset, panels: Panels, shift_of: Shift) -> int:
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
                loss = gradient_of_step(cfg, model, run, dataset, shift_of)
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


def print_summary(cfg: Options, recipe: Recipe, folder: Path, run: Run, dataset: data.Dataset, dtype,
                  memory: float) -> None:
    """What the run is about to do; memory: GB of weights."""
    shown = ("method", "loss", "rollout_steps", "lr", "rank", "alpha", "ema", "batch_size", "accumulate")
    trained = sum(tensor.numel() for tensor in run.parameters.values())
    buckets = ", ".join(f"{count} of {width}x{height}" + (f" with {sources} source(s)" if sources else "")
                        for (height, width, sources), count in dataset.buckets.items())
    print(f"model    {folder} on {run.device}, {str(dtype).removeprefix('torch.')}, {memory:.2g} GB of weights at most")
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
    source, backbone = Path(cfg.data).resolve(), backbone_of(folder)
    out = Path(cfg.out or Path("out") / (source.stem if source.is_file() else source.name))
    shift_of = functools.partial(backbone.time_shift, read_json(folder / "scheduler" / "scheduler_config.json"))
    shift_of(cfg.rollout_steps, 2, 2)                                   # refuses schedulers with another grid
    teacher = cfg.teacher_context if METHODS[cfg.method] else ""
    check_references(backbone, teacher, f"source images in {cfg.data}" if any(row.sources for row in rows) else "")
    warn_undistilled(folder)

    backbone.check(folder)                                              # before anything is encoded and written
    memory = check_memory(folder, device, dtype)
    features = Features(cfg, rows, folder, recipe, teacher, device, dtype)
    open_run(cfg, out, features.fingerprint)                            # nothing is written before this line
    features.encode(Path(cfg.cache) if cfg.cache else out / "cache")    # loads VAE and encoders, and frees them
    model = backbone.load(folder, device, dtype, cfg.checkpointing, cfg.compile)
    run = Run(cfg, out, model)
    if cfg.resume:
        run.load()
    files.keep_json_lines(out / "metrics.jsonl", lambda numbers: numbers["step"] <= run.step)
    files.write_json(out / "config.json", {"recipe": recipe.name, "options": asdict(cfg), "data": features.fingerprint,
                                           **provenance()})
    print_summary(cfg, recipe, folder, run, features.dataset, dtype, memory)
    panels = Panels(folder, model, shift_of, recipe.inference_steps, cfg.seed, features.panel)
    return train(cfg, model, run, features.dataset, panels, shift_of)


if __name__ == "__main__":
    run_program(main)
