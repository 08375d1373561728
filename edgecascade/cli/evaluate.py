# SPDX-License-Identifier: Apache-2.0
"""eval"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from edgecascade.cli.options import add_backend, load, positive
from edgecascade.cli.show import plain, print_facts, print_json, print_tables

if TYPE_CHECKING:
    from rich.table import Table

    from edgecascade.evaluation import Evaluation
    from edgecascade.llm import LLM
    from edgecascade.scoring import Figures, Share
    from edgecascade.suite import Suite


def add(commands: Any) -> None:
    """The command and its options."""
    evaluate = commands.add_parser("eval", help="how well a bundle answers a suite of prompts")
    evaluate.add_argument("bundle")
    evaluate.add_argument("--suite", default="robot", help="a name or a .jsonl file; robot")
    evaluate.add_argument(
        "--split", action="append", default=[], help="only this; may be given several times"
    )
    evaluate.add_argument("--limit", type=positive, metavar="N", help="samples of each split")
    evaluate.add_argument("--against", metavar="BUNDLE", help="compare with another bundle")
    evaluate.add_argument(
        "--misses", type=positive, default=0, metavar="N", help="show so many wrong answers"
    )
    evaluate.add_argument("--json", action="store_true", help="figures and answers as JSON")
    add_backend(evaluate)
    evaluate.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    from edgecascade.suite import find_suite, read_suite

    bundles = [args.bundle] if args.against is None else [args.bundle, args.against]
    suite = read_suite(find_suite(args.suite, bundles)).part(args.split, args.limit)
    with ExitStack() as stack:
        llms = [stack.enter_context(load(args, bundle)) for bundle in bundles]
        result = _evaluate(llms, suite)
        about = {name: _about(llm) for name, llm in zip(("bundle", "against"), llms, strict=False)}
    if args.json:
        from edgecascade.bench import circumstances

        print_json({**about, **result.to_dict(), **circumstances()})
        return 0
    rates = (result.tokens_per_s, result.other_tokens_per_s)
    facts = {"suite": f"{suite.name}, {len(suite.samples):,} samples, {suite.sha256[:12]}"}
    for (name, d), rate in zip(about.items(), rates, strict=False):
        facts[name] = (
            f"{d['path']}, {d['precision']}, backend {d['backend']}; "
            f"{rate:,.0f} tokens/s, {d['slots']} answers side by side"
        )
    print_facts(facts)
    print_tables([_table(result)])
    _print_misses(result, args.misses)
    return 0


def _evaluate(llms: list[LLM], suite: Suite) -> Evaluation:
    from rich.console import Console
    from rich.progress import Progress

    from edgecascade.evaluation import evaluate

    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("answering", total=None)
        return evaluate(
            llms[0],
            suite,
            against=llms[1] if len(llms) > 1 else None,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _about(llm: LLM) -> dict[str, Any]:
    return {
        "path": str(llm.bundle.path),
        "id": llm.bundle.id,
        "precision": llm.bundle.precision,
        "backend": llm.backend,
        "threads": llm.threads,
        "slots": llm.slots,
    }


def _table(result: Evaluation) -> Table:
    from rich.table import Table

    compared = result.other_tokens_per_s is not None
    table = Table(title="exact match, and the interval of 95 % confidence", title_justify="left")
    table.add_column("split, skill")
    for name in ("samples", "exact", "interval", "valid", "perplexity"):
        table.add_column(name, justify="right")
    if compared:
        for name in ("other: exact", "perplexity", "KL", "top-1"):
            table.add_column(name, justify="right")
    for split in result.splits:
        table.add_section()
        table.add_row(split, *_cells(result.figures(split), compared), style="bold")
        for skill in result.skills(split):
            table.add_row(f"  {skill}", *_cells(result.figures(split, skill), compared))
    table.add_section()
    table.add_row("all", *_cells(result.figures(), compared), style="bold")
    return table


def _cells(figures: Figures, compared: bool) -> list[str]:
    f = figures
    low, high = f.exact.interval
    cells = [
        f"{f.samples:,}",
        _percent(f.exact),
        f"{low * 100:.1f} - {high * 100:.1f}",
        _percent(f.valid),
        _number(f.perplexity, 3),
    ]
    if compared:
        cells += [
            _percent(f.other_exact),
            _number(f.other_perplexity, 3),
            _number(f.divergence, 4),
            _percent(f.agreement),
        ]
    return cells


def _percent(share: Share | None) -> str:
    return "" if share is None else f"{share.share * 100:.1f} %"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _print_misses(result: Evaluation, count: int) -> None:
    misses = [each for each in result.results if not each.answer.score.exact]
    for each in misses[:count]:
        asked = each.sample.raw if each.sample.raw is not None else each.sample.messages[-1]
        text = asked if isinstance(asked, str) else asked["content"]
        print(plain(f"\n{each.sample.id} ({each.sample.skill}): {text}"))
        if each.answer.completion.reasoning:
            print(f"  thought  {each.answer.completion.reasoning!r}")
        print(plain(f"  {each.answer.score.why}"))
