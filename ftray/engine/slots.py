"""Where deltas are: known by name on disk or elsewhere, read into memory, or in place in the model.

Reading runs on a thread of its own and never holds a step up. A delta is put in place between two steps, over the
one that was used least recently and that nothing runs under; one in use is never moved.
"""

import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ftray.core.errors import DeltaError
from ftray.engine.api import DeltaInfo, Source
from ftray.engine.entry import Entry, fetch, said
from ftray.engine.places import HostDelta, OwnWeightsError, Places

_MAX_WRITES = 2
"""Deltas put in place between two steps; each costs those that run a little."""
_READ_AHEAD = 4
"""Deltas read for those that wait, where fewer fit in place."""


@dataclass
class Slots:
    """The deltas of an engine.

    Args:
        places: reads and holds their tensors.
        max_slots: deltas that share a batch in place at once; 0: as many as come.
        max_host: such deltas kept in memory that are not in place.
        max_own: deltas with weights of their own in place at once; one more at most is in memory, that waits.
    """

    places: Places
    max_slots: int = 0
    max_host: int = 0
    max_own: int = 1
    num_loads: int = 0
    """Times a delta was put in place."""
    num_reads: int = 0
    """Times one was read beside the steps."""
    _names: dict[str, Entry] = field(default_factory=dict)
    _placed: "OrderedDict[Entry, None]" = field(default_factory=OrderedDict)
    _kept: "OrderedDict[Entry, None]" = field(default_factory=OrderedDict)
    _reading: set[Entry] = field(default_factory=set)
    _refused: list[Entry] = field(default_factory=list)
    _orders: int = 0
    _writes: int = 0
    _done: threading.Event = field(default_factory=threading.Event)
    _reader: ThreadPoolExecutor | None = None

    def find(self, name: str) -> Entry | None:
        """The entry a name stands for now."""
        return self._names.get(name)

    def names(self) -> list[str]:
        """All known names."""
        return list(self._names)

    def register(self, name: str, source: Source) -> Entry:
        """Make a name known. Raises `DeltaError` if it is."""
        if name in self._names:
            raise DeltaError(f"{name}: already loaded; unload it first or use another name")
        entry = self._names[name] = Entry(name, source)
        return entry

    def load(self, name: str, folder: str, replace: bool) -> Entry:
        """Read a delta now and make it answer to a name, in place if there is room without moving another."""
        if name in self._names and not replace:
            raise DeltaError(f"{name}: already loaded; unload it first or use another name")
        entry = Entry(name, folder)
        try:
            host = self.places.read(folder)
        except OwnWeightsError:
            self._forget_waiting_own()
            host = self.places.read_own(folder)
        self._take(entry, host)
        if self._has_room(entry):
            self._place(entry)
        self._keep(entry)
        old = self._names.get(name)
        self._names[name] = entry
        if old:
            self._drop_if_unused(old)
        return entry

    def unload(self, name: str) -> None:
        """Forget a name and what it stands for. Raises `DeltaError` if it is unknown or in use."""
        entry = self._names.get(name)
        if entry is None:
            raise DeltaError(f"{name}: not loaded; loaded are: {', '.join(self._names) or 'none'}")
        if entry.in_flight:
            raise DeltaError(f"{name}: requests under it are in flight; wait for them or cancel them")
        del self._names[name]
        self._drop_if_unused(entry)

    def arrive(self, entry: Entry) -> None:
        """A sequence under it waits from now on; its files are read ahead if they are not in memory."""
        entry.in_flight += 1
        if not entry.slot and entry.host is None:
            self._read(entry)

    def depart(self, entry: Entry) -> None:
        """A sequence under it is over."""
        entry.in_flight -= 1
        self._forget_idle()
        self._drop_if_unused(entry)

    def enter(self, entry: Entry) -> bool:
        """A sequence under it is about to run: True, and it stays in place until `leave`; False: not yet."""
        if entry.leaving or (not entry.slot and not self._try_place(entry)):
            return False
        self._placed.move_to_end(entry)
        entry.refs += 1
        return True

    def leave(self, entry: Entry) -> None:
        """A sequence under it runs no more."""
        entry.refs -= 1
        if entry.leaving and not entry.refs:
            self._displace(entry)

    def poll(self) -> list[Entry]:
        """Take over what was read since the last step; returns what could not be."""
        self._done.clear()
        self._writes = 0
        failed, self._refused = self._refused, []
        for entry in [entry for entry in self._reading if entry.reading and entry.reading.done()]:
            self._reading.discard(entry)
            reading, entry.reading = entry.reading, None
            assert reading is not None
            try:
                self._take(entry, reading.result())
                self._keep(entry)
            except OwnWeightsError:
                entry.mixed_batch = False  # read as a whole when those who wait ask again and there is room
            # Whatever a source raises (a network, a disk), those who wait must hear of it, and nobody else.
            except Exception as error:
                entry.error = said(entry, error)
                failed.append(entry)
            self._drop_if_unused(entry)
        return failed

    def wait(self, timeout_s: float) -> None:
        """Sleep until something was read, where there is nothing to compute."""
        if self._reading:
            self._done.wait(timeout_s)

    def info(self, name: str) -> DeltaInfo:
        """Facts about a known delta. Raises `DeltaError`."""
        entry = self._names.get(name)
        if entry is None:
            raise DeltaError(f"{name}: not loaded; loaded are: {', '.join(self._names) or 'none'}")
        return DeltaInfo(
            name=name,
            digest=entry.digest,
            kind=entry.kind,
            mixed_batch=entry.mixed_batch,
            tier="slot" if entry.slot else "host" if entry.host else "failed" if entry.error else "disk",
            size_bytes=entry.size_bytes,
            in_flight=entry.in_flight,
            error=str(entry.error) if entry.error else None,
        )

    @property
    def num_placed(self) -> int:
        """Deltas in place."""
        return len(self._placed)

    @property
    def num_reading(self) -> int:
        """Deltas being read."""
        return len(self._reading)

    def _read(self, entry: Entry) -> None:
        ahead = [*self._reading, *(other for other in self._kept if other.in_flight)]
        if entry.reading or len(ahead) >= max(_READ_AHEAD, self.max_slots):
            return
        if not entry.mixed_batch and self._num_own() > self.max_own:
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="ftray-deltas")
        entry.error = None
        read = self.places.read if entry.mixed_batch else self.places.read_own
        entry.reading = self._reader.submit(fetch, read, entry.source)
        entry.reading.add_done_callback(lambda _: self._done.set())
        self._reading.add(entry)
        self.num_reads += 1

    def _num_own(self) -> int:
        """Whole models in memory, and those being read."""
        return sum(not entry.mixed_batch for entry in [*self._placed, *self._kept, *self._reading])

    def _forget_waiting_own(self) -> None:
        """Let go of whole models that are not in place, so that one can be read; those who wait read them again."""
        for entry in [entry for entry in self._reading if not entry.mixed_batch]:
            reading, entry.reading = entry.reading, None
            assert reading is not None
            self._reading.discard(entry)
            if not reading.cancel():
                reading.exception()  # waits until it is there; a failure is met again by who reads again
            del reading
        for entry in [entry for entry in self._kept if not entry.mixed_batch]:
            del self._kept[entry]
            entry.host = None

    def _take(self, entry: Entry, host: HostDelta) -> None:
        if entry.digest and entry.digest != host.digest:
            raise DeltaError(
                f"{entry.name}: holds {host.digest} now, it was {entry.digest}; publish it as a new version"
            )
        entry.digest, entry.kind, entry.mixed_batch = host.digest, host.kind, host.mixed_batch
        entry.size_bytes, entry.host, entry.error = host.size_bytes, host, None

    def _keep(self, entry: Entry) -> None:
        """Keep it in memory, at the cost of those not asked for longest that nobody waits for."""
        if entry.slot:
            return
        self._kept[entry] = None
        self._kept.move_to_end(entry)
        self._forget_idle()

    def _forget_idle(self) -> None:
        idle = [other for other in self._kept if not other.in_flight]
        large = [other for other in idle if not other.mixed_batch]
        small = [other for other in idle if other.mixed_batch]
        for other in large + small[: max(0, len(self._kept) - len(large) - self.max_host)]:
            del self._kept[other]
            other.host = None

    def _try_place(self, entry: Entry) -> bool:
        if entry.host is None:
            self._read(entry)
            return False
        if self._writes >= _MAX_WRITES:
            return False
        if not self._has_room(entry):
            alike = [other for other in self._placed if other.mixed_batch == entry.mixed_batch]
            unused = next((other for other in alike if not other.refs), None)
            if unused is None:
                # One place runs empty, so that a delta that waits is not kept out for ever by those in use.
                if not any(other.leaving for other in alike):
                    min(alike, key=lambda other: other.refs).leaving = True
                return False
            self._displace(unused)
        try:
            self._place(entry)
        except Exception as error:  # out of memory, say: this one's trouble, not that of those who run
            entry.error = said(entry, error)
            self._refused.append(entry)
            return False
        return True

    def _has_room(self, entry: Entry) -> bool:
        count = sum(other.mixed_batch == entry.mixed_batch for other in self._placed)
        if not entry.mixed_batch:
            return count < self.max_own
        return not self.max_slots or count < self.max_slots

    def _place(self, entry: Entry) -> None:
        self._orders += 1
        entry.slot = self._orders
        try:
            self.places.load(entry.key, entry.host)
        except BaseException:
            self.places.unload(entry.key)
            entry.slot = 0
            raise
        self._placed[entry] = None
        self._kept.pop(entry, None)
        self._writes += 1
        self.num_loads += 1

    def _displace(self, entry: Entry) -> None:
        assert not entry.refs, "a delta in use was to be moved"
        self.places.unload(entry.key)
        del self._placed[entry]
        entry.slot, entry.leaving = 0, False
        if entry.host is not None:
            self._keep(entry)

    def _drop_if_unused(self, entry: Entry) -> None:
        """Let go of what no name and no sequence stands for."""
        if entry.in_flight or self._names.get(entry.name) is entry:
            return
        if entry.slot:
            self._displace(entry)
        self._kept.pop(entry, None)
        entry.host = None
