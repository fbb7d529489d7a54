"""Prints class names that a Latin-1 terminal cannot show, and ends with such an error."""

import sys

from support import script


def main(argv):
    print('кот')
    raise script.UserError('нет \x1b[31mпса')


sys.stdout = open(1, 'w', encoding='latin-1', closefd=False)
sys.stderr = open(2, 'w', encoding='latin-1', closefd=False)
script.run(main)
