"""Did it work, and did it break anything? Scores of a run, the student beside the base on the same noise.

    python evaluate.py --run out/star                                                   # a run of train.py
    python evaluate.py --data DIR --lora FILE --model Tongyi-MAI/Z-Image-Turbo          # any LoRA, on a CUDA GPU
    python evaluate.py --compare out/star out/other                                     # runs side by side, on one page

Both draw new prompts with [V], the captions of training, and ordinary prompts that neither training nor --keep has
seen; D-OPSD (arXiv 2605.05204, Section 4) asks for the first two. Measured are, with the networks of
plumbing/judges.py,

    CLIP-S      does the picture show what the prompt says?
    DINO-D      how far is it from the picture that the caption belongs to?
    VLM-J       is it the same object, or the same style?

and, without a network, sharpness, which a broken few-step model loses, and what became of ordinary prompts (change).
Pictures of the embedded models are read back exactly instead (tiny/exact.py). Differences of student and base come with
an interval: what other prompts and other noises might have given (plumbing/scores.py).

Differs from the paper: LPIPS-D and the two scores of an unpublished network are missing, and scores.json says so; the
prompts are fixed lists (captions/), or the VLM's with --write-prompts, as in the released evaluation.
"""
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

from plumbing.options import InputError, check_seed, option, parse

WHAT, DRAWN, JUDGES, MACHINE = "what to score", "what is drawn", "who judges", "output and machine"   # of --help


@dataclass
class Options:
    """None stands for the run's value, or for the default of the checkpoint."""
    run: str | None = option(None, "folder of a run of train.py; its config.json says the rest", WHAT)
    data: str | None = option(None, "without --run: the images and captions that were learned", WHAT)
    lora: str | None = option(None, "without --run: the adapter to score", WHAT)
    model: str | None = option(None, "without --run: the checkpoint (default: embedded, which is tiny/model)", WHAT)
    compare: list[str] = option([], "folders of runs: write one page that has them side by side, and score nothing",
                                WHAT, nargs="+")

    prompts: str | None = option(None, "text file, on each line a new prompt with [V] (default: captions/new_*.txt)",
                                 DRAWN)
    write_prompts: bool = option(False, "the VLM of --judge writes new prompts and rewrites the captions", DRAWN)
    ordinary: str | None = option(None, "text file of prompts without [V] (default: captions/unseen.txt)", DRAWN)
    steps: list[str] = option([], "further numbers of solver steps, beside the checkpoint's own", DRAWN, nargs="+",
                              metavar="N")
    seeds: int = option(2, "number of noises for each prompt", DRAWN)
    seed: int = option(0, "the first noise's seed, as in sample.py", DRAWN)

    class_name: str = option("", "what [V] is, such as dog: CLIP does not know [V]", JUDGES)
    clip: str | None = option(None, "network for CLIP-S, folder or hub id, or none", JUDGES)
    dino: str | None = option(None, "network for DINO-D and the change of ordinary prompts, or none", JUDGES)
    judge: str | None = option(None, "Qwen3-VL for VLM-J and --write-prompts, or none", JUDGES)

    out: str | None = option(None, "folder for scores.json and the pictures, or page of --compare (default: the run's, "
                             "else out/evaluation; out/compare.html)", MACHINE)
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto takes CUDA when there is one", MACHINE)
    dtype: str = option("auto", "precision of the networks; auto is bfloat16 on CUDA, else float32", MACHINE,
                        choices=("auto", "float32", "bfloat16"))
    quantize: str | None = option(None, "precision of the blocks' weights: int8 or none (default: the run's)", MACHINE,
                                  choices=("none", "int8"))


if __name__ == "__main__":
    parse(Options, None, __doc__)   # --help and misspelt words are answered here, before torch takes seconds to load

import torch
from torch import Tensor
from tqdm import tqdm

import lora
from data import Row, read_folder, read_text
from encoder import contexts
from networks import vae as autoencoder
from plumbing import encoder_files, judges, lora_files, report
from plumbing.checkpoints import (backbone_of, check_quantize, latent_shape, model_folder, recipe_of, shift_rule,
                                  starting_noise)
from plumbing.files import ROOT, check_writable, write_json
from plumbing.judges import OBJECT, STYLE
from plumbing.machine import check_memory, device_and_dtype, free, sampling_gb
from plumbing.pictures import open_image, panel, save_png, to_image, to_tensor
from plumbing.program import run as run_program
from plumbing.scores import BASE, NEW, ORDINARY, STUDENT, TRAINING, row_of, told
from plumbing.train_options import FULL, NONE
from plumbing.train_options import Options as TrainOptions
from rollout import sigma_grid
from sample import draw as draw_latents
from tiny.exact import exact

GROUPS = NEW, TRAINING, ORDINARY
DEFAULTS = {"clip": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "dino": "facebook/dinov3-vits16plus-pretrain-lvd1689m",
            "judge": "Qwen/Qwen3-VL-8B-Instruct"}
KINDS = {"clip": judges.CLIP, "dino": judges.DINO, "judge": judges.VLM}
BETTER = {"CLIP-S": "higher", "DINO-D": "lower", "VLM-J": "higher", "sharpness": "same", "change, DINO": "lower",
          "change, pixels": "lower"}
MISSING = ["LPIPS-D: its network is not in transformers", "Quality-S and Aesthetic-S: their network is not published"]
CAPTIONS = ROOT / "captions"
MOST_CAPTIONS = 16                      # of training that are drawn
Place = tuple[int, int, int, int]       # number of steps, base (0) or student (1), prompt, noise
Files = dict[Place, Path]               # of the pictures drawn


# ---------------------------------------------------------------------------------------------------- what is scored
@dataclass(frozen=True)
class Subject:
    """What is scored. One of lora and transformer is there."""
    folder: Path                # of the checkpoint
    data: list[str]             # what was learned,
    rows: list[Row]             # and what is in it
    out: Path
    quantize: str
    caption: str = ""
    lora: str | None = None
    transformer: str | None = None

    @property
    def name(self) -> str:
        return Path(self.lora or self.transformer or "").absolute().parent.name

    @property
    def kind(self) -> str:
        return STYLE if any("[V] style" in caption for row in self.rows for caption in row.captions) else OBJECT


def subject_of(cfg: Options) -> Subject:
    """From a run's folder, or from --data and --lora. Raises InputError."""
    if bool(cfg.run) == bool(cfg.lora) or cfg.run and (cfg.data or cfg.model) or cfg.lora and not cfg.data:
        raise InputError("--run, --lora: give --run DIR of train.py, or --data DIR and --lora FILE, with --model if it "
                         "is not the embedded one")
    config = Path(cfg.run or "") / "config.json"
    if cfg.run:
        if not config.is_file():
            raise InputError(f"--run {cfg.run}: no config.json there; give the folder of a run of train.py")
        trained = parse(TrainOptions, ["--config", str(config)], "")
    else:
        trained = TrainOptions([cfg.data or ""], model=cfg.model or "embedded", name=Path(cfg.lora or "").stem)
    rows = [row for folder in trained.data for row in read_folder(folder, True, trained.caption)]
    if any(row.sources for row in rows):
        raise InputError(f"{trained.data[0]}: for editing, which is not scored here; look at the run's panels, or, of "
                         "the embedded FLUX.2, run python -m tiny.score_edits")
    full = str(config.with_name("student") / "transformer") if trained.tune == FULL else None
    adapter = None if full else cfg.lora or str(config.with_name(f"{trained.name}.safetensors"))
    return Subject(model_folder(trained.model), trained.data, rows, Path(cfg.out or cfg.run or "out/evaluation"),
                   cfg.quantize or trained.quantize, trained.caption, adapter, full)


@dataclass(frozen=True)
class Prompt:
    """Something to draw. reference: a picture that shows the concept; is_pair: it is this very prompt's."""
    group: str
    text: str
    reference: Path | None = None
    is_pair: bool = False


def named(prompt: str, class_name: str) -> str:
    """The prompt for a network that does not know [V]: "a [V] dog on grass" and "a [V] on grass" are of a dog."""
    if not class_name:
        return " ".join(prompt.replace(" in [V] style", "").replace("[V]", "").split())
    return prompt.replace(f"[V] {class_name}", class_name).replace("[V]", class_name)


def lines_of(path: str | Path, flag: str) -> list[str]:
    """Prompts of a text file. Raises InputError."""
    if not (found := [line.strip() for line in read_text(Path(path)).splitlines() if line.strip()]):
        raise InputError(f"{flag} {path}: no prompt in it; write one on each line")
    return found


def prompts_of(cfg: Options, subject: Subject, vlm: Path | None, device: torch.device, dtype: torch.dtype
               ) -> list[Prompt]:
    """All that is drawn: new prompts, the captions of pictures, ordinary prompts. vlm: writes the first two."""
    shown = [(row.image, row.captions[0]) for row in subject.rows if row.image][:MOST_CAPTIONS]
    captions, new = [caption for _, caption in shown], list[str]()
    if cfg.write_prompts and vlm:
        captions, new = judges.written_prompts(vlm, shown, subject.kind, cfg.class_name or "object", device, dtype)
    said = [caption for row in subject.rows for caption in row.captions if "[V]" in caption]
    if cfg.prompts or said and not new:
        new = lines_of(cfg.prompts or CAPTIONS / f"new_{subject.kind}.txt", "--prompts")
        if not cfg.prompts and cfg.class_name and all(f"[V] {cfg.class_name}" in caption for caption in said):
            new = [prompt.replace("[V]", f"[V] {cfg.class_name}") for prompt in new]    # as the captions say it
    if not new:
        print("note: no caption says [V], so there are no new prompts; give --prompts FILE", file=sys.stderr)
    return [*(Prompt(NEW, text, shown[i % len(shown)][0] if shown else None) for i, text in enumerate(new)),
            *(Prompt(TRAINING, text, image, is_pair=True) for text, (image, _) in zip(captions, shown)),
            *(Prompt(ORDINARY, text) for text in lines_of(cfg.ordinary or CAPTIONS / "unseen.txt", "--ordinary"))]


# ---------------------------------------------------------------------------------------------------- drawing
@torch.no_grad()
def draw(cfg: Options, subject: Subject, prompts: list[Prompt], steps: list[int], device: torch.device,
         dtype: torch.dtype) -> Files:
    """Files of pictures. Text encoder, transformer and VAE come one after the other."""
    folder, size, backbone = subject.folder, recipe_of(subject.folder).size, backbone_of(subject.folder)
    reader = encoder_files.load(folder, device, dtype, quantize=subject.quantize)
    read = [contexts(text.cpu(), None)[0] for text in reader.text_context([prompt.text for prompt in prompts])]
    del reader
    free()
    shape, shift_of = latent_shape(folder, size, size), shift_rule(folder)
    latents: dict[tuple[int, int, int], Tensor] = {}                    # of all prompts
    net, adapter = backbone.load(folder, device, dtype, quantize=subject.quantize), None
    for view, name in enumerate((BASE, STUDENT)):
        if view == 1 and subject.transformer:
            del net                                                     # one network is in memory at a time
            free()
            net = backbone.load(folder, device, dtype, quantize=subject.quantize, transformer=subject.transformer)
        elif view == 1 and subject.lora:
            adapter = lora_files.load(subject.lora, net)
        network = partial(lora.velocity_of, net, adapter=adapter)
        for (s, count), k in product(enumerate(steps), range(cfg.seeds)):
            noise = starting_noise(backbone, cfg.seed + k, shape).to(device)
            sigmas = sigma_grid(shift_of(count, *shape[1:]), count)
            latents[s, view, k] = draw_latents(network, tqdm(read, desc=name, disable=None), noise, sigmas, name).cpu()
        del network
    del net
    free()
    vae, files = autoencoder.load(folder, device), dict[Place, Path]()
    for (s, view, k), drawn in tqdm(latents.items(), desc="decoding", disable=None):
        for p, z in enumerate(drawn):
            path = subject.out / "evaluation" / f"{steps[s]}_steps" / f"{(BASE, STUDENT)[view]}_{p:03d}_{k}.png"
            files[s, view, p, k] = path
            save_png(to_image(vae.decode(z[None].to(device))[0]), path,
                     {"prompt": prompts[p].text, "seed": cfg.seed + k, "steps": steps[s]})
    return files


# ---------------------------------------------------------------------------------------------------- judging
@torch.no_grad()
def judged(cfg: Options, subject: Subject, networks: dict[str, Path], prompts: list[Prompt], files: Files,
           device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Measure -> values (steps, base and student, prompts, noises), not a number where a measure does not apply."""
    shape = [1 + max(place[i] for place in files) for i in range(4)]
    found: dict[str, Tensor] = {}

    def put(measure: str, places: Iterable[Place], values: Iterable[float | Tensor]) -> None:
        found[measure] = torch.full(shape, math.nan)
        for place, value in zip(places, values, strict=True):
            found[measure][place] = value

    reference = {place: image for place in files if (image := prompts[place[2]].reference)}
    paired, students = [place for place in reference if prompts[place[2]].is_pair], [x for x in files if x[1] == 1]
    base = {(s, view, p, k): files[s, 0, p, k] for s, view, p, k in students}       # its picture of the same noise
    if "clip" in networks:
        texts = [named(prompts[place[2]].text, cfg.class_name) for place in files]
        put("CLIP-S", files, judges.clip_scores(networks["clip"], list(files.values()), texts, device, dtype))
    if "dino" in networks:
        seen = list(dict.fromkeys([*files.values(), *(reference[place] for place in paired)]))
        feature = dict(zip(seen, judges.dino_features(networks["dino"], seen, device, dtype)))
        put("DINO-D", paired, [1 - feature[files[place]] @ feature[reference[place]] for place in paired])
        put("change, DINO", students, [1 - feature[files[place]] @ feature[base[place]] for place in students])
    if "judge" in networks:
        pairs = [(image, files[place]) for place, image in reference.items()]
        put("VLM-J", reference, judges.verdicts(networks["judge"], pairs, subject.kind, cfg.class_name or "object",
                                                device, dtype))
    sharp, change = dict[Place, float](), dict[Place, float]()
    for (s, view, p, k), other in base.items():                         # every picture is read once
        theirs, ours = (to_tensor(open_image(path))[0] for path in (other, files[s, view, p, k]))
        sharp |= {(s, 0, p, k): judges.sharpness(theirs), (s, view, p, k): judges.sharpness(ours)}
        change[s, view, p, k] = judges.pixel_change(ours, theirs)
    put("sharpness", sharp, sharp.values())
    put("change, pixels", change, change.values())
    return found


def rows_of(prompts: list[Prompt], steps: list[int], found: dict[str, Tensor]) -> list[dict]:
    """The lines of scores.json: every measure for every group of prompts that it says something about."""
    rows = []
    for (s, count), group, (measure, better) in product(enumerate(steps), GROUPS, BETTER.items()):
        chosen = [p for p, prompt in enumerate(prompts) if prompt.group == group]
        if measure in found and chosen and (group == ORDINARY or not measure.startswith("change")):
            base, student = found[measure][s][:, chosen]
            if student.isfinite().any():
                rows.append(row_of(count, group, measure, better, base if base.isfinite().any() else None, student))
    return rows


def panels(subject: Subject, prompts: list[Prompt], steps: list[int], files: Files) -> list[str]:
    """For each number of steps and each group a panel of at most eight prompts; their paths from the run's folder."""
    written = []
    for (s, count), group in product(enumerate(steps), GROUPS):
        chosen = [p for p, prompt in enumerate(prompts) if prompt.group == group][:8]
        if chosen:
            shown = [open_image(image) if (image := prompts[p].reference) else None for p in chosen]
            columns = {"reference": shown} if any(shown) else {}
            for view, name in enumerate((BASE, STUDENT)):
                columns[name] = [open_image(files[s, view, p, 0]) for p in chosen]
            sheet = panel(columns, [prompts[p].text for p in chosen], f"{subject.name}: {group}, {count} solver steps")
            written.append(f"evaluation/{group.split()[0]}_{count}_steps.png")
            save_png(sheet, subject.out / written[-1], {"steps": count})
    return written


# ---------------------------------------------------------------------------------------------------- the program
def main(argv: list[str] | None = None) -> int:
    cfg = parse(Options, argv, __doc__)
    if cfg.compare:
        print(report.compare([Path(folder) for folder in cfg.compare], Path(cfg.out or "out/compare.html")))
        return 0
    check_seed(cfg.seed)
    if not 1 <= cfg.seeds <= 64 or not all(count.isdecimal() and 1 <= int(count) <= 1000 for count in cfg.steps):
        raise InputError(f"--seeds {cfg.seeds} --steps {' '.join(cfg.steps)}: not usable; give 1 to 64 noises and 1 to "
                         "1000 steps")
    subject, (device, dtype) = subject_of(cfg), device_and_dtype(cfg.device, cfg.dtype)
    recipe, backbone = recipe_of(subject.folder), backbone_of(subject.folder)
    check_writable(subject.out, f"--out {subject.out}")
    check_quantize(subject.folder, subject.quantize)
    skeleton = backbone.check(subject.folder, subject.transformer)      # before the larger work
    if subject.lora:
        lora_files.load(subject.lora, skeleton)
    steps = list(dict.fromkeys([recipe.inference_steps, *map(int, cfg.steps)]))
    about = {"model": str(subject.folder).removeprefix(f"{ROOT}/"), "data": ", ".join(subject.data),
             "weights": subject.lora or subject.transformer, "seed": cfg.seed}
    values: dict[str, list] = {}
    is_small = recipe is backbone.recipes[1]
    if is_small and not any((cfg.clip, cfg.dino, cfg.judge, cfg.prompts, cfg.ordinary, cfg.write_prompts)):
        rows, written = exact(subject, steps, cfg.seed)
    else:
        names = {name: getattr(cfg, name) or (NONE if is_small else usual) for name, usual in DEFAULTS.items()}
        networks = {name: judges.find(it, KINDS[name], f"--{name}") for name, it in names.items() if it != NONE}
        if cfg.write_prompts and "judge" not in networks:
            raise InputError("--write-prompts: no VLM to write them; give --judge")
        check_memory(replace(cfg, quantize=subject.quantize), subject.folder, device,
                     lambda cfg: sampling_gb(cfg, subject.folder, dtype))
        prompts = prompts_of(cfg, subject, networks.get("judge"), device, dtype)
        files = draw(cfg, subject, prompts, steps, device, dtype)
        found = judged(cfg, subject, networks, prompts, files, device, dtype)
        rows, written = rows_of(prompts, steps, found), panels(subject, prompts, steps, files)
        about |= {"seeds": cfg.seeds, "networks": names, "prompts": [prompt.text for prompt in prompts]}
        values = {measure: [None if math.isnan(value) else value for value in part.flatten().tolist()]
                  for measure, part in found.items()} | {"shape": list(found["sharpness"].shape)}
    write_json(subject.out / "scores.json", {"about": about, "rows": rows, "missing": MISSING, "pictures": written,
                                             "values": values})
    print(told(rows), f"done     {subject.out / 'scores.json'}, pictures in {subject.out / 'evaluation'}", sep="\n")
    if cfg.run and not cfg.out:
        print(f"report   {report.write(Path(cfg.run))}")
    return 0


if __name__ == "__main__":
    run_program(main, less_memory="score fewer --seeds, or use --dtype bfloat16 or --quantize int8")
