"""D-OPSD: teach a step-distilled diffusion model a new concept from a few images, and keep its few steps.

    python train.py --data examples/star                               # the embedded model, on a laptop
    python train.py --data DIR --model Tongyi-MAI/Z-Image-Turbo        # a real one, on a CUDA GPU
    python train.py --data DIR --model black-forest-labs/FLUX.2-klein-4B
    python train.py --data A B --teacher-lora a.safetensors b.safetensors   # two adapters into one (arXiv 2605.15055)

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
import lora
import loss as objectives
import model as transformer
from networks import flux2
from plumbing import files
from plumbing.checkpoints import backbone_of, check_references, model_folder, recipe_of, warn_undistilled
from plumbing.features import Features
from plumbing.files import InputError, read_json
from plumbing.machine import check_memory, device_and_dtype, peak_memory_gb
from plumbing.options import check_seed, option, parse
from plumbing.panels import Panels, Shift
from plumbing.program import Interrupt
from plumbing.program import run as run_program
from plumbing.recipes import Recipe, fill
from plumbing.run_folder import STATE, names_of, open_run, provenance
from rollout import rollout, sample, time_grid

METHODS = {  # name -> whether it has a teacher that is shown the target image
    "dopsd": True,          # the student's own states (on-policy), the teacher's velocities: the paper
    "off-policy": True,     # the teacher's states, the teacher's velocities
    "sft-teacher": True,    # flow matching on pictures that the teacher samples
    "sft": False,           # flow matching on the target images: vanilla fine-tuning
    "pso": False,           # the target images preferred to the model's own samples (arXiv 2410.03190)
}
IMAGE = "image"  # in the place of a teacher's file: the run's own teacher, which is shown the target
BASE = "base"    # and the model as it was: its prompts shall stay as they are
Model = transformer.ZImageTransformer | flux2.Flux2Transformer  # the loop needs `velocity`, lora.py `lora_names`


@dataclass
class Options:
    """None means: the value of the checkpoint's recipe in options.py."""
    data: list[str] = option(dataclasses.MISSING, "folder with images and captions (see README), or a .jsonl file; "
                             "several are learned in turns", nargs="+")
    model: str = option("embedded", "checkpoint folder in diffusers layout, hub id, or embedded: tiny/model")
    vlm: str | None = option(None, "Qwen3-VL folder or hub id for the teacher's context")
    out: str | None = option(None, "folder of the run; default out/<name of the data>")
    method: str = option("dopsd", "dopsd, or a method that it is compared with", choices=tuple(METHODS))
    loss: str | None = option(None, "v: Eq. 7 of the paper; x0: the released code; kl: per-step KL (2605.15055)",
                              choices=tuple(objectives.LOSSES))
    noise: float = option(0.0, "a: standard deviation of the rollout's steps; 0: the steps of the sampler")
    teacher_lora: list[str] = option([], "a teacher for each --data: a frozen adapter file, base for the untuned "
                                     "model, or image for the run's own teacher, which is shown the target",
                                     nargs="+", metavar="FILE")
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


# ------------------------------------------------------------------------------------------------------- set-up
def check_values(cfg: Options) -> None:
    """Raises InputError on numbers that cannot work; None is left for the recipe."""
    for name, least in (("steps", 1), ("rollout_steps", 1), ("batch_size", 1), ("accumulate", 1), ("rank", 1),
                        ("alpha", 1), ("save_every", 1), ("sample_every", 0), ("lr", 0), ("grad_states", 1),
                        ("beta", 0), ("noise", 0)):
        value, flag = getattr(cfg, name), "--" + name.replace("_", "-")
        if value is not None and (not value >= least or not math.isfinite(value)):
            raise InputError(f"{flag} {value}: not a usable number; give {least} or more")
    if cfg.ema is not None and not 0 <= cfg.ema <= 1:
        raise InputError(f"--ema {cfg.ema}: not a fraction; give a number in [0, 1], the paper has 0.9999")
    if cfg.grad_states is not None and cfg.method != "dopsd":
        raise InputError(f"--grad-states {cfg.grad_states}: only for --method dopsd, not {cfg.method}; leave it out")
    teachers = cfg.teacher_lora
    if teachers and len(teachers) != len(cfg.data):
        raise InputError(f"--teacher-lora: {len(teachers)} for {len(cfg.data)} --data; give one for each, a file or "
                         "a word, image or base")
    if teachers and not METHODS[cfg.method]:
        raise InputError(f"--teacher-lora {teachers[0]}: --method {cfg.method} has no teacher; leave one of them out")
    if cfg.noise and cfg.method not in ("dopsd", "off-policy"):
        raise InputError(f"--noise {cfg.noise}: only for rollouts, --method {cfg.method} has none; leave it out")
    check_seed(cfg.seed)


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
        if shows_target(self.cfg):
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


@dataclass(frozen=True)
class Task:
    """What to learn from whom: D-OPSD has one, DiffusionOPD (arXiv 2605.15055) several."""
    name: str
    dataset: data.Dataset
    teacher: lora.Adapter | None    # frozen, reads the prompt alone; None: the run's own, which is shown the target


class Sides:
    """Student and teacher on one batch: their contexts on the device, and the velocities that the methods ask for."""

    def __init__(self, run: Run, model: Model, batch: data.Batch, teacher: lora.Adapter | None = None,
                 share: int | None = None) -> None:
        """teacher: of the task; share: number of batches over which the gradient of a step is averaged."""
        self.run, self.model, self.latents = run, model, batch.latents.to(run.device)
        self.teacher_adapter, self.share = teacher or run.teacher, share or run.cfg.accumulate
        self.student_context = [c.to(run.device) for c in batch.student_context]    # c_s = f_text(y), Eq. 4
        self.teacher_context = self.student_context if teacher else \
            [c.to(run.device) for c in batch.teacher_context]                       # c_t = f_mm(y, x0), Eq. 4

    def noise(self, rng: torch.Generator) -> Tensor:
        """(B, C, H, W): x at sigma = 1."""
        return torch.randn(self.latents.shape, generator=rng).to(self.run.device)

    def student(self, x: Tensor, sigma: float | Tensor) -> Tensor:                  # Eq. 5
        return self.model.velocity(x, sigma, self.student_context, self.run.student)

    @torch.no_grad()
    def teacher(self, x: Tensor, sigma: float | Tensor) -> Tensor:                  # Eq. 6
        return self.model.velocity(x, sigma, self.teacher_context, self.teacher_adapter)

    def untuned(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        return self.model.velocity(x, sigma, self.student_context)


def dopsd_step(cfg: Options, sides: Sides, sigmas: Tensor, rng: torch.Generator) -> float:
    """Add the gradient of Eq. 7 for one batch to the student's; returns the loss. rng: of noise and learned states.

    The latents give the shape only: x0 itself reaches the student through the teacher's context.
    """
    x, steps, total = sides.noise(rng), len(sigmas) - 1, 0.0
    learned = set(torch.randperm(steps, generator=rng)[:cfg.grad_states or steps].tolist())
    for point in rollout(sides.student, x, sigmas, learned, cfg.noise, rng):        # Eq. 3: the student's own states
        v_teacher = sides.teacher(point.x, point.sigma)                             # Eq. 6: the teacher, same state
        if cfg.method == "off-policy":
            point.follow(v_teacher)                                                 # else the teacher's own states
        loss = objectives.dopsd(point, v_teacher, cfg.loss) / len(learned)          # Eq. 7: mean over the K states
        (loss / sides.share).backward()                                             # one graph alive at a time
        total += loss.item()
    return total


def sft_step(cfg: Options, sides: Sides, sigmas: Tensor, shift: float, rng: torch.Generator) -> float:
    """Add the gradient of flow matching for one batch to the student's; returns the loss."""
    x0 = sample(sides.teacher, sides.noise(rng), sigmas) if cfg.method == "sft-teacher" else sides.latents
    eps, sigma = sides.noise(rng), objectives.draw_sigma(rng, shift, len(x0)).to(x0.device)
    loss = objectives.sft(sides.student, x0, eps, sigma)
    (loss / sides.share).backward()
    return loss.item()


def pso_step(cfg: Options, sides: Sides, sigmas: Tensor, rng: torch.Generator) -> float:
    """Add the gradient of pairwise sample optimization for one batch to the student's; returns the loss."""
    own = sample(sides.student, sides.noise(rng), sigmas)                           # what the model draws by now
    k = torch.randint(len(sigmas) - 1, (len(own),), generator=rng)                  # noise levels of its own sampler
    loss = objectives.pso(sides.student, sides.untuned, sides.latents, own, sides.noise(rng),
                          sigmas[k].to(own.device), cfg.beta)
    (loss / sides.share).backward()
    return loss.item()


def teacher_of(teacher: str, model: Model) -> lora.Adapter | None:
    """The adapter of a task's frozen teacher; None: the run's own teacher. Raises InputError."""
    if teacher == IMAGE:
        return None
    return lora.create(model, rank=1, alpha=1, seed=0) if teacher == BASE else lora.load(Path(teacher), model)  # B = 0


def shows_target(cfg: Options) -> bool:
    """Whether there is a teacher that is shown the target."""
    return METHODS[cfg.method] and (not cfg.teacher_lora or IMAGE in cfg.teacher_lora)


def draw_panel(cfg: Options, run: Run, panels: Panels, tasks: list[Task]) -> None:
    """samples/step_N.png of the current step."""
    note = f"{cfg.method}, step {run.step} of {cfg.steps}"
    panels.draw(run.out / "samples" / f"step_{run.step:06d}.png", note, run.student,
                run.teacher if shows_target(cfg) else None,
                {f"teacher of {task.name}": task.teacher for task in tasks if task.teacher})


def gradient_of_step(cfg: Options, model: Model, run: Run, tasks: list[Task], shift_of: Shift) -> dict[str, float]:
    """The gradient of one optimizer step, from `cfg.accumulate` batches of each task; returns the mean loss of each."""
    losses, share = dict.fromkeys((task.name for task in tasks), 0.0), cfg.accumulate * len(tasks)
    for number in range(run.step * cfg.accumulate, (run.step + 1) * cfg.accumulate):
        for index, task in enumerate(tasks):                                        # a round of DiffusionOPD
            sides = Sides(run, model, task.dataset.batch(number), task.teacher, share)
            rng = data.generator(cfg.seed, "noise", number, *([index] if index else []))
            shift = shift_of(cfg.rollout_steps, *sides.latents.shape[2:])
            sigmas = time_grid(shift, cfg.rollout_steps)
            if cfg.method in ("dopsd", "off-policy"):
                loss = dopsd_step(cfg, sides, sigmas, rng)
            elif cfg.method == "pso":
                loss = pso_step(cfg, sides, sigmas, rng)
            else:
                loss = sft_step(cfg, sides, sigmas, shift, rng)
            losses[task.name] += loss / cfg.accumulate
    return losses


def train(cfg: Options, model: Model, run: Run, tasks: list[Task], panels: Panels, shift_of: Shift) -> int:
    """The loop; returns the exit status. Leaves a saved state behind whichever way it ends."""
    if cfg.sample_every and run.step in (0, cfg.steps):
        draw_panel(cfg, run, panels, tasks)                             # at 0: can the teacher draw the concept at all?
    metrics, decay = run.out / "metrics.jsonl", {"ema": cfg.ema, "copy": 0.0, "base": 1.0}[cfg.teacher]
    bar = tqdm(range(run.step, cfg.steps), initial=run.step, total=cfg.steps, disable=None)
    with Interrupt() as interrupt:
        for _ in bar:
            started = time.time()
            run.optimizer.zero_grad(set_to_none=True)
            try:
                losses = gradient_of_step(cfg, model, run, tasks, shift_of)
            except torch.OutOfMemoryError:
                run.save()                                              # a resumed run may use --checkpointing
                raise
            loss = sum(losses.values()) / len(losses)
            norm = float(torch.nn.utils.clip_grad_norm_(run.student.parameters(), 1.0))
            if not math.isfinite(loss) or not math.isfinite(norm):
                run.save()                                              # nothing was updated: the last good state
                raise InputError(f"step {run.step + 1}: loss {loss}, gradient norm {norm}; the state before it is in "
                                 f"{run.out}; start anew with another --out and a smaller --lr or --dtype float32")
            run.optimizer.step()
            lora.ema_(run.teacher, run.student, decay)                  # theta_bar <- m theta_bar + (1 - m) theta
            run.step += 1
            seconds, memory = time.time() - started, peak_memory_gb(run.device)
            each = {"losses": losses} if len(losses) > 1 else {}
            files.append_json_line(metrics, {"step": run.step, "loss": loss, **each, "gradient_norm": norm,
                                             "seconds": seconds, "peak_memory_gb": memory})
            shown = "".join(f" {name} {value:.4f}" for name, value in losses.items()) if each else f" {loss:.4f}"
            bar.set_postfix_str(f"loss{shown}, grad {norm:.3f}, {seconds:.2f} s/step, {memory:.2f} GB")
            done = run.step == cfg.steps or interrupt.asked
            if done or run.step % cfg.save_every == 0:
                run.save()
            if interrupt.asked:
                print(f"interrupted: step {run.step} is saved in {run.out}; --resume continues", file=sys.stderr)
                return 130
            if cfg.sample_every and (done or run.step % cfg.sample_every == 0):
                draw_panel(cfg, run, panels, tasks)
    return 0


def print_summary(cfg: Options, recipe: Recipe, folder: Path, run: Run, tasks: list[Task], dtype, memory: float):
    """What the run is about to do; memory: GB of weights."""
    shown = ("method", "loss", "rollout_steps", "lr", "rank", "alpha", "ema", "batch_size", "accumulate")
    trained = sum(tensor.numel() for tensor in run.parameters.values())
    print(f"model    {folder} on {run.device}, {str(dtype).removeprefix('torch.')}, {memory:.2g} GB of weights at most")
    print(f"recipe   {recipe.name}: {', '.join(f'{name} {getattr(cfg, name)}' for name in shown)}")
    print(f"trained  {trained:,} LoRA parameters in {len(run.student.weights)} layers")
    for task in tasks:
        buckets = ", ".join(f"{count} of {width}x{height}" + (f" with {sources} source(s)" if sources else "")
                            for (height, width, sources), count in task.dataset.buckets.items())
        name = f" of {task.name}" if len(tasks) > 1 else ""
        print(f"images   {len(task.dataset.examples)}{name}: {buckets}")
    print(f"steps    {run.step} -> {cfg.steps}, run in {run.out}", flush=True)


def main(argv: list[str] | None = None) -> int:
    cfg = parse(Options, argv, "D-OPSD: teach a step-distilled diffusion model a new concept from a few images.")
    check_values(cfg)
    device, dtype = device_and_dtype(cfg.device, cfg.dtype)
    teachers, names = cfg.teacher_lora or [IMAGE] * len(cfg.data), names_of(cfg.data)
    rows = [data.read_folder(source, captions_suffice=teacher != IMAGE) for source, teacher in zip(cfg.data, teachers)]
    folder = model_folder(cfg.model)
    recipe, backbone = recipe_of(folder), backbone_of(folder)
    cfg = dataclasses.replace(fill(cfg, recipe), dtype=str(dtype).removeprefix("torch."))
    if (cfg.grad_states or 1) > cfg.rollout_steps:
        raise InputError(f"--grad-states {cfg.grad_states}: the rollout has {cfg.rollout_steps} states; give 1 to "
                         f"{cfg.rollout_steps}")
    out = Path(cfg.out or Path("out") / "+".join(names))
    shift_of = functools.partial(backbone.time_shift, read_json(folder / "scheduler" / "scheduler_config.json"))
    shift_of(cfg.rollout_steps, 2, 2)                                   # refuses schedulers with another grid
    shown = cfg.teacher_context if METHODS[cfg.method] else ""
    for source, part in zip(cfg.data, rows):
        has_sources = any(row.sources for row in part)
        check_references(backbone, shown, f"source images in {source}" if has_sources else "")
    warn_undistilled(folder)

    skeleton = backbone.check(folder)                                   # before anything is encoded and written
    for teacher in teachers:
        teacher_of(teacher, skeleton)
    memory = check_memory(folder, device, dtype)
    cache = Path(cfg.cache) if cfg.cache else out / "cache"
    features = [Features(cfg, part, folder, recipe, shown if teacher == IMAGE else "", cache, device, dtype)
                for part, teacher in zip(rows, teachers)]
    fingerprint = " ".join(part.fingerprint for part in features)
    open_run(cfg, out, fingerprint)                                     # nothing is written before this line
    for part in features:                                               # loads VAE and encoders, and frees them
        part.encode(with_unrelated=part is features[-1])
    model = backbone.load(folder, device, dtype, cfg.checkpointing, cfg.compile)
    run = Run(cfg, out, model)
    tasks = [Task(name, part.dataset, teacher_of(teacher, model))
             for name, part, teacher in zip(names, features, teachers)]
    if cfg.resume:
        run.load()
    files.keep_json_lines(out / "metrics.jsonl", lambda numbers: numbers["step"] <= run.step)
    files.write_json(out / "config.json", {"recipe": recipe.name, "options": asdict(cfg), "data": fingerprint,
                                           **provenance()})
    print_summary(cfg, recipe, folder, run, tasks, dtype, memory)
    panels = Panels(folder, model, shift_of, recipe.inference_steps, cfg.seed, features[0].dataset.examples[0].shape,
                    [row for part in features for row in part.panel])
    return train(cfg, model, run, tasks, panels, shift_of)


if __name__ == "__main__":
    run_program(main)
