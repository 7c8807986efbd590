"""Plans of attention that are kept, so that a step of a known shape allocates nothing."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from .cuda_plan import AttendPlan

if TYPE_CHECKING:
    from .cuda import CudaBackend

# Step shapes whose buffers are kept; a serving engine decodes with a few batch sizes.
_KEPT = 16


class KeptPlans:
    """The plans of a backend's last step shapes."""

    def __init__(self) -> None:
        self._plans: OrderedDict[tuple[int, ...], AttendPlan] = OrderedDict()

    def __len__(self) -> int:
        return len(self._plans)

    def of_shape(
        self,
        backend: CudaBackend,
        batch: int,
        tokens: int,
        blocks: int,
        chunk: int,
        overlay: bool,
    ) -> AttendPlan:
        """Return a plan of this shape; tables are padded so that growing rarely needs a new one.

        Layers with and without the exact window read different ranges of one step.
        """
        room = 1 << max(3, (blocks - 1).bit_length())
        key = (batch, tokens, room, chunk, int(overlay))
        plan = self._plans.pop(key, None)
        if plan is None:
            plan = AttendPlan(backend, batch, tokens, room, chunk)
        self._plans[key] = plan
        while len(self._plans) > _KEPT:
            self._plans.popitem(last=False)
        return plan
