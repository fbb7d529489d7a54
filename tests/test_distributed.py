"""Tests of the trainer for several machines, with all processes on this one."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

import cifar10_distributed_train
import cifar10_eval
from support import cluster as support_cluster, script as support_script, tf_config
from tests import clusters, harness, reference
from tests.clusters import CHIEF, WORKER

FAR = '--max_steps=1000000'
QUICK = 'from support import cluster; cluster.KEEPALIVE_SECS = 5; cluster.GRACE_SECS = 60\n'


@pytest.fixture
def new_cluster(start, data_dir, tmp_path):
    """Function that returns a new Cluster. After the test, its processes are killed."""
    with contextlib.ExitStack() as stack:

        def make(**kwargs):
            cluster = clusters.Cluster(start, data_dir, tmp_path / 'train', **kwargs)
            stack.callback(cluster.kill)
            return cluster

        yield make


def logged_steps(script):
    return [int(step) for step in re.findall(r': step (\d+), ', script.stdout)]


def parse(jobs, job, index=0):
    return tf_config.parse(json.dumps({'cluster': jobs, 'task': {'type': job, 'index': index}}))


def test_tf_config_lists_the_chief_first():
    jobs = {'worker': ['b:1', '[::1]:2'], 'master': ['a:1'], 'evaluator': ['e:1']}
    cluster = parse(jobs, 'worker', '1')
    assert cluster.tasks == [('master', 0, 'a:1'), ('worker', 0, 'b:1'), cluster.me]
    assert cluster.chief == cluster.tasks[0] and 'evaluator' not in cluster.jobs
    assert cluster.me.device == '/job:worker/task:1' and cluster.me.host_and_port == ('::1', 2)
    assert parse(jobs, 'evaluator').me is None
    assert parse({'worker': ['b:1', 'c:1']}, 'worker', 1).chief.address == 'b:1'


@pytest.mark.parametrize(
    'text, hint',
    [
        ('', 'not set'),
        ('{cluster', 'not JSON'),
        ('{"cluster": ["a:1"]}', '"cluster"'),
        ('{"cluster": {"chief": ["a:1"], "ps": ["b:1"]}}', '"ps".* not supported'),
        ('{"cluster": {"chief": ["a:1"], "master": ["b:1"]}}', 'more than one chief'),
        ('{"cluster": {"chief": ["a:1"], "boss": ["b:1"]}}', '"boss"'),
        ('{"cluster": {"chief": ["::1:2222"]}}', '"::1:2222"'),
        ('{"cluster": {"chief": ["a:65536"]}}', '"a:65536"'),
        ('{"cluster": {"chief": ["a:1"], "worker": ["a:1"]}}', 'same address'),
        ('{"cluster": {"chief": ["a:1"]}, "task": {}}', '"task"'),
        ('{"cluster": {"chief": ["a:1"]}, "task": {"type": "worker", "index": 0}}', 'worker 0'),
    ],
)
def test_tf_config_error_has_an_example(monkeypatch, text, hint):
    monkeypatch.setenv('TF_CONFIG', text)
    with pytest.raises(support_script.UserError, match=hint) as error:
        tf_config.read()
    assert '\n' not in str(error.value) and '10.0.0.1:2222' in str(error.value)


def test_examples_in_the_docs_fit_the_script():
    page = harness.read(os.path.join(harness.FOLDER, 'docs', 'several_machines.md'))
    manifest = re.search('```yaml\n(.*?)```', page, re.DOTALL).group(1)
    replicas = pytest.importorskip('yaml').safe_load(manifest)['spec']['tfReplicaSpecs']
    assert {each['restartPolicy'] for each in replicas.values()} == {'ExitCode'}  # After 138.
    assert parse({role.lower(): [f'{role}:1'] for role in replicas}, 'chief').me
    unit = re.search("Environment='TF_CONFIG=(.*)'", page).group(1)
    assert tf_config.parse(unit).me == ('worker', 0, '10.0.0.2:2222')


def test_evaluator_task_evaluates_train_dir(monkeypatch):
    monkeypatch.setenv('TF_CONFIG', clusters.config_of({'chief': ['a:1']}, 'evaluator'))
    harness.set_flags(train_dir='/run', checkpoint_dir='/other')
    monkeypatch.setattr(cifar10_eval, 'main', lambda: cifar10_eval.FLAGS.checkpoint_dir)
    assert cifar10_distributed_train.main() == '/run'


def test_port_in_use_is_reported():
    with socket.socket() as taken:
        taken.bind(('', 0))
        taken.listen(1)
        address = f'a:{taken.getsockname()[1]}'
        with pytest.raises(support_script.UserError, match=f'{address}.* in use'):
            support_cluster._listen(tf_config.Task('chief', 0, address))


def test_answer_of_another_program_is_rejected():
    machines = tf_config.parse(tf_config.EXAMPLE)
    greeting = json.dumps({'cluster': machines.jobs, 'task': machines.me})
    for answer in greeting.encode(), b'[' * 100000, b'"\xff', b'{}':
        here, there = socket.socketpair()
        with here, there, here.makefile('rb') as file:
            there.sendall(answer + b'\n')
            with pytest.raises(ValueError, match='another program'):
                support_cluster._Workers(machines)._exchange(machines.me, here, file)


def test_missing_machines_are_reported(new_cluster):
    """The worker's name of the chief is wrong, but the chief reaches the worker."""
    cluster = new_cluster(workers=2, hosts=['no-such-host.invalid', '127.0.0.1', '127.0.0.1'])
    waiting = r'^Waiting for worker 0 .* chief \(no-such-host.invalid.*, worker 1 .* refused'
    for number in signal.SIGKILL, signal.SIGTERM:
        for script in cluster.start(names=[CHIEF, WORKER]).scripts.values():
            script.wait_for(waiting)
        cluster[WORKER if number == signal.SIGKILL else CHIEF].send(number)
        if number == signal.SIGKILL:
            cluster.assert_lost(WORKER)
    assert cluster.statuses() == {CHIEF: 143, WORKER: 0}
    assert 'SIGTERM' in cluster[WORKER].lines[-1]


def test_machines_that_do_not_match_are_named(new_cluster, tmp_path):
    images = reference.rectangle_images(55)
    reference.write_data(tmp_path / 'data', images, np.zeros(55, int), test_images=5)
    version = 'from support.compat import tf; tf.__version__ = "1.2.3"'
    cluster = new_cluster().start(names=[CHIEF])
    cluster.start(f'--data_dir={tmp_path}/data', names=[WORKER], before=version)
    assert cluster.statuses() == {CHIEF: 1, WORKER: 1}
    for script in cluster.scripts.values():
        (error,) = script.errors
        for fact in 'training images 50, the chief 300', 'data_batch_3.bin', 'TensorFlow 1.2.3':
            assert re.search(rf'worker 0 \(\S+\) has {fact}', error)


def test_two_machines_compute_what_one_computes(new_cluster, train, tmp_path):
    """With IPv6 if available, and with proxies, which must not be used."""
    values = reference.checkpoint_values(0, *[reference.random_variables()] * 2)
    for folder in 'one', 'train':
        reference.write_checkpoint(tmp_path / folder, 0, values)
    proxies = dict.fromkeys(['http_proxy', 'https_proxy', 'grpc_proxy'], 'http://127.0.0.1:9')
    before = f'import os, tests.programs.fixed_input; os.environ.update({proxies})'
    one = train('--max_steps=3', '--batch_size=16', folder='one', before=before)
    has_ipv6 = ' lo\n' in harness.read('/proc/net/if_inet6')
    two = new_cluster(hosts=['[::1]', '[::1]'] if has_ipv6 else None)
    two.start('--max_steps=3', '--num_gpus=2', before=before).assert_finished(3)
    speeds = re.findall(r'\((\S+) examples/sec; (\S+) sec/batch\)', two[CHIEF].stdout)
    assert len(speeds) == 3
    for images_per_second, seconds in speeds:  # Two machines with two towers of 8 images each.
        assert float(images_per_second) * float(seconds) == pytest.approx(32, rel=0.05)
    assert one.wait() == 0
    expected = reference.read_checkpoint(f'{tmp_path}/one/model.ckpt-3')
    _, found = two.check()
    for name in reference.CHECKPOINT_NAMES:
        moved = abs(expected[name] - values[name]).max()
        assert moved > 1e-5, f'{name} has hardly moved'
        atol = max(5e-6, moved / 100)  # The gradients are summed in another order.
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol)


def test_lost_machine_ends_all_and_the_run_resumes(new_cluster):
    cluster, done = new_cluster(workers=2), 0
    impatient = 'from support import cluster; cluster.GRACE_SECS = 1'
    for lost, number, status in (WORKER, signal.SIGTERM, 143), (CHIEF, signal.SIGKILL, -9):
        cluster.start(FAR, '--save_checkpoint_secs=1', before={WORKER: impatient})
        cluster[CHIEF].wait_for(f'step {done + 10},')
        cluster[lost].send(number)
        cluster.assert_lost(lost)
        assert cluster[lost].wait() == status
        assert logged_steps(cluster[CHIEF])[0] == done
        assert cluster[CHIEF].stdout.count('Filling queue') == 1
        done, _ = cluster.check()


def noise(address):
    """Sends what is not from TensorFlow or from this project. Returns a connection that stays."""
    host, port = address.split(':')
    for text in b'', b'GET / HTTP/1.1\r\n\r\n', os.urandom(100000), b'{"status": 1, "why": ""}\n':
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as sock:
            sock.sendall(text)
    return socket.create_connection((host, int(port)))


def test_noise_and_pauses_disturb_nothing(new_cluster):
    cluster = new_cluster(workers=2).start(FAR, names=[WORKER, 'worker 1'], before=QUICK)
    cluster['worker 1'].wait_for('^3 machines')
    with contextlib.ExitStack() as stack:
        stack.enter_context(noise(cluster.addresses['worker 1']))
        cluster.start(FAR, names=[CHIEF], before=QUICK)[CHIEF].wait_for('step 5,')
        for address in cluster.addresses.values():
            stack.enter_context(noise(address))
        for name in WORKER, CHIEF:
            cluster[name].send(signal.SIGSTOP)
        time.sleep(6)  # Longer than the keepalive. There is no event to wait for.
        for name in CHIEF, WORKER:
            cluster[name].send(signal.SIGCONT)
        cluster[CHIEF].wait_for(f'step {logged_steps(cluster[CHIEF])[-1] + 20},')
    # All are stopped together, as by a scheduler: the chief saves before the workers end.
    for name in 'worker 1', CHIEF:
        cluster[name].send(signal.SIGUSR1)
    assert cluster.statuses() == {CHIEF: 143, WORKER: 0, 'worker 1': 0}
    assert [script.errors for script in cluster.scripts.values()] == [[], [], []]
    assert f'model.ckpt-{cluster.check()[0]}' in cluster[CHIEF].lines[-1]
    assert 'SIGUSR1' in cluster[WORKER].lines[-1]


def test_cut_network_ends_both_sides(new_cluster):
    try:
        network = clusters.Network(2)
    except subprocess.CalledProcessError as error:
        pytest.skip(f'cannot create networks here: {error}')
    with network:
        cluster = new_cluster(hosts=network.addresses)
        before = {CHIEF: network.enter(0) + QUICK, WORKER: network.enter(1) + QUICK}
        cluster.start(FAR, before=before)[CHIEF].wait_for('step 5,')
        network.cut(1)
        cluster.assert_lost(WORKER, 30)
        assert cluster[WORKER].wait(30) == 138
