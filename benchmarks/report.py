"""Makes a table and a picture from what run.py measured.

    python benchmarks/report.py benchmarks/results.json --readme docs/performance.md

The table goes to the console and, with --readme, between the two markers in that file
<!-- benchmarks --> and <!-- /benchmarks -->; the picture, scaling.png, beside the
results (if matplotlib is installed).
"""

import argparse
import json
import os
import re
import statistics

GENERATIONS = ['tf1', 'tf2']


def quartiles(values):
    """The medians of the lower half, of all, and of the upper half of the values."""
    values = sorted(values)
    half = (len(values) + 1) // 2
    return (
        statistics.median(values[:half]),
        statistics.median(values),
        statistics.median(values[-half:]),
    )


def spread(values, form='%.0f'):
    """'median (lower quartile–upper quartile)'; a single value stands alone."""
    low, middle, high = (form % value for value in quartiles(values))
    return middle if len(values) == 1 else '%s (%s–%s)' % (middle, low, high)


def ratios(numerators, denominators):
    """One ratio for each round."""
    return [a / b for a, b in zip(numerators, denominators)]


# --- Table -------------------------------------------------------------------


def table_rows(results):
    """Yields (text, {column: cell}); a row without cells is a heading."""
    columns = [name for name in GENERATIONS if name in results]

    def row(text, cell):
        return text, {name: cell(results[name]) for name in columns}

    def input_row(text, name, what, form):
        return row(text, lambda result: spread(result['input'][name][what], form))

    def input_ratio(what, form, top='ours', bottom='classic'):
        return row(
            '… ratio',
            lambda result: (
                '**%s**'
                % spread(ratios(result['input'][top][what], result['input'][bottom][what]), form)
            ),
        )

    yield 'Training input alone, images/s', {}
    yield input_row('one image at a time', 'classic', 'images_per_second', '%.0f')
    yield input_row('256 records at a time, this project', 'ours', 'images_per_second', '%.0f')
    yield input_ratio('images_per_second', '%.1f')
    yield 'First batch after, s', {}
    yield input_row('one image at a time', 'classic', 'first_batch_seconds', '%.2f')
    yield input_row('256 records at a time, this project', 'ours', 'first_batch_seconds', '%.2f')
    yield 'Peak memory of that process, MB', {}
    yield input_row('one image at a time', 'classic', 'peak_mb', '%.0f')
    yield input_row('256 records at a time, this project', 'ours', 'peak_mb', '%.0f')
    yield input_ratio('peak_mb', '%.2f')

    def step_cell(name):
        def cell(result):
            steps = result['step']
            if name not in steps:
                return '—'
            text = spread(steps[name]['ms'])
            if name != 'ours':
                text += ', **%s** ×' % spread(
                    ratios(steps[name]['ms'], steps['ours']['ms']), '%.2f'
                )
            return text

        return cell

    def torch_row(text, name):
        for generation in columns:
            if name in results[generation]['step']:
                return text, {'torch': step_cell(name)(results[generation])}
        return text, {'torch': '—'}

    arithmetic = [results[name]['step']['arithmetic'] for name in columns]
    yield 'Training step, batch of 128, ms; × the time of this project', {}
    yield row('one image at a time, built-in LRN', step_cell('classic'))
    yield row('256 records at a time, built-in LRN', step_cell('batched'))
    yield row('256 records at a time, LRN by products: this project', step_cell('ours'))
    yield row('the same with `--use_fp16`', step_cell('half'))
    yield torch_row('the same network, eager, on random tensors', 'torch')
    yield torch_row('the same network, eager, channels last', 'torch channels-last')
    yield row(
        'the arithmetic alone: %.2f GFLOP' % arithmetic[0]['gflop'][0], step_cell('arithmetic')
    )
    yield row(
        '… at GFLOP/s, a product of 2048 × 2048 matrices',
        lambda result: spread(result['step']['arithmetic']['gflops']),
    )
    yield row('two towers of 64 on one device', step_cell('towers'))
    yield row(
        '… of it for averaging the gradients, ms',
        lambda result: spread(result['step']['towers']['averaging_ms'], '%.1f'),
    )
    yield 'Evaluation, images/s', {}
    yield row(
        'one pass over the test set, this project',
        lambda result: spread(result['evaluation']['ours']['images_per_second']),
    )

    def ten_views_cell(result):
        one, ten = (
            result['evaluation'][name]['images_per_second'] for name in ('ours', 'ten views')
        )
        return f'{spread(ten)}, **{spread(ratios(one, ten), "%.1f")}** × the time'

    yield row('ten views of each image', ten_views_cell)


def table(results):
    """The table in Markdown, with the machine below it."""
    versions = {
        name: 'TensorFlow ' + results[name]['input']['ours']['version'][0]
        for name in GENERATIONS
        if name in results
    }
    for name in GENERATIONS:
        if name in results and 'torch' in results[name]['step']:
            versions['torch'] = 'PyTorch ' + results[name]['step']['torch']['version'][0]
    lines = ['| | ' + ' | '.join(versions.values()) + ' |', '|---|' + '---|' * len(versions)]
    for text, cells in table_rows(results):
        if cells and not set(cells) & set(versions):
            continue
        lines.append(
            '| %s | %s |'
            % (
                text if cells else '**%s**' % text,
                ' | '.join(cells.get(name, '') for name in versions),
            )
        )
    machine = results['machine']
    lines += [
        '',
        'Medians, in parentheses the quartiles; ratios are medians of the ratios within '
        'each round. %s, %d cores, %s, %s; load %.1f at the start; %.0f minutes.'
        % (
            machine['cpu'],
            machine['cores'],
            machine['system'],
            machine['date'],
            machine['load_before'],
            results['minutes'],
        ),
    ]
    return '\n'.join(lines)


# --- Targets -----------------------------------------------------------------


def targets(results):
    """Yields (line, met): what was measured beside what is wanted, and whether that is met."""

    def least(what, values, target):
        value = statistics.median(values)
        return '%s: %.2f, at least %.2f wanted' % (what, value, target), value >= target

    def most(what, values, target):
        value = statistics.median(values)
        return '%s: %.2f, at most %.2f wanted' % (what, value, target), value <= target

    for name in GENERATIONS:
        if name not in results:
            continue
        classic, ours = results[name]['input']['classic'], results[name]['input']['ours']
        steps = results[name]['step']
        yield least(
            name + ' input, times as fast',
            ratios(ours['images_per_second'], classic['images_per_second']),
            5 if name == 'tf1' else 4,
        )
        yield most(name + ' first batch, s', ours['first_batch_seconds'], 1)
        yield most(
            name + ' memory of the input, ratio', ratios(ours['peak_mb'], classic['peak_mb']), 1.25
        )
        yield least(
            name + ' step, times as fast as the classic one',
            ratios(steps['classic']['ms'], steps['ours']['ms']),
            1,
        )
        evaluation = results[name]['evaluation']
        yield most(
            name + ' ten views, times one',
            ratios(
                evaluation['ours']['images_per_second'],
                evaluation['ten views']['images_per_second'],
            ),
            11,
        )
        if name == 'tf2':
            yield most(
                'tf2 step, times the arithmetic alone',
                ratios(steps['ours']['ms'], steps['arithmetic']['ms']),
                1.2,
            )
            if 'torch' in steps:
                yield least(
                    'tf2 step, times as fast as PyTorch eager',
                    ratios(steps['torch']['ms'], steps['ours']['ms']),
                    1.8,
                )
            if 'half' in steps:
                yield least(
                    'tf2 bfloat16, times as fast as float32',
                    ratios(steps['ours']['ms'], steps['half']['ms']),
                    1.2,
                )


# --- Picture -----------------------------------------------------------------


def draw(results, path):
    """Three plots: images/s against records per read and threads, ms against batch size."""
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    plots = [
        ('records_per_read', 'images_per_second', 'records per read', 'input, images/s'),
        ('threads', 'images_per_second', 'input threads', 'input, images/s'),
        ('batch_size', 'ms', 'images per batch', 'training step, ms'),
    ]
    for axis, (section, what, x_label, y_label) in zip(axes, plots):
        for name in GENERATIONS:
            if name not in results:
                continue
            samples = results[name][section]
            xs = sorted(samples, key=int)
            low, middle, high = zip(*(quartiles(samples[x][what]) for x in xs))
            axis.errorbar(
                [int(x) for x in xs],
                middle,
                marker='o',
                capsize=3,
                yerr=[
                    [mid - bottom for mid, bottom in zip(middle, low)],
                    [top - mid for mid, top in zip(middle, high)],
                ],
                label='TensorFlow ' + samples[xs[0]]['version'][0],
            )
        axis.set_xscale('log', base=2)
        axis.set_xticks([int(x) for x in xs])
        axis.set_xticklabels(xs)
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('results')
    parser.add_argument('--readme')
    args = parser.parse_args()
    with open(args.results) as file:
        results = json.load(file)

    text = table(results)
    print('\n%s\n' % text)
    for line, met in targets(results):
        print('%s %s' % ('met   ' if met else 'MISSED', line))

    if args.readme and os.path.exists(args.readme):
        with open(args.readme, encoding='utf-8') as file:
            readme = file.read()
        readme = re.sub(
            '(<!-- benchmarks -->\n).*?(<!-- /benchmarks -->)',
            lambda match: match.group(1) + text + '\n' + match.group(2),
            readme,
            flags=re.DOTALL,
        )
        with open(args.readme, 'w', encoding='utf-8') as file:
            file.write(readme)
    picture = os.path.join(os.path.dirname(os.path.abspath(args.results)), 'scaling.png')
    try:
        draw(results, picture)
        print('%s, %s' % (args.results, picture))
    except ImportError as error:
        print('%s; no picture (%s)' % (args.results, error))


if __name__ == '__main__':
    main()
