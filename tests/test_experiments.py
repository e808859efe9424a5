"""experiments/: the protocol against counts by hand, and small tables end to end with the shipped model.
Nobody judges its pictures here, and no time is asserted."""
import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import on_each_loss

import train
from experiments import measure, results, runner, table
from experiments.protocol import (FULL, GRADIENT_PASS, QUICK, ROWS, VALIDATION, Job, Measurement, Plan, Settings,
                                  Training, left)
from experiments.report import NOT_RUN, Report, compared, crossing, minus
from experiments.results import Results, choose_rates, line_of
from plumbing import pictures
from plumbing.checkpoints import EMBEDDED
from plumbing.files import ROOT, InputError
from plumbing.options import parse
from plumbing.run_folder import STATE
from tiny.concepts import ORDINARY
from tiny.metrics import Reader
from tiny.score import Judge
from tiny.world import draw_scenes, to_pil

TINY = Settings(objects=1, styles=0, tuning_objects=0, seeds=(0,), steps=1, fixed=(("dopsd", 1e-3), ("sft", 1e-3)),
                curve_steps=(1,), curve_objects=1, curve_styles=0, teachers=False, ablations=False, lessons=False,
                concept_prompts=2, ordinary_prompts=2, diverse_prompts=1, diverse_noises=2, validation_scenes=2,
                rows=("dopsd", "sft"))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(EMBEDDED)


@pytest.fixture(scope="module")
def reader(judge) -> Reader:
    return judge.reader


@pytest.fixture
def quick_start(judge, monkeypatch):
    """Laboratories share the models of the test module instead of loading them again."""
    monkeypatch.setattr(runner, "Judge", lambda folder: judge)


def lines_of(out: Path) -> list[dict]:
    """The results without what depends on the machine."""
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


# ---------------------------------------------------------------------------------------------------- end to end
@pytest.fixture(scope="module")
def small(judge, tmp_path_factory) -> Path:
    """The folder of a finished small table."""
    out = tmp_path_factory.mktemp("experiments") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "Judge", lambda folder: judge)
        assert table.run(TINY, out) == 0
    return out


def test_a_small_table_end_to_end(small):
    header, *lines = lines_of(small)
    assert header["facts"]["protocol"]["steps"] == 1 and header["facts"]["metrics"] == measure.METRICS
    assert {line["settings"] for line in lines} == {header["settings"]} == {results.fingerprint(header["facts"])}
    found = {(line["method"], line["step"]): line for line in lines}
    assert set(found) == {("validation", 0), ("base", 0), ("teacher's view", 0), ("dopsd", 1), ("sft", 1), ("sft", 4)}
    assert found["dopsd", 1]["cost"] == found["sft", 4]["cost"] == 20
    assert found["sft", 1]["groups"] == ["table 1", "table 3", "curves"]
    assert found["sft", 4]["groups"] == ["table 2", "table 3"]
    for key in (("base", 0), ("dopsd", 1), ("sft", 4)):
        assert list(found[key]["measures"]) and set(found[key]["measures"]) == set(measure.MEASURES)
    assert not any(name.startswith("ordinary") for name in found["teacher's view", 0]["measures"])
    for name in ("tables.md", "curves.png", "panel.png"):
        assert (small / name).stat().st_size > 1000
    rows = [line for line in (small / "tables.md").read_text().splitlines() if line.startswith("| SFT |")]
    assert len(rows) == 5 and NOT_RUN not in rows[0] + rows[1]           # three tables, learning rates, curves
    assert rows[2] == "| SFT | 0 of 1 | 0 |" + " not reached |" * 5
    assert "| PSO | not run |" in (small / "tables.md").read_text()


def test_a_new_row_stands_beside_what_is_there(small, quick_start, tmp_path, capsys, monkeypatch):
    """Only what is new is run, in a folder of its own, with D-OPSD's learning rate where rates are given."""
    before, old = (small / "results.jsonl").read_bytes(), lines_of(small)[1:]
    settings = dataclasses.replace(TINY, rows=("off-policy+v",))
    assert table.run(settings, tmp_path, known=small) == 0
    header, *lines = lines_of(tmp_path)
    assert header["facts"]["code"].keys() == {"off-policy+v"} and (small / "results.jsonl").read_bytes() == before
    new = [line for line in lines if line["method"] == "off-policy"]
    assert [(line["step"], line["cost"], line["lr"], line["options"]) for line in new] == [(1, 28, 1e-3, {"loss": "v"})]
    assert [line | {"settings": ""} for line in lines if line not in new] == [line | {"settings": ""} for line in old]
    said = re.findall(r"(?m)^  (\d+/\d+, .*?)  \S+, step", capsys.readouterr().out)
    assert said == ["1/1, less than a minute left"]
    rows, others = ((folder / "tables.md").read_text().splitlines() for folder in (tmp_path, small))
    (row,) = [row for row in rows[:20] if row.startswith("| off-policy+v | ")]
    assert row.endswith("| 1 of 1 |") and f"{new[0]['measures']['concept']:.3f}" in row
    for title in ("base", "SFT", "D-OPSD", "teacher's view"):
        assert [r for r in rows[:20] if r.startswith(f"| {title} |")] == [r for r in others[:20]
                                                                         if r.startswith(f"| {title} |")] != []
    assert sum(row.startswith("| D-OPSD - off-policy+v | +") for row in rows) == 2
    text = (tmp_path / "tables.md").read_bytes()
    assert table.main(["--report", "--out", str(tmp_path)]) == 0 and (tmp_path / "tables.md").read_bytes() == text
    assert table.run(settings, tmp_path, known=small) == 0 and len(lines_of(tmp_path)) == len(lines) + 1
    monkeypatch.setattr(table, "CODE", ("train.py",))
    with pytest.raises(InputError, match=r"other settings \(code.off-policy\+v was \w+ and is now \w+\); give another "
                                         "--out, or remove this file"):
        table.run(settings, tmp_path, known=small)


def test_results_of_other_settings_are_not_taken_over(small, tmp_path, monkeypatch):
    """They would be in one table with what is measured in another way."""
    asked = set()
    monkeypatch.setattr(table, "perform", lambda _, jobs, *__: asked.update(job.training.method for job in jobs) or [])
    settings = dataclasses.replace(TINY, steps=2, rows=("off-policy+v",))
    assert table.run(settings, tmp_path, known=small) == 0
    assert asked == {"validation", "base", "teacher's view", "off-policy"}
    assert len(lines_of(tmp_path)) == 1


def test_the_shipped_results_stand_beside_a_new_row(tmp_path, monkeypatch):
    """But for what was measured of it in their lessons, with the code of that time."""
    monkeypatch.setattr(table, "perform", lambda *_: [])
    shipped = ROOT / "experiments" / "results"
    assert table.run(dataclasses.replace(FULL, rows=("dopsd+v",)), tmp_path, known=shipped) == 0
    ours, theirs = ({line["run"] + str(line["step"]): line["measures"] for line in lines_of(folder)[1:]}
                    for folder in (tmp_path, shipped))
    lessons = {run for run in theirs if run.startswith("dopsd_") and "_loss-v" in run}
    assert len(lessons) == 3 and ours == {run: line for run, line in theirs.items() if run not in lessons}
    tables, others = ((folder / "tables.md").read_text() for folder in (tmp_path, shipped))
    assert set(others.splitlines()[10:20]) < set(tables.splitlines()) and "| dopsd+v | not run |" in tables


@pytest.mark.parametrize("words, rows, out, known", [
    ("", tuple(ROWS), "experiments/results", "experiments/results"),
    ("--row pso --method sft", ("pso", "sft"), "experiments/results", "experiments/results"),
    ("--method sft-teacher --loss kl", ("sft-teacher+kl",), "out/table-sft-teacher+kl", "experiments/results"),
    ("--loss v --quick", ("dopsd+v",), "out/quick-table-dopsd+v", "out/quick-table"),
    ("--loss v --row sft --out here", ("sft", "dopsd+v"), "here", "experiments/results")])
def test_rows_that_are_asked_for(monkeypatch, words, rows, out, known):
    asked = []
    monkeypatch.setattr(table, "run", lambda *given: asked.extend(given) or 0)
    assert table.main(words.split()) == 0
    assert asked[0] == dataclasses.replace(QUICK if "quick" in words else FULL, rows=rows)
    assert asked[1] == (Path(out) if out == "here" else ROOT / out) and asked[-1] == ROOT / known


def test_only_table_1_goes_into_the_panel(tmp_path):
    plan = Plan(FULL, ABOUT, RECIPE, RATES)
    examiner = SimpleNamespace(plan=plan, out=tmp_path)
    point, *_ = plan.table("dopsd", "steps")
    other, varied = plan.table("published", "steps")[0], plan.kept()["weight 4"][0]
    assert point.training.concept == varied.training.concept == other.training.concept and point.step == varied.step
    for number, (asked, group) in enumerate(((point, "table 1"), (varied, "ablations"), (other, "table 1"))):
        asked = dataclasses.replace(asked, groups=(group,))
        measure.Examiner.keep(examiner, asked, torch.full((1, 3, 64, 64), -1.0 + number), ["a prompt"])
        file = measure.picture_file(tmp_path, "dopsd", point.training.concept)
        assert pictures.open_image(file).getpixel((10, 10)) == (0, 0, 0)
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_report_only_reads(small, tmp_path, capsys):
    shutil.copy(small / "results.jsonl", tmp_path)
    assert table.main(["--report", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "tables.md").read_bytes() == (small / "tables.md").read_bytes()
    assert "panel.png" in capsys.readouterr().err and not (tmp_path / "panel.png").exists()
    assert lines_of(tmp_path) == lines_of(small)
    with pytest.raises(InputError, match="no results here"):
        table.main(["--report", "--out", str(tmp_path / "nothing")])


def test_interrupted_and_continued_is_the_same_file(small, quick_start, tmp_path, monkeypatch, capsys):
    """Ctrl-C within the second piece of SFT's run, then half a line, as a crash would leave it."""
    count = [0]

    def press(loss):
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return loss
    with monkeypatch.context() as patch:
        on_each_loss(patch, press, "sft")
        with pytest.raises(KeyboardInterrupt):
            table.run(TINY, tmp_path)
    before = lines_of(tmp_path)
    assert 0 < len(before) < len(lines_of(small))
    assert runner.saved_step(next((tmp_path / "runs").glob("sft_*")) / STATE) == 3
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"settings": "' + before[0]["settings"] + '", "run": "df')
    capsys.readouterr()
    assert table.run(TINY, tmp_path) == 0
    assert f"line {len(before) + 1}: not a whole line" in capsys.readouterr().err
    assert lines_of(tmp_path) == lines_of(small)
    assert table.run(TINY, tmp_path) == 0                                # nothing left to do
    assert lines_of(tmp_path) == lines_of(small)


def test_a_lost_measurement_is_trained_again(small, quick_start, tmp_path):
    """The run has gone further than the step that is asked for: it starts anew, and comes to the same."""
    out = Path(shutil.copytree(small, tmp_path / "copy"))
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    lost = next(i for i, line in enumerate(lines) if '"method": "sft"' in line and '"step": 1,' in line)
    (out / "results.jsonl").write_text("".join(lines[:lost] + lines[lost + 1:]))
    assert table.run(TINY, out) == 0
    assert sorted(map(json.dumps, lines_of(out))) == sorted(map(json.dumps, lines_of(small)))


def test_a_failing_run_does_not_stop_the_others(quick_start, tmp_path, monkeypatch, capsys):
    count = [0]

    def broken_once(loss):
        count[0] += 1
        if count[0] == 1:
            raise RuntimeError("no luck\nat all")
        return loss
    on_each_loss(monkeypatch, broken_once, "sft")
    assert table.run(dataclasses.replace(TINY, rows=("sft",), seeds=(0, 1), curve_objects=0), tmp_path) == 1
    errors = capsys.readouterr().err
    (folder,) = (tmp_path / "runs").glob("sft_*seed0*")
    assert f"RuntimeError: no luck (log: {folder / 'log.txt'})" in errors and "failed runs: 1, first sft_" in errors
    assert "Traceback" in (folder / "log.txt").read_text()
    assert [line["seed"] for line in lines_of(tmp_path) if line.get("method") == "sft"] == [1, 1]


# ---------------------------------------------------------------------------------------------------- refused
def test_foreign_settings_are_refused_by_name(small, tmp_path):
    shutil.copy(small / "results.jsonl", tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "results.jsonl")) + ".*protocol.steps was 1 and is "
                                                                                     "now 2"):
        table.run(dataclasses.replace(TINY, steps=2), tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert results.difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == "a.c was 2 and is now 3"
    assert results.difference({"a": 1}, {"a": 1, "b": 2}) == "b was absent and is now 2"


def test_a_whole_last_line_without_its_end_is_kept(small, tmp_path):
    content = (small / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(content[:-1])
    file = Results(tmp_path / "results.jsonl")
    file.open()
    assert (tmp_path / "results.jsonl").read_bytes() == content and len(file.measured) == len(lines_of(small)) - 1


@pytest.mark.parametrize("words, expected", [
    (["--row", "lora"], "--row lora: unknown; choose from sft, dreambooth, "),
    (["--row", "lora+v"], "--row lora+v: unknown; choose from sft, dreambooth, "),
    (["--workers", "0"], "--workers 0"),
    (["--lessons"], "--quick --lessons: the small version has none"),
    (["--concept", "ROOT/nothing"], "nothing: no such folder"),
    (["--concept", "ROOT/three"], "three: 3 images; a concept has 4 of 64x64"),
    (["--concept", "ROOT/large"], "large: 2.png has 96x64 pixels; a concept has 4 images of 64x64"),
    (["--concept", "ROOT/unnamed"], "unnamed: the caption of 1.png does not say [V]"),
    (["--concept", "ROOT/mixed"], "mixed: some captions say"),
    (["--concept", "ROOT/others"], "others: its images show striped orange and blue star and "),
    (["--concept", "ROOT/star", "--concept", "ROOT/star"], "a second concept of the name star; rename"),
])
def test_wrong_input_is_one_line(words, expected, tmp_path, reader, monkeypatch):
    monkeypatch.setattr(table, "Renderer", lambda: reader.render)
    monkeypatch.setattr(table, "Reader", lambda render: reader)
    star = ROOT / "examples" / "star"
    for name in ("star", "three", "large", "unnamed", "mixed", "others"):
        shutil.copytree(star, tmp_path / name)
    (tmp_path / "three" / "4.png").unlink(), (tmp_path / "three" / "4.txt").unlink()
    pictures.open_image(star / "2.png").resize((96, 64)).save(tmp_path / "large" / "2.png")
    (tmp_path / "unnamed" / "1.txt").write_text("a big star")
    (tmp_path / "mixed" / "1.txt").write_text("a big star in [V] style")
    scene = draw_scenes(1, seeded(3))
    to_pil(reader.render(scene, torch.zeros(1, 8, 8))[0]).save(tmp_path / "others" / "3.png")
    with pytest.raises(InputError) as caught:
        table.main([*(word.replace("ROOT", str(tmp_path)) for word in words), "--quick", "--out",
                    str(tmp_path / "out")])
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "results.jsonl").exists()


# ---------------------------------------------------------------------------------------------------- concepts
def test_folders_of_the_user_replace_the_test_concepts(tmp_path):
    found = table.prepare(FULL, tmp_path, [ROOT / "examples" / name for name in ("star", "chalk")])
    assert [(c.name, c.kind, c.tuning) for c in found[:2]] == [("star", "object", False), ("chalk", "style", False)]
    assert found[0].words == "striped orange and blue star"
    assert [c.kind for c in found if c.tuning] == ["object"] * 2        # chalk is tested, so nothing is tuned on it


# ---------------------------------------------------------------------------------------------------- the protocol
RECIPE = {"rollout_steps": 4, "inference_steps": 4, "batch_size": 2, "accumulate": 1, "rank": 16, "alpha": 16,
          "ema": 0.999, "loss": "x0", "grad_states": 1, "keep_weight": 2.0}
ABOUT = {"a": {"kind": "object", "tuning": False, "words": "a"}, "b": {"kind": "object", "tuning": False, "words": "b"},
         "c": {"kind": "object", "tuning": False, "words": "c"}, "s": {"kind": "style", "tuning": False, "words": "s"},
         "t": {"kind": "object", "tuning": True, "words": "t"}, "u": {"kind": "style", "tuning": True, "words": "u"}}
FOLDERS = {name: Path("data", name) for name in ABOUT}
RATES = dict(zip(ROWS, (1e-3, 5e-4, 2e-3, 5e-4, 1e-3, 5e-4, 1e-3, 5e-4, 2e-3), strict=True))


def test_costs_by_hand():
    """In forward passes of one picture, K = 4 states, 2 pictures; on average a walk to 1 of 4 states takes 2.5."""
    plan, g = Plan(FULL, ABOUT, RECIPE), GRADIENT_PASS
    one_state, all_states = 2 * (2.5 + g), 2 * (4 + 4 * g)
    found = {row: plan.cost(method, dict(options)) for row, (method, options) in
             {row: plan.method_of(row) for row in ROWS}.items()}
    assert found == {"sft": (0, 2 * g), "dreambooth": (64 * 4, 4 * g), "sft-keep": (0, 2 * g + one_state),
                     "sft-teacher": (0, 2 * (4 + g)), "pso": (0, 2 * (6 + 2 * g)), "off-policy": (0, all_states),
                     "off-policy-keep": (0, 2 * one_state), "published": (0, all_states), "dopsd": (0, 2 * one_state)}
    assert plan.cost("dopsd", {"grad_states": 2, "keep": "near-64"}) == (0, 2 * 2 * (10 / 3 + 2 * g))
    assert plan.cost("dopsd", {"keep": "none", "grad_states": 1, "batch_size": 1}) == (0, 2.5 + g)
    assert plan.cost("dopsd", {"keep_batches": 2, "rollout_steps": 2})[1] == 3 * 2 * (1.5 + g)
    assert plan.equal_steps("sft") == 400 and plan.equal_steps("dopsd") == FULL.steps
    assert plan.equal_steps("dreambooth") == round((2000 - 256) / (4 * g))


def test_what_several_tables_ask_for_is_run_once():
    plan = Plan(FULL, ABOUT, RECIPE, RATES)
    parts = plan.second_part() | plan.third_part()
    one, two = (plan.table("dopsd", equal) for equal in ("steps", "cost"))
    assert one == two and len(one) == 4 * 3
    few, many = (plan.table("sft", equal) for equal in ("steps", "cost"))
    assert {m.training for m in few} == {m.training for m in many}
    assert plan.curve_concepts == ["a", "b", "s"]
    curve = plan.ablations()["teachers of D-OPSD as published"]["EMA 0.999"]
    assert set(curve[100]) <= set(plan.table("published", "steps")) and plan.curve("published") == curve
    assert set(plan.kept()["as in table 1: 64 captions, weight 2"]) <= set(one)
    jobs = plan.jobs(parts, FOLDERS)
    assert len({job.training for job in jobs}) == len(jobs)
    trained = [job.training for job in jobs if job.training.is_trained]
    # rows of the tables, teachers, captions to keep, states, lessons: what they share is run once
    assert len(trained) == 9 * 12 + 3 * 3 + 8 * 4 + 2 * 3 * 3 + 9 * 3
    tables = [any("table 1" in m.groups for m in job.measurements) for job in jobs]
    assert jobs[0].measurements[-1].step == 400 or len(jobs[0].measurements) >= 4
    assert tables.index(False) >= 9 * 12
    done = {jobs[0].measurements[0]}
    assert left(jobs, done)[0].measurements == jobs[0].measurements[1:] and left(jobs, set()) == jobs


def test_rows_are_known_by_their_trainings():
    plan = Plan(FULL, ABOUT, RECIPE, RATES)
    for row in ROWS:
        assert {plan.row_of(m.training) for m in plan.table(row, "steps")} == {row}
    assert {plan.row_of(m.training) for m in plan.kept()["weight 4"]} == {""}
    assert [plan.row_of(Training(name, "a")) for name in ("base", "teacher's view")] == ["base", "teacher's view"]


def test_train_understands_every_run():
    new = dataclasses.replace(FULL, rows=("off-policy+v", "dopsd+kl"))
    for settings, rates in ((FULL, RATES), (QUICK, RATES), (new, dict.fromkeys(new.rows, 1e-3))):
        plan = Plan(settings, ABOUT, RECIPE, rates)
        for job in plan.jobs(plan.first_part() | plan.second_part() | plan.third_part(), FOLDERS,
                             lambda name, concept: Path("kept", f"{name}-{concept}")):
            run = job.training
            if not run.is_trained:
                continue
            cfg = parse(train.Options, [*job.words, *runner.train_words(run, 10)], "")
            assert cfg.data == [str(FOLDERS[run.concept])]
            train.check_values(cfg, train.METHODS[cfg.method])
            assert cfg.method == run.method and cfg.lr == run.lr and cfg.steps == 10
            assert cfg.loss == dict(run.options).get("loss")
            asked = dict(run.options).get("keep")
            assert cfg.keep == (asked if asked in (None, "none") else f"kept/{asked}-{run.concept}")


def made_up(plan: Plan, file: Results, points, **measures) -> None:
    """Lines for points, with numbers that nobody measured."""
    for point in points:
        if point not in file.measured:
            spread = sum(map(ord, point.training.name)) % 17 / 100
            values = {name: 0.5 + spread for name in measure.MEASURES} | measures
            file.add(line_of(point, Job(point.training, cost=1), 1.0, values))


def test_the_report_of_a_full_protocol_has_no_gaps(tmp_path):
    facts = {"protocol": FULL.facts(), "recipe": RECIPE, "concepts": ABOUT}
    assert set(facts["protocol"]) == {field.name for field in dataclasses.fields(FULL)} - {"rows"}
    file = Results(tmp_path / "results.jsonl", facts)
    file.open()
    assert Report(file).text().count(NOT_RUN) > 200                      # nothing was measured yet
    plan = Report(file).plan
    validation = Training(VALIDATION)
    file.add(line_of(Measurement(validation), Job(validation), 0.0, {"true renderings": {"concept (object)": 1.0}}))
    first = plan.first_part()
    decided = {"ordinary, decided": 0.9}
    made_up(plan, file, first["reference"], concept=0.9, ordinary=0.9, **decided)
    good = {point for row, rate in RATES.items() for point in plan.tuning(row, rate)}
    made_up(plan, file, good, concept=0.8, ordinary=0.95, **decided)    # what is gained in ordinary accuracy is nothing
    made_up(plan, file, first["tuning"][::2], concept=0.85, ordinary=0.8, **decided)            # .85 - .10 < .8
    made_up(plan, file, first["tuning"], concept=0.85, ordinary=0.9, **{"ordinary, decided": 0.84})   # .85 - .06 < .8
    assert choose_rates(plan, file) == RATES
    plan.rates = RATES
    for points in (plan.second_part() | plan.third_part()).values():
        made_up(plan, file, points)
    report = Report(Results(tmp_path / "results.jsonl"))
    assert report.plan.rates == RATES and NOT_RUN not in report.text()
    for point, line in report.results.measured.items():                 # .9 of .9 lies in the middle of 25 and 50
        if point.training.concept == "a" and plan.row_of(point.training) == "dopsd":
            step = min(point.step, 51)
            line["measures"] |= {"concept": {25: 0.71, 50: 0.91}.get(step, 0.95), "ordinary": {25: 0.9}.get(step, 0.88)}
            line["measures"] |= {"ordinary, decided": 0.5}
            line["seconds"] = 2.0 * point.step
        if point.training.concept == "a" and point.training.method == "base":
            line["measures"] |= {"concept": 0.1, "ordinary": 0.899, "ordinary, decided": 0.5}
    (line,) = [line for line in report.crossings("dopsd")[0] if line["concept"] == "a"]
    assert line["step"] == pytest.approx(37.5) and line["measures"]["ordinary"] == pytest.approx(0.89)
    assert line["cost"] == pytest.approx(37.5 * 20) and line["seconds"] == pytest.approx(75)
    assert report.within([line]) == 1                                    # .009 are lost
    line["measures"]["ordinary"] = 0.888
    assert report.within([line]) == 0


def test_differences_by_hand():
    ours = [{"concept": c, "seed": s, "cost": 3, "measures": {"m": v}} for c, s, v in
            (("a", 0, 0.5), ("a", 1, 0.7), ("b", 0, 0.2))]
    theirs = [{**line, "cost": 1, "measures": {"m": 0.1}} for line in ours[:2]]
    assert [line["measures"]["m"] for line in minus(ours, theirs, ("m",))] == pytest.approx([0.4, 0.6])
    cells = compared(ours, theirs, ("m", "cost"))
    assert cells[0].startswith("+0.500 [") and cells[1].startswith("+2.000 [") and cells[2] == "2"
    assert compared(ours, [], ("m",)) == [NOT_RUN, "0"]


def test_the_shipped_results_are_those_of_the_plan():
    """All that the protocol asks for and nothing else, and --report makes the tables."""
    shipped = ROOT / "experiments" / "results"
    file = Results(shipped / "results.jsonl")
    assert file.facts["protocol"] == json.loads(json.dumps(FULL.facts()))
    assert file.facts["kept"] == results.fingerprint_of_captions(ORDINARY)
    plan = Plan(FULL, file.facts["concepts"], file.facts["recipe"])
    plan.rates = choose_rates(plan, file)
    parts = plan.first_part() | plan.second_part() | plan.third_part()
    jobs = plan.jobs(parts, dict.fromkeys(plan.concepts, ROOT))
    assert set(file.measured) == {m for job in jobs for m in job.measurements}
    for job in jobs:
        for line in file.of(job.measurements):
            assert (line["run"], line["kind"]) == (job.training.name, job.kind)
            assert line["cost"] == job.first_cost + line["step"] * job.cost
    assert Report(file).text() == (shipped / "tables.md").read_text()


def test_where_a_curve_crosses_a_goal():
    curve = {0: [0.1, 1.0], 10: [0.5, 0.8], 20: [0.4, 0.6], 40: [0.9, 0.2]}
    assert crossing(curve, 0.3) == pytest.approx([5, 0.3, 0.9])
    assert crossing(curve, 0.65) == pytest.approx([30, 0.65, 0.4]) and crossing(curve, 0.05) == [0, 0.1, 1.0]
    assert crossing(curve, 0.95) is None
