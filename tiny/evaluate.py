"""The embedded model's report card: `python -m tiny.evaluate`.

Everything is read back exactly from pictures (metrics.py).
1. 500 prompts about objects that training never drew: accuracy of every attribute that a prompt mentions, at four
   steps.
2. The teacher's view: 50 unseen objects from a picture of them elsewhere, drawn in a new place on a new backdrop.
Beside the shipped model stands the one before distillation, with and without guidance.
"""
import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from networks import vae as autoencoder
from plumbing.checkpoints import EMBEDDED, backbone_of
from plumbing.files import InputError, check_writable, write_json
from plumbing.pictures import save_png
from plumbing.program import run
from rollout import sample
from tiny.contexts import load_features
from tiny.metrics import Reader, accuracy, told_accuracy, whole
from tiny.models import base_of, grid_of, guided
from tiny.world import COLUMN, OBJECT_ATTRIBUTES, caption, draw_scenes, generator, grid, other_view, random_tell

COLUMNS = {"ordinary prompts": {"ordinary: accuracy of what was said": "right", "ordinary: marks decided": "decided",
                                "ordinary: distance to the world": "distance"},
           "teacher's view": {"teacher: mean": "right", "teacher: whole objects right": "whole objects",
                              "teacher: backdrop": "backdrop", "teacher: distance": "distance"}}
MOST_PROMPTS, MOST_SEED = 10_000, 2 ** 32 - 1       # nobody means more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=EMBEDDED,
                        help="checkpoint folder of the embedded kind; default tiny/model")
    parser.add_argument("--base", type=Path, help="folder with the transformer/ before distillation; default "
                        "tiny/base or tiny/flux2_base, whichever belongs to the model")
    parser.add_argument("--out", type=Path, default=Path("out/tiny/evaluate"),
                        help="folder for report.json and the pictures; default out/tiny/evaluate")
    parser.add_argument("--prompts", type=int, default=500,
                        help="number of ordinary prompts, about objects that training never drew; default 500")
    parser.add_argument("--seed", type=int, default=100,
                        help="random seed for the prompts, the teacher's pictures and the noise; default 100")
    options = parser.parse_args()

    check(options)
    backbone = backbone_of(options.model)
    features, vae, reader = load_features(options.model), autoencoder.load(options.model, "cpu"), Reader()
    student, base = (backbone.load(folder, "cpu", torch.float32)
                     for folder in (options.model, options.base or base_of(options.model)))
    walkers = {"shipped, 4 steps": (student, 4, 1.0), "base, 4 steps": (base, 4, 1.0),
               "base, 4 steps, guidance 2": (base, 4, 2.0), "base, 16 steps, guidance 2": (base, 16, 2.0)}

    g = generator(options.seed, 0)
    rows = draw_scenes(options.prompts, g, held_out="object")
    told = [random_tell(g) for _ in rows]
    new = draw_scenes(50, g, held_out="object", styled=0.0)
    views = other_view(new, "object", g)
    same_place = ((views[:, COLUMN["place"]] == new[:, COLUMN["place"]])
                  | (views[:, COLUMN["backdrop"]] == new[:, COLUMN["backdrop"]]))
    views[same_place, COLUMN["place"]] = (new[same_place, COLUMN["place"]] + 1) % 5
    views[same_place, COLUMN["backdrop"]] = (new[same_place, COLUMN["backdrop"]] + 1) % 6
    ordinary = features.contexts([caption(row, tell) for row, tell in zip(rows, told)])
    shown, truth = reader.render.draw(views, g), reader.render.draw(new, g)
    seen = features.contexts([caption(row, concept="object") for row in new], shown)
    (empty,) = features.contexts([""])
    noise, noise_new = (torch.randn(n, vae.channels, 16, 16, generator=g) for n in (len(rows), 50))

    table, report = Table(COLUMNS, list(walkers)), {"VAE alone": of_objects(reader(vae.decode(vae.encode(truth))), new)}
    print(table.head(), flush=True)
    sheets, drawn = [shown[:12], truth[:12]], []
    for name, (net, steps, guidance) in walkers.items():
        pictures = draw(net, vae, ordinary, noise, steps, None, guidance, empty)
        reading = reader(pictures)
        drawn.append(pictures[:6])
        taught = draw(net, vae, seen, noise_new, steps, None, guidance, empty)
        sheets.append(taught[:12])
        report[name] = {"ordinary: accuracy of what was said": told_accuracy(reading.rows, rows, told),
                        "ordinary: distance to the world": float(reading.distance.mean()),
                        "ordinary: marks decided": float(reading.decided.mean()),
                        **{f"teacher: {k}": v for k, v in of_objects(reader(taught), new).items()}}
        print(table.line(name, report[name]), flush=True)
    print(table.line("VAE alone", {f"teacher: {k}": v for k, v in report["VAE alone"].items()}))
    facts = {"model": str(options.model), "seed": options.seed}
    few = grid(torch.cat(drawn), len(drawn[0]), scale=3)                     # one row for each walker, same noise
    save_png(few, options.out / "few_steps.png", facts)
    save_png(grid(torch.cat(sheets), 12), options.out / "teacher.png", facts)
    write_json(options.out / "report.json", report)
    print(f"done     {options.out / 'report.json'}, pictures beside it")


def of_objects(reading, truth: Tensor) -> dict[str, float]:
    """Accuracy of each attribute of the object, how many objects are wholly right, the backdrop that the prompt asked
    for, and the distance to the world."""
    return {**accuracy(reading.rows, truth, OBJECT_ATTRIBUTES),
            "whole objects right": whole(reading.rows, truth, "object"),
            "backdrop": accuracy(reading.rows, truth, ("backdrop",))["mean"],
            "distance": float(reading.distance.mean())}


@torch.no_grad()
def draw(net, vae, contexts: list[Tensor], noise: Tensor, steps: int, adapter=None, guidance: float = 1.0,
         empty: Tensor | None = None) -> Tensor:
    """Pictures (n, 3, 64, 64); guidance other than 1 needs the context of an empty prompt."""
    return in_batches(lambda context: guided(net, context, [empty] * len(context), guidance, adapter), vae, contexts,
                      noise, grid_of(net, steps))


def in_batches(walk_of, vae, contexts: list[Tensor], noise: Tensor, sigmas: Tensor) -> Tensor:
    """Pictures (n, 3, 64, 64) in batches of 50; walk_of(contexts of a batch) -> velocity(x, sigma)."""
    pictures = [vae.decode(sample(walk_of(contexts[start:start + 50]), noise[start:start + 50], sigmas))
                for start in range(0, len(contexts), 50)]
    return torch.cat(pictures)


# ------------------------------------------------------------------------------------ what tiny.score does likewise
def check(options: argparse.Namespace) -> None:
    """Raises InputError on numbers that cannot be meant and an --out that cannot be written to; makes nothing."""
    for name, value in vars(options).items():
        if name.endswith("prompts") and not 1 <= value <= MOST_PROMPTS:
            raise InputError(f"--{name.replace('_', '-')} {value}: not a usable number of prompts; give 1 to "
                             f"{MOST_PROMPTS}")
    if not 0 <= options.seed <= MOST_SEED:
        raise InputError(f"--seed {options.seed}: out of range; give a number from 0 to {MOST_SEED}")
    check_writable(options.out, f"--out {options.out}")


@dataclass(frozen=True)
class Table:
    """Numbers as aligned text, line by line.

    columns: heading of a group -> key of a number -> heading of its column. names: of the lines.
    """
    columns: dict[str, dict[str, str]]
    names: list[str]

    def head(self) -> str:
        """The two lines at the top."""
        titles = "  ".join(f"  {title}".ljust(sum(map(_width, group.values())))
                           for title, group in self.columns.items())
        headings = {key: heading for group in self.columns.values() for key, heading in group.items()}
        return f"{self._name('')}{titles}".rstrip() + "\n" + self._line("", headings)

    def line(self, name: str, numbers: Mapping[str, float]) -> str:
        """The numbers of a name with three decimals; what there is none of stays empty."""
        return self._line(name, {key: f"{number:.3f}" for key, number in numbers.items()})

    def _line(self, name: str, words: Mapping[str, str]) -> str:
        groups = ("".join(words.get(key, "").rjust(_width(heading)) for key, heading in group.items())
                  for group in self.columns.values())
        return (self._name(name) + "  ".join(groups)).rstrip()

    def _name(self, name: str) -> str:
        return name.ljust(max(map(len, self.names)))


def _width(heading: str) -> int:
    """Of a column: three decimals have to fit, too."""
    return max(len(heading), len("0.000")) + 2


if __name__ == "__main__":
    run(main)
