"""A real Slurm cluster on this machine: a controller, and nodes with their own names, addresses and process tables.

Each node lives in a network namespace on one bridge, so that traffic between ranks crosses a network, and in its own
PID, UTS, IPC and mount namespaces, so that killing its first process is a power failure.  Everything lies in one folder
and under names of its own; nothing of an installed Slurm's configuration is touched.  Needs root and Debian's packages
slurmctld, slurmd, slurm-client, munge, iproute2.  However this process ends, the cluster ends with it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PROGRAMS = ('slurmctld', 'slurmd', 'sbatch', 'munged', 'ip', 'unshare', 'nsenter', 'setpriv')
SEARCH = f'{os.environ["PATH"]}:/usr/sbin:/sbin'
BRIDGE, NETWORK, LOCK = 'tpmpibr', '10.77.1', '/run/tpmpi-slurm.lock'
# our names only: what a run left that was killed, and what this one leaves
SWEEP = '''
for space in $(ip netns list | grep -oE '^tpmpi-node[0-9]+'); do ip netns del "$space"; done
for link in $(ip -o link show | grep -oE ' tpmpi(br|[0-9]+)[@:]' | tr -d ' @:'); do ip link del "$link"; done 2>/dev/null
true'''
UNFINISHED = {'PENDING', 'CONFIGURING', 'RUNNING', 'SUSPENDED', 'STOPPED', 'SIGNALING', 'COMPLETING', 'REQUEUED'}
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
    absent = [p for p in PROGRAMS if shutil.which(p, path=SEARCH) is None]
    if absent:
        return f'not installed: {", ".join(absent)} (Debian: slurmctld slurmd slurm-client munge iproute2)'
    # in a network of its own, so that nothing of this machine changes
    probe = subprocess.run(['unshare', '--net', '--uts', '--ipc', '--pid', '--mount', '--fork', '--mount-proc', 'ip', 'link',
                            'add', BRIDGE, 'type', 'bridge'], capture_output=True, text=True, env=os.environ | {'PATH': SEARCH})
    return f'no namespaces or bridges here: {probe.stderr.strip()}' if probe.returncode else None


class Cluster:
    """Start with `with Cluster(folder) as cluster`.  One at a time on a machine: a second one waits for the first."""

    def __init__(self, base: Path, nodes: int = 2, cpus: int = 2, gpus: int = 2):
        self.base, self.names, self.cpus, self.gpus = base, [f'node{i + 1}' for i in range(nodes)], cpus, gpus
        self.env = os.environ | {'SLURM_CONF': str(base / 'slurm.conf'), 'PATH': SEARCH}
        self.processes: dict[str, subprocess.Popen] = {}
        self._sweeper: subprocess.Popen | None = None

    def run(self, *command, check: bool = True, **options) -> subprocess.CompletedProcess:
        """A command with this cluster's configuration."""
        options = {'capture_output': True, 'text': True, 'timeout': 60, 'env': self.env} | options
        done = subprocess.run([str(c) for c in command], **options)
        if check and done.returncode != 0:
            raise RuntimeError(f'{" ".join(map(str, command))}: {done.stdout}{done.stderr}')
        return done

    # ---- start and end

    def __enter__(self):
        try:
            self._reserve()
            self._configure()
            self._connect()
            self._spawn('munged', 'munged', '--force', '--foreground', '--key-file', self.base / 'munge.key',
                        '--socket', self.base / 'munge.socket', '--pid-file', self.base / 'munge.pid',
                        '--log-file', self.base / 'munge.log', '--seed-file', self.base / 'munge.seed')
            self._wait((self.base / 'munge.socket').exists, 'munged')
            self._spawn('slurmctld', 'slurmctld', '-D', '-f', self.base / 'slurm.conf')
            for name in self.names:
                self._start(name)
            self._wait(lambda: self.state() == ['idle'] * len(self.names), 'the nodes')
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in [*self.names, 'slurmctld', 'munged']:
            self.power_off(name)
        if self._sweeper:
            self._sweeper.stdin.close()
            self._sweeper.wait(60)

    def _reserve(self, seconds: float = 600):
        """Take the machine, and start the process that tidies up once this one is gone or closes its pipe."""
        with open(LOCK, 'w') as lock:
            deadline = time.monotonic() + seconds
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f'another cluster of tpmpi has held {LOCK} for {seconds:.0f} s') from None
                    time.sleep(0.5)
            # it inherits the lock, which so outlives this process until everything is tidy
            self._sweeper = subprocess.Popen(['sh', '-c', f'{SWEEP}; echo; read -r line; {SWEEP}'], stdin=subprocess.PIPE,
                                             stdout=subprocess.PIPE, env=self.env, pass_fds=[lock.fileno()],
                                             start_new_session=True)
        with self._sweeper.stdout:
            self._sweeper.stdout.readline()

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
        with open(self.base / f'{name}.out', 'ab') as out:  # the kernel ends it with this process, even a killed one
            self.processes[name] = subprocess.Popen(['setpriv', '--pdeathsig', 'KILL', *map(str, command)], env=self.env,
                                                    stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)

    def _start(self, name: str):
        """A node's first process is a shell that reaps orphans and outlives slurmd."""
        start = (f'hostname {name}; mount -t tmpfs tmpfs /dev/shm; mount --bind {self.base}/hosts /etc/hosts; '
                 f'slurmd -N {name} -D -f {self.base}/slurm.conf & wait $!; while :; do sleep 3600 & wait; done')
        self._spawn(name, 'nsenter', f'--net=/run/netns/tpmpi-{name}', '--', 'unshare', '--uts', '--ipc', '--pid', '--mount',
                    '--fork', '--mount-proc', '--kill-child', 'bash', '-c', start)

    def _wait(self, ready: Callable[[], bool], what: str, seconds: float = 60):
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                logs = ''.join(p.read_text(errors='replace')[-2000:] for p in self.base.glob('*.out'))
                raise TimeoutError(f'{what}: not after {seconds} s; nodes {self.state()}\n{logs}')
            time.sleep(0.1)

    # ---- nodes

    def power_off(self, name: str):
        """End a node at once with all its processes, or a daemon."""
        process = self.processes.pop(name, None)
        if process is not None:
            process.send_signal(signal.SIGKILL if name in self.names else signal.SIGTERM)
            process.wait(20)

    def power_on(self, name: str, seconds: float = 60):
        """Start a node that is off, and wait until it takes jobs."""
        def started():
            return self.run('scontrol', 'show', 'node', name).stdout.partition('SlurmdStartTime=')[2].split()[0]
        before = started()  # the controller may not have noticed yet that it was off, and counts in seconds
        time.sleep(1)
        self._start(name)
        up = ('idle', 'mix', 'alloc')
        self._wait(lambda: started() != before and self.state()[self.names.index(name)] in up, name, seconds)

    def state(self) -> list[str]:
        """The state of each node: idle, mix, alloc, comp, down; with a * where the node does not answer."""
        return self.run('sinfo', '--noheader', '--Node', '--format', '%t', check=False).stdout.split()

    def commands(self, name: str) -> list[str]:
        """The command lines of a node's processes."""
        lines, space = [], os.readlink(f'/proc/{self.processes[name].pid}/ns/pid_for_children')
        for process in Path('/proc').glob('[0-9]*'):
            try:
                if os.readlink(process / 'ns/pid') == space:
                    lines.append((process / 'cmdline').read_bytes().replace(b'\0', b' ').decode(errors='replace').strip())
            except OSError:
                continue  # it ended meanwhile
        return [line for line in lines if line]  # a zombie has none

    # ---- jobs

    def submit(self, *arguments, cwd: Path, env: dict[str, str] | None = None) -> str:
        """sbatch; returns the job's number."""
        return self.run('sbatch', '--parsable', *arguments, cwd=cwd, env=self.env | (env or {})).stdout.strip()

    def jobs(self, number: str) -> list[dict[str, str]]:
        """What scontrol knows of a job, of one task of an array ('12_3'), or of all its tasks ('12')."""
        records = self.run('scontrol', '--oneliner', 'show', 'job', number).stdout.splitlines()
        return [dict(part.split('=', 1) for part in record.split() if '=' in part) for record in records if record]

    def job(self, number: str) -> dict[str, str]:
        """What scontrol knows of a job or of one task of an array."""
        return self.jobs(number)[0]

    def finish(self, number: str, seconds: float = 120) -> dict[str, str]:
        """Wait for the end of a job, or of all tasks of an array."""
        self._until(number, lambda state: state not in UNFINISHED, 'the end', seconds)
        return self.job(number)

    def wait_state(self, number: str, states: str | Iterable[str], seconds: float = 60) -> dict[str, str]:
        """Wait until a job, or all tasks of an array, are in one of the states ('RUNNING')."""
        states = {states} if isinstance(states, str) else set(states)
        self._until(number, states.__contains__, '/'.join(sorted(states)), seconds)
        return self.job(number)

    def _until(self, number: str, reached: Callable[[str], bool], what: str, seconds: float):
        deadline = time.monotonic() + seconds
        while not all(reached(job['JobState']) for job in self.jobs(number)):
            if time.monotonic() > deadline:
                now = ', '.join(f'{job["JobState"]} ({job.get("Reason")})' for job in self.jobs(number))
                raise TimeoutError(f'job {number} is {now} after {seconds} s, not at {what}')
            time.sleep(0.1)

    def cancel(self, number: str):
        """scancel; a job that has ended is no error."""
        self.run('scancel', number, check=False)

    def signal(self, number: str, name: str, batch: bool = False):
        """Send a signal to the ranks, or to the batch shell alone: what `--signal=B:NAME@SECONDS` does, but now.

        Slurm looks for time limits every 30 s only, so that its own warning comes up to half a minute early or late.
        """
        self.run('scancel', f'--signal={name}', *(['--batch'] if batch else []), number)

    def requeue(self, number: str, seconds: float = 60) -> dict[str, str]:
        """scontrol requeue, and wait until the job runs again.

        Slurm holds it back for the life of a credential (`cred_expire`, 5 s here, 120 by default); this waits for 2 s only.
        """
        before = int(self.job(number)['Restarts'])
        self.run('scontrol', 'requeue', number)
        # a node refuses a start in the second of the requeue, or before: 'Job credential revoked'
        start = time.monotonic()
        while (job := self.job(number))['JobState'] != 'RUNNING' or int(job['Restarts']) == before:
            if time.monotonic() > start + seconds or job['JobState'] not in UNFINISHED:
                raise TimeoutError(f'job {number} is {job["JobState"]} ({job.get("Reason")}), not RUNNING, after its requeue')
            if job['JobState'] == 'PENDING' and job['Reason'] == 'BeginTime' and time.monotonic() > start + 2:
                self.run('scontrol', 'update', f'JobId={number}', 'StartTime=now', check=False)  # it may just have started
            time.sleep(0.2)
        return job

    def output(self, folder: Path, number: str) -> tuple[str, str]:
        """A job's standard output and standard error so far: files named *-<number>.out and .err, '' without one."""
        return tuple(''.join(path.read_text(errors='replace') for path in folder.glob(f'*-{number}.{kind}'))
                     for kind in ('out', 'err'))
