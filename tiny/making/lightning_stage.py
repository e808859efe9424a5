"""A stage of SDXL-Lightning (lightning.py): fewer solver steps than the one before.

    python -m tiny.making.lightning_stage --from-steps 64 --to-steps 16 --out out/16        # of the undistilled model
    python -m tiny.making.lightning_stage --from-steps 16 --to-steps 8 --teacher out/16 --out out/8
    python -m tiny.making.lightning_stage --from-steps 16 --to-steps 8 --teacher out/16 --init out/8 --relaxed --out ...

The same command goes on where it stopped; --steps may grow. --out gets a transformer/, or a LoRA on the undistilled
model.
"""
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lora
from model import Context
from plumbing import program
from plumbing.checkpoints import backbone_of, model_folder, shift_rule
from plumbing.files import (InputError, append_json_line, check_writable, keep_json_lines, open_safetensors, read_json,
                            write_json, write_tensors)
from plumbing.full import WEIGHTS, Full
from plumbing.machine import device_and_dtype
from plumbing.options import option, parse
from plumbing.run_folder import alone
from plumbing.team import ALONE, put
from plumbing.train_options import FULL, LORA
from tiny.making.lightning import NOISED, Discriminator, Lesson, Walkers, segments
from tiny.making.lightning_pool import Pool
from tiny.making.material import (LORA_FILE, WORLD, lora_file, merged, read_network, source_of, undistilled,
                                  warn_distilled)
from tiny.models import guided
from tiny.world import generator

WON, WON_STEPS = 0.02, 100                  # loss of D at which it has won, if it stays there for so many steps
HEAD_START = 25                             # steps of a stage in which D alone learns


@dataclass
class Options:
    from_steps: int = option(64, "solver steps of the teacher")
    to_steps: int = option(16, "solver steps of the student; they divide those of the teacher")
    teacher: str = option("", "what teaches: a folder with a transformer/ or a LoRA, such as the --out of the stage "
                          "before; without it the undistilled model, with guidance and by MSE")
    init: str = option("", "what the student starts from; default the teacher, or the undistilled model with --tune "
                      "lora where the teacher is a whole network")
    model: str = option("embedded", "checkpoint folder or hub id of an undistilled model; default the embedded one")
    data: str = option(WORLD, "captions: a .jsonl or a folder of .txt; default those of the embedded models' world")
    out: str = option("out/tiny/lightning", "folder of the state, the log and the result")
    tune: str = option(FULL, "what is trained: all weights, or a LoRA on the undistilled model", choices=(FULL, LORA))
    rank: int = option(16, "of a new LoRA")
    relaxed: bool = option(False, "D does not see x_t (Eq. 23)")
    pool: str = option("", "folder of lightning_pool.py, whose pictures are real to D in a relaxed stage")
    judge_below: float = option(0.9, "D judges steps that end at a noise level below this; 1 is all of them")
    linger: int = option(0, "times that a trajectory repeats its last step, from the teacher's picture with new noise")
    noised: int = option(2, "D sees x0 with noise (Eq. 25, 26) where the student has so many steps or fewer")
    critic: str = option("whole", "what of D learns: the whole of it, as published, or its heads; none: MSE alone",
                         choices=("whole", "heads", "none"))
    guidance: float = option(2.0, "of the undistilled model, where it teaches")
    steps: int = option(600, "optimizer steps")
    batch: int = option(16, "states in a step")
    lr: float = option(1e-4, "learning rate of the student")
    critic_lr: float = option(1e-4, "learning rate of D; its new heads have ten times as much")
    anchor: float = option(1.0, "weight of the MSE beside the adversarial loss")
    ema: float = option(0.99, "of the student's weights, which the result is")
    size: int = option(1024, "pixels of a side, with --data; the world has its own")
    save_every: int = option(100, "optimizer steps between saves")
    seed: int = option(0, "of captions, noise and new weights")
    device: str = option("auto", "cpu, cuda or auto")

    def check(self) -> None:
        """Raises InputError on numbers that cannot be meant."""
        for name in ("from_steps", "to_steps", "rank", "steps", "batch", "size", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: give 1 or more")
        for name, most in (("lr", 1), ("critic_lr", 1), ("anchor", 1e6), ("guidance", 100), ("ema", 1),
                           ("judge_below", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: give a number from 0 to {most:g}")
        if self.from_steps % self.to_steps or self.from_steps == self.to_steps:
            raise InputError(f"--from-steps {self.from_steps} --to-steps {self.to_steps}: the student's steps do not "
                             f"divide the teacher's; give a multiple, such as {2 * self.to_steps}")
        if self.relaxed and (not self.teacher or self.critic == "none"):
            raise InputError("--relaxed: there is no discriminator without --teacher or with --critic none")
        if self.pool and not self.relaxed:
            raise InputError("--pool: belongs to --relaxed, where D does not see from where a picture comes")
        for name in ("linger", "noised"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} {getattr(self, name)}: give 0 or more")
        if not 0 <= self.seed < 2 ** 32:
            raise InputError(f"--seed {self.seed}: give a number from 0 to {2 ** 32 - 1}")


class Training:
    """A stage between two steps."""

    def __init__(self, cfg: Options) -> None:
        """Raises InputError."""
        self.cfg, self.out, self.step, self.won = cfg, Path(cfg.out), 0, 0
        folder = model_folder(cfg.model)
        base, device, dtype = undistilled(folder), *device_and_dtype(cfg.device, "auto")
        teacher, init = (Path(path) if path else None for path in (cfg.teacher, cfg.init or cfg.teacher))
        if cfg.tune == LORA and not cfg.init and not lora_file(teacher):
            init = None                                                     # a new LoRA: there is none to start from
        if teacher is None:
            warn_distilled(base)
        self.device, self.is_adversarial = device, teacher is not None and cfg.critic != "none"
        self.source = source_of(folder, cfg.data, cfg.size, cfg.seed, device, dtype)
        self.pool = Pool(Path(cfg.pool)) if cfg.pool else None
        self.teaches, self.teaching = read_network(teacher, base, device, dtype)
        torch.manual_seed(cfg.seed)                                                   # of D's heads
        self.tuned = tuned_of(cfg, base, init, device, dtype)
        betas = (0.0, 0.99) if self.is_adversarial else (0.9, 0.999)
        self.optimizer = torch.optim.Adam(self.tuned.parameters().values(), lr=cfg.lr, betas=betas)
        if self.is_adversarial:
            backbone, learns = backbone_of(base), cfg.critic == "whole"
            width = backbone.width(read_json(base / "transformer" / "config.json"))
            network = backbone.load(base, device, torch.float32 if learns else dtype)
            self.critic = Discriminator(network, width, not cfg.relaxed, learns).to(device)
            self.learned = {name: p for name, p in self.critic.named_parameters() if p.requires_grad}
            new = [p for name, p in self.learned.items() if name.startswith("heads.")]
            old = [p for name, p in self.learned.items() if not name.startswith("heads.")]
            self.critic_optimizer = torch.optim.Adam([{"params": new, "lr": 10 * cfg.critic_lr},
                                                      {"params": old, "lr": cfg.critic_lr}], betas=betas)
        shift = shift_rule(folder)(cfg.to_steps, *self.source.shape[1:])
        self.grid = segments(shift, cfg.to_steps, cfg.from_steps // cfg.to_steps)
        self.walkers = Walkers(self.source, cfg.batch, self.grid, cfg.seed, cfg.linger)

    # ------------------------------------------------------------------------------------------------ one step
    def lesson(self) -> tuple[Lesson, list[Context]]:
        """The batch of this step, and its contexts."""
        cfg, walkers, device = self.cfg, self.walkers, self.device
        walkers.begin(self.step)
        mine, told = ([context.to(device) for context in side] for side in walkers.contexts)
        empty = [self.source.empty.to(device)] * cfg.batch
        guidance = 1.0 if cfg.teacher else cfg.guidance
        g = generator(cfg.seed + 1, self.step)
        noise, levels = torch.randn(walkers.x.shape, generator=g), torch.zeros(cfg.batch)
        if cfg.to_steps <= cfg.noised:
            levels = torch.tensor(NOISED)[torch.randint(len(NOISED), (cfg.batch,), generator=g)]
        return Lesson(walkers.x.to(device), self.grid[walkers.k].to(device), self.tuned.student(mine),
                      guided(self.teaches, told, empty, guidance, self.teaching), noise.to(device),
                      levels.to(device)), mine

    def real_pictures(self) -> tuple[Tensor, list[Context]] | None:
        """Of --pool, for this step."""
        if self.pool is None:
            return None
        x0, contexts = self.pool.draw(self.cfg.batch, generator(self.cfg.seed + 3, self.step))
        return x0.to(self.device), [context.to(self.device) for context in contexts]

    def learn(self) -> dict[str, float]:
        """One optimizer step of D and of the student; returns numbers for the log. Raises InputError."""
        lesson, context = self.lesson()
        loss, numbers = lesson.mse, {"mse": lesson.mse.item()}
        if self.is_adversarial:
            losses = lesson.losses(self.critic, context, self.cfg.judge_below, self.real_pictures())
            of_critic = next(losses)
            numbers["D"] = of_critic.item()
            self.update(self.critic_optimizer, of_critic, lambda: nn.utils.clip_grad_norm_(self.learned.values(), 1.0))
            of_student = next(losses)
            numbers["G"] = of_student.item()
            loss = of_student + self.cfg.anchor * lesson.mse
        if not self.is_adversarial or self.step >= HEAD_START:
            self.update(self.optimizer, loss, lambda: self.tuned.clip_(1.0))
            self.tuned.ema_(self.cfg.ema)
        self.walkers.advance(lesson.fake.detach().cpu(), lesson.real.cpu(), lesson.noise.cpu())
        self.step += 1
        return numbers

    def update(self, optimizer: torch.optim.Optimizer, loss: Tensor, clip) -> None:
        """Raises InputError, and changes nothing, where a loss or a gradient is not finite."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = float(clip())
        if not math.isfinite(loss.item()) or not math.isfinite(norm):
            raise InputError(f"step {self.step + 1}: loss {loss.item()}, gradient norm {norm}; the state of the last "
                             f"save is in {self.out}; start anew with another --out and a smaller --lr or --critic-lr")
        optimizer.step()

    def watch(self, loss: float) -> None:
        """Raises InputError when D has won; the state is saved before."""
        self.won = self.won + 1 if loss < WON else 0
        if self.won >= WON_STEPS:
            self.save()
            raise InputError(f"step {self.step}: the discriminator tells teacher and student apart without fail (its "
                             f"loss is below {WON} for {WON_STEPS} steps), so the student learns nothing from it; the "
                             f"state is in {self.out}; start anew with a smaller --critic-lr or a larger --anchor")

    # ------------------------------------------------------------------------------------------------ files
    def parts(self) -> dict[str, tuple[torch.optim.Optimizer, dict[str, Tensor]]]:
        """What learns: name -> optimizer, its tensors by name."""
        found = {"student": (self.optimizer, self.tuned.parameters())}
        return found | ({"critic": (self.critic_optimizer, self.learned)} if self.is_adversarial else {})

    def save(self) -> None:
        """The result, then one file from which `load` continues; each whole or not at all."""
        state = {f"tuned.{name}": tensor for name, tensor in self.tuned.state().items()} | self.walkers.state()
        state |= {"step": torch.tensor(self.step), "won": torch.tensor(self.won)}
        state |= {f"critic.{name}": tensor for name, tensor in (self.learned if self.is_adversarial else {}).items()}
        for part, (optimizer, tensors) in self.parts().items():
            for name, tensor in tensors.items():
                state |= {f"adam.{part}.{name}.{key}": value for key, value in optimizer.state[tensor].items()}
        facts = {"solver_steps": str(self.cfg.to_steps), "step": str(self.step)}
        if isinstance(self.tuned, Full):
            write_json(self.out / "transformer" / "config.json", self.tuned.config)
            write_tensors(self.out / "transformer" / f"{WEIGHTS}.safetensors",
                          dict(self.tuned.slow.named_parameters()), {"format": "pt", **facts})
        else:
            lora.save(self.tuned.theta_bar, self.out / LORA_FILE, facts)
        write_tensors(self.out / "state.safetensors", state)

    def load(self) -> None:
        """Go on from the state in --out, if there is one. Raises InputError."""
        if not (self.out / "state.safetensors").is_file():
            return
        with open_safetensors(self.out / "state.safetensors") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
        self.step, self.won = int(state["step"]), int(state["won"])
        for name, tensor in self.tuned.state().items():
            put(tensor, state[f"tuned.{name}"])
        self.walkers.load_state(state)
        for name, tensor in (self.learned if self.is_adversarial else {}).items():
            tensor.data.copy_(state[f"critic.{name}"])
        for part, (optimizer, tensors) in self.parts().items():
            for name, tensor in tensors.items():
                prefix = f"adam.{part}.{name}."
                optimizer.state[tensor] = {key: state[prefix + key] for key in ("step", "exp_avg", "exp_avg_sq")
                                           if prefix + key in state}


def tuned_of(cfg: Options, base: Path, init: Path | None, device: torch.device, dtype: torch.dtype):
    """The student, and the average of its weights: a LoRA on `base`, or a network of its own."""
    if cfg.tune == LORA and (init is None or lora_file(init)):
        network, adapter = read_network(init, base, device, dtype)
        rank = adapter.rank if adapter else cfg.rank
        tuned = lora.Tuned(network, rank, rank, cfg.seed)
        for mine in (tuned.theta, tuned.theta_bar) if adapter else ():
            if mine.weights.keys() != adapter.weights.keys():
                raise InputError(f"--init {init}: not a LoRA of all attention and feed-forward layers; give the result "
                                 "of a stage with --tune lora")
            for name, tensor in mine.tensors().items():
                put(tensor, adapter.tensors()[name])
        return tuned
    if cfg.tune == LORA:
        raise InputError(f"--init {init}: holds a whole network, and a LoRA is one of the undistilled model; give the "
                         "result of a stage with --tune lora, or --tune full")
    config = read_json((base if init is None or lora_file(init) else init) / "transformer" / "config.json")
    return Full(lambda precision: merged(*read_network(init, base, device, precision)), config, torch.float32, ALONE,
                "ema", needs_base=False)


def main(argv: list[str] | None = None) -> int:
    cfg = parse(Options, argv, __doc__)
    cfg.check()
    out, settings = Path(cfg.out), {**asdict(cfg), "save_every": 0, "steps": 0, "out": ""}
    check_writable(out, f"--out {out}")
    if (out / "stage.json").is_file() and read_json(out / "stage.json", "options")["options"] != settings:
        raise InputError(f"--out {out}: holds a stage with other options; give those of its stage.json, or another "
                         "--out")
    with alone(out):
        training = Training(cfg)
        training.load()
        write_json(out / "stage.json", {"options": settings})
        keep_json_lines(out / "log.jsonl", lambda numbers: numbers["step"] <= training.step)
        bar = tqdm(range(training.step, cfg.steps), initial=training.step, total=cfg.steps, mininterval=5)
        for _ in bar:
            numbers = training.learn()
            bar.set_postfix({name: f"{value:.3f}" for name, value in numbers.items()}, refresh=False)
            append_json_line(out / "log.jsonl", {"step": training.step, **numbers})
            training.watch(numbers.get("D", math.inf))
            if training.step % cfg.save_every == 0 or training.step == cfg.steps:
                training.save()
    print(f"done     {out}: {cfg.to_steps} steps, after {training.step} optimizer steps")
    return 0


if __name__ == "__main__":
    program.run(main)
