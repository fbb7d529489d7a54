"""Clusters whose processes all run on this machine: for the tests, the soak test, the benchmark."""

import json
import os
import subprocess

from support.local_cluster import free_ports
from tests import harness
from tests import reference

DISTRIBUTED = 'cifar10_distributed_train.py'
CHIEF, WORKER = 'chief', 'worker 0'


def config_of(jobs, name):
    """The TF_CONFIG of a task, such as 'worker 0'."""
    job, _, index = name.partition(' ')
    return json.dumps({'cluster': jobs, 'task': {'type': job, 'index': int(index or 0)}})


class Cluster:
    """The processes of a cluster, by name. start() starts them, also once more."""

    def __init__(self, start, data_dir, train_dir, workers=1, hosts=None):
        self._start, self._data_dir, self.train_dir = start, str(data_dir), str(train_dir)
        self.names = [CHIEF] + [f'worker {i}' for i in range(workers)]
        hosts = hosts or ['127.0.0.1'] * len(self.names)
        addresses = [f'{host}:{port}' for host, port in zip(hosts, free_ports(len(hosts)))]
        self.addresses = dict(zip(self.names, addresses))
        self.jobs = {'chief': addresses[:1], 'worker': addresses[1:]}
        self.scripts = {}

    def __getitem__(self, name):
        return self.scripts[name]

    def start(self, *flags, names=None, data_dirs=None, before=''):
        """Starts the processes, all or some.

        Args:
          data_dirs: dict of name -> folder, for the processes with another one.
          before: code as for harness.Starter, or a dict of name -> code.
        """
        for name in names or self.names:
            code = before.get(name, '') if isinstance(before, dict) else before
            config = config_of(self.jobs, name)
            folder = (data_dirs or {}).get(name, self._data_dir)
            self.scripts[name] = self._start(
                DISTRIBUTED,
                f'--data_dir={folder}',
                # Only the chief may write there.
                f'--train_dir={self.train_dir if name == CHIEF else "/dev/null/none"}',
                '--batch_size=8',
                '--log_frequency=1',
                *flags,
                before=f'import os; os.environ["TF_CONFIG"] = {config!r}\n{code}',
            )
        return self

    def statuses(self):
        """Dict of name -> exit status. When the chief has ended, the others soon do."""
        self[CHIEF].wait()
        return {name: script.wait(harness.AT_ONCE) for name, script in self.scripts.items()}

    def output(self):
        return {name: script.stdout + script.stderr for name, script in self.scripts.items()}

    def assert_lost(self, lost, timeout=harness.AT_ONCE):
        """All but one process end with 138 and name the lost one."""
        for name in set(self.names) & set(self.scripts) - {lost}:
            assert self[name].wait(timeout) == 138, self.output()
            (error,) = self[name].errors
            assert error.lower().startswith(f'{lost} ({self.addresses[lost]}) is lost')

    def assert_finished(self, step):
        assert self.statuses() == dict.fromkeys(self.names, 0), self.output()
        assert f'model.ckpt-{step}' in self[CHIEF].lines[-1]
        self.check(step)

    def check(self, step=None):
        """Reads the newest checkpoint, which has to be complete. Returns its step and values."""
        step = harness.saved_steps(self.train_dir)[-1] if step is None else step
        values = reference.read_checkpoint(f'{self.train_dir}/model.ckpt-{step}')
        assert sorted(values) == reference.CHECKPOINT_NAMES
        assert values['global_step'] == step
        return step, values

    def kill(self):
        for script in self.scripts.values():
            script.kill()


# --- Networks -------------------------------------------------------------------

_BRIDGE = 'ip link add {tag} type bridge && ip link set {tag} up'
_MACHINE = '''
ip netns add {machine}
ip link add {machine} type veth peer name eth0 netns {machine}
ip link set {machine} up master {tag}
ip -n {machine} link set lo up
ip -n {machine} link set eth0 up
ip -n {machine} addr add {address}/24 dev eth0
'''

# Code to run before a script, to move its process to a machine.
_ENTER = '''
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.setns(os.open("/var/run/netns/%s", os.O_RDONLY), 0x40000000):
    raise OSError(ctypes.get_errno(), "setns")
'''


def _shell(commands):
    subprocess.run(['sh', '-ec', commands], stderr=subprocess.DEVNULL, check=True)


class Network:
    """Machines on one bridge: Linux network namespaces, each with its own address.

    Raises subprocess.CalledProcessError where that is not possible; needs root.
    """

    def __init__(self, number):
        self._tag = f'c{os.getpid() % 100000}'
        self._machines = [f'{self._tag}n{i}' for i in range(number)]
        self.addresses = [f'10.231.77.{i + 1}' for i in range(number)]
        try:
            _shell(_BRIDGE.format(tag=self._tag))
            for machine, address in zip(self._machines, self.addresses):
                _shell(_MACHINE.format(tag=self._tag, machine=machine, address=address))
        except subprocess.CalledProcessError:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for machine in self._machines:
            _shell(f'ip link del {machine} || true; ip netns del {machine} || true')
        _shell(f'ip link del {self._tag} || true')

    def enter(self, i):
        """Code that moves a process to machine i."""
        return _ENTER % self._machines[i]

    def cut(self, i):
        """Drops everything to and from machine i, although its link stays up."""
        _shell(f'ip link set {self._machines[i]} nomaster')

    def repair(self, i):
        _shell(f'ip link set {self._machines[i]} master {self._tag}')

    def limit(self, mbits):
        """Limits what each machine sends and what it receives to that many Mbit/s."""
        bucket = f'root tbf rate {mbits}mbit burst 128kb latency 400ms'
        for machine in self._machines:
            _shell(f'tc -n {machine} qdisc add dev eth0 {bucket}')
            _shell(f'tc qdisc add dev {machine} {bucket}')

    def bytes_sent_and_received(self, i):
        folder = f'/sys/class/net/{self._machines[i]}/statistics'
        return [int(harness.read(f'{folder}/{name}')) for name in ('rx_bytes', 'tx_bytes')]
