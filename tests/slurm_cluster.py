"""A real Slurm cluster on this machine: a controller, and nodes with their own names, addresses and process tables.

Each node lives in a network namespace on one bridge, so that traffic between ranks crosses a network, and in its own
PID, UTS, IPC and mount namespaces, so that killing its first process is a power failure.  Everything lies in one folder
and under names of its own; nothing of an installed Slurm's configuration is touched.  Needs root and Debian's packages
slurmctld, slurmd, slurm-client, munge, iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ('slurmctld', 'slurmd', 'sbatch', 'munged', 'ip', 'unshare', 'nsenter')
BRIDGE, NETWORK = 'tpmpibr', '10.77.1'
CONFIGURATION = '''\
ClusterName=tpmpi
SlurmctldHost={host}({network}.254)
SlurmctldPort=6827
SlurmdPort=6828
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={base}/munge.socket,cred_expire=5
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool-%n
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd-%n.pid
SlurmctldLogFile={base}/slurmctld.log
SlurmdLogFile={base}/slurmd-%n.log
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
ReturnToService=2
JobRequeue=1
SchedulerParameters=sched_min_interval=100000,bf_interval=5,batch_sched_delay=0
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
'''


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.getuid() != 0:
        return 'a Slurm cluster in namespaces needs root'
    absent = [p for p in PROGRAMS if shutil.which(p, path=os.environ['PATH'] + ':/usr/sbin:/sbin') is None]
    return f'not installed: {", ".join(absent)} (Debian: slurmctld slurmd slurm-client munge iproute2)' if absent else None


class Cluster:
    """Start with `with Cluster(folder) as cluster`; it is gone at the end, whatever happened."""

    def __init__(self, base: Path, nodes: int = 2, cpus: int = 2, gpus: int = 2):
        self.base, self.names, self.cpus, self.gpus = base, [f'node{i + 1}' for i in range(nodes)], cpus, gpus
        self.env = os.environ | {'SLURM_CONF': str(base / 'slurm.conf'), 'PATH': os.environ['PATH'] + ':/usr/sbin:/sbin'}
        self.processes: dict[str, subprocess.Popen] = {}

    def run(self, *command, check: bool = True, **options) -> subprocess.CompletedProcess:
        """A command with this cluster's configuration."""
        options = {'capture_output': True, 'text': True, 'timeout': 60, 'env': self.env} | options
        done = subprocess.run([str(c) for c in command], **options)
        if check and done.returncode != 0:
            raise RuntimeError(f'{" ".join(map(str, command))}: {done.stdout}{done.stderr}')
        return done

    def __enter__(self):
        try:
            self._configure()
            self._connect()
            self._spawn('munged', 'munged', '--force', '--foreground', '--key-file', self.base / 'munge.key',
                        '--socket', self.base / 'munge.socket', '--pid-file', self.base / 'munge.pid',
                        '--log-file', self.base / 'munge.log', '--seed-file', self.base / 'munge.seed')
            self._wait(lambda: (self.base / 'munge.socket').exists(), 'munged')
            self._spawn('slurmctld', 'slurmctld', '-D', '-f', self.base / 'slurm.conf')
            for name in self.names:
                self.power_on(name)
            self._wait(lambda: self.state().count('idle') == len(self.names), 'the nodes')
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if (self.base / 'slurm.conf').exists():
            self.run('scancel', '--user', 'root', check=False)
        for name in [*self.names, 'slurmctld', 'munged']:
            self.power_off(name)
        for name in self.names:
            self.run('ip', 'netns', 'del', f'tpmpi-{name}', check=False)
        self.run('ip', 'link', 'del', BRIDGE, check=False)

    def _configure(self):
        (self.base / 'state').mkdir()
        key = self.base / 'munge.key'
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        for i in range(self.gpus):
            os.mknod(self.base / f'nvidia{i}', 0o666 | 0o020000, os.makedev(1, 3))  # null devices: enough for scheduling
        nodes = '\n'.join(f'NodeName={name} NodeAddr={NETWORK}.{i + 1} CPUs={self.cpus} RealMemory=4000 '
                          f'Gres=gpu:{self.gpus} State=UNKNOWN' for i, name in enumerate(self.names))
        (self.base / 'slurm.conf').write_text(CONFIGURATION.format(
            host=socket.gethostname().split('.')[0], network=NETWORK, base=self.base, nodes=nodes))
        (self.base / 'gres.conf').write_text(
            f'NodeName=node[1-{len(self.names)}] Name=gpu File={self.base}/nvidia[0-{self.gpus - 1}]\n')
        hosts = ''.join(f'{NETWORK}.{i + 1} {name}\n' for i, name in enumerate(self.names))
        (self.base / 'hosts').write_text(Path('/etc/hosts').read_text() + hosts)
        self.base.chmod(0o755)

    def _connect(self):
        """One bridge, and for each node a namespace with an interface on it."""
        self.run('ip', 'link', 'add', BRIDGE, 'type', 'bridge')
        self.run('ip', 'addr', 'add', f'{NETWORK}.254/24', 'dev', BRIDGE)
        self.run('ip', 'link', 'set', BRIDGE, 'up')
        for i, name in enumerate(self.names):
            space = f'tpmpi-{name}'
            self.run('ip', 'netns', 'add', space)
            self.run('ip', 'link', 'add', f'tpmpi{i}', 'type', 'veth', 'peer', 'name', 'eth0', 'netns', space)
            self.run('ip', 'link', 'set', f'tpmpi{i}', 'master', BRIDGE, 'up')
            self.run('ip', '-n', space, 'link', 'set', 'lo', 'up')
            self.run('ip', '-n', space, 'addr', 'add', f'{NETWORK}.{i + 1}/24', 'dev', 'eth0')
            self.run('ip', '-n', space, 'link', 'set', 'eth0', 'up')
            self.run('ip', '-n', space, 'route', 'add', 'default', 'via', f'{NETWORK}.254')

    def _spawn(self, name: str, *command):
        with open(self.base / f'{name}.out', 'ab') as out:
            self.processes[name] = subprocess.Popen([str(c) for c in command], stdin=subprocess.DEVNULL, stdout=out,
                                                    stderr=out, env=self.env, start_new_session=True)

    def power_on(self, name: str):
        """Start a node.  Its first process is a shell that reaps orphans and outlives slurmd."""
        start = (f'hostname {name}; mount -t tmpfs tmpfs /dev/shm; mount --bind {self.base}/hosts /etc/hosts; '
                 f'slurmd -N {name} -D -f {self.base}/slurm.conf & wait $!; while :; do sleep 3600 & wait; done')
        self._spawn(name, 'nsenter', f'--net=/run/netns/tpmpi-{name}', '--', 'unshare', '--uts', '--ipc', '--pid', '--mount',
                    '--fork', '--mount-proc', '--kill-child', 'bash', '-c', start)

    def power_off(self, name: str):
        """End a node at once with all its processes, or a daemon."""
        process = self.processes.pop(name, None)
        if process is not None:
            process.send_signal(signal.SIGKILL if name.startswith('node') else signal.SIGTERM)
            process.wait(20)

    def state(self) -> list[str]:
        """The state of each node."""
        return self.run('sinfo', '--noheader', '--Node', '--format', '%t', check=False).stdout.split()

    def _wait(self, ready, what: str, seconds: float = 60):
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                logs = ''.join(p.read_text(errors='replace')[-2000:] for p in self.base.glob('*.out'))
                raise RuntimeError(f'{what} did not come up in {seconds} s: {self.state()}\n{logs}')
            time.sleep(0.2)

    # ---- jobs

    def submit(self, *arguments, cwd: Path, env: dict[str, str] | None = None) -> str:
        """sbatch; returns the job's number."""
        return self.run('sbatch', '--parsable', *arguments, cwd=cwd, env=self.env | (env or {})).stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows of a job."""
        text = self.run('scontrol', 'show', 'job', number).stdout
        return dict(part.split('=', 1) for part in text.split() if '=' in part)

    def finish(self, number: str, seconds: float = 120) -> dict[str, str]:
        """Wait for the end of a job."""
        deadline = time.monotonic() + seconds
        while (job := self.job(number))['JobState'] in ('PENDING', 'RUNNING', 'COMPLETING', 'CONFIGURING'):
            if time.monotonic() > deadline:
                raise TimeoutError(f'job {number} is still {job["JobState"]} ({job.get("Reason")}) after {seconds} s')
            time.sleep(0.2)
        return job
