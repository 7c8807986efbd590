"""A block manager of lists and dicts that does what `BlockManager` promises, page by page."""

from __future__ import annotations


class StalePages(Exception):
    """A page that was found holds its block no longer."""


class SharedPage(Exception):
    """The page that would be written on has another owner."""


class Held:
    """What a request holds: its pages, the positions there is room for, and what was published.

    ``hidden`` says whether some positions are not read, ``taint`` from where on tokens were
    computed without some (None without any).
    """

    def __init__(self, pages: list[int], room: int) -> None:
        self.pages, self.room, self.published = pages, room, len(pages)
        self.hidden, self.taint = False, None


class NaiveManager:
    """The model; every id it returns is literal."""

    def __init__(self, num_pages: int, size: int, caching: bool, longest: int, watermark: int):
        self.size, self.caching, self.longest, self.watermark = size, caching, longest, watermark
        self.free = list(range(1, num_pages))
        self.owners = [0] * num_pages
        self.key_of: dict[int, bytes] = {}
        #: Pages of each key, the first published one first.
        self.pages_of: dict[bytes, list[int]] = {}
        self.held: dict[str, Held] = {}

    def blocks(self, length: int) -> int:
        return -(-length // self.size)

    def find(self, request) -> list[int]:
        found: list[int] = []
        if not self.caching or request.skip_reading_prefix_cache:
            return found
        for key in request.block_hashes[: (request.num_tokens - 1) // self.size]:
            if key not in self.pages_of:
                break
            found.append(self.pages_of[key][0])
        return found

    def allocate(
        self, request, new, found, *, lookahead, external, delay, whole, reserved, beside
    ) -> list[int] | None:
        held = self.held.get(request.request_id)
        reach = request.num_computed_tokens + len(found) * self.size + external + new
        room = min(reach + lookahead, self.longest)
        have = len(found) if held is None else self.blocks(held.room)
        extra = sum(self.owners[page] == 0 for page in found)
        if held is None and beside:
            extra += self.watermark
        need = max(self.blocks(room) - have, 0) + extra
        if need > len(self.free) - reserved:
            return None
        length = min(request.num_tokens, self.longest)
        if whole and max(self.blocks(length) - have, 0) + extra > len(self.free):
            return None
        if held is not None and room > held.room and self.owners_of_open_page(held) > 1:
            raise SharedPage
        if held is None:
            for page, key in zip(found, request.block_hashes, strict=False):
                if self.key_of.get(page) != key:
                    raise StalePages
            for page in found:
                self.owners[page] += 1
                if self.owners[page] == 1:
                    self.free.remove(page)
            held = self.held[request.request_id] = Held(list(found), len(found) * self.size)
        taken = self.grow(held, room)
        if not delay:
            self.publish(request, min(reach, room))
        return taken

    def owners_of_open_page(self, held: Held) -> int:
        """Owners of the page that the next position goes to, if something is in it already."""
        return self.owners[held.pages[held.room // self.size]] if held.room % self.size else 0

    def grow(self, held: Held, room: int) -> list[int]:
        if room > held.room and held.room % self.size:
            # It will hold other tokens than its block says.
            self.forget(held.pages[held.room // self.size])
        taken = [self.take() for _ in range(self.blocks(room) - self.blocks(held.room))]
        held.pages += taken
        held.room = max(held.room, room)
        return taken

    def take(self) -> int:
        page = self.free.pop(0)
        self.owners[page] = 1
        self.forget(page)
        return page

    def publish(self, request, upto: int) -> None:
        held = self.held[request.request_id]
        stop = min(upto, request.num_tokens) // self.size
        if not self.caching or stop <= held.published:
            return
        for block in range(held.published, stop):
            if held.taint is not None and (block + 1) * self.size > held.taint:
                break
            key, page = request.block_hashes[block], held.pages[block]
            self.key_of[page] = key
            self.pages_of.setdefault(key, []).append(page)
        held.published = stop

    def hide(self, request, hidden: bool) -> None:
        """Let some of a request's positions be read no longer, or all again."""
        held = self.held[request.request_id]
        held.hidden = hidden
        if hidden and held.taint is None:
            held.taint = held.room

    def truncate(self, request, length: int) -> list[int]:
        """Cut a request; return the pages that nobody owns now."""
        held = self.held[request.request_id]
        keep = self.blocks(length)
        freed = self.drop(held.pages[keep:])
        del held.pages[keep:]
        held.room, held.published = length, min(held.published, length // self.size)
        # Nothing is hidden of nothing: what is read begins at or before the end.
        held.hidden = held.hidden and length > 0
        if held.taint is not None:
            cleared = length <= held.taint and not held.hidden
            held.taint = None if cleared else min(held.taint, length)
        return freed

    def release(self, request) -> list[int]:
        """Free a request; return the pages that nobody owns now."""
        return self.drop(self.held.pop(request.request_id, Held([], 0)).pages)

    def drop(self, pages: list[int]) -> list[int]:
        freed = []
        for page in reversed(pages):
            self.owners[page] -= 1
            if not self.owners[page]:
                freed.append(page)
        self.free += freed
        return freed

    def forget(self, page: int) -> None:
        key = self.key_of.pop(page, None)
        if key is not None:
            self.pages_of[key].remove(page)
            if not self.pages_of[key]:
                del self.pages_of[key]

    def reset(self) -> bool:
        if any(self.owners):
            return False
        self.key_of.clear()
        self.pages_of.clear()
        return True
