"""Kills processes of a cluster with SIGKILL and checks that the run always continues.

    python tests/soak/cluster_kills.py
    python tests/soak/cluster_kills.py --quick

A chief and three workers train. 25 times it kills one of them, in random order, at a random moment
during the start or during training. The chief, and each worker that was connected to it, must exit
with status 138 within ten seconds and name the lost one. Each process is restarted when it has
ended, independently of the others, as Kubernetes does. The run must resume from the newest
checkpoint, reach its last step, and be as accurate as a run without kills.
"""

import random
import time

import soak
from soak import expect, newest_step, output
from tests import clusters, harness


class Supervisor(clusters.Cluster):
    """A cluster that restarts each of its processes when it has ended."""

    restarts = newest = 0

    def launch(self, names=None, max_steps=10**6):
        if clusters.CHIEF in (names or self.names):
            self.newest = newest_step(self.train_dir)
        flags = f'--save_checkpoint_secs={soak.SAVE_SECS}', f'--max_steps={max_steps}'
        self.start(*flags, names=names)

    def restart_ended(self, killed=None):
        """Restarts the processes that have ended, with status 138 except for the one killed."""
        for name, script in list(self.scripts.items()):
            if script.status() is not None:
                is_expected = script.status() == 138 or name == killed
                expect(is_expected, f'{name} ended with {script.status()}:\n{output(script)}')
                first = soak.first_step(script)
                expect(first in (None, self.newest), f'started at {first}, not {self.newest}')
                self.restarts += 1
                self.launch([name])

    def watch(self, condition):
        """Restarts processes until a condition holds. Returns the seconds."""
        begin = time.monotonic()
        while not condition():
            expect(time.monotonic() < begin + 2 * harness.TIMEOUT, self.output())
            self.restart_ended()
            time.sleep(0.05)
        return time.monotonic() - begin

    def watch_until_training(self):
        return self.watch(lambda: ': step' in self[clusters.CHIEF].stdout)

    def lose(self, name):
        """Kills a process and restarts it. Returns how long each of the connected ones ran on."""
        others = {each: script for each, script in self.scripts.items() if each != name}
        connected = [each for each in others.values() if 'machines are connected' in each.stdout]
        self[name].kill()
        begin, seconds = time.monotonic(), []
        for script in connected:
            status = script.wait(harness.AT_ONCE)
            seconds.append(time.monotonic() - begin)
            is_named = f'{name} (' in script.stderr.lower() and ' is lost' in script.stderr
            what = f'{name} killed; status {status}\n{output(script)}'
            expect(status == 138 and is_named, what)
        self.restart_ended(killed=name)
        return seconds

    def finish(self, max_steps):
        """Starts all processes again and trains up to max_steps."""
        self.kill()
        self.launch(max_steps=max_steps)
        self[clusters.CHIEF].wait(3600)
        self.assert_finished(max_steps)


def test(args, scratch):
    kills, more_steps, tolerance = (4, 20, 0.1) if args.quick else (25, 200, 0.05)
    chance, data_dir, seconds = random.Random(0), soak.small_data(args, scratch), []
    with soak.scripts(scratch) as start:
        folders = f'{scratch}/run', f'{scratch}/calm'
        run, calm = (Supervisor(start, data_dir, folder, workers=3) for folder in folders)
        run.launch()
        start_secs = run.watch_until_training()
        for kill in range(kills):
            if kill % 4 == 0:
                names = chance.sample(run.names, 4)
            if kill % 2 == 0:
                run.watch_until_training()
            longest = start_secs if kill % 2 else 3 * soak.SAVE_SECS
            moment = time.monotonic() + chance.uniform(0, longest)
            run.watch(lambda moment=moment: time.monotonic() > moment)
            ended = run.lose(names[kill % 4])
            seconds += ended
            newest = newest_step(run.train_dir)
            what = f'{names[kill % 4]}, {len(ended)} of 3 connected; newest {newest}'
            print(f'kill {kill + 1}: {what}', flush=True)
        for each in run, calm:
            each.finish(newest + more_steps)
        comparison = soak.compare(start, data_dir, *folders, tolerance)
    return (
        f'{kills} kills in a cluster of four, {run.restarts} restarts; {len(seconds)} connected '
        f'processes ended with status 138 within {max(seconds, default=0):.1f} s; {comparison}'
    )


if __name__ == '__main__':
    soak.run(__doc__, test)
