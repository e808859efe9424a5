"""Imported by a program that was started as `python experiments/NAME.py`: it then finds what `python -m` would find."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # a file finds its neighbours only
