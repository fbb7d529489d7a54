"""Measures what this project costs, and prints the table of docs/performance.md.

    make bench                          both generations and PyTorch, a quarter of an hour
    python benchmarks/run.py --quick    a minute or two, to see that everything works

Measures in the environments that exist: .venv/tf1, .venv/tf2, .venv/torch. What is compared runs in
turns; see rounds.py. Needs a machine that does nothing else.
"""

import argparse
import os
import platform
import re
import sys
import time

import numpy as np
import rounds

HERE = os.path.dirname(os.path.abspath(__file__))
GENERATIONS = {'tf1': 'TensorFlow 1.15', 'tf2': 'TensorFlow 2.21'}
OURS = 'this project'

# (title, number, its format, {row: flags of tensorflow_worker.py, or of torch_worker.py})
SECTIONS = [
    (
        'Training input alone, images/s',
        'images_per_second',
        '{:,.0f}',
        {
            OURS: ['--measure=input'],
            'one image at a time, the classic way': ['--measure=input', '--classic_input'],
        },
    ),
    (
        'Training step of 128 images, ms',
        'ms',
        '{:.0f}',
        {
            OURS: ['--measure=step'],
            'the classic input and normalization': [
                '--measure=step',
                '--classic_input',
                '--builtin_lrn',
            ],
            'two towers of 64 images': ['--measure=step', '--num_gpus=2', '--batch_size=64'],
            'PyTorch, without input': ['torch'],
            'the arithmetic alone': ['--measure=arithmetic'],
        },
    ),
    (
        'The same in bfloat16 (`--use_fp16`), ms',
        'ms',
        '{:.0f}',
        {
            OURS: ['--measure=step', '--use_fp16'],
            'two towers of 64 images': [
                '--measure=step',
                '--use_fp16',
                '--num_gpus=2',
                '--batch_size=64',
            ],
            'PyTorch, without input': ['torch', '--bfloat16'],
            'the arithmetic alone': ['--measure=arithmetic', '--use_fp16'],
        },
    ),
    (
        'Evaluation, images/s',
        'images_per_second',
        '{:,.0f}',
        {
            OURS: ['--measure=evaluation'],
            'ten views of each image': [
                '--measure=evaluation',
                '--views=10',
                '--num_examples=2000',
            ],
        },
    ),
]


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    environments = os.path.join(os.path.dirname(HERE), '.venv')
    parser.add_argument('--environments', default=environments, help='default: %(default)s')
    parser.add_argument('--data_dir', default='/tmp/cifar10_data', help='default: %(default)s')
    parser.add_argument('--rounds', type=int, default=8, help='default: %(default)s')
    parser.add_argument('--quick', action='store_true', help='two rounds of short blocks')
    return parser.parse_args()


def command(args, generation, flags):
    """The command of a worker, or None without its environment."""
    environment = 'torch' if flags[0] == 'torch' else generation
    python = os.path.join(args.environments, environment, 'bin', 'python')
    if not os.access(python, os.X_OK) or (environment == 'torch' and generation == 'tf1'):
        return None
    quick = ['--images=256'] if args.quick else []
    if environment == 'torch':
        return [python, os.path.join(HERE, 'torch_worker.py'), *flags[1:], *quick]
    worker = os.path.join(HERE, 'tensorflow_worker.py')
    return [python, worker, f'--data_dir={args.data_dir}', *flags, *quick]


def cells(samples, number, form):
    """Dict of row -> 'median (quartiles)', and the ratio to this project's number."""
    result = {}
    for row, values in samples.items():
        low, median, high = map(form.format, np.percentile(values[number], [25, 50, 75]))
        result[row] = f'{median} ({low}–{high})'
        if row != OURS:
            pairs = zip(values[number], samples[OURS][number])
            result[row] += f', **{np.median([a / b for a, b in pairs]):.2f} ×**'
    return result


def machine():
    """The processor, the cores and the system."""
    cpu = platform.processor()
    if os.path.exists('/proc/cpuinfo'):  # A cloud machine may name only the family.
        with open('/proc/cpuinfo') as cpuinfo:
            facts = dict(
                re.findall(r'^(model name|cpu family|model)\s*: (.*)', cpuinfo.read(), re.M)
            )
        cpu = '{model name}, family {cpu family}, model {model}'.format(**facts)
    return f'{cpu}; {os.cpu_count()} cores; {platform.system()} {platform.release()}'


def main():
    args = parse_arguments()
    load, started = os.getloadavg()[0], time.time()
    columns = {
        name: title
        for name, title in GENERATIONS.items()
        if command(args, name, ['--measure=input'])
    }
    if not columns:
        sys.exit(f'run.py: no TensorFlow in {args.environments}. Run `make env` first.')
    lines = [f'| | {" | ".join(columns.values())} |', '|---|' + '---|' * len(columns)]
    for title, number, form, rows in SECTIONS:
        lines.append(f'| **{title}** |' + ' |' * len(columns))
        found = {}
        for name in columns:
            commands = {row: command(args, name, flags) for row, flags in rows.items()}
            commands = {row: command for row, command in commands.items() if command}
            print(f'{title}: {columns[name]}', file=sys.stderr)
            samples = rounds.measure(commands, 2 if args.quick else args.rounds)
            found[name] = cells(samples, number, form) if OURS in samples else {}
        for row in rows:
            each = [found[name].get(row, '') for name in columns]
            if any(each):
                lines.append(f'| {row} | {" | ".join(each)} |')
    print('\n'.join(lines))
    print(
        f'\nMedians and quartiles of {args.rounds} rounds; ×: the median of the rounds\' '
        f'ratios to this project. {machine()}; {time.strftime("%Y-%m-%d")}; load '
        f'{load:.1f} at the start; {(time.time() - started) / 60:.0f} minutes.'
    )


if __name__ == '__main__':
    main()
