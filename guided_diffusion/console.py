"""Messages, bad input, progress bars and signals of the programs. Standard library only."""

import atexit
import contextlib
import gc
import itertools
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

STARTED = time.monotonic()
REQUEUE = 75  # exit code (EX_TEMPFAIL) of a run that was told to end and can go on where it stopped


class InputError(ValueError):
    """Bad input: the message names the file or flag, what was found, and what to do, on one line."""


def log(text):
    """Print one line of progress to standard error."""
    print(text, file=StandardError(), flush=True)


class StandardError:
    """The standard error of the moment, whose writes do not raise: a log on a full disk must not end a run."""

    def write(self, text):
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            sys.stderr.flush()

    def __getattr__(self, name):
        return getattr(sys.stderr, name)

    def __eq__(self, other):  # tqdm asks whether a line goes to where the bar is
        return isinstance(other, StandardError)


def bar_options():
    """Return how all progress bars are shown: seldom in a log."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return {
        "file": StandardError(),
        "dynamic_ncols": True,
        "mininterval": interval,
        "miniters": 0,
    }  # time alone decides


def show_beside(bar, text):
    """Show a text beside a bar's count, when the bar is due."""
    bar.set_postfix_str(text, refresh=False)
    bar.update(0)


def run_script(main):
    """Run a script's main function; print bad input as one line and exit with code 2, and system errors with code 1."""
    gc.set_threshold(100_000)  # torch's modules are a million objects that stay: looking them over takes a second
    atexit.register(gc.freeze)
    warnings.simplefilter("once")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    try:
        return main()
    except (InputError, OSError) as error:
        text, code = f"error: {error}{_flag_of(error)}", 2 if isinstance(error, InputError) else 1
    except RuntimeError as error:
        if not any(words in str(error) for words in ("out of memory", "can't allocate memory", "killed by signal")):
            raise
        hint = "out of memory? lower --batch_size or --microbatch, or set --use_checkpoint True"
        text, code = f"error: {str(error).splitlines()[0][:200]} ({hint})", 1
    except KeyboardInterrupt as stop:
        code = getattr(stop, "code", 130)
        text = "interrupted" if code == 130 else f"ended as told; exit code {code}"
    log(f"{os.path.basename(sys.argv[0])}: {' '.join(text.split())}")
    sys.exit(code)


def _flag_of(error):
    """Return in brackets the flag whose value is where an OSError happened; "" where none is."""
    place, words = Path(str(getattr(error, "filename", None) or "")), []
    if not place.parts:
        return ""
    for word in sys.argv[1:]:
        words += word.split("=", 1) if word.startswith("--") else [word]
    values = {name: Path(value) for name, value in itertools.pairwise(words) if name[:2] == "--" and value}
    around = [(len(path.parts), name) for name, path in values.items() if path in (place, *place.parents)]
    inside = [(-len(path.parts), name) for name, path in values.items() if place in path.parents]
    nearest = max(around or inside, default=None)
    return f" ({nearest[1]})" if nearest else ""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; `code` is the exit code, `agreed` whether all processes of the run end together."""

    def __init__(self, number, agreed=False):
        super().__init__(f"signal {number}")
        self.code, self.agreed = 130 if number == signal.SIGINT else REQUEUE, agreed


class Interrupts:
    """Notes SIGINT, SIGTERM and SIGUSR1 (SLURM's notice of the end of a job); a second SIGINT breaks the work at once.

    :param at_once: break the work at the first signal, by `Interrupted`.
    """

    def __init__(self, at_once=False):
        self.seen, self.at_once, self._before = 0, at_once, {}  # seen: the signal's number

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        again, self.seen = number == self.seen == signal.SIGINT, number
        if not again and not self.at_once:
            return
        # Compiled modules abort the process when an exception comes while they are loaded.
        while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
            frame = frame.f_back
        if frame is None:
            self.at_once = False  # once is enough: the work is ending
            raise Interrupted(number)
        later = threading.Timer(0.1, os.kill, (os.getpid(), number))
        later.daemon = True
        later.start()
