"""Scores tuned adapters on the embedded model: `python -m tiny.score --data examples/star --lora NAME=FILE ...`

For the base, the teacher's view and every adapter, at the model's own four steps and without any learned judge:
- concept: new prompts with [V] (places, sizes and backdrops not in the data; for a style, other objects); how many of
  the concept's attributes are right, and the distance to the nearest picture of the world;
- ordinary: prompts without [V] about objects that training never drew: accuracy of all that the prompt says, same
  distance.
Writes panel.png (columns: base, the adapters, the teacher's view) and scores.json.
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor

import data
import lora
import model as transformer
import vae as autoencoder
from files import InputError, write_json
from options import EMBEDDED, run
from sample import panel, save_png, to_image
from tiny.evaluate import draw
from tiny.metrics import Reader, fidelity, told_accuracy, whole
from tiny.pretrain import load_features
from tiny.stage import generator
from tiny.train_vlm import SLOTS
from tiny.world import COLUMN, caption, draw_scenes, random_tell


def concept_of(folder: str, reader: Reader) -> tuple[str, Tensor, Tensor]:
    """("object" or "style", the attributes read from the first picture (9,), all pictures (n, 3, 64, 64))."""
    rows = data.read_folder(folder)
    pictures = torch.cat([data.to_tensor(data.crop(data.open_image(row.image), (64, 64))) for row in rows])
    kind = "style" if "in [V] style" in rows[0].captions[0] else "object"
    return kind, reader(pictures).rows[0], pictures


def new_scenes(kind: str, concept: Tensor, count: int, g: torch.Generator) -> Tensor:
    """Scenes (count, 9) with the concept; everything else is drawn."""
    rows = draw_scenes(count, g, styled=0.0)
    columns = [COLUMN[name] for name in SLOTS[kind]]
    rows[:, columns] = concept[columns]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=EMBEDDED)
    parser.add_argument("--data", required=True, help="folder that the adapters were trained on")
    parser.add_argument("--lora", action="append", default=[], metavar="NAME=FILE", help="adapter to score; repeatable")
    parser.add_argument("--out", type=Path, default=Path("out/score"))
    parser.add_argument("--concept-prompts", type=int, default=80)
    parser.add_argument("--ordinary-prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    features, vae, reader = load_features(options.model), autoencoder.load(options.model, "cpu"), Reader()
    net = transformer.load(options.model, "cpu", torch.float32)
    kind, concept, pictures = concept_of(options.data, reader)
    g = generator(options.seed + 50, 0)
    new = new_scenes(kind, concept, options.concept_prompts, g)
    prompts = [caption(row, concept=kind) for row in new]
    shown = pictures[torch.arange(len(new)) % len(pictures)]
    ordinary = draw_scenes(options.ordinary_prompts, g, held_out="object")
    told = [random_tell(g) for _ in ordinary]
    noise_new, noise_ordinary = (torch.randn(len(rows), vae.channels, 16, 16, generator=g) for rows in (new, ordinary))
    said, usual = (features.contexts(prompts),
                   features.contexts([caption(row, tell) for row, tell in zip(ordinary, told)]))

    columns = {"base": (None, said)}
    for entry in options.lora:
        name, _, file = entry.rpartition("=")
        if not name:
            raise InputError(f"--lora {entry}: no name; write NAME=FILE")
        columns[name] = (lora.load(Path(file), net), said)
    columns["teacher's view"] = (None, features.contexts(prompts, shown))
    scores, images = {}, {}
    for name, (adapter, context) in columns.items():
        drawn = draw(net, vae, context, noise_new, 4, adapter)
        reading = reader(drawn)
        scores[name] = {"concept": fidelity(reading.rows, new, kind),
                        "concept, whole": whole(reading.rows, new, kind),
                        "concept, distance": float(reading.distance.mean())}
        images[name] = [to_image(p) for p in drawn[:4]]
        if name != "teacher's view":
            drawn = draw(net, vae, usual, noise_ordinary, 4, adapter)
            reading = reader(drawn)
            scores[name] |= {"ordinary": told_accuracy(reading.rows, ordinary, told),
                             "ordinary, distance": float(reading.distance.mean())}
            images[name] += [to_image(p) for p in drawn[:3]]
        else:
            images[name] += [None] * 3
        print(f"{name:16s}", "  ".join(f"{key} {value:.3f}" for key, value in scores[name].items()), flush=True)
    rows = prompts[:4] + [caption(row, tell) for row, tell in zip(ordinary[:3], told[:3])]
    save_png(panel(images, rows), options.out / "panel.png",
             {"prompt": "\n".join(rows), "seed": options.seed, "steps": 4})
    write_json(options.out / "scores.json", scores)


if __name__ == "__main__":
    run(main)
