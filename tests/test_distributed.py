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

from support import script as support_script
from support import tf_config
from support.local_cluster import free_ports
from tests import clusters, harness, reference
from tests.clusters import CHIEF, DISTRIBUTED, WORKER

FAR = '--max_steps=1000000'
QUICK = 'from support import cluster; cluster.KEEPALIVE_SECS = 5'


@pytest.fixture
def new_cluster(start, data_dir, tmp_path):
    """Function that returns a new Cluster. After the test, its processes are killed."""
    with contextlib.ExitStack() as stack:

        def make(train_dir=None, **kwargs):
            cluster = clusters.Cluster(start, data_dir, train_dir or tmp_path / 'train', **kwargs)
            stack.callback(cluster.kill)
            return cluster

        yield make


def logged_steps(script):
    return [int(step) for step in re.findall(r': step (\d+), ', script.stdout)]


# --- TF_CONFIG --------------------------------------------------------------------


def parse(jobs, job, index=0):
    return tf_config.parse(json.dumps({'cluster': jobs, 'task': {'type': job, 'index': index}}))


def test_tf_config_lists_the_chief_first():
    jobs = {'worker': ['b:1', '[::1]:2'], 'chief': ['a:1'], 'evaluator': ['e:1']}
    cluster = parse(jobs, 'worker', 1)
    assert cluster.chief == cluster.tasks[0] == ('chief', 0, 'a:1')
    assert cluster.tasks[1:] == [('worker', 0, 'b:1'), cluster.me]
    assert cluster.me.device == '/job:worker/task:1' and cluster.me.host_and_port == ('::1', 2)
    assert 'evaluator' not in cluster.jobs and parse(jobs, 'evaluator').me is None
    cluster = parse({'master': ['a:1'], 'worker': ['b:1']}, 'master')
    assert cluster.me == cluster.chief == ('master', 0, 'a:1')
    cluster = parse({'worker': ['b:1', 'c:1']}, 'worker', '1')
    assert cluster.me.address == 'c:1' and cluster.chief.address == 'b:1'


@pytest.mark.parametrize(
    'text, hint',
    [
        ('', 'not set'),
        ('{cluster', 'not JSON'),
        ('[]', '"cluster"'),
        ('{"cluster": ["a:1"]}', '"cluster"'),
        ('{"cluster": {"chief": ["a:1"], "ps": ["b:1"]}}', '"ps".* not supported'),
        ('{"cluster": {"evaluator": ["a:1"]}}', 'no chief'),
        ('{"cluster": {"chief": ["a:1", "b:1"]}}', 'more than one chief'),
        ('{"cluster": {"chief": ["a:1"], "master": ["b:1"]}}', 'more than one chief'),
        ('{"cluster": {"chief": ["a:1"], "boss": ["b:1"]}}', '"boss"'),
        ('{"cluster": {"chief": "a:1"}}', '"chief"'),
        ('{"cluster": {"chief": ["a:1"], "worker": ["b"]}}', '"b"'),
        ('{"cluster": {"chief": ["::1:2222"]}}', '"::1:2222"'),
        ('{"cluster": {"chief": ["a:0"]}}', '"a:0"'),
        ('{"cluster": {"chief": ["a:65536"]}}', '"a:65536"'),
        ('{"cluster": {"chief": [2222]}}', '"2222"'),
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


def test_kubeflow_manifest_in_the_docs_fits_the_script(monkeypatch):
    yaml = pytest.importorskip('yaml')
    page = harness.read(os.path.join(harness.FOLDER, 'docs', 'several_machines.md'))
    job = yaml.safe_load(re.search('```yaml\n(.*?)```', page, re.DOTALL).group(1))
    hosts = {}
    for role, replicas in job['spec']['tfReplicaSpecs'].items():
        assert replicas['restartPolicy'] == 'ExitCode'  # Restarts after status 138.
        (container,) = replicas['template']['spec']['containers']
        assert os.path.exists(os.path.join(harness.FOLDER, container['command'][1]))
        hosts[role.lower()] = [
            f'{job["metadata"]["name"]}-{role.lower()}-{i}.default.svc:2222'
            for i in range(replicas['replicas'])
        ]
    # As in the source of the operator, which adds "environment".
    config = {'cluster': hosts, 'task': {'type': 'worker', 'index': 1}, 'environment': 'cloud'}
    monkeypatch.setenv('TF_CONFIG', json.dumps(config))
    assert tf_config.read().me.address == 'cifar10-worker-1.default.svc:2222'
    unit = re.search("Environment='TF_CONFIG=(.*)'", page).group(1)
    assert tf_config.parse(unit).me == ('worker', 0, '10.0.0.2:2222')


def test_port_in_use_is_reported(start, data_dir):
    (port,) = free_ports(1)
    config = clusters.config_of({'chief': [f'127.0.0.1:{port}'], 'worker': ['127.0.0.1:1']}, CHIEF)
    with socket.socket() as taken:
        taken.bind(('', port))
        taken.listen(1)
        before = f'import os; os.environ["TF_CONFIG"] = {config!r}'
        script = start(DISTRIBUTED, f'--data_dir={data_dir}', before=before)
        assert script.wait() == 1
    (error,) = script.errors
    assert f'127.0.0.1:{port}' in error and 'in use' in error


# --- Undisturbed runs --------------------------------------------------------------


def test_run_moves_between_one_device_and_two_machines(new_cluster, train):
    assert train('--max_steps=2', folder='train').wait() == 0
    cluster = new_cluster().start('--max_steps=5', '--num_gpus=2')
    cluster.assert_finished(5)
    assert logged_steps(cluster[CHIEF]) == [2, 3, 4]
    assert cluster[CHIEF].stdout.count('Filling queue') == 1
    speeds = re.findall(r'\((\S+) examples/sec; (\S+) sec/batch\)', cluster[CHIEF].stdout)
    for images_per_second, seconds in speeds:  # Two machines with two towers of 8 images each.
        assert float(images_per_second) * float(seconds) == pytest.approx(32, rel=0.05)
    assert [script.errors for script in cluster.scripts.values()] == [[], []]
    assert train('--max_steps=6', folder='train').wait() == 0
    cluster.check(6)


def test_two_machines_compute_what_one_computes(new_cluster, train, tmp_path):
    values = reference.checkpoint_values(0, *[reference.random_variables()] * 2)
    for folder in 'one', 'two':
        reference.write_checkpoint(tmp_path / folder, 0, values)
    one = train(
        '--max_steps=3', '--batch_size=32', folder='one', before='import tests.programs.fixed_input'
    )
    two = new_cluster(tmp_path / 'two')
    two.start(
        '--max_steps=3', '--batch_size=16', before='import tests.programs.fixed_input'
    ).assert_finished(3)
    assert one.wait() == 0
    expected = reference.read_checkpoint(f'{tmp_path}/one/model.ckpt-3')
    _, found = two.check(3)
    for name in reference.CHECKPOINT_NAMES:
        moved = abs(expected[name] - values[name]).max()
        assert moved > 1e-5, f'{name} has hardly moved'
        atol = max(5e-6, moved / 100)  # The gradients are summed in another order.
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol)


def test_cluster_ignores_proxies_and_accepts_ipv6_addresses(new_cluster):
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(('::1', 0))
            hosts = ['[::1]', '[::1]']
    except OSError:  # No IPv6 here.
        hosts = None
    proxies = ['http_proxy', 'https_proxy', 'grpc_proxy']
    before = f'import os; os.environ.update(dict.fromkeys({proxies}, "http://127.0.0.1:9"))'
    new_cluster(hosts=hosts).start('--max_steps=2', before=before).assert_finished(2)


def test_evaluator_task_evaluates_train_dir(start, data_dir, tmp_path):
    variables = reference.random_variables()
    reference.write_checkpoint(tmp_path, 7, reference.checkpoint_values(7, variables, variables))
    config = clusters.config_of({'chief': ['127.0.0.1:1']}, 'evaluator')
    folders = [f'--data_dir={data_dir}', f'--train_dir={tmp_path}', f'--eval_dir={tmp_path}/eval']
    before = f'import os; os.environ["TF_CONFIG"] = {config!r}'
    script = start(DISTRIBUTED, *folders, '--run_once', before=before)
    assert script.wait() == 0
    assert 'precision @ 1 = ' in script.lines[-1]


# --- Before the first step -----------------------------------------------------------


def test_missing_machines_are_reported_and_a_lost_one_ends_all(new_cluster):
    hosts = ['127.0.0.1'] * 3 + ['no-such-host.invalid']
    cluster = new_cluster(workers=3, hosts=hosts).start(names=[CHIEF, WORKER])
    for name in CHIEF, WORKER:
        match = cluster[name].wait_for(r'^Waiting for (worker 1 \S+ .*refused), (worker 2 \S+ .*)')
        assert cluster.addresses['worker 1'] in match.group(1)
        assert 'no-such-host.invalid' in match.group(2)
    cluster[WORKER].kill()
    cluster.assert_lost(WORKER)


def test_signal_while_waiting_stops_the_workers(new_cluster):
    """The worker's name of the chief is wrong, but the chief reaches the worker."""
    cluster = new_cluster(hosts=['no-such-host.invalid', '127.0.0.1']).start()
    for name in CHIEF, WORKER:
        cluster[name].wait_for(r'^Waiting for worker 0 .* chief \(no-such-host.invalid')
    cluster[CHIEF].send(signal.SIGTERM)
    assert cluster.statuses() == {CHIEF: 143, WORKER: 0}
    assert 'SIGTERM' in cluster[WORKER].lines[-1]


def test_strangers_at_a_workers_address_are_reported(new_cluster):
    cluster = new_cluster()
    host, port = cluster.addresses[WORKER].split(':')
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(5)
        listener.settimeout(harness.TIMEOUT)
        cluster.start('--max_steps=2', names=[CHIEF])
        greeting = {'cluster': cluster.jobs, 'task': ['worker', 0, cluster.addresses[WORKER]]}
        for answer in json.dumps(greeting).encode(), b'[' * 100000, b'"\xff', b'{}':
            caller, _ = listener.accept()
            with caller:
                caller.sendall(answer + b'\n')
        cluster[CHIEF].wait_for(r'^Waiting for worker 0 \S+ another program')
    cluster.start('--max_steps=2', names=[WORKER])
    cluster.assert_finished(2)


def test_machines_that_do_not_match_are_named(new_cluster, tmp_path):
    data = tmp_path / 'data'
    reference.write_data(data, reference.rectangle_images(55), np.zeros(55, int), test_images=5)
    version = 'from support.compat import tf; tf.__version__ = "1.2.3"'
    cluster = new_cluster(workers=2)
    cluster.start(data_dirs={WORKER: data}, before={'worker 1': version})
    assert cluster.statuses() == dict.fromkeys(cluster.names, 1)
    for script in cluster.scripts.values():
        (error,) = script.errors
        assert re.search(r'worker 0 \(\S+\) has training images 50, the chief 300', error)
        assert re.search(r'worker 0 \(\S+\) has data_batch_3.bin', error)
        assert re.search(r'worker 1 \(\S+\) has TensorFlow 1.2.3', error)
    assert logged_steps(cluster[CHIEF]) == []


# --- Disturbed runs -----------------------------------------------------------------


def test_lost_machine_ends_all_and_the_run_resumes(new_cluster):
    cluster = new_cluster(workers=2)
    impatient = 'from support import cluster; cluster.GRACE_SECS = 1'
    done = 0
    for lost, number in (WORKER, signal.SIGTERM), (CHIEF, signal.SIGKILL):
        cluster.start(FAR, '--save_checkpoint_secs=1', before={WORKER: impatient})
        cluster[CHIEF].wait_for(f'step {done + 10},')
        cluster[lost].send(number)
        cluster.assert_lost(lost)
        assert cluster[lost].wait() == (143 if lost == WORKER else -signal.SIGKILL)
        assert logged_steps(cluster[CHIEF])[0] == done
        done = harness.saved_steps(cluster.train_dir)[-1]
    cluster.start(f'--max_steps={done + 2}').assert_finished(done + 2)
    assert logged_steps(cluster[CHIEF]) == [done, done + 1]


def noise(address):
    """Sends what is not from TensorFlow or from this project. Returns a connection that stays."""
    host, port = address.split(':')
    for text in b'', b'GET / HTTP/1.1\r\n\r\n', os.urandom(100000), b'{"status": 1, "why": ""}\n':
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as sock:
            sock.sendall(text)
    return socket.create_connection((host, int(port)))


def test_noise_and_pauses_disturb_nothing(new_cluster):
    quick = QUICK + '; cluster.GRACE_SECS = 60'  # On a busy machine.
    cluster = new_cluster(workers=2).start(FAR, names=[WORKER, 'worker 1'], before=quick)
    for name in WORKER, 'worker 1':
        cluster[name].wait_for('^3 machines')
    sockets = [noise(cluster.addresses[name]) for name in ('worker 1', WORKER)]
    cluster.start(FAR, names=[CHIEF], before=quick)
    cluster[CHIEF].wait_for('step 5,')
    sockets += [noise(address) for address in cluster.addresses.values()]
    for name in WORKER, CHIEF:
        cluster[name].send(signal.SIGSTOP)
    time.sleep(6)  # Longer than the keepalive. There is no event to wait for.
    for name in CHIEF, WORKER:
        cluster[name].send(signal.SIGCONT)
    step = logged_steps(cluster[CHIEF])[-1]
    cluster[CHIEF].wait_for(f'step {step + 20},')
    for sock in sockets:
        sock.close()
    # All are stopped together, as by a scheduler: the chief saves before the workers end.
    for name in 'worker 1', CHIEF:
        cluster[name].send(signal.SIGUSR1)
    assert cluster.statuses() == {CHIEF: 143, WORKER: 0, 'worker 1': 0}
    assert [script.errors for script in cluster.scripts.values()] == [[], [], []]
    step, _ = cluster.check()
    assert f'model.ckpt-{step}' in cluster[CHIEF].lines[-1]
    assert 'SIGUSR1' in cluster[WORKER].lines[-1]


def test_failed_chief_gives_the_workers_its_reason(new_cluster, tmp_path):
    (tmp_path / 'train').mkdir()
    with support_script.locked(str(tmp_path / 'train'), 'busy'):
        cluster = new_cluster().start(FAR)
        assert cluster.statuses() == {CHIEF: 1, WORKER: 1}
    for script in cluster.scripts.values():
        assert f'another trainer is running in {cluster.train_dir}' in script.errors[0]


def test_cut_network_ends_both_sides(new_cluster):
    try:
        network = clusters.Network(2)
    except subprocess.CalledProcessError as error:
        pytest.skip(f'cannot create networks here: {error}')
    with network:
        cluster = new_cluster(hosts=network.addresses)
        cluster.start(
            FAR, before={n: network.enter(i) + QUICK for i, n in enumerate(cluster.names)}
        )
        cluster[CHIEF].wait_for('step 5,')
        network.cut(1)
        cluster.assert_lost(WORKER, 30)
        assert cluster[WORKER].wait(30) == 138
