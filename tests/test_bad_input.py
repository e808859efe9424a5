"""Bad input, through train.main and sample.main: one line with file, value and remedy; nothing is written or lost."""
import json
import os
import shutil
import subprocess
from pathlib import Path

import huggingface_hub
import pytest
import torch
from PIL import Image
from campaign import WEIGHTS, Place, cut, edit_json, lines, sample_words, table, train_words
from conftest import fill_b, program, random_transformer
from safetensors.torch import load_file, save_file

import lora
import sample
import train
from model import ZImageTransformer
from plumbing import files
from plumbing.backbone import Backbone
from plumbing.files import InputError
from plumbing.options import parse
from plumbing.program import run as run_program


def refused(place: Place, main, words: list[str], expected: tuple[str, ...]) -> None:
    """main(words) raises one line with all of `expected`, and leaves every file as it was."""
    before = place.snapshot()
    with pytest.raises(InputError) as caught:
        main(words)
    message = str(caught.value)
    assert "\n" not in message and len(message) > 20, message
    for word in expected:
        assert word.replace("ROOT", str(place.root)) in message, message
    after = place.snapshot()
    assert before.keys() == after.keys(), "written: " + ", ".join(str(path) for path in before.keys() ^ after.keys())
    assert before == after


# ---------------------------------------------------------------------------------------------------- damages
def shard(folder: Path, lose: int | None) -> None:
    """Split the weights of a folder into two shards with an index, and lose one of them."""
    weights = next(folder.glob("*.safetensors"))
    tensors = load_file(weights)
    weights.unlink()
    names = [f"{weights.stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    parts = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for name, part in zip(names, parts):
        save_file(part, folder / name)
    index = {"metadata": {}, "weight_map": {key: name for name, part in zip(names, parts) for key in part}}
    (folder / f"{weights.name}.index.json").write_text(json.dumps(index))
    if lose is not None:
        (folder / names[lose]).unlink()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


DATA = {  # case: damage, words of the message
    "folder missing": (lambda p: shutil.rmtree(p.data), ("ROOT/data", "no such folder")),
    "folder empty": (lambda p: empty(p.data), ("ROOT/data", "no images", ".txt captions")),
    "image without caption": (lambda p: (p.data / "1.txt").unlink(), ("ROOT/data/1.png", "without a caption", "1.txt")),
    "caption without image": (lambda p: (p.data / "1.png").unlink(), ("ROOT/data/1.txt", "without an image", "1.png")),
    "empty caption": (lambda p: (p.data / "2.txt").write_text(" \n"), ("ROOT/data/2.txt", "empty")),
    "caption in another encoding": (lambda p: (p.data / "0.txt").write_bytes(b"\xff\xfeg\xfc"),
                                    ("ROOT/data/0.txt", "UTF-8")),
    "truncated image": (lambda p: cut(p.data / "1.png"), ("ROOT/data/1.png", "not a complete image", "replace")),
    "no image": (lambda p: (p.data / "1.png").write_text("hello"), ("ROOT/data/1.png", "not an image", "replace")),
    "empty image file": (lambda p: (p.data / "1.png").write_bytes(b""), ("ROOT/data/1.png", "not an image", "replace")),
    "bad line": (lambda p: table(p, *lines(2), "{oops", *lines(1)), ("ROOT/data/metadata.jsonl, line 3", "JSON")),
    "line without text": (lambda p: table(p, *lines(1), '{"file_name": "1.png"}'),
                          ("metadata.jsonl, line 2", "'text'")),
    "line without file_name": (lambda p: table(p, '{"text": "a"}'), ("metadata.jsonl, line 1", "'file_name'")),
    "line with an empty file_name": (lambda p: table(p, *lines(2), '{"file_name": "", "text": "a"}'),
                                     ("metadata.jsonl, line 3", "file_name is empty")),
    "line without its file": (lambda p: table(p, *lines(4)),
                              ("metadata.jsonl, line 4", "ROOT/data/3.png", "no such file")),
    "line with an empty caption": (lambda p: table(p, '{"file_name": "0.png", "text": ""}'),
                                   ("line 1", "empty caption")),
    "image without a line": (lambda p: table(p, *lines(2)), ("ROOT/data/2.png", "without a caption", "metadata.jsonl")),
    "empty table": (lambda p: table(p), ("ROOT/data/metadata.jsonl", "no rows")),
}
MODEL = {  # case: damage, words of the message; for both programs
    "folder missing": (lambda p: shutil.rmtree(p.model), ("ROOT/model", "no such folder", "hub id")),
    "no model_index.json": (lambda p: (p.model / "model_index.json").unlink(), ("ROOT/model", "model_index.json")),
    "no transformer": (lambda p: shutil.rmtree(p.model / "transformer"),
                       ("ROOT/model/transformer/config.json", "no such file")),
    "no weights": (lambda p: (p.model / "transformer" / WEIGHTS).unlink(), ("ROOT/model/transformer", "download")),
    "first shard lost": (lambda p: shard(p.model / "transformer", 0),
                         ("-00001-of-00002.safetensors", "missing", "download")),
    "second shard lost": (lambda p: shard(p.model / "transformer", 1),
                          ("-00002-of-00002.safetensors", "missing", "download")),
    "weights cut": (lambda p: cut(p.model / "transformer" / WEIGHTS),
                    (f"ROOT/model/transformer/{WEIGHTS}", "not a complete")),
    "config cut": (lambda p: cut(p.model / "transformer" / "config.json"),
                   ("ROOT/model/transformer/config.json", "JSON")),
    "config key": (lambda p: edit_json(p.model / "transformer" / "config.json", cap_feat_dim=None),
                   ("ROOT/model/transformer/config.json", "'cap_feat_dim'")),
    "config key dim": (lambda p: edit_json(p.model / "transformer" / "config.json", dim=None),
                       ("ROOT/model/transformer/config.json", "'dim'")),
    "config of another model": (lambda p: edit_json(p.model / "transformer" / "config.json", n_layers=3),
                                ("ROOT/model/transformer", "layers.2")),
    "shapes of another model": (lambda p: edit_json(p.model / "transformer" / "config.json", cap_feat_dim=64),
                                ("ROOT/model/transformer", "shape")),
    "vae config key": (lambda p: edit_json(p.model / "vae" / "config.json", scaling_factor=None),
                       ("ROOT/model/vae/config.json", "'scaling_factor'")),
    "no vae weights": (lambda p: (p.model / "vae" / WEIGHTS).unlink(), ("ROOT/model/vae", "download")),
    "no text encoder": (lambda p: shutil.rmtree(p.model / "text_encoder"), ("ROOT/model/text_encoder", "no such")),
    "no text encoder weights": (lambda p: (p.model / "text_encoder" / "model.safetensors").unlink(),
                                ("ROOT/model/text_encoder", "download")),
    "text encoder cut": (lambda p: cut(p.model / "text_encoder" / "model.safetensors"),
                         ("ROOT/model/text_encoder/model.safetensors", "not a complete")),
    "text encoder of another kind": (lambda p: edit_json(p.model / "text_encoder" / "config.json", model_type="bert"),
                                     ("ROOT/model/text_encoder/config.json", "'bert'", "'qwen3'")),
    "no tokenizer": (lambda p: shutil.rmtree(p.model / "tokenizer"), ("ROOT/model/tokenizer", "no such folder")),
    "tokenizer cut": (lambda p: cut(p.model / "tokenizer" / "tokenizer.json"), ("ROOT/model/tokenizer", "tokenizer")),
    "no scheduler": (lambda p: shutil.rmtree(p.model / "scheduler"),
                     ("ROOT/model/scheduler/scheduler_config.json", "no such file")),
    "scheduler key": (lambda p: edit_json(p.model / "scheduler" / "scheduler_config.json", shift=None),
                      ("scheduler_config.json", "shift")),
}
VLM = {  # case: damage, words of the message; where the teacher's context is needed
    "folder missing": (lambda p: shutil.rmtree(p.model / "vlm"), ("ROOT/model/vlm", "no such folder")),
    "no config": (lambda p: (p.model / "vlm" / "config.json").unlink(), ("ROOT/model/vlm", "config.json")),
    "no weights": (lambda p: (p.model / "vlm" / "model.safetensors").unlink(), ("ROOT/model/vlm", "download")),
    "no preprocessor": (lambda p: (p.model / "vlm" / "preprocessor_config.json").unlink(),
                        ("preprocessor_config.json", "no such file")),
    "not a VLM": (lambda p: shutil.copy(p.model / "text_encoder" / "config.json", p.model / "vlm"),
                  ("ROOT/model/vlm/config.json", "'qwen3'", "'qwen3_vl'")),
}
VALUES = {  # flags: words of the message
    ("--size", 33): ("--size 33", "multiple of 8", "try 32"), ("--size", 0): ("--size 0", "1 or more"),
    ("--size", 100000): ("--size 100000", "8192 or less"), ("--rank", 10 ** 6): ("--rank 1000000", "4096 or less"),
    ("--rollout-steps", 10 ** 6): ("--rollout-steps 1000000", "1000 or less"),
    ("--steps", 0): ("--steps 0", "1 or more"), ("--steps", -3): ("--steps -3", "1 or more"),
    ("--rollout-steps", 0): ("--rollout-steps 0", "1 or more"),
    ("--rollout-steps", -1): ("--rollout-steps -1", "1 or more"),
    ("--ema", 1.5): ("--ema 1.5", "[0, 1]"), ("--ema", -0.1): ("--ema -0.1", "[0, 1]"),
    ("--ema", "nan"): ("--ema nan", "[0, 1]"),
    ("--grad-states", 0): ("--grad-states 0", "1 or more"), ("--grad-states", 9): ("--grad-states 9", "1 to 4"),
    ("--grad-states", 1, "--method", "sft"): ("--grad-states 1", "only for --method dopsd", "not sft"),
    ("--noise", -0.5): ("--noise -0.5", "0 or more"), ("--noise", "nan"): ("--noise nan",),
    ("--noise", 0.5, "--method", "sft"): ("--noise 0.5", "only for rollouts", "sft"),
    ("--teacher-lora", "image", "image"): ("--teacher-lora", "2 for 1 --data", "one for each"),
    ("--teacher-lora", "ROOT/none.safetensors"): ("ROOT/none.safetensors", "no such file"),
    ("--teacher-lora", "image", "--method", "sft"): ("--teacher-lora image", "sft has no teacher"),
    ("--teacher-lora", "ROOT/data/0.png"): ("ROOT/data/0.png", "not a complete safetensors file"),
    ("--beta", -1, "--method", "pso"): ("--beta -1.0", "0 or more"),
    ("--lr", -1e-4): ("--lr -0.0001", "0 or more"), ("--lr", "nan"): ("--lr nan",), ("--lr", "inf"): ("--lr inf",),
    ("--rank", 0): ("--rank 0", "1 or more"), ("--alpha", 0): ("--alpha 0", "1 or more"),
    ("--batch-size", 0): ("--batch-size 0", "1 or more"), ("--accumulate", 0): ("--accumulate 0", "1 or more"),
    ("--save-every", 0): ("--save-every 0", "1 or more"), ("--sample-every", -1): ("--sample-every -1", "0 or more"),
    ("--device", "cuda:99"): ("--device cuda:99", "use cpu"), ("--device", "abacus"): ("--device abacus", "use cpu"),
    ("--device", "meta"): ("--device meta", "use cpu"),
    ("--vlm", "ROOT/nowhere"): ("ROOT/nowhere", "no such folder"),
    ("--data", "ROOT/nowhere"): ("ROOT/nowhere", "no such folder"),
    ("--panel-prompt", " "): ("prompt", "empty"), ("--seed", 2 ** 70): ("--seed", str(2 ** 70)),
    ("--resume",): ("--resume", "ROOT/run", "leave --resume out"),
    ("--out", "ROOT/adapter.safetensors"): ("ROOT/adapter.safetensors", "not writable"),
    ("--out", "ROOT/adapter.safetensors/below/run"): ("ROOT/adapter.safetensors/below/run", "not writable", "choose"),
}
SAMPLE = {  # flags after --prompt: words of the message
    ("--height", 30): ("--height 30", "multiple of 8", "try 32"),
    ("--width", 33): ("--width 33", "multiple of 8", "try 32"),
    ("--height", 0): ("--height 0", "multiple of 8"), ("--width", -8): ("--width -8", "multiple of 8"),
    ("--steps", 0): ("--steps 0", "1 to 1000"), ("--steps", 10 ** 6): ("--steps 1000000", "1 to 1000"),
    ("--height", 10 ** 5): ("--height 100000", "8192 or less"), ("--seed", 2 ** 70): ("--seed", str(2 ** 70)),
    ("--prompt", " "): ("prompt", "empty"), ("--prompts", "ROOT/none.txt"): ("ROOT/none.txt", "UTF-8 text"),
    ("--prompts", "ROOT/data/0.png"): ("ROOT/data/0.png", "UTF-8 text"),
    ("--lora", "ROOT/none.safetensors"): ("ROOT/none.safetensors", "no such file"),
    ("--lora", "ROOT/data/0.png"): ("ROOT/data/0.png", "not a complete safetensors file"),
    ("--lora", "ROOT/data"): ("ROOT/data", "no such file"),
    ("--lora", "ROOT/model/vae/" + WEIGHTS): ("ROOT/model/vae/" + WEIGHTS, "unknown key", "made for this transformer"),
    ("--compare",): ("--compare", "--lora", "--reference"),
    ("--out", "ROOT/picture.jpg"): ("ROOT/picture.jpg", ".png"),
    ("--out", "ROOT/adapter.safetensors/picture.png"): ("ROOT/adapter.safetensors/picture.png", "choose a folder"),
    ("--reference", "ROOT/none.png"): ("ROOT/none.png", "no such file"),
    ("--reference", "ROOT/data/0.txt"): ("ROOT/data/0.txt", "not an image"),
    ("--reference", "ROOT/data/0.png", "--vlm", "ROOT/nowhere"): ("ROOT/nowhere", "no such folder"),
    ("--device", "cuda:99"): ("--device cuda:99", "use cpu"),
}


# ---------------------------------------------------------------------------------------------------- the tables
@pytest.mark.parametrize("case", DATA)
def test_data(place, case):
    damage, expected = DATA[case]
    damage(place)
    refused(place, train.main, train_words(place), expected)


@pytest.mark.parametrize("case", MODEL)
def test_model_of_train(place, case):
    damage, expected = MODEL[case]
    damage(place)
    refused(place, train.main, train_words(place), expected)


@pytest.mark.parametrize("case", MODEL)
def test_model_of_sample(place, case):
    damage, expected = MODEL[case]
    damage(place)
    refused(place, sample.main, sample_words(place, "--prompt", "a red star"), expected)


@pytest.mark.parametrize("case", VLM)
def test_vlm(place, case):
    damage, expected = VLM[case]
    damage(place)
    refused(place, train.main, train_words(place), expected)
    refused(place, sample.main, sample_words(place, "--prompt", "a star", "--reference", "ROOT/data/0.png"), expected)


@pytest.mark.parametrize("flags", VALUES, ids=lambda flags: " ".join(map(str, flags)))
def test_values_of_train(place, flags):
    refused(place, train.main, train_words(place, *flags), VALUES[flags])


@pytest.mark.parametrize("flags", SAMPLE, ids=lambda flags: " ".join(map(str, flags)))
def test_values_of_sample(place, flags):
    refused(place, sample.main, sample_words(place, "--prompt", "a red star", *flags), SAMPLE[flags])


def test_places_that_cannot_be_written(place):
    """Seen before anything is encoded."""
    (place.root / "folder.png").mkdir()
    refused(place, sample.main, sample_words(place, "--prompt", "a red star", "--out", "ROOT/folder.png"),
            ("ROOT/folder.png", "not a .png file"))
    (place.root / "file").write_text("")
    refused(place, train.main, train_words(place, "--cache", "ROOT/file/cache"),
            ("--cache ROOT/file/cache", "not writable", "ROOT/file"))


def test_photographs_for_a_toy_are_a_warning(place, capsys):
    Image.new("RGB", (1200, 900), "red").save(place.data / "0.png")
    assert train.main(train_words(place)) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(said) == 1 and "photographs: 1 of 3" in said[0] and "0.png" in said[0]
    assert "--model Tongyi-MAI/Z-Image-Turbo" in said[0]


def test_captions_without_a_word_of_their_own_get_advice(place, capsys):
    for caption, said in (("a red star", 1), ("a red [V] star", 0)):
        for path in place.data.glob("*.txt"):
            path.write_text(caption)
        assert train.main(train_words(place, "--out", place.root / f"run{said}")) == 0
        assert capsys.readouterr().err.count("note: no caption says [V]; a concept is learned best") == said


def test_weights_of_other_kinds(place, monkeypatch):
    """A single file, pickles, GGUF: what they are is said, and nothing is asked of the hub."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    (place.root / "all.safetensors").write_bytes(b"")
    refused(place, train.main, train_words(place, "--model", "ROOT/all.safetensors"),
            ("ROOT/all.safetensors", "a single file, which is not read", "checkpoint folder"))
    for other in ("diffusion_pytorch_model.bin", "model.gguf"):
        for path in (place.model / "transformer").iterdir():
            if path.suffix != ".json":
                path.unlink()
        (place.model / "transformer" / other).write_bytes(b"x")
        refused(place, train.main, train_words(place), ("ROOT/model/transformer", other, "neither pickle nor GGUF"))


def test_sample_without_a_prompt(place):
    refused(place, sample.main, sample_words(place), ("--prompt", "nothing to draw"))
    (place.root / "prompts.txt").write_text("\n \n")
    refused(place, sample.main, sample_words(place, "--prompts", "ROOT/prompts.txt"), ("--prompt", "nothing to draw"))


@pytest.mark.parametrize("changes, expected", [(dict(dim=48, axes_dims=[8, 8, 8]), "shapes"),
                                               (dict(n_layers=3), "layers.2.")])
def test_lora_of_another_model(place, changes, expected):
    other = place.root / "other.safetensors"
    lora.save(fill_b(lora.create(random_transformer(**changes), 2, 2, 0), 0), other)
    refused(place, sample.main, sample_words(place, "--prompt", "a red star", "--lora", other),
            (str(other), expected, "made for this transformer"))


def test_lora_cut(place):
    cut(place.root / "adapter.safetensors")
    refused(place, sample.main, sample_words(place, "--prompt", "a red star", "--lora", "ROOT/adapter.safetensors"),
            ("ROOT/adapter.safetensors", "not a complete safetensors file"))


@pytest.mark.parametrize("main, words", [(train.main, train_words), (sample.main, sample_words)])
@pytest.mark.parametrize("flag, name", [("--model", "nobody/nothing"), ("--vlm", "nobody/nothing-vl")])
def test_hub_unreachable(place, monkeypatch, main, words, flag, name):
    def unreachable(*_, **__):
        raise ConnectionError("Name or service not known\nand a second line")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    flags = () if main is train.main else ("--prompt", "a red star", "--reference", "ROOT/data/0.png")
    refused(place, main, words(place, *flags, flag, name), (name, "Name or service not known", "network"))


@pytest.mark.parametrize("main, words", [
    (train.main, ["--steps", "three"]), (train.main, ["--lr", "fast"]), (train.main, ["--loss", "huber"]),
    (train.main, ["--method", "magic"]), (train.main, ["--dtype", "int8"]), (train.main, ["--no-such-option"]),
    (sample.main, ["--seed", "x"]), (sample.main, ["--height", "1.5"]), (sample.main, ["--teacher-rope", "both"])],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value.__module__)
def test_argparse_refuses(place, capsys, main, words):
    before = place.snapshot()
    with pytest.raises(SystemExit) as caught:
        main((train_words if main is train.main else sample_words)(place, *words))
    assert caught.value.code == 2 and words[-1] in capsys.readouterr().err and place.snapshot() == before


@pytest.mark.quick
def test_a_transformer_that_draws_nothing_finite(place, monkeypatch):
    """One line instead of a black picture."""
    velocity = ZImageTransformer.velocity
    monkeypatch.setattr(ZImageTransformer, "velocity", lambda *given: velocity(*given) * float("nan"))
    refused(place, sample.main, sample_words(place, "--prompt", "a red star"),
            ("--model: the base draws", "not finite", "--dtype float32"))


def test_earlier_spellings_still_work():
    """--teacher base meant frozen weights, --teacher-lora base the untuned model; today's words tell them apart."""
    old = parse(train.Options, ["--data", "a", "b", "--teacher", "base", "--teacher-lora", "image", "base"], "")
    new = parse(train.Options,
                ["--data", "a", "b", "--teacher-weights", "frozen", "--teacher-lora", "image", "untuned"], "")
    assert old == new and (new.teacher_weights, new.teacher_lora) == ("frozen", ["image", "untuned"])


# ---------------------------------------------------------------------------------------------------- runs that exist
CHANGES = {"--lr": 0.5, "--rank": 7, "--alpha": 9, "--seed": 3, "--loss": "v", "--method": "sft", "--ema": 0.5,
           "--size": 40, "--batch-size": 3, "--accumulate": 2, "--rollout-steps": 3, "--teacher-rope": "text",
           "--teacher-weights": "frozen", "--beta": 5.0, "--grad-states": 1, "--dtype": "bfloat16",
           "--model": "ROOT/other_model"}


def test_existing_runs_are_neither_overwritten_nor_continued_differently(place):
    words = train_words(place)
    assert train.main(words) == 0
    shutil.copytree(place.model, place.root / "other_model")
    refused(place, train.main, words, ("--out", "ROOT/run", "another run", "--resume"))
    for flag, value in CHANGES.items():
        refused(place, train.main, train_words(place, "--resume", flag, value, "--steps", 2),
                (f"--resume: {flag} was", str(value), "--out"))
    (place.root / "run" / "config.json").unlink()
    refused(place, train.main, [*words, "--resume"], ("ROOT/run/config.json", "no such file"))


def test_a_failed_start_can_be_repeated(place):
    """What a start left behind before it failed must not count as a run."""
    (place.model / "transformer" / WEIGHTS).rename(place.root / "kept")
    with pytest.raises(InputError):
        train.main(train_words(place))
    (place.root / "kept").rename(place.model / "transformer" / WEIGHTS)
    assert train.main(train_words(place)) == 0


# ---------------------------------------------------------------------------------------------------- processes
@pytest.mark.parametrize("name", ["train.py", "sample.py"])
def test_exit_status_2_and_one_line(place, name):
    words = ["--data", "nowhere"] if name == "train.py" else ["--prompt", "a red star", "--lora", "nowhere"]
    before = place.snapshot()
    done = subprocess.run([*program(name), *words, "--model", str(place.model), "--device", "cpu"], capture_output=True,
                          text=True, cwd=place.root)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
    assert place.snapshot() == before


@pytest.mark.quick
def test_programs_report_in_one_line(capsys):
    def fails():
        raise InputError("a.png: broken; replace it")
    with pytest.raises(SystemExit) as caught:
        run_program(fails)
    assert caught.value.code == 2 and capsys.readouterr().err == "error: a.png: broken; replace it\n"
    with pytest.raises(SystemExit) as caught:
        run_program(lambda: 130)
    assert caught.value.code == 130
    for error, line in ((InputError("a\nb.png: broken"), "error: a b.png: broken\n"),
                        (OSError(36, "File name too long", "a" * 300), f"error: {'a' * 200}: File name too long; give"),
                        (OSError(28, "No space left on device"), "error: output: No space left on device; give")):
        with pytest.raises(SystemExit) as caught:
            run_program(lambda: (_ for _ in ()).throw(error))
        shown = capsys.readouterr().err
        assert caught.value.code == 2 and shown.startswith(line) and shown.count("\n") == 1


def test_a_console_that_cannot_spell_a_prompt(place):
    """Python on Windows writes cp1252 into files; a picture with a Chinese name and prompt is drawn all the same."""
    path = place.root / "星.png"
    done = subprocess.run([*program("sample.py"), *sample_words(place, "--prompt", "红色的星", "--out", path)],
                          capture_output=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and path.is_file() and rb"\u661f.png" in done.stdout and b"Traceback" not in done.stderr


def test_sample_out_of_memory_names_options_that_it_has(place, monkeypatch, capsys):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    monkeypatch.setattr(Backbone, "load", exhausted)
    monkeypatch.setattr("sys.argv", ["sample.py", *sample_words(place, "--prompt", "a red star")])
    last_line = (files.ROOT / "sample.py").read_text().split('if __name__ == "__main__":')[-1].strip()
    with pytest.raises(SystemExit) as caught:
        exec(last_line, vars(sample))
    errors = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and len(errors) == 1 and "--height" in errors[0] and "--width" in errors[0]
