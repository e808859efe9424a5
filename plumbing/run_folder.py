"""The folder of a run: whether it can be opened or resumed, and what it was made with."""
import dataclasses
import importlib.metadata
import subprocess
from pathlib import Path

from plumbing.files import ROOT, InputError, check_writable, read_json

# Options that may differ when a run is resumed: they change the rounding at most.
FREE = ("out", "steps", "save_every", "sample_every", "resume", "panel_prompt", "cache", "compile", "checkpointing",
        "device")
STATE = "state.safetensors"


def names_of(sources: list[str]) -> list[str]:
    """A short name for each --data: its last part, numbered where two are alike."""
    paths = [Path(source).resolve() for source in sources]
    names = [path.stem if path.is_file() else path.name for path in paths]
    return [name if names.count(name) == 1 else f"{name}-{i}" for i, name in enumerate(names, 1)]


def open_run(cfg, out: Path, fingerprint: str) -> None:
    """Check that `out` can become a run of these options, or is one to resume. Raises InputError; writes nothing."""
    state = out / STATE
    if cfg.resume:
        if not state.is_file():
            raise InputError(f"--resume: {out} holds no run ({STATE} is missing); leave --resume out to start one")
        if not (out / "config.json").is_file():
            raise InputError(f"{out / 'config.json'}: no such file; --resume needs it, restore it or start a new run "
                             "with another --out")
        config = read_json(out / "config.json", "options")
        before = config["options"]
        for name, value in dataclasses.asdict(cfg).items():
            if name not in FREE and before.get(name, value) != value:
                raise InputError(f"--resume: --{name.replace('_', '-')} was {before[name]} and is now {value}; "
                                 "give the same value, or start a new run with another --out")
        if config.get("data") != fingerprint:
            raise InputError(f"--resume: the images or captions in {', '.join(cfg.data)} are not those that this run "
                             "began with; restore them, or start a new run with another --out")
        return
    if state.exists():
        raise InputError(f"--out {out}: holds another run; continue it with --resume, or choose another --out")
    if (out / "config.json").exists() and "options" not in read_json(out / "config.json"):
        raise InputError(f"--out {out}: holds something else (its config.json is not ours); choose another --out")
    check_writable(out, f"--out {out}")


def provenance() -> dict:
    """What a run was made with: versions of the packages, commit of this code."""
    packages = ("torch", "transformers", "safetensors", "einops", "pillow", "tqdm")
    try:
        git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        commit = git.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"commit": commit, "versions": {name: importlib.metadata.version(name) for name in packages}}
