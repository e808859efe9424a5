"""Scores adapters on edits: `python -m tiny.score_edits --data examples/paint --lora NAME=FILE`

For the base, the teacher's view and every adapter, at the model's own four steps and without any learned judge:
- concept: the edit of the data, "paint it [V]", on new pictures: how many of the attributes that it changes are right,
  how many of the others stay, and how many of the backdrop's marks, which only the source picture tells;
- ordinary: edits without [V], such as "move it to the left", measured alike.
Writes panel.png (columns: source, base, the adapters, the teacher's view) and scores.json.
"""
import torch
from torch import Tensor

from encoder import check_references, reference_prompt
from plumbing.checkpoints import backbone_of
from plumbing.files import InputError, write_json
from plumbing.pictures import panel, save_png, to_image
from plumbing.program import run
from tiny.edits import CHANGES, Edits, changed, instruction
from tiny.evaluate import Table, check
from tiny.metrics import Reading
from tiny.models import FLUX2_FOLDER
from tiny.score import TAKEN, Judge, adapters, options_of, read_pictures, read_scenes
from tiny.world import ATTRIBUTES, COLUMN, draw_marks, draw_scenes, generator

SOURCE = "source"       # a column of panel.png alone
COLUMNS = {"edits with [V]": {f"concept, {key}": key for key in ("changed", "kept", "marks", "distance")},
           "ordinary edits": {f"ordinary, {key}": key for key in ("changed", "kept", "marks", "distance")}}


def of_edits(reading: Reading, targets: Tensor, marks: Tensor, changes: list[str]) -> dict[str, float]:
    """Shares of right attributes among those that change and among those that do not, and of kept marks.

    targets (n, 9): scenes after the edits; marks (n, 8, 8) of the sources; changes: n keys of CHANGES.
    """
    asked = torch.tensor([[name in CHANGES[change] for name in ATTRIBUTES] for change in changes])
    right = (reading.rows == targets).float()
    texture = reading.rows[:, COLUMN["texture"]] == targets[:, COLUMN["texture"]]        # else marks mean nothing
    kept = ((reading.marks == marks).float().mean((1, 2)) * texture).mean()
    shares = {name: float((right * part).sum() / part.sum()) for name, part in (("changed", asked), ("kept", ~asked))}
    return {**shares, "marks": float(kept), "distance": float(reading.distance.mean())}


def edit_of(folder: str, judge: Judge) -> tuple[str, Tensor, Tensor]:
    """Instruction of a data folder with sources, the scene (9,) after its first edit, all targets (n, 3, 64, 64)."""
    rows, pictures = read_pictures(folder, editing=True)
    if "paint" not in rows[0].captions[0]:
        raise InputError(f'{rows[0].image}: its caption "{rows[0].captions[0]:.80}" is not about paint, the only edit '
                         'that is scored; give data such as examples/paint, with "paint it [V]"')
    return rows[0].captions[0], read_scenes(rows, pictures, judge.reader)[0], pictures


def main() -> None:
    parser = options_of(__doc__, FLUX2_FOLDER, "out/score_edits")
    parser.add_argument("--prompts", type=int, default=80,
                        help="number of pictures to edit with [V], and as many again without; default 80")
    options = parser.parse_args()

    check(options)
    check_references(backbone_of(options.model), None, f"tiny.score_edits --model {options.model}")
    judge, g = Judge(options.model), generator(options.seed + 60, 0)
    tuned = adapters(options.lora, judge.net, (*TAKEN, SOURCE))
    prompt, concept, pictures = edit_of(options.data, judge)
    sources = draw_scenes(options.prompts, g)
    targets = changed(sources, concept.expand_as(sources), "paint")
    ordinary = Edits(options.prompts, ("place", "size", "backdrop", "shape", "paint"), g, held_out="object")
    marks, marks_ordinary = draw_marks(options.prompts, g), draw_marks(options.prompts, g)
    before, before_ordinary = (judge.reader.render(rows, cells)
                               for rows, cells in ((sources, marks), (ordinary.sources, marks_ordinary)))
    z, z_ordinary, z_shown = (judge.vae.encode(part) for part in (before, before_ordinary, pictures))
    shown = z_shown[torch.arange(options.prompts) % len(pictures)]
    edits, noise = judge.features.edits, judge.noise(options.prompts, g)
    said = edits([prompt] * options.prompts, z)
    usual = edits([instruction(row, change) for row, change in zip(ordinary.targets, ordinary.changes)], z_ordinary)
    seen = edits([reference_prompt(prompt, 1)] * options.prompts, z, shown)

    columns = {"base": (None, said), **{name: (adapter, said) for name, adapter in tuned.items()},
               "teacher's view": (None, seen)}
    scores, images = {}, {SOURCE: [to_image(p) for p in (*before[:4], *before_ordinary[:3])]}
    table = Table(COLUMNS, list(columns))
    print(table.head(), flush=True)
    for name, (adapter, context) in columns.items():
        drawn = judge.draw(context, noise, adapter)
        scores[name] = {f"concept, {key}": value for key, value in
                        of_edits(judge.reader(drawn), targets, marks, ["paint"] * len(targets)).items()}
        images[name] = [to_image(p) for p in drawn[:4]]
        if name != "teacher's view":
            drawn = judge.draw(usual, noise, adapter)
            scores[name] |= {f"ordinary, {key}": value for key, value in of_edits(
                judge.reader(drawn), ordinary.targets, marks_ordinary, ordinary.changes).items()}
        images[name] += [to_image(p) if name != "teacher's view" else None for p in drawn[:3]]
        print(table.line(name, scores[name]), flush=True)
    rows = [prompt] * len(before[:4])
    rows += [instruction(row, change) for row, change in zip(ordinary.targets[:3], ordinary.changes)]
    save_png(panel(images, rows), options.out / "panel.png",
             {"prompt": "\n".join(rows), "seed": options.seed, "steps": 4})
    write_json(options.out / "scores.json", scores)
    print(f"done     {options.out / 'scores.json'}, panel.png beside it")


if __name__ == "__main__":
    run(main)
