"""Kills processes of a cluster with SIGKILL, again and again, and checks that the run goes on.

    python tests/soak/cluster_kills.py            as below, half an hour
    python tests/soak/cluster_kills.py --quick    fewer kills, some minutes

First it kills the chief at each step of writing a checkpoint, as kills.py does.

Then a chief and three workers train on the real data set. Fifty times it kills one of them, chosen
at random, at a random moment between its start and long after a checkpoint. The chief, and each
worker that was connected to it, has to exit with status 138 within ten seconds. Each process is
restarted as soon as it has ended, independently of the others, as Kubernetes does. The run has to
reach its last step, and the accuracy has to be that of an undisturbed run.
"""

import os
import random
import re
import signal
import sys
import tempfile
import time

FOLDER = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(FOLDER)))

from tests import clusters, harness
from tests.soak.kills import LostError, arguments, expect, kill_while_saving, newest_step, output

FLAGS = ['--batch_size=32', '--save_checkpoint_secs=3', '--log_frequency=1']
CONNECTED = 'All 4 machines are connected.'


def run_with_a_worker(start, data_dir, train_dir, flags, before):
    """Runs a chief and a worker to their end. Returns the chief."""
    cluster = clusters.Cluster(start, data_dir, train_dir)
    try:
        cluster.start(*flags, before={clusters.CHIEF: before})
        statuses = cluster.statuses()
        expected = 0 if statuses[clusters.CHIEF] == 0 else 138
        expect(statuses[clusters.WORKER] == expected, f'{statuses}: {cluster.output()}')
        return cluster[clusters.CHIEF]
    finally:
        cluster.kill()


class Supervisor:
    """Restarts each process of a cluster when it has ended."""

    def __init__(self, start, scratch, data_dir, name):
        train_dir = os.path.join(scratch, name)
        self.cluster = clusters.Cluster(start, data_dir, train_dir, workers=3)
        self.restarts = 0

    def start(self, names, max_steps):
        self.cluster.start(*FLAGS, f'--max_steps={max_steps}', names=names)

    def look(self, max_steps, killed=()):
        """Restarts what has ended, which has to be with status 138 unless it was killed."""
        for name, script in list(self.cluster.scripts.items()):
            status = script.status()
            if status is not None:
                expected = -signal.SIGKILL if name in killed else 138
                expect(status == expected, f'{name} ended with {status}:\n{output(script)}')
                self.restarts += 1
                self.start([name], max_steps)

    def kill(self, chance):
        """Kills one of them. Returns its name and how many were connected."""
        scripts = dict(self.cluster.scripts)
        name = chance.choice(sorted(scripts))
        scripts.pop(name).kill()
        connected = [script for script in scripts.values() if CONNECTED in script.stdout]
        for script in connected:
            harness.until(lambda script=script: script.status() is not None, harness.AT_ONCE)
            is_named = f'{name} (' in script.stderr.lower() and ' is lost' in script.stderr
            what = f'{name} killed; status {script.status()}\n{output(script)}'
            expect(script.status() == 138 and is_named, what)
        return name, len(connected)

    def finish(self, max_steps):
        """Starts anew and trains up to max_steps."""
        self.cluster.kill()
        self.start(None, max_steps)
        chief = self.cluster['chief']
        status = chief.wait(3600)
        expect(status == 0, f'the chief ended with {status}:\n{output(chief)}')
        statuses = self.cluster.statuses()
        expect(set(statuses.values()) == {0}, f'at the end: {statuses}')
        expect(newest_step(str(self.cluster.train_dir)) == max_steps, 'not the last step')


def precision(start, data_dir, train_dir, num_examples):
    script = start(
        harness.EVAL,
        '--run_once',
        f'--num_examples={num_examples}',
        '--data_dir=' + data_dir,
        '--checkpoint_dir=' + train_dir,
        f'--eval_dir={train_dir}-eval',
    )
    expect(script.wait(600) == 0, f'the evaluator failed:\n{output(script)}')
    return float(re.search(r'precision @ 1 = (\S+)', script.stdout).group(1))


def kill_at_random(start, scratch, data_dir, kills, more_steps, num_examples, tolerance):
    """Kills, then trains that many more steps. Returns a line on the result."""
    far, chance, seen = 10**6, random.Random(0), {}
    disturbed = Supervisor(start, scratch, data_dir, 'killed')
    left_alone = Supervisor(start, scratch, data_dir, 'left')
    try:
        begin = time.monotonic()
        disturbed.start(None, far)
        disturbed.cluster['chief'].wait_for('step 1,')
        longest = 2.5 * (time.monotonic() - begin)
        for kill in range(1, kills + 1):
            until = time.monotonic() + chance.uniform(0, longest)
            while time.monotonic() < until:
                disturbed.look(far)
                time.sleep(0.1)
            name, connected = disturbed.kill(chance)
            seen[name] = seen.get(name, 0) + 1
            disturbed.look(far, killed=[name])
            step = newest_step(disturbed.cluster.train_dir)
            print(f'kill {kill}: {name}, {connected} of 3 connected, newest {step}', flush=True)
        max_steps = newest_step(disturbed.cluster.train_dir) + more_steps
        disturbed.finish(max_steps)
        left_alone.finish(max_steps)
        folders = disturbed.cluster.train_dir, left_alone.cluster.train_dir
        after, without = (precision(start, data_dir, each, num_examples) for each in folders)
    finally:
        disturbed.cluster.kill()
        left_alone.cluster.kill()
    result = f'precision {after:.3f} after {max_steps} steps, undisturbed {without:.3f}'
    expect(after > without - tolerance, result)
    return f'{kills} kills ({seen}), {disturbed.restarts} restarts; {result}'


def main():
    args = arguments(__doc__)
    stride, how = 1, dict(kills=50, more_steps=300, num_examples=10000, tolerance=0.03)
    if args.quick:
        stride, how = 24, dict(kills=4, more_steps=30, num_examples=2000, tolerance=0.1)
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        start = harness.Starter(second)
        try:
            reports = [
                kill_while_saving(first, stride, run_with_a_worker),
                kill_at_random(start, second, args.data_dir, **how),
            ]
        except LostError as error:
            sys.exit(f'cluster_kills.py: LOST: {error}')
        finally:
            start.end()
    print('\n'.join(reports))


if __name__ == '__main__':
    main()
