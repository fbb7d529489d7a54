"""Runs the check of an exercise on your functions, or on the solution's."""

import functools
import importlib
import os
import sys
import textwrap
import traceback

import cifar10
from support import flags, script

FLAGS = cifar10.FLAGS
flags.DEFINE_bool('solution', False, 'Check exercises/solutions/ instead of your functions.')


class NotStartedError(Exception):
    """Raised by a function that is still to be written."""


class AnswerError(Exception):
    """The message says what is wrong and where to look."""


def run(check):
    """Checks the exercise that was started as a script and exits: with status 0 if correct."""

    def main(argv):
        FLAGS.data_dir = ''  # The checks make up their data, with ten classes as in CIFAR-10.
        answers = exercise = sys.modules['__main__']
        if FLAGS.solution:
            name = exercise.__spec__.name.rpartition('.')[2]
            answers = importlib.import_module('exercises.solutions.' + name)
        return report(check, answers)

    script.run(main)


def report(check, answers):
    """Runs a check and prints its verdict.

    Args:
      check: function of an object with the student's functions. Prints what it measures. Returns
        what the exercise shows, or raises AnswerError.
      answers: module or object with these functions.

    Returns:
      The exit status: 0 if the answers are correct, otherwise 1.
    """
    try:
        verdict, status = 'Correct: ' + check(_Answers(answers)), 0
    except AnswerError as error:
        verdict, status = f'Not correct yet: {error}', 1
    except NotStartedError as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        path = os.path.relpath(place.filename)
        print(f'Not started: {place.name}() in {path}, line {place.lineno}: YOUR CODE HERE')
        return 1
    print(textwrap.fill(verdict, 100, break_long_words=False, break_on_hyphens=False))
    return status


def expect(condition, hint):
    """Raises an AnswerError if the condition is false."""
    if not condition:
        raise AnswerError(hint)


class _Answers:
    """The student's functions; one that returns nothing is reported."""

    def __init__(self, answers):
        self._answers = answers

    def __getattr__(self, name):
        function = getattr(self._answers, name)

        @functools.wraps(function)
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            if result is None:
                raise AnswerError(f'{name}() returns None. Does it end with `return`?')
            return result

        return call
