"""Shows training and evaluation together in TensorBoard.

    python -m tools.open_tensorboard --train_dir=/data/run -- --port=7000

TensorBoard gets a folder with a link to each of the two folders. Its own syntax for several folders
differs between the generations and does not allow a comma in a path. Arguments after -- are
TensorBoard's.
"""

import argparse
import atexit
import os
import shutil
import sys
import tempfile

from support import checkpoints

from tensorboard import default
from tensorboard import program


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--train_dir', help='as for the trainer')
    parser.add_argument('--eval_dir', help='as for the evaluator')
    parser.add_argument('arguments', nargs='*', metavar='ARGUMENT', help='for TensorBoard')
    args = parser.parse_args(argv)
    train_dir = args.train_dir or '/tmp/cifar10_train'
    eval_dir = '/tmp/cifar10_eval'
    if args.train_dir:
        eval_dir = checkpoints.evaluation_folder_of(args.train_dir)
    links = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, links)  # TensorBoard's handler of SIGTERM runs only these.
    for name, folder in [('train', train_dir), ('eval', args.eval_dir or eval_dir)]:
        if '://' in folder or os.path.isfile(folder):
            parser.error(f'{folder} is not a local folder')
        if not os.path.isdir(folder):
            print(f'{folder} does not exist yet.')
        os.symlink(os.path.abspath(folder), os.path.join(links, name))
    tensorboard = program.TensorBoard(default.get_plugins())
    tensorboard.configure(['tensorboard', f'--logdir={links}', '--host=localhost', *args.arguments])
    return tensorboard.main()


if __name__ == '__main__':
    sys.exit(main())
