"""The two loops that carry out the steps of a story, and nothing else: one async, one plain."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx

from x402mw_client.bodies import (
    CONTROL_TIMEOUT_SECONDS,
    control_message,
    message,
    read_answer,
    read_answer_async,
    take,
    take_async,
)
from x402mw_client.escrow import AsyncEscrowClient, EscrowClient
from x402mw_client.steps import (
    After,
    Ask,
    Control,
    Discard,
    Outgoing,
    Read,
    Send,
    Sleep,
    Step,
    Story,
    Take,
    Together,
    Wait,
)
from x402mw_client.waiting import Signal

T = TypeVar("T")

STORIES_AT_ONCE = 8
"""How many sessions are closed at a time."""


def tidy(story: Story[T], kept: list[httpx.Response]) -> Story[T]:
    """Tells a story with the clearing up it leaves out: an answer it goes on from is discarded.

    `kept` holds the answer that is not closed yet, unless it is the story's own result.
    """
    result: Any = None
    error: Exception | None = None
    try:
        while True:
            step = story.send(result) if error is None else story.throw(error)
            if isinstance(step, Send) and kept:
                yield Discard(kept.pop())
            result = error = None
            try:
                result = yield step
            except Exception as raised:
                error = raised
            if isinstance(step, Send) and error is None:
                kept.append(result)
    except StopIteration as end:
        if kept and kept[-1] is end.value:
            kept.clear()
        value: T = end.value
        return value
    finally:
        story.close()


class AsyncDriver:
    """Carries out stories in an event loop."""

    def __init__(
        self, inner: httpx.AsyncBaseTransport, escrow: AsyncEscrowClient, signal: Signal
    ) -> None:
        self._inner, self._escrow, self._signal = inner, escrow, signal

    async def run(self, story: Story[T], outgoing: Outgoing | None = None) -> T:
        """Runs a story to its end. `outgoing` is the request that its `Send` steps send."""
        kept: list[httpx.Response] = []
        steps = tidy(story, kept)
        try:
            step = next(steps)
            while True:
                try:
                    result = await self._carry_out(step, outgoing)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            steps.close()
            for answer in kept:
                await answer.aclose()

    async def _carry_out(self, step: Step, outgoing: Outgoing | None) -> Any:
        match step:
            case Send(signature) if outgoing is not None:
                return await self._inner.handle_async_request(message(outgoing, signature))
            case Control():
                return await self._control(control_message(step))
            case Read(answer):
                return await answer.aread()
            case Take(answer):
                return await take_async(answer)
            case Discard(answer):
                return await read_answer_async(answer)
        return await self._do(step)

    async def _do(self, step: Step) -> Any:
        match step:
            case After(answer, story):
                answer.stream = _ThenAsync(answer.stream, lambda: self.run(story))
                return None
            case Together(stories):
                return await self._run_all(stories)
            case Ask(operation):
                return await self._escrow.run(operation)
            case Sleep(seconds):
                return await asyncio.sleep(seconds)
            case Wait(condition, seconds):
                return await self._signal.wait_async(condition, seconds)
        raise AssertionError(type(step))

    async def _run_all(self, stories: list[Story[None]]) -> None:
        turns = asyncio.Semaphore(STORIES_AT_ONCE)

        async def run(story: Story[None]) -> None:
            async with turns:
                await self.run(story)

        found = await asyncio.gather(*map(run, stories), return_exceptions=True)
        for error in filter(None, found):
            raise error

    async def _control(self, request: httpx.Request) -> httpx.Response:
        try:
            async with asyncio.timeout(CONTROL_TIMEOUT_SECONDS):
                answer = await self._inner.handle_async_request(request)
        except TimeoutError:
            raise httpx.ReadTimeout("no answer to a control request", request=request) from None
        return await read_answer_async(answer)


class SyncDriver:
    """Carries out stories in a plain thread."""

    def __init__(self, inner: httpx.BaseTransport, escrow: EscrowClient, signal: Signal) -> None:
        self._inner, self._escrow, self._signal = inner, escrow, signal

    def run(self, story: Story[T], outgoing: Outgoing | None = None) -> T:
        """Runs a story to its end. `outgoing` is the request that its `Send` steps send."""
        kept: list[httpx.Response] = []
        steps = tidy(story, kept)
        try:
            step = next(steps)
            while True:
                try:
                    result = self._carry_out(step, outgoing)
                except Exception as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            steps.close()
            for answer in kept:
                answer.close()

    def _carry_out(self, step: Step, outgoing: Outgoing | None) -> Any:
        match step:
            case Send(signature) if outgoing is not None:
                return self._inner.handle_request(message(outgoing, signature))
            case Control():
                return read_answer(self._inner.handle_request(control_message(step)))
            case Read(answer):
                return answer.read()
            case Take(answer):
                return take(answer)
            case Discard(answer):
                return read_answer(answer)
        return self._do(step)

    def _do(self, step: Step) -> Any:
        match step:
            case After(answer, story):
                answer.stream = _Then(answer.stream, lambda: self.run(story))
                return None
            case Together(stories):
                with ThreadPoolExecutor(STORIES_AT_ONCE) as threads:
                    return list(threads.map(self.run, stories))
            case Ask(operation):
                return self._escrow.run(operation)
            case Sleep(seconds):
                return time.sleep(seconds)
            case Wait(condition, seconds):
                return self._signal.wait(condition, seconds)
        raise AssertionError(type(step))


# Answers that something follows. httpx closes a stream at its end as well as before it.


class _ThenAsync(httpx.AsyncByteStream):
    """An answer's stream, passed through as it is, and what follows once it is closed."""

    def __init__(self, stream: Any, then: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._stream, self._then = stream, [then]

    def __aiter__(self) -> AsyncIterator[bytes]:
        found: AsyncIterator[bytes] = aiter(self._stream)
        return found

    async def aclose(self) -> None:
        await self._stream.aclose()
        task = asyncio.current_task()
        # Who was cancelled is not kept waiting.
        if self._then and not (task and task.cancelling()):
            await self._then.pop()()


class _Then(httpx.SyncByteStream):
    """The same for plain code."""

    def __init__(self, stream: Any, then: Callable[[], None]) -> None:
        self._stream, self._then = stream, [then]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stream)

    def close(self) -> None:
        self._stream.close()
        if self._then:
            self._then.pop()()
