"""All answers to one client's request: as a whole, or as a stream of events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence

from starlette.responses import JSONResponse, Response

from ftray.core.errors import RequestError
from ftray.engine.api import Output, Request, TokenLogprob
from ftray.serve import errors, stream
from ftray.serve.backend import Backend, Unavailable
from ftray.serve.choices import Choice, Piece
from ftray.serve.replies import Reply, error_body

logger = logging.getLogger(__name__)

_FAILED = {
    "generation_failed": "the engine failed; try again",
    "model_unusable": "cannot be used at the moment",
}

Outputs = AsyncGenerator[tuple[int, Output], None]
"""Outputs, each with the number of the prompt it belongs to."""


async def outputs_of(backend: Backend, requests: Sequence[Request]) -> Outputs:
    """Outputs of several prompts as they come; closing the generator cancels them all.

    Raises:
        RequestError, Unavailable: as soon as one of them is refused; the others are cancelled.
    """
    if len(requests) == 1:
        outputs = backend.generate(requests[0])
        try:
            async for output in outputs:
                yield 0, output
        finally:
            await outputs.aclose()
        return
    queue: asyncio.Queue[tuple[int, Output] | BaseException | None] = asyncio.Queue()
    tasks = [
        asyncio.create_task(_pump(backend, request, number, queue)) for number, request in enumerate(requests)
    ]
    try:
        going = len(tasks)
        while going:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                going -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    backend: Backend,
    request: Request,
    number: int,
    queue: "asyncio.Queue[tuple[int, Output] | BaseException | None]",
) -> None:
    outputs = backend.generate(request)
    try:
        async for output in outputs:
            queue.put_nowait((number, output))
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)
    finally:
        await outputs.aclose()


class Answers:
    """The choices of one response.

    Args:
        reply: what is the same in all of it.
        choices: every answer, those to one prompt beside each other.
        outputs: what the engines say.
    """

    def __init__(
        self, reply: Reply, choices: Sequence[Choice], outputs: Outputs, *, num_prompts: int
    ) -> None:
        self.reply = reply
        self.status = 499
        """How a stream ended: 499 until it has, which is what a client leaves behind."""
        self._choices = list(choices)
        self._outputs = outputs
        self._per_prompt = len(choices) // num_prompts
        self._prompt_logprobs: dict[int, Sequence[TokenLogprob | None]] = {}
        self._cached: dict[int, int] = {}

    async def whole(self) -> Response:
        """The complete response. Raises what `outputs_of` raises."""
        try:
            async for number, output in self._outputs:
                self._feed(number, output, keep=True)
        finally:
            await self._outputs.aclose()
        if not all(choice.finished for choice in self._choices):
            raise Unavailable("the answer ended early")
        return JSONResponse(self.reply.whole(self._choices), headers=self.reply.headers)

    async def first(self) -> "tuple[int, Output]":
        """The first output, so that whatever is refused gets a status and not a broken stream."""
        try:
            return await anext(self._outputs)
        except StopAsyncIteration:
            raise Unavailable("the answer ended early") from None
        except BaseException:
            await self._outputs.aclose()
            raise

    async def events(self, first: tuple[int, Output], *, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """A stream's events. One that fails ends with an error event and without `[DONE]`."""
        try:
            if self.reply.chat:
                for choice in self._choices:
                    yield stream.event(self.reply.first_chunk(choice.index))
            item = first
            while True:
                choice, piece = self._feed(*item, keep=False)
                if piece:
                    yield stream.event(self.reply.chunk(choice.index, piece))
                if all(choice.finished for choice in self._choices):
                    break
                item = await anext(self._outputs)
            if include_usage:
                yield stream.event(self.reply.usage_chunk())
            self.status = 200
            yield stream.DONE
        except RequestError as error:
            yield self._failed(error)
        except (Unavailable, StopAsyncIteration):
            yield self._failed(errors.unavailable("the engine went away during the answer"))
        except Exception as error:
            logger.error("stream failed: %s", errors.described(error))
            yield self._failed(errors.internal())
        finally:
            await self._outputs.aclose()

    def _failed(self, error: RequestError) -> bytes:
        self.status = error.status
        return stream.error_event(error_body(error))

    def _check(self, output: Output) -> None:
        """Refuse what failed, and what another delta answered than the one that is named."""
        model = self.reply.model
        if output.finish_reason == "error":
            # Its words are of this machine's folders, and no tenant's business.
            logger.error("%s: %s", model.ref, output.error)
            code = "generation_failed" if output.status >= 500 else "model_unusable"
            raise RequestError(f"{model.id}: {_FAILED[code]}", status=output.status, code=code)
        if output.digest != model.digest:
            logger.error(
                "%s is %s, but %s answered", model.ref, model.digest, output.digest or "nobody knows what"
            )
            raise RequestError(f"{model.id}: not what answered", status=500, code="wrong_model")

    def _feed(self, number: int, output: Output, *, keep: bool) -> tuple[Choice, Piece]:
        self._check(output)
        if output.prompt_logprobs is not None:
            self._prompt_logprobs[number] = output.prompt_logprobs
        usage = self.reply.usage
        usage.completion_tokens += len(output.token_ids)
        if output.num_cached_tokens and number not in self._cached:
            self._cached[number] = output.num_cached_tokens
            usage.cached_tokens += output.num_cached_tokens
        choice = self._choices[number * self._per_prompt + output.index]
        return choice, choice.feed(output, keep=keep, prompt_logprobs=self._prompt_logprobs.get(number))
