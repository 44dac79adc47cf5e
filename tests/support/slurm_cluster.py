"""Slurm with two virtual nodes on this machine: its controller and daemons, and jobs sent to it.

Needs root, Debian's `slurm-wlm`, and neither munge nor cgroups (`make test-slurm`).
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.running import CLONE, environment

NODES = ("zppo1", "zppo2")
HOSTS = Path("/etc/hosts")
CONTROLLER_PORT, FIRST_NODE_PORT = 16_817, 17_001
NUM_GPUS = 2
CONFIGURATION = """
ClusterName=zppo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
{nodes}
PartitionName=test Nodes={names} Default=YES MaxTime=60 State=UP
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=8000 "
    "Gres=gpu:{gpus}"
)
TINY = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10")
WAIT_SECONDS = 280


@dataclass(frozen=True)
class SlurmCluster:
    """A running Slurm.

    Attributes:
        folder: Of its configuration, state and logs, and of the jobs' output.
    """

    folder: Path

    def command(self, *words: str) -> str:
        """Run one of Slurm's commands and return what it printed."""
        done = subprocess.run(
            words,
            cwd=CLONE,
            env={**environment(), "SLURM_CONF": str(self.folder / "slurm.conf")},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *words: str, size: Sequence[str] = (*TINY, "--nodes=2")) -> str:
        """Submit a job, and return its id.

        Args:
            words: Options of sbatch, the script and its arguments.
            size: Options that say which nodes it gets; by default one process on each node.
        """
        output = f"--output={self.folder}/%A_%a.log"
        return self.command("sbatch", "--parsable", output, *size, *words)

    def state(self, job: str) -> str:
        """Return the state of a job."""
        return self._facts(job)["JobState"]

    def exit_code(self, job: str) -> int:
        """Return the exit code of a job's script."""
        return int(self._facts(job)["ExitCode"].split(":")[0])

    def num_restarts(self, job: str) -> int:
        """Return how often a job was requeued."""
        return int(self._facts(job)["Restarts"])

    def log(self, job: str) -> str:
        """Return what a job has written."""
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{job}_*.log")))

    def wait(self, what: Callable[[], bool], job: str) -> None:
        """Wait until something holds."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not what():
            assert time.monotonic() < deadline, (
                f"job {job} is {self.state(job)}\n{self.log(job)[-4000:]}"
            )
            time.sleep(0.1)

    def wait_for_end(self, job: str) -> str:
        """Wait until a job has ended, and return its state."""
        self.wait(lambda: self.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), job)
        return self.state(job)

    def wait_for_requeue(self, job: str, num_restarts: int) -> None:
        """Wait until a job was requeued so often, and have it start without Slurm's pause."""
        self.wait(
            lambda: self.num_restarts(job) == num_restarts and self.state(job) == "PENDING", job
        )
        # A credential of the second in which the last one was revoked counts as revoked.
        time.sleep(2)
        self.command("scontrol", "update", f"jobid={job}", "StartTime=now")
        self.wait(lambda: self.state(job) == "RUNNING", job)

    def _facts(self, job: str) -> dict[str, str]:
        shown = self.command("scontrol", "show", "job", "--oneliner", job).splitlines()[0]
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Start Slurm in a folder, and stop all of its daemons when the block ends."""
    _write_configuration(folder)
    daemons: list[subprocess.Popen[bytes]] = []
    cluster = SlurmCluster(folder)
    with _resolved_names():
        try:
            configuration = ("-D", "-f", str(folder / "slurm.conf"))
            daemons.append(_start(folder, "slurmctld", *configuration))
            daemons += [_start(folder, "slurmd", *configuration, "-N", name) for name in NODES]
            _wait_for_nodes(cluster, daemons)
            yield cluster
        finally:
            try:
                _cancel_jobs(cluster, daemons)
            finally:
                _end(daemons)


def _cancel_jobs(cluster: SlurmCluster, daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    if not daemons or daemons[0].poll() is not None:
        return  # no controller would answer
    cluster.command("scancel", "--full", "--user=root")
    deadline = time.monotonic() + 60
    while cluster.command("squeue", "--noheader"):
        assert time.monotonic() < deadline, "a cancelled job does not end"
        time.sleep(0.2)


def _end(daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    for daemon in daemons:
        daemon.terminate()
    for daemon in daemons:
        try:
            daemon.wait(timeout=20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()


def _write_configuration(folder: Path) -> None:
    host = socket.gethostname().split(".")[0]
    nodes = [
        NODE.format(name=name, host=host, port=FIRST_NODE_PORT + index, gpus=NUM_GPUS)
        for index, name in enumerate(NODES)
    ]
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(
            host=host,
            controller_port=CONTROLLER_PORT,
            folder=folder,
            nodes="\n".join(nodes),
            names=",".join(NODES),
        )
    )
    devices = [folder / f"gpu{index}" for index in range(NUM_GPUS)]
    for device in devices:
        device.touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{NUM_GPUS - 1}]\n")


def _start(folder: Path, program: str, *words: str) -> subprocess.Popen[bytes]:
    # They end with this process, however it ends.
    with (folder / f"{program}.out").open("ab") as output:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "TERM", program, *words],
            env={**environment(), "SLURM_CONF": str(folder / "slurm.conf")},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def _wait_for_nodes(cluster: SlurmCluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + 60
    while True:
        ended = [each.args for each in daemons if each.poll() is not None]
        logs = "".join(path.read_text() for path in cluster.folder.glob("*.out"))
        assert not ended, f"{ended} ended: {logs}"
        try:
            states = cluster.command("sinfo", "--noheader", "--Node", "--format=%T").split()
        except AssertionError as error:  # the controller does not answer yet
            states = [str(error)]
        if states == ["idle"] * len(NODES):
            return
        assert time.monotonic() < deadline, f"{states}: {logs}"
        time.sleep(0.2)


@contextmanager
def _resolved_names() -> Iterator[None]:
    """Have the nodes' names resolve to this machine in the block."""
    before = HOSTS.read_text()
    line = f"127.0.0.1 {' '.join(NODES)}\n"
    if line in before:
        yield
        return
    # Rewritten in place: in a container the file is mounted and cannot be replaced.
    HOSTS.write_text(f"{before.rstrip()}\n{line}")
    try:
        yield
    finally:
        HOSTS.write_text(HOSTS.read_text().replace(line, ""))
