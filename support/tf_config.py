"""TF_CONFIG, the environment variable that lists the machines of a cluster, as Kubeflow sets it."""

import collections
import json
import os
import re

from support import script

JOBS = ['chief', 'master', 'worker']
ADDRESS = re.compile(r'(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):([0-9]{1,5})$')
EXAMPLE = (
    '{"cluster": {"chief": ["10.0.0.1:2222"], "worker": ["10.0.0.2:2222"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


class Task(collections.namedtuple('Task', 'job index address')):
    """One process of the cluster."""

    def __str__(self):
        name = f'worker {self.index}' if self.job == 'worker' else self.job
        return f'{name} ({self.address})'

    @property
    def device(self):
        return f'/job:{self.job}/task:{self.index}'

    @property
    def host_and_port(self):
        host, port = ADDRESS.match(self.address).groups()
        return host.strip('[]'), int(port)


# jobs: dict of job -> addresses; tasks: all of them, the chief first; me: the Task of this process,
# or None for an evaluator, which is not part of the cluster.
Cluster = collections.namedtuple('Cluster', 'jobs tasks chief me')


def read():
    """Returns the Cluster in TF_CONFIG. Raises a script.UserError if it is missing or wrong."""
    try:
        return parse(os.environ.get('TF_CONFIG'))
    except ValueError as error:
        raise script.UserError(f"TF_CONFIG {error}. Example: TF_CONFIG='{EXAMPLE}'")


def parse(text):
    """Returns the Cluster that the text of TF_CONFIG describes. Raises ValueError."""
    if not text:
        raise ValueError('is not set; it lists all machines and says which one this is')
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f'is not JSON: {error}')
    if not isinstance(config, dict) or not isinstance(config.get('cluster'), dict):
        raise ValueError('has no "cluster"')
    # Some versions of Kubeflow list an address for the evaluator. Nothing listens there.
    jobs = {job: named for job, named in config['cluster'].items() if named and job != 'evaluator'}
    if 'ps' in jobs:
        raise ValueError('has a "ps" task, but parameter servers are not supported')
    for job, named in jobs.items():
        if job not in JOBS or not isinstance(named, list):
            raise ValueError(f'has "{job}", which is not a list of addresses for one of {JOBS}')
        for address in named:
            match = ADDRESS.match(str(address))
            if not match or not 0 < int(match.group(2)) < 65536:
                raise ValueError(f'has "{address}", which is not an address HOST:PORT, [IPV6]:PORT')
    tasks = [Task(job, i, address) for job in JOBS for i, address in enumerate(jobs.get(job, []))]
    if not tasks or sum(task.job != 'worker' for task in tasks) > 1:
        raise ValueError('has no chief and no worker, or more than one chief')
    if len({task.address for task in tasks}) < len(tasks):
        raise ValueError('has the same address for two tasks')
    task = config.get('task')
    if not isinstance(task, dict) or 'type' not in task:
        raise ValueError('has no "task" with a "type"')
    name = f'{task["type"]} {task.get("index", 0)}'
    me = next((each for each in tasks if f'{each.job} {each.index}' == name), None)
    if not me and task['type'] != 'evaluator':
        raise ValueError(f'has the "task" {name}, which is not in the "cluster"')
    return Cluster(jobs, tasks, tasks[0], me)
