"""The processes of a cluster, all on this machine: shared by the tests and the soak test."""

import json
import re

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

    def statuses(self, timeout=harness.AT_ONCE):
        """Dict of name -> exit status, when all have ended."""
        return {name: script.wait(timeout) for name, script in self.scripts.items()}

    def assert_lost(self, lost, timeout=harness.AT_ONCE):
        """All but one end with 138 and name the lost one."""
        for name, script in self.scripts.items():
            if name != lost:
                assert script.wait(timeout) == 138, (name, script.stdout, script.stderr)
                address = self.addresses[self.names.index(lost)]
                pattern = re.escape(f'{lost} ({address}) is lost')
                (error,) = script.errors
                assert re.match(pattern, error, re.IGNORECASE), (name, error)

    def assert_finished(self, step):
        self[CHIEF].wait()
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
