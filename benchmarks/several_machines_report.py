"""Makes tables, a model and a picture from what several_machines.py measured.

    python benchmarks/several_machines_report.py --page=docs/several_machines.md

Writes the tables into the page, between comments such as <!-- measured --> and <!-- /measured -->,
and several_machines.png beside it. Needs matplotlib.

The model: n machines compute for c ms a step, each with a batch of its own. Whoever holds the
variables, V bytes, sends and receives them once for each of the k others that it serves, over a
link that carries B in each direction. A step takes

    T = slowest of n + k o + r + max(0, a k V / B - h)

    slowest of n    mean of the slowest of n steps, drawn from those measured in one process,
                    scaled to c
    o               ms that the holder computes for each of the others: what the chief has more
                    processor time than a worker, by cores
    r               ms of round trips, assumed
    a, h            fitted. a would be 2 if all variables came before the first layer and all
                    gradients after the last one; h is what goes over the wire meanwhile
"""

import argparse
import json
import os
import statistics

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np

FOLDER = os.path.dirname(os.path.abspath(__file__))
MEGABYTES = 4.273  # 1,068,298 numbers of 4 bytes.
ROUND_TRIP = 0.2  # ms, without load; assumed.
ROUND_TRIPS = 4  # To run the graph, for variables, for gradients, to report.
CORES = 2  # Of the machine that measured.
BUSY_MS = 80  # What a step takes there without other machines.
MACHINES = [2, 4, 8, 16, 32, 64, 128]
LINKS = [(1000, '1'), (10000, '10'), (100000, '100')]  # Mbit/s, Gbit/s.
COMPUTERS = [(50, 'CPUs of 50 ms'), (2, 'GPUs of 2 ms')]


def transfer_ms(machines, mbits):
    """How long one direction of the holder's link is busy in a step."""
    return 0.0 if mbits is None else (machines - 1) * MEGABYTES * 8 / mbits * 1000


def find(results, towers, ps=0, mbits=None):
    (found,) = [r for r in results if (r['towers'], r['ps'], r['mbits']) == (towers, ps, mbits)]
    return found


def step_ms(result):
    """The median of each round."""
    return [statistics.median(each['ms']) for each in result['rounds']]


def per_machine(result, job, what):
    """The medians over the rounds, for each machine of a job."""
    names = [name for name in result['rounds'][0]['machines'] if name.split()[0] == job]
    return [
        statistics.median(each['machines'][name][what] for each in result['rounds'])
        for name in names
    ]


# --- What was measured ----------------------------------------------------------------


def spread(values, digits=0):
    low, high = f'{min(values):.{digits}f}', f'{max(values):.{digits}f}'
    return low if low == high else f'{low} to {high}'


def measured_table(results):
    one = step_ms(find(results, 1))
    heads = ['machines × images, ps, link', 'ms a step', '× one process', 'cores idle']
    yield '| ' + ' | '.join(heads + ['chief', 'a worker', 'a ps']) + ' |'
    yield '|---|---|---|---|---|---|---|'
    for result in results:
        ms = step_ms(result)
        ratio = statistics.median(a / b for a, b in zip(ms, one))
        busy = statistics.median(
            sum(machine['cpu_ms'] for machine in each['machines'].values())
            / statistics.mean(each['ms'])
            for each in result['rounds']
        )
        link = f', {result["mbits"]} Mbit/s' if result['mbits'] else ''
        name = f'{result["towers"]} × {128 // result["towers"]}, {result["ps"]} ps{link}'
        cells = [name, f'{statistics.median(ms):.0f} ({spread(ms)})', f'{ratio:.2f}']
        cells.append(f'{max(0, 1 - busy / 2):.0%}')
        for job in 'chief', 'worker', 'ps':
            sent = per_machine(result, job, 'mb_sent')
            received = per_machine(result, job, 'mb_received')
            cells.append(f'{spread(sent, 1)} / {spread(received, 1)}' if sent else '')
        yield '| ' + ' | '.join(cells) + ' |'


# --- The model ----------------------------------------------------------------------


class Model:
    """Fitted to the results; see the docstring of this file."""

    def __init__(self, results):
        alone = sorted(ms for each in find(results, 1)['rounds'] for ms in each['ms'])
        self._draws = np.array(alone) / statistics.median(alone)
        more = {}  # What the chief computes beside the same batch as a worker's.
        for n in 2, 4:
            (chief,) = per_machine(find(results, n), 'chief', 'cpu_ms')
            more[n] = chief - statistics.mean(per_machine(find(results, n), 'worker', 'cpu_ms'))
        self.overhead = (more[4] - more[2]) / 2 / CORES
        self.samples = []
        for result in results:
            if result['mbits'] and not result['ps']:
                free = statistics.median(step_ms(find(results, result['towers'])))
                more = statistics.median(step_ms(result)) - free
                self.samples.append((result['towers'], result['mbits'], more, free))
        self.a, self.hidden = self._fit()

    def _fit(self):
        """The a and h with the smallest errors of the times, as parts of these."""

        def error(a, hidden):
            return sum(
                (max(0, a * transfer_ms(n, mbits) - hidden) - more) ** 2 / (free + more) ** 2
                for n, mbits, more, free in self.samples
            )

        grid = [(a, hidden) for a in np.arange(1, 2.005, 0.01) for hidden in range(0, 120)]
        return min(grid, key=lambda pair: error(*pair))

    def slowest(self, n):
        """Mean of the slowest of n steps, as a multiple of the median one."""
        parts = np.arange(len(self._draws) + 1) / len(self._draws)
        return float(np.sum(self._draws * np.diff(parts**n)))

    # How long a step takes on n machines, in ms, if ...

    def one_holder(self, n, compute_ms, mbits):
        """... one of them holds the variables."""
        return self._step(n, compute_ms, mbits, n - 1, ROUND_TRIPS)

    def four_ps(self, n, compute_ms, mbits):
        """... four others hold a quarter each."""
        return self._step(n, compute_ms, mbits, n / 4, ROUND_TRIPS)

    def all_reduce(self, n, compute_ms, mbits):
        """... all hold them, and average the gradients in a ring."""
        # Each link is busy for 2 V (n - 1) / n, in both directions at the same time.
        passed_on = 2 * (n - 1) / n
        return self._step(n, compute_ms, mbits, passed_on, 2 * (n - 1), 1 / self.a)

    def _step(self, n, compute_ms, mbits, others, round_trips, part=1.0):
        busy = self.a * part * others * transfer_ms(2, mbits)
        # Computing hides no more than it takes; fitted where that is BUSY_MS.
        hidden = self.hidden * min(1, compute_ms / BUSY_MS)
        return (
            compute_ms * self.slowest(n)
            + others * self.overhead
            + round_trips * ROUND_TRIP
            + max(0, busy - hidden)
        )


def fit_table(model):
    yield '| machines, link | measured, ms | by the model, ms |'
    yield '|---|---|---|'
    for n, mbits, more, free in model.samples:
        computed = free + max(0, model.a * transfer_ms(n, mbits) - model.hidden)
        yield f'| {n}, {mbits} Mbit/s | {free + more:.0f} | {computed:.0f} |'


def ways(model):
    return [
        (model.one_holder, '-', 'one holds the variables'),
        (model.four_ps, ':', 'four ps'),
        (model.all_reduce, '--', 'all-reduce'),
    ]


def computed_table(model):
    links = [f'{text} Gbit/s' for _, text in LINKS]
    yield (
        '| machines | ' + ' | '.join(f'{c}, {link}' for _, c in COMPUTERS for link in links) + ' |'
    )
    yield '|---' * (1 + len(COMPUTERS) * len(LINKS)) + '|'
    for n in MACHINES:
        cells = [str(n)]
        for ms, _ in COMPUTERS:
            for mbits, _ in LINKS:
                times = [time(n, ms, mbits) for time, _, _ in ways(model)]
                cells.append(' / '.join(f'{n * ms / time:.1f}' for time in times))
        yield '| ' + ' | '.join(cells) + ' |'


def draw(model, path):
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5))
    for panel, (ms, name) in zip(panels, COMPUTERS):
        panel.plot([1] + MACHINES, [1] + MACHINES, color='0.8', label='ideal')
        for (mbits, text), color in zip(LINKS, ['C0', 'C1', 'C2']):
            for time, style, what in ways(model):
                speed = [n * ms / time(n, ms, mbits) for n in MACHINES]
                label = f'{text} Gbit/s, {what}'
                panel.plot([1] + MACHINES, [1] + speed, style, color=color, label=label)
        panel.set(xscale='log', yscale='log', xlabel='machines', ylabel='times the images/s of one')
        panel.set_xticks([1] + MACHINES)
        panel.set_xticklabels([1] + MACHINES)
        panel.set_title(f'{name} a step (computed)')
    lines, labels = panels[0].get_legend_handles_labels()
    figure.legend(lines, labels, loc='upper center', bbox_to_anchor=(0.5, 0), ncol=4, fontsize=8)
    figure.savefig(path, dpi=100, bbox_inches='tight')


def between(text, name, lines):
    """The text with the lines between <!-- name --> and <!-- /name -->."""
    begin, end = f'<!-- {name} -->\n', f'<!-- /{name} -->'
    head, rest = text.split(begin)
    return head + begin + '\n'.join(lines) + '\n' + end + rest.split(end)[1]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--page', help='where to put tables and picture; else: the console')
    args = parser.parse_args()
    with open(os.path.join(FOLDER, 'several_machines.json')) as file:
        results = json.load(file)
    model = Model(results)
    print(f'o = {model.overhead:.1f} ms, a = {model.a:.2f}, h = {model.hidden:.0f} ms')
    print('slowest of n:', ', '.join(f'{n}: {model.slowest(n):.2f}' for n in MACHINES))
    tables = {
        'measured': measured_table(results),
        'fit': fit_table(model),
        'computed': computed_table(model),
    }
    if args.page:
        with open(args.page) as file:
            text = file.read()
        for name, lines in tables.items():
            text = between(text, name, lines)
        with open(args.page, 'w') as file:
            file.write(text)
        draw(model, os.path.splitext(args.page)[0] + '.png')
    else:
        for lines in tables.values():
            print(*lines, '', sep='\n')


if __name__ == '__main__':
    main()
