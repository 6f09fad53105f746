"""Starts the demo's other parties as real processes, and stops them again."""

import asyncio
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

READY_SECONDS = 30
STOP_SECONDS = 10


class Party:
    """One process of ours, its output kept in a log file."""

    def __init__(self, name: str, log: Path, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.log = log
        self.process = process

    async def wait_for(self, pattern: str) -> re.Match[str]:
        """Waits until the output matches; raises `RuntimeError` if it never does."""
        with suppress(TimeoutError):
            async with asyncio.timeout(READY_SECONDS):
                while self.process.returncode is None:
                    found = re.search(pattern, self.output())
                    if found:
                        return found
                    await asyncio.sleep(0.05)
        raise RuntimeError(f"the {self.name} did not start:\n{self.output()}")

    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text("utf-8", "replace")

    async def stop(self) -> None:
        """Asks it to stop, and insists after a while."""
        if self.process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


async def start(
    name: str, folder: Path, *arguments: str, settings: Mapping[str, str] | None = None
) -> Party:
    """Starts `python -m ...` with extra environment settings."""
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(settings or {})},
        )
    return Party(name, log, process)


async def run(folder: Path, *arguments: str) -> str:
    """Runs `python -m ...` to its end and returns what it printed; raises if it failed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=folder,
    )
    output, _ = await process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{output.decode()}")
    return output.decode()
