"""Compares the speed of two checkouts, side by side: has a change made anything slower?

    git worktree add /tmp/before HEAD~1
    python benchmarks/compare.py .venv/tf2/bin/python /tmp/before

The workers of both run at the same time and measure in turn, see rounds.py. A ratio is the
speed of this checkout over that of the other one, in the same round.
"""

import argparse
import os
import statistics

import rounds

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MEASURES = {
    'input': ['--measure=input', '--seconds=2'],
    'step': ['--measure=step', '--images=5120'],
    'evaluation': ['--measure=evaluation'],
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('python', help='of the environment to measure in')
    parser.add_argument('other', help='the other checkout')
    parser.add_argument('--data_dir', default='/tmp/cifar10_data', help='as for the scripts')
    parser.add_argument('--rounds', type=int, default=10, help='default: %(default)s')
    args = parser.parse_args()
    for title, flags in MEASURES.items():
        commands = {
            name: [
                args.python,
                os.path.join(root, 'benchmarks', 'tensorflow_worker.py'),
                f'--data_dir={args.data_dir}',
            ]
            + flags
            for name, root in [('other', args.other), ('this', ROOT)]
        }
        samples = rounds.measure(commands, args.rounds)
        what = 'ms' if title == 'step' else 'images_per_second'
        other, this = samples['other'][what], samples['this'][what]
        pairs = zip(other, this) if title == 'step' else zip(this, other)
        ratios = sorted(a / b for a, b in pairs)
        print(
            f'{title}, {what}: other {statistics.median(other):.1f}, this '
            f'{statistics.median(this):.1f}; times as fast: median {statistics.median(ratios):.3f} '
            f'({ratios[0]:.3f} to {ratios[-1]:.3f})',
            flush=True,
        )


if __name__ == '__main__':
    main()
