"""How the programs end: one line for a mistake, a saved state for Ctrl-C, no traceback for either."""
import signal
import sys
from collections.abc import Callable

import torch

from plumbing.files import InputError

TRAIN_WITH_LESS = "lower --batch-size, --size or --rank, raise --accumulate instead, or set --checkpointing"


class Interrupt:
    """Ctrl-C asks for a stop after the step under way, so that whole steps are saved; the second one stops at once."""

    def __enter__(self) -> "Interrupt":
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self.handle)
        return self

    def handle(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing this step, then saving; Ctrl-C again stops at once, without saving", file=sys.stderr)

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self.before)


def run(main: Callable[[], int | None], less_memory: str = TRAIN_WITH_LESS) -> None:
    """Run a program: InputError becomes one line and exit status 2, Ctrl-C status 130, no tracebacks for either.

    less_memory: which of its options help when CUDA is out of memory.
    """
    try:
        sys.exit(main())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        detail = ". ".join(str(error).splitlines()[0].split(". ")[1:3])  # how much was tried, how large the GPU is
        print(f"error: CUDA out of memory ({detail}); {less_memory}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
