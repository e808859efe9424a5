"""D-OPSD: teach a step-distilled diffusion model a new concept from a few images.

    python train.py --data examples/star                                    # the embedded model, on a laptop
    python train.py --data DIR --model Tongyi-MAI/Z-Image-Turbo --caption "a [V] dog"       # photos, on a CUDA GPU
    torchrun --standalone --nproc-per-node 8 train.py --data DIR --model black-forest-labs/FLUX.2-klein-4B --tune full
    python train.py --data A B --teacher-lora a.safetensors b.safetensors   # two adapters into one (arXiv 2605.15055)

arXiv 2605.05204, Section 3. `dopsd` is the method, which keeps the few steps: the student walks the few-step sampler
from pure noise (rollout.py, Eq. 3). At each state it visits, the EMA teacher, shown the target image (encoder.py,
Eq. 4), says which velocity it would take (Eq. 6), and the student learns that velocity (loss.py, Eq. 7). `bind` gives
both sides their weights and contexts, `train` makes one optimizer step and one EMA step (lora.py) of it.

Differs from the official code:
1. Backward at every state instead of once per rollout: the same gradient with one graph alive.
2. Latents and contexts are encoded once and cached; VAE and encoders are freed before the transformer is loaded.
3. Both losses: the paper's (`--loss v`) and the released code's (`--loss x0`).
4. `--resume` continues bit for bit (on CUDA up to the rounding of attention's backward, which adds in no fixed order):
   batches and noise are functions of (seed, step).
5. Panels use the same noise every time, and the first one is drawn before step 1.
6. `--keep` beside it: the untuned model teaches other captions, so that their pictures stay. `none` is as published.
"""
import math
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from plumbing.options import InputError, parse
from plumbing.train_options import (TARGET, UNTUNED, Options, Source, check_filled, check_values, read_source,
                                    shows_target, sources_of, what_is_kept)

if __name__ == "__main__":
    parse(Options, None, __doc__)   # --help and misspelt words are answered here, before torch takes seconds to load

import torch
from torch import Tensor
from tqdm import tqdm

import data
import lora
from baselines import BASELINES, Method, Prior, passes_of_rollout
from encoder import check_references
from loss import Weight, weight_of
from plumbing import lora_files, program, report
from plumbing.checkpoints import backbone_of, check_quantize, model_folder, recipe_of, shift_rule, warn_undistilled
from plumbing.features import Features, fingerprint_of
from plumbing.full import Full, tuned_of
from plumbing.machine import check_room, device_and_dtype, recomputes
from plumbing.panels import Panels, Shift
from plumbing.recipes import Recipe, fill
from plumbing.run_folder import Run, alone, open_run, out_folder, print_summary, provenance
from plumbing.team import Team, leave
from rollout import Velocity, rollout, sigma_grid


# ---------------------------------------------------------------------------------------------------- the method
def dopsd(student: Velocity, teacher: Velocity, x: Tensor, sigmas: Tensor, weight: Weight, learned: Collection[int],
          noise: float = 0.0, rng: torch.Generator | None = None) -> Iterator[Tensor]:
    """D-OPSD on one batch: one loss per state of the student's own trajectory; their sum is the mean of Eq. 7.

    student, teacher: (x, sigma) -> v, each with its weights and its context. x: (B, C, H, W) noise at sigma = 1; the
    target x0 appears in the teacher's context only. sigmas: (K + 1,), `sigma_grid`. weight: of loss.py. learned: which
    states, in the paper all K. noise: a of the rollout's steps, drawn from rng. Call backward on each loss before
    asking for the next: states are detached, so this is the whole gradient, with one graph alive at a time.
    """
    for point in rollout(student, x, sigmas, learned, noise, rng):                      # Eq. 3: x_k, and u_s of Eq. 5
        with torch.no_grad():
            v_teacher = teacher(point.x, point.sigma)                                   # Eq. 6: u_t at the same state
        yield weight(point) * (point.v - v_teacher).square().mean() / len(learned)      # Eq. 7


METHODS = {"dopsd": Method(dopsd, ("teacher", "weight", "learned", "noise", "rng"), passes_of_rollout), **BASELINES}


# ---------------------------------------------------------------------------------------------------- one step
@dataclass(frozen=True)
class Task:
    """What to learn from whom: D-OPSD has one, and one with --keep; DiffusionOPD (arXiv 2605.15055) has several."""
    name: str
    dataset: data.Dataset
    teacher: lora.Bound | None      # a frozen one that reads the prompt alone; None: the run's own teacher
    index: int = 0                  # the task's noise is its own
    weight: float = 1.0             # of its loss
    batches: int = 1                # beside one of each other task
    in_panels: bool = True
    method: Method = METHODS["dopsd"]   # how


def bind(cfg: Options, tuned: lora.Tuned | Full, task: Task, number: int, shift_of: Shift) -> dict:
    """What the methods ask for, for batch `number` of a task: every velocity gets its weights and its context here."""
    batch = task.dataset.batch(number)
    rng = data.generator(cfg.seed, "noise", number, *([task.index] if task.index else []))
    x0 = batch.latents.to(tuned.device, non_blocking=True)
    c_s, c_t = ([context.to(tuned.device) for context in side]                          # Eq. 4
                for side in (batch.student_context, batch.teacher_context))
    K, shift = cfg.rollout_steps, shift_of(cfg.rollout_steps, *x0.shape[2:])
    return {"student": tuned.student(c_s),                                              # theta, c_s
            "teacher": task.teacher(c_s) if task.teacher else tuned.teacher(c_t),       # theta_bar, c_t
            "base": tuned.base(c_s),
            "x": torch.randn(x0.shape, generator=rng).to(tuned.device, non_blocking=True), "x0": x0,
            "sigmas": sigma_grid(shift, K), "shift": shift, "weight": weight_of(cfg.loss),
            "learned": draw_states(K, cfg.grad_states or K, number // tuned.walkers, cfg.seed, task.index),
            "noise": cfg.noise, "beta": cfg.beta, "rng": rng}


def draw_states(K: int, n: int, number: int, seed: int, task: int = 0) -> list[int]:
    """The n of K states that batch `number` learns at: each state is equally likely, and none comes twice.

    Stratified: K / gcd(n, K) batches in a row share a permutation and take turns in it, so over these every state is
    learned equally often, whichever optimizer steps they belong to.
    """
    turn, j = divmod(number, K // math.gcd(n, K))
    order = torch.randperm(K, generator=data.generator(seed, "states", turn, task)).tolist()
    return [order[(j * n + i) % K] for i in range(n)]


def gradient_of_step(cfg: Options, run: Run, tasks: list[Task], shift_of: Shift) -> dict[str, Tensor]:
    """The gradient of one optimizer step, of the weighted mean over tasks; returns each task's loss, on the device."""
    losses = {task.name: torch.zeros((), device=run.tuned.device) for task in tasks}
    weights = sum(task.weight for task in tasks)
    for task in tasks:                                                                  # a round of DiffusionOPD
        batches = cfg.accumulate * task.batches
        for number in run.team.numbers(run.step, batches):                              # its share of all
            for loss in task.method(**bind(cfg, run.tuned, task, number, shift_of)):
                (loss * task.weight / (batches * weights)).backward()                   # one graph alive at a time
                losses[task.name] += loss.detach() / batches
    return losses


def clip_and_check(run: Run, tasks: list[Task], losses: dict[str, Tensor]) -> tuple[float, dict[str, float], float]:
    """Clip the gradient's norm to 1; returns the weighted mean of the losses, the losses, and what the norm was.

    A step that is not finite ends the run before it is made.
    """
    length = run.tuned.clip_(1.0)
    run.team.mean_(losses.values())
    norm, *found = torch.stack([length, *losses.values()]).tolist()     # the only time in a step to wait for the GPU
    of_task = dict(zip(losses, found))
    loss = sum(task.weight * of_task[task.name] for task in tasks) / sum(task.weight for task in tasks)
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise InputError(f"step {run.step + 1}: loss {loss}, gradient norm {norm}; " + (
            f"the state before it is in {run.out}; start anew with another --out and a smaller --lr or --dtype float32"
            if run.step else f"nothing was learned yet, so {run.cfg.model} or the data is broken, or needs --dtype "
            "float32"))
    return loss, of_task, norm


def train(cfg: Options, run: Run, tasks: list[Task], panels: Panels, shift_of: Shift) -> int:
    """The loop; returns the exit status. Leaves a saved state behind whichever way it ends."""
    m = {"ema": cfg.ema, "copy": 0.0, "frozen": 1.0}[cfg.teacher_weights]
    draw_panel(cfg, run, panels, tasks)                                 # at 0: can the teacher draw the concept at all?
    bar = tqdm(range(run.step, cfg.steps), initial=run.step, total=cfg.steps, disable=run.team.rank > 0 or None)
    with program.Interrupt() as interrupt, run.saved_on_errors():
        for _ in bar:
            started = time.time()
            run.optimizer.zero_grad(set_to_none=True)
            loss, losses, norm = clip_and_check(run, tasks, gradient_of_step(cfg, run, tasks, shift_of))
            run.optimizer.step()
            run.tuned.ema_(m)                                           # theta_bar <- m theta_bar + (1 - m) theta
            run.step += 1
            bar.set_postfix_str(run.log(loss, losses, norm, time.time() - started))
            interrupt.asked = run.team.any(interrupt.asked)
            done = run.step == cfg.steps or interrupt.asked
            if done or run.step % cfg.save_every == 0:
                run.save()
            if interrupt.asked:
                print(f"interrupted: step {run.step} is saved in {run.out}; --resume continues", file=sys.stderr)
                return 128 + interrupt.asked
            draw_panel(cfg, run, panels, tasks)
    print(f"done     {run.out / run.tuned.saved}, report in {run.out / report.NAME}")
    return 0


def draw_panel(cfg: Options, run: Run, panels: Panels, tasks: list[Task]) -> None:
    """samples/step_N.png of the current step, if it is the last or one of --sample-every; and the page that has it."""
    if run.tuned.draws and cfg.sample_every and (run.step == cfg.steps or run.step % cfg.sample_every == 0):
        panels.draw(run.out / "samples" / f"step_{run.step:06d}.png", f"{cfg.method}, step {run.step} of {cfg.steps}",
                    run.tuned.student, run.tuned.teacher if shows_target(cfg, METHODS[cfg.method]) else None,
                    {f"teacher of {task.name}": task.teacher for task in tasks if task.teacher and task.in_panels},
                    run.team.is_first)
        if run.team.is_first:
            report.write(run.out)


# ---------------------------------------------------------------------------------------------------- the program
def main(argv: list[str] | None = None) -> int:
    """Five stages; nothing is written before the second has passed, and no two large networks are loaded at once."""
    team = Team.meet()
    with team.in_turn("process 0 to read and encode the data"):
        cfg, recipe, folder, rows = read(argv)
        features = check(cfg, recipe, folder, rows, team)
        encode(features)
    team.check_same({"options": str(cfg), "data": str(fingerprint_of(features)), "code": str(provenance())})
    with alone(out_folder(cfg), team):
        run, tasks, panels = load(cfg, recipe, folder, features, team)
        return train(cfg, run, tasks, panels, shift_rule(folder))


def read(argv: list[str] | None) -> tuple[Options, Recipe, Path, list[list[data.Row]]]:
    """Options, with the recipe's values where none were given; the checkpoint's folder; the rows of each source."""
    cfg = parse(Options, argv, __doc__)
    check_values(cfg, METHODS[cfg.method])
    _, dtype = device_and_dtype(cfg.device, cfg.dtype)
    rows = [read_source(source, cfg.caption) for source in sources_of(cfg)]
    folder = model_folder(cfg.model)
    recipe = what_is_kept(cfg, recipe_of(folder), edits=any(row.sources for part in rows for row in part))
    filled = replace(fill(cfg, recipe), dtype=str(dtype).removeprefix("torch."))
    rows += [read_source(source) for source in sources_of(filled)[len(rows):]]          # what the recipe keeps
    return filled, recipe, folder, rows


def check(cfg: Options, recipe: Recipe, folder: Path, rows: list[list[data.Row]], team: Team) -> list[Features]:
    """What can be seen to fail fails here: references, scheduler, weights, LoRA files, memory, pictures, the folder."""
    check_filled(cfg)
    backbone, kind = backbone_of(folder), cfg.teacher_context if METHODS[cfg.method].has_teacher else ""
    shift_rule(folder)                                                  # refuses schedulers with another grid
    for source, part in zip(sources_of(cfg), rows, strict=True):
        has_sources = any(row.sources for row in part)
        check_references(backbone, kind, f"source images in {source.path}" if has_sources else "")
    warn_undistilled(folder)
    check_quantize(folder, cfg.quantize)
    skeleton = backbone.check(folder)
    for source in sources_of(cfg):
        if source.teacher not in (TARGET, UNTUNED):
            lora_files.load(Path(source.teacher), skeleton)
    device, dtype = device_and_dtype(cfg.device, cfg.dtype)
    check_room(cfg, folder, out_folder(cfg), device, dtype, skeleton, team.size)
    cache = Path(cfg.cache) if cfg.cache else out_folder(cfg) / "cache"
    features = [Features(cfg, part, folder, recipe, kind if source.teacher == TARGET else "", cache, device, dtype,
                         in_panels=not source.is_kept) for part, source in zip(rows, sources_of(cfg), strict=True)]
    open_run(cfg, out_folder(cfg), fingerprint_of(features), team.size)
    return features


def encode(features: list[Features]) -> None:
    """Latents and the two contexts of Eq. 4, once; VAE and encoders are freed again."""
    last = [part for part in features if part.in_panels][-1]
    kept = [path for part in features if not part.in_panels for one in part.examples for path in one.row.sources]
    for part in features:
        part.encode(part is last, kept)


def load(cfg: Options, recipe: Recipe, folder: Path, features: list[Features], team: Team
         ) -> tuple[Run, list[Task], Panels]:
    """The transformer with student and teacher, from the state that --resume continues."""
    open_run(cfg, out_folder(cfg), fingerprint_of(features), team.size)     # nobody has been here meanwhile
    device, dtype = device_and_dtype(cfg.device, cfg.dtype)
    tuned = tuned_of(cfg, folder, device, dtype, team, METHODS[cfg.method])
    tuned.model.checkpointing = cfg.checkpointing = recomputes(cfg, folder, dtype, tuned.model, team.size)
    run = Run(cfg, out_folder(cfg), tuned, shows_target(cfg, METHODS[cfg.method]))
    shift_of = shift_rule(folder)
    tasks = [task_of(index, source, part.dataset, cfg, recipe, tuned, shift_of)
             for index, (source, part) in enumerate(zip(sources_of(cfg), features, strict=True))]
    shown = [row for part in features for row in part.panel]
    panels = Panels(folder, device, shift_of, recipe.inference_steps, cfg.seed, shown)
    if cfg.sample_every and tuned.draws:
        panels.draw_base(tuned.base)                                    # --resume replaces all weights of a full tuning
    if cfg.resume:
        run.load()
    run.begin(recipe.name, fingerprint_of(features), tasks)
    print_summary(cfg, recipe, folder, run, tasks)
    return run, tasks, panels


def task_of(index: int, source: Source, dataset: data.Dataset, cfg: Options, recipe: Recipe, tuned: lora.Tuned | Full,
            shift_of: Shift) -> Task:
    """A source with its teacher and its method; the captions of --keep get pictures if that method learns from such."""
    method = METHODS[METHODS[cfg.method].keeps if source.is_kept else cfg.method]
    if source.is_kept and "x0" in method.needs:
        dataset = Prior(dataset, tuned.base, tuned.device, shift_of, recipe.inference_steps)
    teacher = None if source.teacher == TARGET else tuned.base
    if source.teacher not in (TARGET, UNTUNED):
        teacher = partial(lora.velocity_of, tuned.model, adapter=lora_files.load(Path(source.teacher), tuned.model))
    return Task(source.name, dataset, teacher, index, source.weight, source.batches, not source.is_kept, method)


if __name__ == "__main__":
    program.run(lambda: leave(main()))
