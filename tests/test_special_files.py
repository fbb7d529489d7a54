"""Files, folders and callers that nobody expects."""

import contextlib
import json
import os
import socket
import threading
import time

import pytest

import cifar10_eval
from support import checkpoints, cluster, script, tf_config


@pytest.mark.parametrize('name', ['checkpoint', 'finished'])
def test_evaluator_does_not_wait_for_a_pipe(tmp_path, name):
    os.mkfifo(str(tmp_path / name))
    cifar10_eval.FLAGS.checkpoint_dir = str(tmp_path)
    with pytest.raises(script.UserError, match=f'{tmp_path}/{name} is not a regular file'):
        next(checkpoints.as_they_come('checkpoint_dir', 1))


def test_file_of_a_checkpoint_is_not_mistaken_for_a_folder(tmp_path):
    (tmp_path / 'model.ckpt-1.index').touch()
    cifar10_eval.FLAGS.checkpoint_dir = f'{tmp_path}/model.ckpt-1.index'
    with pytest.raises(script.UserError, match='model.ckpt-1.index is a file'):
        checkpoints.newest_required('checkpoint_dir')


def test_default_eval_dir_is_next_to_any_folder(tmp_path, monkeypatch):
    folder = tmp_path / 'model.ckpt-7'
    folder.mkdir()
    monkeypatch.chdir(folder)
    for place in '.', './', '../model.ckpt-7', f'{folder}/', 'model.ckpt-1':
        eval_dir = checkpoints.evaluation_folder_of(place)
        assert os.path.abspath(eval_dir) == f'{folder}_eval', place


MACHINES = tf_config.parse(tf_config.EXAMPLE)


def test_slow_stranger_does_not_keep_the_chief_out(monkeypatch):
    def send_slowly():
        with contextlib.suppress(OSError):  # When the worker hangs up.
            for _ in range(100):
                stranger.sendall(b' ')
                time.sleep(0.1)
            chief.close()

    monkeypatch.setattr(cluster, 'ANSWER_SECS', 1)
    with socket.socket() as listener, socket.socket() as stranger, socket.socket() as chief:
        listener.bind(('127.0.0.1', 0))
        listener.listen(5)
        stranger.connect(listener.getsockname())
        threading.Thread(target=send_slowly, daemon=True).start()
        chief.connect(listener.getsockname())
        call = {'cluster': MACHINES.jobs, 'task': MACHINES.me}
        chief.sendall(json.dumps(call).encode() + b'\n')
        with cluster._accept_chief(MACHINES, {}, listener)[0] as sock:
            assert sock.getpeername() == chief.getsockname()


OTHER_CLUSTER = b'{"cluster": {}, "task": [], "facts": {}}\n'


@pytest.mark.parametrize(
    'answer, error', [(b' ', 'connection ended'), (OTHER_CLUSTER, 'another TF_CONFIG')]
)
def test_stranger_at_a_workers_address_is_left(monkeypatch, answer, error):
    monkeypatch.setattr(cluster, 'ANSWER_SECS', 1)
    here, there = socket.socketpair()
    with here, there, here.makefile('rb') as file:
        there.sendall(answer)
        with pytest.raises((OSError, ValueError), match=error):
            cluster._Workers(MACHINES)._exchange(MACHINES.tasks[1], here, file)
