"""evaluate.py: what it draws, what it says of it, and that the embedded models' figures are those of tiny.score."""
import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_judges import networks, paths  # noqa: F401

import evaluate
import sample
import train
from plumbing import judges
from plumbing.files import ROOT, InputError
from plumbing.pictures import open_image
from plumbing.scores import compared, row_of, told
from tiny import exact, score

STAR = ROOT / "examples" / "star"


# ---------------------------------------------------------------------------------------------------- differences
@pytest.mark.quick
def test_interval_of_one_noise_is_the_plain_bootstrap():
    """Of a normal sample, it is the mean and 1.96 standard errors."""
    g = torch.Generator().manual_seed(0)
    student, base = torch.randn(400, 1, generator=g) + 0.3, torch.zeros(400, 1)
    found, values = compared(student, base), student.flatten().numpy()
    assert found["mean"] == pytest.approx(values.mean(), abs=1e-6) and found["count"] == 400
    error = 1.96 * values.std() / math.sqrt(400)
    assert found["low"] == pytest.approx(values.mean() - error, abs=0.01)
    assert found["high"] == pytest.approx(values.mean() + error, abs=0.01)


@pytest.mark.quick
def test_interval_is_of_prompts_and_noises():
    """Noises of one prompt that agree add nothing; the variance of a two-level sample is the sum of both levels'."""
    rng = np.random.default_rng(0)
    of_prompts = rng.normal(size=(60, 1))
    same = torch.tensor(np.repeat(of_prompts, 8, 1))
    single = compared(same[:, :1], torch.zeros(60, 1, dtype=torch.float64))
    repeated = compared(same, torch.zeros_like(same))
    assert repeated["high"] - repeated["low"] == pytest.approx(single["high"] - single["low"], rel=0.05)
    both = torch.tensor(of_prompts + rng.normal(size=(60, 8)))
    wide = compared(both, torch.zeros_like(both))
    means = both.mean(1)
    noise = both.var(1, correction=0).mean() / 8                        # of resampled noises within a prompt
    expected = 2 * 1.96 * math.sqrt((float(means.var(correction=0)) + float(noise)) / 60)
    assert wide["high"] - wide["low"] == pytest.approx(expected, rel=0.05)


@pytest.mark.quick
def test_what_is_missing_does_not_count():
    student = torch.tensor([[1.0], [math.nan], [3.0]])
    found = compared(student, torch.zeros(3, 1))
    assert found["mean"] == 2 and found["count"] == 2
    assert compared(student[1:2], torch.zeros(1, 1)) is None
    row = row_of(4, "ordinary prompts", "change, pixels", "lower", None, student)
    assert row["base"] is row["difference"] is None and row["student"] == 2
    assert "change, pixels" in told([row]) and told([row]).splitlines()[0].startswith("4 solver steps")


# ---------------------------------------------------------------------------------------------------- prompts
@pytest.mark.quick
@pytest.mark.parametrize("prompt, class_name, known", [
    ("a [V] dog on grass", "dog", "a dog on grass"), ("a [V] on grass", "dog", "a dog on grass"),
    ("a [V] dog on grass", "", "a dog on grass"), ("a house in [V] style", "", "a house"),
    ("a house in [V] style", "watercolour", "a house in watercolour style"), ("a red star", "dog", "a red star")])
def test_prompts_for_a_network_that_does_not_know_v(prompt, class_name, known):
    assert evaluate.named(prompt, class_name) == known


@pytest.mark.quick
def test_ordinary_prompts_are_unseen():
    """Neither kept nor trained on; every list is what evaluate.py takes it for."""
    kept = {json.loads(line)["text"] for line in (ROOT / "captions" / "general.jsonl").read_text().splitlines()}
    unseen, objects, styles = (evaluate.lines_of(ROOT / "captions" / f"{name}.txt", "")
                               for name in ("unseen", "new_object", "new_style"))
    assert len(set(unseen)) == 24 and not kept & set(unseen) and not any("[V]" in prompt for prompt in unseen)
    assert len(set(objects)) == 8 and all("[V]" in prompt and "[V] style" not in prompt for prompt in objects)
    assert len(set(styles)) == 8 and all("in [V] style" in prompt for prompt in styles)


def subject(photos: Path, captions: list[str]) -> evaluate.Subject:
    rows = evaluate.read_folder(photos)
    rows = [replace(row, captions=(caption,)) for row, caption in zip(rows, captions)]
    return evaluate.Subject(ROOT / "tiny" / "model", [str(photos)], rows, Path("out"), "none", lora="a/b.safetensors")


def test_what_is_drawn(photos, tmp_path, capsys):
    """New prompts with the words of the captions, the captions with their pictures, and ordinary prompts."""
    dogs = subject(photos, ["a [V] dog", "a [V] dog in snow", "my [V] dog"])
    cfg = evaluate.Options(class_name="dog")
    new, training, ordinary = ([p for p in evaluate.prompts_of(cfg, dogs, None, None, None) if p.group == group]
                               for group in evaluate.GROUPS)
    assert [len(part) for part in (new, training, ordinary)] == [8, 3, 24]
    assert new[0].text == "a [V] dog on a sandy beach at sunset"
    assert [p.reference for p in new[:4]] == [dogs.rows[i].image for i in (0, 1, 2, 0)]
    assert all(p.is_pair and p.reference == row.image for p, row in zip(training, dogs.rows))
    style = subject(photos, ["a cat in [V] style"] * 3)
    assert style.kind == judges.STYLE
    assert evaluate.prompts_of(cfg, style, None, None, None)[0].text == "a lighthouse on a cliff in [V] style"
    plain = subject(photos, ["a cat"] * 3)
    assert {p.group for p in evaluate.prompts_of(cfg, plain, None, None, None)} == set(evaluate.GROUPS[1:])
    assert "no caption says [V]" in capsys.readouterr().err
    own = tmp_path / "own.txt"
    own.write_text("one\n\n two \n")
    found = evaluate.prompts_of(evaluate.Options(prompts=str(own), ordinary=str(own)), plain, None, None, None)
    assert [p.text for p in found if p.group != evaluate.TRAINING] == ["one", "two", "one", "two"]


# ---------------------------------------------------------------------------------------------------- whole programs
@pytest.fixture
def judged(networks):  # noqa: F811
    return ["--clip", str(networks["clip"]), "--dino", str(networks["dinov3"]), "--judge", str(networks["vlm"])]


@pytest.fixture
def few(tmp_path) -> list[str]:
    """Two new and two ordinary prompts."""
    (tmp_path / "new.txt").write_text("a [V] at the top\na small [V]\n")
    (tmp_path / "ordinary.txt").write_text("a red star\na blue circle\n")
    return ["--prompts", str(tmp_path / "new.txt"), "--ordinary", str(tmp_path / "ordinary.txt")]


def test_a_run_is_scored_by_networks(run, judged, few, checkpoint, capsys):
    """Every measure for every group it says something about; pictures are those of sample.py."""
    out = run("scored", "--steps", 2, "--lr", 0.1)
    capsys.readouterr()
    assert evaluate.main(["--run", str(out), *judged, *few, "--steps", "2", "--seeds", "2", "--seed", "5"]) == 0
    printed, scores = capsys.readouterr().out, json.loads((out / "scores.json").read_text())
    asked = {(row["steps"], row["group"].split()[0], row["measure"]) for row in scores["rows"]}
    both = {"CLIP-S", "sharpness"}
    for steps in (4, 2):
        assert {m for s, group, m in asked if (s, group) == (steps, "ordinary")} == \
            both | {"change, DINO", "change, pixels"}
        assert {m for s, group, m in asked if (s, group) == (steps, "new")} - {"VLM-J"} == both
        assert {m for s, group, m in asked if (s, group) == (steps, "captions")} - {"VLM-J"} == both | {"DINO-D"}
    by_name = {(row["steps"], row["group"].split()[0], row["measure"]): row for row in scores["rows"]}
    change = by_name[4, "ordinary", "change, pixels"]
    assert change["base"] is None and change["student"] > 0 and change["difference"] is None
    clip = by_name[4, "ordinary", "CLIP-S"]
    assert clip["difference"]["mean"] == pytest.approx(clip["student"] - clip["base"], abs=1e-6)
    assert clip["difference"]["low"] <= clip["difference"]["mean"] <= clip["difference"]["high"]
    assert clip["difference"]["count"] == 4 and f"{clip['student']:.3f}" in printed
    assert any(line.startswith("LPIPS-D") for line in scores["missing"])
    values = scores["values"]
    assert values["shape"] == [2, 2, 7, 2] and len(values["CLIP-S"]) == math.prod(values["shape"])
    assert all((out / name).is_file() for name in scores["pictures"]) and len(scores["pictures"]) == 6
    sample.main(["--model", str(checkpoint), "--prompt", "a red star", "--seed", "6", "--device", "cpu", "--lora",
                 str(out / "student.safetensors"), "--out", str(out / "same.png")])
    place = scores["about"]["prompts"].index("a red star")
    ours = out / "evaluation" / "4_steps" / f"student_{place:03d}_1.png"
    assert open_image(ours).tobytes() == open_image(out / "same.png").tobytes()
    assert f"report   {out / 'report.html'}" in printed


def test_full_weights_and_loras_without_a_run_are_scored(base, tmp_path, judged, few, photos, checkpoint, adapter_file):
    """Without networks: sharpness and pixels are left."""
    words = [*base[:base.index("--rank")], *base[base.index("--alpha") + 2:], "--tune", "full", "--lr", "1e-2"]
    assert train.main([*words, "--steps", "2", "--out", str(tmp_path / "full")]) == 0
    assert evaluate.main(["--run", str(tmp_path / "full"), *few, "--seeds", "1"]) == 0
    rows = json.loads((tmp_path / "full" / "scores.json").read_text())["rows"]
    assert {row["measure"] for row in rows} == {"sharpness", "change, pixels"}
    assert rows[-1]["measure"] == "change, pixels" and rows[-1]["student"] > 0
    out = tmp_path / "loose"
    assert evaluate.main(["--data", str(photos), "--lora", str(adapter_file), "--model", str(checkpoint), *few,
                          *judged[:2], "--seeds", "1", "--out", str(out)]) == 0
    assert {row["measure"] for row in json.loads((out / "scores.json").read_text())["rows"]} == {
        "sharpness", "change, pixels", "CLIP-S"}
    assert not (out / "report.html").exists()


def test_the_vlm_writes_prompts(run, networks, few, monkeypatch, capsys):  # noqa: F811
    answers = {judges.INVENT[judges.OBJECT][:10]: "a [V] one\na [V] two", judges.REWRITE[:10]: "in other words, [V]",
               judges.QUESTIONS[judges.OBJECT][:10]: "mostly same"}
    monkeypatch.setattr(judges.Asked, "__call__", lambda self, pictures, question, most: answers[question[:10]])
    out = run("written", "--steps", 1)
    assert evaluate.main(["--run", str(out), "--judge", str(networks["vlm"]), "--write-prompts", *few[2:], "--seeds",
                          "1"]) == 0
    scores = json.loads((out / "scores.json").read_text())
    assert scores["about"]["prompts"][:5] == ["a [V] one", "a [V] two", *["in other words, [V]"] * 3]
    verdicts = [row for row in scores["rows"] if row["measure"] == "VLM-J"]
    assert [row["group"].split()[0] for row in verdicts] == ["new", "captions"]
    assert all(row["student"] == row["base"] == 3 and row["difference"]["mean"] == 0 for row in verdicts)


@pytest.mark.quick
def test_exact_has_all_of_tiny_score():
    known = score.COLUMNS["new prompts with [V]"].keys() | score.COLUMNS["ordinary prompts"].keys()
    assert exact.EXACT.keys() == known | {"sharpness", "change, pixels"}


def test_exact_figures_are_those_of_tiny_score(tmp_path, monkeypatch, capsys):
    """A short run on the star: means of single pictures, against the sums of tiny.score."""
    out = tmp_path / "star"
    words = ["--data", str(STAR), "--steps", "3", "--sample-every", "0", "--out", str(out), "--keep", "none"]
    assert train.main(words) == 0
    monkeypatch.setattr(exact, "NEW_SCENES", 4)
    monkeypatch.setattr(exact, "ORDINARY_SCENES", 6)
    assert evaluate.main(["--run", str(out)]) == 0
    rows = {row["measure"]: row for row in json.loads((out / "scores.json").read_text())["rows"]}
    words = ["score", "--data", str(STAR), "--lora", f"mine={out / 'student.safetensors'}", "--out",
             str(tmp_path / "s"), "--concept-prompts", "4", "--ordinary-prompts", "6"]
    monkeypatch.setattr(sys, "argv", words)
    score.main()
    theirs = json.loads((tmp_path / "s" / "scores.json").read_text())
    for measure in score.COLUMNS["new prompts with [V]"].keys() | score.COLUMNS["ordinary prompts"].keys():
        assert rows[measure]["base"] == pytest.approx(theirs["base"][measure], abs=1e-6)
        assert rows[measure]["student"] == pytest.approx(theirs["mine"][measure], abs=1e-6)
        assert rows[measure]["teacher"] == pytest.approx(theirs["teacher's view"].get(measure), abs=1e-6) \
            if measure in theirs["teacher's view"] else rows[measure]["teacher"] is None
    assert rows["change, pixels"]["student"] > 0 and rows["sharpness"]["difference"]["count"] == 6


def test_sharpness_falls_with_decided_marks(reader):
    """The embedded model at fewer steps than it was made for leaves marks half drawn."""
    judge = score.Judge(ROOT / "tiny" / "model")
    exam = score.Exam(judge, str(STAR), 1, 16, 0)
    decided, sharp = [], []
    for steps in (4, 3, 2):
        _, ordinary = exam.pictures(None, steps)
        decided.append(float(judge.reader(ordinary).decided.mean()))
        sharp.append(sum(map(judges.sharpness, ordinary)) / 16)
    assert decided == sorted(decided, reverse=True) and sharp == sorted(sharp, reverse=True)
    assert sharp[0] - sharp[2] > 0.2


# ---------------------------------------------------------------------------------------------------- bad input
@pytest.mark.quick
@pytest.mark.parametrize("words, message", [
    ("", "--run, --lora: give --run DIR of train.py, or --data DIR and --lora FILE"),
    ("--run a --lora b", "--run, --lora: give"), ("--lora b", "--run, --lora: give"),
    ("--run out/nowhere", "--run out/nowhere: no config.json there; give the folder of a run"),
    ("--data examples/star --lora nowhere.safetensors", "nowhere.safetensors: no such file"),
    ("--data examples/nowhere --lora x.safetensors", "examples/nowhere: no such"),
    ("--data examples/paint --lora x.safetensors", "examples/paint: for editing, which is not scored here"),
    ("--run out/x --seeds 0", "--seeds 0 --steps : not usable"), ("--run out/x --steps 0", "--steps 0: not usable"),
    ("--run out/x --steps a", "--steps a: not usable"), ("--run out/x --seed -1", "--seed -1: out of range")])
def test_bad_words(words, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as caught:
        evaluate.main(words.split())
    assert "\n" not in str(caught.value)


def test_bad_runs_and_lists(run, few, tmp_path, monkeypatch):
    out = run("bad", "--steps", 1)
    (tmp_path / "empty.txt").write_text(" \n")
    cases = [(["--prompts", str(tmp_path / "empty.txt")], "--prompts .*empty.txt: no prompt in it"),
             ([*few, "--write-prompts"], "--write-prompts: no VLM to write them; give --judge"),
             ([*few, "--clip", str(tmp_path)], "no config.json in this folder"),
             ([*few, "--out", str(out / "config.json" / "x")], "--out .*: not writable")]
    for words, message in cases:
        with pytest.raises(InputError, match=message):
            evaluate.main(["--run", str(out), *words])
    (out / "student.safetensors").unlink()
    with pytest.raises(InputError, match="student.safetensors: no such file"):
        evaluate.main(["--run", str(out), *few])
    config = json.loads((out / "config.json").read_text())
    config["options"]["lr"] = "fast"
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as caught:
        evaluate.main(["--run", str(out), *few])
    assert caught.value.code == 2
    shutil.rmtree(out)
