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
                    gradients after the last one; h, a part of c, is what goes over the wire
                    while somebody computes
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
        cells.append(f'{max(0, 1 - busy / CORES):.0%}')
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
        # ms that the chief computes for each worker, if it holds the variables or one ps does.
        self.overhead = self._more_than_a_worker(results, ps=0)
        self.overhead_beside_ps = self._more_than_a_worker(results, ps=1)
        # Machines, Mbit/s, ms of a step, ms of a step where the link has no limit.
        self.samples = []
        for result in results:
            if result['mbits'] and not result['ps']:
                free = find(results, result['towers'])
                times = [statistics.median(step_ms(each)) for each in (result, free)]
                self.samples.append((result['towers'], result['mbits'], *times))
        self.a, self.hidden = self._fit()

    def _more_than_a_worker(self, results, ps):
        """How the chief's time beside that of a worker grows with each further worker."""
        more = {}
        for n in 2, 4:
            (chief,) = per_machine(find(results, n, ps), 'chief', 'cpu_ms')
            more[n] = chief - statistics.mean(per_machine(find(results, n, ps), 'worker', 'cpu_ms'))
        return (more[4] - more[2]) / 2 / CORES

    def _fit(self):
        """The a and h with the smallest errors of the times, as parts of these."""

        def error(a, hidden):
            return sum(
                (self.limited(n, mbits, free, a, hidden) / limited - 1) ** 2
                for n, mbits, limited, free in self.samples
            )

        grid = [(a, h) for a in np.arange(1, 2.005, 0.01) for h in np.arange(0, 1.005, 0.01)]
        return min(grid, key=lambda pair: error(*pair))

    def limited(self, n, mbits, free, a=None, hidden=None):
        """ms of a step over such a link, where it takes `free` ms over one without a limit."""
        a, hidden = a or self.a, self.hidden if hidden is None else hidden
        return free + max(0, a * transfer_ms(n, mbits) - hidden * free)

    def slowest(self, n):
        """Mean of the slowest of n steps, as a multiple of the median one."""
        parts = np.arange(len(self._draws) + 1) / len(self._draws)
        return float(np.sum(self._draws * np.diff(parts**n)))

    # How long a step takes on n machines, in ms, if ...

    def one_holder(self, n, compute_ms, mbits):
        """... one of them holds the variables."""
        return self._step(n, compute_ms, mbits, n - 1)

    def four_ps(self, n, compute_ms, mbits):
        """... four others hold a quarter each."""
        chief = (n - 1) * self.overhead_beside_ps
        return chief + self._step(n, compute_ms, mbits, n / 4)

    def all_reduce(self, n, compute_ms, mbits):
        """... all hold them, and average the gradients in a ring."""
        # Each link is busy for 2 V (n - 1) / n, in both directions at the same time.
        return self._step(n, compute_ms, mbits, 2 * (n - 1) / n, 2 * (n - 1), a=1)

    def _step(self, n, compute_ms, mbits, others, round_trips=ROUND_TRIPS, a=None):
        busy = (a or self.a) * others * transfer_ms(2, mbits)
        return (
            compute_ms * self.slowest(n)
            + others * self.overhead
            + round_trips * ROUND_TRIP
            + max(0, busy - self.hidden * compute_ms)
        )


def fit_table(model):
    yield '| machines, link | measured, ms | by the model, ms |'
    yield '|---|---|---|'
    for n, mbits, limited, free in model.samples:
        computed = model.limited(n, mbits, free)
        yield f'| {n}, {mbits} Mbit/s | {limited:.0f} | {computed:.0f} |'


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
    print(
        f'o = {model.overhead:.1f} ms, {model.overhead_beside_ps:.1f} ms beside a ps; '
        f'a = {model.a:.2f}, h = {model.hidden:.2f} c'
    )
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
