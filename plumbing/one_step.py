"""What one step of D-OPSD looks like, before and after training: `python -m plumbing.one_step --run out/star`

For each of the K states that the student visits on the way from one noise (Eq. 3): the noisy state x, what student and
teacher take it for, x0_hat = x - sigma v (Eq. 5 and 6), and where these two differ, which is what Eq. 7 makes small.
Before training both sides have the same weights; only the teacher is shown the target, as in training.
"""
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor
from tqdm import tqdm

import data
import lora
import sample
from networks import vae as autoencoder
from plumbing import lora_files
from plumbing.checkpoints import (backbone_of, latent_shape, model_folder, pixels_per_patch, recipe_of, shift_rule,
                                  starting_noise)
from plumbing.files import InputError, check_writable, read_json
from plumbing.machine import device_and_dtype, free
from plumbing.options import option, parse
from plumbing.pictures import crop, fit, open_image, panel, save_png, to_image
from plumbing.program import run as run_program
from plumbing.quantized import FLOAT
from rollout import Velocity, rollout, sigma_grid

ROWS = ("x: the state that the student visits", "what the student takes it for", "what the teacher takes it for, who "
        "is shown the target", "where the two differ (darker is more)")
BRIGHTER = 2    # differences are drawn so many times as strong


@dataclass
class Options:
    run: str = option(dataclasses.MISSING, "folder of a run of train.py that has a teacher which is shown the target")
    image: int = option(1, "number of the picture in the data that is the target, and whose caption is the prompt")
    out: str = option("out/one_step.png", "PNG file to write")


@torch.no_grad()
def step(student: Velocity, teacher: Velocity, x: Tensor, sigmas: Tensor
         ) -> Iterator[tuple[float, float, list[Tensor]]]:
    """For each state: sigma, || u_s - u_t ||^2 of Eq. 7, and [x, x0_hat of the student, x0_hat of the teacher]."""
    for point in rollout(student, x, sigmas):                                       # Eq. 3
        v_teacher = teacher(point.x, point.sigma)                                   # Eq. 6
        estimates = [point.x - point.sigma * v for v in (point.v, v_teacher)]
        yield point.sigma, float((point.v - v_teacher).square().mean()), [point.x, *estimates]


def difference(a: Image.Image, b: Image.Image) -> Image.Image:
    """White where two pictures are equal."""
    gap = ImageOps.grayscale(ImageChops.difference(a, b)).point(lambda value: min(255, BRIGHTER * value))
    return ImageOps.invert(gap).convert("RGB")


def main(argv: list[str] | None = None) -> int:
    cfg = parse(Options, argv, "Draw what one step of D-OPSD looks like, before and after training.")
    folder, out = Path(cfg.run), Path(cfg.out)
    check_writable(out.parent, f"--out {out}")
    if not (folder / "config.json").is_file():
        raise InputError(f"--run {folder}: holds no run, config.json: no such file; give a folder that train.py wrote")
    options = read_json(folder / "config.json", "options")["options"]               # those of train.py
    if not (folder / "teacher.safetensors").is_file():
        raise InputError(f"--run {folder}: has no teacher.safetensors, so no teacher that is shown the target; give a "
                         "run of --method dopsd")
    rows = data.read_folder(options["data"][0], caption=options.get("caption", ""))
    if not 1 <= cfg.image <= len(rows):
        raise InputError(f"--image {cfg.image}: {options['data'][0]} has {len(rows)}; give 1 to {len(rows)}")
    row, model = rows[cfg.image - 1], model_folder(options["model"])
    device, dtype = device_and_dtype("auto", "auto")
    backbone, recipe, multiple = backbone_of(model), recipe_of(model), pixels_per_patch(model)
    size = data.nearest_shape(row.size, data.bucket_shapes(options["size"], multiple))
    quantize = options.get("quantize", FLOAT)                                       # which older runs do not say

    words = ["--prompt", row.captions[0], "--reference", str(row.image), "--teacher-rope", options["teacher_rope"],
             "--teacher-context", options["teacher_context"], *(["--vlm", options["vlm"]] if options["vlm"] else []),
             "--quantize", quantize]
    sources = [fit(open_image(path), multiple, options["size"] ** 2, path) for path in row.sources]
    (c_s,), (c_t,) = sample.contexts_of(parse(sample.Options, words, ""), model, recipe, [row.captions[0]], sources,
                                        size, device, dtype)
    free()
    net, shape = backbone.load(model, device, dtype, quantize=quantize), latent_shape(model, *size)
    x, c_s, c_t = starting_noise(backbone, options["seed"], shape).to(device), c_s.to(device), c_t.to(device)
    sigmas = sigma_grid(shift_rule(model)(options["rollout_steps"], *shape[1:]), options["rollout_steps"])
    theta, theta_bar = (lora_files.load(folder / name, net) for name in
                        (f"{options.get('name', 'student')}.safetensors", "teacher.safetensors"))
    columns: dict[str, list[Image.Image | None]] = {}
    vae = autoencoder.load(model, device)
    for when, mine, theirs in (("before", None, None), ("after", theta, theta_bar)):
        sides = lora.velocity_of(net, [c_s], mine), lora.velocity_of(net, [c_t], theirs)
        for sigma, loss, latents in tqdm(step(*sides, x, sigmas), desc=when, total=len(sigmas) - 1, disable=None):
            state, student, teacher = (to_image(vae.decode(z)[0]) for z in latents)
            columns[f"{when}, sigma {sigma:.3g}: {loss:.3f}"] = [state, student, teacher, difference(student, teacher)]
    columns["target"] = [crop(open_image(row.image), size), None, None, None]
    note = f'"{row.captions[0]}"; above each column the squared difference of the velocities, Eq. 7'
    save_png(panel(columns, list(ROWS), note), out, {"prompt": row.captions[0], "seed": options["seed"]})
    print(out)
    return 0


if __name__ == "__main__":
    run_program(main)
