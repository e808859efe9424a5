"""docs/research.md: its diffs are applied to a copy of the code; what they add is run, and its lines of Python."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from plumbing.files import ROOT

PAGE = (ROOT / "docs" / "research.md").read_text(encoding="utf-8")
RUNS = {"default": "", "late": "--loss late", "one-late": "--loss late --rollout-steps 1", "mixed": "--method mixed",
        "off-policy": "--method off-policy", "grey": "--teacher-context grey"}
# What stands around the lines of the page, and what its commands do, in the copy: out is its folder of runs.
PROGRAM = """
import torch
from PIL import Image
from safetensors.torch import load_file
import sample, train
from baselines import mixed
from data import generator
from encoder import TEACHER_CONTEXTS
from loss import WEIGHTS, weight_of
from plumbing import encoder_files
from plumbing.checkpoints import EMBEDDED
from rollout import Point

torch.set_num_threads(1)
x = v = torch.ones(1, 3, 4, 4)
sigmas, image = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64), Image.open("examples/star/1.png").convert("RGB")
reader = encoder_files.load(EMBEDDED, "cpu", vlm=EMBEDDED / "vlm")

def velocity(x, sigma):
    return sigma * x.cos()

def shown(kind):
    return lambda image: TEACHER_CONTEXTS[kind].texts(reader, ["a [V]"], [image], [0])[0]
grey, vlm = shown("grey"), shown("vlm")

words = ["--data", "examples/star", "--keep", "none", "--steps", "2", "--sample-every", "0", "--cache", "cache"]
for name, flags in {RUNS}.items():
    assert train.main([*words, "--out", "out/" + name, *flags.split()]) == 0
assert train.main([*words, "--out", "out/before"]) == 0
assert train.main(["--config", "out/before/config.json", "--out", "out/after"]) == 0
sample.main(["--prompt", "a big [V]", "--reference", "examples/star/1.png", "--teacher-context", "grey"])
"""


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """A copy of the code with all diffs, one after the other, in which everything was run."""
    copy = tmp_path_factory.mktemp("research") / "copy"
    for path in [path for folder in (".", "networks", "plumbing", "tiny") for kind in ("py", "html")
                 for path in (ROOT / folder).glob(f"*.{kind}")]:
        (copy / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy / path.relative_to(ROOT))
    for name in ("examples", "tiny/model"):
        (copy / name).symlink_to(ROOT / name)
    here = {"cwd": copy, "text": True, "capture_output": True}
    diffs = re.findall(r"```diff\n(.*?)```", PAGE, re.S)
    for diff in diffs:
        done = subprocess.run(["git", "apply", "-"], input=diff, **here,
                              env=os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)})
        assert done.returncode == 0, f"{done.stderr}\n{diff}"
    lines = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(diffs) == 3 and len(lines) == 4
    code = PROGRAM.replace("{RUNS}", repr(RUNS)) + "\n".join(lines)
    done = subprocess.run([sys.executable, "-c", code], **here)
    assert done.returncode == 0, done.stderr
    return copy


def losses(copy: Path, name: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (copy / "out" / name / "metrics.jsonl").read_text().splitlines()]


def test_the_weight_is_another_one(changed):
    """At sigma = 1, the only state of a rollout of one step, it is 0."""
    assert losses(changed, "one-late") == [0, 0]
    assert 0 < losses(changed, "late")[0] < 0.5 * losses(changed, "default")[0]


def test_the_method_walks_with_one_of_both(changed):
    """The student's first rollout is the base's, the teacher's another one: the loss is that of one of them."""
    student, teacher, either = (losses(changed, name)[0] for name in ("default", "off-policy", "mixed"))
    assert student != pytest.approx(teacher, rel=1e-3)
    assert either == pytest.approx(student, rel=1e-6) or either == pytest.approx(teacher, rel=1e-6)
    config = json.loads((changed / "out" / "mixed" / "config.json").read_text())
    assert config["options"]["method"] == "mixed"


def test_the_teacher_sees_something_else(changed):
    assert losses(changed, "grey")[0] != pytest.approx(losses(changed, "default")[0], rel=1e-3)
    assert (changed / "out" / "sample.png").is_file()


def test_the_page_is_one_page():
    assert len(PAGE.splitlines()) <= 170 and max(len(line) for line in PAGE.splitlines()) <= 121    # of a diff
    assert PAGE.count("```bash") >= 3 and "](research.md)" not in PAGE
    assert "docs/research.md" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
