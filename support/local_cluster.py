"""Starts all processes of a cluster on this machine, to try what is meant for several.

    python -m support.local_cluster --workers=2 cifar10_distributed_train.py --max_steps=200

Shows what they say, with their names in front. Ctrl-C and SIGTERM go to the chief, who ends
the others. When one of them is lost, all are started again. Exit status: the chief's.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

from support import cluster

GRACE_SECS = 15  # For the others to end by themselves, once one has ended.


def free_ports(number):
    """Ports on which nobody listens, from below those that the kernel gives to who calls."""
    ports = []
    while len(ports) < number:
        port = random.randint(20000, 32000)
        with socket.socket() as sock:
            if port not in ports and sock.connect_ex(('127.0.0.1', port)):
                ports.append(port)
    return ports


def start(command, workers, ps):
    """Starts the processes.

    Returns:
      A list of subprocess.Popen, the chief first; and one of the threads that show what these
      say, up to their end.
    """
    tasks = [('chief', 0)]
    tasks += [('worker', i) for i in range(workers)] + [('ps', i) for i in range(ps)]
    jobs = {}
    for (job, _), port in zip(tasks, free_ports(len(tasks))):
        jobs.setdefault(job, []).append(f'127.0.0.1:{port}')
    processes, threads = [], []
    for job, index in tasks:
        config = json.dumps({'cluster': jobs, 'task': {'type': job, 'index': index}})
        process = subprocess.Popen(
            [sys.executable, *command],
            env=dict(os.environ, TF_CONFIG=config),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Of the terminal's Ctrl-C only the chief is to hear.
            universal_newlines=True,
        )
        name = job if job == 'chief' else f'{job} {index}'
        thread = threading.Thread(target=show, args=[name, process.stdout], daemon=True)
        thread.start()
        processes.append(process)
        threads.append(thread)
    return processes, threads


def show(name, lines):
    for line in lines:
        sys.stdout.write(f'{name:8} | {line}')
        sys.stdout.flush()


def wait(processes):
    """Waits until all have ended.

    Returns:
      Was one of them lost? And the exit status, if not.
    """
    ended = []
    while not ended:
        time.sleep(0.1)
        ended = [process for process in processes if process.poll() is not None]
    first = ended[0].returncode
    for end in None, signal.SIGTERM, signal.SIGKILL:
        running = [process for process in processes if process.poll() is None]
        if end:
            for process in running:
                process.send_signal(end)
        until = time.monotonic() + GRACE_SECS
        while running and time.monotonic() < until:
            time.sleep(0.1)
            running = [process for process in running if process.poll() is None]
    if first < 0 or first == cluster.LOST:
        return True, None
    return False, first or processes[0].returncode


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workers', type=int, default=1, help='beside the chief')
    parser.add_argument('--ps', type=int, default=0, help='tasks that hold the variables')
    parser.add_argument('command', nargs=argparse.REMAINDER, help='script and flags, for all')
    args = parser.parse_args()
    processes, signals = [], []

    def hand_on(number, frame):
        signals.append(number)
        if processes:
            processes[0].send_signal(number)

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, hand_on)
    while not signals:
        processes[:], threads = start(args.command, args.workers, args.ps)
        if signals:  # Meanwhile.
            processes[0].send_signal(signals[0])
        is_lost, status = wait(processes)
        for thread in threads:
            thread.join()
        if not is_lost:
            sys.exit(status)
        if not signals:
            print('One is lost: starting all of them again.', flush=True)
    sys.exit(128 + signals[0])


if __name__ == '__main__':
    main()
