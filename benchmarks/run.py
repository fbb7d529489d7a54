"""Measures all that is claimed about speed; `make bench` does it in some ten minutes.

    python benchmarks/run.py            every environment that is there: .venv/tf1, tf2, torch
    python benchmarks/run.py --quick    a minute or two, to see that everything works

Processes that are compared run at the same time and measure in turn, see rounds.py.
The samples go into benchmarks/results.json, and report.py makes the table
and the picture of docs/performance.md from them. Needs an otherwise idle machine, and any
Python 3.7 or newer.
"""

import argparse
import collections
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time

import rounds

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)

GET_DATA = (
    'import cifar10; from support import script; script.run(cifar10.maybe_download_and_extract)'
)
RECORDS_PER_READ = [1, 16, 64, 256]
THREADS = [1, 4, 16]
BATCH_SIZES = [32, 64, 128, 256, 512]


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, what in [
        ('tf1', 'TensorFlow 1.15'),
        ('tf2', 'TensorFlow 2.x'),
        ('torch', 'PyTorch and matplotlib'),
    ]:
        parser.add_argument(
            '--' + name,
            metavar='PYTHON',
            default=os.path.join(ROOT, '.venv', name, 'bin', 'python'),
            help='a Python with %s (default: %%(default)s)' % what,
        )
    parser.add_argument(
        '--data_dir',
        default='/tmp/cifar10_data',
        help='as for the other scripts (default: %(default)s)',
    )
    parser.add_argument(
        '--quick',
        action='store_true',
        help='short blocks, few rounds; writes to a temporary folder only',
    )
    return parser.parse_args()


def machine():
    """Dict of what the numbers depend on."""
    cpu = platform.processor()
    if os.path.exists('/proc/cpuinfo'):  # Cloud machines tell no model, only the family.
        with open('/proc/cpuinfo') as cpuinfo:
            facts = dict(re.findall(r'^(model name|cpu family)\s*: (.*)', cpuinfo.read(), re.M))
        cpu = '%s (family %s)' % (facts.get('model name', cpu), facts.get('cpu family', '?'))
    return {
        'cpu': cpu,
        'cores': os.cpu_count(),
        'system': platform.platform(),
        'date': time.strftime('%Y-%m-%d'),
        'load_before': os.getloadavg()[0],
    }


def tensorflow_commands(python, data_dir, quick):
    """What to compare, for one generation of TensorFlow.

    Returns:
      Dict of title -> (commands, rounds, how often to start anew).
    """

    def worker(measure, *flags):
        return [
            python,
            os.path.join(HERE, 'tensorflow_worker.py'),
            '--measure=' + measure,
            '--data_dir=' + data_dir,
        ] + list(flags)

    def input_worker(*flags):
        return worker('input', '--seconds=0.2' if quick else '--seconds=1', *flags)

    def step_worker(*flags):
        return worker('step', '--images=256' if quick else '--images=2560', *flags)

    def times(rounds, repeats=1):
        return (2, 1) if quick else (rounds, repeats)

    sections = collections.OrderedDict()
    sections['input'] = (
        {
            'classic': input_worker('--classic_input'),
            'ours': input_worker(),
        },
        times(4, repeats=2),
    )
    sections['step'] = (
        {
            'classic': step_worker('--classic_input', '--builtin_lrn'),
            'batched': step_worker('--builtin_lrn'),
            'ours': step_worker(),
            'half': step_worker('--use_fp16'),
            'towers': step_worker('--num_gpus=2', '--batch_size=64'),
            'arithmetic': worker('arithmetic'),
        },
        times(6),
    )
    sections['evaluation'] = (
        {
            'ours': worker('evaluation'),
            'ten views': worker('evaluation', '--views=10', '--num_examples=2000'),
        },
        times(5),
    )
    sections['records_per_read'] = (
        {str(n): input_worker('--records_per_read=%d' % n) for n in RECORDS_PER_READ},
        times(3),
    )
    sections['threads'] = {str(n): input_worker('--threads=%d' % n) for n in THREADS}, times(3)
    sections['batch_size'] = (
        {str(n): step_worker('--batch_size=%d' % n) for n in BATCH_SIZES},
        times(2),
    )
    return sections


def torch_commands(python, quick):
    """Workers to set beside the training steps of TensorFlow."""
    command = [
        python,
        os.path.join(HERE, 'torch_worker.py'),
        '--images=256' if quick else '--images=2560',
    ]
    return {'torch': command, 'torch channels-last': command + ['--channels_last']}


def measure(sections):
    """Measures what tensorflow_commands() returned.

    Returns:
      Dict of title -> what rounds.measure() returned, repeats one after the other.
    """
    results = {}
    for title, (commands, (number_of_rounds, repeats)) in sections.items():
        print('  %s: %s' % (title, ', '.join(commands)), flush=True)
        merged = results.setdefault(title, {})
        for _ in range(repeats):
            for name, samples in rounds.measure(commands, number_of_rounds).items():
                for what, values in samples.items():
                    merged.setdefault(name, {}).setdefault(what, []).extend(values)
    return results


def main():
    args = parse_arguments()
    start = time.time()
    pythons = {}
    for name in ['tf1', 'tf2', 'torch']:
        python = getattr(args, name)
        if os.access(python, os.X_OK):
            pythons[name] = python
        else:
            print('Left out, since there is no %s: %s' % (python, name))
    generations = [name for name in ['tf1', 'tf2'] if name in pythons]
    if not generations:
        sys.exit('run.py: no TensorFlow; name its Python with --tf1 or --tf2')
    subprocess.check_call(
        [pythons[generations[0]], '-c', GET_DATA, '--data_dir=' + args.data_dir], cwd=ROOT
    )

    results = {'machine': machine()}
    for name in generations:
        print('%s, %s' % (name, pythons[name]), flush=True)
        sections = tensorflow_commands(pythons[name], args.data_dir, args.quick)
        if name == generations[-1] and 'torch' in pythons:
            sections['step'][0].update(torch_commands(pythons['torch'], args.quick))
        results[name] = measure(sections)
    results['minutes'] = (time.time() - start) / 60

    folder = tempfile.mkdtemp() if args.quick else HERE
    path = os.path.join(folder, 'results.json')
    with open(path, 'w') as file:
        json.dump(results, file, indent=1, sort_keys=True)
        file.write('\n')
    # The report wants matplotlib, and any Python for its text.
    subprocess.check_call(
        [pythons.get('torch', sys.executable), os.path.join(HERE, 'report.py'), path]
        + ([] if args.quick else ['--readme', os.path.join(ROOT, 'docs', 'performance.md')])
    )


if __name__ == '__main__':
    main()
