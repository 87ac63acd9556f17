"""How the programs speak and end: messages, bad input, progress bars, signals. Standard library only."""

import contextlib
import gc
import os
import signal
import sys
import threading
import time
import warnings

STARTED = time.monotonic()
REQUEUE = 75  # exit code (EX_TEMPFAIL) of a run that was told to end and can go on where it stopped


class InputError(ValueError):
    """Bad input: the message names the file or flag, what was found, and what to do, on one line.

    The scripts print the message without a traceback and exit with code 2.
    """


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

    __hash__ = None


def bar_options():
    """Return how all progress bars are shown: seldom where they go to a log."""
    return {"file": StandardError(), "dynamic_ncols": True, "mininterval": 0.1 if sys.stderr.isatty() else 10.0}


def run_script(main):
    """Run a script's main function; print bad input as one line and exit with code 2, and system errors with code 1."""
    warnings.simplefilter("once")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {' '.join(str(message).split())}\n"
    try:
        main()
    except InputError as error:
        sys.exit(_complain(error, 2))
    except OSError as error:
        sys.exit(_complain(error, 1))
    except RuntimeError as error:
        text = str(error)
        if "out of memory" not in text and "can't allocate memory" not in text and "killed by signal" not in text:
            raise
        hint = "out of memory? lower --batch_size or --microbatch, or set --use_checkpoint True"
        sys.exit(_complain(f"{text.splitlines()[0][:200]} ({hint})", 1))
    except KeyboardInterrupt as stop:
        code = getattr(stop, "code", 130)
        log(
            f"{os.path.basename(sys.argv[0])}: "
            + ("interrupted" if code == 130 else f"ended as told; exit code {code}")
        )
        sys.exit(code)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; `code` is the exit code, `agreed` whether all processes of the run end together."""

    def __init__(self, number, agreed=False):
        super().__init__(f"signal {number}")
        self.code, self.agreed = 130 if number == signal.SIGINT else REQUEUE, agreed


class Interrupts:
    """Notes SIGINT, SIGTERM and SIGUSR1 (with which SLURM announces the end of a job) instead of dying of them.

    A second SIGINT breaks the work at once; the two others may well come twice, from SLURM and from a wrapper.

    :param at_once: break the work at the first signal, by `Interrupted`.
    """

    def __init__(self, at_once=False):
        self.seen, self.at_once, self._raised, self._before = 0, at_once, False, {}  # seen: the signal's number

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        again = number == self.seen == signal.SIGINT
        self.seen = number
        if not again and (not self.at_once or self._raised):
            return
        if _importing(frame):  # compiled modules abort the process when an exception comes while they are loaded
            later = threading.Timer(0.1, os.kill, (os.getpid(), number))
            later.daemon = True
            later.start()
            return
        self._raised = True
        raise Interrupted(number)


def _importing(frame):
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _complain(error, code):
    log(f"{os.path.basename(sys.argv[0])}: error: {' '.join(str(error).split())}")
    return code


def import_torch():
    """Import torch while the collector waits: it would look again and again at objects that all stay, a tenth of the time."""
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()  # nor shall it look at them later


class StartUp:
    """The time from here to a run's first reverse step, and named parts of it, in seconds."""

    def __init__(self):
        self.began, self.parts = time.monotonic(), {}

    @contextlib.contextmanager
    def timing(self, name):
        """Add the time of the block to the part `name`."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.parts[name] = self.parts.get(name, 0.0) + time.monotonic() - started

    def line(self, **more):
        """Return one line: the seconds until now and, in brackets, those of the parts.

        :param more: further parts that were timed elsewhere, such as noise_bank=0.9.
        """
        parts = ", ".join(
            f"{name.replace('_', ' ')} {seconds:.1f} s" for name, seconds in {**self.parts, **more}.items()
        )
        return f"first reverse step after {time.monotonic() - self.began:.1f} s" + (f" ({parts})" if parts else "")
