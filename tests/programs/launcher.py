"""Runs scripts in forks of a process that has already imported TensorFlow. See harness.Starter.

It reads jobs from stdin, one JSON object per line:

    argv    the script and its flags
    before  Python code to run before the script
    base    files: BASE.out and BASE.err get the output, BASE.pid and BASE.status two numbers
"""

import gc
import json
import os
import runpy
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import cifar10  # noqa: F401 -- So that the scripts find it imported.


def write(path, number):
    with open(path + '.tmp', 'w') as file:
        file.write(str(number))
    os.rename(path + '.tmp', path)


def run(job):
    """Makes this process look as if Python had just been started with the script."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(job['base'] + '.out', os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(os.open(job['base'] + '.err', os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout = open(1, 'w', closefd=False)  # The old one is not buffered as for a file.
    sys.argv = job['argv']
    exec(job['before'], {})
    runpy.run_path(sys.argv[0], run_name='__main__')
    sys.exit()


gc.freeze()  # Without this, garbage collection copies the memory in every fork.
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in iter(sys.stdin.readline, ''):
    job = json.loads(line)
    if os.fork():
        continue
    # The first fork waits for the second one, which runs the script.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        run(job)
    write(job['base'] + '.pid', pid)
    status = os.waitpid(pid, 0)[1]
    is_exit = os.WIFEXITED(status)
    write(job['base'] + '.status', os.WEXITSTATUS(status) if is_exit else -os.WTERMSIG(status))
    os._exit(0)
