"""The processes of a cluster, all on this machine: shared by the tests and the soak test."""

import json
import os
import re
import subprocess

from support.local_cluster import free_ports
from tests import harness
from tests import reference

DISTRIBUTED = 'cifar10_distributed_train.py'
CHIEF, WORKER, PS = 'chief', 'worker 0', 'ps 0'


def config_of(jobs, name):
    job, _, index = name.partition(' ')
    return json.dumps({'cluster': jobs, 'task': {'type': job, 'index': int(index or 0)}})


class Cluster:
    """The processes of one cluster, by name. start() starts them (again)."""

    def __init__(self, start, data_dir, train_dir, workers=1, ps=0, hosts=None):
        self._start, self._data_dir, self.train_dir = start, str(data_dir), str(train_dir)
        self.names = [CHIEF] + [f'worker {i}' for i in range(workers)]
        self.names += [f'ps {i}' for i in range(ps)]
        ports = free_ports(len(self.names))
        hosts = hosts or ['127.0.0.1'] * len(ports)
        self.addresses = [f'{host}:{port}' for host, port in zip(hosts, ports)]
        self.jobs = {}
        for name, address in zip(self.names, self.addresses):
            self.jobs.setdefault(name.partition(' ')[0], []).append(address)
        self.scripts = {}

    def __getitem__(self, name):
        return self.scripts[name]

    def start(self, *flags, names=None, data_dirs=None, before=''):
        """Starts the processes, all or some.

        Args:
          data_dirs: dict of name -> folder, where it is not the same as for all.
          before: as for harness.Starter; or a dict of name -> such code.
        """
        for name in names or self.names:
            code = before.get(name, '') if isinstance(before, dict) else before
            config = config_of(self.jobs, name)
            folder = (data_dirs or {}).get(name, self._data_dir)
            self.scripts[name] = self._start(
                DISTRIBUTED,
                f'--data_dir={folder}',
                # Nobody but the chief may write there.
                f'--train_dir={self.train_dir if name == CHIEF else "/dev/null/none"}',
                '--batch_size=8',
                '--log_frequency=1',
                *flags,
                before=f'import os; os.environ["TF_CONFIG"] = {config!r}\n{code}',
            )
        return self

    def statuses(self):
        """Dict of name -> exit status; once the chief has ended, the others do so at once."""
        self[CHIEF].wait()
        return {name: script.wait(harness.AT_ONCE) for name, script in self.scripts.items()}

    def assert_lost(self, lost):
        """All but one end with 138 and name the lost one."""
        for name, script in self.scripts.items():
            if name != lost:
                assert script.wait(harness.AT_ONCE) == 138, (name, script.stdout, script.stderr)
                address = self.addresses[self.names.index(lost)]
                pattern = re.escape(f'{lost} ({address}) is lost')
                (error,) = script.errors
                assert re.match(pattern, error, re.IGNORECASE), (name, error)

    def assert_finished(self, step):
        assert self.statuses() == dict.fromkeys(self.names, 0), self.said()
        assert self[CHIEF].lines[-1] == (
            f'Finished at step {step}. Saved {self.train_dir}/model.ckpt-{step}.'
        )
        self.check(step)

    def said(self):
        return {name: script.stdout + script.stderr for name, script in self.scripts.items()}

    def check(self, step=None):
        """The newest checkpoint is complete. Returns its step and values."""
        step = harness.saved_steps(self.train_dir)[-1] if step is None else step
        values = reference.read_checkpoint(f'{self.train_dir}/model.ckpt-{step}')
        assert sorted(values) == reference.CHECKPOINT_NAMES
        assert values['global_step'] == step
        return step, values

    def kill(self):
        for script in self.scripts.values():
            script.kill()


# --- Networks ---------------------------------------------------------------------

# To be run before a script: it lives in this namespace.
_ENTER = '''
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
if libc.setns(os.open("/var/run/netns/%s", os.O_RDONLY), 0x40000000):
    raise OSError(ctypes.get_errno(), "setns")
'''


def _ip(*args):
    subprocess.check_call(['ip', *args], stderr=subprocess.DEVNULL)


class Network:
    """Machines, each a network namespace of Linux with an address of its own, on one bridge.

    Raises OSError or subprocess.CalledProcessError where there can be none; needs root.
    """

    def __init__(self, number):
        self._tag = f'c{os.getpid() % 100000}'
        self.addresses = [f'10.231.77.{i + 1}' for i in range(number)]
        try:
            _ip('link', 'add', f'{self._tag}br', 'type', 'bridge')
            _ip('link', 'set', f'{self._tag}br', 'up')
            for i, address in enumerate(self.addresses):
                _ip('netns', 'add', self._namespace(i))
                pair = ['type', 'veth', 'peer', 'name', 'eth0', 'netns', self._namespace(i)]
                _ip('link', 'add', self._port(i), *pair)
                _ip('link', 'set', self._port(i), 'up')
                self.mend(i)
                for device in 'lo', 'eth0':
                    _ip('-n', self._namespace(i), 'link', 'set', device, 'up')
                _ip('-n', self._namespace(i), 'addr', 'add', f'{address}/24', 'dev', 'eth0')
        except (OSError, subprocess.CalledProcessError):
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        numbers = range(len(self.addresses))
        commands = [['link', 'del', self._port(i)] for i in numbers]
        commands += [['netns', 'del', self._namespace(i)] for i in numbers]
        for command in commands + [['link', 'del', f'{self._tag}br']]:
            try:
                subprocess.call(['ip', *command], stderr=subprocess.DEVNULL)
            except OSError:
                return

    def _namespace(self, i):
        return f'{self._tag}n{i}'

    def _port(self, i):
        return f'{self._tag}p{i}'

    def enter(self, i):
        """Code that moves a process to machine i."""
        return _ENTER % self._namespace(i)

    def cut(self, i):
        """No link goes down, but nothing comes through to machine i nor from it."""
        _ip('link', 'set', self._port(i), 'nomaster')

    def mend(self, i):
        _ip('link', 'set', self._port(i), 'master', f'{self._tag}br')

    def limit(self, mbits):
        """What each machine sends, and what it receives, comes with so many Mbit/s at most."""
        bucket = ['root', 'tbf', 'rate', f'{mbits}mbit', 'burst', '128kb', 'latency', '400ms']
        for i in range(len(self.addresses)):
            enter = ['ip', 'netns', 'exec', self._namespace(i)]
            for command in (
                enter + ['tc', 'qdisc', 'add', 'dev', 'eth0'],
                ['tc', 'qdisc', 'add', 'dev', self._port(i)],
            ):
                subprocess.check_call(command + bucket)

    def sent_and_received(self, i):
        """How many bytes machine i has sent, and received, up to now."""
        folder = f'/sys/class/net/{self._port(i)}/statistics'
        return [int(harness.read(f'{folder}/{name}')) for name in ('rx_bytes', 'tx_bytes')]
