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

from experiments.report import markdown
from plumbing.checkpoints import model_folder, recipe_of
from plumbing.files import InputError
from plumbing.options import option, parse
from plumbing.program import run as run_program
from tiny.metrics import leaked
from tiny.score import Judge, adapters, concept_of, concept_prompts, of_concept, of_ordinary, ordinary_prompts
from tiny.world import generator


@dataclass
class Options:
    data: str = option(dataclasses.MISSING, "folder that the adapters were trained on: an object")
    lora: list[str] = option(dataclasses.MISSING, "NAME=FILE of an adapter; several may follow", nargs="+")
    prompts: int = option(120, "number of prompts with [V], and as many without")
    model: str = option("embedded", "checkpoint folder of the embedded kind, or embedded, which is tiny/model")
    seed: int = option(0, "random seed for prompts and noises")


def main(argv: list[str] | None = None) -> int:
    options = parse(Options, argv, "Where a tuned adapter changes ordinary prompts.")
    folder = model_folder(options.model)
    judge, g = Judge(folder), generator(options.seed + 50, 0)
    kind, concept, _ = concept_of(options.data, judge.reader)
    if kind != "object":
        raise InputError(f"{options.data}: a style; give the folder of an object")
    found = adapters(options.lora, judge.net)
    new, usual = concept_prompts(kind, concept, options.prompts, g), ordinary_prompts(options.prompts, g)
    inputs = [judge.inputs(prompts, g) for prompts in (new, usual)]
    steps = list(range(recipe_of(folder).inference_steps))
    switched = {"all": steps, "the first": steps[:1], "all but the first": steps[1:], "the last": steps[-1:]}
    rows = [("base", None, "none", [])] + [(name, adapter, label, active) for name, adapter in found.items()
                                           for label, active in switched.items()]
    table = []
    for name, adapter, label, active in rows:
        of_new, of_usual = (judge.reader(judge.draw(*each, adapter, len(steps), active)) for each in inputs)
        share, guess = leaked(of_usual.rows, usual.rows, usual.told, concept)
        table.append([name, label, f"{of_concept(of_new, new)['concept']:.3f}",
                      f"{of_ordinary(of_usual, usual)['ordinary']:.3f}", f"{share:.2f}", f"{guess:.2f}"])
    print(markdown(["", "adapter at steps", "concept", "ordinary", "concept's", "by guessing"], table))
    return 0


if __name__ == "__main__":
    run_program(main)
