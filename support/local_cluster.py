"""Starts a chief and workers on this machine, to try what is meant for several machines.

    python -m support.local_cluster --workers=2 cifar10_distributed_train.py --max_steps=200

Prints their output with their names in front. Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal stop
the chief, which saves a checkpoint and ends the workers; a second signal ends all at once. When a
process is lost, all are started again. The exit status is the chief's.
"""

import argparse
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
PR_SET_PDEATHSIG = 1  # From <sys/prctl.h>: the signal that a process gets when its parent ends.
LIBC = ctypes.CDLL(None)


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
    addresses = [f'127.0.0.1:{port}' for port in free_ports(1 + workers)]
    jobs = {'chief': addresses[:1], 'worker': addresses[1:]}
    processes = []
    for i in range(1 + workers):
        job, index = ('worker', i - 1) if i else ('chief', 0)
        config = {'cluster': jobs, 'task': {'type': job, 'index': index}}
        process = subprocess.Popen(
            [sys.executable, *command],
            env=dict(os.environ, TF_CONFIG=json.dumps(config)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # The terminal sends Ctrl-C only to this process.
            preexec_fn=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        process.name = f'worker {index}' if i else 'chief'
        processes.append(process)
    return processes


def show(process, signals):
    """Prints the output of a process. Stops the run if there is nowhere to print it to any more."""
    for line in process.stdout:
        try:
            os.write(1, f'{process.name:8} | '.encode() + line)
        except OSError:
            if not signals:
                os.kill(os.getpid(), signal.SIGHUP)


def wait(processes, signals):
    """Passes the first signal on to the chief, and waits until all processes have ended.

    Returns the status of the first one to end, or the chief's if that is 0. A fatal signal is -N.
    """
    is_told = False
    while all(process.poll() is None for process in processes):
        if signals and not is_told:
            is_told = True
            number = signals[0][0]
            processes[0].send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
        time.sleep(0.1)
    status = next(process.returncode for process in processes if process.returncode is not None)
    if processes[0].poll() is not None:
        for worker in processes[1:]:
            worker.terminate()  # Not needed if it has heard from the chief.
    deadline = time.monotonic() + GRACE_SECS
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    return status or processes[0].wait()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workers', type=int, default=1, help='in addition to the chief')
    parser.add_argument('command', nargs=argparse.REMAINDER, help='script and flags, for all')
    args = parser.parse_args()
    signals = []  # (number, time)

    def note(number, frame):
        signals.append((number, time.monotonic()))
        # `timeout` sends its signal twice, as does a shell when its terminal is closed.
        if signals[-1][1] > signals[0][1] + 0.2:
            os._exit(128 + number)  # The kernel kills the processes.

    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, note)
    while not signals:
        processes = start(args.command, args.workers)
        threads = [threading.Thread(target=show, args=[each, signals]) for each in processes]
        for thread in threads:
            thread.start()
        status = wait(processes, signals)
        for thread in threads:
            thread.join()
        if status >= 0 and status != LOST:
            sys.exit(status)
        if not signals:
            print('A process was lost. Starting all of them again.', flush=True)
    sys.exit(128 + signals[0][0])


if __name__ == '__main__':
    main()
