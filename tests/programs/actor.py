"""Plays the trainer for support/local_cluster.py: actor.py FILE [stuck].

When FILE exists, the worker removes it and ends as if the chief was lost. With `stuck`, no signal
ends a process.
"""

import json
import os
import signal
import sys
import time

job, received = json.loads(os.environ['TF_CONFIG'])['task']['type'], []
for number in signal.SIGINT, signal.SIGTERM, signal.SIGUSR1:
    signal.signal(number, lambda number, frame: received.append(number))
print('pid', os.getpid(), flush=True)
while not received or 'stuck' in sys.argv:
    if job == 'worker' and os.path.exists(sys.argv[1]):
        os.remove(sys.argv[1])
        sys.exit(138)
    time.sleep(0.02)
print('received', received[0], flush=True)
sys.exit(128 + received[0] if job == 'chief' else 0)
