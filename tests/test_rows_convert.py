"""Pictures and data sets that are not where conversion expects them."""

import pytest

import cifar10_convert
from support import pictures
from tests.test_convert import convert, data_dir, reject, write_pictures  # noqa: F401 -- Fixtures.


@pytest.mark.parametrize('place', ['', 'train/'])
def test_picture_outside_the_classes_is_rejected(reject, tmp_path, place):  # noqa: F811
    counts = {'train/a': 6, 'train/b': 6, 'test/a': 6, 'test/b': 6} if place else {'a': 6, 'b': 6}
    source = tmp_path / 'source'
    write_pictures(source, counts)
    for suffix in pictures.SUFFIXES:
        stray = source / f'{place}stray{suffix.upper()}'
        stray.write_bytes(b'')
        message = reject(source)
        assert f'{stray} is not in the folder of a class' in message
        assert cifar10_convert.LAYOUT in message
        stray.unlink()


def test_folder_around_a_data_set_is_not_mistaken_for_pictures(reject, tmp_path):  # noqa: F811
    (tmp_path / 'source' / 'cifar-10-batches-py').mkdir(parents=True)
    (tmp_path / 'source' / 'cifar-10-batches-py' / 'batches.meta').write_bytes(b'')
    assert 'cifar-10-batches-py is. Name that.' in reject(tmp_path / 'source')
