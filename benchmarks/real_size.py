"""One optimizer step at the true sizes: `python -m benchmarks.real_size --backbone zimage` (no weights are needed).

On a CUDA GPU it runs: seconds, peak memory, TFLOP/s. Without one it is simulated by fake tensors (live.py): peak and
TFLOP. The step is train.py's: `accumulate` batches of a rollout, `dopsd` and backward at every learned state, then
clip, AdamW and EMA. Adam's moments exist from the start, as in every step but the first, and so do gradients, as in
every backward pass but the first of a step. `--official` puts the released algorithm (official.py) beside it. The last
line is a JSON object.

Contexts have as many tokens as a caption of 100 words: student 128; the teacher 576 more, of a 768x768 picture
(Z-Image), or the target's latents as a reference (FLUX.2, whose texts are padded to 512).
"""
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import lora
from benchmarks import official, sharded
from benchmarks.live import GIB, Grid, Live, fused_norms
from loss import weight_of
from model import Z_IMAGE, Context
from networks.flux2 import KLEIN
from plumbing.backbone import compile_blocks
from plumbing.files import put
from plumbing.machine import PICTURE, activations_gb, trained_gb
from plumbing.options import option, parse
from plumbing.quantized import FLOAT, INT8
from plumbing.recipes import TURBO
from plumbing.train_options import FULL, LORA, NONE
from rollout import sigma_grid
from train import dopsd, draw_states

Z_CONFIG = {"all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "dim": 3840, "n_layers": 30,
            "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "norm_eps": 1e-5, "qk_norm": True,
            "cap_feat_dim": 2560, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512]}
KLEIN_4B = {"patch_size": 1, "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 7680, "timestep_guidance_channels": 256, "mlp_ratio": 3.0,
            "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "eps": 1e-6, "guidance_embeds": False}
KLEIN_9B = KLEIN_4B | {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32,
                       "joint_attention_dim": 12288}
BACKBONES = {"zimage": (Z_IMAGE, Z_CONFIG), "klein-4b": (KLEIN, KLEIN_4B), "klein-9b": (KLEIN, KLEIN_9B)}
PROMPT, PADDED = 128, 512         # tokens
# Dense bf16 TFLOP/s with float32 sums, from the makers' data sheets; the first name that the card's contains.
PEAKS = {"B200": 2250, "H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 6000 Ada": 364,
         "5090": 209, "4090": 165, "4080": 97, "3090": 71, "A6000": 155, "A10": 125, "L4": 121}


@dataclass
class Options:
    backbone: str = option("zimage", "whose architecture", choices=tuple(BACKBONES))
    size: int = option(TURBO.size, "side of the training picture in pixels")
    rank: int = option(TURBO.rank, "rank of the LoRA")
    tune: str = option(LORA, "lora; or full, for which it tells what each of 1 to 8 GPUs needs",
                       choices=(LORA, FULL))
    quantize: str = option(FLOAT, "the frozen Linear weights of the blocks: none, or int8", choices=(FLOAT, INT8))
    batch_size: int = option(TURBO.batch_size, "number of images in a forward pass")
    accumulate: int = option(TURBO.accumulate, "number of batches per optimizer step")
    grad_states: int = option(TURBO.rollout_steps, "number of the K = 4 states to learn at")
    checkpointing: bool = option(None, "recompute blocks in the backward pass (default: on)")
    compile: bool = option(False, "torch.compile the block; on a GPU only")
    official: bool = option(False, "measure the released algorithm, too, and the ratios")


# ------------------------------------------------------------------------------------------------------ what is run
def skeleton(cfg: Options, config: dict, released: bool) -> nn.Module:
    """The network without memory; of the released algorithm with its adapters."""
    with torch.device("meta"):
        model = BACKBONES[cfg.backbone][0].network(config)
        model.checkpointing = cfg.checkpointing
        if released:
            return official.network(model, config, cfg.rank, 2 * cfg.rank, cfg.checkpointing)
    for name, parameter in list(model.named_parameters()) if cfg.quantize == INT8 else ():
        put(model, name, parameter.detach(), torch.bfloat16, int8=name.startswith(tuple(model.blocks())))
    return model


def fill(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Random frozen weights; adapters in float32."""
    for name, meta in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        if meta.dtype == torch.int8:
            value = torch.randint(-127, 128, meta.shape, dtype=torch.int8, device=device)
        else:
            std = (0.01 if leaf == "scale" else 1.0) / (meta.shape[-1] ** 0.5 if meta.ndim == 2 else 1.0)
            value = torch.empty(meta.shape, dtype=torch.float32 if "lora_" in name else dtype, device=device)
            value.normal_(std=std)
        model.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def contexts(cfg: Options, config: dict, device: torch.device) -> tuple[list[Context], list[Context]]:
    """c_s and c_t of Eq. 4, by their sizes."""
    def repeat(words: int, width: int, *references: Tensor) -> list[Context]:
        return [Context(torch.randn(words, width, device=device), references)] * cfg.batch_size

    if cfg.backbone == "zimage":
        return repeat(PROMPT, config["cap_feat_dim"]), repeat(PROMPT + PICTURE, config["cap_feat_dim"])
    target = torch.randn(config["in_channels"] // 4, cfg.size // 8, cfg.size // 8, device=device)
    return repeat(PADDED, config["joint_attention_dim"]), repeat(PADDED, config["joint_attention_dim"], target)


def noise(cfg: Options, config: dict, device: torch.device) -> Tensor:
    """x at sigma = 1."""
    channels = config["in_channels"] // (1 if cfg.backbone == "zimage" else 4)
    return torch.randn(cfg.batch_size, channels, cfg.size // 8, cfg.size // 8, device=device)


class Program:
    """Ours, or the released one: the network, what is tuned, and one optimizer step."""

    def __init__(self, cfg: Options, config: dict, released: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.cfg, self.released, self.dtype = cfg, released, dtype
        self.model = skeleton(cfg, config, released)
        fill(self.model, dtype, device)
        if released:
            self.model.set_adapter("student")
            trained = official.parameters(self.model, "student")
        else:
            self.tuned = lora.Tuned(self.model, cfg.rank, 2 * cfg.rank, seed=0)
            trained = list(self.tuned.parameters().values())
        self.trained = trained
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, foreach=True)    # CUDA's default
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()                                           # makes the moments
        self.is_single = cfg.accumulate * (1 if released else cfg.grad_states) == 1     # backward pass of a step
        self.x = noise(cfg, config, device)
        self.c_s, self.c_t = contexts(cfg, config, device)

    def losses(self, sigmas: Tensor, learned: list[int]) -> Iterator[Tensor]:
        if self.released:
            student, teacher = (official.velocity(self.model, side, context, self.dtype)
                                for side, context in zip(official.SIDES, (self.c_s, self.c_t)))
        else:
            student, teacher = self.tuned.student(self.c_s), self.tuned.teacher(self.c_t)
        return dopsd(student, teacher, self.x, sigmas, weight_of("x0"), learned)

    def gradient(self, sigmas: Tensor, learned: list[int]) -> None:
        """Of one batch."""
        if self.is_single:                                              # so no gradients are there before it
            self.optimizer.zero_grad(set_to_none=True)
        if not self.released:
            for loss in self.losses(sigmas, learned):
                (loss / self.cfg.accumulate).backward()                 # one graph alive
            return
        loss = sum(self.losses(sigmas, learned)) / self.cfg.accumulate  # K graphs alive
        self.model.set_adapter("student")                               # which the recomputation must find
        loss.backward()

    def update(self) -> None:
        """The gradients stay: here the next step begins with them."""
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        if self.released:
            official.ema(self.model, TURBO.ema)
        else:
            self.tuned.ema_(TURBO.ema)


# ------------------------------------------------------------------------------------------------------ measuring
def draws(cfg: Options, batches: int, released: bool) -> list[list[int]]:
    """The states that each batch learns at; the released algorithm has all K."""
    K = TURBO.rollout_steps
    return [draw_states(K, K if released else cfg.grad_states, number, seed=0) for number in range(batches)]


def simulate(cfg: Options, config: dict, released: bool) -> dict[str, float]:
    """Peak in GiB and TFLOP of an optimizer step. Batches differ in their states alone, so one round of them is run."""
    sigmas = Grid(sigma_grid(3.0, TURBO.rollout_steps).tolist())
    drawn = draws(cfg, 1 if released else TURBO.rollout_steps, released)
    drawn = [learned for i, learned in enumerate(drawn) if sorted(learned) not in map(sorted, drawn[:i])]
    with FakeTensorMode(allow_non_fake_inputs=True), fused_norms(), Live() as live:
        program = Program(cfg, config, released, torch.bfloat16, torch.device("cpu"))
        live.peak, live.flop = live.now, 0
        for learned in drawn:
            program.gradient(sigmas, learned)
        program.update()
    return {"peak_gib": live.peak / GIB, "tflop": live.flop / 1e12 * cfg.accumulate / len(drawn)}


def run(cfg: Options, config: dict, released: bool, device: torch.device, dtype: torch.dtype, steps: int = 4
        ) -> dict[str, float]:
    """Seconds of an optimizer step (median; the first is not counted) and, on a GPU, its peak in GiB."""
    cuda = device.type == "cuda"
    program = Program(cfg, config, released, dtype, device)
    if cfg.compile and not released:
        compile_blocks(program.model)
    sigmas, seconds = sigma_grid(3.0, TURBO.rollout_steps), []
    for step in range(steps):
        if step == 1 and cuda:
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        for learned in draws(cfg, cfg.accumulate, released):
            program.gradient(sigmas, learned)
        program.update()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    peak = {"peak_gib": torch.cuda.max_memory_allocated(device) / GIB} if cuda else {}
    return {"seconds": statistics.median(seconds[1:]), **peak}


def measure(cfg: Options, config: dict, released: bool) -> dict[str, float | None]:
    """Simulated, and on a GPU measured, too; the released algorithm's with what it keeps resident."""
    found: dict[str, float | None] = {"seconds": None, **simulate(cfg, config, released)}
    if torch.cuda.is_available():
        found["simulated_gib"] = found["peak_gib"]
        found |= run(cfg, config, released, torch.device("cuda"), torch.bfloat16)
        torch.cuda.empty_cache()
    if released:
        found["resident_gib"] = official.resident_bytes(cfg.backbone) / GIB
    return found


def line(name: str, found: dict) -> str:
    """One measurement in words."""
    words = f"{name}: peak {found['peak_gib']:.1f} GiB"
    if "resident_gib" in found:
        words += f" + {found['resident_gib']:.1f} GiB of resident encoders"
    words += f", {found['tflop']:.0f} TFLOP per optimizer step"
    if found["seconds"] is None:
        return f"{words} (simulated)"
    rate, card = found["tflop"] / found["seconds"], torch.cuda.get_device_name()
    most = next((peak for part, peak in PEAKS.items() if part in card), None)
    share = f" ({rate / most:.0%} of its peak)" if most else ""
    return (f"{words}, {found['seconds']:.2f} s, {rate:.0f} TFLOP/s on {card}{share}; simulated peak "
            f"{found['simulated_gib']:.1f} GiB")


def of_one(cfg: Options, config: dict, processes: int, keeps: bool) -> tuple[float, float]:
    """GiB of each of the processes that share all weights, between steps and at the peak; keeps: with an untuned model
    for --keep."""
    def load(dtype: torch.dtype) -> nn.Module:
        model = skeleton(cfg, config, released=False)
        fill(model, dtype, torch.device("cpu"))
        return model

    def inputs() -> tuple[Tensor, list[Context], list[Context]]:
        return noise(cfg, config, torch.device("cpu")), *contexts(cfg, config, torch.device("cpu"))

    sigmas = sigma_grid(3.0, TURBO.rollout_steps).tolist()
    return sharded.simulate(load, inputs, weight_of("x0"), sigmas, processes, keeps)


def shared(cfg: Options, config: dict) -> Iterator[str]:
    """A line for each number of GPUs: GiB of each, with and without an untuned model for --keep; beside them the sums
    by which train.py checks what fits (machine.py)."""
    model, tokens = skeleton(cfg, config, released=False), (cfg.size // 16) ** 2
    given = SimpleNamespace(**vars(cfg), method="dopsd", teacher_weights="ema",
                            teacher_context="vlm" if cfg.backbone == "zimage" else "reference")
    for processes in (1, 2, 4, 8):
        sums = [trained_gb(SimpleNamespace(**vars(given), keep=keep), torch.bfloat16, model, processes)
                + activations_gb(given, tokens, torch.bfloat16, model) for keep in (NONE, "captions")]
        peaks = [of_one(cfg, config, processes, keeps)[1] for keeps in (False, True)]
        yield (f"{cfg.backbone}, {processes} GPUs: {peaks[0]:.1f} GiB each, {peaks[1]:.1f} with --keep (simulated); "
               f"summed {sums[0]:.1f}, {sums[1]:.1f}")


def main(argv: list[str] | None = None) -> None:
    cfg = parse(Options, argv, "One D-OPSD step at the true sizes, on random weights.")
    cfg.checkpointing = cfg.checkpointing is not False
    config = BACKBONES[cfg.backbone][1]
    if cfg.tune == FULL:
        for words in shared(cfg, config):
            print(words, flush=True)
        return
    ours = measure(cfg, config, released=False)
    print(line("ours", ours), flush=True)
    beside = {}
    if cfg.official:
        theirs = measure(cfg, config, released=True)
        print(line("released algorithm", theirs))
        ratios = {"peak": ours["peak_gib"] / (theirs["peak_gib"] + theirs["resident_gib"]),
                  "tflop": ours["tflop"] / theirs["tflop"]}
        if ours["seconds"]:
            ratios["seconds"] = ours["seconds"] / theirs["seconds"]
        print("ours / released: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
        beside = {"released": theirs, "ratio": ratios}
    print(json.dumps({**ours, **beside, **asdict(cfg)}))


if __name__ == "__main__":
    main()
