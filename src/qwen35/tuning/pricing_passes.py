"""What the passes that price a model's weights are made of, in one process or in several."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from qwen35.array_types import I32
from qwen35.checkpoint.source import Checkpoint, Reader
from qwen35.forward.backward_stream import BackwardStream
from qwen35.forward.blocks import HEAD
from qwen35.forward.builder import Builder
from qwen35.forward.decoded_weights import StoredWeights
from qwen35.forward.stream_folder import StreamFolder
from qwen35.progress import Progress
from qwen35.tuning.prices import Prices
from qwen35.tuning.pricing import EMBEDDINGS, PriceVisitor
from qwen35.tuning.pricing_plan import PricingPlan, plan_pricing
from qwen35.tuning.space import ChoiceSpace

__all__ = ["SEED", "PricingPasses", "PricingSetting", "digest_of"]

SEED = 20_261_127
"""Of the tokens that are drawn: the same on every machine."""


@dataclass(frozen=True)
class PricingSetting:
    """How prices are measured.

    Args:
        windows: [windows, context] token ids.
        device: for torch.
        threads: most threads.
        sample: every how many rows candidates are compared.
        memory: limit in bytes; None for none.
        restart: discard the work of an interrupted run of another command.
        shares: workers of this machine that windows are shared out to, and memory with them.
    """

    windows: I32
    device: str
    threads: int
    sample: int
    memory: int | None
    restart: bool
    shares: int = 1

    def plan(self, checkpoint: Checkpoint) -> PricingPlan:
        """Plan both passes; errors as for `plan_pricing`."""
        count, context = self.windows.shape
        return plan_pricing(
            checkpoint,
            context=context,
            windows=count,
            memory=self.memory,
            shares=self.shares,
            threads=self.threads,
        )


class PricingPasses:
    """Both passes, and what takes their gradients.

    Args:
        torch: the library.
        plan: of the passes.
        space: the choices.
        setting: how they are measured.
        work: the folder of states and prices.
        reader: of the checkpoint.
        progress: receives bytes.

    Attributes:
        builder: of the model's modules.
        stream: the passes.
        visitor: what leaves prices in the folder.
    """

    def __init__(
        self,
        torch: Any,
        plan: PricingPlan,
        space: ChoiceSpace,
        setting: PricingSetting,
        work: StreamFolder,
        reader: Reader,
        progress: Progress,
    ) -> None:
        self.plan, self.space, self.work, self.progress = plan, space, work, progress
        weights = StoredWeights(reader, plan.checkpoint.config, plan.items)
        device, apart = setting.device, plan.sizes.wide > 0
        self.builder = Builder(weights, "float32", device, apart=apart)
        self.visitor = PriceVisitor(
            torch,
            device,
            space,
            reader,
            work.folder,
            plan.scored,
            setting.sample,
            setting.threads,
            progress,
        )
        self.stream = BackwardStream(
            self.builder,
            plan.blocks,
            np.ascontiguousarray(setting.windows[:, :-1]),
            plan.first,
            plan.sizes,
            plan.group,
            work,
            self.visitor,
            progress,
            seed=SEED,
        )

    def prices(self) -> Prices:
        """Return the prices of all blocks, once they are finished."""
        layers = [block.name for block in self.plan.blocks if block.name != HEAD]
        return self.visitor.prices([HEAD, *reversed(layers), EMBEDDINGS])


def digest_of(plan: PricingPlan, space: ChoiceSpace, setting: PricingSetting, identity: str) -> str:
    """Return a SHA-256 of everything that prices depend on."""
    described = [
        identity,
        hashlib.sha256(setting.windows.tobytes()).hexdigest(),
        {unit.name: list(unit.sizes) for unit in space.units},
        [plan.sizes.batch, plan.sizes.wide, plan.group, setting.device, setting.sample],
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()
