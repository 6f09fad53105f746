"""The tables of `docs/performance.md`, made from the JSON of one run.

`python -m bench.report FILE.json [PAGE]` prints them, or writes them into the page.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.rounds import between

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
Found = dict[str, Any]
TITLES = {
    "bare": "bare Starlette",
    "ours-fsync": "x402mw, `fsync` (default)",
    "ours-process": "x402mw, `process`",
    "floor-fsync": "floor, waits for its fsync",
    "floor-process": "floor, journal every 5 ms",
    "x402-exact": "x402 SDK, `exact`",
    "x402-batch": "x402 SDK, `batch-settlement`",
    "pympp": "pympp, stub method",
}


def title(name: str) -> str:
    """A cell's name in words."""
    name = name.removesuffix(" paid").removesuffix(" unpaid")
    for key in sorted(TITLES, key=len, reverse=True):
        if name.startswith(key):
            rest = name.removeprefix(key).removeprefix("-")
            notes = {"": "", "2w": ", 2 workers"}.get(rest, f", handler takes {rest}")
            return TITLES[key] + notes
    return name


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def http_table(cells: Found) -> str:
    """Rates, ratios to bare and latencies of one group of cells."""
    rows = [
        (
            title(name),
            f"{cell['rate']:,.0f}",
            f"{cell['ratio']:.3f}",
            f"{cell['ratio_low']:.3f}-{cell['ratio_high']:.3f}",
            f"{cell['cpu_us']:.0f}",
            f"{cell['cpu_ratio']:.3f}",
            f"{cell['p50_ms']:.2f} / {cell['p99_ms']:.1f}",
        )
        for name, cell in cells.items()
    ]
    return table(
        (
            "server",
            "requests/s",
            "x bare",
            "lowest-highest",
            "CPU us/request",
            "x bare by CPU",
            "p50 / p99 ms",
        ),
        rows,
    )


def goals(found: Found) -> list[tuple[str, str, str, str]]:
    """(what, goal, measured, kept or not) of everything that must hold and was measured."""
    return [
        (what, goal, shown, "yes" if held else "no")
        for what, goal, shown, held in (*_http_goals(found), *_other_goals(found))
    ]


def _http_goals(found: Found) -> Iterable[tuple[str, str, str, bool]]:
    paid, unpaid, slow = (found.get(part, {}) for part in ("paid", "unpaid", "slow"))
    for name, least, exact in (("ours-fsync", 0.17, 1.4), ("ours-process", 0.21, 1.8)):
        cell = f"{name} paid"
        if cell in paid:
            yield _least(f"paid, {name}, x bare", least, paid[cell]["ratio"])
        for peer, factor in (("x402-exact", exact), ("x402-batch", 7)):
            if f"{peer} paid" in paid:
                yield _least(f"paid, {name}, x {peer}", factor, between(paid, cell, f"{peer} paid"))
    if "ours-fsync unpaid" in unpaid:
        yield _least("unpaid 402, x bare", 1.8, unpaid["ours-fsync unpaid"]["ratio"])
        if "x402-exact unpaid" in unpaid:
            ratio = between(unpaid, "ours-fsync unpaid", "x402-exact unpaid")
            yield _least("unpaid 402, x x402-exact", 8, ratio)
    for name in ("ours-fsync", "ours-process"):
        if f"{name}-20ms paid" in slow:
            ratio = slow[f"{name}-20ms paid"]["ratio"]
            yield _least(f"handler of 20 ms, {name}, x bare", 0.97, ratio)


def _other_goals(found: Found) -> Iterable[tuple[str, str, str, bool]]:
    if "client" in found:
        ours = found["client"]["ours"]
        yield _most("client, exchanges per paid call", 1, ours["exchanges"])
        yield _most("client, x bare httpx", 1.7, ours["ratio"])
    if "memory" in found:
        yield _most("memory, bytes per idle session", 600, found["memory"]["bytes"])
    for one in found.get("ledger", ()):
        if one["name"].startswith("redeem, ledger"):
            name = one["name"].removeprefix("redeem, ledger, ")
            yield _least(f"redemptions per second, {name}", 12_000, one["per_second"])
    if "crowd" in found:
        crowd = found["crowd"]
        yield _least("crowd, share served", 0.999, crowd["served_share"])
        yield ("crowd, charge exact", "yes", str(crowd["charge_exact"]), crowd["charge_exact"])
        yield _most("crowd, longest stall, ms", 100, crowd["stall_ms"])
    if "junk" in found:
        yield _most("bad vouchers, paid p99 x idle", 2, found["junk"]["ratio"])
    if "unverified" in found:
        yield _most("CPU before the signature, ms", 5, found["unverified"]["worst_ms"])


def _least(what: str, goal: float, value: float) -> tuple[str, str, str, bool]:
    return what, f">= {goal:,}", _short(value), value >= goal


def _most(what: str, goal: float, value: float) -> tuple[str, str, str, bool]:
    return what, f"<= {goal:,}", _short(value), value <= goal


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def client_table(clients: Found) -> str:
    """The buyer's side."""
    names = {"bare": "bare httpx", "ours": "x402mw_client"}
    rows = [
        (
            names.get(name) or title(name),
            f"{client['us']:.0f}",
            f"{client['ratio']:.2f}",
            f"{client['exchanges']:g}",
        )
        for name, client in clients.items()
    ]
    return table(("client", "us/call", "x bare", "exchanges/call"), rows)


def small_table(found: Found) -> str:
    """Everything that is one figure."""
    rows: list[tuple[str, str]] = []
    if "streaming" in found:
        one = found["streaming"]
        rows.append(
            (
                "a streamed chunk, in process: bare / metered",
                f"{one['bare_us']:.2f} / {one['ours_us']:.2f} us ({one['ratio']:.1f}x)",
            )
        )
    if "memory" in found:
        one = found["memory"]
        rows.append((f"memory per session, {one['sessions']:,} kept", f"{one['bytes']:.0f} bytes"))
    if "unverified" in found:
        one = found["unverified"]
        rows.append(
            (f"dearest unverified request: {one['worst']}", f"{one['worst_ms']:.2f} ms CPU")
        )
    if "junk" in found:
        one = found["junk"]
        rows.append(
            (
                f"paid p99 at {one['paid_per_second']}/s: alone / beside "
                f"{one['refused_per_second']:.0f} bad vouchers/s",
                f"{one['idle_p99_ms']:.1f} / {one['junk_p99_ms']:.1f} ms ({one['ratio']:.2f}x)",
            )
        )
    if "crowd" in found:
        one = found["crowd"]
        rows.append(
            (
                f"{one['calls']:,} calls at once on one session",
                f"{one['served']:,} served in {one['seconds']:.1f} s, longest stall "
                f"{one['stall_ms']:.0f} ms ({one['stall_cpu_ms']:.0f} ms of CPU); the bare app's: "
                f"{one['bare_stall_ms']:.0f} ms ({one['bare_stall_cpu_ms']:.0f})",
            )
        )
    return table(("measured", "figure"), rows)


def ledger_table(ledger: list[Found]) -> str:
    """What the escrow's own program found."""
    rows = [
        (
            one["name"],
            f"{one['per_second']:,}",
            f"{one['cpu_us_each']:.0f}",
            f"{one['cpu_bound_per_second']:,}",
        )
        for one in ledger
    ]
    return table(("operation", "per second", "CPU us each", "with all cores busy"), rows)


def machine_lines(machine: Found) -> str:
    """What it ran on, in words."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['date']}: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['system']}, Python {machine['python']}; fdatasync of 256 bytes "
        f"{machine['fdatasync_us']:.0f} us; load {machine['load_before'][0]:.1f} "
        f"before. {versions}."
    )


def tables(found: Found) -> str:
    """All tables of a run."""
    parts = [machine_lines(found["machine"])]
    if wanted := goals(found):
        parts += ["### What must hold", table(("what", "goal", "measured", "holds"), wanted)]
    for part, heading in (
        ("paid", "Paid requests"),
        ("unpaid", "Unpaid requests (402)"),
        ("slow", "Handlers that take their time"),
        ("workers", "Two workers, all cores"),
    ):
        if part in found:
            parts += [f"### {heading}", http_table(found[part])]
    if "client" in found:
        parts += ["### Buyer, CPU per paid call", client_table(found["client"])]
    if found.keys() & {"streaming", "memory", "unverified", "junk", "crowd"}:
        parts += ["### Single figures", small_table(found)]
    if found.get("ledger"):
        parts += ["### Escrow", ledger_table(found["ledger"])]
    return "\n\n".join(parts) + "\n"


def write_page(page: Path, found: Found) -> None:
    """Replaces what stands between the two marks of a page."""
    before, _, rest = page.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{tables(found)}\n{END}{after}")


def main() -> None:
    """Makes the tables of a run again."""
    found = json.loads(Path(sys.argv[1]).read_text())
    if sys.argv[2:]:
        write_page(Path(sys.argv[2]), found)
    else:
        print(tables(found))


if __name__ == "__main__":
    main()
