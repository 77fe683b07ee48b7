"""The planner: how a night is trained within the memory and the time that it may take, and what it will cost.

Memory is computed from the model's sizes, time is measured on a few layers of the loaded model. Of the ways that fit into
memory the fastest is taken: fewer weights resident, smaller parts of a step, layers computed twice. Where time is short,
fewer layers are trained.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from edgecl_convert.ggml import cpu_words

from ..errors import EdgeclError
from ..profile import TrainSettings
from ..shape import GROUPS, Shape
from .batches import TrainRow, predicted
from .decoder import Decoder
from .head import NO_TOKEN, Sample, log_sum
from .lora import Lora
from .packing import count_tokens, extent, micro_batches, pack
from .weights import HEAD_PART, Placement

UPPER = 0.5  # of the layers, those that are not frozen
DEPTHS = (0.75, 0.5, 0.4, 0.3, 0.2)  # what a night short of time falls back to, in this order
# what kernels keep, and code that training comes back to, measured over nights of 300 rows without and with an anchor, which
# rides along in some steps and so adds shapes of products: for each, oneDNN compiles kernels in bfloat16
KERNEL_BYTES = {torch.bfloat16: (120_000_000, 165_000_000), torch.float32: (60_000_000, 60_000_000)}
AMX_KERNEL_BYTES = (155_000_000, 200_000_000)
FEW_KERNELS_BYTES = {torch.bfloat16: (100_000_000, 140_000_000), torch.float32: (60_000_000, 60_000_000)}
# of what a step keeps for its backward pass: the allocator has so much more, in pieces that the next cannot use
IN_PIECES = 0.25
# most are compiled anew then in every step: as long as multiplying with so many tokens, for each part; those of AMX take longer
COMPILING_TOKENS, COMPILING_TOKENS_AMX = 10, 115
PART_TOKENS = 128  # one more part of a step takes as long as multiplying with so many tokens: small products are slow
DECODING_TOKENS = {torch.bfloat16: 140, torch.float32: 100}  # decoding a weight takes as long as multiplying it with so many
ADAPTER_BYTES = 20  # a trained number: itself, its gradient, two moments, all float32, and what products use of it
MICRO_TOKENS = 768  # different ones, of the largest part of a step: a product of more rows is no faster
PROBED_LAYERS = 5
SPARE = 0.08  # of the memory at hand


@dataclass(frozen=True)
class Plan:
    """How a night is trained.

    Attributes:
        first_layer: the lowest layer that is trained; first_wanted: that would be if there were time.
        upper_layer: the lowest that is trained from step `freeze_step` on.
        n_resident: so many layers, those nearest the head, stay decoded; resident_head: and whether the head does.
        checkpointing: whether a layer keeps only its input and is computed again in the backward pass.
        micro_tokens: different ones, of the parts that a step is split into.
        few_kernels: whether oneDNN forgets its kernels from step to step.
        peak_rss_bytes, seconds: what the night will take; 0 seconds: not measured yet.
    """

    first_layer: int
    first_wanted: int
    upper_layer: int
    freeze_step: int
    n_layer: int
    n_resident: int
    resident_head: bool
    checkpointing: bool
    micro_tokens: int
    few_kernels: bool
    peak_rss_bytes: int
    seconds: float = 0.0

    @property
    def is_resident(self) -> bool:
        """Whether nothing is decoded anew."""
        return self.n_resident == self.n_layer and self.resident_head

    @property
    def ahead_tokens(self) -> int:
        """Of the parts in which rows go through frozen layers: these take what a step's layers keep, where they keep it."""
        return self.micro_tokens if self.checkpointing else max(MICRO_TOKENS, self.micro_tokens)

    def __str__(self) -> str:
        """Return the plan as one line."""
        n_packed = self.n_layer - self.n_resident
        packed = f"weights of {n_packed} layers packed" if n_packed else "head packed"
        weights = "weights resident" if self.is_resident else packed if self.n_resident else "weights packed"
        short = " for lack of time" if self.first_layer > self.first_wanted else ""
        upper = f", the upper {self.n_layer - self.upper_layer} from step {self.freeze_step + 1} on"
        upper *= self.upper_layer > self.first_layer
        slower = ", layers computed twice" * self.checkpointing + ", few kernels kept" * self.few_kernels
        return (
            f"{self.n_layer - self.first_layer} of {self.n_layer} layers{short}{upper}, {weights}, "
            f"parts of {self.micro_tokens} tokens{slower}: {self.seconds:.0f} s, {self.peak_rss_bytes / 1e6:.0f} MB"
        )


def first_trained(shape: Shape, depth: float) -> int:
    """Return the lowest trained layer where a share `depth` of the layers is trained."""
    return shape.n_layer - max(1, round(depth * shape.n_layer))


def plan_memory(
    shape: Shape,
    place: Placement,
    settings: TrainSettings,
    ram_bytes: int,
    batches: Sequence[Sequence[TrainRow]],
    n_anchor: int,
    before: int,
    micro_tokens: int = 0,
    share: float = 1.0,
) -> Plan:
    """Return the fastest plan whose memory fits into `ram_bytes`.

    Args:
        batches: rows of each step; n_anchor: tokens of a piece of general text.
        before: bytes that the process holds already, but a checkpoint's, which are freed when it begins.
        micro_tokens: of the parts that a run which is gone on from had: it keeps them where they fit; 0: a new one.
        share: of the memory, with which is planned.

    Raises:
        EdgeclError: none fits; says how much would.
    """
    longest = max((len(row.ids) for rows in batches for row in rows), default=1)
    extents = [_extent(rows, n_anchor) for rows in batches] or [(1, 0, [(1, 1)])]
    different = max(n_tokens for n_tokens, _, _ in extents)
    slots = max(sum(n * width for n, width in lines) for _, _, lines in extents)
    seen = max(sum(n * width * (width + n_shared) for n, width in lines) for _, n_shared, lines in extents)
    n_answers = max((sum(row.n_predicted for row in rows) for rows in batches), default=1)
    first, room = first_trained(shape, settings.depth), int(ram_bytes * share * (1 - SPARE))
    freeze_step, upper = math.ceil(settings.freeze_at * len(batches)), max(first, first_trained(shape, UPPER))
    if upper == first or freeze_step == len(batches):
        upper, freeze_step = first, 0
    plans: list[tuple[float, Plan]] = []
    least = 0
    micros = {parts: max(min(MICRO_TOKENS, different) // parts, longest) for parts in (1, 2, 4, 8)}
    has_amx = place.dtype == torch.bfloat16 and "amx_bf16" in cpu_words()
    all_kernels = AMX_KERNEL_BYTES if has_amx else KERNEL_BYTES[place.dtype]
    compiling = COMPILING_TOKENS_AMX if has_amx else COMPILING_TOKENS
    largest = max(zip(extents, batches, strict=False), key=lambda pair: pair[0][0], default=(None, []))[1]
    steps = {parts: [count_tokens(part) for part in micro_batches(largest, micro)] or [1] for parts, micro in micros.items()}
    for checkpointing, few in itertools.product((False, True), (False, True)):
        for parts, micro in micros.items():
            n_tokens = micro + n_anchor
            pairs = max(seen // parts, longest * longest)
            n_predicted = min(n_answers + n_anchor, n_tokens)
            sizes = Sizes(n_tokens, slots // parts, pairs, n_predicted)
            kernels = (FEW_KERNELS_BYTES[place.dtype] if few else all_kernels)[n_anchor > 0]
            fixed = before + training_bytes(shape, place, settings.r, first, sizes, checkpointing) + kernels
            least = min(least or fixed, fixed)
            if fixed > room:
                continue
            n, head = resident_part(shape, place.dtype.itemsize, first, room - fixed)
            held = place.dtype.itemsize * (n * shape.layer_weights + head * shape.n_vocab * shape.width)
            plan = Plan(first, first, upper, freeze_step, shape.n_layer, n, head, checkpointing, micro, few, fixed + held)
            plans.append((_cost(shape, plan, steps[parts], DECODING_TOKENS[place.dtype], compiling if few else 0), plan))
    if not plans:
        wanted = int(least / share / (1 - SPARE)) + 1
        raise EdgeclError(
            f"training needs {wanted / 1e6:.0f} MB of memory at least, ram_bytes is {ram_bytes / 1e6:.0f} MB; "
            "raise it, shorten the longest example, or use a smaller model"
        )
    kept = [pair for pair in plans if pair[1].micro_tokens == micro_tokens]
    return min(kept or plans, key=lambda pair: pair[0])[1]


def _extent(rows: Sequence[TrainRow], n_anchor: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Return what rows take as `extent` has it, with room for a piece of general text to attend in."""
    ids, wanted = [row.ids for row in rows], predicted(rows) + [(len(rows), t) for t in range(n_anchor)]
    n_tokens, n_shared, lines = extent([*ids, range(n_anchor)], wanted)
    return n_tokens - n_anchor, n_shared, lines


def _cost(shape: Shape, plan: Plan, parts: Sequence[int], decoding: int, compiling: int) -> float:
    """Return what layers cost a step whose parts have so many tokens, in weights times tokens.

    Args:
        decoding: a weight, compiling: a part's kernels; each as long as multiplying with so many tokens.
    """
    n_trained = plan.n_layer - plan.first_layer
    passes, n_parts = 3 if plan.checkpointing else 2, len(parts)
    decoded = passes * max(0, n_trained - plan.n_resident) * shape.layer_weights
    decoded += (not plan.resident_head) * shape.n_vocab * shape.width
    multiplied = (sum(parts) + PART_TOKENS * (n_parts - 1) + compiling * n_parts) * passes * n_trained * shape.layer_weights
    return multiplied + decoding * decoded * n_parts


def resident_part(shape: Shape, itemsize: int, first_layer: int, room: int) -> tuple[int, bool]:
    """Return how many layers stay decoded in `room` bytes, and whether the head does.

    Trained layers come first, which are gone through twice a step; then the head; then those that are met once a row.
    """
    head, layer = itemsize * shape.n_vocab * shape.width, itemsize * shape.layer_weights
    n_trained = shape.n_layer - first_layer
    n = min(n_trained, room // layer)
    room -= n * layer
    if n < n_trained or room < head:
        return n, False
    return n + min(first_layer, (room - head) // layer), True


class Sizes(NamedTuple):
    """Of the largest part of a step.

    Attributes:
        n_slots: in which tokens attend; n_pairs: of slots.
        n_predicted: tokens that are predicted.
    """

    n_tokens: int
    n_slots: int
    n_pairs: int
    n_predicted: int


def training_bytes(shape: Shape, place: Placement, r: int, first_layer: int, sizes: Sizes, checkpointing: bool) -> int:
    """Return what training of the layers from one on holds beside resident weights and kernels.

    That is the adapter, activations, scratch, and the head's parts.
    """
    e, d, n_tokens = place.dtype.itemsize, shape.head_dim, sizes.n_tokens
    n_trained = shape.n_layer - first_layer
    n_adapter = (
        shape.n_layer * r * sum(shape.columns(group) + shape.rows(name) for group, names in GROUPS.items() for name in names)
    )
    attention = sizes.n_slots * (shape.n_head + 2 * shape.n_kv) * d + sizes.n_pairs * shape.n_head
    of_a_layer = e * (n_tokens * (2 * shape.width + shape.n_head * d + 2 * shape.n_ff) + attention)
    pairs = e * sizes.n_pairs * shape.n_head
    at_work = max(e * n_tokens * 7 * shape.n_ff, 2 * pairs)  # of a feed-forward part, or of attention, there and back
    biases = pairs * (2 if shape.window else 1)
    kept = n_trained * e * n_tokens * shape.width + of_a_layer + at_work if checkpointing else n_trained * of_a_layer + at_work
    scratch = e * shape.layer_weights + e * HEAD_PART
    head = sizes.n_predicted * (HEAD_PART // shape.width) * (4 + 2 * e)
    return n_adapter * ADAPTER_BYTES + round((1 + IN_PIECES) * kept) + biases + scratch + head


@dataclass(frozen=True)
class Typical:
    """A step as long as most: its rows, a piece of general text, what stands for the vocabulary."""

    rows: list[TrainRow]
    text: list[int] | None
    sample: Sample | None = None


def plan_time(
    plan: Plan,
    decoder: Decoder,
    lora: Lora,
    depth: float,
    limit_s: float,
    typical: Typical,
    n_steps: int,
    share_first: float,
) -> Plan:
    """Return the plan with its time, and with fewer layers than `depth` where those would take longer than `limit_s`.

    Args:
        lora: an adapter without gradients, as it is again afterwards.
        share_first: of the rows of steps, those that are met for the first time and go through frozen layers.
    """
    probed = min(PROBED_LAYERS, plan.n_layer)
    top = plan.n_layer - probed  # resident if any layer is
    parts = []
    for i, part in enumerate(micro_batches(typical.rows, plan.micro_tokens)):
        text = [typical.text] if typical.text and not i else []
        wanted = predicted(part) + [(len(part), t) for ids in text for t in range(len(ids))]
        packed = pack(decoder, [*(row.ids for row in part), *text], wanted)
        parts.append((decoder.weights.embed(packed.ids), packed.where, len(wanted)))

    def train() -> None:
        for x, where, _ in parts:
            y = decoder.run(x, where, lora, top)
            y.sum().backward()  # given a gradient, torch would load sympy: 36 MB

    @torch.no_grad()
    def go_through(first: int) -> None:
        for x, where, _ in parts:
            decoder.run(x, where, None, first, first + probed)

    @torch.no_grad()
    def multiply_head() -> None:
        for x, _, n_predicted in parts:
            hidden = x[:n_predicted]
            without = torch.full((len(hidden),), NO_TOKEN, device=x.device)
            log_sum(hidden, without, decoder.weights, typical.sample)

    trained, head = _seconds(train) / probed, _seconds(multiply_head)
    through = _seconds(partial(go_through, 0)) / probed
    through_top = through if plan.is_resident else _seconds(partial(go_through, top)) / probed
    decoding = max(0.0, through - through_top) * (3 if plan.checkpointing else 2)
    assert lora.flat.grad is not None
    lora.flat.grad.zero_()

    def of_a_step(n_trained: int) -> float:
        n_packed = max(0, n_trained - plan.n_resident) if plan.n_resident else 0  # else `trained` has it already
        return head + n_trained * trained + n_packed * decoding

    for first in [plan.first_layer, *(first_trained(decoder.shape, d) for d in DEPTHS if d < depth)]:
        upper = max(first, plan.upper_layer)
        parts_of_night = [(plan.freeze_step, first), (n_steps - plan.freeze_step, upper)]
        seconds = sum(n * (of_a_step(plan.n_layer - layer) + share_first * layer * through) for n, layer in parts_of_night)
        plan = replace(plan, first_layer=first, upper_layer=upper, seconds=seconds)
        if seconds <= limit_s:
            break
    return plan


def _seconds(work: Callable[[], None]) -> float:
    """Return the time of the fastest of three runs: the first one meets new shapes."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # until then it is only begun
        times.append(time.perf_counter() - began)
    return min(times)
