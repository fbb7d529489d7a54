"""Strangers that send a byte now and then, and never a whole message."""

import contextlib
import socket
import threading
import time

import pytest

from support import cluster as cluster_module, tf_config
from tests.clusters import CHIEF, WORKER
from tests.test_distributed import new_cluster  # noqa: F401 -- A fixture.

FAST = 'from support import cluster; cluster.ANSWER_SECS = 1'


def trickle(sock, stop):
    with contextlib.suppress(OSError):
        while not stop.is_set():
            sock.sendall(b' ')
            time.sleep(0.2)


def test_slow_stranger_at_a_workers_port_does_not_keep_the_chief_out(new_cluster):  # noqa: F811
    cluster = new_cluster()
    host, port = cluster.addresses[WORKER].split(':')
    cluster.start('--max_steps=2', names=[WORKER], before=FAST)
    cluster[WORKER].wait_for('This is worker 0')
    stop = threading.Event()
    with socket.create_connection((host, int(port))) as sock:
        stranger = threading.Thread(target=trickle, args=[sock, stop])
        stranger.start()
        cluster.start('--max_steps=2', names=[CHIEF])
        cluster.assert_finished(2)
        stop.set()
        stranger.join()


def test_slow_stranger_at_a_workers_address_is_left(new_cluster):  # noqa: F811
    cluster = new_cluster()
    host, port = cluster.addresses[WORKER].split(':')
    stop = threading.Event()
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(5)
        cluster.start('--max_steps=2', names=[CHIEF], before=FAST)
        for _ in range(2):  # The chief calls again.
            caller, _ = listener.accept()
            stranger = threading.Thread(target=trickle, args=[caller, stop])
            stranger.start()
        stop.set()
        stranger.join()
        caller.close()
    cluster.start('--max_steps=2', names=[WORKER])
    cluster.assert_finished(2)


def test_worker_of_another_cluster_is_rejected():
    machines = tf_config.parse(tf_config.EXAMPLE)
    here, there = socket.socketpair()
    with here, there, here.makefile('rb') as file:
        there.sendall(b'{"cluster": {}, "task": [], "facts": {}}\n')
        with pytest.raises(ValueError, match='another TF_CONFIG'):
            cluster_module._Workers(machines)._exchange(machines.tasks[1], here, file)
