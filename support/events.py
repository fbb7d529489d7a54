"""Writes event files, which TensorBoard shows."""

import glob
import os
import socket
import time

from support import checkpoints
from support.compat import tf


class Writer:
    """Writes events to a new file in a folder.

    A tf.summary.FileWriter writes in a thread of its own. When the disk is full, TensorFlow 1.15
    loses the events without an error, and 2.x sometimes does. Here write errors are errors.

    The file is created with the first event, after which the graph must not change.
    """

    def __init__(self, folder, graph):
        """
        Args:
          folder: an existing folder.
          graph: the tf.Graph to show. TensorBoard expects one per folder, so it is written to the
            first file there.
        """
        self._folder, self._graph, self._file = folder, graph, None

    def add_summary(self, summary, step):
        """Writes a serialized tf.Summary."""
        self._write(tf.Event(step=step, summary=tf.Summary.FromString(summary)))

    def add_session_log(self, session_log, step):
        """Writes a tf.SessionLog. With START, TensorBoard drops older events from this step on."""
        self._write(tf.Event(step=step, session_log=session_log))

    def flush(self):
        """Does nothing: every event is in the file already."""

    def _write(self, event):
        with checkpoints.writing(self._folder):
            if self._file is None:
                self._open()
            event.wall_time = time.time()
            self._file.write(event.SerializeToString())
            self._file.flush()

    def _open(self):
        prefix = os.path.join(self._folder, 'events.out.tfevents.')
        is_first_file = not glob.glob(glob.escape(prefix) + '*')
        self._file = tf.io.TFRecordWriter(f'{prefix}{time.time():.6f}.{socket.gethostname()}')
        self._write(tf.Event(file_version='brain.Event:2'))
        if is_first_file:
            graph_def = self._graph.as_graph_def(add_shapes=True)
            self._write(tf.Event(graph_def=graph_def.SerializeToString()))
