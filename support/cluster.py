"""Several machines: who belongs together, whether all are there, how the run ends for each.

TF_CONFIG names the machines. Before TensorFlow has anything to do, each process listens on
its own address and calls all others; who answers says what it is and what it has, and goes
on to say what becomes of it, on a line (a TCP connection) that stays open to the end:

    called  ->  {"cluster": ..., "task": ..., "facts": ...}    here I am
            ->  {"state": "met"}                               I have reached all others
            ->  {"state": "ready"}                             my TensorFlow server is up
            ->  {"status": 0, "why": "the chief has finished"} the run is over

When all have met, nobody has to be called any more, and the address is left to TensorFlow.

A line that breaks off without a last word is a lost machine. The kernel says so at once when a
process has died, and within KEEPALIVE_SECS when nothing comes through. It also answers for a
process that only stands still, whose line therefore lasts. TensorFlow itself would wait for
ever. Who only listens to a line never has to make sense of what strangers send.
"""

import collections
import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time

from support import script

LOST = 138  # Exit status for "start all of us again": 128 + SIGUSR1, as Kubeflow has it.
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
KEEPALIVE_SECS = 10
ANSWER_SECS = 5  # For whoever is called to say who it is.
PAUSE_SECS = 0.5  # Between two calls.
TELL_SECS = 10  # Between two lines on who is being waited for.
GRACE_SECS = 5  # For the chief to save and say so, when all are told to stop at the same time.
# TensorFlow may know of a lost machine before the kernel does. Then the error waits so long for
# the line to break off, since that says which one it was.
PATIENCE_SECS = 1
# The error_code of such tf.errors: cancelled, aborted, internal, unavailable. TensorFlow itself
# takes seconds to import, for which who only starts the processes need not wait.
CONNECTION_CODES = (1, 10, 13, 14)

JOBS = ['chief', 'master', 'ps', 'worker']  # The first that is there leads, unless it is a ps.
EXAMPLE = (
    '{"cluster": {"chief": ["10.0.0.1:2222"], "worker": ["10.0.0.2:2222"]}, '
    '"task": {"type": "worker", "index": 0}}'
)


# --- Who belongs together --------------------------------------------------------


class Task(collections.namedtuple('Task', 'job index address')):
    """One process of the cluster."""

    def __str__(self):
        name = self.job if self.job in ('chief', 'master') else f'{self.job} {self.index}'
        return f'{name} ({self.address})'

    @property
    def device(self):
        return f'/job:{self.job}/task:{self.index}'

    @property
    def host_and_port(self):
        host, port = self.address.rsplit(':', 1)
        return host, int(port)


# jobs: dict of job -> addresses; me: a Task, or None for an evaluator, which is in no cluster.
Cluster = collections.namedtuple('Cluster', 'jobs tasks chief me')


def workers(cluster):
    """The tasks that compute: the chief first, then the workers."""
    return [cluster.chief] + [
        task for task in cluster.tasks if task.job == 'worker' and task != cluster.chief
    ]


def from_environment():
    """The Cluster that TF_CONFIG describes.

    Raises:
      script.UserError: it describes none.
    """
    text = os.environ.get('TF_CONFIG')
    if not text:
        raise script.UserError(
            "TF_CONFIG is not set. It names all machines, and which of them this one is: TF_CONFIG="
            f"'{EXAMPLE}'"
        )
    try:
        return parse(text)
    except ValueError as error:
        raise script.UserError(f'TF_CONFIG: {error}. It has to look like {EXAMPLE}')


def parse(text):
    """A Cluster from the text of TF_CONFIG. ValueError if there is something wrong with it."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f'not JSON ({error})')
    if not isinstance(config, dict) or not isinstance(config.get('cluster'), dict):
        raise ValueError('it has no "cluster"')
    # An evaluator has an address in some versions of Kubeflow. Nobody calls it.
    jobs = {job: named for job, named in config['cluster'].items() if job != 'evaluator' and named}
    addresses = []
    for job, named in jobs.items():
        if job not in JOBS:
            raise ValueError(f'"{job}" is none of {", ".join(JOBS)}, evaluator')
        if not isinstance(named, list):
            raise ValueError(f'"{job}" is not a list of addresses')
        for address in named:
            match = re.match(r'[^\s:/]+:([0-9]{1,5})$', str(address))
            if not match or not 0 < int(match.group(1)) < 65536:
                raise ValueError(f'{job}: {json.dumps(address)} is not an address HOST:PORT')
            if address in addresses:
                raise ValueError(f'the address {address} is there twice')
            addresses.append(address)
    chiefs = jobs.get('chief', []) + jobs.get('master', [])
    if len(chiefs) > 1:
        raise ValueError('there can be only one chief')
    if not chiefs and 'worker' not in jobs:
        raise ValueError('it has neither a chief nor a worker')
    tasks = [
        Task(job, index, address) for job in JOBS for index, address in enumerate(jobs.get(job, []))
    ]
    chief = next(task for task in tasks if task.job != 'ps')
    return Cluster(jobs, tasks, chief, _this_task(config.get('task'), tasks))


def _this_task(task, tasks):
    if not isinstance(task, dict) or not isinstance(task.get('type'), str):
        raise ValueError('it has no "task" with a "type"')
    if task['type'] == 'evaluator':
        return None
    index = task.get('index', 0)
    for each in tasks:
        if each.job == task['type'] and str(each.index) == str(index):
            return each
    raise ValueError(f'the task {task["type"]} {index} is not in the cluster')


# --- What has to be the same everywhere -------------------------------------------


def digests(paths):
    """Dict of a file's name -> the beginning of its SHA-256, to be compared."""
    result = {}
    for path in paths:
        with open(path, 'rb') as file:
            result[os.path.basename(path)] = hashlib.sha256(file.read()).hexdigest()[:12]
    return result


def code():
    """The files of this project that are imported."""
    here = os.path.dirname(os.path.abspath(__file__))
    folders = (here, os.path.dirname(here))
    found = {getattr(module, '__file__', None) or '' for module in list(sys.modules.values())}
    paths = sorted(os.path.abspath(path) for path in found)
    return [path for path in paths if os.path.dirname(path) in folders]


def differences(cluster, facts):
    """What the machines do not have in common with the chief, in words.

    Args:
      facts: dict of Task -> dict of name -> value.
    """
    known = facts[cluster.chief]
    return [
        f'{task} has {name} {value}, the chief {known.get(name, "none")}'
        for task in cluster.tasks
        for name, value in sorted(facts[task].items())
        if value != known.get(name)
    ]


# --- Together ----------------------------------------------------------------------


def run(cluster, facts, start_server, lead):
    """Waits for all machines; then the chief leads, and the others serve until it is done.

    The servers never outlive a run. So a new chief finds no queues of an old one, and
    TensorFlow's isolate_session_state and device filters are not needed.

    Where this is not the chief, it does not return: the process ends as the run does, with 0
    when the chief has finished or was stopped, LOST when a machine is lost, and 1 when the chief
    ended for another reason. With LOST the chief, too, ends on the spot.

    Args:
      facts: what has to be the same on all machines; dict of name -> value.
      start_server: function that starts the tf.train.Server of this machine.
      lead: function of that server which trains and returns the exit status.

    Returns:
      The exit status of the chief.

    Raises:
      script.UserError: the port is taken, or the machines differ.
    """
    lines = Lines(cluster, facts)
    is_chief = cluster.me == cluster.chief
    status, why = 1, None

    def stop(number, frame):
        lines.say_last(*_last_word(128 + number))
        print(f'Stopped by {signal.Signals(number).name} before the first step.', flush=True)
        sys.exit(128 + number)

    def linger(number, frame):
        signal.signal(number, signal.SIG_DFL)
        time.sleep(GRACE_SECS)
        os._exit(128 + number)

    if is_chief:  # Up to its training, which hears signals itself.
        for number in signal.SIGINT, signal.SIGTERM:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, stop)
    else:
        signal.signal(signal.SIGTERM, linger)
    try:
        server = lines.meet(start_server)
        while not is_chief:
            time.sleep(1)  # A line ends this process.
        status = lead(server)
    except Exception as error:
        kind = '' if isinstance(error, script.UserError) else f'{type(error).__name__}: '
        why = f'{kind}{error}'.partition('\n')[0]
        # A machine that is lost makes steps fail in many ways. Then a line ends this process.
        is_connection = getattr(error, 'error_code', None) in CONNECTION_CODES
        time.sleep(PATIENCE_SECS + (KEEPALIVE_SECS if is_connection else 0))
        raise
    finally:
        if is_chief:
            lines.say_last(*_last_word(status, why))
    return status


def _last_word(status, why=None):
    """What the others have to know when the chief ends: their own status, and why."""
    if status in STOPPED:
        return 0, f'the chief was stopped by {signal.Signals(status - 128).name}'
    if status == 0:
        return 0, 'the chief has finished'
    return 1, f'the chief has failed: {why or f"status {status}"}'


class Lines:
    """The lines between this process and all others of the cluster."""

    def __init__(self, cluster, facts):
        """Begins to listen and to call.

        Raises:
          script.UserError: the port is in use.
        """
        self._cluster = cluster
        self._others = [task for task in cluster.tasks if task != cluster.me]
        self._said = [{'cluster': cluster.jobs, 'task': cluster.me, 'facts': facts}]
        self._callers = []  # The lines on which this process speaks.
        self._facts = {cluster.me: facts}  # Of those that answered.
        self._problems = {}  # Why a task did not answer.
        self._states = {'met': {cluster.me}, 'ready': {cluster.me}}
        self._changed = threading.Condition(threading.RLock())
        self._have_met = self._over = False
        self._listener = self._listen()
        self._answering = self._start(self._answer)
        for task in self._others:
            self._start(self._call, task)

    def meet(self, start_server):
        """Waits until all others are there, and compares what they have.

        Returns:
          The server.

        Raises:
          script.UserError: they have not the same. (The chief is the one who looks.)
        """
        cluster = self._cluster
        everyone = ', '.join(map(str, cluster.tasks))
        print(f'{len(cluster.tasks)} machines: {everyone}. This is {cluster.me}.', flush=True)
        self._wait_for(self._facts, 'Waiting for')
        self._say({'state': 'met'})
        self._wait_for(self._states['met'], 'Waiting for others to be found by')
        if cluster.me == cluster.chief:
            different = differences(cluster, self._facts)
            if different:
                raise script.UserError(
                    f'the machines differ: {"; ".join(different)}. Give all of them the same.'
                )
        self._have_met = True
        self._listener.shutdown(socket.SHUT_RDWR)  # Wakes up who waits for a call.
        self._answering.join()
        self._listener.close()
        server = start_server()
        self._say({'state': 'ready'})
        self._wait_for(self._states['ready'], 'Waiting for the server of')
        print(f'All {len(cluster.tasks)} machines are there.', flush=True)
        return server

    def say_last(self, status, why):
        """Tells all others that the run is over: why, and with which status they end.

        Returns:
          False if it was over already.
        """
        with self._changed:
            if self._over:
                return False
            self._over = True
            self._say({'status': status, 'why': why})
        return True

    def _start(self, target, *args):
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        return thread

    def _wait_for(self, there, what):
        """Until all others are in `there`."""
        next_line = time.monotonic() + 1
        with self._changed:
            while True:
                missing = [task for task in self._others if task not in there]
                if not missing:
                    return
                now = time.monotonic()
                if now >= next_line:
                    next_line = now + TELL_SECS
                    names = ', '.join(f'{task}{self._problems.get(task, "")}' for task in missing)
                    print(f'{what} {names}.', flush=True)
                self._changed.wait(1)  # script.hear_signals() says why not for longer.

    # Speaking: whoever calls is told what this process has to say.

    def _listen(self):
        listener = socket.socket()
        # So that the port can be used again at once, by TensorFlow, with the lines still open.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _, port = self._cluster.me.host_and_port
        try:
            listener.bind(('', port))
            listener.listen(len(self._cluster.tasks) + 128)
        except OSError as error:
            raise script.UserError(
                f'cannot listen on the port of {self._cluster.me}: {error.strerror}. End what '
                'uses it, or name another one in the TF_CONFIG of all machines.'
            )
        return listener

    def _answer(self):
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                if self._have_met:
                    return
                time.sleep(PAUSE_SECS)  # Strangers may have used up all file descriptors.
                continue
            with self._changed:
                self._callers.append(caller)
                for message in self._said:
                    self._send(caller, message)

    def _say(self, message):
        with self._changed:
            self._said.append(message)
            for caller in self._callers:
                self._send(caller, message)

    def _send(self, caller, message):
        caller.settimeout(1)
        try:
            caller.sendall(json.dumps(message).encode() + b'\n')
        except OSError:
            pass  # If it is one of us, its own line to us tells it.

    # Listening: to each of the others, from the first word to the last.

    def _call(self, task):
        while True:
            try:
                line = socket.create_connection(task.host_and_port, ANSWER_SECS)
                with line, line.makefile('rb') as file:
                    greeting = self._receive(file)
                    self._check(task, greeting)
                    with self._changed:
                        self._facts[task] = greeting['facts']
                        self._problems.pop(task, None)
                        self._changed.notify_all()
                    self._hear(task, line, file)
                    return
            except (OSError, ValueError) as error:
                self._problems[task] = f': {getattr(error, "strerror", None) or error}'
            time.sleep(PAUSE_SECS)

    def _receive(self, file):
        """The next message. ValueError if it is none; OSError at the end."""
        text = file.readline(1 << 20)
        if not text.endswith(b'\n'):
            raise OSError(None, 'it hung up')
        message = json.loads(text.decode())
        if not isinstance(message, dict):
            raise ValueError('not a message')
        return message

    def _check(self, task, greeting):
        try:
            jobs, (job, index, _) = greeting['cluster'], greeting['task']
        except (KeyError, TypeError, ValueError):
            raise ValueError('something else listens there')
        if jobs != self._cluster.jobs:
            raise ValueError('its TF_CONFIG names other machines')
        if (job, index) != (task.job, task.index):
            raise ValueError(f'its TF_CONFIG says that it is {job} {index}')

    def _hear(self, task, line, file):
        """Listens to a line up to its end, and ends the process if the run is over with it."""
        _break_off_after(line, KEEPALIVE_SECS)
        try:
            while True:
                message = self._receive(file)
                if 'status' in message:
                    break
                with self._changed:
                    self._states[message['state']].add(task)
                    self._changed.notify_all()
        except (OSError, ValueError) as error:
            reason = f': {error.strerror}' if getattr(error, 'errno', None) else ''
            message = {'status': LOST, 'why': f'{task} is lost{reason}'}
        if self.say_last(**message):
            status, why = message['status'], message['why']
            if status == LOST:
                why += '. Start all again to go on from the newest checkpoint'
            try:
                file = sys.stderr if status else sys.stdout
                print(f'{why[0].upper()}{why[1:].rstrip(".")}.', file=file, flush=True)
            finally:  # The main thread may be waiting for a machine that is no more.
                os._exit(status)


def _break_off_after(line, seconds):
    """Has a line break off if nothing comes through for so long. As long as it does, it lasts."""
    line.settimeout(None)
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = 5
    for option in socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL:
        line.setsockopt(socket.IPPROTO_TCP, option, seconds // probes)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes - 1)
