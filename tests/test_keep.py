"""--keep: the untuned model teaches other captions beside the concept, so that their pictures stay as they are."""
import dataclasses
import json
import re

import pytest
import torch
from conftest import fill_b, metrics
from PIL import Image
from safetensors.torch import load_file
from test_resume import assert_same_run

import train
from plumbing import checkpoints
from plumbing.files import ROOT, InputError
from plumbing.options import parse
from plumbing.recipes import FLUX2, TURBO
from plumbing.train_options import Source, read_source, sources_of

STATE = "state.safetensors"


def options(out) -> dict:
    return json.loads((out / "config.json").read_text())["options"]


def parse_without_keep(options: type, argv: list[str], description: str):
    """The command line of `base` without its --keep none."""
    first = argv.index("--keep")
    return parse(options, argv[:first] + argv[first + 2:], description)


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """A .jsonl of captions only."""
    path = tmp_path_factory.mktemp("keep") / "captions.jsonl"
    texts = ("a red circle", "a small blue star on mint", "a moon", "a big plain heart on wine", "a cross on sky")
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_it_is_a_task_that_could_be_given_otherwise(run, photos, captions):
    """The same numbers as two --data, the second one taught by the untuned model."""
    kept = run("kept", "--keep", captions, "--keep-weight", 1, "--grad-states", 2, "--steps", 3)
    given = run("given", "--data", photos, captions, "--teacher-lora", "image", "untuned", "--steps", 3)
    a, b = (load_file(out / STATE) for out in (kept, given))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for mine, theirs in zip(metrics(kept), metrics(given)):
        assert mine == theirs
    lines = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    assert all(list(line["losses"]) == ["photos", "keep"] for line in lines)
    assert lines[0]["losses"]["keep"] == 0 < lines[2]["losses"]["keep"]               # at the start nothing has changed


@pytest.mark.parametrize("weight, batches", [(1, 1), (3, 1), (0.5, 2), (0, 1)])
def test_gradient_is_the_weighted_mean(prepare, captions, weight, batches):
    parts = prepare("--keep", captions, "--keep-weight", weight, "--keep-batches", batches, "--accumulate", 2)
    fill_b(parts.run.tuned.theta, seed=5), fill_b(parts.run.tuned.theta_bar, seed=6)
    parameters = list(parts.run.tuned.parameters().values())

    def mean(task: train.Task, count: int) -> list[torch.Tensor]:
        total = 0.0
        for number in range(count):
            total = total + sum(train.METHODS["dopsd"](**train.bind(parts.cfg, parts.run.tuned, task, number,
                                                                    parts.shift_of)))
        return torch.autograd.grad(total / count, parameters)

    concept, keep = mean(parts.tasks[0], 2), mean(parts.tasks[1], 2 * batches)
    losses = train.gradient_of_step(parts.cfg, parts.run, parts.tasks, parts.shift_of)
    for parameter, a, b in zip(parameters, concept, keep):
        torch.testing.assert_close(parameter.grad, (a + weight * b) / (1 + weight), rtol=1e-3, atol=1e-6)
    assert list(losses) == ["photos", "keep"] and losses["keep"] > 0


def test_it_pulls_the_student_back(run, captions):
    """After as many steps, the student's velocities for kept captions are nearer to the untuned model's."""
    far, near = (run(name, "--steps", 25, "--keep", captions, "--keep-weight", weight)
                 for name, weight in (("far", 0), ("near", 4)))

    def drift(out) -> float:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return sum(line["losses"]["keep"] for line in lines[-5:])

    assert drift(near) < 0.5 * drift(far)


def test_panels_are_about_the_concept(run, captions):
    plain, kept = (run(name, "--steps", 1, "--sample-every", 1, *flags)
                   for name, flags in (("plain", ()), ("kept", ("--keep", captions))))
    sizes = [Image.open(out / "samples" / "step_000001.png").size for out in (plain, kept)]
    assert sizes[0] == sizes[1]


def test_resume_is_the_same_run(run, captions):
    flags = ("--keep", captions, "--keep-batches", 2, "--keep-weight", 3, "--grad-states", 1)
    whole, parts = run("whole", *flags, "--steps", 4), run("parts", *flags, "--steps", 2)
    run("parts", *flags, "--steps", 4, "--resume")
    assert_same_run(whole, parts)
    with pytest.raises(InputError, match="--resume: --keep-weight was 3.0 and is now 2.0"):
        run("parts", *flags[:4], "--grad-states", 1, "--steps", 5, "--resume")


def test_the_recipes_captions_are_the_default(run, captions, monkeypatch):
    small = dataclasses.replace(checkpoints.Z_IMAGE.recipes[1], keep=str(captions))
    backbone = dataclasses.replace(checkpoints.Z_IMAGE, recipes=(checkpoints.Z_IMAGE.recipes[0], small))
    monkeypatch.setattr(checkpoints, "BACKBONES", (backbone,))

    monkeypatch.setattr(train, "parse", parse_without_keep)
    found = {name: options(run(name, "--steps", 1, *flags)) for name, flags in (
        ("default", ()), ("off", ("--keep", "none")), ("one", ("--keep", "none", "--grad-states", 1)),
        ("sft", ("--method", "sft")), ("prior", ("--method", "dreambooth")))}
    kept = {name: (given["keep"], given["grad_states"]) for name, given in found.items()}
    assert kept == {"default": (str(captions), 1), "off": ("none", None), "one": ("none", 1), "sft": ("none", None),
                    "prior": (str(captions), 1)}
    assert found["default"]["keep_weight"] == small.keep_weight == 2


@pytest.mark.quick
@pytest.mark.parametrize("data, model, expected, sources", [
    ("star", "model", "ordinary", 0), ("star", "flux2", "ordinary", 0), ("paint", "flux2", "edits", 1)])
def test_the_embedded_models_keep_pictures_or_edits(data, model, expected, sources):
    cfg, recipe, _, rows = train.read(["--data", str(ROOT / "examples" / data), "--model", str(ROOT / "tiny" / model)])
    assert cfg.keep == str(ROOT / "examples" / expected) and len(rows) == 2
    assert {len(row.sources) for row in rows[1]} == {sources} and len({row.captions for row in rows[1]}) > 20
    for official in (TURBO, FLUX2):
        assert (official.keep, official.keep_edits, official.grad_states) == ("none", "none", None)


def test_who_names_teachers_names_all_of_them(run, photos, adapter_file, monkeypatch):
    monkeypatch.setattr(train, "parse", parse_without_keep)
    out = run("merged", "--data", photos, "--teacher-lora", adapter_file, "--steps", 1)
    assert options(out)["keep"] == "none"


@pytest.mark.parametrize("method", ["off-policy", "sft-teacher", "sft"])
def test_other_methods_keep_as_dopsd_does(run, prepare, captions, method):
    """The kept captions have the loss of `dopsd` on the student's own rollout, at one of two states."""
    flags = ("--method", method, "--keep", captions, "--grad-states", 1)
    parts = prepare(*flags)
    fill_b(parts.run.tuned.theta, seed=1)
    given = train.bind(parts.cfg, parts.run.tuned, parts.tasks[1], 0, parts.shift_of)
    methods = parts.tasks[1].method, train.METHODS["dopsd"]
    losses = [sum(loss.item() for loss in losses(**given)) for losses in methods]
    assert losses[0] == losses[1] > 0 and len(given["learned"]) == 1
    out = run(method, *flags, "--steps", 2)
    assert len(metrics(out)) == 2 and (out / "teacher.safetensors").is_file() == (method != "sft")


def test_the_logged_loss_is_what_is_minimised(run, captions):
    out = run("logged", "--keep", captions, "--keep-weight", 3, "--steps", 2)
    for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        assert line["loss"] == pytest.approx((line["losses"]["photos"] + 3 * line["losses"]["keep"]) / 4)


def test_sources_have_different_names():
    cfg = parse(train.Options, ["--data", "a/keep", "b", "--keep", "c"], "")
    assert [(s.name, s.path, s.teacher, s.is_kept) for s in sources_of(cfg)] == [
        ("keep-1", "a/keep", "image", False), ("b", "b", "image", False), ("keep-3", "c", "untuned", True)]
    assert sources_of(parse(train.Options, ["--data", "a"], "")) == [Source("a", "a", "image")]


def test_our_captions_are_usable():
    rows = read_source(Source("keep", str(ROOT / "captions" / "general.jsonl"), "untuned", is_kept=True))
    texts = [row.captions[0] for row in rows]
    assert 64 <= len(texts) <= 128 and len(set(texts)) == len(texts)
    assert not any("[V]" in text for text in texts) and any(re.search("[\u4e00-\u9fff]", text) for text in texts)


@pytest.mark.parametrize("flags, words", [
    (("--keep", "ROOT/nowhere.jsonl"), ("--keep ROOT/nowhere.jsonl", "no such folder")),
    (("--keep", "ROOT/empty"), ("--keep ROOT/empty", "no images here")),
    (("--keep", "ROOT/empty.jsonl"), ("--keep ROOT/empty.jsonl", "no rows")),
    (("--keep", "ROOT/pictures"), ("--keep ROOT/pictures/0.png", "without a caption")),
    (("--keep", "ROOT/some.jsonl", "--method", "pso"), ("--keep ROOT/some.jsonl: not with --method pso",
                                                        "leave it out, or take --method dopsd, off-policy")),
    (("--method", "dreambooth"), ("--keep none: --method dreambooth needs captions",)),
    (("--method", "sft", "--grad-states", "1"), ("--grad-states 1: only for --method dopsd, off-policy and",)),
    (("--keep-weight", "-1"), ("--keep-weight -1.0", "0 or more")),
    (("--keep-weight", "nan"), ("--keep-weight nan", "0 or more")),
    (("--keep-batches", "0"), ("--keep-batches 0", "1 or more")),
])
def test_mistakes_are_one_line(run, tmp_path, flags, words):
    (tmp_path / "empty").mkdir(), (tmp_path / "pictures").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "0.png")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "some.jsonl").write_text('{"text": "a moon"}\n')
    with pytest.raises(InputError) as caught:
        run("bad", *(flag.replace("ROOT", str(tmp_path)) for flag in flags))
    message = str(caught.value)
    assert "\n" not in message and all(word.replace("ROOT", str(tmp_path)) in message for word in words), message
    assert not (tmp_path / "bad").exists()


def test_captions_with_the_concept_are_warned_of(run, tmp_path, capsys):
    (tmp_path / "some.jsonl").write_text('{"text": "a [V] on mint"}\n{"text": ["a moon", "in [V] style"]}\n')
    run("warned", "--keep", tmp_path / "some.jsonl", "--steps", 1)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(errors) == 1 and "2 captions say [V]" in errors[0] and "remove them" in errors[0]
