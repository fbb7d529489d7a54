"""Rounds A B A B ...: processes that measure in turn, so that a slow moment hits all.

A worker gets ready, says so, and then measures one block whenever it is asked:

    run.py                      worker
    Worker(command)      --->   start, warm up
                         <---   {"name of a fact": ...}
    worker.block()       --->   measure
                         <---   {"name of a number": ...}

Between its blocks a worker waits; its input queues are full then.
"""

import json
import os
import subprocess
import sys
import tempfile
import time


def serve(block, **facts):
    """The worker's side: reports the facts, then calls block() for each request.

    Args:
      block: function that measures once and returns a dict of numbers.
      **facts: reported once; `unavailable=REASON` means that there is nothing to measure.
    """
    print(json.dumps(facts), flush=True)
    if 'unavailable' in facts:
        return
    for _ in sys.stdin:
        print(json.dumps(block()), flush=True)
    os._exit(0)  # Without waiting for the threads that fill the queues.


class Worker:
    """A process that measures when asked.

    Args:
      command: list of strings.

    Attributes:
      facts: dict of what it reported when it was ready.
    """

    def __init__(self, command):
        self._command = command
        self._errors = tempfile.TemporaryFile('w+')
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            universal_newlines=True,
        )
        try:
            self.facts = self._answer()
        except BaseException:
            self.end()
            raise

    def block(self):
        """Has it measure one block. Returns a dict of numbers."""
        self._process.stdin.write('\n')
        self._process.stdin.flush()
        return self._answer()

    def end(self):
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self):
        for line in self._process.stdout:
            if line.startswith('{'):  # The model's code prints lines of its own.
                return json.loads(line)
        self._errors.seek(0)
        sys.exit(f'{self._errors.read()[-4000:]}\nfailed: {" ".join(self._command)}')


def measure(commands, rounds):
    """Starts all workers, then has each measure one block per round.

    Args:
      commands: dict of name -> command.
      rounds: number of blocks of each.

    Returns:
      Dict of name -> dict of what was measured -> list of values: one for each round, or a single
      one for a fact.
    """
    workers, samples = {}, {}
    try:
        for name, command in commands.items():
            worker = Worker(command)
            if 'unavailable' in worker.facts:
                print(f'Without {name}: {worker.facts["unavailable"]}', file=sys.stderr)
                worker.end()
                continue
            workers[name] = worker
            samples[name] = {fact: [value] for fact, value in worker.facts.items()}
        for _ in range(rounds):
            for name, worker in workers.items():
                time.sleep(0.1)  # For the one before to fill its queue and fall asleep.
                for number, value in worker.block().items():
                    samples[name].setdefault(number, []).append(value)
    finally:
        for worker in workers.values():
            worker.end()
    return samples
