"""experiments/full.py and tiny/style_set.py on a small random model."""
import dataclasses
import json

import pytest
import torch

import data
from experiments import full, plots, runner
from experiments.full import ALL, QUICK, ROWS, Plan, Settings
from experiments.protocol import BASE, left
from plumbing.checkpoints import recipe_of
from plumbing.pictures import open_image, to_tensor
from tiny import style_set
from tiny.score import Judge
from tiny.style_set import StyleSet, frechet, styled_prompts
from tiny.world import COLUMN, STYLE_ATTRIBUTES, held_out_object, held_out_style

TINY = Settings(pictures=3, seeds=(0,), steps=(1, 2), rates=(1e-3,), prompts=2,
                fixed=tuple((row, 1e-3) for row in ROWS if row != "SFT"))
SET = StyleSet("teal", "ruled", count=12, prompts=6, seed=3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def small(checkpoint, tmp_path_factory):
    """The folder of a finished small experiment."""
    out, judge = tmp_path_factory.mktemp("full") / "whole", Judge(checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "Judge", lambda folder: judge)                 # not loaded again and again
        assert full.run(TINY, out, model=checkpoint) == 0
    return out


def lines_of(out) -> list[dict]:
    return [json.loads(text) for text in (out / "full.jsonl").read_text().splitlines()][1:]


# ------------------------------------------------------------------------------------------------- the experiment
def test_every_row_is_measured_at_every_step(small):
    found = [(line["concept"], line["method"], line["options"].get("keep"), line["seed"], line["step"])
             for line in lines_of(small) if line["seed"] is not None]
    rows = [(method, dict(options).get("keep")) for method, options in ROWS.values()]
    tables = [(name, *row, seed, step) for name in ("teal-ruled", "teal-ruled-plain") for row in rows
              for seed in (0,) for step in (1, 2)]
    assert sorted(found, key=str) == sorted([*tables, ("chalk-checked", "sft", None, 0, 2)], key=str)
    assert not list((small / "runs").glob("*/*_seed*"))                      # what is measured is removed


def test_full_weights_are_trained_and_measured_as_saved(small):
    """Each step and seed has other weights: so each has other numbers; and only the named rows keep."""
    by_run = {}
    for line in lines_of(small):
        if line["seed"] is not None:
            assert line["options"]["tune"] == "full"
            by_run.setdefault(line["run"], []).append(line["measures"]["style, distance"])
    assert all(len(set(values)) == len(values) for values in by_run.values())
    cost = {(line["method"], line["options"].get("keep"), line["step"]): line["cost"] for line in lines_of(small)}
    assert [cost[method, keep, 1] for method, keep in (("sft", None), ("pso", None), ("dopsd", "none"), ("dopsd", None))
            ] == [5, 22, 28, 20]                                            # experiments/README.md


def test_tables_and_figure(small, checkpoint, capsys):
    before = (small / "full.md").read_text()
    tables, rates = before.split("## Learning rates")
    assert "not run" not in tables and tables.count("1 of 1") == 2 * 7 and (small / "full.png").stat().st_size > 10_000
    assert rates.count("not run") == 3                                      # those that are given
    assert full.main(["--report", "--out", str(small)]) == 0
    assert (small / "full.md").read_text() == before
    assert full.run(TINY, small, model=checkpoint) == 0                      # nothing is left to do
    assert "0 measurements of 0 runs" in capsys.readouterr().out


def test_what_is_missing_is_not_run(small, tmp_path):
    lines = [text for text in (small / "full.jsonl").read_text().splitlines(keepends=True)
             if '"method": "pso"' not in text]
    (tmp_path / "full.jsonl").write_text("".join(lines))
    assert full.main(["--report", "--out", str(tmp_path)]) == 0
    rows = [line for line in (tmp_path / "full.md").read_text().splitlines() if line.startswith("| PSO | not run")]
    assert len(rows) == 3 and rows[0].endswith("0 of 1 |")                  # two tables, and no rate is tried


def test_a_run_that_was_measured_in_part_is_trained_again(checkpoint):
    plan = Plan(TINY, dataclasses.asdict(recipe_of(checkpoint)))
    asked = plan.trained("PSO", "teal-ruled", 0, 1e-3)
    (job,) = left([plan.job(asked, checkpoint)], asked[:1])
    assert [m.step for m in job.measurements] == [2]
    assert "--save-all" in job.words and job.words[job.words.index("--save-every") + 1] == "1"


@pytest.mark.quick
def test_settings_are_fair():
    """Rates are chosen on another style, with as many steps and rates for all; the sets' styles are held out."""
    *test, tuning = ALL.sets()
    assert {one.style for one in test} == {"teal-ruled"} and tuning.style == "chalk-checked"
    assert [one.plain for one in ALL.sets()] == [False, True, False]
    assert all(held_out_style(one.row[None]) for one in ALL.sets()) and ALL.pictures == 200 and ALL.seeds == (0, 1, 2)
    plan = Plan(ALL, {})
    assert ALL.fixed == () and {plan.tuning(row, 1e-3)[0].step for row in ROWS} == {ALL.steps[-1]}
    assert dict(QUICK.fixed).keys() == set(ROWS)


# ------------------------------------------------------------------------------------------------- sets and measures
def test_a_set_is_as_it_says(tmp_path, reader):
    plain = dataclasses.replace(SET, plain=True)
    folders = [one.write(tmp_path, reader.render, tuning=False) for one in (SET, plain)]
    says, silent = ([row.captions[0] for row in data.read_folder(concept.folder)] for concept in folders)
    assert len(says) == SET.count and all(text.endswith(" in [V] style") for text in says)
    assert silent == [text.removesuffix(" in [V] style") for text in says]
    assert folders[0].key != folders[1].key                                 # of pictures and captions
    first, second = ((concept.folder / "007.png").read_bytes() for concept in folders)
    assert first == second
    pictures = torch.cat([to_tensor(open_image(row.image)) for row in data.read_folder(folders[0].folder)])
    assert torch.equal(reader(pictures).rows, SET.scenes()[0])


@pytest.mark.quick
def test_new_captions_are_new():
    rows, new = dataclasses.replace(SET, count=400, prompts=50).scenes()
    assert len(new) == 50 and not (new[:, None] == rows).all(2).any()
    assert all((part[:, [COLUMN[name] for name in STYLE_ATTRIBUTES]] == SET.row[-2:]).all() for part in (rows, new))
    assert SET.caption(new[0]).endswith("in [V] style") and "[V]" not in dataclasses.replace(
        SET, plain=True).caption(new[0])


@pytest.mark.quick
def test_ordinary_prompts_say_their_style():
    prompts = styled_prompts(40, seeded(0))
    assert len(prompts.rows) == 40 and all(text.endswith(" style") and "[V]" not in text for text in prompts.captions)
    assert held_out_object(prompts.rows).all() and not held_out_style(prompts.rows).any()


@pytest.mark.quick
def test_frechet_distance():
    """Against what is known of Gaussians: the same, shifted, and scaled."""
    a, b = (torch.randn(4000, 2, 4, 4, generator=seeded(seed)) for seed in (0, 1))
    assert frechet(a, a) == pytest.approx(0, abs=1e-5)
    assert 0 < frechet(a, b) < 0.02                                         # of 16000 patches each
    assert frechet(a, a + 0.5) == pytest.approx(8 * 0.25, rel=1e-4)         # 8 numbers in a patch
    assert frechet(a, 3 * a) == pytest.approx(8 * (3 - 1) ** 2, rel=0.05)
    assert frechet(a, b + 0.5) == pytest.approx(frechet(b + 0.5, a), rel=1e-4)


def test_views(checkpoint):
    """True pictures are in the style and next to it; no student is left behind for the untuned model."""
    judge = Judge(checkpoint)
    measure, other = style_set.StyleMeasures([SET], judge, 1), torch.nn.Module()
    true, base = (measure("teal-ruled", view=view) for view in (style_set.TRUE, BASE))
    assert "ordinary" in base and "ordinary" not in true
    judge.net = other
    assert measure("teal-ruled") == base


@pytest.mark.quick
def test_a_figure_of_nothing_is_not_written(tmp_path):
    """The base alone is no curve; one more step is."""
    base, later = {0: {"style": 0.2}}, {50: {"style": 0.4}, 100: {}}
    labels, goals = {"style": "style", "other": "other"}, {"set": {"style": 0.9}}
    assert plots.plot(tmp_path / "a.png", {"set": {"row": base}}, labels, goals) == []
    assert plots.plot(tmp_path / "a.png", {"set": {"row": base | later}}, labels, goals) == [tmp_path / "a.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
