"""Where a tuned adapter changes ordinary prompts: at which solver steps, and towards what?

    python -m experiments.leak --data examples/star --lora D-OPSD=out/star/student.safetensors

For objects. Pictures of new prompts with [V] and of ordinary ones are drawn with the adapter switched on at some solver
steps only. "concept's" is the share of wrong attributes of ordinary pictures that have the concept's value. If that is
far above what guessing gives, the concept leaks into prompts that do not ask for it, which nothing in the training
forbids: all of its prompts ask for the concept.
"""
if not __package__:
    import as_module  # noqa: F401

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

import lora
from experiments.report import markdown
from plumbing.checkpoints import model_folder, recipe_of
from plumbing.files import InputError
from plumbing.options import option, parse
from plumbing.program import run as run_program
from tiny.evaluate import in_batches
from tiny.metrics import fidelity, told_accuracy, told_names
from tiny.models import grid_of
from tiny.score import Judge, Prompts, adapters, concept_of, concept_prompts, ordinary_prompts
from tiny.world import ATTRIBUTES, COLUMN, OBJECT_ATTRIBUTES, generator


@dataclass
class Options:
    data: str = option(dataclasses.MISSING, "folder that the adapters were trained on: an object")
    lora: list[str] = option(dataclasses.MISSING, "NAME=FILE of an adapter; several may follow", nargs="+")
    prompts: int = option(120, "of each kind")
    model: str = option("embedded", "checkpoint folder of the embedded kind, or embedded: tiny/model")
    seed: int = option(0, "of prompts and noises")


def told_object(prompts: Prompts) -> Tensor:
    """(n, 4) bool: which attributes of an object each ordinary prompt says."""
    return torch.tensor([[name in told_names(tell) for name in OBJECT_ATTRIBUTES] for tell in prompts.told])


def leak(rows: Tensor, prompts: Prompts, concept: Tensor) -> tuple[float, float]:
    """(share of wrong attributes that have the concept's value, what guessing among the wrong values gives).

    rows (n, 9): read from pictures; concept (9,). Only said attributes count whose right value is not the concept's.
    """
    columns = [COLUMN[name] for name in OBJECT_ATTRIBUTES]
    got, asked, wanted = rows[:, columns], prompts.rows[:, columns], concept[columns]
    wrong = told_object(prompts) & (got != asked) & (asked != wanted)
    values = torch.tensor([len(ATTRIBUTES[name]) for name in OBJECT_ATTRIBUTES])
    count = max(1, int(wrong.sum()))
    return float((wrong & (got == wanted)).sum()) / count, float((wrong / (values - 1)).sum()) / count


def draw(judge: Judge, contexts: list, noise: Tensor, sigmas: Tensor, adapter: lora.Adapter | None, active: set[int]
         ) -> Tensor:
    """Pictures (n, 3, 64, 64), with the adapter at the solver steps `active`."""
    levels = {sigma for k, sigma in enumerate(sigmas.tolist()) if k in active}

    def walk_of(part: list):
        return lambda x, sigma: judge.net.velocity(x, sigma, part, adapter if sigma in levels else None)
    return in_batches(walk_of, judge.vae, contexts, noise, sigmas)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    options = parse(Options, argv, "Where a tuned adapter changes ordinary prompts.")
    folder = model_folder(options.model)
    judge, g = Judge(folder), generator(options.seed + 50, 0)
    kind, concept, _ = concept_of(options.data, judge.reader)
    if kind != "object":
        raise InputError(f"{options.data}: a style; give the folder of an object")
    found = adapters(options.lora, judge.net)
    new, usual = concept_prompts(kind, concept, options.prompts, g), ordinary_prompts(options.prompts, g)
    said, asked = judge.features.contexts(new.captions), judge.features.contexts(usual.captions)
    noise_new, noise_usual = (judge.noise(options.prompts, g) for _ in range(2))
    steps = recipe_of(folder).inference_steps
    sigmas = grid_of(judge.net, steps)
    everywhere = set(range(steps))
    switched = {"all": everywhere, "the first": {0}, "all but the first": everywhere - {0}, "the last": {steps - 1}}
    rows = [("base", None, "none", set())] + [(name, adapter, label, active) for name, adapter in found.items()
                                              for label, active in switched.items()]
    table = []
    for name, adapter, label, active in rows:
        drawn_new = judge.reader(draw(judge, said, noise_new, sigmas, adapter, active))
        drawn = judge.reader(draw(judge, asked, noise_usual, sigmas, adapter, active))
        share, guess = leak(drawn.rows, usual, concept)
        table.append([name, label, f"{fidelity(drawn_new.rows, new.rows, kind):.3f}",
                      f"{told_accuracy(drawn.rows, usual.rows, usual.told):.3f}", f"{share:.2f}", f"{guess:.2f}"])
    print(markdown(["", "adapter at steps", "concept", "ordinary", "concept's", "by guessing"], table))
    return 0


if __name__ == "__main__":
    run_program(main)
