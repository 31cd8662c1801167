"""Named places at which a run can be made to end as if its machine did: what the tests of exact resumption stand on."""

import os
import threading

POINTS = {
    "log.line": "a line of metrics.jsonl was written, not yet forced to the disk",
    "save.begin": "the lines are on the disk, nothing of the checkpoint is",
    "save.arrays": "Orbax has written the arrays, its directory has its final name",
    "save.files": "every file of the checkpoint is on the disk, the manifest is not written",
    "save.manifest": "the manifest is written under a temporary name",
    "save.committed": "the checkpoint counts, older ones are not deleted yet",
    "save.discard": "an old checkpoint has lost its manifest, its files are still there",
    "restore": "the newest checkpoint was read, the log not yet cut to its lines",
    "summary": "training is over and tested, summary.json is not written",
}
"""Name -> what holds there."""

_counts: dict[str, int] = {}
_lock = threading.Lock()


def point(name: str) -> None:
    """Ends the process with status 137 where `JAXCNN_FAULT` is "NAME" or "NAME:n", at the n-th passage (from 1)."""
    asked = os.environ.get("JAXCNN_FAULT")
    if not asked:
        return
    wanted, _, number = asked.partition(":")
    with _lock:
        _counts[name] = _counts.get(name, 0) + 1
        if name == wanted and _counts[name] == int(number or 1):
            os._exit(137)
