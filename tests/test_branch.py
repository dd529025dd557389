# SPDX-License-Identifier: LGPL-2.1-or-later
"""Branches: what bitmaps tell, what is done to them, and that no change is ever missing."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import stateful
from hypothesis import strategies as st

from virtbackup.qemu import block, branch, naming

SIZE = 1 << 20
ID = naming.BackupId("0123abcd")
KEY = naming.branch_key("b")
POINT = naming.Point(naming.BackupId("00000001"), 1700000000, SIZE)
NEXT = naming.next_bitmap(ID, 0, "b")
MARK = naming.mark_bitmap("b")
NOTE = naming.point_bitmap("b", POINT)
A, B, C = (naming.NodeName(name) for name in "ABC")


def bitmap(name: str, **fields: Any) -> block.Bitmap:
    usual = block.Bitmap(naming.BitmapName(name), 65536, 0, True, True, False, False)
    return dataclasses.replace(usual, **fields)


def medium(node: naming.NodeName, *bitmaps: block.Bitmap, **fields: Any) -> block.Medium:
    usual = block.Medium(node, "qcow2", f"/{node}", SIZE, False, bitmaps, True)
    return dataclasses.replace(usual, **fields)


def point(size: int = SIZE, branch: str = "b", disk: str | None = None) -> block.Bitmap:
    at = dataclasses.replace(POINT, size=size, disk=disk and naming.disk_key(disk))
    return bitmap(naming.point_bitmap(branch, at), recording=False)


OWN, BROKEN = bitmap("b", count=65536), bitmap("b", inconsistent=True, recording=False)
STILL = bitmap("b", count=131072, recording=False)
MARKED, POINTED = bitmap(MARK), point()
RECENT = bitmap(NEXT, count=65536)
BELOW = medium(A, OWN, POINTED, MARKED)

SOUND: list[tuple[str, list[block.Medium], int]] = [
    ("at rest", [medium(A, OWN, POINTED, MARKED)], 65536),
    ("without a mark", [medium(A, OWN, POINTED)], 65536),
    ("during a backup", [medium(A, STILL, POINTED, MARKED, RECENT)], 196608),
    ("other branches beside", [medium(A, OWN, POINTED, point(branch="c"), bitmap("c"))], 65536),
    ("a transient bitmap", [medium(A, bitmap("b", persistent=False), POINTED)], 0),
    ("the last bit beyond the end", [medium(A, bitmap("b", count=1 << 31), POINTED)], SIZE),
    ("through an overlay", [medium(B, OWN), medium(A, OWN, POINTED, MARKED)], 131072),
    ("through an overlay of libvirt's", [medium(B, OWN, MARKED), medium(A, OWN, POINTED)], 131072),
    ("through two", [medium(C, OWN), medium(B, OWN), medium(A, OWN, POINTED)], 196608),
    ("through an overlay with the point", [medium(B, OWN, POINTED, MARKED), BELOW], 131072),
    ("through an overlay with a note that records",
     [medium(B, OWN, bitmap(NOTE), MARKED), BELOW], 131072),
    ("through two with the point",
     [medium(C, OWN, POINTED), medium(B, OWN), medium(A, OWN, POINTED)], 196608),
    ("a new point over an old one", [medium(B, OWN, POINTED), medium(A, OWN, point(512))], 65536),
]  # fmt: skip


@pytest.mark.parametrize(("what", "chain", "dirty"), SOUND, ids=[case[0] for case in SOUND])
def test_sound(what: str, chain: list[block.Medium], dirty: int) -> None:
    line = branch.line("b", branch.Images(tuple(chain)), SIZE, "vda")
    assert (line.unsound, line.foreign, line.dirty) == (None, False, dirty)
    assert line.node == chain[0].node
    assert line.point == POINT


def test_sound_by_its_name() -> None:
    at = dataclasses.replace(POINT, disk=naming.disk_key("vda"))
    line = branch.line("b", branch.Images((medium(A, OWN, point(disk="vda")),)), SIZE, "vda")
    assert (line.unsound, line.point) == (None, at)


NO_GOOD = "it has no good backup of this branch yet"
INCONSISTENT = "its bitmap 'b' is inconsistent: QEMU did not come to store it"
STANDS_STILL = "its bitmap 'b' does not record"
RESIZED = f"it was resized from 512 to {SIZE} bytes"
OTHERWISE = "at its last good backup it was called otherwise"
REPLACED = "its bitmap 'b' was made by somebody else meanwhile"
REPAIRED = "its bitmap 'b' was made after QEMU did not come to store another"
OVERLAY = "an overlay was put over the image 'A' that has its bitmap"

UNSOUND: list[tuple[str, list[block.Medium], str]] = [
    ("nothing", [medium(A)], NO_GOOD),
    ("others", [medium(A, bitmap("c"), point(branch="c"))], NO_GOOD),
    ("the first backup runs", [medium(A, RECENT)], NO_GOOD),
    ("removed", [medium(A, POINTED, MARKED)], "its bitmap 'b' was removed"),
    ("inconsistent", [medium(A, BROKEN, POINTED, MARKED)], INCONSISTENT),
    ("inconsistent in the middle", [medium(A, BROKEN, POINTED, RECENT)], INCONSISTENT),
    ("killed after a good one", [medium(A, BROKEN, MARKED)], INCONSISTENT),
    ("repaired", [medium(A, OWN, dataclasses.replace(POINTED, inconsistent=True))], REPAIRED),
    ("repaired, marked", [medium(A, OWN, POINTED, bitmap(MARK, inconsistent=True))], REPAIRED),
    ("repaired below",
     [medium(B, OWN), medium(A, OWN, dataclasses.replace(POINTED, inconsistent=True))], REPAIRED),
    ("repaired above", [medium(B, OWN, bitmap(MARK, inconsistent=True)), BELOW], REPAIRED),
    ("point removed", [medium(A, OWN, MARKED)], "its last good backup is not known any more"),
    ("not recording", [medium(A, STILL, POINTED, MARKED)], STANDS_STILL),
    ("nor next", [medium(A, STILL, POINTED, bitmap(NEXT, recording=False))], STANDS_STILL),
    ("next broken", [medium(A, STILL, POINTED, bitmap(NEXT, inconsistent=True))], STANDS_STILL),
    ("replaced in the middle", [medium(A, OWN, POINTED, MARKED, RECENT)], REPLACED),
    ("replaced in the middle, over an overlay", [medium(B, OWN, RECENT), BELOW], REPLACED),
    ("replaced in the middle, point removed", [medium(A, OWN, MARKED, RECENT)], REPLACED),
    ("next of another branch",
     [medium(A, STILL, POINTED, bitmap(naming.next_bitmap(ID, 0, "c")))], STANDS_STILL),
    ("resized", [medium(A, OWN, point(512), MARKED)], RESIZED),
    ("called otherwise", [medium(A, OWN, point(disk="vdb"), MARKED)], OTHERWISE),
    ("called otherwise through an overlay", [medium(B, OWN), medium(A, OWN, point(disk="vdb"))],
     OTHERWISE),
    ("another disk, of another size", [medium(A, OWN, point(512, disk="vdb"))], OTHERWISE),
    ("overlay", [medium(B), BELOW], OVERLAY),
    ("overlay with another bitmap", [medium(B, bitmap("c")), BELOW], OVERLAY),
    ("overlay with the point alone", [medium(B, POINTED), BELOW], "its bitmap 'b' was removed"),
    ("a note that records", [medium(A, OWN, bitmap(NOTE), MARKED)],
     "its last good backup is not known any more"),
    ("still below an overlay with the point", [medium(B, OWN, POINTED), medium(A, STILL, POINTED)],
     STANDS_STILL),
    ("one overlay of two without", [medium(C, OWN), medium(B), BELOW],
     "a backing image above 'A' has no bitmap 'b'"),
    ("removed below", [medium(B, OWN), medium(A, POINTED)],
     "a backing image above 'A' has no bitmap 'b'"),
    ("still below", [medium(B, OWN), medium(A, STILL, POINTED)], STANDS_STILL),
    ("still below, next beside it", [medium(B, OWN), medium(A, STILL, POINTED, RECENT)],
     STANDS_STILL),
    ("still above", [medium(B, STILL), BELOW], STANDS_STILL),
    ("broken above", [medium(B, BROKEN), BELOW], INCONSISTENT),
    ("broken below", [medium(B, OWN), medium(A, BROKEN, POINTED)], INCONSISTENT),
    ("granularities", [medium(B, bitmap("b", granularity=512)), BELOW],
     "its bitmaps on backing images have another granularity"),
    ("resized and back again", [medium(C, OWN), medium(B, OWN, size=512), BELOW],
     "its backing image 'B' is of 512 bytes: it was resized in between"),
    ("resized through an overlay", [medium(B, OWN), medium(A, OWN, point(512))], RESIZED),
]  # fmt: skip


@pytest.mark.parametrize(("what", "chain", "reason"), UNSOUND, ids=[case[0] for case in UNSOUND])
def test_unsound(what: str, chain: list[block.Medium], reason: str) -> None:
    line = branch.line("b", branch.Images(tuple(chain)), SIZE, "vda")
    assert (line.unsound, line.foreign, line.dirty) == (reason, False, None)


@pytest.mark.parametrize("theirs", [OWN, STILL, BROKEN])
@pytest.mark.parametrize("beside", [(), (point(branch="c"),), (bitmap("virtbackup-mine"),)])
def test_foreign(theirs: block.Bitmap, beside: tuple[block.Bitmap, ...]) -> None:
    line = branch.line("b", branch.Images((medium(A, theirs, *beside),)), SIZE, "vda")
    assert line.foreign
    assert line.unsound == "its bitmap 'b' is not a branch's"


def test_names_of_branches_and_of_others() -> None:
    top = medium(B, bitmap("virtbackup-mine"), bitmap("virtbackup-point-x"), RECENT, OWN)
    disk = branch.Images((top, medium(A, OWN, POINTED, MARKED, bitmap("a"))))
    assert branch.names([disk]) == ["a", "b", "virtbackup-mine", "virtbackup-point-x"]


# --- which images a disk has ----------------------------------------------------------------------


def vertices(*pairs: tuple[str, str, str]) -> block.Graph:
    """A graph of (node, role, the node below it as that)."""
    roles = {(naming.NodeName(a), role): naming.NodeName(b) for a, role, b in pairs}
    return block.Graph({}, roles)


@pytest.mark.parametrize(
    ("root", "filters", "graph", "expected"),
    [
        ("B", {}, [("B", "backing", "A"), ("B", "file", "fb"), ("A", "file", "fa")], "BA"),
        ("A", {}, [("A", "file", "fa")], "A"),
        ("t", {"t": "throttle"}, [("t", "file", "A")], "A"),
        ("r", {"r": "copy-on-read", "t": "throttle"}, [("r", "file", "t"), ("t", "file", "A")],
         "A"),
        ("f", {"f": "copy-before-write"}, [("f", "file", "B"), ("B", "backing", "A")], "BA"),
        ("f", {"f": "backup-top"}, [("f", "backing", "A")], "A"),
        ("#i", {}, [("#i", "backing", "A")], "A"),
        ("#i", {}, [("#i", "file", "A")], "A"),
        ("B", {"t": "throttle"}, [("B", "backing", "t"), ("t", "file", "A")], "BA"),
        ("d", {"d": "blkdebug"}, [("d", "image", "B"), ("B", "backing", "A")], "BA"),
        ("v", {"v": "blkverify"}, [("v", "test", "A"), ("v", "raw", "B")], "B"),
        ("B", {"d": "blkdebug"}, [("B", "backing", "d"), ("d", "image", "A")], "BA"),
        ("gone", {}, [], None),
    ],
)  # fmt: skip
def test_images(
    root: str, filters: dict[str, str], graph: list[tuple[str, str, str]], expected: str | None
) -> None:
    nodes = {node: medium(node) for node in (A, B)}
    nodes |= {
        naming.NodeName(name): medium(naming.NodeName(name), driver=driver)
        for name, driver in filters.items()
    }
    found = branch.images(naming.NodeName(root), nodes, vertices(*graph))
    assert (found and [m.node for m in found.chain]) == (list(expected) if expected else None)


# --- what is done ---------------------------------------------------------------------------------


def step_of(*chain: block.Medium) -> branch.Step:
    line = branch.line("b", branch.Images(chain), SIZE, "vda")
    return branch.step("b", line, NEXT, 65536)


def told(actions: Sequence[dict[str, Any]]) -> list[str]:
    """Actions in few words."""
    return [" ".join(_words(action["type"], action["data"])) for action in actions]


def _words(type: str, data: dict[str, Any]) -> list[str]:
    name = data.get("name", data.get("target"))
    sources = [f"{source['node']}/{source['name']}" for source in data.get("bitmaps", ())]
    return [type.removeprefix("block-dirty-bitmap-"), f"{data['node']}/{name}", *sources]


def test_a_first_backup_begins_next_and_nothing_else() -> None:
    step = step_of(medium(A))
    assert told(step.before()) == [f"add A/{NEXT}"]
    assert step.before()[0]["data"] == {
        "node": A, "name": NEXT, "granularity": 65536, "persistent": True, "disabled": False,
    }  # fmt: skip
    assert step.after() == []


def test_the_next_one_lets_the_branchs_stand_still_after_the_instant() -> None:
    step = step_of(medium(A, OWN, POINTED, MARKED))
    assert told(step.before()) == [f"add A/{NEXT}"]
    assert told(step.after()) == ["disable A/b"]


@pytest.mark.parametrize(
    ("bitmaps", "removed"),
    [
        ([BROKEN, POINTED, MARKED], ["b", NOTE, MARK]),
        ([BROKEN, MARKED], ["b", MARK]),
        ([POINTED], [NOTE]),
        ([STILL, POINTED, MARKED], ["b", NOTE, MARK]),
    ],
)
def test_what_is_of_no_use_goes_with_the_start(
    bitmaps: list[block.Bitmap], removed: list[str]
) -> None:
    step = step_of(medium(A, *bitmaps))
    assert told(step.before()) == [f"add A/{NEXT}"]
    assert told(step.after()) == [f"remove A/{name}" for name in removed]


def test_what_backing_images_know_is_joined_and_the_overlay_marked() -> None:
    step = step_of(medium(C, OWN), medium(B, OWN), BELOW)
    before = [f"add C/{NEXT}", f"add C/{MARK}", "merge C/b B/b", "merge C/b A/b"]
    assert told(step.before()) == before
    assert told(step.after()) == ["disable C/b"]


NOW = naming.Point(ID, 1700000001, SIZE)
NOTE_NOW = naming.point_bitmap("b", NOW)


@pytest.mark.parametrize(
    ("bitmaps", "keeps", "expected"),
    [
        ([STILL, POINTED, MARKED, RECENT], True,
         ["clear A/b", "enable A/b", f"merge A/b A/{NEXT}", f"remove A/{NOTE}",
          f"add A/{NOTE_NOW}"]),
        ([RECENT], False,
         ["add A/b", f"add A/{MARK}", f"merge A/b A/{NEXT}", f"add A/{NOTE_NOW}"]),
    ],
)  # fmt: skip
def test_a_good_end(bitmaps: list[block.Bitmap], keeps: bool, expected: list[str]) -> None:
    disk = medium(A, *bitmaps)
    assert branch.trouble("b", keeps, disk, RECENT) is None
    assert told(branch.set_point("b", keeps, disk, RECENT, NOW)) == expected
    assert told(branch.remove(disk, RECENT)) == [f"remove A/{NEXT}"]


@pytest.mark.parametrize(
    ("disk", "keeps", "next", "reason"),
    [
        (medium(A, STILL, readonly=True), True, RECENT, "an overlay was put over its image 'A'"),
        (medium(A, STILL), True, bitmap(NEXT, recording=False), f"its bitmap '{NEXT}' does not"),
        (medium(A, STILL), True, bitmap(NEXT, inconsistent=True), f"its bitmap '{NEXT}' does not"),
        (medium(A), True, RECENT, "its bitmap 'b' was removed"),
        (medium(A, OWN), True, RECENT, "its bitmap 'b' was made by somebody else meanwhile"),
        (medium(A, OWN), False, RECENT, "its bitmap 'b' was made by somebody else meanwhile"),
        (medium(A, STILL), False, RECENT, "its bitmap 'b' was made by somebody else meanwhile"),
    ],
)
def test_a_good_end_that_cannot_be(
    disk: block.Medium, keeps: bool, next: block.Bitmap, reason: str
) -> None:
    assert str(branch.trouble("b", keeps, disk, next)).startswith(reason)


GONE = f"remove A/{NEXT}"
JOIN = ["disable A/b", "enable A/b", f"merge A/b A/{NEXT}"]


@pytest.mark.parametrize(
    ("bitmaps", "next", "expected"),
    [
        ([STILL, POINTED, MARKED], RECENT, [*JOIN, GONE]),
        ([STILL, MARKED], RECENT, [*JOIN, GONE]),
        ([], RECENT, [GONE]),
        ([POINTED, MARKED], RECENT, [GONE]),
        ([BROKEN, POINTED], RECENT, [GONE]),
        ([OWN], RECENT, [GONE]),
        ([STILL], RECENT, [GONE]),
        ([OWN, POINTED, MARKED], RECENT, [GONE, f"remove A/{NOTE}"]),
        ([STILL, POINTED, MARKED], bitmap(NEXT, recording=False), [GONE]),
        ([STILL, POINTED, MARKED], bitmap(NEXT, inconsistent=True), [GONE]),
    ],
)
def test_any_other_end(
    bitmaps: list[block.Bitmap], next: block.Bitmap, expected: list[str]
) -> None:
    assert told(branch.roll_back(medium(A, *bitmaps, next), next)) == expected


def test_a_point_that_nobody_was_told_of() -> None:
    disk = medium(A, OWN, POINTED, MARKED, point(branch="c"))
    assert told(branch.disown(disk, ID)) == []
    other = naming.point_bitmap("c", POINT)
    assert told(branch.disown(disk, POINT.backup)) == [f"remove A/{NOTE}", f"remove A/{other}"]


@pytest.mark.parametrize("time", [-(10**11), -1, 0, 1, 1 << 31, 1 << 32, 253402300799])
def test_a_point_of_whatever_time_is_read_back(time: int) -> None:
    """Clocks may be wrong."""
    at = dataclasses.replace(POINT, time=time)
    assert naming.point_of(naming.point_bitmap("b", at)) == (KEY, at)


@pytest.mark.parametrize(
    "name", ["n" * 1023, "ä" * 511, "a b:c", "virtbackup", "-next-", "🌙", "\ud800"]
)
def test_names_of_any_length_make_names_that_qemu_takes(name: str) -> None:
    at = naming.Point(ID, 10**11, (1 << 63) - 512, naming.disk_key(name))
    made = [
        naming.next_bitmap(ID, 9999, name),
        naming.point_bitmap(name, at),
        naming.mark_bitmap(name),
    ]
    key = naming.branch_key(name)
    assert naming.next_of(made[0]) == (ID, key)
    assert naming.point_of(made[1]) == (key, at)
    assert naming.mark_of(made[2]) == key
    for one in made:
        assert len(one) < 1023
        assert naming.is_own_bitmap(one)
    assert [naming.backup_of(one) for one in made] == [ID, None, None]
    assert not naming.is_own_bitmap(name)
    guard = naming.guard_bitmap(ID, 9999)
    assert naming.is_guard(guard)
    assert naming.is_own_bitmap(guard)
    assert not any(naming.is_guard(one) for one in (*made, name))


# --- no change is ever missing --------------------------------------------------------------------


@dataclasses.dataclass
class Kept:
    """A bitmap as QEMU keeps it: the clusters that it knows to have changed."""

    dirty: set[int] = dataclasses.field(default_factory=set)
    records: bool = True
    inconsistent: bool = False


class Refused(Exception):
    """QEMU's word."""


class Qemu:
    """The bitmaps of one image, in a QEMU that runs the disk in an iothread: the guest may write
    between any two actions of a transaction."""

    def __init__(self) -> None:
        self.bitmaps: dict[str, Kept] = {}
        self.loaded: set[str] = set()
        """The bitmaps in the image, as it was opened with them."""
        self.since: dict[str, set[int]] = {}
        """A backup -> what has changed since its instant: the truth."""

    def medium(self) -> block.Medium:
        return medium(
            A,
            *(
                bitmap(name, count=len(kept.dirty), recording=kept.records,
                       inconsistent=kept.inconsistent)
                for name, kept in self.bitmaps.items()
            ),
        )  # fmt: skip

    def write(self, cluster: int) -> None:
        for kept in self.bitmaps.values():
            if kept.records:
                kept.dirty.add(cluster)
        for changed in self.since.values():
            changed.add(cluster)

    def transaction(
        self, actions: Sequence[dict[str, Any]], writes: Iterator[int | None], fails: int | None
    ) -> None:
        """Do ACTIONS, with WRITES in between; where number FAILS is refused, undo all of it."""
        undo: dict[str, Kept | None] = {}
        removed = []
        try:
            for number, action in enumerate(actions):
                if (cluster := next(writes, None)) is not None:
                    self.write(cluster)
                if number == fails:
                    raise Refused(action)
                data = action["data"]
                name = data.get("name", data.get("target", ""))
                verb = action["type"].removeprefix("block-dirty-bitmap-")
                if verb == "remove":
                    self._usable(name, even_broken=True)
                    removed.append(name)
                    continue
                was = self.bitmaps.get(name)
                undo.setdefault(name, was and dataclasses.replace(was, dirty={*was.dirty}))
                self._change(verb, name, data)
        except Refused:
            self.bitmaps |= {name: kept for name, kept in undo.items() if kept is not None}
            for name in (name for name, kept in undo.items() if kept is None):
                self.bitmaps.pop(name, None)
            raise
        for name in removed:
            del self.bitmaps[name]
            self.loaded.discard(name)

    def _usable(self, name: str, even_broken: bool = False) -> Kept:
        if name not in self.bitmaps or (self.bitmaps[name].inconsistent and not even_broken):
            raise Refused(name)
        return self.bitmaps[name]

    def _change(self, verb: str, name: str, data: dict[str, Any]) -> None:
        if verb == "blockdev-backup":
            self.since[data["job-id"]] = set()
        elif verb == "add":
            if name in self.bitmaps:
                raise Refused(name)
            self.bitmaps[name] = Kept(records=not data["disabled"])
        elif verb == "merge":
            [source] = data["bitmaps"]
            self._usable(name).dirty |= self._usable(source["name"]).dirty
        elif verb == "clear":
            self._usable(name).dirty.clear()
        else:
            assert verb in ("enable", "disable")
            self._usable(name).records = verb == "enable"

    def quit_and_start(self) -> None:
        self.loaded = set(self.bitmaps)

    def be_killed_and_start(self) -> None:
        """What was not in the image has never been, and of what was only the name is known."""
        self.bitmaps = {name: Kept(set(), False, True) for name in self.loaded}


WRITES = st.lists(st.none() | st.integers(0, 7), max_size=12)
FAILS = st.none() | st.integers(0, 8)


class Lives(stateful.RuleBasedStateMachine):
    """Backups of a branch, ended in all ways, on a QEMU that is ended in all ways, while the guest
    writes and others have a hand in the bitmaps."""

    def __init__(self) -> None:
        super().__init__()
        self.qemu = Qemu()
        self.step: branch.Step | None = None
        self.id = 0
        self.touched = False
        """Somebody else made or replaced a bitmap of the branch's name."""

    @property
    def backup(self) -> naming.BackupId:
        return naming.BackupId(f"{self.id:08x}")

    def line(self) -> branch.Line:
        return branch.line("b", branch.Images((self.qemu.medium(),)), SIZE, "vda")

    @stateful.rule(cluster=st.integers(0, 7))
    def write(self, cluster: int) -> None:
        self.qemu.write(cluster)

    @stateful.precondition(lambda self: self.step is None)
    @stateful.rule(writes=WRITES, fails=FAILS)
    def start(self, writes: list[int | None], fails: int | None) -> None:
        line = self.line()
        if line.foreign:
            assert self.touched
            return
        self.id += 1
        step = branch.step("b", line, naming.next_bitmap(self.backup, 0, "b"), 65536)
        job = {"type": "blockdev-backup", "data": {"job-id": self.backup}}
        with contextlib.suppress(Refused):
            self.qemu.transaction([*step.before(), job, *step.after()], iter(writes), fails)
            self.step = step
            if not step.keeps:
                self.touched = False

    @stateful.precondition(lambda self: self.step is not None)
    @stateful.rule(writes=WRITES, fails=FAILS)
    def good_end(self, writes: list[int | None], fails: int | None) -> None:
        assert self.step is not None
        disk = self.qemu.medium()
        next = disk.bitmap(self.step.next)
        if next is not None and not branch.trouble("b", self.step.keeps, disk, next):
            at = naming.Point(self.backup, 1, SIZE)
            actions = [
                *branch.set_point("b", self.step.keeps, disk, next, at),
                *branch.remove(disk, next),
            ]
            with contextlib.suppress(Refused):
                self.qemu.transaction(actions, iter(writes), fails)
                line = self.line()
                assert (line.point, line.unsound) == (at, None)
        self.other_end(writes, None)

    @stateful.precondition(lambda self: self.step is not None)
    @stateful.rule(writes=WRITES, fails=FAILS)
    def other_end(self, writes: list[int | None], fails: int | None) -> None:
        disk = self.qemu.medium()
        next = branch.next_of(disk, KEY)
        if next is not None:
            with contextlib.suppress(Refused):
                self.qemu.transaction(branch.roll_back(disk, next), iter(writes), fails)
        if branch.next_of(self.qemu.medium(), KEY) is None:
            self.step = None

    @stateful.rule()
    def forget_the_point(self) -> None:
        actions = branch.disown(self.qemu.medium(), self.backup)
        self.qemu.transaction(actions, iter(()), None)

    @stateful.rule()
    def quit(self) -> None:
        self.qemu.quit_and_start()

    @stateful.rule()
    def killed(self) -> None:
        self.qemu.be_killed_and_start()
        assert self.line().unsound is not None

    @stateful.rule(what=st.sampled_from(["b", "next", "point", "mark"]), removed=st.booleans())
    def somebody_has_a_hand_in_it(self, what: str, removed: bool) -> None:
        line = self.line()
        name = {
            "b": "b",
            "next": line.next.name if line.next else "",
            "point": naming.point_bitmap("b", line.point) if line.point else "",
            "mark": MARK,
        }[what]
        if name not in self.qemu.bitmaps or (what == "mark" and line.point is None):
            return
        own = self.qemu.bitmaps.get("b")
        if removed and what == "next" and own is not None and own.records:
            return  # two removed, one made: it looks as between backups, and nobody can tell
        if removed:
            del self.qemu.bitmaps[name]
            self.qemu.loaded.discard(name)
        else:
            self.qemu.bitmaps[name].records = False
        # Without point and mark, the branch's bitmap is anybody's.
        self.touched |= removed and what in ("point", "mark")

    @stateful.precondition(
        lambda self: "b" not in self.qemu.bitmaps and self.line().next is not None
    )
    @stateful.rule()
    def somebody_makes_one_in_the_middle(self) -> None:
        self.qemu.bitmaps["b"] = Kept()
        self.touched = True

    @stateful.invariant()
    def no_change_is_missing(self) -> None:
        line = self.line()
        if line.foreign:
            assert self.touched
        if line.unsound is not None:
            return
        assert line.point is not None
        known = self.qemu.bitmaps["b"].dirty | (
            self.qemu.bitmaps[line.next.name].dirty if line.next else set()
        )
        assert self.qemu.since[line.point.backup] <= known


TestLives = Lives.TestCase
