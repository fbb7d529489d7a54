"""Several machines: which ones there are, whether all are connected, how the run ends on each.

TF_CONFIG lists the machines. TensorFlow alone would wait forever for one that died. Therefore each
worker listens on its own address before TensorFlow does. The chief connects to all of them, and
these connections stay open until the end of the run. Messages are JSON objects, one a line:

    chief   {"cluster": ..., "task": ...}                 a call for this task
    worker  {"cluster": ..., "task": ..., "facts": ...}   what must be the same on all machines
    chief   {"start": true}                               start TensorFlow's server
    worker  {"problem": ""}                               done, and the chief's port is reachable
    chief   {"text": "Waiting for worker 1 ..."}          print this
    chief   {"status": 0, "why": "... has finished"}      exit with this status

A connection that ends without a status means that the machine is lost. The kernel closes the
connections of a dead process at once. TCP keepalive ends them KEEPALIVE_SECS after the network or
the machine failed. A paused process keeps its connections, because the kernel answers for it.
"""

import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time

from support import script

LOST = 138  # Exit status for "restart all processes": 128 + SIGUSR1, a convention of Kubeflow.
KEEPALIVE_SECS = 10
ANSWER_SECS = 5  # How long a machine may take to say who it is.
RETRY_SECS = 0.5  # Between two attempts to reach a machine.
REPORT_SECS = 10  # Between two lines on missing machines.
GRACE_SECS = 8  # For the chief to save when all are stopped. `docker stop` waits for 10 seconds.
# error_code of tf.errors that a lost machine can cause: cancelled, aborted, internal, unavailable.
CONNECTION_CODES = (1, 10, 13, 14)


def digests(paths):
    """Dict of file name -> digest, for these files and for this project's imported files."""
    here = os.path.dirname(os.path.abspath(__file__))
    for module in list(sys.modules.values()):
        # Not module.__file__, with which TensorFlow 1.15 would import all of tf.contrib.
        path = os.path.abspath(getattr(module, '__dict__', {}).get('__file__') or '')
        if os.path.dirname(path) in (here, os.path.dirname(here)):
            paths = [*paths, path]
    result = {}
    for path in paths:
        with open(path, 'rb') as file:
            result[os.path.basename(path)] = hashlib.sha256(file.read()).hexdigest()[:12]
    return result


def run(cluster, facts, start_server, train):
    """Connects all machines; then the chief trains and the workers serve until it has finished.

    Only the chief returns from here. A worker exits with status 0 when the chief has finished or
    was stopped, and 1 when it has failed. When a machine is lost, all processes exit with LOST.

    Args:
      cluster: a Cluster.
      facts: what must be the same on all machines; dict of name -> value.
      start_server: function that starts the tf.train.Server of this machine.
      train: function of that server; returns 0, or 128 + the signal that stopped it.

    Returns:
      The exit status of the chief.

    Raises:
      script.UserError: the port is in use or, on the chief, the machines do not match.
    """
    listener = _listen(cluster.me)
    everyone = ', '.join(map(str, cluster.tasks))
    print(f'{len(cluster.tasks)} machines: {everyone}. This is {cluster.me}.')
    # gRPC would connect through a proxy, even to this machine. Downloads are over.
    for name in 'grpc_proxy', 'https_proxy', 'http_proxy':
        os.environ.pop(name, None)
    if cluster.me != cluster.chief:
        _serve(cluster, facts, start_server, listener)
    _handle_signals(_stop)
    workers = _Workers(cluster)
    try:
        workers.connect(facts)
        listener.close()  # It kept the port for TensorFlow.
        status = train(start_server())
    except SystemExit as stop:
        status = stop.code
        print(f'Stopped by {_signal(status)}.')
    except Exception as error:
        # A lost machine makes steps fail in many ways. Meanwhile, a thread ends this process with
        # the name of that machine.
        is_connection = getattr(error, 'error_code', None) in CONNECTION_CODES
        time.sleep(KEEPALIVE_SECS + 1 if is_connection else 1)
        kind = '' if isinstance(error, script.UserError) else f'{type(error).__name__}: '
        workers.end(1, f'the chief has failed: {kind}{error}'.partition('\n')[0])
        raise
    workers.end(
        0, f'the chief was stopped by {_signal(status)}' if status else 'the chief has finished'
    )
    # SIGUSR1 counts as SIGTERM here, because its own status means that a machine is lost.
    return 128 + signal.SIGTERM if status == LOST else status


def _signal(status):
    return signal.Signals(status - 128).name


def _handle_signals(handler):
    for number in script.STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _stop(number, frame):
    """Ends the chief before its first step. The training loop has its own handlers."""
    _handle_signals(signal.SIG_DFL)
    sys.exit(128 + number)


def _exit(status, why):
    """Prints why the run is over and ends the process, whatever its other threads do."""
    if status == LOST:
        why += '. Restart all processes to resume from the newest checkpoint'
    try:
        why = script.printable(f'{why[0].upper()}{why[1:].rstrip(".")}.')
        print(why, file=sys.stderr if status else sys.stdout, flush=True)
    finally:
        os._exit(status)


# --- A worker's side -----------------------------------------------------------


def _serve(cluster, facts, start_server, listener):
    """Serves the chief until the end of the run. Does not return."""
    sock, file = _accept_chief(cluster, facts, listener)
    listener.close()
    _handle_signals(_stop_after_chief)
    server = None
    while True:
        try:
            message = _receive(file)
        except OSError as error:
            _exit(LOST, f'{cluster.chief} is lost: {_reason(error)}')
        if 'start' in message:
            server = server or start_server()
            _send(sock, problem=_problem_reaching(cluster.chief))
        if 'text' in message:
            print(script.printable(str(message['text'])))
        if 'status' in message:
            _exit(message['status'], message['why'])


def _accept_chief(cluster, facts, listener):
    """Returns the connection to the chief, a socket and its file. Hangs up on other callers."""
    listener.settimeout(REPORT_SECS)
    while True:
        try:
            sock, _ = listener.accept()
            sock.settimeout(ANSWER_SECS)
        except OSError:
            print(f'Waiting for {cluster.chief} to connect.')
            continue
        file = sock.makefile('rb')
        try:
            call = _receive_soon(sock, file)
            _send(sock, cluster=cluster.jobs, task=cluster.me, facts=facts)
            if call == {'cluster': cluster.jobs, 'task': list(cluster.me)}:
                _keep_alive(sock)
                return sock, file
        except (OSError, ValueError):
            pass
        file.close()
        sock.close()


def _problem_reaching(task):
    """Why this machine cannot connect to another one, or ''."""
    try:
        socket.create_connection(task.host_and_port, ANSWER_SECS).close()
    except OSError as error:
        return f'it cannot reach {task}: {_reason(error)}'
    return ''


def _stop_after_chief(number, frame):
    """Ends a worker in a moment: when all are stopped together, the chief saves a checkpoint."""
    _handle_signals(signal.SIG_DFL)
    signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
    signal.alarm(GRACE_SECS)


# --- The chief's side ----------------------------------------------------------


class _Workers:
    """The chief's connections to the workers. Each has a thread that listens to it."""

    def __init__(self, cluster):
        self._cluster, self._tasks = cluster, cluster.tasks[1:]
        self._sockets, self._facts = {}, {}  # Of the workers that are connected.
        self._problems = dict.fromkeys(self._tasks, 'no answer')  # Why the others are not ready.
        self._changed = threading.Condition(threading.RLock())
        self._is_over = False

    def connect(self, facts):
        """Waits until all workers are ready. Raises a UserError if their facts are different."""
        for task in self._tasks:
            threading.Thread(target=self._listen_to, args=[task], daemon=True).start()
        report_at = time.monotonic() + 1
        with self._changed:
            while self._problems:
                if time.monotonic() >= report_at:
                    report_at = time.monotonic() + REPORT_SECS
                    problems = [f'{task}: {why}' for task, why in sorted(self._problems.items())]
                    self._print(f'Waiting for {", ".join(problems)}.')
                self._changed.wait(1)
        different = [
            f'{task} has {name} {value}, the chief {facts.get(name, "none")}'
            for task in self._tasks
            for name, value in sorted(self._facts[task].items())
            if value != facts.get(name)
        ]
        if different:
            raise script.UserError(f'the machines do not match: {"; ".join(different)}')
        self._print(f'All {len(self._cluster.tasks)} machines are connected.')

    def end(self, status, why):
        """Ends the workers. Returns False if the run was over before."""
        with self._changed:
            if self._is_over:
                return False
            self._is_over = True
            self._send(status=status, why=why)
        return True

    def _print(self, text):
        print(script.printable(text))
        self._send(text=text)

    def _send(self, **message):
        with self._changed:
            for sock in self._sockets.values():
                _send(sock, **message)

    def _listen_to(self, task):
        """Calls a worker until it answers. Then listens until the end of the run."""
        while task not in self._sockets:
            try:
                sock = socket.create_connection(task.host_and_port, ANSWER_SECS)
                with sock, sock.makefile('rb') as file:
                    self._exchange(task, sock, file)
            except (OSError, ValueError) as error:
                reason = self._problems[task] = _reason(error)
            time.sleep(RETRY_SECS)
        if self.end(LOST, f'{task} is lost: {reason}'):
            _exit(LOST, f'{task} is lost: {reason}')

    def _exchange(self, task, sock, file):
        """Talks to a worker until the connection ends with an OSError."""
        _send(sock, cluster=self._cluster.jobs, task=task)
        greeting = _receive_soon(sock, file)
        if not isinstance(greeting.get('facts'), dict):
            raise ValueError('another program listens there')
        if (greeting.get('cluster'), greeting.get('task')) != (self._cluster.jobs, list(task)):
            raise ValueError('it has another TF_CONFIG')
        _keep_alive(sock)
        with self._changed:
            self._sockets[task], self._facts[task] = sock, greeting['facts']
        while self._problems.get(task):
            _send(sock, start=True)
            self._problems[task] = _receive(file).get('problem')
            time.sleep(RETRY_SECS if self._problems[task] else 0)
        with self._changed:
            del self._problems[task]
            self._changed.notify_all()
        _receive(file)


# --- Sockets -------------------------------------------------------------------


def _listen(me):
    """Returns a socket that listens on the port of this machine, for IPv4 and IPv6."""
    try:
        listener = socket.socket(socket.AF_INET6)
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    except OSError:  # This machine has no IPv6.
        listener = socket.socket(socket.AF_INET)
    # TensorFlow can use the port while a connection to it is open.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(('', me.host_and_port[1]))
        listener.listen(128)
    except OSError as error:
        raise script.UserError(
            f'cannot listen on the port of {me}: {error.strerror}. Choose another port in the '
            'TF_CONFIG of all machines, or stop what uses this one.'
        )
    return listener


def _keep_alive(sock):
    """Has the kernel end the connection only when the other machine is dead or unreachable."""
    sock.settimeout(None)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = 5
    for option in socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL:
        sock.setsockopt(socket.IPPROTO_TCP, option, KEEPALIVE_SECS // probes)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes - 1)


def _send(sock, **message):
    try:
        sock.sendall(json.dumps(message).encode() + b'\n')
    except OSError:
        pass  # _receive() raises it, too.


def _receive(file):
    """Reads the next message, a dict. Raises ValueError if it is none, OSError at the end."""
    line = file.readline(1 << 20)
    if not line.endswith(b'\n'):
        raise OSError(None, 'the connection ended')
    try:
        message = json.loads(line.decode())
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise ValueError('another program listens there')
    return message


def _receive_soon(sock, file):
    """As _receive(), but the whole message has to arrive within ANSWER_SECS."""

    def hang_up():
        with contextlib.suppress(OSError):  # It was closed just now.
            sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(ANSWER_SECS, hang_up)
    timer.daemon = True
    timer.start()
    try:
        return _receive(file)
    finally:
        timer.cancel()


def _reason(error):
    return getattr(error, 'strerror', None) or str(error)
