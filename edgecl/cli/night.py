"""By night: adapt, eval, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table

from ..learner import Learner, nothing_to_learn
from ..night import AdaptReport
from .output import console, json_option, print_json, progress_bar, safe, size

REFUSED = 3


@click.command()
@click.option("--task", help="Learn only this task's rows.")
@click.option("--minutes", type=float, help="Writing takes at most 0.25 of them, training 0.6. Default: the profile's.")
@click.option("--ram", "ram_bytes", type=int, help="Bytes of memory that each stage may hold. Default: the profile's.")
@click.option("--compare", default="", help="Types to merge and measure beside what will serve, such as int8,int4.")
@click.option("--dry-run", is_flag=True, help="Say what the night would learn, and stop.")
@json_option
@click.pass_context
def adapt(
    context: click.Context,
    task: str | None,
    minutes: float | None,
    ram_bytes: int | None,
    compare: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run one night now: learn what is pending; exit code 3 if the gate refuses it.

    A night that was interrupted goes on with the rows that it began with; those that came since wait for the next one.
    """
    with Learner(context.obj) as learner:
        if dry_run:
            counts = {t: r for t, r in learner.status()["tasks"].items() if task in (None, t) and r["pending"]}
            if as_json:
                print_json({"tasks": counts})
            for name, roles in {} if as_json else counts.items():
                click.echo(f"{safe(name)}: {roles['pending']} to learn, {roles['heldout']} held out for measuring")
            if not counts:
                raise nothing_to_learn(task)
            return
        with progress_bar() as progress:
            types = [quant for quant in compare.split(",") if quant]
            report = learner.adapt(task, minutes=minutes, ram_bytes=ram_bytes, compare=types, progress=progress)
    end_night(context, report, as_json)


def end_night(context: click.Context, report: AdaptReport, as_json: bool) -> None:
    """Print a night, and exit with the code of how it ended."""
    if as_json:
        print_json(report.as_dict())
    else:
        print_report(report)
    context.exit(0 if report.accepted else REFUSED)


def print_report(report: AdaptReport) -> None:
    """Print a night as a person reads it."""
    out = console()
    if report.accepted:
        out.print(f"published generation {report.generation}: {report.served}, {size(report.model_bytes)}")
    else:
        out.print(f"refused: {safe(report.reason)}; yesterday's model still serves")
    if not report.train:
        return
    if report.accepted and report.reason:
        out.print(safe(report.reason))
    table = Table("task", "rows", "measured on", "accuracy", "answer loss", "95% interval", box=None, pad_edge=False)
    for r in report.results:
        table.add_row(
            safe(r.task),
            str(r.n_rows),
            {"heldout": "held out", "learned": "tonight's", "replay": "rehearsed"}[r.kind],
            f"{r.accuracy_before:.0%} > {r.accuracy_after:.0%}",
            f"{r.loss_before:.2f} > {r.loss_after:.2f}",
            f"{r.loss_low:+.2f} to {r.loss_high:+.2f}",
        )
    out.print(table)
    prose = report.prose
    out.print(
        f"prose       {prose['after']:.2f} nats per token ({prose['after'] - prose['base']:+.2f} against the base, "
        f"KLD {prose['kld']:.3f})"
    )
    merged = [(quant, report.losses[quant], share) for quant, share in report.survival.items() if quant != "adapter"]
    kept = ", ".join(f"{quant} {loss:.2f} ({share:.0%} of the gain)" for quant, loss, share in merged)
    out.print(f"survival    answer loss {report.losses['adapter']:.2f} nats unmerged; {kept}")
    train = report.train
    out.print(f"plan        {safe(train['plan'])}; took {train['train_s']:.0f} s, {size(train['peak_rss_bytes'])}")
    for key, what in (
        ("n_cut", "longer than the context, cut from the left"),
        ("n_left_out", "without an answer that fits, left out"),
    ):
        if train[key]:
            out.print(f"rows        {train[key]} {what}")
    if report.accepted and train["left_out"]:
        out.print(f"archived    {len(train['left_out'])} new ones of these, not learned")
    found = {int(step): loss for step, loss in train["heldout"].items()}  # none: no held-out rows ended it
    if train["stopped_early"]:
        why = "held-out rows were best long before, or the time was over" if found else "the time was over"
        out.print(f"stopped     after {train['steps']} steps, before the last one: {why}")
    if report.accepted and train["unmet"]:
        best = f"held-out rows were best after step {min(found, key=found.__getitem__)}" if found else "the time was over"
        out.print(f"waiting     {len(train['unmet'])} of {report.n_new} new rows: {best}, a later night learns them")
    if train["no_asker"]:
        out.print(f"asker       none tonight: {safe(train['no_asker'])}")
    otherwise = f", {report.n_reworded} other wordings" if report.n_reworded else ""
    asking = f", learned to ask {report.ask_s:.0f} s" if report.ask_s else ""
    out.print(
        f"night       {report.n_new} new, {report.n_replay} kept, {report.n_written} written rows{otherwise}: "
        f"wrote {report.write_s:.0f} s, trained {report.train_s:.0f} s ({report.train_tokens_per_s:.0f} tokens/s){asking}, "
        f"merged {report.merge_s:.1f} s, measured {report.eval_s:.0f} s, peak {size(report.peak_rss_bytes)}"
    )


@click.command("eval")
@click.option("--generation", "number", type=click.IntRange(0), help="Default: the one that serves.")
@json_option
@click.pass_obj
def evaluate(home: Path | None, number: int | None, as_json: bool) -> None:
    """Measure a generation in llama.cpp: retention of every task, general ability, latency."""
    with Learner(home) as learner, progress_bar() as progress:
        facts = learner.evaluate(number, progress)
    if as_json:
        print_json(facts)
        return
    out = console()
    table = Table("task", "rows", "accuracy", "answer loss", box=None, pad_edge=False)
    for task, scores in facts["tasks"].items():
        table.add_row(safe(task), f"{scores['n_rows']}", f"{scores['accuracy']:.0%}", f"{scores['answer_loss_nats']:.2f}")
    out.print(f"generation {facts['generation']}")
    if facts["tasks"]:
        out.print(table)
    base, kld = facts["prose_nats_base"], facts["prose_kld"]
    out.print(f"prose       {facts['prose_nats']:.2f} nats per token (base {base:.2f}, KLD {kld:.3f})")
    _print_latency(facts["latency"])


@click.command()
@click.option("--while-learning", is_flag=True, help="The first token of chat turns alone: idle, and while a night trains.")
@json_option
@click.pass_obj
def bench(home: Path | None, while_learning: bool, as_json: bool) -> None:
    """Time the generation that serves: pp512, tg128, TTFT, ITL, memory, size."""
    if while_learning:
        _bench_while_learning(home, as_json)
        return
    with Learner(home) as learner, progress_bar() as progress:
        facts = learner.bench(progress=progress)
    if as_json:
        print_json(facts)
    else:
        _print_latency(facts)


def _bench_while_learning(home: Path | None, as_json: bool) -> None:
    from ..beside import ttft_beside_training

    with Learner(home) as learner:
        facts = ttft_beside_training(learner)
    if as_json:
        print_json(facts)
    else:
        click.echo(
            f"first token {facts['ttft_idle_ms']:.0f} ms (chat turns, median of {facts['n_turns']}), "
            f"while a night trains {facts['ttft_learning_ms']:.0f} ms: {facts['ratio']:.1f} times"
        )


def _print_latency(facts: dict[str, Any]) -> None:
    click.echo(f"prefill     {facts['pp512']:.0f} tokens/s (pp512), decode {facts['tg128']:.1f} tokens/s (tg128)")
    click.echo(
        f"latency     first token {facts['ttft_ms']:.0f} ms (64-token prompt), "
        f"then {facts['itl_p50_ms']:.1f} ms (p50), {facts['itl_p95_ms']:.1f} ms (p95)"
    )
    click.echo(f"memory      {size(facts['peak_rss_bytes'])} peak RSS, model file {size(facts['model_bytes'])}")


COMMANDS = (adapt, evaluate, bench)
