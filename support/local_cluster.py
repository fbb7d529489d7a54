"""Starts a chief and workers on this machine, to try what is meant for several machines.

    python -m support.local_cluster --workers=2 cifar10_distributed_train.py --max_steps=200

Prints their output with their names in front. Ctrl-C, SIGTERM and a closed terminal stop the chief,
which saves a checkpoint and ends the workers; a second signal ends all at once. When a process is
lost, all are started again. The exit status is the chief's.
"""

import argparse
import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

LOST = 138  # As in support/cluster.py, which would take seconds to import TensorFlow.
GRACE_SECS = 15  # For the others to end by themselves after one has ended.
PR_SET_PDEATHSIG = 1  # From <sys/prctl.h>: the signal to this process when its parent ends.

libc = ctypes.CDLL(None)


def free_ports(number):
    """Unused ports, below those that Linux gives to outgoing connections."""
    ports = []
    while len(ports) < number:
        port = random.randint(20000, 32000)
        with socket.socket() as sock:
            if port not in ports and sock.connect_ex(('127.0.0.1', port)):
                ports.append(port)
    return ports


def start(command, workers):
    """Starts the processes. Returns a list of subprocess.Popen, the chief's first."""
    ports = free_ports(1 + workers)
    addresses = [f'127.0.0.1:{port}' for port in ports]
    jobs = {'chief': addresses[:1], 'worker': addresses[1:]}
    processes = []
    for job in jobs:
        for index in range(len(jobs[job])):
            config = {'cluster': jobs, 'task': {'type': job, 'index': index}}
            process = subprocess.Popen(
                [sys.executable, *command],
                env=dict(os.environ, TF_CONFIG=json.dumps(config)),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # The terminal sends Ctrl-C only to this process.
                preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
            )
            process.name = job if job == 'chief' else f'{job} {index}'
            processes.append(process)
    return processes


def show(process):
    """Prints the output of a process, also after the terminal is gone: a full pipe blocks it."""
    for line in process.stdout:
        with contextlib.suppress(OSError):
            os.write(1, f'{process.name:8} | '.encode() + line)


def wait(processes, signals):
    """Passes the first signal on to the chief, and waits until all processes have ended.

    Returns the exit status of the first one to end, negative for a fatal signal; if it is 0, the
    chief's.
    """
    is_told = False
    while all(process.poll() is None for process in processes):
        if signals and not is_told:
            is_told = True
            processes[0].send_signal(
                signal.SIGINT if signals[0] == signal.SIGINT else signal.SIGTERM
            )
        time.sleep(0.1)
    statuses = [process.returncode for process in processes if process.poll() is not None]
    deadline = time.monotonic() + GRACE_SECS
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    return statuses[0] or processes[0].wait()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workers', type=int, default=1, help='in addition to the chief')
    parser.add_argument('command', nargs=argparse.REMAINDER, help='script and flags, for all')
    args = parser.parse_args()
    signals = []
    noted_at = 0

    def note(number, frame):
        nonlocal noted_at
        # `timeout` sends its signal twice, as does a shell when its terminal is closed.
        if signals and time.monotonic() > noted_at + 0.2:
            os._exit(128 + number)  # The kernel kills the processes.
        if not signals:
            noted_at = time.monotonic()
            signals.append(number)

    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, note)
    while not signals:
        processes = start(args.command, args.workers)
        threads = [threading.Thread(target=show, args=[each], daemon=True) for each in processes]
        for thread in threads:
            thread.start()
        status = wait(processes, signals)
        for thread in threads:
            thread.join()
        if status >= 0 and status != LOST:
            sys.exit(status)
        if not signals:
            print('A process was lost. Starting all of them again.', flush=True)
    sys.exit(128 + signals[0])


if __name__ == '__main__':
    main()
