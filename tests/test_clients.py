"""Programs as they have been written against the classic modules, run on these.

Each program in tests/clients is a client of one kind: a chapter of a book, a copy of the evaluator,
a freezer ... They run as processes, in a folder of their own.
"""

import os
import re
import signal

import numpy as np
import pytest

import cifar10_input
from support.compat import tf
from tests import harness, reference


@pytest.fixture
def client(start, tmp_path):
    """Function that runs a client to its end, in tmp_path, and returns its output.

    With fresh=True in a new Python, where nothing is imported yet; PYTHONPATH names the modules.
    """

    def run(name, *flags, fresh=False):
        script = f'tests/clients/{name}.py'
        if fresh:
            env = dict(harness.script_environment(), PYTHONPATH=harness.FOLDER)
            script = harness.start_script(str(tmp_path / name), script, flags, env)
        else:
            script = start(script, *flags, before=f'import os; os.chdir({str(tmp_path)!r})')
        assert script.wait() == 0, script.stdout + script.stderr
        return script.stdout

    return run


@pytest.fixture(scope='module')
def checkpoint_dir(known_precision, tmp_path_factory):
    """A checkpoint whose moving averages are the variables of `known_precision`."""
    folder = str(tmp_path_factory.mktemp('checkpoint'))
    values = reference.checkpoint_values(
        7, reference.random_variables(2), known_precision.variables
    )
    tf.train.update_checkpoint_state(folder, reference.write_checkpoint(folder, 7, values))
    return folder


def test_client_book(client, data_dir):
    output = client('book', f'--data_dir={data_dir}')
    losses = [float(loss) for loss in re.findall('loss = (.*)', output)]
    assert len(losses) == 7 and losses[0] == pytest.approx(2.3, abs=0.2)
    assert output.endswith('kernel (5, 5, 3, 8)\n')


def test_client_evaluator(client, known_precision, checkpoint_dir):
    """Three batches of 16: the 40 test images, of which NumPy finds 23 right, and 8 once more."""
    flags = [f'--data_dir={known_precision.data_dir}', f'--checkpoint_dir={checkpoint_dir}']
    output = client('evaluator', *flags, '--batch_size=16', '--num_examples=40')
    assert f'step 7: precision @ 1 = {(23 + 8) / 48:.3f}\n' == output


def test_client_own_loop(client, data_dir, tmp_path):
    output = client('own_loop', f'--data_dir={data_dir}')
    assert 'parameters: 1068298\n' in output
    (first, first_terms), *others = re.findall('loss = (.*), terms: (.*)', output)
    assert float(first) == pytest.approx(4.68, abs=0.15) and first_terms == first
    assert float(others[-1][0]) < float(first)
    assert {layer + '/activations' for layer in reference.LAYERS} < set(output.split())
    assert harness.saved_steps(tmp_path) == [11]


def test_client_freezer(client, checkpoint_dir, tmp_path):
    client('freezer', checkpoint_dir)
    result = np.load(str(tmp_path / 'frozen.npz'))
    wanted = reference.logits(reference.random_variables(2), result['images'])
    np.testing.assert_allclose(result['live'], wanted, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(result['frozen'], result['live'], rtol=1e-5, atol=1e-6)
    assert np.abs(result['gradient']).max() > 0


def test_client_visualizer(client, known_precision, checkpoint_dir, tmp_path):
    client('visualizer', checkpoint_dir, f'--data_dir={known_precision.data_dir}')
    result = np.load(str(tmp_path / 'shown.npz'))
    variables = reference.random_variables(2)
    np.testing.assert_array_equal(result['weights'], variables['conv1/weights'])
    convolved = reference.convolution(result['arr_0'].astype(float), variables['conv1/weights'])
    wanted = np.maximum(convolved + variables['conv1/biases'], 0)
    np.testing.assert_allclose(result['arr_2'], wanted, rtol=1e-3, atol=1e-4)
    assert result['arr_1'].shape == (64, 5, 5, 3)
    assert result['arr_3'].shape == (128, 384)


def test_client_six_classes(client):
    output = client('six_classes')
    assert 'logits [4, 6]' in output
    rates = re.findall('rate (.*)', output)  # 2 epochs of 1000 images are 15.6 batches of 128.
    assert rates == ['0.0500'] * 2 + ['0.0050'] * 2


def test_client_own_network(client):
    output = client('own_network')
    loss, by_hand = re.search('loss (.*) (.*)', output).groups()
    assert float(loss) == pytest.approx(float(by_hand), abs=1e-3)
    tags = {'layer1/activations', 'layer2/sparsity', 'layer1/weights/gradients'}
    assert tags < set(output.split())
    assert 'reset False layer1/weights layer1/biases' in output


def test_client_single_image(client, known_precision, checkpoint_dir, tmp_path):
    image = reference.rectangle_images(1)
    with tf.Session() as session:
        png = session.run(tf.image.encode_png(image[0]))
    (tmp_path / 'picture.png').write_bytes(png)
    output = client('classify', 'picture.png', checkpoint_dir)
    probabilities = reference.probabilities(known_precision.variables, image, 1)[0]
    best = np.argsort(-probabilities)[:3]
    assert re.findall(r'class (\d): (\S+)', output) == [
        (str(number), f'{probabilities[number]:.3f}') for number in best
    ]
    assert f'as a list {best[0]} as an array {best[0]}' in output


def test_client_reader(client, tmp_path):
    reference.write_numbered(tmp_path, [60] * 5)
    client('reader', str(tmp_path))
    batches = np.load(str(tmp_path / 'batches.npz'))
    numbers = reference.numbers_of(batches['arr_0'])
    np.testing.assert_array_equal(batches['arr_1'], numbers % 10)
    assert len(set(batches['arr_2'])) == len(set(numbers)) > 150


def test_client_finetuning(client, checkpoint_dir):
    assert client('finetune', checkpoint_dir).splitlines() == ['accuracy 1.00', 'same True']


def test_client_imported_scripts(client, data_dir, tmp_path):
    """Both trainers and the evaluator in one process; then their graph, without our modules."""
    flags = [f'--data_dir={data_dir}', f'--train_dir={tmp_path}/run', '--batch_size=8']
    output = client('driver', *flags, 'argument', fresh=True)
    assert re.findall('step (.), loss', output) == ['0', '2', '4']
    assert len(re.findall(r'precision @ 1 = 0\.', output)) == 2
    assert output.endswith("http://localhost/mine 2 ['argument']\n")
    output = client('meta_graph', f'{tmp_path}/run', 'tower_0/')
    assert output.splitlines() == ['(8, 10) (192, 10)', 'step 6']


def test_client_monitored_session(client, train, data_dir, tmp_path):
    """More than one pass over the 300 images; the checkpoint can be resumed and evaluated."""
    flags = [f'--data_dir={data_dir}', f'--train_dir={tmp_path}', '--batch_size=100']
    losses = re.findall('loss = (.*)', client('monitored', *flags, '--max_steps=4'))
    assert len(losses) == 4 and float(losses[0]) == pytest.approx(4.68, abs=0.15)
    resumed = train('--max_steps=6')
    assert resumed.wait() == 0, resumed.stderr
    assert re.findall('step (.), loss', resumed.stdout) == ['4', '5']
    names = sorted(reference.read_checkpoint(tmp_path / 'model.ckpt-6'))
    assert names == reference.CHECKPOINT_NAMES
    flags = [f'--data_dir={data_dir}', f'--checkpoint_dir={tmp_path}', '--num_examples=40']
    assert 'step 6: precision @ 1 = 0.' in client('evaluator', *flags, '--batch_size=20')


def test_client_towers(client, train, data_dir, tmp_path):
    """The step in the checkpoint is a float; it can be resumed."""
    flags = [f'--data_dir={data_dir}', f'--train_dir={tmp_path}', '--batch_size=8']
    losses = re.search('losses: (.*) (.*)', client('towers', *flags)).groups()
    assert [float(loss) for loss in losses] == pytest.approx([4.68] * 2, abs=0.15)
    before = reference.read_checkpoint(tmp_path / 'model.ckpt-3')
    assert before['global_step'].dtype == np.float32
    resumed = train('--max_steps=4')
    assert resumed.wait() == 0, resumed.stderr
    after = reference.read_checkpoint(tmp_path / 'model.ckpt-4')
    assert after['global_step'] == 4 and after['global_step'].dtype == np.int64
    name = 'local3/weights' + reference.AVERAGE
    assert 0 < np.abs(after[name] - before[name]).max() < 0.1


def test_client_v1_checkpoint_is_evaluated_and_resumed(known_precision, train, start, tmp_path):
    """The format of TensorFlow before 0.12."""
    values = reference.checkpoint_values(
        5, reference.random_variables(2), known_precision.variables
    )
    for name, value in values.items():
        tf.get_variable(name, initializer=value)
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        saver = tf.train.Saver(write_version=tf.train.SaverDef.V1)
        saver.save(session, str(tmp_path / 'model.ckpt'), global_step=5)
    flags = [f'--data_dir={known_precision.data_dir}', f'--checkpoint_dir={tmp_path}']
    evaluator = start(harness.EVAL, *flags, f'--eval_dir={tmp_path}/eval', '--run_once')
    assert evaluator.wait() == 0 and 'precision @ 1 = 0.575' in evaluator.stdout
    resumed = train('--max_steps=6')
    assert resumed.wait() == 0 and f'{tmp_path}/model.ckpt-5,' in resumed.stdout, resumed.stderr
    after = reference.read_checkpoint(tmp_path / 'model.ckpt-6')
    average, decay = 'local3/weights' + reference.AVERAGE, (1 + 6) / (10 + 6)
    expected = decay * values[average] + (1 - decay) * after['local3/weights']
    np.testing.assert_allclose(after[average], expected, atol=1e-6)


def test_client_notebook(data_dir, tmp_path):
    """Scripts by %run and as modules; Interrupt stops the trainer, not the kernel."""
    jupyter_client = pytest.importorskip('jupyter_client.manager')
    pytest.importorskip('ipykernel')
    env = dict(harness.script_environment(), PYTHONPATH=harness.FOLDER)
    manager, kernel = jupyter_client.start_new_kernel(cwd=str(tmp_path), env=env)

    def run(code, interrupt_at='nothing'):
        """Runs a cell. Returns its output and the status of the reply."""
        output = []

        def note(message):
            output.append(message['content'].get('text', ''))
            if interrupt_at in output[-1]:
                manager.interrupt_kernel()

        reply = kernel.execute_interactive(code, timeout=harness.TIMEOUT, output_hook=note)
        return ''.join(output), reply['content']['status']

    flags = f'--data_dir={data_dir} --batch_size=8 --log_frequency=1'
    try:
        for steps in 2, 3:
            script = f'%run {harness.FOLDER}/cifar10_train.py --train_dir=a --max_steps={steps}'
            output, status = run(f'{script} {flags}')
            assert status == 'ok' and f'a/model.ckpt-{steps}' in output, output
        script = f'%run {harness.FOLDER}/tests/clients/evaluator.py --checkpoint_dir=a'
        output, _ = run(f'{script} --num_examples=40 {flags}')
        assert 'step 3: precision @ 1 = 0.' in output
        run('import cifar10_train')
        run("cifar10_train.FLAGS.train_dir, cifar10_train.FLAGS.max_steps = 'b', 1000")
        output, _ = run('print(cifar10_train.main())', interrupt_at='step 2, loss')
        assert 'SIGINT' in output and output.endswith(f'{128 + signal.SIGINT}\n')
        step = int(re.search(r'b/model.ckpt-(\d+)', output).group(1)) + 1
        output, status = run(f'cifar10_train.FLAGS.max_steps = {step}\ncifar10_train.main()')
        assert status == 'ok' and f'b/model.ckpt-{step}' in output, output
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)


def test_assigned_constants_of_the_input_count(data_dir, monkeypatch, capsys):
    monkeypatch.setattr(cifar10_input, 'NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN', 1000)
    monkeypatch.setattr(cifar10_input, 'IMAGE_SIZE', 28)
    folder = os.path.join(data_dir, reference.DATA_FOLDER)
    images, _ = cifar10_input.distorted_inputs(data_dir=folder, batch_size=8)
    assert images.shape.as_list() == [8, 28, 28, 3]
    assert ' 400 ' in capsys.readouterr().out
