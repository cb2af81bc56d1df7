"""The rings of channels_last.cu: which warp waits for what, transcribed from the kernels, and a block that runs them.

A warp is a generator that yields (barrier, phase) to wait until that phase is over, or (barrier, None) to arrive. What
it does in between is left to `actions`: numbers in `simulation`, bookkeeping in `Ledger`.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass


# ---- the work
@dataclass(frozen=True)
class Item:
    """Images from n0 on, columns from col0 on, rows row0 .. row1 - 1, channels from c0 on; its sets and slots."""

    n0: int
    col0: int
    row0: int
    row1: int
    sets: int
    slots: int
    c0: int = 0


class Pieces:
    """NhwcPieces: the images in order (group of images, column tile, row range)."""

    def __init__(self, shape, images: int, columns: int, item_rows: int, rows: int, lead: int):
        self.h, self.images, self.columns, self.item_rows, self.rows, self.lead = (
            shape.h, images, columns, item_rows, rows, lead,
        )  # fmt: skip
        self.n_rows, self.n_cols = math.ceil(shape.h / item_rows), math.ceil(shape.w / columns)
        self.count = math.ceil(shape.n / images) * self.n_rows * self.n_cols

    def item(self, number: int, c0: int = 0) -> Item:
        rest, row0 = number // self.n_rows, number % self.n_rows * self.item_rows
        col0, n0 = rest % self.n_cols * self.columns, rest // self.n_cols * self.images
        row1 = min(self.h, row0 + self.item_rows)
        sets = math.ceil((row1 - row0) / self.rows)
        slots = self.lead + min(sets + self.lead, math.ceil((self.h - row0) / self.rows))
        return Item(n0, col0, row0, row1, sets, slots, c0)


def forward_walk(pieces: Pieces, shape, plan, block: int) -> list[Item]:
    """NhwcWalk: the items of one block."""
    grid, share, count = plan.launch.grid[0], plan.share, pieces.count
    total = count * math.ceil(math.ceil(shape.c / plan.channels) / share)
    runs, run = grid // share, block // share
    return [
        pieces.item(number % count, (number // count * share + block % share) * plan.channels)
        for number in range(total * run // runs, total * (run + 1) // runs)
    ]


@dataclass(frozen=True)
class Part:
    """WeightGradPart: items of the same channels, which of their partial sums it is, and whether it is the last."""

    items: list[Item]
    split: int
    ends: bool


def weight_grad_walk(pieces: Pieces, groups: int, together: int, plan, run: int) -> list[Part]:
    """WeightGradWalk: the parts of one run; `groups` of `together` channels."""
    count, share, runs = pieces.count, plan.share, plan.launch.grid[1]
    whole, parts = groups // runs, []
    for part in range(whole):
        c0 = (part * runs + run) * together
        parts.append(Part([pieces.item(i, c0) for i in range(count)], 0, True))
    rest = (groups - whole * runs) * count
    first, last = min(rest, run * share), min(rest, (run + 1) * share)
    while first < last:
        group, begin = divmod(first, count)
        n = min(last - first, count - begin)
        # Those from the next multiple of the share on come first.
        turn = -begin % share
        turn = turn if turn < n else 0
        order = [begin + (i + turn) % n for i in range(n)]
        c0 = (whole * runs + group) * together
        parts.append(Part([pieces.item(i, c0) for i in order], run - group * count // share, begin + n == count))
        first += n
    return parts


class RingAt:
    def __init__(self, ring: int):
        self.ring, self.slot, self.round = ring, 0, 0

    def next(self):
        self.slot += 1
        if self.slot == self.ring:
            self.slot, self.round = 0, self.round + 1


# ---- the block
class Barrier:
    """An mbarrier. `clock` is what its completed phases order before those that waited."""

    def __init__(self, count: int):
        self.count, self.arrived, self.phase, self.clock, self.gathered = count, 0, 0, Counter(), Counter()

    def arrive(self, clock: Counter):
        self.arrived += 1
        self.gathered |= clock
        if self.arrived == self.count:
            self.arrived, self.phase, self.clock = 0, self.phase + 1, self.clock | self.gathered


class Block:
    """Runs warps in an order of chance, some of them faster than others; `clocks` are the warps' vector clocks."""

    def __init__(self, seed: int):
        self.random, self.current, self.clocks = random.Random(seed), -1, []

    def run(self, warps: list[Iterator]):
        self.clocks = [Counter({w: 1}) for w in range(len(warps))]
        waiting = {}
        for w in range(len(warps)):
            self._step(w, warps, waiting)
        speeds = [self.random.choice((1, 1, 100)) for _ in warps]
        while waiting:
            able = []
            for w, (barrier, phase) in waiting.items():
                # A wait knows the parity of its phase alone: one phase off it would pass too early or never.
                assert barrier.phase in (phase, phase + 1), "a wait for a phase that is out of reach of its parity"
                if barrier.phase & 1 != phase & 1:
                    able.append(w)
            assert able, "deadlock"
            w = self.random.choices(able, [speeds[w] for w in able])[0]
            self.clocks[w] |= waiting.pop(w)[0].clock
            self._step(w, warps, waiting)

    def _step(self, w, warps, waiting):
        """Warp w up to its next wait."""
        self.current = w
        for barrier, phase in warps[w]:
            if phase is not None:
                waiting[w] = barrier, phase
                return
            barrier.arrive(self.clocks[w])
            self.clocks[w][w] += 1

    def knows(self, warp: int, time: int) -> bool:
        """Whether what that warp did at that time has happened before what the current warp does now."""
        return self.clocks[self.current][warp] >= time

    def now(self) -> tuple[int, int]:
        return self.current, self.clocks[self.current][self.current]


def forward_warps(
    items, lead, ring, warps: tuple[int, int, int], channels: int, actions, cluster: int = 1, together: bool = False
) -> list[Iterator]:
    """Consumers, loaders and storers of forward_nhwc, those of all blocks of a cluster; `warps` are a block's.

    `channels` are a block's; actions are told the number of a channel among all. Storers of two blocks may go together.
    """
    consumers, loaders, storers = warps

    def barriers(count: int) -> list[list[Barrier]]:
        return [[Barrier(count) for _ in range(ring)] for _ in range(cluster)]

    loaded, convolved, stored = barriers(loaders * cluster), barriers(consumers), barriers(storers * cluster)
    read = [[[Barrier(1) for _ in range(channels)] for _ in range(ring)] for _ in range(cluster)]
    others, tables, own = barriers(1), [Barrier(consumers) for _ in range(cluster)], channels % consumers == 0

    def storer(warp):
        block, p = warp // storers, RingAt(ring)
        for item in items:
            for j in range(item.slots):
                yield convolved[block][p.slot], p.round
                if together and warp % storers == 0:
                    yield others[1 - block][p.slot], None
                if together and j < item.sets:
                    yield others[block][p.slot], p.round
                if j < item.sets:
                    actions.store(item, j, p.slot, warp)
                yield from ((every[p.slot], None) for every in stored)
                p.next()

    def loader(warp):
        block, p = warp // loaders, RingAt(ring)
        for item in items:
            for j in range(item.slots):
                if p.round > 0:
                    yield stored[block][p.slot], p.round - 1
                actions.load(item, j, p.slot, warp)
                yield from ((every[p.slot], None) for every in loaded)
                p.next()

    def consumer(warp):
        block, p, ready, ahead, turn = warp // consumers, RingAt(ring), RingAt(ring), 0, warp % consumers
        before, built, builds = (0, 0), -1, 0
        for item in items:
            if built != item.c0 and not own:
                # Tables are built in between.
                for _ in range(2):
                    yield tables[block], None
                    yield tables[block], builds
                    builds += 1
                built = item.c0
            for j in range(item.slots):
                while ahead <= min(j + 2 * lead, item.slots - 1) - j:
                    yield loaded[block][ready.slot], ready.round
                    ready.next()
                    ahead += 1
                for channel in range(turn, channels, consumers):
                    if j < item.sets:
                        actions.convolve(item, j, p.slot, block * channels + channel)
                    if not own:
                        if before[0] != p.slot:
                            yield read[block][before[0]][channel], before[1]
                        yield read[block][p.slot][channel], None
                    if j < item.sets:
                        actions.finish(item, j, p.slot, block * channels + channel)
                    turn = channel + consumers
                yield convolved[block][p.slot], None
                before = p.slot, p.round
                p.next()
                ahead -= 1
                turn -= channels

    kinds = (consumer, consumers), (loader, loaders), (storer, storers)
    return [kind(warp) for kind, count in kinds for warp in range(count * cluster)]


def weight_grad_warps(
    parts: list[Part], lead, rings: tuple[int, int], warps: tuple[int, int], actions, cluster: int = 1
) -> list[Iterator]:
    """Consumers and loaders of weight_grad_nhwc, those of all blocks of a cluster; `warps` are a block's."""
    (x_ring, y_ring), (consumers, loaders) = rings, warps

    def barriers(ring: int, count: int) -> list[list[Barrier]]:
        return [[Barrier(count * cluster) for _ in range(ring)] for _ in range(cluster)]

    x_loaded, x_used = (barriers(x_ring, count) for count in (loaders, consumers))
    y_loaded, y_used = (barriers(y_ring, count) for count in (loaders, consumers))
    # Those of the consumers of a block, and of all warps of the cluster.
    done, meeting = [Barrier(consumers) for _ in range(cluster)], Barrier((consumers + loaders) * cluster)

    def loader(warp):
        block, p, q = warp // loaders, RingAt(x_ring), RingAt(y_ring)
        for number, part in enumerate(parts):
            for item in part.items:
                done_sets = 0
                for j in range(item.slots):
                    if p.round > 0:
                        yield x_used[block][p.slot], p.round - 1
                    actions.load_x(item, j, p.slot, warp)
                    yield from ((every[p.slot], None) for every in x_loaded)
                    while done_sets < item.sets and min(done_sets + 2 * lead, item.slots - 1) <= j:
                        if q.round > 0:
                            yield y_used[block][q.slot], q.round - 1
                        actions.load_y(item, done_sets, q.slot, warp)
                        yield from ((every[q.slot], None) for every in y_loaded)
                        q.next()
                        done_sets += 1
                    p.next()
            if part is not parts[-1]:
                yield meeting, None
                yield meeting, number

    def consumer(warp):
        block, p, q, ready, ahead = warp // consumers, RingAt(x_ring), RingAt(y_ring), RingAt(x_ring), 0
        for number, part in enumerate(parts):
            for item in part.items:
                for j in range(item.slots):
                    while ahead <= min(j + 2 * lead, item.slots - 1) - j:
                        yield x_loaded[block][ready.slot], ready.round
                        ready.next()
                        ahead += 1
                    if j < item.sets:
                        yield y_loaded[block][q.slot], q.round
                        actions.accumulate(item, j, p.slot, q.slot, warp)
                        yield from ((every[q.slot], None) for every in y_used)
                        q.next()
                    yield from ((every[p.slot], None) for every in x_used)
                    p.next()
                    ahead -= 1
            yield done[block], None
            yield done[block], number
            actions.flush(part, warp)
            if part is not parts[-1]:
                yield meeting, None
                yield meeting, number

    return [*map(consumer, range(consumers * cluster)), *map(loader, range(loaders * cluster))]


# ---- the bookkeeping
class Ledger:
    """What lies in every slot, and who may touch it.

    A channel has planes of its own, a loader lines of its own: a part of a slot is (ring, slot, channel, loader).
    Channels and loaders are those of a whole cluster; in the weight gradient a consumer stands for its channel.
    `storers`: of a block that stores its own channels; 0 if all storers store those of all blocks.
    """

    def __init__(
        self,
        block: Block,
        shape,
        rows: int,
        lead: int,
        rings: dict[str, int],
        channels: int,
        loaders: int,
        cluster=1,
        storers=0,
    ):
        self.cluster, self.storers = cluster, storers
        self.block, self.shape, self.rows, self.lead, self.rings = block, shape, rows, lead, rings
        self.channels, self.loaders = channels, loaders
        self.content, self.written, self.reads = {}, {}, {}
        self.stored, self.used = Counter(), Counter()

    def _parts(self, ring, slot, channel=None, loader=None):
        for k in range(self.channels) if channel is None else (channel,):
            for m in range(self.loaders) if loader is None else (loader,):
                yield ring, slot, k, m

    def _write(self, part, content):
        assert all(self.block.knows(*at) for at in self.reads.pop(part, {}).items()), f"{part}: a reader is not done"
        assert self.block.knows(*self.written.get(part, self.block.now())), f"{part}: two writers at once"
        self.written[part], self.content[part] = self.block.now(), content

    def _read(self, part, content):
        assert self.content.get(part) == content, f"{part} holds {self.content.get(part)} instead of {content}"
        assert self.block.knows(*self.written[part]), f"{part}: its writer may not be done"
        warp, time = self.block.now()
        self.reads.setdefault(part, {})[warp] = time

    def _load(self, ring, item, j, slot, warp):
        for part in self._parts(ring, slot, loader=warp):
            self._write(part, ("input", item, j))

    def _read_window(self, item, j, slot, channel):
        """The input rows that set j reaches, where the kernel's address arithmetic looks for them."""
        p, h0, ring = self.shape.kh // 2, item.row0 + j * self.rows, self.rings["x"]
        # Row P + 1 below the last meets the kernel row that an odd kernel has not: a zero, which must meet a number.
        for h in range(max(0, h0 - p), min(self.shape.h, item.row1 + p + 1, h0 + self.rows + p + 1)):
            line = (slot + self.lead) * self.rows + h - h0
            assert 0 <= line < 2 * ring * self.rows
            at = (line - ring * self.rows if line >= ring * self.rows else line) // self.rows
            for part in self._parts("x", at, channel=channel):
                self._read(part, ("input", item, self.lead + (h - item.row0) // self.rows))

    def load(self, item, j, slot, warp):
        self._load("x", item, j, slot, warp)

    convolve = _read_window

    def finish(self, item, j, slot, channel):
        for part in self._parts("x", slot, channel=channel):
            self._write(part, ("output", item, j))

    def store(self, item, j, slot, warp):
        own = self.channels // self.cluster
        for channel in range(warp // self.storers * own, (warp // self.storers + 1) * own) if self.storers else (None,):
            for part in self._parts("x", slot, channel=channel):
                self._read(part, ("output", item, j))
        for h in range(item.row0 + j * self.rows, min(item.row1, item.row0 + (j + 1) * self.rows)):
            self.stored[warp, item.c0, item.n0, item.col0, h] += 1

    load_x = load

    def load_y(self, item, j, slot, warp):
        self._load("y", item, j, slot, warp)

    def accumulate(self, item, j, x_slot, y_slot, warp):
        self._read_window(item, j, x_slot, warp)
        for part in self._parts("y", y_slot, channel=warp):
            self._read(part, ("input", item, j))
        for h in range(item.row0 + j * self.rows, min(item.row1, item.row0 + (j + 1) * self.rows)):
            self.used[warp, item.c0, item.n0, item.col0, h] += 1

    def flush(self, part, warp):
        """Whoever sums in the rings of a block must be alone there, and loads come after it."""
        own = self.channels // self.cluster
        for ring, slot in ((ring, slot) for ring, slots in self.rings.items() for slot in range(slots)):
            for channel in range(warp // own * own, warp // own * own + own):
                for place in self._parts(ring, slot, channel=channel):
                    assert self.block.knows(*self.written.get(place, self.block.now())), f"{place}: still being written"
                    reads = self.reads.setdefault(place, {})
                    # Others may sum in their corners meanwhile: a part that they have taken holds nothing.
                    if self.content.pop(place, None) is not None:
                        assert all(self.block.knows(*at) for at in reads.items()), f"{place}: a reader is not done"
                    reads[warp] = self.block.now()[1]
