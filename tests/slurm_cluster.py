"""A SLURM cluster of one node on loopback, with daemons, key, ports and configuration in a temporary folder."""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

_FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
_SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # the daemons' folders are not in everybody's PATH
# The node claims more than the machine has, so that the scripts' own #SBATCH lines can be granted anywhere. A requeued
# job waits for cred_expire seconds.
_CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={first}
SlurmdPort={second}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
MailProg=/bin/true
JobRequeue=1
KillWait=30
MinJobAge=3600
MessageTimeout=60
ReturnToService=2
GresTypes=gpu
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=1000000 Gres=gpu:16
PartitionName=partitions-gpu Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """Context manager: the cluster's daemons run inside of it. Raises RuntimeError where they do not come up.

    `environment` is this process's, less what a job it may be in has set, and with what SLURM's commands need.
    """

    def __init__(self):
        # Not pytest's folder: it is private, and its name may be too long for a socket.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        self._daemons = []

    def __enter__(self):
        try:
            self._configure()
            files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "seed")]
            self._start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
            self._await("munged", lambda: (self.folder / "munge.socket").exists())
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D")
            self._await("the node", lambda: "State=IDLE" in self.command("scontrol", "show", "node", check=False))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        """End every job, its processes, and the daemons; remove the folder."""
        if len(self._daemons) == 3:
            with contextlib.suppress(subprocess.TimeoutExpired, RuntimeError):
                self.command("scancel", "--user=root", "--signal=KILL", "--full", check=False)
                self.command("scancel", "--user=root", check=False)
                self._await("the jobs' end", lambda: not self.command("squeue", "--noheader", check=False).strip(), 20)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, *words, check=True, **options):
        """Run one of SLURM's commands; return its output. Raises RuntimeError with its complaint when it fails."""
        environment = {**self.environment, **options.pop("env", {})}
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment, **options)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: code {done.returncode}\n{done.stderr}")
        return done.stdout

    def submit(self, script, *arguments, options=(), **keywords):
        """Submit a batch script with sbatch's `options`; return the job's number."""
        return self.command("sbatch", "--parsable", *options, script, *map(str, arguments), **keywords).strip()

    def facts(self, job):
        """Return what the controller says of a job, such as {"JobState": "RUNNING", "Restarts": "0"}."""
        words = self.command("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def await_end(self, job, state, seconds=120):
        """Wait until a job is in this final state; return its `facts`. Raises RuntimeError with its log otherwise."""
        return self.await_that(job, lambda facts: facts["JobState"] == state, f"be {state}", seconds)

    def await_that(self, job, condition, words="be so", seconds=120):
        """Wait until the condition holds of a job's `facts`, and return them; not longer than the job goes on."""
        deadline = time.monotonic() + seconds
        while not condition(facts := self.facts(job)):
            if facts["JobState"] in _FINAL or time.monotonic() > deadline:
                if condition(facts := self.facts(job)):
                    break
                log = Path(facts["StdOut"])
                text = log.read_text(errors="replace") if log.exists() else "has no log"
                raise RuntimeError(f"job {job} did not {words}: {facts}\n--- its log\n{text}\n{self.logs()}")
            time.sleep(0.1)
        return facts

    def logs(self, lines=30):
        """Return the ends of the daemons' logs."""
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
            for path in sorted(self.folder.glob("*.log"))
        )

    def _configure(self):
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        (self.folder / "spool").mkdir()
        with open(self.folder / "munge.key", "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as key:
            key.write(os.urandom(128))
        host = socket.gethostname().split(".")[0]
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            second.bind(("127.0.0.1", 0))
            ports = {"first": first.getsockname()[1], "second": second.getsockname()[1]}
        (self.folder / "slurm.conf").write_text(_CONFIGURATION.format(host=host, folder=self.folder, **ports))
        for k in range(16):  # slurmd grumbles that they are no devices, and counts them
            (self.folder / f"gpu{k}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-15]\n")

    def _start(self, name, *arguments):
        program = shutil.which(name, path=_SEARCHED)
        if program is None:
            raise RuntimeError(f"{name} is not installed")
        with open(self.folder / f"{name}.log", "wb") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            self._daemons.append(
                subprocess.Popen([program, *arguments], env=self.environment, cwd=self.folder, **streams)
            )

    def _await(self, what, ready, seconds=60):
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self._daemons):
                raise RuntimeError(f"waited in vain for {what}\n{self.logs()}")
            time.sleep(0.1)
