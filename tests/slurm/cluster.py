"""A real Slurm of three nodes inside this machine, thrown away after the tests.

    with Cluster(folder) as cluster:
        job = cluster.submit("slurm/cca_3b.sh", "--nodes=2", environment={"CCA_RECIPE": "digits"})
        state = cluster.wait(job, seconds=60)

Each node has its own network, host name, processes and shared memory (Linux namespaces), so that killing its first
process is a power cut: no process ends cleanly, no connection is closed. The files are shared, as on a cluster.
Needs root and Debian's slurmctld, slurmd, slurm-client, munge and iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.dist.ranks import REPOSITORY, clean_environment, free_port

NODES = {"h100": 2, "a100": 2, "a40": 4}  # name, which is also the GPU's type: pretended GPUs
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter", "setpriv")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
CONFIGURATION = Path(__file__).parent / "slurm.conf.template"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def missing() -> str | None:
    """Why a cluster cannot be started here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed: apt-get install slurmctld slurmd slurm-client munge iproute2"
    if os.geteuid() != 0:
        return "needs root"
    namespaces = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    if subprocess.run(namespaces, capture_output=True).returncode:
        return "the kernel allows no namespaces here"
    return None


class Cluster:
    """Three nodes, one partition. Leaving the `with` block ends everything that was started."""

    def __init__(self) -> None:
        # short: a socket's path has at most 107 characters
        self.folder = Path(tempfile.mkdtemp(prefix="cca-slurm-"))
        self.folder.chmod(0o755)
        self._mark = f"cca{os.getpid()}"  # of the network's names; 15 characters at most
        self._net = f"10.{64 + os.getpid() // 256 % 64}.{os.getpid() % 256}"
        self._daemons: dict[str, subprocess.Popen] = {}
        self.python = sys.executable
        self.environment = clean_environment({"SLURM_CONF": f"{self.folder}/slurm.conf", "CUDA_VISIBLE_DEVICES": ""})
        self.environment["PATH"] += os.pathsep + SYSTEM_PATH

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._network()
            munge = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
            self._start("munged", ["munged", "--foreground", f"--socket={self.folder}/munge.sock", *munge])
            self._until(lambda: (self.folder / "munge.sock").exists(), 10, "munged's socket")
            self._start("slurmctld", ["slurmctld", "-D", "-c"])
            for node in NODES:
                self.start_node(node)
            self._until(lambda: self.states() == dict.fromkeys(NODES, "idle"), 30, "all nodes to be idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for name in reversed(self._daemons):  # nodes first
            self._end(name)
        self._remove_network(self._mark)
        shutil.rmtree(self.folder, ignore_errors=True)

    def submit(self, script: str, *flags: str, environment: dict[str, str] | None = None,
               arguments: tuple[str, ...] = ()) -> int:  # fmt: skip
        """sbatch a script of the repository; the job's number."""
        command = ["sbatch", "--parsable", *flags, script, *arguments]
        return int(self.run(command, environment).split(";")[0])

    def run(self, command: list[str], environment: dict[str, str] | None = None) -> str:
        """A command of Slurm's, from the repository's root; its output."""
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**self.environment, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def states(self) -> dict[str, str]:
        """State of each node, e.g. idle, mixed, down*."""
        command = ["sinfo", "-h", "-N", "-o", "%N %t"]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return dict(line.split() for line in done.stdout.splitlines())

    def job(self, number: int) -> dict[str, str]:
        """What scontrol says of a job (of an array's or heterogeneous job's first part)."""
        text = self.run(["scontrol", "show", "job", "-o", str(number)]).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def job_states(self, number: int) -> set[str]:
        """States of all parts of a job."""
        lines = self.run(["scontrol", "show", "job", "-o", str(number)]).splitlines()
        return {word.split("=")[1] for line in lines for word in line.split() if word.startswith("JobState=")}

    def wait(self, number: int, seconds: float) -> set[str]:
        """Until all parts of the job have ended; their states."""
        self._until(lambda: self.job_states(number) <= ENDED, seconds, f"the end of job {number}", str(number))
        return self.job_states(number)

    def wait_for(self, condition, seconds: float, what: str, job: int) -> None:
        """Until `condition()` holds; the job's state is shown when it does not."""
        self._until(condition, seconds, what, str(job))

    def ranks_of(self, job: int, argument: str = "") -> list[int]:
        """Process numbers, as seen from outside the nodes, of the job's Python ranks (that have this argument)."""
        marks = {f"SLURM_CONF={self.folder}/slurm.conf".encode(), f"SLURM_JOB_ID={job}".encode()}
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                environment = set((process / "environ").read_bytes().split(b"\0"))
                command = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            in_step = any(variable.startswith(b"SLURM_STEP_ID=") for variable in environment)
            if marks <= environment and in_step and b"python" in command[0] and argument.encode() in [b"", *command]:
                found.append(int(process.name))
        return found

    def freeze(self, job: int) -> list[int]:
        """Stop the clock of the job's ranks, so that what follows meets them at this very place."""
        ranks = self.ranks_of(job)
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        return ranks

    def power_cut(self, node: str) -> None:
        """Everything on the node is gone at once."""
        self._end(f"node {node}")

    def start_node(self, node: str) -> None:
        """Switch a node on."""
        hosts, names = f"{self.folder}/hosts", f"{self.folder}/nsswitch.conf"
        # slurmd may die alone, its steps live on; what is left without a parent is reaped
        first_process = (
            f"hostname {node} && mount --bind {hosts} /etc/hosts && mount --bind {names} /etc/nsswitch.conf && "
            f"mount -t tmpfs -o mode=1777 tmpfs /dev/shm && {{ slurmd -D -N {node} & while :; do wait -n || "
            "sleep 0.2; done; }"
        )
        spaces = ["--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        inside = ["nsenter", f"--net=/run/netns/{self._mark}-{node}", "unshare", *spaces]
        self._start(f"node {node}", [*inside, "bash", "-c", first_process])

    def cut_network(self, node: str, cut: bool = True) -> None:
        """Nothing reaches the node and nothing leaves it, while its processes and the shared disk live on."""
        _ip("link", "set", f"{self._mark}v{list(NODES).index(node)}", "down" if cut else "up")

    def stop_controller(self) -> None:
        """slurmctld stops and writes down what it knows; nodes and jobs go on."""
        self._daemons["slurmctld"].terminate()
        self._daemons["slurmctld"].wait(60)

    def start_controller(self) -> None:
        """slurmctld comes back and remembers its jobs."""
        self._start("slurmctld", ["slurmctld", "-D"])

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failure's message."""
        return "\n".join(
            f"--- {path.name} ---\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def _configure(self) -> None:
        controller = socket.gethostname().split(".")[0]
        for name in ("state", *(f"{kind}.{node}" for kind in ("spool", "tmp") for node in NODES)):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(256))
        port = free_port()
        text = CONFIGURATION.read_text().format(
            controller=controller, address=f"{self._net}.1", port=port, folder=self.folder
        )
        hosts = [f"127.0.0.1 localhost\n{self._net}.1 {controller}\n"]
        gres = []
        (self.folder / "dev").mkdir()
        for i, (node, gpus) in enumerate(NODES.items()):
            address = f"{self._net}.{11 + i}"
            hosts.append(f"{address} {node}\n")
            devices = f"{self.folder}/dev/{node}-"
            for number in range(gpus):  # Slurm counts character devices only: twins of /dev/null
                os.mknod(f"{devices}{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            gres.append(f"NodeName={node} Name=gpu Type={node} File={devices}[0-{gpus - 1}]\n")
            text += (
                f"NodeName={node} NodeHostname={node} NodeAddr={address} Port={port + 1} CPUs=8 RealMemory=16000 "
                f"Gres=gpu:{node}:{gpus} Feature={node}\n"
            )
        text += "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20\n"
        text += "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF\n"
        names = [line for line in Path("/etc/nsswitch.conf").read_text().splitlines() if not line.startswith("hosts:")]
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text("".join(gres))
        (self.folder / "hosts").write_text("".join(hosts))
        # no name server: a reverse look-up would wait for an answer
        (self.folder / "nsswitch.conf").write_text("\n".join([*names, "hosts: files\n"]))

    def _network(self) -> None:
        for bridge in Path("/sys/class/net").glob("cca*b"):
            owner = bridge.name[3:-1]
            if owner.isdigit() and not Path(f"/proc/{owner}").exists():
                self._remove_network(f"cca{owner}")  # of tests that were killed
        bridge = f"{self._mark}b"
        _ip("link", "add", bridge, "type", "bridge", "forward_delay", "0")
        _ip("addr", "add", f"{self._net}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for i, node in enumerate(NODES):
            outer, space = f"{self._mark}v{i}", f"{self._mark}-{node}"
            _ip("netns", "add", space)
            _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", outer, "master", bridge, "up")
            _ip("-n", space, "addr", "add", f"{self._net}.{11 + i}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")

    def _remove_network(self, mark: str) -> None:
        for i, node in enumerate(NODES):
            _ip("link", "del", f"{mark}v{i}", check=False)
            _ip("netns", "del", f"{mark}-{node}", check=False)
        _ip("link", "del", f"{mark}b", check=False)

    def _start(self, name: str, command: list[str]) -> None:
        log = open(self.folder / f"{name.replace(' ', '-')}.log", "ab")  # noqa: SIM115 - closed below
        self._daemons[name] = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],  # nothing outlives the tests, whatever ends them
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log.close()

    def _end(self, name: str) -> None:
        daemon = self._daemons[name]
        if daemon.poll() is None:
            # a node's is unshare's process: with it goes the first process inside, and with that all others
            os.kill(daemon.pid, signal.SIGKILL)
        daemon.wait()

    def _until(self, condition, seconds: float, what: str, job: str = "") -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                shown = self.run(["scontrol", "show", "job", "-d", job]) if job else ""
                raise AssertionError(f"waited {seconds} s for {what}\n{shown}\n{self.states()}\n{self.logs()}")
            time.sleep(0.2)


def _ip(*words: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, env={"PATH": SYSTEM_PATH})
    assert not check or done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
