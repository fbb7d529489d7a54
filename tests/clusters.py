"""Clusters whose processes all run on this machine."""

import contextlib
import json
import os
import subprocess

from support.local_cluster import free_ports
from tests import harness, reference

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

    def start(self, *flags, names=None, before=''):
        """Starts all processes or some; `before` is code, or a dict of name -> code."""
        common = [f'--data_dir={self._data_dir}', '--batch_size=8', '--log_frequency=1']
        for name in names or self.names:
            # Only the chief may write there.
            train_dir = self.train_dir if name == CHIEF else '/dev/null/none'
            config = f'import os; os.environ["TF_CONFIG"] = {config_of(self.jobs, name)!r}\n'
            code = config + (before if isinstance(before, str) else before.get(name, ''))
            own = [f'--train_dir={train_dir}', *flags]
            self.scripts[name] = self._start(DISTRIBUTED, *common, *own, before=code)
        return self

    def statuses(self):
        """Dict of name -> exit status. When the chief has ended, the others soon do."""
        self[CHIEF].wait()
        return {name: script.wait(harness.AT_ONCE) for name, script in self.scripts.items()}

    def output(self):
        return {name: script.stdout + script.stderr for name, script in self.scripts.items()}

    def assert_lost(self, lost, timeout=harness.AT_ONCE):
        """All but one process end with 138 and name the lost one."""
        for name in set(self.scripts) - {lost}:
            assert self[name].wait(timeout) == 138, self.output()
            (error,) = self[name].errors
            assert error.lower().startswith(f'{lost} ({self.addresses[lost]}) is lost')

    def assert_finished(self, step):
        assert self.statuses() == dict.fromkeys(self.names, 0), self.output()
        assert f'model.ckpt-{step}' in self[CHIEF].lines[-1]
        assert self.check()[0] == step

    def check(self):
        """Reads the newest checkpoint, which has to be complete. Returns its step and values."""
        step = harness.saved_steps(self.train_dir)[-1]
        values = reference.read_checkpoint(f'{self.train_dir}/model.ckpt-{step}')
        assert sorted(values) == reference.CHECKPOINT_NAMES and values['global_step'] == step
        return step, values

    def kill(self):
        for script in self.scripts.values():
            script.kill()


def _shell(commands):
    subprocess.run(['sh', '-ec', commands], stderr=subprocess.DEVNULL, check=True)


class Network(contextlib.ExitStack):
    """Linux network namespaces on one bridge. Raises CalledProcessError without root."""

    def __init__(self, number):
        super().__init__()
        bridge = f'c{os.getpid() % 100000}'
        self._machines = [f'{bridge}n{i}' for i in range(number)]
        self.addresses = [f'10.231.77.{i + 1}' for i in range(number)]
        add = f'ip link add {bridge} type bridge; ip link set {bridge} up'
        remove = f'set +e; ip link del {bridge}'
        for name, address in zip(self._machines, self.addresses):
            veth = f'ip link add {name} type veth peer name eth0 netns {name}'
            add += f'; ip netns add {name}; {veth}'
            add += f'; ip link set {name} up master {bridge}; ip -n {name} link set lo up'
            add += f'; ip -n {name} addr add {address}/24 dev eth0; ip -n {name} link set eth0 up'
            remove += f'; ip link del {name}; ip netns del {name}'
        _shell(f"trap '{remove}' EXIT; {add}; trap - EXIT")
        self.callback(_shell, f'{remove}; true')

    def enter(self, i):
        """Code that moves a process to machine i."""
        setns = f'setns(os.open("/var/run/netns/{self._machines[i]}", os.O_RDONLY), 0x40000000)'
        return f'import ctypes, os; assert ctypes.CDLL(None).{setns} == 0\n'

    def cut(self, i):
        """Drops everything to and from machine i, although its link stays up."""
        _shell(f'ip link set {self._machines[i]} nomaster')

    def limit(self, mbits):
        """Limits what each machine sends and what it receives to that many Mbit/s."""
        bucket = f'root tbf rate {mbits}mbit burst 128kb latency 400ms'
        for name in self._machines:
            _shell(f'tc -n {name} qdisc add dev eth0 {bucket}; tc qdisc add dev {name} {bucket}')

    def bytes_sent_and_received(self, i):
        folder = f'/sys/class/net/{self._machines[i]}/statistics'
        return [int(harness.read(f'{folder}/{name}')) for name in ('rx_bytes', 'tx_bytes')]
