"""Messages, exit codes, signals and bars."""

import os
import signal
import subprocess
import sys
import time

import pytest

from guided_diffusion.console import REQUEUE, InputError, Interrupted, Interrupts, bar_options, run_script


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("a.png: bad\n  really"), 2, "train.py: error: a.png: bad really\n"),
        (OSError("disk full"), 1, "train.py: error: disk full\n"),
        (OSError(28, "full", "out/a/b.png"), 1, "train.py: error: [Errno 28] full: 'out/a/b.png' (--results_path)\n"),
        (OSError(2, "not there", "out"), 1, "train.py: error: [Errno 2] not there: 'out' (--results_path)\n"),
        (OSError(2, "not there", "data/a.png"), 1, "train.py: error: [Errno 2] not there: 'data/a.png' (--data_dir)\n"),
        (OSError(2, "not there", "data/x2/a"), 1, "train.py: error: [Errno 2] not there: 'data/x2/a' (--data_dir)\n"),
        (OSError(2, "not there", "data/x/a"), 1, "train.py: error: [Errno 2] not there: 'data/x/a' (--messages)\n"),
        (OSError(2, "not there", "data"), 1, "train.py: error: [Errno 2] not there: 'data' (--data_dir)\n"),
        (OSError(2, "not there", "out2/a"), 1, "train.py: error: [Errno 2] not there: 'out2/a'\n"),
        (RuntimeError("CUDA out of memory.\nmore"), 1, "train.py: error: CUDA out of memory. (out of memory? "),
        (KeyboardInterrupt(), 130, "train.py: interrupted\n"),
        (Interrupted(signal.SIGINT), 130, "train.py: interrupted\n"),
        (Interrupted(signal.SIGUSR1), REQUEUE, "train.py: ended as told; exit code 75\n"),
    ],
)
def test_run_script_ends_with_one_line(monkeypatch, capsys, error, code, text):
    def main():
        raise error

    words = ["--seed", "1", "--results_path", "out/a", "--data_dir=data", "--messages", "data/x"]
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py", *words])
    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == code
    assert capsys.readouterr().err.startswith(text)


def test_run_script_lets_programming_errors_through():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)
    assert run_script(lambda: None) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_interrupts_note_signals_and_put_handlers_back(number):
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), number)
        time.sleep(0)
        assert interrupts.seen == number
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)  # once more changes nothing
            time.sleep(0)
    assert signal.getsignal(number) is before


def test_interrupts_break_the_work_at_a_second_sigint():
    with pytest.raises(Interrupted) as stopped, Interrupts():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert stopped.value.code == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_interrupts_at_once_break_the_work_at_the_first_signal_only(number):
    with Interrupts(at_once=True):
        with pytest.raises(Interrupted) as stopped:
            os.kill(os.getpid(), number)
            time.sleep(5)
        os.kill(os.getpid(), number)  # while it cleans up
        time.sleep(0)
    assert stopped.value.code == REQUEUE


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_log_on_a_full_disk_ends_nothing():
    code = "from guided_diffusion.console import log; log('line'); print('went on')"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=full, text=True)
    assert done.stdout == "went on\n"


def test_interrupts_raise_nothing_into_an_import(tmp_path, monkeypatch):
    # Compiled modules abort the process when one does.
    lines = "import os, signal, time", "os.kill(os.getpid(), signal.SIGTERM)", "time.sleep(0.3)", "done = 1"
    (tmp_path / "slow_module.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    with Interrupts(at_once=True) as interrupts:
        with pytest.raises(Interrupted):
            import slow_module

            assert slow_module.done == 1 and interrupts.seen == signal.SIGTERM
            time.sleep(5)
        assert slow_module.done == 1


def test_bar_options_draw_seldom_in_a_log():
    assert bar_options()["mininterval"] == 10.0  # the tests' standard error is no terminal
