"""Imported by a program that was started as `python experiments/NAME.py`: runs it as `python -m experiments.NAME`."""
import os
import sys
from pathlib import Path

words = [sys.executable, "-P", "-m", f"experiments.{Path(sys.argv[0]).stem}", *sys.argv[1:]]  # -P: no files of cwd
path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
os.execve(sys.executable, words, {**os.environ, "PYTHONPATH": path})
