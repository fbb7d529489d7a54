"""Kills processes of a cluster with SIGKILL and checks that the run always continues.

    python tests/soak/cluster_kills.py
    python tests/soak/cluster_kills.py --quick

A chief and three workers train. 25 times it kills one of them, in random order, at a random moment
during the start or during training. The chief, and each worker that was connected to it, must exit
with status 138 within ten seconds and name the lost one. Each process is restarted when it has
ended, independently of the others, as Kubernetes does. The run must resume from the newest
checkpoint, reach its last step, and be as accurate as a run without kills.
"""

import os
import random
import time

import soak
from soak import expect, newest_step, output
from tests import clusters, harness


class Supervisor:
    """Restarts each process of a cluster when it has ended.

    Attributes:
      cluster: the clusters.Cluster.
      restarts: how many processes were restarted.
    """

    def __init__(self, start, data_dir, train_dir):
        self.cluster = clusters.Cluster(start, data_dir, train_dir, workers=3)
        self.restarts, self._newest = 0, 0

    def start(self, names=None, max_steps=10**6):
        if clusters.CHIEF in (names or self.cluster.names):
            self._newest = newest_step(self.cluster.train_dir)
        save = f'--save_checkpoint_secs={soak.SAVE_SECS}'
        self.cluster.start(save, f'--max_steps={max_steps}', names=names)

    def restart_ended(self, killed=None):
        """Restarts the processes that have ended, with status 138 except for the one killed."""
        for name, script in list(self.cluster.scripts.items()):
            if script.status() is not None:
                is_expected = script.status() == 138 or name == killed
                expect(is_expected, f'{name} ended with {script.status()}:\n{output(script)}')
                first = soak.first_step(script)
                expect(first in (None, self._newest), f'started at {first}, not {self._newest}')
                self.restarts += 1
                self.start([name])

    def is_training(self):
        return ': step' in self.cluster[clusters.CHIEF].stdout

    def watch(self, condition):
        """Restarts processes until a condition holds. Returns the seconds."""
        begin = time.monotonic()
        while not condition():
            expect(time.monotonic() < begin + 2 * harness.TIMEOUT, self.cluster.output())
            self.restart_ended()
            time.sleep(0.05)
        return time.monotonic() - begin

    def kill(self, name):
        """Kills a process and restarts it. Returns how long each of the connected ones ran on."""
        others = dict(self.cluster.scripts)
        killed, seconds = others.pop(name), []
        connected = [each for each in others.values() if 'machines are connected' in each.stdout]
        killed.kill()
        begin = time.monotonic()
        for script in connected:
            harness.until(lambda script=script: script.status() is not None, harness.AT_ONCE)
            seconds.append(time.monotonic() - begin)
            is_named = f'{name} (' in script.stderr.lower() and ' is lost' in script.stderr
            what = f'{name} killed; status {script.status()}\n{output(script)}'
            expect(script.status() == 138 and is_named, what)
        self.restart_ended(killed=name)
        return seconds

    def finish(self, max_steps):
        """Starts all processes again and trains up to max_steps."""
        self.cluster.kill()
        self.start(max_steps=max_steps)
        chief = self.cluster[clusters.CHIEF]
        expect(chief.wait(3600) == 0, f'{chief.status()}:\n{output(chief)}')
        statuses = self.cluster.statuses()
        expect(set(statuses.values()) == {0}, f'at the end: {statuses}')
        newest = newest_step(self.cluster.train_dir)
        expect(newest == max_steps, f'the run ended at step {newest}, not at {max_steps}')


def test(args, scratch):
    kills, more_steps, tolerance = (4, 20, 0.1) if args.quick else (25, 200, 0.05)
    chance, data_dir, seconds = random.Random(0), soak.small_data(args, scratch), []
    with soak.scripts(os.path.join(scratch, 'scripts')) as start:
        run, calm = (Supervisor(start, data_dir, os.path.join(scratch, x)) for x in ('run', 'calm'))
        run.start()
        start_secs = run.watch(run.is_training)
        for kill in range(kills):
            if kill % 4 == 0:
                names = chance.sample(run.cluster.names, 4)
            if kill % 2:
                moment = time.monotonic() + chance.uniform(0, start_secs)
            else:
                run.watch(run.is_training)
                moment = time.monotonic() + chance.uniform(0, 3 * soak.SAVE_SECS)
            run.watch(lambda moment=moment: time.monotonic() > moment)
            ended = run.kill(names[kill % 4])
            seconds += ended
            newest = newest_step(run.cluster.train_dir)
            what = f'{names[kill % 4]}, {len(ended)} of 3 connected; newest {newest}'
            print(f'kill {kill + 1}: {what}', flush=True)
        for each in run, calm:
            each.finish(newest + more_steps)
        folders = run.cluster.train_dir, calm.cluster.train_dir
        comparison = soak.compare(start, data_dir, *folders, tolerance)
    return (
        f'{kills} kills in a cluster of four, {run.restarts} restarts; {len(seconds)} connected '
        f'processes ended with status 138 within {max(seconds, default=0):.1f} s; {comparison}'
    )


if __name__ == '__main__':
    soak.run(__doc__, test)
