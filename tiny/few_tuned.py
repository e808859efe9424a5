"""Does D-OPSD keep fewer steps, too? `python -m tiny.few_tuned --network 4=FOLDER --network 2=FOLDER ...`

Models for K = 1, 2, 4 solver steps (`tiny.making.lightning_stage` makes them) learn a concept from four pictures: by
SFT, and by D-OPSD, whose rollouts have as many steps. Afterwards, with K steps and new prompts: how much of the concept
is right, and what is left of ordinary prompts and of the decision of marks? Concepts are the star of examples/ and an
object that no stage ever drew. Each row has the learning rate that experiments/README.md found for it at four steps.

Starting again goes on where it stopped. Writes few_tuned.jsonl and few_tuned.md; runs/ and models/ can be deleted.
"""
import argparse
import contextlib
import json
import os
import shutil
from pathlib import Path

import torch

import train
from plumbing import lora_files
from plumbing.checkpoints import EMBEDDED, backbone_of, recipe_of
from plumbing.files import ROOT, InputError, append_json_line, check_writable, write_bytes
from plumbing.program import run
from plumbing.run_folder import STATE
from tiny import concepts
from tiny.comparison import markdown, with_spread
from tiny.metrics import diversity
from tiny.score import Exam, Judge, of_concept, of_ordinary
from tiny.world import generator

ROWS = {"SFT": ("sft", 1e-3), "D-OPSD": ("dopsd", 2e-3)}            # method and learning rate
BEFORE, TEACHER = "before", "teacher's view"
MEASURES = {"concept": "concept", "ordinary": "ordinary", "ordinary, decided": "marks decided",
            "ordinary, distance": "distance to the world", "diversity": "diversity"}
GROUP, DRAW_SEED = 4, 2605          # pictures of a prompt that diversity compares; of prompts, noises, the object


def assemble(network: Path, model: Path) -> Path:
    """A checkpoint folder `model` with the transformer of `network` and everything else of the embedded model."""
    if not (network / "transformer").is_dir():
        raise InputError(f"{network}: no transformer/ in this folder; give the --out of a stage with --tune full")
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir(parents=True)
    for part in [*EMBEDDED.iterdir(), network / "transformer"]:
        if part != EMBEDDED / "transformer":
            os.symlink(part.resolve(), model / part.name)
    return model


class Questions:
    """What is asked of all students of one model. steps: K."""

    def __init__(self, model: Path, data: Path, steps: int, prompts: int) -> None:
        self.judge, self.steps = Judge(model), steps
        self.exam = Exam(self.judge, str(data), prompts, 2 * prompts, DRAW_SEED)
        self.several = [context for context in self.exam.contexts[0][:max(prompts // 4, 1)] for _ in range(GROUP)]
        self.again = self.judge.noise(len(self.several), generator(DRAW_SEED, 1))

    def __call__(self, lora: Path | None, sees: bool = False) -> dict[str, float]:
        """The measures of an adapter, or of none; sees: the teacher's view of the model itself."""
        judge, exam = self.judge, self.exam
        if sees:
            return of_concept(judge.reader(exam.teacher_pictures(self.steps)), exam.new)
        adapter = lora_files.load(lora, judge.net) if lora else None
        new, ordinary = map(judge.reader, exam.pictures(adapter, self.steps))
        again = judge.reader(judge.draw(self.several, self.again, adapter, self.steps))
        return {**of_concept(new, exam.new), **of_ordinary(ordinary, exam.ordinary),
                "diversity": diversity(again, GROUP, judge.reader.render)}


def tune(row: str, model: Path, data: Path, steps: int, seed: int, updates: int, out: Path) -> Path:
    """The student that train.py makes of a concept."""
    method, lr = ROWS[row]
    words = ["--model", str(model), "--data", str(data), "--out", str(out), "--method", method, "--lr", str(lr),
             "--seed", str(seed), "--steps", str(updates), "--sample-every", "0", "--device", "cpu",
             "--cache", str(out.parent / f"cache-{data.name}"), "--rollout-steps", str(steps)]
    words += ["--resume"] if (out / STATE).is_file() else []
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        if train.main(words) == 130:
            raise KeyboardInterrupt
    return out / "student.safetensors"


def table(lines: list[dict]) -> str:
    """Mean and spread over concepts and seeds."""
    rows = []
    for steps in sorted({line["steps"] for line in lines}, reverse=True):
        for row in (BEFORE, *ROWS, TEACHER):
            found = [line["measures"] for line in lines if (line["steps"], line["row"]) == (steps, row)]
            if found:
                rows.append([str(steps), row, *(
                    with_spread([each[key] for each in found]) if key in found[0] else "" for key in MEASURES),
                    str(len(found))])
    return markdown(["steps", "", *MEASURES.values(), "runs"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", action="append", required=True, metavar="STEPS=FOLDER",
                        help="a model for so many solver steps, a folder with a transformer/; repeatable")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of training; default 0")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps; default 100")
    parser.add_argument("--prompts", type=int, default=48, help="new prompts; twice as many ordinary ones; default 48")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "tiny" / "few-tuned", help="folder of the results")
    options = parser.parse_args()
    networks: dict[int, Path] = {}
    for entry in options.network:
        steps, _, folder = entry.partition("=")
        if not steps.isdecimal() or not folder or int(steps) < 1:
            raise InputError(f"--network {entry}: write STEPS=FOLDER, such as 4=out/tiny/lightning/4")
        networks[int(steps)] = Path(folder)
    out = options.out.resolve()
    check_writable(out, f"--out {out}")
    file, settings = out / "few_tuned.jsonl", {
        steps: {"steps": steps, "network": str(folder), "updates": options.steps, "prompts": options.prompts}
        for steps, folder in networks.items()}
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    for line in lines:
        if not settings.get(line["steps"], {}).items() <= line.items():
            raise InputError(f"--out {out}: has results for {line['steps']} steps of another network, or with other "
                             "--steps or --prompts; give another --out")
    ((kind, scene),), _ = concepts.draw_concepts(1, 0, 0, DRAW_SEED)
    torch.set_num_threads(1)
    for steps, folder in networks.items():
        model, exam = assemble(folder, out / "models" / str(steps)), None
        assert backbone_of(model) and recipe_of(model).size == 64
        data = [ROOT / "examples" / "star"]
        for place in data:
            exam = Questions(model, place, steps, options.prompts)
            data += [concepts.write(kind, scene, out / "concepts", DRAW_SEED, exam.judge.reader.render).folder
                     ] if len(data) == 1 else []
            asked = [(BEFORE, 0), (TEACHER, 0), *((row, seed) for row in ROWS for seed in options.seeds)]
            for row, seed in asked:
                about = settings[steps] | {"concept": place.name, "row": row, "seed": seed}
                if any(about.items() <= line.items() for line in lines):
                    continue
                student = None if row in (BEFORE, TEACHER) else tune(
                    row, model, place, steps, seed, options.steps,
                    out / "runs" / f"{steps}-{place.name}-{ROWS[row][0]}-{seed}")
                lines.append(about | {"measures": exam(student, row == TEACHER)})
                append_json_line(file, lines[-1])
                print(about, {key: round(value, 3) for key, value in lines[-1]["measures"].items()}, flush=True)
    write_bytes(out / "few_tuned.md", (table(lines) + "\n").encode())
    print(f"\n{table(lines)}\n\ndone     {out / 'few_tuned.md'}")


if __name__ == "__main__":
    run(main)
