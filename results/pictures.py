"""Draws the record of a run. Needs matplotlib.

    python results/pictures.py --record_dir=/data/record

Writes losses.png and precision.png, from the tables that record.py has made in --record_dir, and
confusion.png, filters.png and errors.png, from the model there and the test set.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import support  # noqa: F401 -- First, because it handles Ctrl-C during imports.

import numpy as np

import cifar10
import cifar10_eval
import cifar10_input
from results import record
from support import checkpoints, dataset, devices, script
from support.compat import tf

FLAGS = cifar10.FLAGS


def subplots(*args, figsize):
    """As pyplot.subplots(), without a window."""
    try:  # Here, so that --help works without matplotlib.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise script.UserError(f'{error}. Run: pip install matplotlib')
    figure = Figure(figsize=figsize)
    return figure, figure.subplots(*args)


def save(figure, name):
    path = os.path.join(FLAGS.record_dir, name)
    figure.savefig(path, dpi=100, bbox_inches='tight')
    print(f'Saved {path}.')


def column(rows, name):
    """The values of one column of a table, in the order of the steps."""
    return np.array([float(rows[step][name] or 'nan') for step in sorted(rows)])


def draw_losses(rows):
    figure, axes = subplots(figsize=(9, 4.5))
    steps = column(rows, 'step')
    for name, label in [('total_loss', 'total loss'), ('cross_entropy', 'cross entropy')]:
        (line,) = axes.plot(steps, column(rows, name), label=label, linewidth=1, zorder=3)
        axes.plot(
            steps,
            column(rows, name + ' (raw)'),
            color=line.get_color(),
            alpha=0.25,
            linewidth=0.5,
            label=label + ', last batch alone',
        )
    decay = column(rows, 'total_loss') - column(rows, 'cross_entropy')
    if decay.any():  # experiments/faster.py: the decay is not in the loss.
        axes.plot(steps, decay, label='weight decay', linewidth=1)
    axes.set(xlabel='step', yscale='log')
    for set_formatter in axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter:
        set_formatter('{x:g}')
    axes.grid(alpha=0.3, which='both')
    axes.legend()
    save(figure, 'losses.png')


def draw_precision(rows):
    figure, axes = subplots(figsize=(9, 4.5))
    steps, evaluated = column(rows, 'step'), column(rows, 'precision')
    without = column(rows, 'precision without averages')
    curves = {'with moving averages': evaluated, 'without': without}
    if np.isnan(without).all():
        curves = {'without moving averages': evaluated}
    for label, values in curves.items():
        axes.plot(steps, values, '.-', label=label)
        axes.annotate(f'{values[-1]:.3f}', (steps[-1], values[-1]))
    axes.set(xlabel='step', ylabel='precision @ 1 on the test set', ylim=(0, 1))
    last = evaluated[-1]
    # In a long run, show the end: the climb of the first steps would hide it.
    if np.count_nonzero(evaluated > last - 0.2) > 10:
        axes.set_ylim(last - 0.2, last + 0.02)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, 'precision.png')


def predict(checkpoint):
    """Classifies the test set in the order of its file.

    Returns:
      images: [n, 32, 32, 3] uint8; labels: [n]; probabilities: [n, number of classes];
      filters: [5, 5, 3, 64] float32, the weights of conv1.
    """
    (path,) = cifar10_input.data_files(True, cifar10.data_folder())
    records = np.fromfile(path, np.uint8).reshape(-1, cifar10_input.RECORD_BYTES)
    size = cifar10_input.RECORD_SIZE
    images = records[:, 1:].reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
    model = record.MODELS[FLAGS.model]
    standardize = getattr(model, 'standardize', cifar10_input.standardize)
    FLAGS.use_moving_averages = record.has_averages(checkpoint)
    with tf.Graph().as_default():
        batch = tf.placeholder(tf.uint8, [None, size, size, 3])
        crops = tf.cast(cifar10_input.central_crop(batch), tf.float32)
        probabilities = tf.nn.softmax(model.inference(standardize(crops)))
        variables = cifar10_eval.model_variables()
        checkpoints.check(checkpoint, variables)
        with tf.Session(config=devices.session_config(FLAGS.use_fp16)) as session:
            checkpoints.restore(session, checkpoint, variables)
            predicted = np.concatenate(
                [
                    session.run(probabilities, {batch: part})
                    for part in np.array_split(images, -(-len(images) // 500))
                ]
            )
            (conv1,) = [v for v in variables.values() if v.op.name == 'conv1/weights']
            filters = session.run(conv1)
    return images, records[:, 0], predicted, filters


def draw_confusion(labels, predicted, names):
    counts = np.zeros([len(names), len(names)], int)
    np.add.at(counts, (labels, predicted), 1)
    size = max(3, min(1.5 + len(names) / 2, 25))  # Inches; the numbers of 50 classes fit in.
    figure, axes = subplots(figsize=(size, size))
    axes.imshow(np.sqrt(counts), cmap='Blues')
    for label, row in enumerate(counts):
        for prediction, count in enumerate(row):
            axes.text(
                prediction,
                label,
                count,
                ha='center',
                va='center',
                fontsize=8,
                color='white' if count > counts.max() / 3 else 'black',
            )
    axes.set(
        xticks=range(len(names)),
        yticks=range(len(names)),
        yticklabels=names,
        xlabel='predicted',
        ylabel='label',
    )
    axes.set_xticklabels(names, rotation=45, ha='right')
    save(figure, 'confusion.png')


def draw_filters(filters):
    """The 64 filters of conv1, each scaled to its full range, the gray ones first."""
    filters = filters.transpose(3, 0, 1, 2)
    colorful = np.ptp(filters.mean(axis=(1, 2)), axis=1)
    filters = filters[np.argsort(colorful)]
    filters -= filters.min(axis=(1, 2, 3), keepdims=True)
    filters /= filters.max(axis=(1, 2, 3), keepdims=True)
    sheet = np.ones([4, 6, 16, 6, 3])
    sheet[:, :5, :, :5] = filters.reshape(4, 16, 5, 5, 3).transpose(0, 2, 1, 3, 4)
    figure, axes = subplots(figsize=(9, 2.3))
    axes.imshow(sheet.reshape(24, 96, 3)[:-1, :-1])
    axes.axis('off')
    save(figure, 'filters.png')


def draw_errors(images, labels, probabilities, names):
    """The 32 images with the largest cross entropy."""
    truth = probabilities[np.arange(len(labels)), labels]
    figure, all_axes = subplots(4, 8, figsize=(11, 7))
    for axes in all_axes.flat:
        axes.axis('off')
    for axes, index in zip(all_axes.flat, np.argsort(truth)):
        guess = probabilities[index].argmax()
        axes.imshow(images[index])
        axes.set_title(
            f'label {names[labels[index]]}\n{names[guess]}: {probabilities[index, guess]:.2f}',
            fontsize=8,
        )
    figure.tight_layout()
    save(figure, 'errors.png')


def main(argv=None):
    script.output_folder('record_dir')
    cifar10.maybe_download_and_extract()
    tables = [
        record.read_table(os.path.join(FLAGS.record_dir, name))
        for name in ('losses.csv', 'checkpoints.csv')
    ]
    saved = checkpoints.paths(FLAGS.record_dir)
    if not all(tables) or not saved:
        raise script.UserError(
            f'--record_dir={FLAGS.record_dir}: there is no record. Make it with record.py.'
        )
    dataset.expect_same_classes(FLAGS.record_dir, 'record_dir', cifar10.data_folder())
    draw_losses(tables[0])
    draw_precision(tables[1])
    print('Classifying the test set.')
    images, labels, probabilities, filters = predict(saved[0])
    names = cifar10.class_names()
    draw_confusion(labels, probabilities.argmax(axis=1), names)
    draw_filters(filters)
    draw_errors(images, labels, probabilities, names)


if __name__ == '__main__':
    script.run(main)
