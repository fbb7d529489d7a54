"""Tests of the trainer for several machines: real processes on loopback, and what befalls them."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow.compat.v1 as tf

from support import cluster
from support.local_cluster import free_ports
from tests import clusters
from tests import harness
from tests import reference

DISTRIBUTED = clusters.DISTRIBUTED
FAR = '--max_steps=1000000'
CHIEF, WORKER, PS = clusters.CHIEF, clusters.WORKER, clusters.PS


@pytest.fixture
def new_cluster(start, data_dir, tmp_path):
    """Function that makes a Cluster. What it has started is gone after the test."""
    made = []

    def make(train_dir=None, **kwargs):
        made.append(clusters.Cluster(start, data_dir, train_dir or tmp_path / 'train', **kwargs))
        return made[-1]

    yield make
    for each in made:
        each.kill()


def logged_steps(script):
    return [int(step) for step in re.findall(r': step (\d+), ', script.stdout)]


# --- TF_CONFIG ------------------------------------------------------------------


def parse(jobs, job, index=0):
    return cluster.parse(json.dumps({'cluster': jobs, 'task': {'type': job, 'index': index}}))


def test_tf_config_names_the_machines_and_which_this_one_is():
    jobs = {'worker': ['b:1', 'c:1'], 'chief': ['a:1'], 'ps': ['d:1'], 'evaluator': ['e:1']}
    found = parse(jobs, 'worker', 1)
    assert [str(task) for task in found.tasks] == [
        'chief (a:1)',
        'ps 0 (d:1)',
        'worker 0 (b:1)',
        'worker 1 (c:1)',
    ]
    assert found.me == ('worker', 1, 'c:1') and found.chief == ('chief', 0, 'a:1')
    towers = [task.device for task in cluster.workers(found)]
    assert towers == ['/job:chief/task:0', '/job:worker/task:0', '/job:worker/task:1']
    assert 'evaluator' not in found.jobs
    assert parse(jobs, 'evaluator').me is None


def test_the_chief_is_called_master_too_and_without_either_it_is_worker_0():
    found = parse({'master': ['a:1'], 'worker': ['b:1']}, 'master')
    assert found.me == found.chief == ('master', 0, 'a:1')
    found = parse({'ps': ['a:1'], 'worker': ['b:1', 'c:1']}, 'worker', '1')
    assert found.me == ('worker', 1, 'c:1') and found.chief == ('worker', 0, 'b:1')
    assert [task.index for task in cluster.workers(found)] == [0, 1]


@pytest.mark.parametrize(
    'text, message',
    [
        ('', 'TF_CONFIG is not set'),
        ('{cluster', 'not JSON'),
        ('[]', 'no "cluster"'),
        ('{"cluster": ["a:1"]}', 'no "cluster"'),
        ('{"cluster": {"ps": ["a:1"]}}', 'neither a chief nor a worker'),
        ('{"cluster": {"chief": ["a:1", "b:1"]}}', 'only one chief'),
        ('{"cluster": {"chief": ["a:1"], "master": ["b:1"]}}', 'only one chief'),
        ('{"cluster": {"chief": ["a:1"], "boss": ["b:1"]}}', '"boss" is none of chief'),
        ('{"cluster": {"chief": "a:1"}}', '"chief" is not a list'),
        ('{"cluster": {"chief": ["a:1"], "worker": ["b"]}}', 'worker: "b" is not an address'),
        ('{"cluster": {"chief": ["a:0"]}}', '"a:0" is not an address'),
        ('{"cluster": {"chief": ["a:65536"]}}', '"a:65536" is not an address'),
        ('{"cluster": {"chief": [2222]}}', '2222 is not an address'),
        ('{"cluster": {"chief": ["a:1"], "worker": ["a:1"]}}', 'a:1 is there twice'),
        ('{"cluster": {"chief": ["a:1"]}}', 'no "task"'),
        ('{"cluster": {"chief": ["a:1"]}, "task": {}}', 'no "task"'),
        (
            '{"cluster": {"chief": ["a:1"]}, "task": {"type": "worker", "index": 0}}',
            'the task worker 0 is not in the cluster',
        ),
    ],
)
def test_a_wrong_tf_config_is_told_with_an_example(monkeypatch, text, message):
    monkeypatch.setenv('TF_CONFIG', text)
    with pytest.raises(cluster.script.UserError, match=message) as error:
        cluster.from_environment()
    assert '\n' not in str(error.value) and '"cluster": {"chief": ["10.' in str(error.value)


def test_a_wrong_tf_config_and_a_port_in_use_end_the_script_in_one_line(start, data_dir):
    script = start(DISTRIBUTED)
    (port,) = free_ports(1)
    config = clusters.config_of({'chief': [f'127.0.0.1:{port}'], 'worker': ['127.0.0.1:1']}, CHIEF)
    with socket.socket() as taken:
        taken.bind(('', port))
        taken.listen(1)
        before = f'import os; os.environ["TF_CONFIG"] = {config!r}'
        second = start(DISTRIBUTED, f'--data_dir={data_dir}', before=before)
        assert second.wait() == 1
    assert second.errors == [
        f'{DISTRIBUTED}: cannot listen on the port of chief (127.0.0.1:{port}): Address already in '
        'use. End what uses it, or name another one in the TF_CONFIG of all machines.'
    ]
    assert script.wait() == 1
    assert len(script.errors) == 1 and 'TF_CONFIG is not set' in script.errors[0]


def test_the_manifest_in_the_docs_and_the_tf_config_that_kubeflow_makes_of_it(monkeypatch):
    yaml = pytest.importorskip('yaml')
    page = harness.read(os.path.join(harness.FOLDER, 'docs', 'several_machines.md'))
    job = yaml.safe_load(re.search('```yaml\n(.*?)```', page, re.DOTALL).group(1))
    assert job['apiVersion'] == 'kubeflow.org/v1' and job['kind'] == 'TFJob'
    assert job['spec']['runPolicy']['cleanPodPolicy'] in ('Running', 'All')
    hosts = {}
    for role, replicas in job['spec']['tfReplicaSpecs'].items():
        assert replicas['restartPolicy'] == 'ExitCode'
        (container,) = replicas['template']['spec']['containers']
        assert container['name'] == 'tensorflow'
        assert [port['containerPort'] for port in container['ports']] == [2222]
        assert os.path.exists(os.path.join(harness.FOLDER, container['command'][1]))
        hosts[role.lower()] = [
            f'{job["metadata"]["name"]}-{role.lower()}-{i}.default.svc:2222'
            for i in range(replicas['replicas'])
        ]
    # As its source has it; "environment" is one of its own.
    task = {'type': 'worker', 'index': 1}
    config = {'cluster': hosts, 'task': task, 'environment': 'cloud'}
    monkeypatch.setenv('TF_CONFIG', json.dumps(config))
    found = cluster.from_environment()
    assert found.me == ('worker', 1, 'cifar10-worker-1.default.svc:2222')
    assert len(cluster.workers(found)) == 3
    # The unit of systemd, in the same page.
    text = re.search("Environment='TF_CONFIG=(.*)'", page).group(1)
    assert cluster.parse(text).me == ('worker', 0, '10.0.0.2:2222')


# --- Runs that nothing befalls ------------------------------------------------------


def test_one_device_two_machines_with_a_ps_and_one_device_go_on_with_one_run(
    new_cluster, train, tmp_path
):
    assert train('--max_steps=2', folder='train').wait() == 0
    machines = new_cluster(ps=1)
    # A ps needs no data.
    machines.start('--max_steps=5', '--num_gpus=2', data_dirs={PS: '/dev/null/none'})
    machines.assert_finished(5)
    assert logged_steps(machines[CHIEF]) == [2, 3, 4]
    assert sum('Filling queue' in line for line in machines[CHIEF].lines) == 1
    speeds = re.findall(r'\((\S+) examples/sec; (\S+) sec/batch\)', machines[CHIEF].stdout)
    assert len(speeds) == 3
    for images_per_second, seconds in speeds:  # Two machines with two towers of 8 images each.
        assert float(images_per_second) * float(seconds) == pytest.approx(32, rel=0.05)
    for name in machines.names:
        assert 'All 3 machines are there.' in machines[name].lines
        assert machines[name].errors == []
    for name in WORKER, PS:
        assert machines[name].lines[-1] == 'The chief has finished.'
    assert train('--max_steps=6', folder='train').wait() == 0
    machines.check(6)
    # Nothing to do is an end like any other.
    machines.start('--max_steps=6')
    assert machines.statuses() == dict.fromkeys(machines.names, 0)
    assert machines[CHIEF].lines[-1].startswith('Nothing to do:')


# The same images, in the same order, for as many pipelines as there are.
FIXED_INPUT = '''
import cifar10_input, numpy as np
import tensorflow.compat.v1 as tf
taken = [0]
def distorted_inputs(data_dir, batch_size):
    part = slice(taken[0], taken[0] + batch_size)
    taken[0] += batch_size
    images = np.random.RandomState(5).normal(size=[128, 24, 24, 3]).astype(np.float32)
    labels = np.random.RandomState(6).randint(0, 10, 128).astype(np.int32)
    assert len(labels[part]) == batch_size
    return tf.constant(images[part]), tf.constant(labels[part])
cifar10_input.distorted_inputs = distorted_inputs
'''


def homes_of_weights(path):
    """Where the weights in a graph live, as in Cluster.names."""
    with tf.Graph().as_default() as graph:
        tf.train.import_meta_graph(path)
    devices = [graph.get_operation_by_name(name).device for name in reference.MODEL]
    specs = [tf.DeviceSpec.from_string(device) for device in devices]
    return {spec.job if spec.job == 'chief' else f'{spec.job} {spec.task}' for spec in specs}


def test_two_machines_of_64_do_what_one_does_with_128_also_with_ps_tasks(
    new_cluster, train, tmp_path
):
    values = reference.checkpoint_values(0, *[reference.random_variables()] * 2)
    for folder in 'one', 'two', 'ps':
        reference.write_checkpoint(tmp_path / folder, 0, values)
    one = train('--max_steps=3', '--batch_size=128', folder='one', before=FIXED_INPUT)
    two = new_cluster(tmp_path / 'two')
    spread = new_cluster(tmp_path / 'ps', ps=2)
    for machines in two, spread:
        machines.start('--max_steps=3', '--batch_size=64', before=FIXED_INPUT)
    assert one.wait() == 0
    expected = reference.read_checkpoint(f'{tmp_path}/one/model.ckpt-3')
    for machines, homes in (two, {'chief'}), (spread, {'ps 0', 'ps 1'}):
        machines.assert_finished(3)
        assert homes_of_weights(f'{machines.train_dir}/model.ckpt-3.meta') == homes
        _, found = machines.check(3)
        for name in reference.CHECKPOINT_NAMES:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6)
            moved = abs(expected[name] - values[name]).max()
            assert moved > 1e-5, f'{name} has hardly moved'


def test_an_evaluator_evaluates_the_chiefs_folder(start, data_dir, tmp_path):
    variables = reference.random_variables()
    values = reference.checkpoint_values(7, variables, variables)
    reference.write_checkpoint(tmp_path, 7, values)
    config = clusters.config_of({'chief': ['127.0.0.1:1']}, 'evaluator')
    script = start(
        DISTRIBUTED,
        f'--data_dir={data_dir}',
        f'--train_dir={tmp_path}',
        f'--eval_dir={tmp_path}/eval',
        '--run_once',
        before=f'import os; os.environ["TF_CONFIG"] = {config!r}',
    )
    assert script.wait() == 0
    assert re.search('precision @ 1 = ', script.lines[-1])


# --- Waiting --------------------------------------------------------------------


def test_who_is_missing_is_named_and_a_chief_stopped_meanwhile_ends_the_others(new_cluster):
    machines = new_cluster(workers=2).start(names=[CHIEF, WORKER])
    address = machines.addresses[2]
    waiting = rf'^Waiting for worker 1 \({address}\): Connection refused\.$'
    machines[CHIEF].wait_for(waiting)
    machines[WORKER].wait_for(waiting)
    machines[CHIEF].send(signal.SIGTERM)
    assert machines.statuses() == {CHIEF: 143, WORKER: 0}
    assert machines[WORKER].lines[-1] == 'The chief was stopped by SIGTERM.'
    assert machines[CHIEF].errors == []


def test_a_machine_lost_while_waiting_and_a_host_that_does_not_resolve(new_cluster):
    machines = new_cluster(workers=2, hosts=['127.0.0.1', '127.0.0.1', 'no-such-host.invalid'])
    machines.start(names=[CHIEF, WORKER])
    waiting = r'^Waiting for worker 1 \(no-such-host.invalid:\d+\): .*(known|resol).*$'
    machines[CHIEF].wait_for(waiting)
    machines[WORKER].wait_for(waiting)
    machines[WORKER].kill()
    machines.assert_lost(WORKER)


def test_machines_that_differ_are_named_before_the_first_step(new_cluster, tmp_path):
    data = tmp_path / 'data'
    images = reference.rectangle_images(55)
    reference.write_data(data, images, np.zeros(55, int), test_images=5)
    version = 'import tensorflow.compat.v1 as tf; tf.__version__ = "1.2.3"'
    machines = new_cluster(workers=2)
    machines.start(data_dirs={WORKER: data}, before={'worker 1': version})
    assert machines.statuses() == {CHIEF: 1, WORKER: 1, 'worker 1': 1}
    for name in machines.names:
        (error,) = machines[name].errors
        assert f'worker 0 ({machines.addresses[1]}) has training images 50, the chief 300' in error
        assert re.search(r'worker 0 \(\S+\) has data_batch_3.bin [0-9a-f]+, the chief', error)
        assert re.search(r'worker 1 \(\S+\) has TensorFlow 1.2.3, the chief', error)
    assert logged_steps(machines[CHIEF]) == []


# --- What befalls a run ------------------------------------------------------------


def test_whichever_is_killed_all_others_end_and_the_run_goes_on(new_cluster):
    machines = new_cluster(ps=1)
    # The input stands still, so this is before the first step.
    machines.start(FAR, before={CHIEF: harness.slow_input('distort', 0)})
    machines[CHIEF].wait_for('Filling queue')
    assert harness.until(lambda: harness.saved_steps(machines.train_dir))
    machines[WORKER].kill()
    machines.assert_lost(WORKER)
    done = 0
    for lost in PS, CHIEF:
        machines.start(FAR, '--save_checkpoint_secs=1')
        machines[CHIEF].wait_for(f'step {done + 10},')
        machines[lost].kill()
        machines.assert_lost(lost)
        assert logged_steps(machines[CHIEF])[0] == done
        done = harness.saved_steps(machines.train_dir)[-1]
    machines.start(f'--max_steps={done + 2}').assert_finished(done + 2)
    assert logged_steps(machines[CHIEF]) == [done, done + 1]


def noise(address):
    """What is not TensorFlow says what it has to say."""
    host, port = address.rsplit(':', 1)
    for text in b'', b'GET / HTTP/1.1\r\n\r\n', os.urandom(100000), b'{"status": 1, "why": ""}\n':
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as line:
            line.sendall(text)
    return socket.create_connection((host, int(port)))  # And stays.


def test_noise_a_pause_and_a_stop(new_cluster):
    machines = new_cluster(workers=2)
    machines.start(FAR, names=[CHIEF, WORKER])
    machines[CHIEF].wait_for('^Waiting for worker 1')
    lines = [noise(address) for address in machines.addresses[:2]]
    machines.start(FAR, names=['worker 1'])
    machines[CHIEF].wait_for('step 5,')
    lines += [noise(address) for address in machines.addresses]
    machines[WORKER].send(signal.SIGSTOP)
    time.sleep(1)
    machines[CHIEF].send(signal.SIGSTOP)
    time.sleep(4)
    stood = logged_steps(machines[CHIEF])[-1]
    machines[WORKER].send(signal.SIGCONT)
    time.sleep(1)
    machines[CHIEF].send(signal.SIGCONT)
    machines[CHIEF].wait_for(f'step {stood + 20},')
    for line in lines:
        line.close()
    assert [script.errors for script in machines.scripts.values()] == [[], [], []]
    machines[CHIEF].send(signal.SIGINT)
    assert machines.statuses() == {CHIEF: 130, WORKER: 0, 'worker 1': 0}
    step, _ = machines.check()
    assert machines[CHIEF].lines[-1].startswith(f'Stopped by SIGINT at step {step}. Saved ')
    assert machines[WORKER].lines[-1] == 'The chief was stopped by SIGINT.'


def test_a_worker_that_is_stopped_is_lost_and_a_chief_that_fails_says_why(new_cluster, tmp_path):
    quick = 'from support import cluster; cluster.GRACE_SECS = 1'
    machines = new_cluster().start(FAR, before={WORKER: quick})
    machines[CHIEF].wait_for('step 2,')
    second = new_cluster().start(FAR)  # Another chief, in the same folder.
    assert second.statuses() == {CHIEF: 1, WORKER: 1}
    for script in second.scripts.values():
        assert f'another trainer is at work in {machines.train_dir}' in script.errors[0]
    machines[WORKER].send(signal.SIGTERM)
    machines.assert_lost(WORKER)
    assert machines[WORKER].wait() == 128 + signal.SIGTERM


def test_all_told_to_stop_at_the_same_time_wait_for_the_chief_to_save(new_cluster):
    machines = new_cluster(ps=1).start(FAR)
    machines[CHIEF].wait_for('step 2,')
    for name in PS, WORKER, CHIEF:
        machines[name].send(signal.SIGTERM)
    assert machines.statuses() == {CHIEF: 143, WORKER: 0, PS: 0}
    assert machines.check()[0] > 2


# --- All on one machine -------------------------------------------------------------


def children(pid):
    """The processes that a process has started, oldest first."""
    return [int(child) for child in harness.read(f'/proc/{pid}/task/{pid}/children').split()]


def test_a_cluster_on_one_machine_is_started_again_and_ends_with_the_chief(data_dir, tmp_path):
    flags = [f'--data_dir={data_dir}', f'--train_dir={tmp_path}', '--batch_size=8']
    command = ['-m', 'support.local_cluster', '--workers=1', DISTRIBUTED, *flags]
    said, seen = tmp_path / 'said', set()

    def wait_for(pattern):
        def look():
            seen.update(children(launcher.pid))
            return re.search(pattern, said.read_text(), re.MULTILINE)

        assert harness.until(look), said.read_text()

    with said.open('w') as out:
        launcher = subprocess.Popen(
            [sys.executable, *command],
            cwd=harness.FOLDER,
            env=harness.script_environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(r'^chief    \| .*: step 0,')
        wait_for(r'^worker 0 \| All 2 machines are there')
        os.kill(children(launcher.pid)[1], signal.SIGKILL)
        wait_for(r'^chief    \| Worker 0 .* is lost')
        wait_for(r'^One is lost: starting all of them again\.\n(.*\n)*chief    \| All 2 machines')
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(harness.TIMEOUT) == 130
        wait_for(r'^chief    \| Stopped by SIGINT')
        wait_for(r'^worker 0 \| The chief was stopped by SIGINT')
        assert len(seen) >= 4 and not [pid for pid in seen if os.path.exists(f'/proc/{pid}')]
    finally:
        launcher.kill()
        for pid in seen | set(children(launcher.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


# --- A network that is cut -----------------------------------------------------------


@pytest.fixture
def network():
    try:
        network = clusters.Network(2)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip('there is no `ip`, or it may not make networks here')
    with network:
        yield network


def test_a_network_that_is_cut_ends_both_sides_and_the_run_goes_on(network, new_cluster):
    machines = new_cluster(hosts=network.addresses)
    enter = dict(zip(machines.names, map(network.enter, range(2))))
    machines.start(FAR, '--save_checkpoint_secs=1', before=enter)
    machines[CHIEF].wait_for('step 5,')
    network.cut(1)
    for name, other in (CHIEF, WORKER), (WORKER, CHIEF):
        assert machines[name].wait(30) == 138, machines[name].stderr
        (error,) = machines[name].errors
        assert re.match(rf'{other} \(\S+\) is lost: Connection timed out', error, re.IGNORECASE)
    step = harness.saved_steps(machines.train_dir)[-1]
    machines.start(f'--max_steps={step + 2}', before=enter)
    machines[WORKER].wait_for('^Waiting for chief')
    network.mend(1)
    machines.assert_finished(step + 2)
