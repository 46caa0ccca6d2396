"""TensorBoard's event files, written at once and record by record.

Not by torch's SummaryWriter: its thread fails at some later moment, and takes with it what it had not written.
"""

import io
import socket
import time
from pathlib import Path

from megatron_ext.checkpoint.directory import set_aside
from pretrain.logs.growing_file import GrowingFile
from pretrain.logs.log import Record

_EVENTS = "events.out.tfevents."


class TensorBoard:
    """first: the first iteration to come. What the folder has of it and of later ones, TensorBoard forgets.

    The events of an earlier run, where this one starts anew, go into the folder `old`, which TensorBoard shows as
    another run.
    """

    def __init__(self, folder: str, first: int):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        if first == 1 and (earlier := sorted(self._folder.glob(_EVENTS + "*"))):
            old = self._folder / "old"
            if old.exists():
                set_aside(old)
            old.mkdir()
            for file in earlier:
                file.rename(old / file.name)
        self._file = self._begin(first)

    def write(self, record: Record) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._file.is_lost:
            self._file = self._begin(record["iteration"])
        values = [
            Summary.Value(tag=name, simple_value=float(value))
            for name, value in record.items()
            if name != "iteration" and value is not None
        ]
        event = Event(wall_time=time.time(), step=record["iteration"], summary=Summary(value=values))
        self._file.append(_framed(event))

    def close(self) -> None:
        self._file.close()

    def _begin(self, first: int) -> GrowingFile:
        """A new event file, by its name later than all others: TensorBoard reads them in this order."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        stamps = [file.name.removeprefix(_EVENTS).split(".")[0] for file in self._folder.glob(_EVENTS + "*")]
        now = max([int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdecimal())])
        begin = _framed(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if first > 1:  # what `purge_step` of a SummaryWriter does
            start = SessionLog(status=SessionLog.START)
            begin += _framed(Event(wall_time=time.time(), step=first, session_log=start))
        path = self._folder / f"{_EVENTS}{now:010d}.{socket.gethostname()}"
        file = GrowingFile(path)
        try:
            file.append(begin)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return file


def _framed(event: "Event") -> bytes:  # type: ignore[name-defined]  # noqa: F821  # imported where it is used
    from tensorboard.summary.writer.record_writer import RecordWriter

    framed = io.BytesIO()
    RecordWriter(framed).write(event.SerializeToString())
    return framed.getvalue()
