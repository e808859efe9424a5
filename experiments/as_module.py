"""Imported by a program that was started as `python experiments/NAME.py`: runs it as `python -m experiments.NAME`.

As a file a program finds its neighbours only, not the top level of this repository.
"""
import os
import signal
import subprocess
import sys
from pathlib import Path

path = [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
command = [sys.executable, "-P", "-m", f"experiments.{Path(sys.argv[0]).stem}", *sys.argv[1:]]     # -P: no files of cwd
environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
if os.name == "posix":
    os.execve(sys.executable, command, environment)
signal.signal(signal.SIGINT, signal.SIG_IGN)                        # Ctrl-C reaches the other process as well
sys.exit(subprocess.run(command, env=environment).returncode)
