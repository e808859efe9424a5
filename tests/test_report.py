"""plumbing/report.py: the page of a run, by its parts, in a browser if one is here, and whatever is damaged."""
import base64
import dataclasses
import html
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import on_each_loss
from PIL import Image

import sample
import train
from plumbing import files, recipes, report
from plumbing.files import InputError
from plumbing.pictures import save_png
from plumbing.train_options import Options

VOID = ("meta", "input", "img")
ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(1)> \" ' & {{sample}} {{#one}}"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """A page whose tags are balanced: its pictures by what they show, its tables, and the texts of each kind of tag."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open, self.tags, self.images, self.tables = [], [], {}, []
        self.texts: dict[str, list[str]] = {}
        self.content = path.read_text(encoding="utf-8")
        self.feed(self.content)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.images[dict(attrs)["alt"]] = decoded(dict(attrs)["src"])
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> after {self.open}"

    def handle_data(self, data):
        for tag in self.open[-1:]:
            self.texts[tag][-1] += data
            if tag in ("td", "th"):
                self.tables[-1][-1][-1] += data

    def lines(self) -> dict[str, list[dict]]:
        """Run -> lines of metrics.jsonl."""
        return json.loads(self.texts["script"][0])

    def notes(self) -> str:
        found = re.search('<div class="notes">(.*?)</div>', self.content)
        return html.unescape(found[1]) if found else ""


def decoded(source: str) -> Image.Image:
    kind, _, data = source.removeprefix("data:").partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
    image.load()
    assert kind == f"image/{image.format.lower()}"
    return image


def folder(folder: Path, panels: int = 3, done: int = 40, size=(60, 30), recipe=recipes.SMALL, **changes) -> Path:
    """What a run leaves behind after so many steps, with a panel every 20."""
    options = dataclasses.asdict(recipes.fill(Options(["photos"]), recipe)) | changes
    files.write_json(folder / "config.json", {"recipe": recipe.name, "options": options, "processes": 1,
                                              "commit": "abc", "versions": {"torch": "2.9"}})
    for step in range(1, done + 1):
        files.append_json_line(folder / "metrics.jsonl", {
            "step": step, "loss": 1 / step, "losses": {"photos": 2 / step, "keep": 0.5 / step}, "gradient_norm": 0.1,
            "seconds": 0.25, "peak_memory_gb": 2.0})
    rng = np.random.default_rng(0)
    for i in range(panels):
        picture(folder / "samples" / f"step_{20 * i:06d}.png", rng, size)
        picture(folder / "samples" / f"step_{20 * i:06d}_1.png", rng, (9, 9))     # of one row: not a panel
    return folder


def picture(path: Path, rng: np.random.Generator, size: tuple[int, int], prompt="a [V] on mint\na blue circle") -> None:
    pixels = rng.integers(256, size=(size[1] // 3, size[0] // 3, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), path, {"prompt": prompt})


def scored(out: Path, **changes) -> Path:
    rows = [{"steps": 4, "group": "new prompts", "measure": name, "better": better, "base": 0.5, "student": 0.5 + mean,
             "teacher": None, "difference": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "count": 8}}
            for name, better, mean in (("CLIP-S", "higher", 0.2), ("DINO-D", "lower", 0.3), ("VLM-J", "higher", 0.05),
                                       ("blur", "higher", -0.2), ("pixels", "same", 0.15), ("LPIPS", "lower", -0.3))]
    rows.append(rows[0] | {"measure": "exact", "difference": None, "base": None})
    picture(out / "evaluation" / "new.png", np.random.default_rng(1), (30, 30))
    files.write_json(out / "scores.json", {
        "about": {"model": "embedded", "seeds": 2, "networks": {"CLIP": "a/b"}}, "rows": rows,
        "missing": ["private scores"], "pictures": ["evaluation/new.png"]} | changes)
    return out


# ---------------------------------------------------------------------------------------------------- one run
@pytest.mark.quick
def test_a_page_has_all_and_loads_nothing(tmp_path):
    out = folder(tmp_path / "dogs")
    page = Page(report.write(out))
    assert page.texts["h1"] == ["dogs"] and page.texts["title"] == ["dogs"] and not page.notes()
    assert list(page.images) == ["step 0", "step 20", "step 40"]
    for step in (0, 20, 40):
        panel = Image.open(out / "samples" / f"step_{step:06d}.png")
        assert page.images[f"step {step}"].tobytes() == panel.tobytes()
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert page.lines() == {"dogs": metrics}
    facts = {row[0]: row[1] for row in page.tables[0]}
    assert facts | {"made with": ""} == {
        "run": "dogs", "data": "photos", "model": "embedded", "method": "dopsd, lora", "time": "0.25 s per step",
        "steps": "40 of 100, not finished", "memory": "2.0 GB at most", "made with": ""}
    assert facts["made with"] == "commit abc, torch 2.9"
    assert f"python evaluate.py --run {out}" in page.texts["pre"]
    loaded = [value for _, given in page.tags for name, value in given.items() if name in ("src", "href", "data")]
    assert len(loaded) == 3 and all(value.startswith("data:image/") for value in loaded)
    assert "http" not in re.sub("data:image[^\"]*|http-equiv", "", page.content) and "url(" not in page.content
    assert "default-src 'none'" in next(given["content"] for _, given in page.tags if "http-equiv" in given)


@pytest.mark.quick
def test_options_that_are_not_the_recipes_come_first(tmp_path):
    kept = {"keep": "none", "grad_states": None}
    for i, (recipe, changes, differ) in enumerate([
            (recipes.SMALL, {}, []), (recipes.SMALL, {"out": "elsewhere", "resume": True, "dtype": "bfloat16"}, []),
            (recipes.SMALL, {"lr": 0.5, "seed": 3}, ["lr", "seed"]), (recipes.SMALL, kept, ["grad_states", "keep"]),
            (recipes.SMALL, {"keep": recipes.SMALL.keep_edits}, []), (recipes.TURBO, {}, []),
            (recipes.SMALL, {"method": "sft", **kept}, ["method"]), (recipes.TURBO, {"quantize": "int8"}, ["quantize"]),
            (recipes.SMALL, {"tune": "full", "lr": recipes.SMALL.full_lr, "steps": 150}, ["tune"])]):
        page = Page(report.write(folder(tmp_path / str(i), recipe=recipe, **changes)))
        *some, every = page.tables[1:]
        assert [row[0] for part in some for row in part[1:]] == differ, changes
        assert [row[0] for row in every[1:]] == [field.name for field in dataclasses.fields(Options)]
    page = Page(report.write(folder(tmp_path / "rate", lr=0.5)))
    assert page.tables[1] == [["option", "this run", "if left out"], ["lr", "0.5", "0.002"]]


@pytest.mark.quick
def test_scores_in_words(tmp_path):
    page = Page(report.write(scored(folder(tmp_path / "dogs"))))
    rows = {row[2]: row for row in page.tables[1][1:]}
    assert [row[-1] for row in rows.values()] == ["better", "worse", "no clear difference", "worse", "changed",
                                                  "better", ""]
    assert rows["CLIP-S"] == ["4", "new prompts", "CLIP-S", "dogs", "0.5", "0.7", "", "+0.2 [+0.1, +0.3]", "better"]
    assert rows["exact"][4:] == ["", "0.7", "", "", ""]
    assert [given.get("class") for tag, given in page.tags if tag == "tr"].count("marked") == 3
    assert page.texts["figcaption"][1] == "dogs: CLIP a/b, model embedded, seeds 2. Not measured: private scores."
    assert page.images["evaluation/new.png"].size == (30, 30) and not page.notes()
    assert "evaluate.py" not in "".join(page.texts["pre"])


def test_many_and_large_panels(tmp_path, monkeypatch):
    """At most MOST, the first, the last, evenly spaced; large ones are JPEGs of the same size, not encoded twice."""
    out = folder(tmp_path / "dogs", panels=53, size=(240, 90))
    monkeypatch.setattr(report, "LARGE", 1000)
    page = Page(report.write(out))
    steps = [int(name.split()[1]) for name in page.images]
    assert len(steps) <= report.MOST and steps == [*range(0, 1040, 80), 1040]
    assert "dogs: 14 of 53 panels" in page.texts["figcaption"]
    for step in steps:
        image, panel = page.images[f"step {step}"], Image.open(out / "samples" / f"step_{step:06d}.png")
        assert image.format == "JPEG" and image.size == panel.size
        assert np.abs(np.asarray(image).astype(int) - np.asarray(panel)).mean() < 12
    opened, open_image = [], report.open_image
    monkeypatch.setattr(report, "open_image", lambda path: opened.append(path.name) or open_image(path))
    picture(out / "samples" / "step_001040.png", np.random.default_rng(9), (240, 90))
    fresh = Page(report.write(out)).images["step 1040"]
    assert set(opened) == {"step_001040.png"} and fresh.tobytes() != page.images["step 1040"].tobytes()
    for panels, shown in ((1, 1), (24, 24), (25, 13), (47, 24), (48, 13)):
        few = folder(tmp_path / str(panels), panels=panels)
        assert len(Page(report.write(few)).images) == shown


@pytest.mark.quick
def test_text_of_files_stays_text(tmp_path):
    out = scored(folder(tmp_path / "dogs", caption=ATTACK, data=[ATTACK], model=ATTACK, name=ATTACK, quantize="int8"))
    names = json.loads((out / "scores.json").read_text())
    files.write_json(out / "scores.json", names | {"missing": [ATTACK], "about": {ATTACK: ATTACK}})
    files.append_json_line(out / "metrics.jsonl", {"step": 41, "loss": 1.0, "losses": {ATTACK: 1.0}})
    picture(out / "samples" / "step_000060.png", np.random.default_rng(1), (30, 30), f"[V] {ATTACK}")
    page = Page(report.write(out))
    assert [tag for tag, _ in page.tags].count("script") == 2 and "alert" not in page.texts["script"][1]
    assert len(page.images) == 5 and not [given for _, given in page.tags if "onerror" in given]
    assert page.lines()["dogs"][-1]["losses"] == {ATTACK: 1.0}
    (command,) = [text for text in page.texts["pre"] if text.startswith("python sample.py")]
    assert shlex.split(command) == ["python", "sample.py", "--prompt", f"[V] {ATTACK}", "--model", ATTACK, "--quantize",
                                    "int8", "--compare", "--lora", f"{out}/{ATTACK}.safetensors"]
    (code,) = [text for text in page.texts["pre"] if text.startswith("import torch")]
    assert json.dumps(ATTACK) in code and compile(code, "page", "exec")
    page = Page(report.compare([out, folder(tmp_path / "</title> & 'cats'")], tmp_path / "both.html"))
    assert [tag for tag, _ in page.tags].count("script") == 2 and "cats" in page.texts["h1"][0]


def write(path: str, content: bytes):
    return lambda out: (out / path).write_bytes(content)


def changed(path: str, **changes):
    return lambda out: files.write_json(out / path, json.loads((out / path).read_text()) | changes)


CONFIG, SCORES, LOG, LAST = "config.json", "scores.json", "metrics.jsonl", "samples/step_000040.png"
DEEP = b'{"step": 1, "rows": [], "options": ' + b"[" * 5000 + b"]" * 5000 + b"}"
DAMAGES = {     # what is damaged -> how, a word of the sentence that says so
    "no config": (lambda out: (out / CONFIG).unlink(), CONFIG),
    "empty config": (write(CONFIG, b""), CONFIG),
    "half a config": (write(CONFIG, b"{"), CONFIG),
    "a list as config": (write(CONFIG, b"[]"), CONFIG),
    "deep config": (write(CONFIG, DEEP), CONFIG),
    "latin config": (write(CONFIG, b'{"options": {"data": "\xe4"}}'), CONFIG),
    "a list as options": (changed(CONFIG, options=[1]), "options"),
    "numbers as options": (changed(CONFIG, options={"data": 1, "steps": [2], "method": {}, "keep": 1.5}), ""),
    "an unknown recipe": (changed(CONFIG, recipe=["x"]), ""),
    "a list as versions": (changed(CONFIG, versions=[1]), "facts"),
    "no metrics": (lambda out: (out / LOG).unlink(), ""),
    "half a line": (write(LOG, b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo'), LOG),
    "no JSON": (write(LOG, b"\xff\x00\n\n[]\n1\n"), LOG),
    "other values": (write(LOG, b'{"step": 1, "loss": "x", "losses": [], "seconds": "y"}\n'), ""),
    "not finite": (write(LOG, b'{"step": 1, "loss": NaN, "peak_memory_gb": NaN, "seconds": Infinity}\n'), ""),
    "too large": (write(LOG, b'{"step": 1, "loss": 1e999, "seconds": 1}\n'), LOG),
    "deep metrics": (write(LOG, DEEP), LOG),
    "no steps": (write(LOG, b'{"loss": 1}\n'), ""),
    "half a panel": (lambda out: write(LAST, (out / LAST).read_bytes()[:60])(out), "step_000040.png"),
    "text as panel": (write("samples/step_000060.png", b"hello"), "step_000060.png"),
    "a folder as panel": (lambda out: (out / "samples" / "step_000060.png").mkdir(), "step_000060.png"),
    "no prompts": (lambda out: Image.new("RGB", (9, 9)).save(out / LAST), "prompt"),
    "another name": (write("samples/step_x.png", b"hello"), ""),
    "no panels": (lambda out: shutil.rmtree(out / "samples"), ""),
    "half of the scores": (write(SCORES, b'{"rows": ['), SCORES),
    "scores of another kind": (write(SCORES, b'{"rows": [1], "missing": 2}'), "scores"),
    "scores without rows": (write(SCORES, b'{"about": {}}'), "scores"),
    "deep scores": (write(SCORES, DEEP), ""),
    "a row without values": (changed(SCORES, rows=[{"steps": 4}]), "scores"),
    "pictures that are gone": (changed(SCORES, pictures=["x.png"]), "x.png"),
    "numbers as pictures": (changed(SCORES, pictures=[3]), "scores"),
}


@pytest.mark.quick
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_a_sentence(tmp_path, damage):
    """There is a page, with what is not damaged; and a page of several runs."""
    out = scored(folder(tmp_path / "dogs"))
    DAMAGES[damage][0](out)
    page = Page(report.write(out))
    assert DAMAGES[damage][1] in page.notes() and ("step 0" in page.images) == (damage != "no panels")
    if (out / "config.json").is_file():
        Page(report.compare([folder(tmp_path / "cats"), out], tmp_path / "both.html"))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no /dev/zero on this system")
def test_what_never_ends_is_not_read(tmp_path):
    out = folder(tmp_path / "dogs")
    (out / LOG).unlink()
    (out / LOG).symlink_to("/dev/zero")
    assert Page(report.write(out)).lines() == {"dogs": []}


# ---------------------------------------------------------------------------------------------------- several runs
@pytest.mark.quick
def test_runs_side_by_side(tmp_path):
    one, other = scored(folder(tmp_path / "a" / "dogs")), scored(folder(tmp_path / "b" / "dogs", panels=2, lr=0.5))
    third = folder(tmp_path / "c", done=0, panels=0)
    page = Page(report.compare([one, other, third], tmp_path / "both.html"))
    assert list(page.lines()) == [str(one), str(other), str(third)] and page.lines()[str(third)] == []
    assert [caption.rsplit(": ")[-1] for caption in page.texts["figcaption"][:3]] == [
        "3 of 3 panels", "2 of 2 panels", "0 of 0 panels"]
    assert page.tables[0][4] == ["steps", "40 of 100, not finished", "40 of 100, not finished", "0 of 100, not started"]
    assert [row[2:4] for row in page.tables[1][1:5]] == [["CLIP-S", str(one)], ["CLIP-S", str(other)],
                                                       ["DINO-D", str(one)], ["DINO-D", str(other)]]
    assert page.tables[2] == [["option", str(one), str(other), str(third)], ["lr", "0.002", "0.5", "0.002"]]
    assert page.texts["pre"] == [f"python evaluate.py --run {third}"]
    with pytest.raises(InputError, match=f"^{tmp_path}: holds no run .*; give folders that train.py wrote$"):
        report.compare([one, tmp_path], tmp_path / "no.html")
    assert not (tmp_path / "no.html").exists()


# ---------------------------------------------------------------------------------------------------- in train.py
def test_a_page_from_the_first_moment_to_the_last(run, tmp_path, monkeypatch, capsys):
    seen, path = [], tmp_path / "real" / "report.html"
    on_each_loss(monkeypatch, lambda loss: seen.append(Page(path)) or loss)
    out = run("real", "--steps", 3, "--sample-every", 2, "--save-every", 9)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"report   {path}" and said[-1].endswith(f"student.safetensors, report in {path}")
    assert list(seen[0].images) == ["step 0"] and "0 of 3, not started" in str(seen[0].tables[0])
    page = Page(path)
    assert list(page.images) == ["step 0", "step 2", "step 3"] and "3 of 3, finished" in str(page.tables[0])
    assert page.lines()["real"] == [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert not page.notes() and ["lr", "0.01", "0.002"] in page.tables[1]
    run("real", "--steps", 4, "--resume")                               # no panels any more
    assert "4 of 4, finished" in str(Page(path).tables[0])


def test_a_page_without_panels_and_after_ctrl_c(run, tmp_path, monkeypatch):
    assert Page(run("quiet", "--steps", 2) / "report.html").lines()["quiet"][-1]["step"] == 2
    on_each_loss(monkeypatch, lambda loss: signal.raise_signal(signal.SIGINT) or loss)
    out = run("stopped", "--steps", 5, "--grad-states", 1, "--sample-every", 9, status=130)
    page = Page(out / "report.html")
    assert "1 of 5, not finished" in str(page.tables[0]) and list(page.images) == ["step 0"]


def test_only_the_first_process_writes_it(prepare):
    run = prepare().run
    for is_first in (False, True):
        run.team.is_first = is_first
        with run.saved_on_errors():
            assert not (run.out / "report.html").exists()
        assert (run.out / "report.html").exists() == is_first


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    out = folder(tmp_path / "dogs")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(InputError, match="report.html: could not be written .*free some space"):
        report.write(out)


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_what_it_tells_people_to_do_works(tune, run, base, tmp_path, monkeypatch):
    """The command draws with the run's weights, and the same in diffusers is the same picture."""
    flags = ["--steps", "2", "--tune", tune, "--sample-every", "2", "--lr", "3e-2"]
    out = tmp_path / "real"
    words = base if tune == "lora" else [*base[:base.index("--rank")], *base[base.index("--alpha") + 2:]]
    assert train.main([*words, "--out", str(out), *flags]) == 0
    page = Page(out / "report.html")
    (command,) = [text for text in page.texts["pre"] if text.startswith("python sample.py")]
    (code,) = [text for text in page.texts["pre"] if text.startswith("import torch")]
    words = [word for word in shlex.split(command)[2:] if word != "--compare"]
    sample.main([*words, "--height", "32", "--width", "32", "--out", str(tmp_path / "ours.png")])
    assert ("--compare" in command) == (tune == "lora") and 'pipe.to("cuda")' in code and "bfloat16" in code
    monkeypatch.chdir(tmp_path)
    exec(re.sub("pipe.to.*", "", code).replace("torch.bfloat16", "torch.float32"), {})
    ours, theirs = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("ours", "picture"))
    assert ours.shape == theirs.shape == (32, 32, 3) and np.abs(ours - theirs).max() <= 2


# ---------------------------------------------------------------------------------------------------- in a browser
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this system")
def test_in_a_browser(tmp_path):
    def seen(path: Path, address: str = "", more: str = "") -> str:
        """The page after its script ran, and after `more`."""
        copy = tmp_path / "copy.html"
        copy.write_text(path.read_text() + f"<script>{more}</script>")
        words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}",
                 "--virtual-time-budget=2000", "--window-size=1280,900", "--dump-dom", f"file://{copy}{address}"]
        dom = subprocess.run([BROWSER, *words], capture_output=True, text=True, timeout=120).stdout
        return re.sub("<script.*?</script>|src=\".*?\"", "", dom, flags=re.DOTALL)

    def shown(dom: str) -> list[str]:
        panels = dom[dom.index('class="panels'):dom.index("<h2>Scores")]
        return [re.search('alt="(.*?)"', tag)[1] for tag in re.findall("<img.*?>", panels)
                if "hidden" not in tag and "before" not in tag]

    path = report.write(scored(folder(tmp_path / "dogs", size=(900, 300))))
    dom = seen(path)
    assert shown(dom) == ["step 40"] and dom.count("<svg") == 2 and dom.count('class="mean"') == 3
    assert f"photos 0.05, mean {np.mean([2 / step for step in range(31, 41)]):.3g}" in dom and "keep 0.0125" in dom
    dom = seen(path, "#step=25&divider=30")
    assert shown(dom) == ["step 20"] and "clip-path: inset(0px 70% 0px 0px)" in dom
    assert "Step 0 to the left of the divider, step 20 to its right" in dom
    moved = "byId('step').value = 0; byId('step').dispatchEvent(new Event('input'));"
    assert shown(seen(path, more=moved)) == ["step 0"]
    hover = "const box = document.querySelector('svg').parentElement; box.onpointermove({offsetX: 50});"
    assert "step 1<" in seen(path, more=hover) and "photos 2, mean 2" in seen(path, more=hover)
    heads = "document.title = [...document.querySelectorAll('.scores th')].filter(head => head.offsetParent).map(" \
        "head => head.textContent).join()"
    names = "steps,prompts,measure,base,student,teacher,student - base,"
    assert f"<title>{names}</title>" in seen(path, more=heads)         # not the run's, which is the page's
    both = report.compare([path.parent, folder(tmp_path / "cats", panels=6)], tmp_path / "both.html")
    dom = seen(both, "#step=60")
    assert shown(dom) == ["step 40", "step 60"] and dom.count("<svg") == 4 and dom.count('class="mean"') == 8
    narrow = """document.documentElement.style.width = '390px'; window.dispatchEvent(new Event('resize'));
        const wide = [...document.querySelectorAll('body *')].filter(part => part.getBoundingClientRect().right > 390);
        document.title = wide.filter(part => !part.closest('.wide > *, pre')).map(part => part.tagName).join() + '.';"""
    for one in (path, both):                                            # as on a phone, nothing but boxes that scroll
        assert "<title>.</title>" in seen(one, more=narrow)
    empty = report.write(folder(tmp_path / "fresh", panels=1, done=0))
    dom = seen(empty)
    assert shown(dom) == ["step 0"] and "No step has been made yet" in dom and '<div class="controls" hidden' in dom
