"""How well does a model draw in 1, 2, 4 and 8 steps? `python -m tiny.few_steps --network NAME=FOLDER ...`

For every network and number of steps, read back exactly from pictures (metrics.py):
- ordinary: the share that is right of all that prompts say, about objects that training never drew;
- decided: how clearly the cells of the backdrop carry a mark or none;
- distance to the world;
- diversity: how often two pictures of the same prompt differ by a mark. Fair coins, as in the world, give 0.5. Where
  marks are not decided, it is a coin of the reader's.

A network is a folder with a transformer/ (tiny/model, tiny/base, what `tiny.making.lightning` writes), or a LoRA for
--base. `NAME=FOLDER:GUIDANCE` walks with classifier-free guidance. Writes few_steps.json and few_steps.png.
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor

from networks import vae as autoencoder
from plumbing import lora_files
from plumbing.checkpoints import EMBEDDED, backbone_of
from plumbing.files import InputError, write_json
from plumbing.pictures import save_png
from plumbing.program import run
from tiny.comparison import markdown
from tiny.contexts import load_features
from tiny.evaluate import check, draw
from tiny.metrics import Reader, diversity
from tiny.models import base_of
from tiny.score import of_ordinary, ordinary_prompts
from tiny.world import SIDE, generator, grid

MEASURES = {"ordinary": "right", "ordinary, decided": "marks decided", "ordinary, distance": "distance to the world",
            "diversity": "diversity"}
GROUP = 4                   # pictures of each prompt that diversity compares


class Walker:
    """A network with or without an adapter, and its guidance."""

    def __init__(self, entry: str, base: Path) -> None:
        """entry: NAME=FOLDER, NAME=LORA.safetensors, either with :GUIDANCE. base: what a LoRA belongs to."""
        self.name, _, rest = entry.partition("=")
        path, _, guidance = rest.rpartition(":") if ":" in rest else (rest, "", "1")
        if not self.name or not path:
            raise InputError(f"--network {entry}: no name or no path; write NAME=FOLDER or NAME=FOLDER:GUIDANCE")
        try:
            self.guidance = float(guidance)
        except ValueError:
            raise InputError(f"--network {entry}: {guidance:.40} is not a guidance; write NAME=FOLDER:2") from None
        is_lora = path.endswith(".safetensors")
        folder = base if is_lora else Path(path)
        self.net = backbone_of(folder).load(folder, "cpu", torch.float32)
        self.adapter = lora_files.load(path, self.net) if is_lora else None


class Questions:
    """Ordinary prompts with their noises, the same for all walkers; the first few are drawn GROUP times."""

    def __init__(self, folder: Path, prompts: int, seed: int) -> None:
        self.vae, self.reader, features = autoencoder.load(folder, "cpu"), Reader(), load_features(folder)
        g = generator(seed, 0)
        self.prompts = ordinary_prompts(prompts, g)
        self.contexts = features.contexts(self.prompts.captions)
        (self.empty,) = features.contexts([""])
        self.several = [context for context in self.contexts[:max(prompts // 10, 1)] for _ in range(GROUP)]
        self.noise, self.noise_again = (torch.randn(count, self.vae.channels, SIDE // 4, SIDE // 4, generator=g)
                                        for count in (prompts, len(self.several)))

    def __call__(self, walker: Walker, steps: int) -> tuple[dict[str, float], Tensor]:
        """The measures, and the first pictures."""
        def pictures(contexts: list, noise: Tensor) -> Tensor:
            return draw(walker.net, self.vae, contexts, noise, steps, walker.adapter, walker.guidance, self.empty)
        drawn = pictures(self.contexts, self.noise)
        again = self.reader(pictures(self.several, self.noise_again))
        return of_ordinary(self.reader(drawn), self.prompts) | {
            "diversity": diversity(again, GROUP, self.reader.render)}, drawn[:8]


def table(report: dict[str, dict[str, dict[str, float]]]) -> str:
    """name -> number of steps -> measures, as Markdown."""
    return markdown(["", "steps", *MEASURES.values()], [
        [name, steps, *(f"{numbers[key]:.3f}" for key in MEASURES)] for name, lines in report.items()
        for steps, numbers in lines.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="checkpoint folder whose VAE and encoder are used")
    parser.add_argument("--base", type=Path, help="folder of the transformer that LoRAs belong to; default tiny/base")
    parser.add_argument("--network", action="append", required=True, metavar="NAME=FOLDER[:GUIDANCE]",
                        help="folder with a transformer/, or a LoRA; repeatable")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8], help="of the sampler; default 1 2 4 8")
    parser.add_argument("--prompts", type=int, default=500, help="ordinary prompts; default 500")
    parser.add_argument("--seed", type=int, default=100, help="of prompts and noises; default 100")
    parser.add_argument("--out", type=Path, default=Path("out/tiny/few-steps"), help="folder of the report")
    options = parser.parse_args()
    check(options)
    walkers = [Walker(entry, options.base or base_of(options.model)) for entry in options.network]
    ask, report, shown = Questions(options.model, options.prompts, options.seed), {}, []
    for walker in walkers:
        for steps in options.steps:
            numbers, pictures = ask(walker, steps)
            report.setdefault(walker.name, {})[str(steps)] = numbers
            shown.append(pictures)
            print(table({walker.name: {str(steps): numbers}}).splitlines()[-1], flush=True)
    facts = {"seed": str(options.seed), "networks": " ".join(options.network)}
    save_png(grid(torch.cat(shown), 8, scale=2), options.out / "few_steps.png", facts)
    write_json(options.out / "few_steps.json", report)
    print(f"\n{table(report)}\n\ndone     {options.out / 'few_steps.json'}, few_steps.png beside it")


if __name__ == "__main__":
    run(main)
