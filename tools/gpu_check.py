"""Checks training on your GPU and prints one row of a table. Please send it to us.

    python -m tools.gpu_check     or: make gpu-check

Trains 300 steps on one device, 100 on two towers and 100 with --use_fp16, evaluates the first run,
and compares losses and accuracy with those of runs on CPUs. Takes a few minutes. Runs on a CPU,
too.
"""

import argparse
import re
import signal
import statistics
import subprocess
import sys
import tempfile

from support import script

# The first step of the lines in a run's log that count.
FIRST_STEP = {'one device': 200, 'two towers': 50, '--use_fp16': 50}
# Mean losses of these lines, and the accuracy. Means of seven runs on CPUs, in both generations,
# and more than four standard deviations to either side.
BANDS = {
    'one device': (3.52, 3.92),
    'two towers': (4.02, 4.42),
    '--use_fp16': (4.06, 4.46),
    'accuracy': (0.43, 0.50),
}


def run(name, *flags):
    """Runs a script, shows its output and returns it. Exits if the script fails."""
    print(f'\n$ python {" ".join([name, *flags])}', flush=True)
    output = ''
    command = [sys.executable, name, *flags]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        universal_newlines=True,
        preexec_fn=script.die_with_parent,
    ) as process:
        try:
            for line in process.stdout:
                print(line, end='', flush=True)
                output += line
        except SystemExit:  # By a signal.
            process.kill()
            raise
    if process.returncode:
        sys.exit(f'{name} failed with status {process.returncode}.')
    return output


def train(name, data, folder):
    """Trains as a key of FIRST_STEP says. Returns the output, images/s and the mean loss."""
    trainer = 'cifar10_multi_gpu_train.py' if name == 'two towers' else 'cifar10_train.py'
    flags = {'one device': [], 'two towers': ['--num_gpus=2'], '--use_fp16': ['--use_fp16']}[name]
    steps = 300 if name == 'one device' else 100
    output = run(trainer, data, f'--train_dir={folder}/{name}', f'--max_steps={steps}', *flags)
    lines = re.findall(r'step (\d+), loss = (\S+) \((\S+) examples/sec', output)
    lines = [line for line in lines if int(line[0]) >= FIRST_STEP[name]]
    speed = statistics.median(float(speed) for _, _, speed in lines)
    return output, speed, statistics.mean(float(loss) for _, loss, _ in lines)


def cards_and_driver():
    query = ['nvidia-smi', '--query-gpu=name,driver_version', '--format=csv,noheader']
    gpus = subprocess.check_output(query, universal_newlines=True).strip().split('\n')
    return ', '.join(gpu.split(', ')[0] for gpu in gpus), gpus[0].split(', ')[1]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--data_dir', default='/tmp/cifar10_data', help='as for the trainer')
    data = '--data_dir=' + parser.parse_args(argv).data_dir
    with tempfile.TemporaryDirectory() as folder:
        outputs, speeds, losses = zip(*(train(name, data, folder) for name in FIRST_STEP))
        model = f'--checkpoint_dir={folder}/one device'
        evaluation = run('cifar10_eval.py', data, model, '--run_once')
    accuracy = float(re.search(r'precision @ 1 = (\S+)', evaluation).group(1))
    device, version = re.search(r'Running on (.*) with TensorFlow (\S+) in', outputs[0]).groups()
    precision = re.search(r'Running on .* in (\w+)', outputs[-1]).group(1)
    card, driver = ('CPU', 'none') if 'CPU' in device else cards_and_driver()

    measured = dict(zip(BANDS, [*losses, accuracy]))
    wrong = [name for name, (low, high) in BANDS.items() if not low <= measured[name] <= high]
    print(f"""
| card | driver | TensorFlow | images/s | two towers | --use_fp16 | losses | accuracy | in band |
|---|---|---|---:|---:|---:|---|---:|---|
| {card} | {driver} | {version} | {speeds[0]:.0f} | {speeds[1]:.0f} \
| {speeds[2]:.0f} ({precision}) | {', '.join(f'{loss:.2f}' for loss in losses)} | {accuracy} \
| {'no: ' + ', '.join(wrong) if wrong else 'yes'} |""")
    if card == 'CPU':
        print(f'\nNo GPU was checked: TensorFlow ran on {device}.')
    return 1 if wrong else 0


if __name__ == '__main__':
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
