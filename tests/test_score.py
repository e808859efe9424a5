"""tiny.score and tiny.score_edits refuse what they cannot measure, before they draw anything."""
import json
import shutil
import sys
from pathlib import Path

import pytest

from plumbing.files import InputError
from plumbing.program import run
from tiny import score, score_edits

ROOT = Path(__file__).parents[1]
EXAMPLES, TINY = ROOT / "examples", ROOT / "tiny"


@pytest.mark.parametrize("module, arguments, says", [
    (score, ["--data", EXAMPLES / "paint"], "examples/paint: data for editing; use tiny.score_edits"),
    (score, ["--data", EXAMPLES / "ordinary"], "the field 'file_name' is missing"),
    (score, ["--data", EXAMPLES / "nothing"], "examples/nothing"),
    (score, ["--data", EXAMPLES / "star", "--lora", "file"], "--lora file: no name; write NAME=FILE"),
    (score, ["--data", EXAMPLES / "star", "--model", EXAMPLES], str(EXAMPLES)),
    (score_edits, ["--data", EXAMPLES / "star"], "examples/star: no data for editing; use tiny.score"),
    (score_edits, ["--data", EXAMPLES / "paint", "--model", TINY / "model"], "Z-Image takes no reference images"),
    (score_edits, ["--data", EXAMPLES / "paint", "--model", EXAMPLES], str(EXAMPLES)),
])
def test_one_line_and_status_2(monkeypatch, capsys, tmp_path, module, arguments, says):
    monkeypatch.setattr(sys, "argv", ["score", *map(str, arguments), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        run(module.main)
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and says in error and "\n" not in error and not (tmp_path / "out").exists()


@pytest.mark.quick
def test_a_folder_that_has_both_kinds_of_rows(tmp_path):
    for name in ("1.png", "1_before.png", "2.png"):
        shutil.copy(EXAMPLES / "paint" / name, tmp_path)
    lines = [{"file_name": "1.png", "text": "paint it [V]", "source": "1_before.png"},
             {"file_name": "2.png", "text": "a [V]"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for editing in (True, False):
        with pytest.raises(InputError, match="data for editing"):
            score.read_pictures(str(tmp_path), editing)
