"""Train for a long time with a save every few seconds, and watch memory, files and processes: python tests/soak.py [minutes]

Prints a line every half minute; exits with 1 where resident memory of the main process ends more than 2 % away from what it was
after a fifth of the time, or where file descriptors, child processes or temporary files are left over.
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import TINY, TRAIN, as_arguments

from guided_diffusion.data.toy_scenes import write_toy_scenes

SCRIPT = str(Path(__file__).resolve().parent.parent / "image_train.py")


def resident_mib(pid):
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def children(pid):
    """Process ids of all descendants."""
    found = [
        int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()
    ]
    return found + [grandchild for child in found for grandchild in children(child)]


def look(pid):
    """Return (resident MiB, file descriptors, child processes) of a process."""
    return resident_mib(pid), len(os.listdir(f"/proc/{pid}/fd")), len(children(pid))


def main():
    """Run it; exit with 1 where something grows or is left."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("minutes", type=float, nargs="?", default=30.0)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    write_toy_scenes(str(root / "scenes"), train=6, val=3, height=32, width=64, progress=False)
    flags = {
        "data_dir": root / "scenes",
        "checkpoint_dir": root / "run",
        **TINY,
        **TRAIN,
        "save_interval": 15,
        "keep_checkpoints": 2,
        "eval_interval": 15,
        "eval_items": 2,
        "preview_items": 1,
        "preview_steps": 2,
        "num_workers": 1,
    }
    with open(root / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *as_arguments(flags)], stdout=log, stderr=log, start_new_session=True
        )
    seen, started = [], time.monotonic()
    while process.poll() is None and time.monotonic() - started < 60 * arguments.minutes:
        time.sleep(5)
        seen.append((time.monotonic() - started, *look(process.pid)))
        if len(seen) % 6 == 0:
            minutes, memory, files, processes = seen[-1][0] / 60, *seen[-1][1:]
            saves = (root / "log").read_text().count("saved step")
            print(
                f"{minutes:5.1f} min: {memory:.1f} MiB, {files} files, {processes} children, {saves} saves", flush=True
            )
    family = children(process.pid) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    code = process.wait(timeout=120)
    time.sleep(2)
    alive = [pid for pid in family if Path(f"/proc/{pid}").exists()]
    early = statistics.median(row[1] for row in seen[len(seen) // 5 : len(seen) // 5 + 12])
    late = statistics.median(row[1] for row in seen[-12:])
    # The fewest of a minute: a save opens a handful of files for a moment.
    early_rows, late_rows = seen[len(seen) // 5 :][:12], seen[-12:]
    (files, more_files), (processes, more_processes) = (
        [min(row[k] for row in rows) for rows in (early_rows, late_rows)] for k in (2, 3)
    )
    left = [path.name for path in root.rglob("*.tmp")]
    growth = late / early - 1
    kept = sorted(path.name for path in (root / "run").glob("manifest*"))
    for line in (
        f"resident memory {early:.1f} MiB after a fifth of the time, {late:.1f} MiB at the end ({growth:+.2%})",
        f"file descriptors {files}, then {more_files}; children {processes}, then {more_processes}",
        f"exit code {code}; processes left: {alive or 'none'}; temporary files left: {left or 'none'}",
        f"{(root / 'log').read_text().count('saved step')} saves; kept: {kept}",
    ):
        print(line)
    return int(
        abs(growth) > 0.02 or bool(alive or left) or code != 75 or more_files > files or more_processes > processes
    )


if __name__ == "__main__":
    sys.exit(main())
