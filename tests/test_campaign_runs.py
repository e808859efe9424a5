"""The campaign against folders of runs, caches, sample.py's options and the scores of tiny/. A row is an attack."""
import json
import shutil
import sys
from pathlib import Path

import pytest
import test_campaign_data
import test_campaign_models
import torch
from campaign import (EDITS, EVALUATE, LONG, RAW, SAMPLE, SCORE, TRAIN, Place, Program, cut, edit_json, edit_tensors,
                      either, filled, folder_instead, refused, said, stopped, train_words, works)
from PIL import Image
from safetensors.torch import load_file, save_file

import train

STATE, METRICS, CONFIG = "state.safetensors", "metrics.jsonl", "config.json"
LAYER = "layers.0.attention.to_q"
MOMENTS = f"adam.{LAYER}.A.exp_avg"     # and exp_avg_sq, step
SCENES = "--data REPO/examples/star --concept-prompts 1 --ordinary-prompts 1"
EDITING = "--data REPO/examples/paint --prompts 1"
KLEIN = "--model REPO/tiny/flux2 --steps 1"


@pytest.fixture(scope="module")
def finished(checkpoint, photos, tmp_path_factory) -> Place:
    """A run of two steps."""
    place = Place(tmp_path_factory.mktemp("finished"))
    (place.root / "data").symlink_to(photos), (place.root / "model").symlink_to(checkpoint)
    assert train.main(train_words(place, "--steps", 2, "--batch-size", 2, "--rollout-steps", 2)) == 0
    return place


@pytest.fixture
def again(campaign, finished):
    """The campaign, in a place that holds this run, and its cache once more."""
    for name, copy in (("run", "run"), ("run/cache", "cache")):
        shutil.copytree(finished.root / name, campaign.place.root / copy)
    return campaign


# ---------------------------------------------------------------------------------------------------- damages
def state(run: Path, keep=lambda name: True, change=None, **metadata: str) -> None:
    """Keep some tensors of the state, change(tensor by tensor) others; metadata: step, "" removes it."""
    def damage(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if not keep(name)]:
            del weights[name]
        weights.update(change(weights) if change else {})
    edit_tensors(run / STATE, damage, **metadata)


def options(run: Path, **changes: object) -> None:
    content = json.loads((run / CONFIG).read_text())
    content["options"] |= changes
    (run / CONFIG).write_text(json.dumps(content))


def insert(run: Path, line: str | bytes, where: int = 1) -> None:
    """One more line in metrics.jsonl."""
    lines = (run / METRICS).read_bytes().splitlines()
    lines.insert(where, line if isinstance(line, bytes) else line.encode())
    (run / METRICS).write_bytes(b"\n".join(lines) + b"\n")


def only(run: Path, name: str) -> None:
    for path in [path for path in run.iterdir() if path.name != name]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def cached(cache: Path, part: str = "latents", change=None, panel: bool = False) -> None:
    """change(tensor) of the tensors with `part` in their names, in the files of pictures or of the panel."""
    for path in cache.glob("*.safetensors"):
        if path.name.startswith("panel") == panel:
            save_file({name: change(tensor).contiguous() if part in name else tensor
                       for name, tensor in load_file(path).items()}, path)


def each(cache: Path, damage, pattern: str = "[0-9a-f]*.safetensors") -> None:
    for path in cache.glob(pattern):
        damage(path)


def link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def star(place: Place, caption: str | None = None, picture: Image.Image | None = None) -> None:
    """The example, with another caption or picture, as ROOT/star."""
    shutil.copytree(Path(__file__).parents[1] / "examples" / "star", place.star)
    for i in range(1, 5):
        if caption is not None:
            (place.star / f"{i}.txt").write_text(caption)
        if picture is not None:
            picture.save(place.star / f"{i}.png")


def renamed(place: Place, name: str) -> None:
    """The adapter and picture 0 under another name beside data/."""
    shutil.move(place.root / "adapter.safetensors", place.root / f"{name}.safetensors")
    shutil.copy(place.data / "0.png", place.root / f"{name}.png")


# ---------------------------------------------------------------------------------------------------- tables
RUNS = {  # attack: damage of the run's folder, the end of --resume --steps 3
    "nothing": (lambda r: None, works()),
    "state, zero bytes": (lambda r: write(r / STATE, ""), refused(STATE)),
    "state, cut": (lambda r: cut(r / STATE), refused(STATE)), "state, a text": (lambda r: write(r / STATE, "oops" * 9),
                                                                              refused(STATE)),
    "state, a folder": (lambda r: folder_instead(r / STATE), refused("--resume", STATE)),
    "state, a link to nowhere": (lambda r: link_to_nowhere(r / STATE), refused("--resume", STATE)),
    "state, no tensors": (lambda r: state(r, keep=lambda name: False), refused(STATE)),
    "state, no moments": (lambda r: state(r, keep=lambda name: "adam" not in name), refused("run")),
    "state, half of the moments": (lambda r: state(r, keep=lambda name: "exp_avg_sq" not in name), refused("run")),
    "state, one moment missing": (lambda r: state(r, keep=lambda name: name != MOMENTS), refused("run")),
    "state, no counts": (lambda r: state(r, keep=lambda name: not name.endswith(".step")), refused("run")),
    "state, moments of another shape": (lambda r: state(r, change=lambda w: {MOMENTS: torch.zeros(5, 5)}),
                                        refused(MOMENTS)),
    "state, moments not finite": (lambda r: state(r, change=lambda w: {MOMENTS: w[MOMENTS] * float("nan")}),
                                  refused("finite")),
    "state, moments below zero": (lambda r: state(r, change=lambda w: {
        f"{MOMENTS}_sq": w[f"{MOMENTS}_sq"] - 1}), refused("run")),
    "state, moments of whole numbers": (lambda r: state(r, change=lambda w: {MOMENTS: w[MOMENTS].int()}),
                                        refused("run")),
    "state, no student": (lambda r: state(r, keep=lambda name: not name.startswith("student")), refused(STATE)),
    "state, no teacher": (lambda r: state(r, keep=lambda name: not name.startswith("teacher")), refused(STATE)),
    "state, another rank": (lambda r: state(r, change=lambda w: {f"student.{LAYER}.A": torch.ones(9, 32)}),
                            refused(STATE, "shape")),
    "state, not finite": (lambda r: state(r, change=lambda w: {
        f"student.{LAYER}.A": w[f"student.{LAYER}.A"] * float("nan")}), stopped("run")),
    "state, no step": (lambda r: state(r, step=""), refused(STATE, "step")),
    "state, a word for a step": (lambda r: state(r, step="two"), refused(STATE, "step")),
    "state, half a step": (lambda r: state(r, step="1.5"), refused(STATE, "step")),
    "state, a step below zero": (lambda r: state(r, step="-2"), refused(STATE, "step")),
    "state, a step of 5000 digits": (lambda r: state(r, step="1" * 5000), refused(STATE, "step")),
    "state, a step beyond": (lambda r: state(r, step="9"), refused("--steps 3", "9")),
    "metrics, missing": (lambda r: (r / METRICS).unlink(), works()),
    "metrics, zero bytes": (lambda r: write(r / METRICS, ""), works()),
    "metrics, garbage inside": (lambda r: insert(r, "oops}"), either(METRICS)),
    "metrics, a line without a step": (lambda r: insert(r, '{"a": 1}'), either(METRICS)),
    "metrics, a word for a step": (lambda r: insert(r, '{"step": "two"}'), either(METRICS)),
    "metrics, another kind of line": (lambda r: insert(r, '[{"step": 1}, {"a": 1}'), either(METRICS)),
    "metrics, nested a million deep": (lambda r: insert(r, '{"a":' * 10 ** 5 + "}" * 10 ** 5), either(METRICS)),
    "metrics, bytes at the end": (lambda r: insert(r, b"\xff\xfe\0\0}", 9), either(METRICS)),
    "metrics, a folder": (lambda r: folder_instead(r / METRICS), stopped(METRICS)),
    "config, zero bytes": (lambda r: write(r / CONFIG, ""), refused(CONFIG)),
    "config, bytes": (lambda r: write(r / CONFIG, b"\xff\xfe\0"), refused(CONFIG)),
    "config, a list": (lambda r: write(r / CONFIG, "[]"), refused(CONFIG)),
    "config, a folder": (lambda r: folder_instead(r / CONFIG), refused(CONFIG)),
    "config, nested deep": (lambda r: write(r / CONFIG, '{"a":' * 10 ** 5), refused(CONFIG)),
    "config, 5000 digits": (lambda r: write(r / CONFIG, '{"options": ' + "1" * 5000 + "}"), refused(CONFIG)),
    "config, no options": (lambda r: edit_json(r / CONFIG, options=None), refused(CONFIG, "options")),
    "config, a list of options": (lambda r: edit_json(r / CONFIG, options=[]), refused(CONFIG, "options")),
    "config, null for options": (lambda r: write(r / CONFIG, '{"options": null}'), refused(CONFIG, "options")),
    "config, other data": (lambda r: edit_json(r / CONFIG, data={"images": "0"}), refused("--resume", "data")),
    "config, a list for data": (lambda r: edit_json(r / CONFIG, data=[1]), refused("--resume", "data")),
    "config, a number of teachers": (lambda r: options(r, teacher_lora=3), refused("teacher")),
    "config, null for teachers": (lambda r: options(r, teacher_lora=None), either("teacher")),
    "config, a list for the teacher": (lambda r: options(r, teacher_weights=[]), refused("--teacher-weights was []")),
    "config, null for the seed": (lambda r: options(r, seed=None), refused("--seed was None")),
    "config, a list for the model": (lambda r: options(r, model=[{}]), refused("--model")),
    "config, a model of 300 characters": (lambda r: options(r, model=LONG), refused("--model was")),
    "config, a model with NUL": (lambda r: options(r, model="\0"), refused("--model was")),
    "config, a model of two lines": (lambda r: options(r, model="a\nb"), refused("--model was")),
    "lock, a folder": (lambda r: folder_instead(r / ".lock"), refused("run")),
    "student alone": (lambda r: only(r, "student.safetensors"), refused("--resume", STATE)),
    "student, a folder": (lambda r: folder_instead(r / "student.safetensors"), stopped("student.safetensors")),
    "temporary files left": (lambda r: write(r / f"{STATE}.tmp", "half"), works()),
}
RESUMED = {  # flags of a run of two steps: the end
    "--steps 3": refused("--out", "--resume"), "--resume --steps 1": refused("--steps 1", "2"),
    "--resume --steps 3 --batch-size 2 --lr 0.3": refused("--lr was", "0.3"),
    "--resume --steps 3 --batch-size 2 --quantize int8": refused("--quantize was none", "int8"),
    "--resume --steps 3 --batch-size 2 --noise 0.5": refused("--noise was 0.0", "0.5"),
    "--resume --steps 3 --batch-size 2 --teacher-lora untuned": refused("--teacher-lora was"),
    "--resume --steps 3 --batch-size 2 --vlm ROOT/model/vlm": refused("--vlm was"),
    "--resume --steps 3 --batch-size 2 --keep ROOT/data": refused("--resume"),
    "--resume --steps 3 --batch-size 2 --data ROOT/data ROOT/data": refused("--resume", "images"),
    "--resume --out ROOT/run/cache": refused("--resume", STATE),
}
CONFIGS = {  # flags: the end of --out ROOT/again with a file of a run of two steps
    "--config ROOT/run/config.json": works("again/student.safetensors"),
    "--config ROOT/run/config.json --method sft --grad-states 1": works("again/student.safetensors"),
    "--config ROOT/run/config.json --out ROOT/run": refused("--out ROOT/run", "another run", "--resume"),
    "--config ROOT/run/config.json --out ROOT/run --resume --steps 3": works("run/student.safetensors"),
    "--config ROOT/run/config.json --data ROOT/nowhere": refused("ROOT/nowhere: no such folder"),
    "--config ROOT/run/config.json --lr nan": refused("--lr nan"),
    "--config ROOT/run/config.json --rank 0": refused("--rank 0"),
    "--config ROOT/run/config.json --config ROOT/run/config.json": refused("--config: given twice"),
    "--config ROOT/nowhere.json": refused("ROOT/nowhere.json", "No such file"), "--config ": refused("--config ''"),
    "--config ROOT/run": refused("'ROOT/run': error:", "Is a directory"), "--config ROOT/LONG": refused("xxx"),
    "--config ROOT/a\nb": refused("ROOT/a\\nb", "No such file"), "--config ROOT/RAW": refused("config.json of a run"),
    f"--config ROOT/run/{METRICS}": refused(METRICS, "JSON"),
    f"--config ROOT/run/{STATE}": refused(STATE, "not the config.json of a run"),
    "--config ROOT/model/model_index.json": refused("model_index.json", "'options'"),
    "--config REPO/tiny/model/transformer/config.json": refused("transformer/config.json", "'options'"),
}
CACHES = {  # attack: damage of the cache, the end
    "nothing": (lambda c: None, works()), "files cut": (lambda c: each(c, cut), works()),
    "files that are texts": (lambda c: each(c, lambda path: write(path, "hello, a text")), works()),
    "links to nowhere": (lambda c: each(c, link_to_nowhere), works()),
    "folders": (lambda c: each(c, folder_instead), stopped("cache")),
    "a panel cut": (lambda c: each(c, cut, "panel*"), works()),
    "a panel without a text": (lambda c: each(c, lambda path: edit_tensors(path, dict.popitem), "panel*"),
                               either()),
    "a panel that is not finite": (lambda c: cached(c, "", lambda t: t * float("nan"), panel=True), either()),
    "a panel of another width": (lambda c: cached(c, "", lambda t: t[:, :9], panel=True), either()),
    "latents missing": (lambda c: each(c, lambda path: edit_tensors(path, lambda w: w.pop("latents"))), works()),
    "latents not finite": (lambda c: cached(c, "latents", lambda t: t * float("nan")), either()),
    "latents of another size": (lambda c: cached(c, "latents", lambda t: t[:, :6, :6]), either()),
    "latents of fewer channels": (lambda c: cached(c, "latents", lambda t: t[:4]), either()),
    "latents flat": (lambda c: cached(c, "latents", lambda t: t.flatten()), either()),
    "latents of whole numbers": (lambda c: cached(c, "latents", lambda t: t.int()), either()),
    "texts not finite": (lambda c: cached(c, "student", lambda t: t * float("nan")), either()),
    "texts of another width": (lambda c: cached(c, "teacher", lambda t: t[:, :9]), either()),
    "texts without words": (lambda c: cached(c, "student", lambda t: t[:0]), either()),
}
SAMPLES = {  # flags: the end; a string is split at its spaces
    "--prompt ": refused("empty"), "--prompt RAW": refused("prompt"), "--prompt 星🌸": works(),
    ("--prompt", "a\nstar"): works(), "--prompt <|image_pad|>": either("<|image_pad|>"),
    "--prompt <|image_pad|> --reference ROOT/data/0.png": refused("<|image_pad|>"),
    ("--prompt", "star " * 600): said("prompt", "tokens"),
    "--prompts ROOT/data": refused("ROOT/data", "UTF-8"), "--prompts ROOT/LONG": refused("xxx"),
    "--prompts ROOT/RAW": refused("UTF-8"), "--prompts ": refused("UTF-8"),
    "--out ROOT/data": refused("--out ROOT/data", ".png"), "--out ": refused("--out", ".png"),
    "--out ROOT/.png": refused("--out", ".png"), "--out ROOT/LONG.png": refused("--out"),
    ("--out", f"ROOT/{LONG[:250]}.png"): either("xxx", result=f"{LONG[:250]}.png"),
    "--out ROOT/RAW.png": either("--out", result="RAW.png"), "--out ROOT/星🌸.PNG": works("星🌸.PNG"),
    "--out ROOT/a\nb.png": works("a\nb.png"), "--out ROOT/a/b/c.png": works("a/b/c.png"),
    "--out ROOT/adapter.safetensors/a\nb.png": refused("--out"),
    "--lora ROOT/LONG": refused("--lora"), "--lora ROOT/RAW": refused("--lora"), "--lora ": refused("--lora"),
    "--lora ROOT/a\nb": refused("--lora"), "--lora ~nobody-here/a": refused("--lora"),
    "--lora ROOT/adapter.safetensors": works(), "--lora ROOT/data/0.txt": refused("ROOT/data/0.txt"),
    "--reference ROOT/data": refused("ROOT/data"), "--reference ROOT/LONG": refused("xxx"),
    "--reference ": refused("reference"), "--reference ROOT/RAW.png": refused("--reference"),
    "--source ROOT/data/0.png": refused("--source ROOT/data/0.png", "FLUX.2"),
    "--reference ROOT/data/0.png --teacher-context reference": refused("--teacher-context", "FLUX.2"),
    "--height 8 --width 8": works(), "--height 8 --width 512": works(), "--height 520": refused("height"),
    "--height HUGE": refused("--height"), "--width 1e3": refused("--width"), "--width -HUGE": refused("--width"),
    "--steps nan": refused("--steps"), "--steps HUGE": refused("--steps"), "--steps -1": refused("--steps -1"),
    "--seed -1": refused("--seed -1"), "--seed HUGE": refused("--seed"), "--dtype bfloat16": works(),
    "--model ROOT/LONG": refused("xxx"), "--model ROOT/a\nb": refused("no such folder"),
    "--model ~nobody-here/model": refused("~nobody-here"),
    "--vlm ROOT/LONG --reference ROOT/data/0.png": refused("xxx"),
    f"{KLEIN} --source ROOT/data/0.txt": refused("ROOT/data/0.txt", "not an image"),
    f"{KLEIN} --source ROOT/data": refused("ROOT/data"), f"{KLEIN} --source ": refused("no such file"),
    f"{KLEIN} --source ROOT/data/0.png --source ROOT/data/1.png": works(),
    f"{KLEIN} --lora ROOT/adapter.safetensors": refused("adapter", "LoRA"),
}
PROMPTS = {  # attack: content of the file after --prompts, the end
    "only a byte order mark": ("\ufeff", refused("nothing to draw")), "NUL": ("a\0star", works()),
    "a byte order mark": ("\ufeffa red star\r\n\r\n", works()), "UTF-16": ("星".encode("utf-16"), refused("UTF-8")),
    "three prompts": ("a\nb\nc", works("picture_003.png")), "Latin-1": ("Gr\xfc\xdfe".encode("latin-1"),
                                                                       refused("prompts.txt", "UTF-8")),
}
NAMES = {  # attack: name of the adapter and of a picture, flags, the end
    "raw bytes, adapter": (RAW, "--lora ROOT/RAW.safetensors", either("a")),
    "raw bytes, reference": (RAW, "--reference ROOT/RAW.png", either("a")),
    "two lines": ("a\nb", "--lora ROOT/a\nb.safetensors --reference ROOT/a\nb.png", works()),
    "another alphabet": ("星🌸", "--lora ROOT/星🌸.safetensors --reference ROOT/星🌸.png --compare", works()),
    "a long one": (LONG[:240], f"--lora ROOT/{LONG[:240]}.safetensors --reference ROOT/{LONG[:240]}.png", works()),
}
TINY = {  # attack: program, damage, flags, the end
    "score": (SCORE, None, SCENES, works()),
    "score, no prompts": (SCORE, None, f"{SCENES} --concept-prompts 0", refused("--concept-prompts 0")),
    "score, -1 prompts": (SCORE, None, f"{SCENES} --concept-prompts -1", refused("--concept-prompts -1")),
    "score, no ordinary prompts": (SCORE, None, f"{SCENES} --ordinary-prompts 0", refused("--ordinary-prompts 0")),
    "score, nan prompts": (SCORE, None, f"{SCENES} --concept-prompts nan", refused("--concept-prompts")),
    "score, a large seed": (SCORE, None, f"{SCENES} --seed HUGE", refused("--seed")),
    "score, a seed below zero": (SCORE, None, f"{SCENES} --seed -100", refused("--seed -100")),
    "score, photographs": (SCORE, lambda p: star(p, picture=Image.new("RGB", (1200, 900), "red")),
                           f"{SCENES} --data ROOT/star", refused("world")),
    "score, captions without [V]": (SCORE, lambda p: star(p, caption="a star"), f"{SCENES} --data ROOT/star",
                                    refused("1.png", "[V]")),
    "score, a folder of 300 characters": (SCORE, None, "--data ROOT/LONG", refused("xxx")),
    "score, the base's name": (SCORE, None, f"{SCENES} --lora base=ROOT/adapter.safetensors", refused("--lora base")),
    "score, one name twice": (SCORE, None, f"{SCENES} --lora a=ROOT/a --lora a=ROOT/b", refused("--lora a=ROOT/b")),
    "score, an adapter without a name": (SCORE, None, f"{SCENES} --lora =ROOT/adapter.safetensors", refused("--lora")),
    "score, a name without a file": (SCORE, None, f"{SCENES} --lora a=", refused("no such file")),
    "score, another model's adapter": (SCORE, None, f"{SCENES} --lora a=ROOT/adapter.safetensors", refused("adapter")),
    "score, a file for --out": (SCORE, None, f"{SCENES} --out ROOT/adapter.safetensors", refused("adapter")),
    "score, a model that is missing": (SCORE, None, f"{SCENES} --model ROOT/nowhere", refused("ROOT/nowhere")),
    "score, a model without its VLM": (SCORE, lambda p: shutil.rmtree(p.own_model() / "vlm"),
                                       f"{SCENES} --model ROOT/model", refused("ROOT/model/vlm")),
    "score, a VLM with a foreign tensor": (SCORE, lambda p: edit_tensors(
        p.own_model() / "vlm" / "model.safetensors", lambda w: w.update(foreign=torch.zeros(1))),
        f"{SCENES} --model ROOT/model", refused("foreign")),
    "edits, no prompts": (EDITS, None, f"{EDITING} --prompts 0", refused("--prompts 0")),
    "edits, -1 prompts": (EDITS, None, f"{EDITING} --prompts -1", refused("--prompts -1")),
    "edits, a large seed": (EDITS, None, f"{EDITING} --seed HUGE", refused("--seed")),
    "edits, the base's name": (EDITS, None, f"{EDITING} --lora base=ROOT/adapter.safetensors", refused("--lora base")),
    "edits, a file for --out": (EDITS, None, f"{EDITING} --out ROOT/adapter.safetensors", refused("adapter")),
    "evaluate, no prompts": (EVALUATE, None, "--prompts 0", refused("--prompts 0")),
    "evaluate, -1 prompts": (EVALUATE, None, "--prompts -1", refused("--prompts -1")),
    "evaluate, a large seed": (EVALUATE, None, "--prompts 1 --seed HUGE", refused("--seed")),
    "evaluate, a model that is missing": (EVALUATE, None, "--model ROOT/nowhere", refused("ROOT/nowhere")),
    "evaluate, a model of 300 characters": (EVALUATE, None, "--model ROOT/LONG", refused("xxx")),
    "evaluate, a base that is missing": (EVALUATE, None, "--base ROOT/nowhere", refused("ROOT/nowhere")),
    "evaluate, a file for --out": (EVALUATE, None, "--prompts 1 --out ROOT/adapter.safetensors", refused("adapter")),
}


# ---------------------------------------------------------------------------------------------------- the attacks
@pytest.mark.parametrize("attack", RUNS)
def test_runs(again, attack):
    damage, end = RUNS[attack]
    again(TRAIN, lambda place: damage(place.run), "--resume --steps 3 --batch-size 2", end)


@pytest.mark.parametrize("flags", RESUMED)
def test_resumed(again, flags):
    again(TRAIN, None, flags, RESUMED[flags])


@pytest.mark.parametrize("flags", CONFIGS)
def test_configs(again, flags):
    """A file of a run says all."""
    out = "" if "--out" in flags else " --out ROOT/again"
    again(Program(TRAIN.main, filled, TRAIN.result), None, f"{flags}{out}", CONFIGS[flags])


@pytest.mark.parametrize("attack", CACHES)
def test_caches(again, attack):
    damage, end = CACHES[attack]
    panel = "--sample-every 1" if "panel" in attack else "--sample-every 0"
    shutil.rmtree(again.place.run)
    again.place.snapshot = lambda: {path: content for path, content in Place.snapshot(again.place).items()
                                    if again.place.cache not in path.parents}        # which a run may mend
    again(TRAIN, lambda place: damage(place.cache), f"--cache ROOT/cache --batch-size 2 {panel}", end)


@pytest.mark.parametrize("flags", SAMPLES, ids=lambda flags: flags if isinstance(flags, str) else flags[1][:20])
def test_samples(campaign, flags):
    campaign(SAMPLE, None, flags, SAMPLES[flags])


@pytest.mark.parametrize("attack", PROMPTS)
def test_prompts(campaign, attack):
    content, end = PROMPTS[attack]
    campaign(SAMPLE, lambda place: write(place.root / "prompts.txt", content), "--prompts ROOT/prompts.txt", end)


@pytest.mark.parametrize("attack", NAMES)
def test_names(campaign, attack):
    name, flags, end = NAMES[attack]
    campaign(SAMPLE, lambda place: renamed(place, name), flags, end)


@pytest.mark.parametrize("attack", TINY)
def test_tiny(campaign, attack):
    campaign(*TINY[attack])


def test_the_campaign_is_large():
    tables = [table for module in (test_campaign_data, test_campaign_models, sys.modules[__name__])
              for name, table in vars(module).items() if name.isupper() and isinstance(table, dict)]
    assert len(tables) == 18 and sum(map(len, tables)) > 450
