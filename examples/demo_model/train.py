# SPDX-License-Identifier: Apache-2.0
"""Train the demo model from its seed: data, tokenizer, training, checkpoint, bundle.

    python examples/demo_model/train.py --out build/demo_model

Run again after an interruption, it goes on from the last saved step. The same seed and number of
workers give the same weights, to the bit, on the same machine and PyTorch. DIR/checkpoint,
DIR/bundle and DIR/loss.png are the result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from batches import Batch, Mixture, long_row, rows_of
from export import write_bundle, write_checkpoint
from make_tokenizer import train as train_tokenizer
from model import CONFIG, HALF, Forward, as_int4, initial, is_matrix
from tokenizers import Tokenizer
from torch import Tensor

# glibc gives every large buffer back to the system by default; keeping them is 3 times faster. One
# thread a worker, and no more.
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Plan:
    """What is trained, and when. Steps count optimizer updates."""

    seed: int = 0
    steps: int = 4170
    workers: int = 2
    rows: int = 8  # a worker's share of a step
    micro_rows: int = 4  # of them at a time
    warm_up: int = 60
    curriculum: int = 1200  # by then the mixture is the final one
    second_part: int = 1600  # from here nouns are many more, and prompts count less
    third_part: int = 3300  # from here also words made of two words
    fourth_part: int = 3950  # from here also English that is no command
    decay_from: int = 1900  # from here the learning rate falls
    aim: int = 3700
    int4_from: int = 2850  # from here the matrices are rounded as the bundle will round them
    long_every: int = 64  # steps between long rows
    long_from: int = 1000
    rate: float = 4e-3
    last_rate: float = 7e-4  # at the beginning of the fourth part
    weight_decay: float = 0.05

    def mixture(self, step: int) -> Mixture:
        parts = self.second_part, self.third_part, self.fourth_part
        part = 1 + sum(step >= start for start in parts)
        return Mixture(step / self.curriculum, part, 0.1 if part == 1 else 0.02)

    def rate_at(self, step: int) -> float:
        """Constant, then down a line that would reach zero at `aim`, then down to zero; once more
        for the fourth part.
        """
        if step >= self.fourth_part:
            return self.last_rate * (self.steps - step) / (self.steps - self.fourth_part)
        if step < self.decay_from:
            return self.rate * min(1.0, (step + 1) / self.warm_up)
        fall = (self.aim - min(step, self.third_part)) / (self.aim - self.decay_from)
        if step > self.third_part:
            fall *= (self.fourth_part - step) / (self.fourth_part - self.third_part)
        return self.rate * fall


@dataclass
class Shared:
    """What the workers share: flat vectors over all parameters, one gradient a worker."""

    weights: Tensor
    half: Tensor  # matrices as they are multiplied: bfloat16, later rounded to INT4
    gradients: Tensor
    first: Tensor  # the optimizer's moments
    second: Tensor
    counts: Tensor  # [workers, layers, experts]
    sums: Tensor  # [workers, 4]: loss and count of answer tokens, of prompt tokens

    @classmethod
    def new(cls, plan: Plan, start: dict[str, Tensor]) -> Shared:
        weights = torch.cat([v.flatten() for v in start.values()])
        n, layers = weights.numel(), CONFIG["layers"].count("E")
        made = cls(
            weights,
            weights.to(HALF),
            torch.zeros(plan.workers, n),
            torch.zeros(n),
            torch.zeros(n),
            torch.zeros(plan.workers, layers, CONFIG["n_routed_experts"]),
            torch.zeros(plan.workers, 4, dtype=torch.float64),
        )
        for value in vars(made).values():
            value.share_memory_()
        return made


def views(flat: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {n: part.view(s) for (n, s), part in zip(shapes.items(), parts, strict=True)}


class Worker:
    """One process: its share of the rows, and its share of the parameters to update."""

    def __init__(self, rank: int, plan: Plan, shared: Shared, tokenizer: str) -> None:
        torch.set_num_threads(1)
        shapes = {name: value.shape for name, value in initial(plan.seed).items()}
        self.rank, self.plan, self.shared = rank, plan, shared
        self.tokenizer = Tokenizer.from_file(tokenizer)
        self.weights, half = views(shared.weights, shapes), views(shared.half, shapes)
        self.used = {n: half[n] if is_matrix(n) else self.weights[n] for n in shapes}
        self.biases = [n for n in shapes if n.endswith("correction_bias")]
        self.trained = [n for n in shapes if n not in self.biases]
        for name in self.trained:
            self.used[name].requires_grad_(True)
        self.gradient = views(shared.gradients[rank], shapes)
        self.gradients = [views(g, shapes) for g in shared.gradients]
        self.first, self.second = views(shared.first, shapes), views(shared.second, shapes)
        self.mine = share_of(rank, plan.workers, {n: shapes[n] for n in self.trained})
        self.short, self.long = Forward(compiled=True), Forward(compiled=False)

    def batches(self, step: int) -> Iterator[tuple[Forward, Batch]]:
        plan = self.plan
        made = rows_of(self.tokenizer, plan.seed, step, self.rank, plan.rows, plan.mixture(step))
        yield from ((self.short, piece) for piece in made.split(plan.micro_rows))
        part = plan.mixture(step).part
        if step >= plan.long_from and step % (plan.long_every if part < 4 else 8) == 0:
            yield self.long, long_row(self.tokenizer, plan.seed, step, self.rank, part)

    def accumulate(self, step: int) -> None:
        """Gradients of this worker's rows."""
        self.shared.gradients[self.rank].zero_()
        self.shared.counts[self.rank].zero_()
        self.shared.sums[self.rank].zero_()
        for forward, batch in self.batches(step):
            weights = batch.weights.flatten()
            losses, counts = forward.losses(self.used, batch.ids, batch.part, batch.targets)
            (losses * weights).sum().backward()
            for name in self.trained:
                grad = self.used[name].grad
                if grad is not None:
                    self.gradient[name].add_(grad)
                    self.used[name].grad = None
            with torch.no_grad():
                self.shared.counts[self.rank] += torch.stack(counts)
                answer, prompt = weights == 1, (weights > 0) & (weights < 1)
                for i, mask in enumerate((answer, prompt)):
                    self.shared.sums[self.rank, 2 * i] += losses[mask].sum()
                    self.shared.sums[self.rank, 2 * i + 1] += mask.sum()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Muon for matrices, AdamW for the rest; then the form in which matrices are multiplied."""
        plan, rate = self.plan, self.plan.rate_at(step)
        sums = self.shared.sums.sum(0)
        scale = 1 / float(sums[1] + sums[3] * plan.mixture(step).prompt_weight)
        groups: dict[torch.Size, list[tuple[str, Tensor]]] = {}
        for name in self.mine:
            gradient = self.gradients[0][name] * scale
            for other in self.gradients[1:]:
                gradient.add_(other[name], alpha=scale)
            if "proj" in name:
                self.first[name].mul_(0.95).add_(gradient)
                direction = gradient.add(self.first[name], alpha=0.95)
                groups.setdefault(direction.shape[-2:], []).append((name, direction))
            else:
                self.adam(name, gradient, step, rate)
        for shape, members in groups.items():
            flat = orthogonal(torch.cat([d.reshape(-1, *shape) for _, d in members]))
            at = 0
            for name, direction in members:
                end = at + direction.numel() // math.prod(shape)
                weight = self.weights[name]
                weight.mul_(1 - rate * plan.weight_decay)
                weight.add_(flat[at:end].view_as(weight), alpha=-rate * 0.2 * math.sqrt(max(shape)))
                at = end
        for name in filter(is_matrix, self.mine):
            weight = self.weights[name]
            self.used[name].copy_(as_int4(weight) if step + 1 >= plan.int4_from else weight)

    def adam(self, name: str, gradient: Tensor, step: int, rate: float) -> None:
        first, second = self.first[name], self.second[name]
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient * gradient, 0.02)
        spread = (second / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8
        if name.endswith(("A_log", "dt_bias")):
            rate *= 0.3
        self.weights[name].add_(first / (1 - 0.9 ** (step + 1)) / spread, alpha=-rate)

    @torch.no_grad()
    def balance(self, step: int) -> float:
        """Raise the selection bias of experts with few tokens; returns the worst overload."""
        plan, counts = self.plan, self.shared.counts.sum(0)
        speed = 0.02 * min(1.0, plan.rate_at(step) / plan.rate)
        mean = counts.mean(-1, keepdim=True)
        for name, change in zip(self.biases, (mean - counts) / mean * speed, strict=True):
            self.weights[name].add_(change)
        return float((counts.max(-1)[0] / mean[:, 0]).max())


def share_of(rank: int, workers: int, shapes: dict[str, torch.Size]) -> list[str]:
    """Parameters dealt out by the work of their update, the largest first."""

    def work(name: str) -> float:
        shape = shapes[name]
        return math.prod(shape) * (min(shape[-2:]) if "proj" in name else 4)

    load, dealt = [0.0] * workers, [[] for _ in range(workers)]  # type: list[float], list[list[str]]
    for name in sorted(shapes, key=work, reverse=True):
        least = load.index(min(load))
        load[least] += work(name)
        dealt[least].append(name)
    return dealt[rank]


def orthogonal(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration: the nearest matrices with singular values of about one."""
    X = matrices.to(HALF)
    tall = X.shape[-2] > X.shape[-1]
    X = X.transpose(-1, -2) if tall else X
    X = X / (X.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(HALF)
    for a, b, c in NEWTON_SCHULZ:
        A = X @ X.transpose(-1, -2)
        X = a * X + (b * A + c * (A @ A)) @ X
    return (X.transpose(-1, -2) if tall else X).float()


NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


def work(
    rank: int,
    plan: Plan,
    shared: Shared,
    out: Path,
    start: int,
    until: int,
    bar: Any,
    save_every: int,
) -> None:
    worker = Worker(rank, plan, shared, str(out / "tokenizer.json"))
    report = Report(plan, out, start) if rank == 0 else None
    for step in range(start, until):
        worker.accumulate(step)
        bar.wait()
        worker.update(step)
        if report:
            report.step(step, worker.balance(step), shared.sums.sum(0).tolist())
        bar.wait()
        if rank == 0 and ((step + 1) % save_every == 0 or step + 1 == until):
            save(out, plan, shared, step + 1)
    if report:
        report.close()


class Report:
    """A progress bar, and one line of JSON every 20 steps."""

    def __init__(self, plan: Plan, out: Path, start: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.log = (out / "log.jsonl").open("a")
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.task = self.progress.add_task("compiling", total=plan.steps, completed=start)
        self.progress.start()
        self.sums, self.tokens, self.began = [0.0] * 4, 0.0, time.monotonic()
        self.plan = plan

    def step(self, step: int, overload: float, sums: list[float]) -> None:
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
        self.progress.advance(self.task)
        if (step + 1) % 20 and step > 2:
            return
        answer, prompt = self.sums[0] / self.sums[1], self.sums[2] / max(1.0, self.sums[3])
        seconds = time.monotonic() - self.began
        line = {
            "step": step + 1,
            "loss": round(answer, 5),
            "prompt_loss": round(prompt, 4),
            "tokens_a_second": round((self.sums[1] + self.sums[3]) / seconds),
            "worst_expert_load": round(overload, 2),
            "rate": round(self.plan.rate_at(step), 6),
        }
        self.log.write(json.dumps(line) + "\n")
        self.log.flush()
        self.progress.update(self.task, description=f"loss {answer:.4f}")
        self.sums, self.began = [0.0] * 4, time.monotonic()

    def close(self) -> None:
        self.progress.stop()
        self.log.close()


def save(out: Path, plan: Plan, shared: Shared, step: int) -> None:
    kept = {k: getattr(shared, k) for k in ("weights", "first", "second")}
    torch.save({"step": step, "plan": asdict(plan), **kept}, out / "state.tmp")
    os.replace(out / "state.tmp", out / "state.pt")


def restore(out: Path, plan: Plan, shared: Shared, shapes: dict[str, torch.Size]) -> int:
    """The step to go on from."""
    if not (out / "state.pt").exists():
        return 0
    kept = torch.load(out / "state.pt", weights_only=True)
    for key in ("weights", "first", "second"):
        getattr(shared, key).copy_(kept[key])
    weights, half = views(shared.weights, shapes), views(shared.half, shapes)
    for name in filter(is_matrix, shapes):
        rounded = kept["step"] >= plan.int4_from
        half[name].copy_(as_int4(weights[name]) if rounded else weights[name])
    return int(kept["step"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run and of its results"
    )
    parser.add_argument("--until", type=int, help="stop after this step, to go on later")
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args()
    if any(os.environ.get(key) != value for key, value in ENVIRONMENT.items()):  # read at start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    plan = Plan()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "tokenizer.json").exists():
        train_tokenizer(CONFIG["vocab_size"], plan.seed).save(str(args.out / "tokenizer.json"))
    start_values = initial(plan.seed)
    shapes = {name: value.shape for name, value in start_values.items()}
    shared = Shared.new(plan, start_values)
    start = restore(args.out, plan, shared, shapes)
    until = min(plan.steps, args.until or plan.steps)
    context = mp.get_context("spawn")
    bar = context.Barrier(plan.workers)
    rest = plan, shared, args.out, start, until, bar, args.save_every
    others = [context.Process(target=work, args=(r, *rest)) for r in range(1, plan.workers)]
    for process in others:
        process.start()
    work(0, *rest)
    for process in others:
        process.join()
    if until == plan.steps:
        write_checkpoint(args.out, args.out / "checkpoint")
        write_bundle(args.out / "checkpoint", args.out / "bundle")
        draw(args.out / "log.jsonl", args.out / "loss.png", plan)


def draw(log: Path, picture: Path, plan: Plan) -> None:
    """The loss of the answers' tokens over the steps."""
    import matplotlib.pyplot as plt

    lines = (json.loads(line) for line in log.read_text().splitlines())
    losses = {line["step"]: line["loss"] for line in lines}  # steps done twice: the last counts
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.semilogy(sorted(losses), [losses[step] for step in sorted(losses)], linewidth=1)
    marks = {
        plan.second_part: "more nouns",
        plan.third_part: "compounds",
        plan.fourth_part: "other English",
        plan.decay_from: "rate falls",
        plan.int4_from: "INT4 weights",
    }
    for step, name in marks.items():
        axes.axvline(step, color="grey", linewidth=0.8, linestyle=":")
        axes.annotate(
            name, (step, max(losses.values())), rotation=90, fontsize=8, ha="right", va="top"
        )
    axes.set(xlabel="step", ylabel="loss of the answer's tokens (nats)")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
