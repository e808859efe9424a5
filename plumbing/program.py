"""How the programs end: one line for a mistake, a saved state for Ctrl-C, no traceback for either."""
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable

import torch
from PIL import Image

from plumbing.files import InputError

TRAIN_WITH_LESS = "lower --batch-size, --size or --rank, raise --accumulate instead, or set --checkpointing"
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Interrupt:
    """Ctrl-C, or a system that shuts down, asks for a stop after the step under way, so that whole steps are saved; the
    second one stops at once. asked: the signal's number, or 0."""

    def __enter__(self) -> "Interrupt":
        self.asked, self.patience = 0, 0.0
        self.before = {number: signal.signal(number, self.handle) for number in SIGNALS}
        return self

    def handle(self, number: int, _) -> None:
        if self.asked:
            if time.monotonic() > self.patience:
                raise KeyboardInterrupt
            return
        self.asked = number
        self.patience = time.monotonic() + 5 * ("WORLD_SIZE" in os.environ)     # torchrun sends Ctrl-C once more
        print("\nfinishing this step, then saving; Ctrl-C again stops at once, without saving", file=sys.stderr)

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def run(main: Callable[[], int | None], less_memory: str = TRAIN_WITH_LESS) -> None:
    """Run a program: InputError becomes one line and exit status 2, Ctrl-C status 130, no tracebacks for either.

    less_memory: which of its options help when CUDA is out of memory.
    """
    for stream in (sys.stdout, sys.stderr):                             # a name that it cannot spell ends no run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)     # photographs of 90 megapixels are meant
    try:
        sys.exit(main())
    except InputError as error:
        words = " ".join(str(error).split())
    except OSError as error:                                            # such as a name that is too long, a full disk
        words = f"{str(error.filename or 'output')[:200]}: {error.strerror}; give another path, or free some space"
    except torch.OutOfMemoryError as error:
        detail = ". ".join(str(error).splitlines()[0].split(". ")[1:3])  # how much was tried, how large the GPU is
        words = f"CUDA out of memory ({detail}); {less_memory}"
    except RuntimeError as error:
        if "closed by peer" in str(error) or "reset by peer" in str(error):
            print("error: another process has ended; see what it says, and continue with --resume", file=sys.stderr)
            sys.exit(1)
        if "DefaultCPUAllocator" not in str(error):
            raise
        words = f"out of memory ({str(error).split('] ')[-1].splitlines()[0]}); {less_memory}"
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"error: {words}", file=sys.stderr)
    sys.exit(2)
