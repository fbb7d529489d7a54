"""Files and folders that nobody expects where they are: pipes, URLs, pictures, other models."""

import os

import pytest

from results import record
from support import checkpoints, script
from support.compat import tf
from tests import clusters, harness, reference
from tools import open_tensorboard


@pytest.mark.parametrize('suffix', ['.index', '.data-00000-of-00001', ''])
def test_checkpoint_with_a_pipe_is_skipped(tmp_path, suffix, capsys):
    values = reference.checkpoint_values(1, {}, reference.random_variables())
    for step in 1, 2:
        reference.write_checkpoint(tmp_path, step, values)
    path = tmp_path / f'model.ckpt-2{suffix}'
    if suffix:
        path.unlink()
    os.mkfifo(str(path))
    assert checkpoints.newest(str(tmp_path)) == f'{tmp_path}/model.ckpt-1'
    assert f'{path} is not a regular file' in capsys.readouterr().err


def test_record_ignores_pipes_among_the_events(tmp_path):
    os.mkfifo(str(tmp_path / 'events.out.tfevents.1.host'))
    assert record.read_losses(str(tmp_path)) == {}


def test_record_rejects_a_url(data_dir, tmp_path):
    FLAGS = record.FLAGS  # noqa: N806
    FLAGS.data_dir, FLAGS.record_dir, FLAGS.train_dir = data_dir, str(tmp_path), 'gs://bucket/run'
    with pytest.raises(script.UserError, match='--train_dir=gs://bucket/run: only local'):
        record.main()


@pytest.mark.parametrize('name', ['gs://bucket/run', 'a file'])
def test_tensorboard_rejects_what_is_no_local_folder(tmp_path, name, capsys):
    (tmp_path / 'a file').touch()
    folder = name if '://' in name else str(tmp_path / name)
    with pytest.raises(SystemExit):
        open_tensorboard.main([f'--train_dir={folder}'])
    assert f'{folder} is not a local folder' in capsys.readouterr().err


def test_chief_checks_train_dir_before_it_waits(start, data_dir):
    config = clusters.config_of({'chief': ['127.0.0.1:1'], 'worker': ['127.0.0.1:2']}, 'chief')
    chief = start(
        clusters.DISTRIBUTED,
        f'--data_dir={data_dir}',
        '--train_dir=/dev/null/run',
        before=f'import os; os.environ["TF_CONFIG"] = {config!r}',
    )
    assert chief.wait() == 1
    assert chief.stdout == '' and len(chief.errors) == 1 and '--train_dir=' in chief.stderr


def test_export_below_another_model_says_which_one_is_served(start, seven_classes, tmp_path):
    (tmp_path / '150000').mkdir()
    export = start(
        'cifar10_export.py', f'--checkpoint_dir={seven_classes.folder}', f'--export_dir={tmp_path}'
    )
    assert export.wait() == 0
    assert export.lines[-1].startswith(f'A server loads {tmp_path}/150000 instead')
    assert len(export.lines) == 2


def test_bracket_is_rejected_in_the_path_of_a_checkpoint(tmp_path):
    record.FLAGS.checkpoint_dir = f'{tmp_path}/run[1]'
    with pytest.raises(script.UserError, match=r'--checkpoint_dir=.*run\[1\]: TensorFlow cannot'):
        checkpoints.newest_required('checkpoint_dir')


def test_data_folder_may_have_a_bracket_in_its_name(start, data_dir, tmp_path):
    (tmp_path / 'data[1]').symlink_to(data_dir)
    flags = [f'--data_dir={tmp_path}/data[1]', f'--train_dir={tmp_path}/run', '--batch_size=8']
    trainer = start(harness.TRAIN, *flags, '--max_steps=1')
    assert trainer.wait() == 0, trainer.stderr


def test_error_of_restoring_is_quoted_without_tensorflows_guess():
    message = (
        'This is most likely due to a Variable name. Original error:\n\nrun/x.index: gone\n\tat'
    )
    with pytest.raises(script.UserError, match=r'^run/x: run/x\.index: gone$'):
        with checkpoints.reading('run/x'):
            raise tf.errors.NotFoundError(None, None, message)


@pytest.mark.parametrize('name', ['checkpoint', 'finished'])
def test_evaluator_does_not_wait_for_a_pipe(tmp_path, name):
    os.mkfifo(str(tmp_path / name))
    with pytest.raises(script.UserError, match=f'{tmp_path}/{name} is not a regular file'):
        record.FLAGS.checkpoint_dir = str(tmp_path)
        next(checkpoints.as_they_come('checkpoint_dir', 1))


def test_file_of_a_checkpoint_is_not_mistaken_for_a_folder(tmp_path):
    path = tmp_path / 'model.ckpt-1.index'
    path.touch()
    record.FLAGS.checkpoint_dir = str(path)
    with pytest.raises(script.UserError, match=f'{path} is a file. Name the folder'):
        checkpoints.newest_required('checkpoint_dir')
    with pytest.raises(script.UserError, match=f'{path} is a file. Name the folder'):
        checkpoints.output_folder_beside('eval_dir', 'checkpoint_dir')
    assert os.listdir(str(tmp_path)) == [path.name]


def test_default_eval_dir_is_next_to_any_folder(tmp_path, monkeypatch):
    (tmp_path / 'run').mkdir()
    monkeypatch.chdir(tmp_path / 'run')
    for place in '.', './', '../run', f'{tmp_path}/run/', 'model.ckpt-1':
        folder = checkpoints.evaluation_folder_of(place)
        assert os.path.abspath(folder) == f'{tmp_path}/run_eval', place


def test_url_is_rejected_as_checkpoint_dir_and_not_as_eval_dir():
    record.FLAGS['checkpoint_dir'].parse('gs://bucket/run')
    with pytest.raises(script.UserError, match='--checkpoint_dir=gs://bucket/run: only local'):
        checkpoints.output_folder_beside('eval_dir', 'checkpoint_dir')
