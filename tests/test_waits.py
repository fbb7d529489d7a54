"""Every wait of more than ten seconds shows that it is one."""

import fcntl
import threading

from support import checkpoints, script
from tests import harness
from tests.test_make import project  # noqa: F401 -- A fixture.
from tools import environment


def test_waiting_for_another_build_is_shown_again_and_again(project, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(environment, 'SECONDS_BETWEEN_LINES', 0.3)
    (project / '.venv').mkdir()
    second = threading.Thread(target=environment.prepare, args=['tf2'])
    shown = []

    def lines():
        shown.append(capsys.readouterr().err)
        return ''.join(shown).count('Waiting for another process')

    with open('.venv/tf2.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second.start()
        assert harness.until(lambda: lines() >= 3)
    second.join()


def test_waiting_for_another_download_is_shown_again_and_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, 'PROGRESS_SECS', 0.1)
    shown = []

    def wait():
        with script.locked(str(tmp_path), 'busy', wait=True):
            pass

    def lines():
        shown.append(capsys.readouterr().out)
        return ''.join(shown).count('Still waiting after ')

    with script.locked(str(tmp_path), 'busy'):
        second = threading.Thread(target=wait)
        second.start()
        assert harness.until(lambda: lines() >= 2)
    second.join()


def test_missing_first_checkpoint_is_shown_again_and_again(start, data_dir, tmp_path):
    evaluator = start(
        harness.EVAL,
        f'--data_dir={data_dir}',
        f'--checkpoint_dir={tmp_path}/typo',
        f'--eval_dir={tmp_path}/eval',
        before='from support import checkpoints\n'
        'checkpoints.FIRST_REPORT_SECS, checkpoints.POLL_SECS = 0.5, 1',
    )
    evaluator.wait_for(rf'(No checkpoint after \d+ s. Is {tmp_path}/typo .*\n(.*\n)*){{2}}')
    evaluator.kill()
    assert checkpoints.FIRST_REPORT_SECS <= script.PROGRESS_SECS
