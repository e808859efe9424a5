"""Few steps from many: `python -m tiny.making.lightning --from 64 --to 16`, then `--teacher DIR --from 16 --to 8`, ...

SDXL-Lightning, progressive adversarial distillation (arXiv 2402.13929, Sections 2.3 and 3). A teacher crosses a segment
of the student's grid in n solver steps (Eq. 7 to 13), the student in one (Eq. 14, 15):
1. Without --teacher, the undistilled model teaches with classifier-free guidance, by MSE (Eq. 16).
2. With it, a discriminator D sees the pair (x_t, x_t-ns) and learns whether the teacher or the student went from one to
   the other (Eq. 17 to 20); the student learns to be taken for the teacher (Eq. 21). Where MSE would average what a
   single step cannot decide, the student has to decide, and because D sees x_t, to decide as the teacher does.
3. With --relaxed as well, D sees x_t-ns alone (Eq. 23): a student that cannot follow the teacher may go its own way.
Then the student is the next stage's teacher. Here t is sigma, t - n s is sigma', and everything is in v.

Differs from the paper:
1. Captions suffice. States are those of the student's own walk, which it has in hand (`Walkers`); the paper adds noise
   to pictures (Eq. 6) and mixes in noise levels that are not on the grid (3.7.1).
2. D's backbone is the whole undistilled transformer, read at several depths, since there is no encoder and middle
   block. By default it stays frozen and only small heads learn; `--critic whole` trains all, as published. A head
   judges each token of the image, and losses are means over tokens and depths: one value for each picture is too little
   to learn from when a batch has 16.
3. A small MSE stays beside the adversarial loss (--anchor; 0 is as published).
4. D is noised (Eq. 25, 26) where the paper's 1- and 2-step stages end, at x0, at its four levels in equal
   signal-to-noise; weighted 1:1:1:1 throughout. Real and fake get the same noise.
5. Every stage predicts v, the one-step one too (3.7.3 turns SDXL's from eps into x0 because of a 1 / alpha at t = 1
   that v does not have). Pure noise is at sigma = 1 by definition (3.5).
6. Learning rates are larger and batches smaller: 16 instead of 512. What is kept is an average of the weights.
"""
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import lora
from model import Context, ZImageTransformer
from plumbing import program
from plumbing.backbone import Transformer
from plumbing.checkpoints import backbone_of, model_folder, shift_rule
from plumbing.files import (InputError, append_json_line, check_writable, keep_json_lines, open_safetensors, read_json,
                            write_json, write_tensors)
from plumbing.full import WEIGHTS, Full
from plumbing.machine import device_and_dtype
from plumbing.options import option, parse
from plumbing.run_folder import alone
from plumbing.team import ALONE
from rollout import Velocity, euler, sigma_grid
from tiny.making.material import (LORA_FILE, WORLD, Captions, World, lora_file, merged, read_network, undistilled,
                                  warn_distilled)
from tiny.models import guided
from tiny.world import generator

NOISED = (0.0850, 0.4093, 0.6131, 0.7889)   # sigma with the signal-to-noise of SDXL's t = 10, 250, 500, 750
LORA, FULL = "lora", "full"
WON, WON_STEPS = 0.02, 100                  # loss of D at which it has won, if it stays there for so many steps
HEAD_START = 25                             # steps of a stage in which D alone learns


# ---------------------------------------------------------------------------------------------------- segments
def segments(shift: float, steps: int, between: int) -> Tensor:
    """Noise levels (steps, between + 1) of the teacher's solver steps in each of the student's; row k starts where the
    student's step k starts, and ends where it ends."""
    return sigma_grid(shift, steps * between).unfold(0, between + 1, between)


def column(sigma: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)."""
    return sigma.view(-1, 1, 1, 1)


@torch.no_grad()
def cross(teacher: Velocity, x: Tensor, sigmas: Tensor) -> Tensor:
    """Where the teacher arrives from x (B, C, H, W) over the noise levels (B, n + 1) of each row (Eq. 7 to 13)."""
    for sigma, sigma_next in pairwise(sigmas.t()):
        x = euler(x, teacher(x, sigma), column(sigma), column(sigma_next))
    return x


class Walkers:
    """Trajectories of the student from pure noise, each at its own point of the grid.

    A student's prediction of x_t-ns is also its next state, so walking costs nothing: the states of inference with the
    weights of the last few steps. Row i begins anew, with new noise and a new caption, at steps i, i + K, i + 2 K, ...
    """

    def __init__(self, source, batch: int, steps: int, seed: int) -> None:
        """source: of captions, `World` or `Captions`. batch: number of trajectories. steps: K of the student."""
        self.source, self.steps, self.seed = source, steps, seed
        self.x, self.k = torch.zeros(batch, *source.shape), torch.zeros(batch, dtype=torch.long)
        self.contexts: list[list[Context]] = [[], []]               # the student's, and what the teacher reads instead

    def begin(self, step: int) -> None:
        """Give new noise and captions to the rows whose turn it is."""
        g, batch = generator(self.seed, step), len(self.x)
        rows = range(batch) if step == 0 else range(step % self.steps, batch, self.steps)
        if not rows:
            return
        noise = torch.randn(len(rows), *self.x.shape[1:], generator=g)
        drawn = self.source.draw(step, len(rows), g)
        for side, contexts in enumerate(drawn):
            by_row = dict(enumerate(self.contexts[side])) | dict(zip(rows, contexts))
            self.contexts[side] = [by_row[i] for i in range(batch)]
        self.x, self.k = self.x.clone(), self.k.clone()
        self.x[list(rows)], self.k[list(rows)] = noise, 0

    def advance(self, x: Tensor) -> None:
        """Go to the student's predictions x (B, C, H, W)."""
        self.x, self.k = x.detach(), self.k + 1                     # at K, a row's turn to begin anew has come

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        found = {"walkers.x": self.x, "walkers.k": self.k}
        for side, contexts in enumerate(self.contexts):
            for i, context in enumerate(contexts):
                for j, part in enumerate((context.text, *context.references)):
                    found[f"walkers.{side}.{i}.{j}"] = part.clone()     # both sides may share one
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.x, self.k = state["walkers.x"], state["walkers.k"]
        for side in (0, 1):
            self.contexts[side] = []
            for i in range(len(self.x)):
                parts = [state[name] for j in range(9) if (name := f"walkers.{side}.{i}.{j}") in state]
                self.contexts[side].append(Context(parts[0], tuple(parts[1:])))


# ---------------------------------------------------------------------------------------------------- discriminator
def head(width: int) -> nn.Module:
    """Features of a token (..., width) -> logit (..., 1)."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 128), nn.SiLU(), nn.Linear(128, 1))


class Discriminator(nn.Module):
    """Logits of "the teacher made this": D of Eq. 22, or D' of Eq. 23 without x_t."""

    def __init__(self, backbone: Transformer, width: int, sees_x_t: bool, learns: bool, depths: int = 3) -> None:
        """backbone: a copy of the pre-trained network, `width` wide. learns: whether it is trained, or the heads alone.
        depths: number of blocks whose tokens are looked at, the last one among them."""
        super().__init__()
        assert isinstance(backbone, nn.Module)
        self.backbone, self.sees_x_t, self.learns = backbone.requires_grad_(learns), sees_x_t, learns
        names = list(backbone.blocks())
        names = [name for name in names if name.rpartition(".")[0] == names[-1].rpartition(".")[0]]     # the main ones
        self.read = [names[len(names) * (i + 1) // depths - 1] for i in range(depths)]
        self.heads = nn.ModuleList([head(width * (1 + sees_x_t)) for _ in self.read])

    def features(self, x: Tensor, sigma: Tensor, context: list) -> list[Tensor]:
        """d(x, sigma, c): the image's tokens (B, N, width) after each of the blocks that are read."""
        seen: list[Tensor] = []
        blocks = self.backbone.blocks()
        hooks = [blocks[name].register_forward_hook(lambda block, given, out: seen.append(out)) for name in self.read]
        try:
            self.backbone.velocity(x, sigma, context)
        finally:
            for hook in hooks:
                hook.remove()
        count = x[0, 0].numel() // self.backbone.multiple ** 2
        first = 0 if isinstance(self.backbone, ZImageTransformer) else max(len(c.text) for c in context)
        return [tokens[:, first:first + count] for tokens in seen]

    def forward(self, after: list[Tensor], before: list[Tensor]) -> Tensor:
        """Features of x_t-ns and of x_t -> logits (B, depths * N); D' does not look at the latter."""
        pairs = [torch.cat(pair, dim=-1) if self.sees_x_t else pair[0] for pair in zip(after, before or after)]
        return torch.cat([judge(pair).squeeze(-1) for judge, pair in zip(self.heads, pairs)], dim=1)


@contextmanager
def fixed(network: nn.Module) -> Iterator[None]:
    """No gradient for what it has learned so far, only through it."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


# ---------------------------------------------------------------------------------------------------- losses
def loss_of_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """-log p - log(1 - p^) with p = sigmoid(logit), Eq. 20; scalar, the mean over pictures and tokens."""
    return (F.softplus(-real) + F.softplus(fake)).mean()


def loss_of_student(fake: Tensor) -> Tensor:
    """-log p^, Eq. 21, non-saturating; scalar."""
    return F.softplus(-fake).mean()


class Lesson:
    """One batch: states of the student, and where the teacher and the student go from there."""

    def __init__(self, x: Tensor, sigmas: Tensor, student: Velocity, teacher: Velocity, noise: Tensor,
                 levels: Tensor) -> None:
        """x: (B, C, H, W). sigmas: (B, n + 1), `segments` of each row. noise: like x; levels (B,): how much of it D
        is shown at x0 (Eq. 25, 26), 0 for none."""
        self.x, self.sigma, sigma_next = x, sigmas[:, 0], sigmas[:, -1]
        self.real, v = cross(teacher, x, sigmas), student(x, self.sigma)                # x_t-ns; Eq. 14
        length = column(sigma_next - self.sigma)
        self.fake = x + length * v                                                      # Eq. 15
        self.mse = (v - (self.real - x) / length).square().mean()                       # Eq. 16 / (sigma' - sigma)^2
        self.noise, self.level = noise, torch.where(sigma_next == 0, levels, torch.zeros_like(levels))
        self.seen_at = torch.where(sigma_next == 0, levels, sigma_next)

    def seen(self, x: Tensor) -> Tensor:
        """What D is shown of an x_t-ns."""
        return (1 - column(self.level)) * x + column(self.level) * self.noise

    def losses(self, critic: Discriminator, context: list) -> Iterator[Tensor]:
        """That of D, whose gradient reaches D alone; when it is asked for the next, that of the student."""
        before = critic.features(self.x, self.sigma, context) if critic.sees_x_t else []
        real, fake = (critic.features(self.seen(x), self.seen_at, context) for x in (self.real, self.fake.detach()))
        yield loss_of_discriminator(critic(real, before), critic(fake, before))         # Eq. 18 to 20
        before = [tokens.detach() for tokens in before]     # of D before its step; a pass less
        with fixed(critic):
            fake = critic.features(self.seen(self.fake), self.seen_at, context)
            yield loss_of_student(critic(fake, before))                                 # Eq. 21


# ---------------------------------------------------------------------------------------------------- the program
@dataclass
class Options:
    from_steps: int = option(64, "solver steps of the teacher")
    to_steps: int = option(16, "solver steps of the student; they divide those of the teacher")
    teacher: str = option("", "what teaches: a folder with a transformer/ or a LoRA, such as the --out of the stage "
                          "before; without it the undistilled model, with guidance and by MSE")
    init: str = option("", "what the student starts from; default the teacher")
    model: str = option("embedded", "checkpoint folder or hub id of an undistilled model; default the embedded one")
    data: str = option(WORLD, "captions: a .jsonl or a folder of .txt; default those of the embedded models' world")
    out: str = option("out/tiny/lightning", "folder of the state, the log and the result")
    tune: str = option(FULL, "what is trained: all weights, or a LoRA on the undistilled model", choices=(FULL, LORA))
    rank: int = option(16, "of a new LoRA")
    relaxed: bool = option(False, "D does not see x_t (Eq. 23)")
    critic: str = option("heads", "what of D learns: its heads, or the whole of it, as published",
                         choices=("heads", "whole"))
    guidance: float = option(2.0, "of the undistilled model, where it teaches")
    steps: int = option(600, "optimizer steps")
    batch: int = option(16, "states in a step")
    lr: float = option(1e-4, "learning rate of the student")
    critic_lr: float = option(1e-3, "learning rate of D")
    anchor: float = option(0.1, "weight of the MSE beside the adversarial loss")
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
        for name, most in (("lr", 1), ("critic_lr", 1), ("anchor", 1e6), ("guidance", 100), ("ema", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: give a number from 0 to {most:g}")
        if self.from_steps % self.to_steps or self.from_steps == self.to_steps:
            raise InputError(f"--from-steps {self.from_steps} --to-steps {self.to_steps}: the student's steps do not "
                             f"divide the teacher's; give a multiple, such as {2 * self.to_steps}")
        if self.relaxed and not self.teacher:
            raise InputError("--relaxed: without --teacher there is no discriminator; give the stage before")
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
        if teacher is None:
            warn_distilled(base)
        self.device, self.is_adversarial, torch_seed = device, teacher is not None, cfg.seed
        self.source = (World(folder, cfg.seed) if cfg.data == WORLD else
                       Captions(folder, Path(cfg.data), cfg.size, device, dtype))
        self.teaches, self.teaching = read_network(teacher, base, device, dtype)
        torch.manual_seed(torch_seed)                                                   # of D's heads
        self.tuned = tuned_of(cfg, base, init, device, dtype)
        betas = (0.0, 0.99) if self.is_adversarial else (0.9, 0.999)
        self.optimizer = torch.optim.Adam(self.tuned.parameters().values(), lr=cfg.lr, betas=betas)
        if self.is_adversarial:
            backbone, learns = backbone_of(base), cfg.critic == "whole"
            width = backbone.width(read_json(base / "transformer" / "config.json"))
            network = backbone.load(base, device, torch.float32 if learns else dtype)
            self.critic = Discriminator(network, width, not cfg.relaxed, learns).to(device)
            self.learned = {name: p for name, p in self.critic.named_parameters() if p.requires_grad}
            self.critic_optimizer = torch.optim.Adam(self.learned.values(), lr=cfg.critic_lr, betas=betas)
        shift = shift_rule(folder)(cfg.to_steps, *self.source.shape[1:])
        self.grid = segments(shift, cfg.to_steps, cfg.from_steps // cfg.to_steps)
        self.walkers = Walkers(self.source, cfg.batch, cfg.to_steps, cfg.seed)

    # ------------------------------------------------------------------------------------------------ one step
    def lesson(self) -> tuple[Lesson, list[Context]]:
        """The batch of this step, and its contexts."""
        cfg, walkers, device = self.cfg, self.walkers, self.device
        walkers.begin(self.step)
        mine, told = ([context.to(device) for context in side] for side in walkers.contexts)
        empty = [self.source.empty.to(device)] * cfg.batch
        guidance = 1.0 if self.is_adversarial else cfg.guidance
        g = generator(cfg.seed + 1, self.step)
        noise, levels = torch.randn(walkers.x.shape, generator=g), torch.zeros(cfg.batch)
        if cfg.to_steps <= 2:
            levels = torch.tensor(NOISED)[torch.randint(len(NOISED), (cfg.batch,), generator=g)]
        return Lesson(walkers.x.to(device), self.grid[walkers.k].to(device), self.tuned.student(mine),
                      guided(self.teaches, told, empty, guidance, self.teaching), noise.to(device),
                      levels.to(device)), mine

    def learn(self) -> dict[str, float]:
        """One optimizer step of D and of the student; returns numbers for the log. Raises InputError."""
        lesson, context = self.lesson()
        loss, numbers = lesson.mse, {"mse": lesson.mse.item()}
        if self.is_adversarial:
            losses = lesson.losses(self.critic, context)
            of_critic = next(losses)
            numbers["D"] = of_critic.item()
            self.update(self.critic_optimizer, of_critic, lambda: nn.utils.clip_grad_norm_(self.learned.values(), 1.0))
            of_student = next(losses)
            numbers["G"] = of_student.item()
            loss = of_student + self.cfg.anchor * lesson.mse
        if not self.is_adversarial or self.step >= HEAD_START:
            self.update(self.optimizer, loss, lambda: self.tuned.clip_(1.0))
            self.tuned.ema_(self.cfg.ema)
        self.walkers.advance(lesson.fake.detach().cpu())
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
        self.tuned.load_state({name[len("tuned."):]: tensor for name, tensor in state.items() if "tuned." in name[:6]})
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
            mine.load_tensors(adapter.tensors())
        return tuned
    if cfg.tune == LORA:
        raise InputError(f"--init {init}: holds a whole network, and a LoRA is one of the undistilled model; give the "
                         "result of a stage with --tune lora, or --tune full")
    config = read_json((base if init is None or lora_file(init) else init) / "transformer" / "config.json")
    return Full(lambda precision: merged(*read_network(init, base, device, precision)), config, torch.float32, ALONE,
                "ema", needs_base=False)


def main(argv: list[str] | None = None) -> int:
    cfg = parse(Options, argv, __doc__.split("\n\n")[0])
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
