"""experiments/merge.py on a small random model, captions."""
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import data
from experiments import merge, runner
from experiments.merge import FULL, QUICK, ROWS, Plan, Settings
from experiments.protocol import left
from experiments.results import Results
from plumbing.checkpoints import EMBEDDED, recipe_of
from plumbing.files import ROOT, InputError
from plumbing.pictures import open_image, to_tensor
from tiny.score import Judge, of_concept
from tiny.world import COLUMN, held_out_object, held_out_style

TINY = Settings(objects=1, seeds=(0,), teacher_steps=2, rounds=1, captions=3, concept_prompts=2, ordinary_prompts=2)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def judge(checkpoint) -> Judge:
    return Judge(checkpoint)


@pytest.fixture(scope="module")
def small(judge, checkpoint, tmp_path_factory):
    """The folder of a finished small experiment."""
    out = tmp_path_factory.mktemp("merge") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "Judge", lambda folder: judge)                 # not loaded again and again
        assert merge.run(TINY, out, model=checkpoint) == 0
    return out


@pytest.fixture
def quick_start(judge, monkeypatch):
    monkeypatch.setattr(runner, "Judge", lambda folder: judge)


def lines_of(out) -> list[dict]:
    """The results without what depends on the machine."""
    lines = [json.loads(line) for line in (out / "merge.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


# ---------------------------------------------------------------------------------------------------- end to end
def test_a_small_experiment(small):
    header, *lines = lines_of(small)
    names = list(header["facts"]["concepts"])
    assert len(names) == 2 and header["facts"]["teachers"]["steps"] == 2
    assert all(line["settings"] == header["settings"] for line in lines)
    found = {(line["method"], *line["options"].values(), line["concept"]): line for line in lines}
    students = [("sum",), ("average",), ("sft-teacher",), *(("dopsd", "v", 0.0), ("dopsd", "kl", 0.0),
                                                            ("dopsd", "kl", 0.3), ("dopsd", "kl", 0.7))]
    assert set(found) == {(*row, name) for row in [("base",), *students] for name in [*names, ""]} | \
        {("dopsd", name) for name in names}
    assert len(lines) == len(found) == 8 * 3 + 2
    of_step = 4 * (4 + 2.5 * 4)                                         # pictures, K states: plain, with a gradient
    assert found["dopsd", names[0]]["cost"] == 2 * of_step and found["dopsd", "v", 0.0, ""]["cost"] == 2 * of_step
    assert found["sft-teacher", ""]["cost"] == 2 * 4 * (4 + 2.5) and found["sum", ""]["cost"] == 0
    for key, line in found.items():
        kinds = {name.split(",")[0] for name in line["measures"]}
        assert kinds == ({"ordinary"} if key[-1] == "" else {"concept"} | ({"ordinary"} if len(key) == 2 and key[0] ==
                                                                             "dopsd" else set()))


def test_students_have_learned_from_all_teachers(small):
    (folder,) = (small / "runs").glob("merge-*/dopsd_seed0_*_loss-kl_noise-0.7")
    options = json.loads((folder / "config.json").read_text())["options"]
    assert options["loss"] == "kl" and options["noise"] == 0.7 and options["steps"] == 1
    assert [path.rsplit("/", 2)[-2] for path in options["data"]] == ["captions"] * 2
    for source, file in zip(options["data"], options["teacher_lora"]):
        assert source.rsplit("/", 1)[-1] in file and file.endswith("student.safetensors")
    (line,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert len(line["losses"]) == 2


def test_the_table(small):
    results = Results(small / "merge.jsonl")
    assert (small / "merge.md").read_text() == merge.table(results)
    one, two = results.facts["concepts"]
    for number, line in enumerate(results.measured.values()):         # those of a random model are all alike
        line["measures"] = {name: number / 100 + len(name) / 1000 for name in line["measures"]}
    split = [line.strip("|")[1:-1].split(" | ") for line in merge.table(results).splitlines() if line.startswith("|")]
    rows = {cells[0]: cells[1:] for cells in split}
    assert set(ROWS) <= set(rows) and rows[""][:2] == [facts["words"] for facts in results.facts["concepts"].values()]
    for label, (method, options) in ROWS.items():
        found = {point.training.concept: line["measures"] for point, line in results.measured.items()
                 if (point.training.method, point.training.options) == (method, options)}
        usual = [found[one], found[two]] if label == "teacher alone" else [found[""]]
        numbers = [found[one]["concept"], found[two]["concept"], (found[one]["concept"] + found[two]["concept"]) / 2,
                   *(sum(m[name] for m in usual) / len(usual) for name in ("ordinary", "ordinary, decided"))]
        assert rows[label][:5] == [f"{number:.3f}" for number in numbers]
    assert rows["teacher alone"][5:] == ["2", "112"] and rows["merged, v, ODE"][5:] == ["1", "112"]
    assert rows["average"][5:] == ["", ""]


def test_the_second_time_nothing_is_done(small, checkpoint, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("runs/**/*") if path.is_file()}
    content = (small / "merge.jsonl").read_bytes()
    monkeypatch.setattr(runner, "Judge", None)
    assert merge.run(TINY, small, model=checkpoint) == 0
    assert (small / "merge.jsonl").read_bytes() == content
    assert before == {path: path.stat().st_mtime_ns for path in small.rglob("runs/**/*") if path.is_file()}
    with pytest.raises(InputError, match="protocol.rounds was 1 and is now 2"):
        merge.run(dataclasses.replace(TINY, rounds=2), small, model=checkpoint)


def test_interrupted_and_continued_is_the_same(small, quick_start, checkpoint, tmp_path, capsys):
    """Half a line at the end, the folders of the runs gone: teachers are trained anew, not measured again."""
    content = (small / "merge.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "merge.jsonl").write_text("".join(content[:-1]) + content[-1][:20])
    assert merge.main(["--report", "--out", str(tmp_path)]) == 0
    assert "| not run | not run | " in (tmp_path / "merge.md").read_text()
    assert merge.run(TINY, tmp_path, model=checkpoint) == 0
    assert f"line {len(content)}: not a whole line" in capsys.readouterr().err
    assert lines_of(tmp_path) == lines_of(small)
    assert len(list((tmp_path / "runs").glob("merge-*/*/student.safetensors"))) == 3       # two teachers, one student
    assert (tmp_path / "merge.md").read_text() == (small / "merge.md").read_text()


def test_the_shipped_table():
    shipped = ROOT / "experiments" / "results"
    assert merge.table(Results(shipped / "merge.jsonl")) == (shipped / "merge.md").read_text()


def test_spread_over_seeds():
    values = ((0, .2), (0, .4), (1, .5), (1, .7), (2, .9))
    lines = [{"seed": seed, "measures": {"concept": value}} for seed, value in values]
    assert merge.spread(lines, "concept", 2) == "0.450 ± 0.212"                             # seed 2 is not whole
    assert merge.spread(lines, "ordinary", 1) == "not run"


def test_two_processes_make_the_same(small, checkpoint, tmp_path):
    """What needs no training is measured again, by workers that load their own models."""
    out = Path(shutil.copytree(small, tmp_path / "copy"))
    lines = (out / "merge.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"method": "sum"' not in line and '"method": "average"' not in line]
    assert len(lines) - len(kept) == 6
    (out / "merge.jsonl").write_text("".join(kept))
    assert merge.run(TINY, out, workers=2, model=checkpoint) == 0
    assert sorted(map(json.dumps, lines_of(out))) == sorted(map(json.dumps, lines_of(small)))


def test_a_failing_run_is_one_line(quick_start, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner.train, "main", lambda words: 1 / 0)
    assert merge.run(TINY, tmp_path, model=checkpoint) == 1
    errors = capsys.readouterr().err
    assert "ZeroDivisionError: division by zero (log: " in errors and "failed runs: 9" in errors
    assert "error: sum: " in errors and "no such file" in errors
    with pytest.raises(InputError, match="--workers 0"):
        merge.main(["--workers", "0"])


# ---------------------------------------------------------------------------------------------------- parts
def test_concepts_and_captions(tmp_path):
    found = merge.prepare(FULL, tmp_path)
    assert [c.kind for c in found] == ["object"] * 3 + ["style"]
    rows = torch.tensor([c.row for c in found])
    assert len(set(rows[:3, COLUMN["shape"]].tolist())) == 3
    assert held_out_object(rows[:3]).all() and held_out_style(rows[3:]).all()
    for concept in found:
        shape = concept.words.split()[-1]
        shown = [row.captions[0] for row in data.read_folder(concept.folder)]
        folder = merge.captions_folder(concept)
        texts = [row.captions[0] for row in data.read_folder(folder, captions_suffice=True)]
        prompts, captions = merge.texts_of(concept, FULL)
        tested = prompts.captions
        assert len(shown) == 4 and len(set(texts)) == len(texts) == 40 and not set(texts) & set(tested)
        assert texts == captions
        for text in shown + texts + tested:
            assert text.count("[V]") == 1
            assert f"[V] {shape}" in text if concept.kind == "object" else text.endswith("in [V] style")
    assert merge.prepare(FULL, tmp_path) == found


def test_the_image_teacher_understands_class_words(tmp_path):
    """Captions such as "a big [V] star on mint" were not in its training; the adapters to merge are learned from it."""
    found = merge.prepare(QUICK, tmp_path)[:3]
    asked = dataclasses.replace(QUICK, concept_prompts=4)
    judge = Judge(EMBEDDED)
    for concept in found:
        prompts, _ = merge.texts_of(concept, asked)
        pictures = [to_tensor(open_image(row.image)) for row in data.read_folder(concept.folder)]
        contexts = judge.features.contexts(prompts.captions, torch.cat(pictures))
        drawn = judge.draw(contexts, judge.noise(4, seeded(0)))
        scores = of_concept(judge.reader(drawn), prompts)
        assert scores["concept"] > 0.8 and scores["concept, rest"] > 0.8


def test_all_runs_by_hand(tmp_path):
    found = merge.prepare(QUICK, tmp_path)
    plan = Plan(FULL, found, recipe_of(EMBEDDED), tmp_path / "runs")
    first, second = plan.jobs()
    assert len(first) == 1 + 3 * 4 and len(second) == 3 * 7
    points = [point for job in first + second for point in job.measurements]
    assert len(set(points)) == len(points) == 5 + 12 + 21 * 5
    trained = [job.training.name for job in first + second if job.training.is_trained]
    assert len(set(trained)) == len(trained) == 12 + 15
    assert {point.step for point in points} == {0, plan.recipe.steps, 150} and FULL.teacher_steps is None
    assert left(first, Results(tmp_path / "none.jsonl", {}).measured) == first
    done = {m for job in first for m in job.measurements}
    lost, students = plan.left(done)                                    # measured, but there are no files
    assert [job.training for job in lost] == [job.training for job in first[1:]] and students == second
    assert not any(job.measurements for job in lost) and {job.step for job in lost} == {plan.recipe.steps}
    assert plan.left(set(points)) == ([], []) and plan.left(set()) == (first, second)
