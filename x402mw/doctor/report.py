"""A diagnosis for people. What servers said is shown as plain text, never as markup."""

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from x402mw.doctor.examination import Diagnosis, Verdict
from x402mw.doctor.findings import Finding, Severity

_VERDICTS = {
    Verdict.FINE: ("fine: buyers can pay here", "bold green"),
    Verdict.PROBLEMS: ("buyers cannot pay here, or not safely", "bold red"),
    Verdict.NOT_OURS: ("nothing that x402mw could examine", "bold yellow"),
    Verdict.UNREACHABLE: ("no answer", "bold yellow"),
}
_STYLES = {Severity.PROBLEM: "red", Severity.WARNING: "yellow"}


def show(diagnosis: Diagnosis, console: Console) -> None:
    """Prints a diagnosis."""
    sentence, style = _VERDICTS[diagnosis.verdict]
    if diagnosis.facts:
        table = Table.grid(padding=(0, 2))
        for name, value in diagnosis.facts.items():
            table.add_row(Text(name, style="dim"), Text(_plain(value)))
        console.print(table)
    for one in sorted(diagnosis.findings, key=lambda one: one.severity.value):
        console.print(_panel(one))
    line = Text(f"{_plain(diagnosis.url)}: {sentence}", style=style)
    if diagnosis.cause:
        line.append(f" ({_plain(diagnosis.cause)})")
    console.print(line)


def _panel(one: Finding) -> Panel:
    style = _STYLES[one.severity]
    title = Text(f" {one.severity.value}: {one.code} ", style=f"bold {style}")
    seen, todo = Text("seen  ", style="dim"), Text("do    ", style="dim")
    seen.append(one.seen, style="default not dim")
    todo.append(one.todo, style="default not dim bold")
    return Panel(Group(seen, Text(one.why), todo), title=title, title_align="left", style=style)


def _plain(text: str) -> str:
    return "".join(one if one.isprintable() else "?" for one in text)
