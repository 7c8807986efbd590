"""The scheduler's rules once more: one sequence, one page, one key at a time, nothing vectorised.

Swaps are modelled for sequences that share no page: then only numbers of pages matter.

Pages are objects in Python lists; a block's key is the tuple of all tokens up to its end. It shares
no code with the scheduler, the page tables or the prefix index.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.serving.paged_engine import next_token


@dataclass(eq=False)
class Page:
    key: tuple | None = None
    owners: int = 0


@dataclass(eq=False)
class Sequence:
    request: object
    number: int
    place: tuple
    track: int
    tokens: list
    generated: int = 0
    stored: int = 0
    named: int = 0
    published: int = 0
    on_host: int = 0
    pages: list = field(default_factory=list)

    @property
    def width(self):
        return self.request.num_samples if self.track < 0 else 1


class NaiveScheduler:
    def __init__(self, num_pages, size, sharing, options, host=0):
        self.host = host
        self.free = [Page() for _ in range(num_pages)]
        self.total, self.size, self.sharing, self.options = num_pages, size, sharing, options
        self.index = {}
        self.waiting, self.prefills, self.decoding = [], [], []
        self.added, self.found, self.num_stuck = 0, {}, 0

    # -- pages --

    def take(self, seq, count):
        for _ in range(count):
            page = self.free.pop(0)
            if page.key is not None:
                self.index[page.key].remove(page)
            page.key, page.owners = None, 1
            seq.pages.append(page)

    def drop(self, seq):
        for page in reversed(seq.pages):
            page.owners -= 1
            if page.owners == 0:
                self.free.append(page)
        seq.pages = []

    def key(self, seq, block):
        return seq.request.salt, tuple(seq.tokens[: (block + 1) * self.size])

    def lookup(self, seq):
        pages = []
        while self.sharing and (len(pages) + 1) * self.size < len(seq.tokens):
            copies = self.index.get(self.key(seq, len(pages)))
            if not copies:
                break
            pages.append(copies[0])
        return pages

    def publish(self, members):
        due = [s for s in members if self.sharing and s.stored // self.size > s.published]
        # Single new blocks are named together, before longer stretches.
        single = [s for s in due if s.published == s.named == s.stored // self.size - 1]
        for seq in single + [s for s in due if s not in single]:
            while seq.published < seq.stored // self.size:
                page = seq.pages[seq.published]
                if page.key is None:
                    page.key = self.key(seq, seq.published)
                    self.index.setdefault(page.key, []).append(page)
                seq.published += 1
            seq.named = max(seq.named, seq.published)

    def pages_for_next(self):
        need = sum(s.stored % self.size == 0 for s in self.decoding)
        writers = {}
        for seq in self.decoding:
            if seq.stored % self.size:
                writers[seq.pages[-1]] = writers.get(seq.pages[-1], 0) + 1
        return need + sum(min(n, page.owners - 1) for page, n in writers.items())

    # -- steps --

    def add(self, request):
        priority = request.priority if self.options.policy == "priority" else 0
        place = (priority, self.added, -1)
        self.waiting.append(Sequence(request, self.added, place, -1, list(request.prompt)))
        self.added += 1

    def preempt(self):
        victim = max(self.decoding + self.prefills, key=lambda s: s.place)
        swaps = self.options.preemption == "swap" and victim in self.decoding
        if victim in self.decoding:
            self.decoding.remove(victim)
        else:
            self.prefills.remove(victim)
        if swaps and len(victim.pages) <= self.host:
            victim.on_host = len(victim.pages)
            self.host -= victim.on_host
        else:
            victim.stored = victim.published = 0
        self.drop(victim)
        self.waiting.append(victim)
        return victim.request.request_id

    def stuck(self):
        if not self.prefills or not self.decoding or len(self.free) > self.pages_for_next():
            return False
        first = self.prefills[0]
        stuck = first.stored % self.size == 0
        stuck = stuck and max(s.place for s in self.decoding) > first.place
        # Not for want of a page that somebody decoding needs anyway.
        self.num_stuck += stuck and self.pages_for_next() <= len(self.free)
        return stuck

    def step(self):
        """Take a step; return what was preempted, who took part, and the free pages meanwhile."""
        preempted = []
        while self.pages_for_next() > len(self.free) or self.stuck():
            preempted.append(self.preempt())
        chunks = self.plan(not preempted)
        members = [(s, 1) for s in self.decoding] + chunks
        for seq, count in members:
            if seq.stored % self.size and seq.pages[-1].owners > 1:
                seq.pages.pop().owners -= 1
                self.take(seq, 1)
            seq.stored += count
            self.take(seq, -(-seq.stored // self.size) - len(seq.pages))
        names = [s.request.request_id for s, _ in members]
        told = [(s.request.request_id, n, s.stored == len(s.tokens)) for s, n in chunks]
        free = len(self.free)
        self.publish([s for s, _ in members])
        finished = []
        for seq in self.decoding:
            self.sample(seq, 0)
        self.retire(self.decoding, finished)
        started = []
        for seq, _ in chunks:
            if seq.stored == len(seq.tokens):
                self.prefills.remove(seq)
                started += self.fork(seq)
        self.decoding += started
        self.retire(started, finished)
        return preempted, names, told, free, sorted(finished)

    def sample(self, seq, sample):
        seq.tokens.append(next_token(seq.tokens, sample))
        seq.generated += 1

    def fork(self, seq):
        children = [seq]
        for track in range(1, seq.width):
            child = Sequence(seq.request, seq.number, seq.place, track, list(seq.tokens))
            child.stored, child.pages = seq.stored, list(seq.pages)
            child.named, child.published = seq.named, seq.published
            for page in child.pages:
                page.owners += 1
            children.append(child)
        for track, child in enumerate(children):
            child.track = max(child.track, 0)
            child.place = (*child.place[:2], child.track)
            self.sample(child, track)
        return children

    def retire(self, among, finished):
        for seq in list(among):
            request = seq.request
            stop = seq.generated >= request.min_tokens and seq.tokens[-1] in request.stop_token_ids
            if stop or seq.generated == request.max_tokens:
                self.drop(seq)
                self.decoding.remove(seq)
                finished.append((request.request_id, seq.track, seq.generated))

    def plan(self, admit):
        free = len(self.free) - self.pages_for_next()
        tokens = self.options.step_tokens - len(self.decoding)
        chunks = []
        while tokens > 0:
            at = len(chunks)
            if at == len(self.prefills):
                head = min(self.waiting, key=lambda s: s.place, default=None)
                if admit and head is not None and head.on_host:
                    taken = self.swap_in(head, free)
                    if taken is None:
                        break
                    free -= taken
                    tokens -= 1
                    continue
                revived = self.admit(tokens, free) if admit else None
                if revived is None:
                    break
                free -= revived
            seq = self.prefills[at]
            room = -seq.stored % self.size + free * self.size
            count = min(len(seq.tokens) - seq.stored, tokens, room)
            if count <= 0:
                break
            chunks.append((seq, count))
            tokens -= count
            free -= -(-(seq.stored + count) // self.size) - -(-seq.stored // self.size)
            if seq.stored + count < len(seq.tokens):
                break
        return chunks

    def running(self):
        return len(self.decoding) + sum(s.width for s in self.prefills)

    def swap_in(self, seq, free):
        running, most = self.running(), min(self.options.max_running, self.options.step_tokens)
        following = int(seq.stored % self.size == 0)
        reserve = int(self.options.watermark * self.total) if running else 0
        if running >= most or seq.on_host + following + reserve > free:
            return None
        self.waiting.remove(seq)
        self.take(seq, seq.on_host)
        taken = seq.on_host + following
        self.host += seq.on_host
        seq.on_host = 0
        self.decoding.append(seq)
        return taken

    def admit(self, tokens, free):
        if not self.waiting:
            return None
        seq = min(self.waiting, key=lambda s: s.place)
        running = self.running()
        most = min(self.options.max_running, self.options.step_tokens)
        if running + seq.width > most:
            return None
        pages = self.lookup(seq)
        found = len(pages) * self.size
        must_fit = len(seq.tokens)
        if self.options.admission == "chunk":
            must_fit = min(must_fit, found + tokens)
        revived = sum(page.owners == 0 for page in pages)
        need = -(-must_fit // self.size) - len(pages) + revived
        if running:
            need += int(self.options.watermark * self.total) + seq.width - 1
        if need > free:
            return None
        self.waiting.remove(seq)
        for page in pages:
            if page.owners == 0:
                self.free.remove(page)
            page.owners += 1
        seq.pages, seq.stored, seq.published = list(pages), found, len(pages)
        seq.named = len(seq.tokens) // self.size
        self.prefills.append(seq)
        self.found.setdefault(seq.request.request_id, found)
        return revived
