"""The simulator's rules once more: one request, one page, one step at a time, nothing vectorised.

It counts pages and window slots in integers and shares no code with the simulator but the cost
model's formula (called for single steps).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Running:
    request: int
    target: int
    done: int = 0
    decoding: bool = False


class NaiveSimulator:
    def __init__(self, workload, capacity, cost, options):
        self.w, self.capacity, self.cost, self.options = workload, capacity, cost, options
        self.size, self.pages = capacity.page_size, capacity.usable_pages
        self.generated = [0] * len(workload)
        self.first_token = [None] * len(workload)
        self.finish = [None] * len(workload)
        self.preemptions = [0] * len(workload)
        needed = [self.pages_of(int(n) - 1) for n in workload.final_tokens]
        self.rejected = [i for i, n in enumerate(needed) if n > self.pages]
        self.queue = [i for i in range(len(workload)) if i not in self.rejected]
        self.running: list[Running] = []
        self.clock = 0.0
        self.rows = []

    def pages_of(self, tokens):
        return -(-tokens // self.size)

    def free(self):
        return self.pages - sum(self.pages_of(r.done) for r in self.running)

    def decoders(self):
        return [r for r in self.running if r.decoding]

    def run(self):
        while self.queue or self.running:
            if not self.running:
                self.clock = max(self.clock, float(self.w.arrival[self.queue[0]]))
            self.step()
        return self

    def step(self):
        preempted = False
        while sum(r.done % self.size == 0 for r in self.decoders()) > self.free():
            victim = self.running.pop()
            self.queue.insert(0, victim.request)
            self.preemptions[victim.request] += 1
            preempted = True
        decoders = self.decoders()
        chunks = [] if preempted else self.prefill(decoders)
        waiting = bool(self.queue) and self.w.arrival[self.queue[0]] <= self.clock
        for r in decoders:
            r.done += 1
            self.generated[r.request] += 1
        prefixes = [(r.done, n) for r, n in chunks]
        for r, n in chunks:
            r.done += n
        limit = self.cost.exact_tokens
        read = sum(r.done for r in decoders) + sum(d for d, _ in prefixes)
        exact = sum(min(r.done, limit) for r in decoders) + sum(min(d, limit) for d, _ in prefixes)
        pairs = sum(r.done for r in decoders)
        pairs += sum(n * d + n * (n + 1) // 2 for d, n in prefixes)
        new = len(decoders) + sum(n for _, n in chunks)
        seconds = float(self.cost.step_seconds(*map(np.int64, (new, read, exact, pairs))))
        self.clock += seconds
        self.rows.append(
            (
                self.clock,
                seconds,
                len(self.running),
                sum(r.done for r in self.running),
                sum(self.pages_of(r.done) for r in self.running),
                sum(n for _, n in chunks),
                len(decoders),
                int(waiting),
            )
        )
        for r, _ in chunks:
            if r.done == r.target:
                r.decoding = True
                self.generated[r.request] += 1
                if self.first_token[r.request] is None:
                    self.first_token[r.request] = self.clock
        for r in list(self.running):
            if self.generated[r.request] == self.w.output_tokens[r.request] and r.decoding:
                self.running.remove(r)
                self.finish[r.request] = self.clock

    def prefill(self, decoders):
        free = self.free() - sum(r.done % self.size == 0 for r in decoders)
        tokens = self.options.step_tokens - len(decoders)
        chunks = []
        current = next((r for r in self.running if not r.decoding), None)
        while tokens > 0:
            if current is None:
                current = self.admit(tokens, free)
            if current is None:
                break
            slack = -current.done % self.size
            n = min(current.target - current.done, tokens, slack + free * self.size)
            if n <= 0:
                break
            chunks.append((current, n))
            free -= self.pages_of(current.done + n) - self.pages_of(current.done)
            tokens -= n
            if current.done + n < current.target:
                break
            current = None
        return chunks

    def admit(self, tokens, free):
        most = self.options.max_running
        if self.capacity.num_window_slots:
            most = min(most, self.capacity.num_window_slots)
        if not self.queue or len(self.running) >= most:
            return None
        request = self.queue[0]
        if self.w.arrival[request] > self.clock:
            return None
        target = int(self.w.prompt_tokens[request]) + self.generated[request]
        must = target if self.options.admission == "prompt" else min(target, tokens)
        reserve = int(self.options.watermark * self.pages) if self.running else 0
        if self.pages_of(must) + reserve > free:
            return None
        self.queue.pop(0)
        self.running.append(Running(request, target))
        return self.running[-1]
