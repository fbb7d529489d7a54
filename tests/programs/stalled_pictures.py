"""Makes the reading of pictures stall after two lists of four. Import it before the script runs."""

import time

from support import pictures

read = pictures.read


def stall(sources, size, at_a_time):
    lists = read(sources, size, 4)
    yield next(lists)
    yield next(lists)
    print('stalled', flush=True)
    time.sleep(1000)


pictures.read = stall
